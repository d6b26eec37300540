from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

from rethinking_bn.layers import CycleBatchNorm2d
from tests import reference
from tests.layers.kinds import run, with_choices
from tests.reference import CHANNELS, SHAPES

L = len(SHAPES)


def test_a_cycle_equals_row_4_of_the_multi_domain_layer() -> None:
    layers: list[Any] = [
        CycleBatchNorm2d(CHANNELS, L, dtype=torch.float64),
        with_choices(("domain_specific", "domain_specific", "shared"), dtype=torch.float64),
    ]
    for step in range(2):
        results = []
        for layer in layers:
            xs = [x.requires_grad_() for x in reference.levels(step)]
            ys = run(layer, xs)
            reference.loss(ys).backward()
            results.append([ys, [x.grad for x in xs], dict(layer.state_dict())])
        torch.testing.assert_close(*results)
    torch.testing.assert_close(*(run(layer.eval(), xs) for layer in layers))


@pytest.mark.parametrize("calls", [1, L - 1, L + 1])
def test_a_pass_with_the_wrong_number_of_calls_raises_at_its_end(calls: int) -> None:
    layer = CycleBatchNorm2d(CHANNELS, L)
    x = torch.randn(2, CHANNELS, 2, 2)
    with pytest.raises(RuntimeError, match="a cycle is 4 calls"), layer.cycle():
        for _ in range(calls):
            layer(x)
    layer.eval()  # at level 0 again


def test_an_interrupted_forward_does_not_shift_later_statistics() -> None:
    """Defect 7: after an exception past level 3 every later statistic went one level on."""
    layer = CycleBatchNorm2d(CHANNELS, L, momentum=1.0)
    xs = [x.float() for x in reference.levels(shapes=[(6, 8), (3, 4), (2, 2), (2, 1)])]
    with pytest.raises(ZeroDivisionError), layer.cycle():
        for x in xs[:3]:
            layer(x)
        raise ZeroDivisionError
    with layer.cycle():
        for x in xs:
            layer(x)
    for level, x in enumerate(xs):
        torch.testing.assert_close(
            layer.get_buffer(f"{level}.running_mean"), reference.values_per_channel([x]).mean(1)
        )


@pytest.mark.parametrize("use", ["train", "eval", "state_dict"])
def test_unbracketed_use_raises_in_mid_cycle(use: str) -> None:
    layer = CycleBatchNorm2d(CHANNELS, L)
    model = nn.Sequential(layer)
    x = torch.randn(2, CHANNELS, 2, 2)
    for _ in range(L):
        layer(x)
    getattr(model, use)()  # a whole cycle: fine
    layer(x)
    with pytest.raises(RuntimeError, match=rf"{use}\(\) after 1 of 4 calls"):
        getattr(model, use)()
    with pytest.raises(RuntimeError, match="after 1 of 4 calls"), layer.cycle():
        pass
    layer.reset_cycle()
    getattr(model, use)()
    if use != "state_dict":  # and all modules have the mode
        assert {module.training for module in model.modules()} == {use == "train"}


def test_brackets_do_not_nest() -> None:
    layer = CycleBatchNorm2d(CHANNELS, 1)
    with pytest.raises(RuntimeError, match="does not nest"), layer.cycle(), layer.cycle():
        pass


def test_observing_reports_one_level_a_call() -> None:
    layer = CycleBatchNorm2d(CHANNELS, L, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    seen = []
    xs = reference.levels()
    with layer.observing(seen.append), layer.cycle():
        for x in xs:
            layer(x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert len(seen) == L
    for level, (moments, x) in enumerate(zip(seen, xs, strict=True)):
        expected = torch.zeros(L, dtype=torch.float64)
        expected[level] = x.numel() / CHANNELS
        torch.testing.assert_close(moments.count, expected)
        torch.testing.assert_close(moments.mean[level], reference.values_per_channel([x]).mean(1))


def test_a_call_recomputed_outside_of_its_cycle_is_refused() -> None:
    """The counter would give it another level; recomputing the whole pass is fine."""
    from torch.utils.checkpoint import checkpoint

    layer = CycleBatchNorm2d(2, 2)
    xs = [torch.randn(2, 2, 3, 3, requires_grad=True) for _ in range(2)]
    with layer.cycle():
        ys = [checkpoint(lambda x: layer(x).sigmoid(), x, use_reentrant=False) for x in xs]
    with pytest.raises(RuntimeError, match="checkpoint the whole pass"):
        sum(y.sum() for y in ys).backward()

    def whole(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with layer.cycle():
            return tuple(layer(x).sigmoid() for x in xs)

    sum(y.sum() for y in checkpoint(whole, *xs, use_reentrant=False)).backward()
    layer.eval()


def test_several_threads_infer_at_once() -> None:
    """Each thread has its own place in the cycle."""
    layer = CycleBatchNorm2d(CHANNELS, L).eval()
    for level in range(L):
        layer.get_buffer(f"{level}.running_mean").fill_(level)
    x = torch.zeros(1, CHANNELS, 1, 1)
    turn, wrong = threading.Barrier(3), []

    def infer() -> None:
        with layer.cycle():
            for level in range(L):
                turn.wait()  # all threads are in mid-cycle
                if not torch.allclose(layer(x), torch.tensor(-float(level)), atol=1e-3):
                    wrong.append(level)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not layer._calls
