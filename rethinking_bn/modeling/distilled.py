"""RetinaNet that learns from another one's soft predictions beside the labels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import RetinaNet
from torch import Tensor

from rethinking_bn.checkpointer import Checkpointer
from rethinking_bn.config import add_rethinking_bn_config, get_config_file, list_config_files
from rethinking_bn.distillation import binary_kl_soft_loss
from rethinking_bn.modeling.retinanet import ConfigurableHeadRetinaNet


def teacher_config(name: str) -> CfgNode:
    """Return the config of a file, or of a name in ``configs/`` or in detectron2's model zoo.

    Raises:
        ValueError: when there is no such file.
    """
    path, installed = name, False
    if not os.path.isfile(name) and name in list_config_files():
        path = get_config_file(name)
    elif not os.path.isfile(name):
        try:
            path = model_zoo.get_config_file(name)
        except RuntimeError as error:
            raise ValueError(
                f"MODEL.DISTILL.TEACHER_CONFIG {name!r} is no file, and no name under configs/ or "
                "in detectron2's model zoo"
            ) from error
        installed = ".." not in Path(name).parts
    cfg = get_cfg()
    add_rethinking_bn_config(cfg)
    # the zoo's Base-RetinaNet.yaml holds a tag that runs code, which is detectron2's own
    cfg.merge_from_file(path, allow_unsafe=installed)
    return cfg


class Teacher:
    """A trained RetinaNet that is no part of the model that holds it.

    No module, so that checkpoints, optimizers, modes and population training pass it by; copies of
    a model share it. It is built when it is first asked, leaves the random state as it was, and
    stays in eval mode. ``config_file`` is what :func:`teacher_config` finds.
    """

    def __init__(self, config_file: str, weights: str) -> None:
        self.config_file, self.weights = config_file, weights
        self._model: RetinaNet | None = None

    def __deepcopy__(self, memo: Any) -> Teacher:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def model(self, like: Tensor) -> RetinaNet:
        """Return the teacher, on ``like``'s device and in its type if it was not there yet.

        Raises:
            ValueError: when a key is missing or the config is not a RetinaNet's.
        """
        if self._model is None:
            for key, value in (("CONFIG", self.config_file), ("WEIGHTS", self.weights)):
                if not value:
                    raise ValueError(f"MODEL.DISTILL.TEACHER_{key} is empty, which training needs")
            cfg = teacher_config(self.config_file)
            cfg.MODEL.DEVICE = str(like.device)
            with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
                model = build_model(cfg)
            if not isinstance(model, RetinaNet):
                raise ValueError(
                    f"MODEL.DISTILL.TEACHER_CONFIG {self.config_file} is a "
                    f"{type(model).__name__}, not a RetinaNet"
                )
            Checkpointer(model, save_to_disk=False).load(self.weights)
            self._model = model.requires_grad_(False).to(like).eval()
        return self._model

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the teacher as its student is moved."""
        if self._model is not None:
            self._model._apply(fn)

    @torch.no_grad()
    def logits(self, batched_inputs: list[dict[str, Any]], like: Tensor) -> list[Tensor]:
        """Return L tensors (N, anchors, K): what the teacher says of the classes."""
        model = self.model(like)
        features = model.backbone(model.preprocess_image(batched_inputs).tensor)
        predictions = model.head([features[name] for name in model.head_in_features])
        return model._transpose_dense_predictions([predictions[0]], [model.num_classes])[0]


@META_ARCH_REGISTRY.register()
class DistilledRetinaNet(ConfigurableHeadRetinaNet):
    """ConfigurableHeadRetinaNet with one loss more, against a teacher (docs/distillation.md).

    ``loss_distill`` is WEIGHT · :func:`rethinking_bn.distillation.binary_kl_soft_loss` over all
    classes of the anchors that the focal loss counts, those that are not ignored, over all levels
    and images. Apart from it this is the model it would be without a teacher, whose checkpoints it
    shares. The teacher gets the same images, normalised by its own pixel statistics.

    Raises (in training):
        ValueError: when teacher and student predict for other anchors or classes.
    """

    reads = (*ConfigurableHeadRetinaNet.reads, "MODEL.DISTILL")

    @configurable
    def __init__(
        self,
        *,
        teacher: Teacher,
        temperature: float = 5.0,
        distill_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Take RetinaNet's arguments, a teacher, and T and the weight of the soft loss."""
        super().__init__(**kwargs)
        self.teacher = teacher
        self.temperature, self.distill_weight = temperature, distill_weight
        self._targets: list[Tensor] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.DISTILL, and all that ConfigurableHeadRetinaNet reads.

        Raises:
            ValueError: for a temperature that is not above 0, and as ConfigurableHeadRetinaNet.
        """
        keys = cfg.MODEL.DISTILL
        if not keys.TEMPERATURE > 0:
            raise ValueError(f"MODEL.DISTILL.TEMPERATURE must be above 0, got {keys.TEMPERATURE}")
        return {
            **super().from_config(cfg),
            "teacher": Teacher(keys.TEACHER_CONFIG, keys.TEACHER_WEIGHTS),
            "temperature": keys.TEMPERATURE,
            "distill_weight": keys.WEIGHT,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As RetinaNet's; in training with ``loss_distill``."""
        if not self.training:
            return super().forward(batched_inputs)
        self._targets = self.teacher.logits(batched_inputs, next(self.parameters()))
        try:
            return super().forward(batched_inputs)
        finally:
            self._targets = None

    def losses(
        self, anchors: Any, pred_logits: list[Tensor], gt_labels: list[Tensor], *rest: Any
    ) -> dict[str, Tensor]:
        """As RetinaNet's, and ``loss_distill``."""
        targets = self._targets
        assert targets is not None  # losses are the forward's in training
        mine, theirs = ([tuple(level.shape) for level in side] for side in (pred_logits, targets))
        if mine != theirs:
            raise ValueError(
                "the teacher's predictions are not for the student's anchors and classes: (images, "
                f"anchors, classes) per level are {theirs}, the student's {mine}"
            )
        found = super().losses(anchors, pred_logits, gt_labels, *rest)
        counts = torch.stack(gt_labels) >= 0  # (N, anchors of all levels)
        soft = binary_kl_soft_loss(
            torch.cat(pred_logits, dim=1)[counts],
            torch.cat(targets, dim=1)[counts],
            self.temperature,
        )
        return {**found, "loss_distill": self.distill_weight * soft}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.teacher.apply(fn)
        return self
