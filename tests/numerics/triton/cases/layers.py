"""The other layers, and what no row of Table 5 shows, wherever the kernels can run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rethinking_bn.layers import (
    BatchNorm2d,
    BatchStatNorm2d,
    CycleBatchNorm2d,
    MABN2d,
    MultiDomainBatchNorm2d,
)
from rethinking_bn.numerics.triton import plan
from tests import reference
from tests.numerics.triton.cases.harness import (
    CASES,
    DEVICE,
    SHAPES,
    C,
    Expected,
    averages,
    close,
    counted,
    features,
)


@pytest.mark.parametrize(
    ("sizes", "last"),
    [
        ((2, 2, 2), True),
        ((3, 0, 1, 2), False),
        pytest.param((2, 2, 2), False, marks=pytest.mark.slow),
        pytest.param((3, 0, 1, 2), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_row_groups(sizes: tuple[int, ...], last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    CASES[0] += 1
    layer = BatchNorm2d(C, device=DEVICE)
    (x,) = features([(6, C, 3, 2)], torch.float32, last)
    dy = torch.randn(x.shape).to(x)
    groups = [g.detach().requires_grad_() for g in x.split(sizes)]
    expected = Expected(groups, [layer.weight], [layer.bias])
    with layer.row_groups(sizes), counted(monkeypatch) as launched:
        y = layer(x)
        y.backward(dy)
    assert len(launched) == 4
    z = expected.outputs(pooled=False)
    torch.autograd.backward(z, list(dy.cpu().double().split(sizes)))
    close("outputs", y, torch.cat(z), 1e-6)
    close("input gradients", x.grad, torch.cat([e.grad for e in expected.xs]), 1e-6)
    close("affine gradients", layer.weight.grad, expected.affine[0][0].grad, 1e-6, 10.0)
    ((mean, variance, steps),) = averages([[e] for e in expected.xs], 1, 0.1)
    close("running means", layer.running_mean, mean.detach(), 1e-6)
    close("running variances", layer.running_var, variance.detach(), 1e-6)
    assert layer.num_batches_tracked == steps


def test_layers_for_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as the eager path: CycleBatchNorm2d, mini-batches at inference, no affine."""
    CASES[0] += 1
    xs = features([(2, C, 3, 2)] * 2, torch.float32, False)

    def outcome() -> list[Tensor]:
        cycle = CycleBatchNorm2d(C, 2, device=DEVICE)
        with cycle.cycle():
            results = [cycle(x) for x in xs]
        stat = BatchStatNorm2d(C, device=DEVICE).eval()
        plain = BatchNorm2d(C, affine=False, track_running_stats=False, device=DEVICE)
        results += [stat(xs[0]), plain(xs[0])]
        grads = torch.autograd.grad([y.square().sum() * 0.5 + y.sum() for y in results], xs)
        buffers = [b for b in cycle.buffers() if b.is_floating_point()]
        return [*results, *grads, *buffers, stat.running_mean]

    got = outcome()
    monkeypatch.setenv("RETHINKING_BN_KERNELS", "eager")
    for a, b in zip(got, outcome(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_enters_no_average(value: float) -> None:
    for population, steps in (("domain_specific", [0, 1]), ("shared", [1])):
        layer = MultiDomainBatchNorm2d(
            C, 2, train_stats="domain_specific", population_stats=population, device=DEVICE
        )
        xs = features([(2, C, 2, 2)] * 2, torch.float32, False)
        with torch.no_grad():
            xs[0][1, 0, 0, 0] = value  # one channel spoils the level
        layer(xs)
        holders = layer._statistics_holders()
        states = averages([[xs[1].detach().cpu().double()]], 1, 0.1)
        close("running means", holders[-1].running_mean, states[0][0], 1e-6)
        close("running variances", holders[-1].running_var, states[0][1], 1e-6)
        assert [int(h.num_batches_tracked) for h in holders] == steps
    assert not holders[0].running_mean.isnan().any()


def test_nothing_but_empty_levels() -> None:
    layer = MultiDomainBatchNorm2d(C, 2, device=DEVICE)
    xs = features([(0, C, 2, 2), (2, C, 0, 3)], torch.float32, False)
    ys = layer(xs)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert [y.shape for y in ys] == [x.shape for x in xs] == [x.grad.shape for x in xs]
    assert not layer.weight.grad.any() and not layer.bias.grad.any()
    assert layer.running_var.eq(1).all() and layer.num_batches_tracked == 0


@pytest.mark.parametrize("folded", [True, False])
def test_only_what_is_wanted_is_computed(folded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not folded:
        monkeypatch.setattr(plan, "FOLD", 0)
    layer = BatchNorm2d(C, device=DEVICE)
    (x,) = features([(2, C, 3, 2)], torch.float32, False)
    want, want_weight = torch.autograd.grad(layer(x).pow(3).sum(), [x, layer.weight])
    layer.requires_grad_(False)  # frozen affine
    (got,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    assert torch.equal(got, want)
    layer.requires_grad_(True)
    with counted(monkeypatch) as launched:
        layer(x.detach()).pow(3).sum().backward()  # the input needs no gradient
    torch.testing.assert_close(layer.weight.grad, want_weight)
    assert "input_gradient" not in launched


def test_the_same_bits_every_time() -> None:
    def step() -> list[Tensor]:
        layer = MultiDomainBatchNorm2d(C, 3, population_stats="domain_specific", device=DEVICE)
        ys = layer([x.detach().requires_grad_() for x in xs])
        torch.autograd.backward([y.square() for y in ys], [torch.ones_like(y) for y in ys])
        return [*ys, layer.weight.grad, *layer.buffers()]

    xs = features(SHAPES, torch.float32, True)
    for a, b in zip(step(), step(), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_any_strides() -> None:
    layer = BatchNorm2d(C, device=DEVICE)
    (x,) = features([(2, C, 4, 4)], torch.float32, False)
    dy = torch.randn(2, C, 4, 4).to(x)
    (want,) = torch.autograd.grad(layer(x), x, dy)
    (got,) = torch.autograd.grad(layer(x), x, dy.transpose(2, 3).contiguous().transpose(2, 3))
    assert torch.equal(got, want)
    layer(x).sum().backward()  # one element expanded to the whole shape
    torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, 32.0))


def test_population_training_observes_the_kernels() -> None:
    layer = MultiDomainBatchNorm2d(C, 2, population_stats="domain_specific", device=DEVICE)
    xs = features(SHAPES[::2], torch.float32, False)
    seen = []
    with layer.observing(seen.append):
        layer(xs)
    (rows,) = seen
    for i, x in enumerate(xs):
        values = reference.values_per_channel([x.detach().cpu().double()])
        assert rows.count[i] == values.shape[1]
        close("moments", rows.mean[i], values.mean(1), 1e-6)
        spread = (values - values.mean(1, keepdim=True)).square().sum(1)
        close("moments", rows.m2[i], spread, 1e-6)
    assert not layer.get_buffer("0.running_mean").any()


def test_autograd_sees_that_buffers_were_written() -> None:
    layer = BatchNorm2d(C, device=DEVICE)
    (x,) = features([(2, C, 2, 2)], torch.float32, False)
    y = layer.eval()(x)
    layer.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MultiDomainBatchNorm2d(C, 2, device=DEVICE)
    xs = features([(2, C, 3, 2)] * 2, torch.float32, False)
    mixed = [xs[0], xs[1].detach().to(memory_format=torch.channels_last)]
    with pytest.raises(RuntimeError, match="no kernels for torch.float64"):
        layer.double()([x.double() for x in xs])
    layer.float()
    with pytest.raises(RuntimeError, match="neither all contiguous nor all channels-last"):
        layer(mixed)
    monkeypatch.setenv("RETHINKING_BN_KERNELS", "auto")
    layer(mixed)
    layer.double()([x.double() for x in xs])


@pytest.mark.slow
def test_compiled_code_keeps_the_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BatchNorm2d(C, device=DEVICE)
    (x,) = features([(2, C, 3, 2)], torch.float32, False)
    want = layer(x)
    with counted(monkeypatch) as launched:
        got = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert not launched
    torch.testing.assert_close(got, want)


def test_transformed_code_keeps_the_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = BatchNorm2d(C, device=DEVICE)
    (x,) = features([(2, C, 3, 2)], torch.float32, False)
    with counted(monkeypatch) as launched:
        torch.func.grad(lambda v: layer(v).square().sum())(x.detach())
        with monkeypatch.context() as patch:  # as a compiler says while it traces
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            layer(x)
    assert not launched


def test_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half inputs of a float32 layer, as autocast makes them; features come and go as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(C, C, 1), BatchNorm2d(C), nn.ReLU()).to(DEVICE)
    (x,) = features([(2, C, 4, 4)], torch.float32, False)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = model(x)
        monkeypatch.setenv("RETHINKING_BN_KERNELS", "eager")
        z = model(x)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, z, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("levels", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_mabn(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the warm-up, moving averages and correction, beside the eager path in float64."""
    CASES[0] += 1
    layers = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        layer = MABN2d(C, simulated_batch_size=4, batch_size=2, warmup_iters=3, correction_start=4)
        with torch.no_grad():
            for p in layer.parameters():
                p.uniform_(0.5, 1.5)
        layers.append(layer.to(DEVICE, dtype))
    for iteration in range(6):
        shapes = [(2, C, 3, 2), (0, C, 2, 2)][:levels]
        xs = features(shapes, torch.float32, last=iteration % 2 == 1)
        if iteration == 4:
            with torch.no_grad():
                xs[0][0, 0, 0, 0] = float("inf")  # enters no average
        dys = [torch.randn(x.shape).to(x) for x in xs]
        results = []
        for layer, choice in zip(layers, ("triton", "eager"), strict=True):
            monkeypatch.setenv("RETHINKING_BN_KERNELS", choice)
            ins = [x.detach().to(layer.weight.dtype).requires_grad_() for x in xs]
            with counted(monkeypatch) as launched:
                ys = layer(ins)
                grads = torch.autograd.grad(
                    ys, [*ins, *layer.parameters()], [dy.to(layer.weight.dtype) for dy in dys]
                )
            assert len(launched) == (6 if choice == "triton" else 0)
            results.append([*ys, *grads, *layer.buffers()])
        for got, want in zip(*results, strict=True):
            close_but_for_nan("MABN", got, want)


def close_but_for_nan(what: str, got: Tensor, want: Tensor) -> None:
    odd = ~want.isfinite()
    assert torch.equal(odd, ~got.isfinite()), what
    close(what, got.masked_fill(odd, 0), want.masked_fill(odd, 0), 2e-6)


def test_mabn_under_activation_checkpointing() -> None:
    """The recomputation counts nothing and gives the gradients of the first pass."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        layer = MABN2d(C, simulated_batch_size=4, batch_size=2, warmup_iters=1, device=DEVICE)
        for _ in range(4):
            (x,) = features([(2, C, 3, 2)], torch.float32, False)
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            y.square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
