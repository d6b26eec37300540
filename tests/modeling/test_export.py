"""Exported heads and models of detectron2 against eager ones at two sizes (defects 23, 24, 50)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import Tensor, nn

from rethinking_bn.modeling import (
    CycleBNRetinaNetHead,
    DomainBNRetinaNetHead,
    MultiDomainBNRetinaNetHead,
    NormBoxHead,
    NormMaskHead,
    SharedBNRetinaNetHead,
    ShuffleBNBoxHead,
    ShuffleBNMaskHead,
)
from tests.helpers import tracer_warnings_ignored
from tests.modeling.models import head_arguments
from tests.test_configs import PAPER, load

C, L = 8, 3
HEADS: dict[str, tuple[Any, str]] = {
    "row 1": (SharedBNRetinaNetHead, "BN"),
    "row 4": (CycleBNRetinaNetHead, "SyncBN"),
    "row 6": (DomainBNRetinaNetHead, "SyncBN"),
    "MABN": (MultiDomainBNRetinaNetHead, "MABN"),
    "batch statistics": (MultiDomainBNRetinaNetHead, "BatchStatBN"),
}
ROI_HEADS = [
    (cls, norm)
    for cls in (NormBoxHead, ShuffleBNBoxHead, NormMaskHead, ShuffleBNMaskHead)
    for norm in ("BN", "BatchStatBN")
]


def _trained(model: nn.Module) -> nn.Module:
    """Give the norms statistics, and the scores a spread that leaves no ties."""
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2].startswith("running"):
            buffer.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4 and "head." in name:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model.eval()


def _levels(n: int, size: int) -> list[Tensor]:
    return [torch.randn(n, C, size + i, size) for i in range(L)]


@pytest.mark.parametrize("kind", HEADS)
def test_retinanet_heads(kind: str) -> None:  # defects 23 and 24
    cls, norm = HEADS[kind]
    options = {"norm_arguments": {"batch_size": 2}} if norm == "MABN" else {}
    shapes = [ShapeSpec(channels=C)] * L
    head = cls(**head_arguments(input_shape=shapes, conv_dims=[C], norm=norm, **options))
    sum(y.sum() for ys in head(_levels(2, 5)) for y in ys).backward()
    head = _trained(head)
    with tracer_warnings_ignored():
        traced = torch.jit.trace(head, (_levels(0, 3),))
        dynamic = {d: torch.export.Dim.DYNAMIC for d in (0, 2, 3)}
        program = torch.export.export(
            head, (_levels(2, 9),), dynamic_shapes=([dynamic] * L,), strict=False
        )
    for exported in (traced, torch.jit.script(head), program.module()):
        for size in ((1, 5), (3, 8)):
            xs = _levels(*size)
            torch.testing.assert_close(exported(xs), head(xs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls, norm", ROI_HEADS)
def test_roi_heads_with_an_example_without_detections(cls, norm) -> None:  # defects 23 and 24
    shape, is_box = ShapeSpec(channels=C, height=4, width=4), issubclass(cls, NormBoxHead)
    options = {"fc_dims": [6]} if is_box else {"num_classes": 2}
    head = cls(shape, conv_dims=[C, C], conv_norm=norm, **options)
    run: Any = head if is_box else _Layers(head)
    run(torch.randn(5, C, 4, 4)).sum().backward()  # defect 50: after training, too
    _trained(head)
    with tracer_warnings_ignored():
        traced = torch.jit.trace(run, (torch.zeros(0, C, 4, 4),))
    exported = [traced, torch.jit.script(head)] if is_box else [traced]
    for module in exported:
        for rows in (5, 1, 0):
            x = torch.randn(rows, C, 4, 4)
            torch.testing.assert_close(module(x), run(x), rtol=1e-4, atol=1e-5)


class _Layers(nn.Module):
    """A mask head without its losses and instances."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head.layers(x)


FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
    "pred_keypoints": Tensor,
    "pred_keypoint_heatmaps": Tensor,
}


# TorchScript reads these annotations as they are: no forward references.
class _RCNN(nn.Module):
    """As detectron2's export tool wraps a GeneralizedRCNN."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, inputs: tuple[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        instances = self.model.inference(inputs, do_postprocess=False)
        return [i.get_fields() for i in instances]


class _RetinaNet(_RCNN):
    """As detectron2's export tool wraps a RetinaNet."""

    def forward(self, inputs: tuple[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        instances = self.model(inputs)
        return [i.get_fields() for i in instances]


def _fields(instances: Any, image: Tensor) -> list[Tensor]:
    fields = instances if isinstance(instances, dict) else instances.get_fields()
    boxes = Boxes(getattr(fields["pred_boxes"], "tensor", fields["pred_boxes"]))
    # an exported RetinaNet leaves the image's border to its caller
    boxes.clip(image.shape[1:])
    found = [boxes.tensor, fields["scores"], *(fields[k] for k in fields if k == "pred_masks")]
    return [values[boxes.nonempty()] for values in found]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["trace", "script", "onnx"])
@pytest.mark.parametrize("name", PAPER)
def test_whole_models_as_detectron2_s_export_tool(name: str, method: str, tmp_path: Path) -> None:
    cfg = load(f"shapes/{name}")
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = _trained(build_model(cfg))
    rcnn = "mask" in name

    def infer(model: Any, inputs: Any) -> Any:
        found = model.inference(inputs, do_postprocess=False) if rcnn else model(inputs)
        return [{"instances": i["instances"] if isinstance(i, dict) else i} for i in found]

    images = [torch.rand(3, *size) * 255 for size in ((64, 96), (96, 64))]
    expected = [_fields(infer(model, [{"image": i}])[0]["instances"], i) for i in images]
    if method == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        adapter = TracingAdapter(model, [{"image": images[0]}], infer).eval()
        file = str(tmp_path / "model.onnx")
        axes = {"image": {1: "height", 2: "width"}}
        with tracer_warnings_ignored(), torch.no_grad():
            torch.onnx.export(
                adapter, (images[0],), file, dynamo=False, opset_version=17,
                input_names=["image"], dynamic_axes=axes,
            )  # fmt: skip
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = []
        for image in images:
            outputs = tuple(map(torch.as_tensor, session.run(None, {"image": image.numpy()})))
            found.append(_fields(adapter.outputs_schema(outputs)[0]["instances"], image))
    elif method == "trace":
        adapter = TracingAdapter(model, [{"image": images[0]}], infer)
        with tracer_warnings_ignored(), torch.no_grad():
            traced = torch.jit.trace(adapter, (images[0],), check_trace=False)
        found = [_fields(adapter.outputs_schema(traced(i))[0]["instances"], i) for i in images]
    else:
        scripted = scripting_with_instances((_RCNN if rcnn else _RetinaNet)(model), FIELDS)
        found = [_fields(scripted(({"image": i},))[0], i) for i in images]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
