"""Keys of ours that are set and that nothing reads: no component of the model, no trainer.

A registered component of ours declares ``reads``, the keys that it reads or groups of them
("MODEL.RETINANET.BN"), and ``norm_keys``, the keys that name its norms, which may have options
(:data:`rethinking_bn.modeling.norm_head.NORM_OPTIONS`). detectron2's components read none of ours;
those of other projects may read what they like.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    Res5ROIHeads,
)
from torch import nn

from rethinking_bn.config import our_keys
from rethinking_bn.layers import PopulationLayer
from rethinking_bn.modeling import RETINANET_HEAD
from rethinking_bn.modeling.norm_head import NORM_OPTIONS
from rethinking_bn.population.model_state import unwrap

logger = logging.getLogger(__name__)

# which key of MODEL names a component, and where it is registered
_PLACES: dict[str, Any] = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE.NAME": BACKBONE_REGISTRY,
    "RETINANET.HEAD_NAME": RETINANET_HEAD,
    "PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
}
_OUTER = ("META_ARCHITECTURE", "ROI_HEADS.NAME")
# read by the trainer and by what is checked before a run
_ELSEWHERE = ("MODEL.COMPILE_NORMS", "MODEL.MABN.REQUIRE_WEIGHTS")


def check_keys_are_read(cfg: CfgNode) -> None:
    """Raise a ValueError, in one line, for keys of ours that nothing in the model will read."""
    if unread := unread_keys(cfg):
        raise ValueError("; ".join(unread))


def warn_of_unread_keys(cfg: Any) -> None:
    """Log them as warnings: for parts of ours in a trainer that has built its model already."""
    for line in unread_keys(cfg) if isinstance(cfg, CfgNode) else ():
        logger.warning("%s", line)


def unread_keys(cfg: CfgNode) -> list[str]:
    """Return a line for each key of ours that was changed and that no chosen component reads."""
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        return []  # building the model says so
    parts = _chosen(cfg)
    read = [*_ELSEWHERE, *(key for place in parts for key in _reads(cfg, place, parts[place]))]
    if not cfg.MODEL.get("DOMAIN_BN", {}).get("DATASETS", ()):
        read = [key for key in read if key != "MODEL.DOMAIN_BN"]  # there are no domains
    found = [
        _line(cfg, parts, key, value)
        for key, value in _changed(our_keys().MODEL, cfg.MODEL, "MODEL.")
        if not _covered(key, read)
    ]
    for place, registry in _PLACES.items():  # a head of ours in a model without its place
        name = _value(cfg, place)
        if place.startswith("ROI") and place not in parts and name in registry:
            if hasattr(registry.get(name), "reads"):
                outer = [f"MODEL.{p} {_value(cfg, p)}" for p in parts if p in _OUTER]
                found.append(
                    f"MODEL.{place} is {name!r}, but {' or '.join(outer[-1:])} has no such head: "
                    "set that to GeneralizedRCNN or NormImagesROIHeads, or leave it out"
                )
    return found


def _chosen(cfg: CfgNode) -> dict[str, Any]:
    """Return the components that the model will have, by the keys that name them."""
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    places = ["META_ARCHITECTURE", "BACKBONE.NAME"]
    if _covered("MODEL.RETINANET.HEAD_NAME", getattr(architecture, "reads", ())):
        places.append("RETINANET.HEAD_NAME")
    may_have_rois = issubclass(architecture, GeneralizedRCNN) or _is_foreign(architecture)
    if may_have_rois and not issubclass(architecture, RetinaNet):
        places += ["PROPOSAL_GENERATOR.NAME", "ROI_HEADS.NAME", "ROI_MASK_HEAD.NAME"]
        name = cfg.MODEL.ROI_HEADS.NAME
        res5 = name in ROI_HEADS_REGISTRY and issubclass(ROI_HEADS_REGISTRY.get(name), Res5ROIHeads)
        places += [] if res5 else ["ROI_BOX_HEAD.NAME"]
    named = {place: _value(cfg, place) for place in places}
    return {p: _PLACES[p].get(name) for p, name in named.items() if name in _PLACES[p]}


def _reads(cfg: CfgNode, place: str, part: Any) -> Iterator[str]:
    if _is_foreign(part):
        section = place.rpartition(".")[0]
        yield f"MODEL.{section}" if section else "MODEL"
        yield from NORM_OPTIONS.values()
        return
    yield from getattr(part, "reads", ()) if not _is_detectron2s(part) else ()
    for key in getattr(part, "norm_keys", ()):
        norm = _value(cfg, key.removeprefix("MODEL."))
        if norm in NORM_OPTIONS:
            yield NORM_OPTIONS[norm]


def _line(cfg: CfgNode, parts: dict[str, Any], key: str, value: Any) -> str:
    """Say that a key is not read, and what would read it."""
    said = f"{key} is {value!r}, but"
    norms = [norm for norm, group in NORM_OPTIONS.items() if _covered(key, [group])]
    if norms:
        return f"{said} no norm of this package is {norms[0]}: set one of the NORM keys to it"
    place, ours = _readers(key)
    if place and place not in parts:
        what = place
        place, ours = _readers(f"MODEL.{place}")
        if not place:
            here = f"MODEL.META_ARCHITECTURE {_value(cfg, 'META_ARCHITECTURE')}"
            return f"{said} {here} has no MODEL.{what} to read it: leave it out"
    if not place:
        return f"{said} nothing reads it: leave it out"
    if _value(cfg, place) in ours:
        return f"{said} there are no domains: name them in MODEL.DOMAIN_BN.DATASETS"
    here = f"MODEL.{place} {_value(cfg, place)}"
    return f"{said} {here} does not read it: set that to {' or '.join(ours)}, or leave it out"


def _readers(key: str) -> tuple[str, list[str]]:
    """Return where a key is read, and the components there that read it."""
    for place, registry in _PLACES.items():
        readers = {n: part for n, part in registry if _covered(key, getattr(part, "reads", ()))}
        ours = [name for name, part in readers.items() if not _is_detectron2s(part)]
        if ours:
            return place, ours
    return "", []


def _changed(defaults: CfgNode, cfg: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys of ours whose values are not their defaults."""
    for name, default in defaults.items():
        value = cfg.get(name, default)
        if isinstance(default, CfgNode):
            yield from _changed(default, value, f"{prefix}{name}.")
        elif value != default and (value or default):
            yield prefix + name, value


