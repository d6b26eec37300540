"""Norm layers compiled in place: one graph, few versions, and everything else as before."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx.experimental import _config as shapes
from torch.utils.checkpoint import checkpoint

from rethinking_bn.distributed import data_parallel
from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CenConv2d,
    CycleBatchNorm2d,
    MABN2d,
    MultiDomainBatchNorm2d,
    SplitBatchNorm2d,
    SyncBatchNorm2d,
    compile_norms,
    convert_norms,
)
from rethinking_bn.population import batch_statistics, estimate_population_statistics
from tests.helpers import run_distributed
from tests.layers.kinds import ALL_EIGHT, run, with_choices

pytestmark = pytest.mark.skipif(not hasattr(shapes, "use_duck_shape"), reason="torch is too old")

C = 4


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the model compiled, and a copy that is not."""
    plain = copy.deepcopy(model)
    compile_norms(model, backend="aot_eager")
    return model, plain


def step(model: nn.Module, xs: list[Tensor]) -> list[Any]:
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    ys = run(model, leaves)
    sum((y * y.sin()).sum() for y in ys).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return [
        [y.detach() for y in ys],
        [x.grad for x in leaves],
        gradients,
        dict(model.named_buffers()),
    ]


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "choices", [ALL_EIGHT[0], *(pytest.param(c, marks=pytest.mark.slow) for c in ALL_EIGHT[1:])]
)
def test_twenty_sizes_and_no_new_version(choices: tuple[str, ...]) -> None:
    compiled, plain = twins(with_choices(choices, C, 3))
    sizes = torch.Generator().manual_seed(0)
    before = graphs()
    for i in range(20):
        n, *hw = (int(v) for v in torch.randint(2, 12, (7,), generator=sizes))
        if i == 0:  # equal by chance
            n, hw = 2, [4, 4, 2, 2, 4, 4]
        xs = [torch.randn(n, C, h, w) + 1 for h, w in zip(hw[::2], hw[1::2], strict=True)]
        assert_same(step(compiled, xs), step(plain, xs))
        if i == 1:
            after_two = graphs()
    assert graphs() == after_two <= before + 2
    for inputs in ([xs[0][:1], *xs[1:]], [xs[0][:0], *xs[1:]]):
        assert_same(step(compiled, inputs), step(plain, inputs))
    assert graphs() <= after_two + 2
    compiled.eval(), plain.eval()
    for size in range(3):
        inputs = [torch.randn(2, C, size + 3, 5 * size + 4) for _ in xs]
        assert_same(compiled(inputs), plain(inputs))
    assert graphs() <= after_two + 3


def model_of_twelve_widths() -> nn.Module:
    layers: list[nn.Module] = []
    for width in range(3, 15):
        layers += [nn.Conv2d(width - 1, width, 1), BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return what was logged; pytest from 9.2 on reads torch's loggers, which do not propagate."""
    return [record for record in caplog.records if record.name.partition(".")[0] != "torch"]


def test_every_norm_of_many_widths_runs_compiled(caplog: pytest.LogCaptureFixture) -> None:
    compiled, plain = twins(model_of_twelve_widths().double())
    before = graphs()
    for shape in ((2, 2, 5, 6), (3, 2, 4, 4)):
        x = torch.randn(shape).double()
        assert_same(step(compiled, [x]), step(plain, [x]))
    assert graphs() - before == 12
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert not said(caplog)


def test_what_falls_back_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), BatchNorm2d(C))
    compile_norms(model, backend="aot_eager", recompile_limit=1)
    caplog.set_level(logging.WARNING, "rethinking_bn")
    x = torch.randn(2, C, 3, 3)
    model(x)
    model.eval()
    want = copy.deepcopy(model)(x)
    for _ in range(2):
        torch.testing.assert_close(model(x), want)
    (record,) = said(caplog)
    assert "1 is not compiled" in record.getMessage()


