"""BatchNorm of rows of several domains against separate layers, on one and two processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rethinking_bn.layers import BatchNorm2d, SplitBatchNorm2d, row_domains
from rethinking_bn.population import estimate_population_statistics
from tests import reference
from tests.helpers import run_distributed
from tests.layers.kinds import ALL_EIGHT, affine_of

ROWS = [(0, 0, 1, 1, 2), (2, 0, 1, 0, 2), (1, 1, 1, 1, 1), (2, 0, 0, 2, 0)]
CHOICES = ("shared", "domain_specific")


def features(n: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 4, 3, 5, dtype=dtype) * torch.arange(1.0, n + 1)[:, None, None, None] + 1


def split(num_domains: int = 3, **options: Any) -> SplitBatchNorm2d:
    layer = SplitBatchNorm2d(4, num_domains, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(0.5, 2)
    return layer


def by_hand(
    layer: SplitBatchNorm2d, x: Tensor, rows: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return output and statistics of one training step, written out row by row."""
    state = {k: v.clone() for k, v in layer.named_buffers()}
    out = torch.empty_like(x)
    for d in range(layer.num_domains):
        own = [i for i, row in enumerate(rows) if row == d]
        if not own:
            continue
        over = x[own] if layer.train_stats == "domain_specific" else x
        out[own] = reference.normalize([x[own]], [over], *affine_of(layer, d))[0]
        pre = "" if layer.population_stats == "shared" else f"{d}."
        both_shared = layer.population_stats == layer.train_stats == "shared"
        if both_shared and state["num_batches_tracked"] > 0:
            continue  # one step for all domains together
        mean, var = pre + "running_mean", pre + "running_var"
        seen = x if both_shared else x[own]
        state[mean], state[var] = reference.ema(state[mean], state[var], [seen])
        state[pre + "num_batches_tracked"] += 1
    return out, state


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("train", "population", "affine"), ALL_EIGHT)
def test_every_combination_of_choices_equals_the_formulas(
    train: Any, population: Any, affine: Any, rows: tuple[int, ...]
) -> None:
    layer = split(train_stats=train, population_stats=population, affine=affine)
    twin = copy.deepcopy(layer)
    x = features().requires_grad_()
    again = x.detach().clone().requires_grad_()
    expected, state = by_hand(twin, again, rows)
    with row_domains(layer, rows):
        out = layer(x)
    torch.testing.assert_close(out, expected)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(q) if q.grad is None else q.grad)
    for name, value in layer.named_buffers():
        torch.testing.assert_close(value, state[name])
    layer.eval()
    with row_domains(layer, rows):
        y = layer(x.detach())
    for i, d in enumerate(rows):
        pre = "" if population == "shared" else f"{d}."
        weight, bias = affine_of(layer, d)
        scale = weight / (state[pre + "running_var"] + layer.eps).sqrt()
        shifted = x[i] - state[pre + "running_mean"][:, None, None]
        torch.testing.assert_close(y[i], shifted * scale[:, None, None] + bias[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_domain_is_batch_norm_bit_for_bit(dtype: torch.dtype, memory_format: Any) -> None:
    layer, plain = SplitBatchNorm2d(4, 1), BatchNorm2d(4)
    x = features(dtype=torch.float32).to(dtype).to(memory_format=memory_format).requires_grad_()
    again = x.detach().clone().requires_grad_()
    out, expected = layer(x), plain(again)  # one domain needs no telling
    assert torch.equal(out, expected) and out.dtype == dtype
    (out.float() ** 2).sum().backward()
    (expected.float() ** 2).sum().backward()
    assert torch.equal(x.grad, again.grad)
    domain = layer.get_submodule("0")
    assert all(torch.equal(a, b) for a, b in zip(domain.buffers(), plain.buffers(), strict=True))
    assert torch.equal(domain.weight.grad, plain.weight.grad)
    with row_domains(layer, 0):
        assert torch.equal(layer.eval()(x), plain.eval()(again))


@pytest.mark.parametrize("rows", ROWS)
def test_of_several_levels_a_domain_is_its_rows_of_all(rows: tuple[int, ...]) -> None:
    layer, flat = split(), None
    flat = copy.deepcopy(layer)
    levels = [features(), features()[:, :, :1, :2] + 3]
    joined = torch.cat([level.flatten(2) for level in levels], 2).unsqueeze(2)
    with row_domains(layer, rows), row_domains(flat, rows):
        got, want = layer(levels), flat(joined)
        assert [y.shape for y in got] == [x.shape for x in levels]
        torch.testing.assert_close(torch.cat([y.flatten(2) for y in got], 2).unsqueeze(2), want)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(flat.named_buffers()))
        torch.testing.assert_close(
            layer.eval()(levels)[1], flat.eval()(joined)[:, :, 0, 15:].view_as(levels[1])
        )


@pytest.mark.parametrize("rows", ROWS)
def test_outputs_of_several_levels_bear_operators_in_place(rows: tuple[int, ...]) -> None:
    layer = split()
    levels = [features().requires_grad_(), features()[:, :, :1, :2].requires_grad_()]
    with row_domains(layer, rows):
        losses = [
            sum((f(y) ** 2).sum() for y in layer(levels)) for f in (torch.sigmoid_, torch.sigmoid)
        ]
    in_place, beside = (torch.autograd.grad(loss, levels) for loss in losses)
    torch.testing.assert_close(in_place, beside)


def test_empty_batches_move_nothing() -> None:
    layer = split()
    before = {k: v.clone() for k, v in layer.named_buffers()}
    with row_domains(layer, []):
        out = layer(features()[:0].requires_grad_())
    out.sum().backward()
    assert out.shape == (0, 4, 3, 5)
    assert all(torch.equal(v, before[k]) for k, v in layer.named_buffers())


def test_what_is_not_told_or_told_wrongly_is_refused() -> None:
    layer = nn.Sequential(split())
    x = features()
    with pytest.raises(ValueError, match="row_domains"):
        layer(x)
    with pytest.raises(ValueError, match="4 row domains for 5 rows"), row_domains(layer, [0] * 4):
        layer(x)
    for bad in ([0, 3], [-1], [0.0], 3, [True]):
        with pytest.raises(ValueError, match="domains are 0 to 2"), row_domains(layer, bad):
            pass
    with pytest.raises(ValueError, match="no SplitBatchNorm2d"), row_domains(nn.ReLU(), [0]):
        pass
    with pytest.raises(KeyError), row_domains(layer, 0):
        raise KeyError
    with pytest.raises(ValueError, match="row_domains"):  # forgotten after an exception, too
        layer(x)
    with pytest.raises(ValueError, match="expected"), row_domains(layer, 0):
        layer(x[:, :3])


def test_contexts_nest_and_a_number_stands_for_all_rows() -> None:
    layer = split().eval()
    with torch.no_grad():
        layer.get_submodule("1").running_mean.fill_(5)
    x = features(2)
    with row_domains(layer, 0):
        first = layer(x)
        with row_domains(layer, [1, 1]):
            second = layer(x)
        assert torch.equal(layer(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_takes_the_domains_of_its_forward(reentrant: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 1, dtype=torch.float64), split(), nn.ReLU(), split())
    recomputed = copy.deepcopy(plain)
    xs = [features(), features()]
    xs.append(xs[1].clone())  # the same images as of another domain
    results = []
    for model in (plain, recomputed):
        loss = torch.zeros((), dtype=torch.float64)
        for x, rows in zip(xs, ROWS, strict=False):
            with row_domains(model, rows):
                y = x.clone().requires_grad_()
                if model is recomputed:
                    y = checkpoint(model, y, use_reentrant=reentrant)
                else:
                    y = model(y)
                loss = loss + y.square().mean()
        loss.backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0])


