"""The diagnosis of a detectron2 run: remedies as config keys, a hook, a call with a config."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from rethinking_bn.diagnosis import Diagnosis, Finding, diagnose
from rethinking_bn.engine.loaders import build_together
from rethinking_bn.population.model_state import modes_kept

logger = logging.getLogger(__name__)

# by the beginning of a layer's name, the key that names its norm
_NORM_KEYS = {
    "backbone.bottom_up": "MODEL.RESNETS.NORM",
    "backbone.fpn": "MODEL.FPN.NORM",
    "backbone": "MODEL.RESNETS.NORM",
    "head": "MODEL.RETINANET.NORM",
    "roi_heads.box_head": "MODEL.ROI_BOX_HEAD.NORM",
    "roi_heads.mask_head": "MODEL.ROI_MASK_HEAD.NORM",
}
_SHUFFLED = {"box_head": "ShuffleBNBoxHead", "mask_head": "ShuffleBNMaskHead"}
_ESTIMATE = {"TEST.PRECISE_BN.ENABLED": "True"}
_ROW_4 = {
    "MODEL.META_ARCHITECTURE": "ConfigurableHeadRetinaNet",
    "MODEL.RETINANET.HEAD_NAME": "CycleBNRetinaNetHead",
    **{f"MODEL.RETINANET.BN.{k}": "''" for k in ("TRAIN_STATS", "POPULATION_STATS", "AFFINE")},
}
_HOOK_BATCHES = 32


def with_config_keys(diagnosis: Diagnosis, cfg: CfgNode | None, target: str = "") -> Diagnosis:
    """Return the diagnosis with the remedies as config keys, too, where there are any.

    They stand between backticks, key and value by turns, as the tools take them behind their
    options; keys that ``cfg`` has as they should be are left out. ``target`` is the data set that
    "domain-shift" is about.
    """
    if cfg is None:
        return diagnosis
    findings = []
    for finding in diagnosis.findings:
        ways = _as_keys(finding, cfg, target) if finding.remedy else []
        changed = [{k: v for k, v in way.items() if _value(cfg, k) != v} for way in ways]
        texts = [" ".join(f"{k} {v}" for k, v in way.items()) for way in changed if way]
        if texts:
            told = " or ".join(f"`{text}`" for text in texts)
            told += " with --eval-only" * ("PRECISE_BN.THAW" in told)
            finding = dataclasses.replace(finding, remedy=f"{finding.remedy} [config: {told}]")
        findings.append(finding)
    return dataclasses.replace(diagnosis, findings=tuple(findings))


def _as_keys(finding: Finding, cfg: CfgNode, target: str) -> list[dict[str, str]]:
    """Return the ways to mend a finding, each as keys and values in words."""
    kind, layer = finding.kind, finding.layer
    norm = next((key for start, key in _NORM_KEYS.items() if layer.startswith(start)), "")
    if finding.evidence.get("constant"):
        thaw = {**_ESTIMATE, "TEST.PRECISE_BN.THAW": "True"}
        if kind != "identity-statistics":
            return [thaw]
        return [{norm: "BN", **_ESTIMATE}] if norm else []
    freeze = {"SOLVER.FREEZE_BN.START": str(cfg.SOLVER.MAX_ITER * 9 // 10)}
    if kind == "repeated-use":
        return [_ROW_4] if layer.startswith("head") else []
    if kind == "small-batch":
        pooled = [{norm: "SyncBN"}] if norm else []
        return [*pooled, freeze, {"TEST.STATISTICS": "batch"}]
    if kind == "dependent-samples":
        name = next((name for name in _SHUFFLED if f"roi_heads.{name}" in layer), "")
        return [{f"MODEL.ROI_{name.upper()}.NAME": _SHUFFLED[name]}] if name else []
    if kind == "domain-shift":
        return [{**_ESTIMATE, "TEST.PRECISE_BN.DATASETS": f"\"('{target}',)\""}] if target else []
    if kind == "non-finite" and finding.evidence["batches"]:
        slower = {"SOLVER.BASE_LR": f"{cfg.SOLVER.BASE_LR / 10:g}"}
        return [slower, {"SOLVER.CLIP_GRADIENTS.ENABLED": "True"}]
    if finding.evidence.get("cause") == "block":
        return [{"MODEL.BACKBONE.FREEZE_AT": "0"}, freeze]
    return [] if kind == "dead-channels" else [_ESTIMATE]


def _value(cfg: CfgNode, key: str) -> str:
    """Return the value of a key in words; "" for one that the config does not have."""
    node: Any = cfg
    for part in key.split("."):
        node = getattr(node, part, "")
    return str(node) or "''"


def run_diagnosis(
    cfg: CfgNode, model: nn.Module, num_batches: int, *, target: str = "",
    data_loader: Iterable[Any] | None = None,
) -> Diagnosis:  # fmt: skip
    """Diagnose a loaded model on the batches of its training, in training mode; modes come back.

    Args:
        num_batches: per rank.
        target: a registered data set of another domain; "": none.
        data_loader: takes the place of the config's loader for population training.

    Raises:
        ValueError: as the loaders and ``diagnose``.
    """
    loader = build_together(cfg) if data_loader is None else data_loader
    target_batches = None
    if target:
        other = cfg.clone()
        other.defrost()
        other.TEST.PRECISE_BN.DATASETS = (target,)
        target_batches = build_together(other)
    with modes_kept(model):
        model.train()
        diagnosis = diagnose(model, loader, target_batches=target_batches, num_batches=num_batches)
    return with_config_keys(diagnosis, cfg, target)


class DiagnoseBN(HookBase):
    """Diagnose the model every ``period`` iterations, so that a run shows when it goes wrong.

    Scalars ``diagnose/severe``, ``diagnose/warning``, ``diagnose/note`` (how many) and
    ``diagnose/<kind>`` (the largest effect of each kind, "_" for "-"); what is severe is logged.
    Runs on every rank, before the hooks that write. Costs about twice population training with
    ``num_batches``.

    State read: the model. State changed: none but the trainer's storage.
    """

    def __init__(
        self, period: int, model: nn.Module, data_loader: Iterable[Any], num_batches: int,
        cfg: CfgNode | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            period: in iterations.
            model: the trainer's, data-parallel wrapper included.
            data_loader: batches as training's; every ``iter()`` starts over.
            num_batches: per rank; at most 32 are taken.
            cfg: for remedies as config keys.

        Raises:
            ValueError: for a period below 1 or fewer than two batches.
        """
        if period < 1 or num_batches < 2:
            raise ValueError(
                f"period must be at least 1 and num_batches 2, got {period} and {num_batches}"
            )
        self._period, self._model, self._data_loader = period, model, data_loader
        self._num_batches, self._cfg = min(num_batches, _HOOK_BATCHES), cfg
        self.last: Diagnosis | None = None

    @classmethod
    def from_config(
        cls, cfg: Any, model: nn.Module, loader: Callable[[], Iterable[Any]]
    ) -> DiagnoseBN | None:
        """Return the hook that TEST.DIAGNOSE asks for; None if it does not."""
        period = cfg.TEST.DIAGNOSE.PERIOD
        number = cfg.TEST.PRECISE_BN.NUM_ITER
        return cls(period, model, loader(), number, cfg) if period else None

    def after_step(self) -> None:
        """Diagnose if it is time to."""
        if (self.trainer.iter + 1) % self._period:
            return
        found = diagnose(
            self._model, self._data_loader, num_batches=self._num_batches, progress=False
        )
        self.last = with_config_keys(found, self._cfg)
        for name, value in self.last.scalars():
            self.trainer.storage.put_scalar(f"diagnose/{name}", value, smoothing_hint=False)
        level = logging.WARNING if self.last.severe else logging.INFO
        logger.log(level, "%s", self.last)