def test_a_wrong_input_is_refused_as_before(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(BatchNorm2d(C))
    compile_norms(model, backend="aot_eager")
    with pytest.raises(ValueError, match=r"expected \(N, 4, H, W\)"):
        model(torch.zeros(2, C + 1, 3, 3))
    model(torch.zeros(2, C, 3, 3))
    assert not said(caplog)


def test_layers_of_other_kinds() -> None:
    xs = [torch.randn(3, C, h, h + 1) for h in (5, 4)]
    cycle, plain = twins(CycleBatchNorm2d(C, 2))
    results = []
    for layer in (cycle, plain):
        for _ in range(2):
            results.append(step(layer, xs))
    assert_same(results[:2], results[2:])
    assert graphs() <= 3  # one of them tried the compiler
    split, plain = twins(SplitBatchNorm2d(C, 2))
    for n in (3, 2, 4):  # rows of the domains 0, 1, 0, ...
        some = [torch.randn(n, C, 5, 6)]
        assert_same(step(split, some), step(plain, some))
    for norm in (
        BatchStatNorm2d(C),
        SyncBatchNorm2d(C),
        MABN2d(C, batch_size=3, simulated_batch_size=6),
    ):
        compiled, plain = twins(norm)
        for _ in range(3):
            assert_same(step(compiled, xs[:1]), step(plain, xs[:1]))
        compiled.eval(), plain.eval()
        assert_same(compiled(xs[1]), plain(xs[1]))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norm", ["BN", "MABN"])
def test_under_activation_checkpointing_and_autocast(norm: str, reentrant: bool) -> None:
    layer = (
        BatchNorm2d(C)
        if norm == "BN"
        else MABN2d(C, batch_size=2, simulated_batch_size=4, warmup_iters=1)
    )
    model = nn.Sequential(CenConv2d(C, C, 1), layer, nn.Tanh())
    compiled, plain = twins(model)
    for _ in range(4):
        x = torch.randn(2, C, 5, 4)
        results = []
        for net in (compiled, plain):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = checkpoint(net, leaf, use_reentrant=reentrant) if net is compiled else net(leaf)
            y.float().square().sum().backward()
            results.append([y, leaf.grad, net.state_dict()])
        torch.testing.assert_close(*results, rtol=3e-2, atol=3e-2)


def test_others_look_at_a_compiled_model() -> None:
    compiled, plain = twins(nn.Sequential(nn.Conv2d(C, C, 1), BatchNorm2d(C)))
    batches = [torch.randn(4, C, 5, 5) for _ in range(3)]
    for net in (compiled, plain):
        estimate_population_statistics(net, batches, 3, progress=False)
    assert_same(compiled.state_dict(), plain.state_dict())
    compiled.eval(), plain.eval()
    for net in (compiled, plain):
        with batch_statistics(net):
            got = net(batches[0])
    with batch_statistics(compiled):
        assert_same(compiled(batches[0]), got)
    assert_same(torch.fx.symbolic_trace(compiled)(batches[0]), plain(batches[0]))
    assert_same(torch.jit.script(compiled)(batches[0]), plain(batches[0]))
    assert_same(torch.func.vmap(compiled)(batches[0][:, None]).flatten(0, 1), plain(batches[0]))
    assert_same(torch.compile(compiled, backend="aot_eager")(batches[0]), plain(batches[0]))
    seen: list[Any] = []
    handle = compiled[1].register_forward_hook(lambda m, args, y: seen.append(y))
    compiled(batches[0])
    handle.remove()
    assert len(seen) == 1
    compiled[1].freeze()
    compiled.train()
    assert_same(compiled(batches[0]), plain(batches[0]))
    convert_norms(compiled, "SyncBN")
    assert copy.deepcopy(compiled)(batches[0]).shape == batches[0].shape


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(BatchNorm2d(C))
    with pytest.raises(ValueError, match="cannot be compiled for cpu: .*no-such"):
        compile_norms(model, backend="no-such")
    assert model[0]._compiled_call_impl is None


def _on_two_ranks(rank: int) -> list[Any]:
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        norm = MultiDomainBatchNorm2d(C, 2, sync=True)
        model = nn.Sequential(norm)
        if compiled:
            compile_norms(model, backend="aot_eager")
        wrapped = data_parallel(model)
        for i in range(3):
            torch.manual_seed(10 * i + rank)
            xs = [torch.randn(2 + rank, C, 4 + i, 3 + rank), torch.randn(1 + rank, C, 2, 2)]
            leaves = [x.requires_grad_() for x in xs]
            ys = wrapped(leaves)
            sum((y * y.sin()).sum() for y in ys).backward()
        results.append([ys, [x.grad for x in leaves], norm.weight.grad, norm.state_dict()])
    return [[t.detach() for t in r[0]] + r[1:] for r in results]


def test_data_parallel_and_synchronised_on_two_processes() -> None:
    for compiled, plain in run_distributed(_on_two_ranks, 2, timeout=240):  # two compilers
        assert_same(compiled, plain)