def test_population_training_is_per_domain() -> None:
    model = nn.Sequential(split())
    batches = [(features(), rows) for rows in ROWS[:2]]

    def forward(model: nn.Module, batch: Any) -> Any:
        with row_domains(model, batch[1]):
            return model(batch[0])

    report = estimate_population_statistics(model, batches, 2, forward=forward)
    assert [layer.domain for layer in report.layers] == ["0", "1", "2"]
    for d in range(3):
        seen = torch.cat([x[[i for i, row in enumerate(rows) if row == d]] for x, rows in batches])
        mean, var = seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=1)
        torch.testing.assert_close(model.get_buffer(f"0.{d}.running_mean"), mean)
        torch.testing.assert_close(model.get_buffer(f"0.{d}.running_var"), var)


def test_copies_and_checkpoints() -> None:
    layer = split()
    with row_domains(layer, ROWS[0]):
        layer(features())
        again = copy.deepcopy(layer)
    assert again._rows is None and not again._forwards._newest
    plain = nn.BatchNorm2d(4, dtype=torch.float64)
    plain.running_mean.fill_(2)
    layer.load_state_dict(plain.state_dict())
    assert all((layer.get_buffer(f"{d}.running_mean") == 2).all() for d in range(3))


def of_rank(rank: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return a rank's data: of three domains, of one, none at all."""
    x, rows = rank_data()
    return [(x[:4], rows[:4]), (x[4:], rows[4:]), (x[:0], ())][rank]


def rank_data() -> tuple[Tensor, tuple[int, ...]]:
    torch.manual_seed(1)
    return features(6), (2, 0, 1, 0, 1, 1)


def synced(rank: int, train: Any) -> Any:
    torch.manual_seed(0)
    layer = split(train_stats=train, sync=True)
    data, rows = of_rank(rank)
    x = data.clone().requires_grad_()
    with row_domains(layer, rows):
        out = layer(x)
    out.sin().sum().backward()
    grads = [p.grad for p in layer.parameters()]
    for grad in grads:
        dist.all_reduce(grad)
    return out.detach(), x.grad, grads, dict(layer.named_buffers())


@pytest.mark.parametrize("train", CHOICES)
def test_synchronised_equals_one_process_whatever_domains_a_rank_holds(train: Any) -> None:
    results = run_distributed(synced, 3, train)
    torch.manual_seed(0)
    layer = split(train_stats=train)
    data, rows = rank_data()
    x = data.requires_grad_()
    with row_domains(layer, rows):
        out = layer(x)
    out.sin().sum().backward()
    torch.testing.assert_close(torch.cat([r[0] for r in results]), out.detach())
    torch.testing.assert_close(torch.cat([r[1] for r in results]), x.grad)
    for _, _, grads, buffers in results:
        torch.testing.assert_close(grads, [p.grad for p in layer.parameters()])
        torch.testing.assert_close(buffers, dict(layer.named_buffers()))
