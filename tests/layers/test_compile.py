"""The layers under torch.compile: one graph, whatever the iteration and the image size."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental import _config as shapes

from rethinking_bn.layers import MABN2d, compile_norms
from tests import reference
from tests.layers.kinds import with_choices
from tests.reference import CHANNELS

OLD = not hasattr(shapes, "use_duck_shape")


class Head(nn.Module):
    """A convolution shared by the levels, their norm, ReLU."""

    def __init__(self, *choices: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, dtype=torch.float64)
        self.norm = with_choices(choices, levels=3, dtype=torch.float64)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [y.relu() for y in self.norm([self.conv(x) for x in xs])]


@pytest.mark.parametrize(
    "choices",
    [
        ("shared", "shared", "shared"),
        pytest.param(("shared", "domain_specific", "domain_specific"), marks=pytest.mark.slow),
        pytest.param(("domain_specific", "domain_specific", "shared"), marks=pytest.mark.slow),
    ],
)
def test_one_graph_over_iterations_and_dynamic_sizes(choices: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    compiled, eager = Head(*choices), Head(*choices)
    eager.load_state_dict(compiled.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, backend=counter, fullgraph=True)
    for step in range(3):
        shapes = [(n + step, n + 2 * step) for n in (12, 7, 5)]
        xs = reference.levels(step, shapes=shapes)
        for x in xs:
            torch._dynamo.mark_dynamic(x, 2)
            torch._dynamo.mark_dynamic(x, 3)
        compiled.zero_grad()
        eager.zero_grad()
        ys, zs = run(xs), eager(xs)
        reference.loss(ys).backward()
        reference.loss(zs).backward()
        torch.testing.assert_close(ys, zs)
        torch.testing.assert_close(
            [p.grad for p in compiled.parameters()], [p.grad for p in eager.parameters()]
        )
        torch.testing.assert_close(dict(compiled.state_dict()), dict(eager.state_dict()))
    assert counter.frame_count == 1
    compiled.eval(), eager.eval()
    torch.testing.assert_close(run(xs), eager(xs))


@pytest.mark.skipif(OLD, reason="torch is too old")
def test_moving_averages_in_one_graph() -> None:
    """Over the warm-up, the full ring and the correction, whose turns the device takes."""
    torch._dynamo.reset()
    options = {"simulated_batch_size": 6, "batch_size": 2, "warmup_iters": 2}
    compiled, eager = (MABN2d(CHANNELS, **options, correction_start=5) for _ in "ab")
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, backend=counter, fullgraph=True)
    for t in range(10):
        x = torch.randn(2, CHANNELS, 4, 4) * (1 + t % 3)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = run(a), eager(b)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close((y, a.grad), (z, b.grad))
        torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    assert counter.frame_count == 1


@pytest.mark.skipif(not OLD, reason="torch is new enough")
def test_an_old_torch_is_refused_before_anything_is_compiled() -> None:
    with pytest.raises(ValueError, match="too old"):
        compile_norms(MABN2d(4))
