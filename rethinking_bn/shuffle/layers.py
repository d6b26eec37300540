"""Running the normalised layers of a head on RoIs shuffled over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rethinking_bn.randomness import Forwards, derive_seed, is_recomputing, mark_of
from rethinking_bn.shuffle.rows import shuffle_rows, unshuffle_rows

# Layers, torch's, torchvision's and detectron2's, whose result for a row is the row's alone.
_EACH_ROW_APART = {"GroupNorm", "LayerNorm", "InstanceNorm2d", "FrozenBatchNorm2d"}


class ShuffledLayers:
    """Mixin, before an nn.Sequential: its BN layers see rows of all ranks, mixed at random.

    See :func:`rethinking_bn.layers.shuffle_rows`, and section 6 of arXiv 2105.07576. Rows are
    shuffled while a BN layer of the head is in training mode. They are not at inference, nor where
    no layer needs it (GN; SyncBN, which pools all ranks anyway). Parameters and state dict are
    those of the unshuffled head.

    The permutation follows from run seed, iteration, kind of head, and call within the iteration.
    :meth:`set_iteration` announces the first two. Under a trainer that does not call it the run
    seed is 0, and :meth:`unannounced_iteration` is the iteration. Heads of one kind, as in a
    cascade, draw the same permutation for the same number of rows. Under activation checkpointing
    a recomputed call repeats the permutation of its first pass.

    Every rank must call the head equally often, with zero rows where it has none, and every
    rank's loss must depend on the result, also on zero rows.
    """

    #: sets the permutations of one kind of head apart from another's
    seed_of_head: int

    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        _announced: tuple[int, int] | None
        _iteration: tuple[int, int] | None
    _announced = None
    _iteration = None  # that of the calls below
    _num_calls = 0

    __jit_unused_properties__ = ["communicates"]

    def shuffled_norms(self) -> list[nn.Module]:
        """Return the norm layers whose result depends on which rows are on this rank."""
        raise NotImplementedError

    @property
    def communicates(self) -> bool:
        """Whether a forward shuffles now, and so waits for the other ranks."""
        return any(norm.training for norm in self.shuffled_norms())

    def set_iteration(self, run_seed: int, iteration: int) -> None:
        """Take note of the iteration, and count calls from zero; see rethinking_bn.randomness."""
        self._announced = self._iteration = (run_seed, iteration)
        self._num_calls = 0

    def unannounced_iteration(self) -> int:
        """Return the iteration under a trainer that announces none, the same on all ranks.

        It is 0 unless a subclass knows better: a count of all calls then tells permutations apart.
        """
        return 0

    def forward_shuffled(self, x: Tensor) -> Tensor:
        """Run all layers on (R, C, H, W), those up to :func:`point_of_return` on shuffled rows."""
        assert isinstance(self, nn.Sequential)  # for the type checker
        layers: list[nn.Module] = list(self)
        norms = set(self.shuffled_norms())
        last = max(i for i, layer in enumerate(layers) if norms.intersection(layer.modules()))
        end = point_of_return(layers, last, tuple(x.shape[1:]))
        rows, state = shuffle_rows(x, generator_seed=self._seed(x))
        x = unshuffle_rows(self.run_on_shuffled(layers[:end], rows), state)
        for layer in layers[end:]:
            x = layer(x)
        return x

    def forward_unshuffled(self, x: Tensor) -> Tensor:
        """Run all layers one after the other; read by TorchScript."""
        for layer in self:  # type: ignore[attr-defined]
            x = layer(x)
        return x

    def run_on_shuffled(self, layers: Sequence[nn.Module], rows: Tensor) -> Tensor:
        """Run layers one after the other on the rows that came from a shuffle."""
        for layer in layers:
            rows = layer(rows)
        return rows

    def _seed(self, x: Tensor) -> int:
        """Return the seed of this call, the same on all ranks."""
        now = self._announced or (0, self.unannounced_iteration())
        forwards: Forwards[int] = vars(self).setdefault("_forwards", Forwards(newest_first=True))
        mark = mark_of(x)
        seed = forwards.find(mark) if is_recomputing() else None
        if seed is None:
            if now != self._iteration:
                self._iteration, self._num_calls = now, 0
            seed = derive_seed(*now, self.seed_of_head, self._num_calls)
            self._num_calls += 1
            forwards.remember(mark, seed)
        return seed


def mixes_rows(norm: nn.Module) -> bool:
    """Return whether what the layer makes of a row in training depends on the other rows."""
    return _EACH_ROW_APART.isdisjoint(kind.__name__ for kind in type(norm).__mro__)


def mixes_rows_of_a_rank(norm: nn.Module) -> bool:
    """Return whether the result for a row also depends on which rank the other rows are on."""
    pools_ranks = isinstance(norm, nn.SyncBatchNorm) or getattr(norm, "sync", False)
    pools_all = pools_ranks and norm.process_group is None
    return mixes_rows(norm) and not pools_all


def point_of_return(layers: Sequence[nn.Module], last: int, shape: tuple[int, ...]) -> int:
    """Return how many layers to run on shuffled rows, so that the fewest numbers travel back.

    ``last`` is the index of the last layer that must see shuffled rows, ``shape`` that of an input
    row. Of equal numbers it is the largest, as shuffled rows are shared equally among the ranks.
    """
    sizes = []
    for layer in layers:
        shape = _row_shape(layer, shape)
        sizes.append(math.prod(shape))
    return min(range(last, len(layers)), key=lambda i: (sizes[i], -i)) + 1


def _row_shape(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a layer of detectron2's or torchvision's heads gives a row."""
    if isinstance(layer, nn.Sequential):
        for part in layer:
            shape = _row_shape(part, shape)
        return shape
    if isinstance(layer, nn.Linear):
        return (*shape[:-1], layer.out_features)
    if isinstance(layer, nn.Flatten):
        return (math.prod(shape),)
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return (layer.out_channels, *(_extent(layer, i, n) for i, n in enumerate(shape[1:])))
    return shape


def _extent(layer: nn.Conv2d | nn.ConvTranspose2d, i: int, n: int) -> int:
    stride, border = layer.stride[i], 2 * int(layer.padding[i])
    window = layer.dilation[i] * (layer.kernel_size[i] - 1)
    if isinstance(layer, nn.ConvTranspose2d):
        return (n - 1) * stride - border + window + layer.output_padding[i] + 1
    return (n + border - window - 1) // stride + 1
