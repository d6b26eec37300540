"""Keys of ours that are set and that nothing reads: no component of the model, no trainer.

A registered component of ours declares ``reads``, keys or groups of them ("MODEL.RETINANET.BN"),
and ``norm_keys``, the keys that name its norms, which may have options (``NORM_OPTIONS``).
detectron2's components read none of ours; those of other projects may read what they like.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from operator import attrgetter
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
from rethinking_bn.engine.load_config import flat
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
    parts, values = _chosen(cfg), flat(cfg.MODEL, "MODEL.")
    read = [*_ELSEWHERE, *(key for place in parts for key in _reads(cfg, place, parts[place]))]
    if not values.get("MODEL.DOMAIN_BN.DATASETS"):
        read = [key for key in read if key != "MODEL.DOMAIN_BN"]  # there are no domains
    changed = {
        key: values[key]
        for key, default in flat(our_keys().MODEL, "MODEL.").items()
        if not isinstance(default, CfgNode) and key in values
        if values[key] != default and (values[key] or default)
    }
    for place, registry in _PLACES.items():  # a head of ours in a model without its place
        name = _value(cfg, place)
        if place not in parts and name in registry and hasattr(registry.get(name), "reads"):
            changed[f"MODEL.{place}"] = name
    return [_line(cfg, parts, *item) for item in changed.items() if not _covered(item[0], read)]


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
    yield from getattr(part, "reads", ())
    for key in getattr(part, "norm_keys", ()):
        norm = _value(cfg, key.removeprefix("MODEL."))
        if norm in NORM_OPTIONS:
            yield NORM_OPTIONS[norm]


def _line(cfg: CfgNode, parts: dict[str, Any], key: str, value: Any) -> str:
    """Say that a key is not read, and what would read it."""
    norms = [norm for norm, group in NORM_OPTIONS.items() if _covered(key, [group])]
    here = " with ".join(f"MODEL.{p} {_value(cfg, p)}" for p in parts if p in _OUTER)
    readers = _readers(key)
    for place in [*readers]:  # what reads the name of that component
        readers = _readers(f"MODEL.{place}") | readers
    choice = " and ".join(f"MODEL.{place} {' or '.join(n)}" for place, n in readers.items())
    if norms:
        choice = f"{norms[0]} in one of the NORM keys of this package's components"
    elif key.startswith("MODEL.DOMAIN_BN.") and not cfg.MODEL.DOMAIN_BN.DATASETS:
        choice = "the domains, in MODEL.DOMAIN_BN.DATASETS"
    return (
        f"{key} is {value!r}, but {here} does not read it: choose {choice or 'other components'}, "
        "or leave it out"
    )


def _readers(key: str) -> dict[str, list[str]]:
    """Return the first place where components of ours read a key, and their names."""
    for place, registry in _PLACES.items():
        if ours := [n for n, part in registry if _covered(key, getattr(part, "reads", ()))]:
            return {place: ours}
    return {}


def _covered(key: str, groups: Iterable[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _value(cfg: CfgNode, key: str) -> Any:
    """Return the value of a key of MODEL, "" where there is no such key."""
    return flat(cfg.MODEL).get(key, "")


def _is_foreign(component: Any) -> bool:
    """Return whether the config is read for a component by neither detectron2's code nor ours."""
    reader = getattr(component, "from_config", component)
    module = getattr(reader, "__func__", reader).__module__
    return not module.startswith(("detectron2.", "rethinking_bn."))


class FollowKeys(HookBase):
    """Refuse to train where a key of ours is set that hooks cannot follow and the trainer does not.

    TrainerMixin follows all of them. Another trainer may, too: by an AccumulatingTrainer,
    ``train_only``, ``compile_norms``, and a ``test`` that uses ``inference_statistics``.

    State read: the trainer's step trainer, model and test function. State changed: none.
    """

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg

    @classmethod
    def from_config(cls, cfg: Any, *_: Any) -> FollowKeys | None:
        """Return the hook where a key is set that it looks after."""
        asked = cfg.SOLVER.ACCUMULATION_STEPS > 1 or cfg.TEST.STATISTICS != "population"
        return cls(cfg) if asked or cfg.SOLVER.TRAIN_ONLY or cfg.MODEL.COMPILE_NORMS else None

    def before_train(self) -> None:
        """Look at the trainer; a ValueError names the first key that it does not follow."""
        cfg, model, kind = self._cfg, unwrap(self.trainer.model), self.trainer.__class__
        step = getattr(self.trainer, "_trainer", self.trainer)
        passes, patterns = cfg.SOLVER.ACCUMULATION_STEPS, cfg.SOLVER.TRAIN_ONLY
        follows = {
            "SOLVER.ACCUMULATION_STEPS": getattr(step, "accumulation_steps", 1) == passes,
            "SOLVER.TRAIN_ONLY": not patterns or _trains_only(model, patterns),
            "TEST.STATISTICS": cfg.TEST.STATISTICS == "population" or _tests_by_choice(kind),
            "MODEL.COMPILE_NORMS": not cfg.MODEL.COMPILE_NORMS or _is_compiled(model),
        }
        for key, is_followed in follows.items():
            if not is_followed:
                raise ValueError(
                    f"{key} is {attrgetter(key)(cfg)!r}, but {kind.__name__} does not follow it: "
                    f"derive it as class {kind.__name__}(rethinking_bn.engine.TrainerMixin, "
                    "DefaultTrainer), or leave it out"
                )


def _trains_only(model: nn.Module, patterns: Sequence[str]) -> bool:
    """Return whether only parameters within the modules that patterns name need a gradient."""
    named = {
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(fnmatchcase(name, f"{pattern}.*") for pattern in patterns)
    }
    return not any(p.requires_grad and p not in named for p in model.parameters())


def _is_compiled(model: nn.Module) -> bool:
    """Return whether compile_norms has left its mark on a layer of ours, if there is one."""
    ours = [m for m in model.modules() if isinstance(m, PopulationLayer)]
    marks = ("_compiled_call_impl", "_normalize_level", "_run")  # see layers/compile.py
    return not ours or any(vars(m).get(mark) for m in ours for mark in marks)


def _tests_by_choice(trainer: type) -> bool:
    """Return whether a trainer's ``test``, or one that it calls, chooses the statistics."""
    for kind in trainer.__mro__:
        function = vars(kind).get("test")
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        names = getattr(code, "co_names", ("test",))  # as if it called the next class's
        if {"inference_statistics", "batch_statistics"} & {*names}:
            return True
        if "test" not in names:
            return False
    return False