def _covered(key: str, groups: Iterable[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _value(cfg: CfgNode, key: str) -> Any:
    """Return the value of a key of MODEL, "" where there is no such key."""
    node: Any = cfg.MODEL
    for name in key.split("."):
        node = node.get(name, "")
    return node


def _reader(component: Any) -> str:
    reader = getattr(component, "from_config", component)
    return str(getattr(reader, "__func__", reader).__module__)


def _is_detectron2s(component: Any) -> bool:
    return _reader(component).startswith("detectron2.")


def _is_foreign(component: Any) -> bool:
    return not _reader(component).startswith(("detectron2.", "rethinking_bn."))


class FollowKeys(HookBase):
    """Refuse to train where a key of ours is set that hooks cannot follow and the trainer does not.

    TrainerMixin follows all of them; another trainer may by an AccumulatingTrainer, ``train_only``,
    ``compile_norms``, and a ``test`` that uses ``inference_statistics``.

    State read: the trainer's step trainer, model and test function. State changed: none.
    """

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg

    @classmethod
    def from_config(cls, cfg: Any, model: nn.Module, loader: Any = None) -> FollowKeys | None:
        """Return the hook; None where no such key is set."""
        solver = cfg.SOLVER
        asked = solver.ACCUMULATION_STEPS > 1 or solver.TRAIN_ONLY or cfg.MODEL.COMPILE_NORMS
        return cls(cfg) if asked or cfg.TEST.STATISTICS != "population" else None

    def before_train(self) -> None:
        """Look at the trainer.

        Raises:
            ValueError: naming the first key that it does not follow.
        """
        for key, value, is_followed in _of_trainers(self._cfg):
            if not is_followed(self.trainer):
                name = self.trainer.__class__.__name__
                raise ValueError(
                    f"{key} is {value!r}, but {name} does not follow it: derive it as class "
                    f"{name}(rethinking_bn.engine.TrainerMixin, DefaultTrainer), or leave it out"
                )


def _of_trainers(cfg: Any) -> list[tuple[str, Any, Callable[[Any], bool]]]:
    """Return the keys that trainers follow: key, value, and whether a trainer follows that."""
    passes, patterns = cfg.SOLVER.ACCUMULATION_STEPS, cfg.SOLVER.TRAIN_ONLY
    statistics, compiled = cfg.TEST.STATISTICS, cfg.MODEL.COMPILE_NORMS

    def steps(trainer: Any) -> bool:
        step = getattr(trainer, "_trainer", trainer)
        return bool(getattr(step, "accumulation_steps", 1) == passes)

    def trains(trainer: Any) -> bool:
        return not patterns or not _trained_otherwise(unwrap(trainer.model), patterns)

    def compiles(trainer: Any) -> bool:
        ours = [m for m in trainer.model.modules() if isinstance(m, PopulationLayer)]
        marks = ("_compiled_call_impl", "_normalize_level", "_run")  # see layers/compile.py
        return not (compiled and ours) or any(vars(m).get(k) for m in ours for k in marks)

    def tests(trainer: Any) -> bool:
        for kind in trainer.__class__.__mro__ if statistics != "population" else ():
            function = vars(kind).get("test")
            code = getattr(getattr(function, "__func__", function), "__code__", None)
            if code is not None and {"inference_statistics", "batch_statistics"} & {*code.co_names}:
                return True
            if code is not None and "test" not in code.co_names:
                return False  # it does not call the next class's
        return statistics == "population"

    return [
        ("SOLVER.ACCUMULATION_STEPS", passes, steps),
        ("SOLVER.TRAIN_ONLY", patterns, trains),
        ("TEST.STATISTICS", statistics, tests),
        ("MODEL.COMPILE_NORMS", compiled, compiles),
    ]


def _trained_otherwise(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the parameters that train though no pattern names their module."""
    named = [
        module
        for name, module in model.named_modules()
        if name and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    chosen = {id(parameter) for module in named for parameter in module.parameters()}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in chosen]
