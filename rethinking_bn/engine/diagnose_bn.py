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
from rethinking_bn.engine.load_config import changed, flat
from rethinking_bn.engine.loaders import build_together
from rethinking_bn.population.model_state import modes_kept

logger = logging.getLogger(__name__)

# by the beginning of a layer's name, the key that names its norm
_NORM_KEYS = {
    "backbone.fpn": "MODEL.FPN.NORM",
    "backbone": "MODEL.RESNETS.NORM",
    "head": "MODEL.RETINANET.NORM",
    "roi_heads.box_head": "MODEL.ROI_BOX_HEAD.NORM",
    "roi_heads.mask_head": "MODEL.ROI_MASK_HEAD.NORM",
}
_ESTIMATE = {"TEST.PRECISE_BN.ENABLED": "True"}
_ROW_4 = {
    "MODEL.META_ARCHITECTURE": "ConfigurableHeadRetinaNet",
    "MODEL.RETINANET.HEAD_NAME": "CycleBNRetinaNetHead",
    **{f"MODEL.RETINANET.BN.{k}": "''" for k in ("TRAIN_STATS", "POPULATION_STATS", "AFFINE")},
}


def with_config_keys(diagnosis: Diagnosis, cfg: CfgNode | None, target: str = "") -> Diagnosis:
    """Return the diagnosis with the remedies as config keys, too, as the tools take them.

    Keys that ``cfg`` has as they should be are left out. ``target`` is the data set that
    "domain-shift" is about.
    """
    if cfg is None:
        return diagnosis
    now = {key: str(value) or "''" for key, value in flat(cfg).items()}
    findings = []
    for finding in diagnosis.findings:
        ways = _as_keys(finding, cfg, target) if finding.remedy else []
        changes = [{k: v for k, v in way.items() if now.get(k) != v} for way in ways]
        texts = [" ".join(f"{k} {v}" for k, v in way.items()) for way in changes if way]
        if texts:
            told = " or ".join(f"`{text}`" for text in texts)
            told += " with --eval-only" * ("PRECISE_BN.THAW" in told)
            finding = dataclasses.replace(finding, remedy=f"{finding.remedy} [config: {told}]")
        findings.append(finding)
    return dataclasses.replace(diagnosis, findings=tuple(findings))


def _as_keys(finding: Finding, cfg: CfgNode, target: str) -> list[dict[str, str]]:
    """Return the ways to mend a finding, each as keys and values in words."""
    kind, layer, evidence = finding.kind, finding.layer, finding.evidence
    norm = next((key for start, key in _NORM_KEYS.items() if layer.startswith(start)), "")
    freeze = {"SOLVER.FREEZE_BN.START": str(cfg.SOLVER.MAX_ITER * 9 // 10)}
    heads = {"box_head": "ShuffleBNBoxHead", "mask_head": "ShuffleBNMaskHead"}
    if evidence.get("constant"):
        thaw = {**_ESTIMATE, "TEST.PRECISE_BN.THAW": "True"}
        ways = [{norm: "BN", **_ESTIMATE} if kind == "identity-statistics" else thaw]
    elif kind == "repeated-use":
        ways = [_ROW_4] if layer.startswith("head") else []
    elif kind == "small-batch":
        ways = [{norm: "SyncBN"}, freeze, {"TEST.STATISTICS": "batch"}]
    elif kind == "dependent-samples":
        ways = [
            {f"MODEL.ROI_{name.upper()}.NAME": head}
            for name, head in heads.items()
            if f"roi_heads.{name}" in layer
        ]
    elif kind == "domain-shift":
        ways = [{**_ESTIMATE, "TEST.PRECISE_BN.DATASETS": f"\"('{target}',)\""}] if target else []
    elif kind == "non-finite" and evidence["batches"]:
        slower = {"SOLVER.BASE_LR": f"{cfg.SOLVER.BASE_LR / 10:g}"}
        ways = [slower, {"SOLVER.CLIP_GRADIENTS.ENABLED": "True"}]
    elif evidence.get("cause") == "block":
        ways = [{"MODEL.BACKBONE.FREEZE_AT": "0"}, freeze]
    else:
        ways = [] if kind == "dead-channels" else [_ESTIMATE]
    return [way for way in ways if "" not in way]  # of a layer whose norm no key names


def run_diagnosis(
    cfg: CfgNode, model: nn.Module, num_batches: int, *, target: str = ""
) -> Diagnosis:
    """Diagnose a loaded model on the batches of its training, in training mode; modes come back.

    Args:
        num_batches: per rank.
        target: a registered data set of another domain; "": none.
    """
    loader, target_batches = build_together(cfg), None
    if target:
        target_batches = build_together(changed(cfg, "TEST.PRECISE_BN.DATASETS", (target,)))
    with modes_kept(model):
        model.train()
        diagnosis = diagnose(model, loader, target_batches=target_batches, num_batches=num_batches)
    return with_config_keys(diagnosis, cfg, target)


class DiagnoseBN(HookBase):
    """Diagnose the model every ``period`` iterations, and log what is severe.

    State read: the model. State changed: the scalars ``diagnose/severe``, ``diagnose/warning``,
    ``diagnose/note`` (how many) and ``diagnose/<kind>`` (the largest effect of each kind, "_" for
    "-"). Runs on every rank, before the hooks that write. Costs about twice population training.
    """

    def __init__(
        self,
        period: int,
        model: nn.Module,
        data_loader: Iterable[Any],
        num_batches: int,
        cfg: CfgNode | None = None,
    ) -> None:
        """
        Args:
            period: in iterations, at least 1.
            model: the trainer's, data-parallel wrapper included.
            data_loader: batches as training's; every ``iter()`` starts over.
            num_batches: per rank, at least 2; at most 32 are taken.
            cfg: for remedies as config keys.
        """
        if period < 1 or num_batches < 2:
            raise ValueError(f"needs a period >= 1 and 2 batches, got {period} and {num_batches}")
        self._period, self._model, self._data_loader = period, model, data_loader
        self._num_batches, self._cfg = min(num_batches, 32), cfg
        self.last: Diagnosis | None = None

    @classmethod
    def from_config(
        cls, cfg: Any, model: nn.Module, loader: Callable[[], Iterable[Any]]
    ) -> DiagnoseBN | None:
        """Return the hook that TEST.DIAGNOSE asks for; None if it does not."""
        period, number = cfg.TEST.DIAGNOSE.PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER
        return cls(period, model, loader(), number, cfg) if period else None

    def after_step(self) -> None:
        """Diagnose if it is time to."""
        if (self.trainer.iter + 1) % self._period:
            return
        found = diagnose(
            self._model, self._data_loader, num_batches=self._num_batches, progress=False
        )
        self.last = with_config_keys(found, self._cfg)
        named = {f"diagnose/{name}": value for name, value in self.last.scalars()}
        self.trainer.storage.put_scalars(smoothing_hint=False, **named)
        level = logging.WARNING if self.last.severe else logging.INFO
        logger.log(level, "%s", self.last)
