"""Exported layers against eager ones at other sizes than the example's (defects 23, 24 and 27)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CenConv2d,
    CycleBatchNorm2d,
    MABN2d,
    MultiDomainBatchNorm2d,
    SplitBatchNorm2d,
    SyncBatchNorm2d,
)
from rethinking_bn.layers.layer_by_layer import LayerByLayer
from tests.helpers import tracer_warnings_ignored
from tests.layers.kinds import ALL_EIGHT, with_choices

C = 4
SIZES = [(3, 5, 7), (1, 4, 4), (0, 2, 3)]  # rows, none of them too; height, width


def _one(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(C, C, 1), norm, nn.ReLU())


def _levels(norm: nn.Module) -> nn.Module:
    return LayerByLayer(nn.Conv2d(C, C, 1), norm, LayerByLayer(nn.ReLU(), nn.Conv2d(C, 2, 1)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BN": lambda: _one(BatchNorm2d(C)),
    "SyncBN": lambda: _one(SyncBatchNorm2d(C, affine=False)),
    "BatchStatBN": lambda: _one(BatchStatNorm2d(C)),
    "no statistics": lambda: _one(BatchNorm2d(C, track_running_stats=False)),
    "MABN": lambda: nn.Sequential(CenConv2d(C, C, 1, norm=MABN2d(C, batch_size=2))),
    "cycle": lambda: _levels(CycleBatchNorm2d(C, 2)),
    "levels of BN": lambda: _levels(BatchNorm2d(C)),
    **{
        "/".join(choices[1:]): lambda choices=choices: _levels(with_choices(choices, C, 2))
        for choices in ALL_EIGHT[:4]  # shared train statistics
    },
}


def _model(kind: str) -> nn.Module:
    model = MODELS[kind]()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


def _input(model: nn.Module, n: int, height: int, width: int) -> Any:
    if isinstance(model, LayerByLayer):
        return [torch.randn(n, C, height, width), torch.randn(n, C, height, width + 1)]
    return torch.randn(n, C, height, width)


def _assert_same(exported: Any, model: nn.Module) -> None:
    for size in SIZES:
        x = _input(model, *size)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_traced_with_an_empty_example(kind: str) -> None:  # defect 23
    model = _model(kind).eval()
    with tracer_warnings_ignored():
        _assert_same(torch.jit.trace(model, (_input(model, 0, 2, 2),)), model)


@pytest.mark.parametrize("kind", MODELS)
def test_scripted(kind: str) -> None:  # defects 24 and 50: after a training step, too
    model = _model(kind)
    out = model(_input(model, 2, 5, 4))
    sum(y.sum() for y in (out if isinstance(out, list) else [out])).backward()
    with pytest.raises(ValueError, match=r"inference only: call eval\(\)"):
        torch.jit.script(model)
    model.eval()
    scripted = torch.jit.script(model)
    _assert_same(scripted, model)
    with pytest.raises((RuntimeError, torch.jit.Error), match="for inference only"):
        scripted.train()(_input(model, 2, 3, 3))


@pytest.mark.skipif(not hasattr(torch.export.Dim, "DYNAMIC"), reason="torch is too old")
@pytest.mark.parametrize("kind", ["BN", "BatchStatBN", "MABN", "cycle", "domain_specific/shared"])
def test_torch_export_with_dynamic_sizes(kind: str) -> None:  # defect 23
    model = _model(kind).eval()
    example = _input(model, 2, 6, 5)
    dynamic = {d: torch.export.Dim.DYNAMIC for d in (0, 2, 3)}
    shapes = ([dynamic] * 2,) if isinstance(example, list) else (dynamic,)
    with tracer_warnings_ignored():
        program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
        _assert_same(program.module(), model)


def test_batch_statistics_of_several_images_in_a_trace() -> None:  # defect 23
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchStatNorm2d(C)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            with self.norm.row_groups([first.shape[0], second.shape[0]]):
                return self.norm(torch.cat([first, second]))

    model = Grouped().eval()
    with tracer_warnings_ignored():
        traced = torch.jit.trace(model, tuple(torch.randn(n, C, 3, 3) for n in (2, 1)))
    for rows in ((3, 4), (1, 5), (0, 2)):
        xs = [torch.randn(n, C, 5, 2) for n in rows]
        torch.testing.assert_close(traced(*xs), model(*xs), rtol=1e-4, atol=1e-5)


def test_each_image_by_itself() -> None:
    layer = BatchStatNorm2d(C).eval()
    layer.rows_at_a_time = 2
    with tracer_warnings_ignored():
        exported = [torch.jit.trace(layer, torch.randn(2, C, 3, 3)), torch.jit.script(layer)]
    for module in exported:
        x = torch.randn(3, C, 4, 5)
        torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-5)


def test_what_torchscript_cannot_express_says_so() -> None:
    with pytest.raises(ValueError, match="trace or export"):
        torch.jit.script(SplitBatchNorm2d(C, 2).eval())
    layer = MultiDomainBatchNorm2d(C, 2).eval()
    layer.batch_stats_at_inference = True
    with pytest.raises(ValueError, match="cannot be scripted while"):
        torch.jit.script(layer)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [BatchNorm2d, SyncBatchNorm2d, BatchStatNorm2d])
def test_symbolic_trace(norm, training: bool) -> None:  # defect 27
    model = _one(norm(C)).train(training)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == list("012")
    x = torch.randn(2, C, 3, 3)
    torch.testing.assert_close(graph(x), model(x))


def test_symbolic_trace_of_levels() -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.cycle = MultiDomainBatchNorm2d(C, 2), CycleBatchNorm2d(C, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x, y = self.shared([x, y])
            return self.cycle(x).sum() + self.cycle(y).sum()

    model = Levels().eval()
    xs = torch.randn(2, C, 3, 3), torch.randn(2, C, 2, 2)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*xs), model(*xs))


@pytest.mark.parametrize("kind", [k for k in MODELS if "BatchStat" not in k and "no " not in k])
def test_flops_are_those_of_torch_s_layer(kind: str) -> None:
    fvcore = pytest.importorskip("fvcore.nn", reason="needs fvcore")
    model = _model(kind).eval()
    x = _input(model, 2, 6, 5)
    xs = x if isinstance(x, list) else [x]
    counted = fvcore.FlopCountAnalysis(model, (x,)).unsupported_ops_warnings(False).by_operator()
    assert counted["batch_norm"] == sum(x.numel() for x in xs) * (1 if kind == "SyncBN" else 2)


@pytest.mark.skipif(not hasattr(torch.export.Dim, "DYNAMIC"), reason="torch is too old")
@pytest.mark.parametrize("kind", ["BN", "cycle", "levels of BN", "shared/shared"])
def test_a_program_of_a_model_in_training_mode(kind: str) -> None:
    """Defect 23: torch.export refused its gradients, torch.onnx to decompose its graph."""
    model = _model(kind).train()
    x = torch.randn(2, C, 5, 7, requires_grad=True)
    inputs = (x,) if kind == "BN" else ([x, x[:, :, :4]],)
    program = torch.export.export(copy.deepcopy(model), inputs)
    with torch.enable_grad():  # what torch.onnx decomposes, runs with gradients
        program.run_decompositions()
    exported = program.module()
    outputs = [m(*inputs) for m in (model, exported)]
    torch.testing.assert_close(*outputs)
    losses = [
        sum((y**3).sum() for y in (out if isinstance(out, list) else [out])) for out in outputs
    ]
    gradients = [torch.autograd.grad(loss, x)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dict(model.named_buffers()), dict(exported.named_buffers()))
