"""One set of population statistics for all ranks, where every rank trained its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from rethinking_bn.distributed import all_gather, collective_device, get_world_size
from rethinking_bn.layers import PopulationLayer, mix_statistics


@torch.no_grad()
def merge_statistics(model: nn.Module, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Replace the ranks' population statistics by their equal-weight mixture, in place.

    Under unsynced BN every rank's moving averages follow its own data. The mixture of W ranks has

        mean = Σ meanᵣ / W,    var = Σ varᵣ / W + Σ (meanᵣ - mean)² / W,

    and a mean square (MABN) is averaged. Statistics that are equal on all ranks stay bit for bit
    what they are. Layers in eval mode are frozen, and left alone.

    A collective (one, whatever the number of layers): every rank must call it.

    Args:
        model: torch's BN layers and ours are found in it.
    """
    world = get_world_size(group)
    layers = list(_statistics(model))
    if world == 1 or not layers:
        return
    buffers = [buffer for layer in layers for buffer in layer]
    device = collective_device(group)
    # float64: the mean of W equal float32 values is then that value
    packed = torch.cat([buffer.reshape(-1).to(device, torch.float64) for buffer in buffers])
    ranks = all_gather(packed, group)
    columns = iter(ranks.split([buffer.numel() for buffer in buffers], dim=1))
    for layer in layers:
        gathered = [next(columns) for _ in layer]  # each (W, C)
        mixed = mix_statistics(*gathered) if len(layer) == 2 else (gathered[0].mean(0),)
        for buffer, value in zip(layer, mixed, strict=True):
            buffer.copy_(value.view_as(buffer))


def _statistics(model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Yield (running_mean, running_var) or (running_mean_square,) of the layers being trained."""
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, (PopulationLayer, nn.modules.batchnorm._NormBase)):
            continue
        # a domain-specific layer keeps each domain's statistics in a child module
        for holder in module.modules() if isinstance(module, PopulationLayer) else (module,):
            if id(holder) in seen or not module.training:
                continue
            seen.add(id(holder))
            buffers = dict(holder.named_buffers(recurse=False))
            for names in (("running_mean", "running_var"), ("running_mean_square",)):
                if all(isinstance(buffers.get(name), Tensor) for name in names):
                    yield tuple(buffers[name] for name in names)


class MergeStatistics(HookBase):
    """Merge the ranks' statistics before every checkpoint and every evaluation.

    So every rank evaluates what is saved (detectron2 saves rank 0's statistics, and lets each
    rank evaluate with its own). Belongs after population training and before the checkpointer,
    on all ranks.

    State read: the model. State changed: its running statistics, to the same values on all ranks.
    """

    def __init__(self, model: nn.Module, *periods: int) -> None:
        """
        Args:
            model: what :func:`merge_statistics` takes.
            periods: of checkpoints and of evaluations, in iterations; 0 stands for none. The end
                of training is always a time to merge.
        """
        self._model = model
        self._periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        """Merge if something is about to read the statistics."""
        if self.is_due(self.trainer.iter + 1):
            merge_statistics(self._model)

    def is_due(self, iterations_done: int) -> bool:
        """Return whether a checkpoint or an evaluation follows this iteration."""
        if iterations_done >= self.trainer.max_iter:
            return True
        return any(iterations_done % period == 0 for period in self._periods)
