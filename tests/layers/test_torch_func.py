"""Transforms of torch.func in training mode, as nn.BatchNorm2d bears them (defect 27)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from rethinking_bn.layers import BatchNorm2d, CycleBatchNorm2d, SyncBatchNorm2d
from tests import reference
from tests.layers.kinds import ALL_EIGHT, run, with_choices
from tests.reference import CHANNELS

SHAPES = [(3, 4), (2, 2)]


def _tensors(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for i, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, 1 + i)
    return dict(layer.named_parameters()), dict(layer.named_buffers())


@pytest.mark.parametrize("cls", [BatchNorm2d, SyncBatchNorm2d])
def test_grad_in_training_mode(cls) -> None:  # defect 27
    x = reference.levels()[0]
    results = []
    for layer in (nn.BatchNorm2d(CHANNELS).double(), cls(CHANNELS).double()):
        torch.manual_seed(3)
        parameters, buffers = _tensors(layer)

        def loss(parameters, x, layer=layer, buffers=buffers):
            return reference.loss([functional_call(layer, (parameters, buffers), (x,))])

        if isinstance(layer, BatchNorm2d):
            results.append((grad(loss, (0, 1))(parameters, x), buffers))
        else:  # torch's refuses captured buffers under a transform
            leaf = x.clone().requires_grad_()
            loss(parameters, leaf).backward()
            gradients = {name: p.grad for name, p in parameters.items()}
            results.append(((gradients, leaf.grad), buffers))
    torch.testing.assert_close(*results)


class Runs(nn.Module):
    """Calls a layer as it takes several levels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return run(self.layer, xs)


KINDS = {
    "/".join(choices): lambda choices=choices: with_choices(choices, levels=3)
    for choices in ALL_EIGHT
    if choices[1] == "shared"
}
KINDS["cycle"] = lambda: CycleBatchNorm2d(CHANNELS, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_grad_of_layers_with_domains(kind: str) -> None:
    layer = Runs(KINDS[kind]().double())
    parameters, buffers = _tensors(layer)
    xs = [*reference.levels(shapes=SHAPES), torch.zeros(0, CHANNELS, 2, 2, dtype=torch.float64)]

    def loss(parameters, xs):
        return reference.loss(functional_call(layer, (parameters, buffers), (xs,)))

    start = {name: buffer.clone() for name, buffer in buffers.items()}
    gradients = grad(loss, (0, 1))(parameters, xs)
    moved = {name: buffer.clone() for name, buffer in buffers.items()}
    for name, buffer in buffers.items():
        buffer.copy_(start[name])
    leaves = [x.clone().requires_grad_() for x in xs]
    loss(parameters, leaves).backward()
    torch.testing.assert_close(
        gradients, ({n: p.grad for n, p in parameters.items()}, [x.grad for x in leaves])
    )
    torch.testing.assert_close(moved, buffers)


def test_other_transforms_as_torch_s_layer() -> None:
    """Forward mode, second derivatives and vmap; vmap without buffers, as for nn.BatchNorm2d."""
    x, v = (reference.levels(seed=s, shapes=[(2, 3)])[0] for s in (0, 1))
    ours = BatchNorm2d(CHANNELS, track_running_stats=False).double()
    torchs = nn.BatchNorm2d(CHANNELS, track_running_stats=False).double()
    results = []
    for layer in (ours, torchs):

        def loss(x, layer=layer):
            return reference.loss([layer(x)])

        batches = torch.stack([x, v])
        results.append(
            (
                jvp(layer, (x,), (v,)),
                hessian(loss)(x[:, :, :1]),
                vmap(layer)(batches),
                vmap(grad(loss))(batches),
            )
        )
    torch.testing.assert_close(*results)
