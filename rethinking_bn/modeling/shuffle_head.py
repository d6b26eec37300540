"""Running the normalised layers of a head on RoIs shuffled over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from rethinking_bn.layers import shuffle_rows, unshuffle_rows
from rethinking_bn.layers.mabn_replay import is_recomputing
from rethinking_bn.modeling.norm_head import NormHead, mixes_rows_of_a_rank
from rethinking_bn.seeding import derive_seed

_REMEMBERED = 64  # calls of one iteration that can be recomputed
_SAMPLED = 16  # rows by which a recomputed call is recognised


class ShuffleHead(NormHead):
    """Mixin, before a NormHead: its BN layers see rows of all ranks, mixed at random.

    A BN head whose rows all come from the one or two images of a rank learns to read the image
    from its batch, and fails at inference (arXiv 2105.07576, section 6). Here the rows of all
    ranks are permuted before the normalised layers, so that each rank normalises an equal share
    of them, and brought back after; see :func:`rethinking_bn.layers.shuffle_rows`. With
    ``norm_images`` = k, each rank splits its share into (images on the rank / k) equal
    normalisation batches: 8 ranks with two images each and k = 1 make the 16 batches of 16 ranks
    with one image each.

    Rows are shuffled while a BN layer of the head is in training mode, so in population training
    too, labelled or not, and not at inference, nor without such a layer (GN; SyncBN, which
    pools all ranks anyway). Parameters and state dict are those of the unshuffled head.

    The permutation is a function of (run seed, iteration, kind of head, call within the
    iteration). Both are announced through :meth:`set_iteration`; under a trainer that does not,
    the iteration is that of detectron2's event storage and the run seed 0. Heads of one kind, as
    in a cascade, draw the same permutation when they shuffle the same number of rows.
    A recomputation (activation checkpointing) repeats the permutation of its first pass.

    Every rank must call the head equally often, with zero rows where it has none, and every
    rank's loss must depend on the result, as detectron2's losses on zero rows do.
    """

    #: sets the permutations of one kind of head apart from another's
    seed_of_head: int

    _announced: tuple[int, int] | None = None
    _iteration: tuple[int, int] | None = None  # that of the calls below
    _num_calls: int = 0
    # the number and the mark of the newest calls; rebound, never changed, so that population
    # training can put it back
    _calls: tuple[tuple[int, Tensor], ...] = ()

    @property
    def communicates(self) -> bool:
        """Whether a forward shuffles now, and so waits for the other ranks."""
        return any(norm.training for norm in self._shuffled_norms())

    def set_iteration(self, run_seed: int, iteration: int) -> None:
        """Take note of the iteration, and count calls from zero; see rethinking_bn.seeding."""
        self._announced = self._iteration = (run_seed, iteration)
        self._num_calls, self._calls = 0, ()

    def forward_shuffled(self, x: Tensor) -> Tensor:
        """Run all layers on (R, C, H, W), those up to :func:`point_of_return` on shuffled rows."""
        assert isinstance(self, nn.Sequential)  # for the type checker
        layers: list[nn.Module] = list(self)
        norms = self._shuffled_norms()
        last = max(i for i, layer in enumerate(layers) if getattr(layer, "norm", None) in norms)
        end = point_of_return(layers, last, tuple(x.shape[1:]))
        rows, state = shuffle_rows(x, generator_seed=self._seed(x))
        with self.normalizing_images(len(rows), shuffled=True):
            for layer in layers[:end]:
                rows = layer(rows)
        x = unshuffle_rows(rows, state)
        for layer in layers[end:]:
            x = layer(x)
        return x

    def _shuffled_norms(self) -> list[nn.Module]:
        return [norm for norm in self.batch_norms() if mixes_rows_of_a_rank(norm)]

    def _seed(self, x: Tensor) -> int:
        """Return the seed of this call, the same on all ranks."""
        now = self._announced or (0, get_event_storage().iter if has_event_storage() else 0)
        # A few sums are enough to tell the calls of an iteration apart, and are left on the device.
        step = max(1, len(x) // _SAMPLED)
        mark = x.detach()[::step].flatten(1).float().sum(1)
        if is_recomputing() and self._calls:
            call = _recognise(mark, self._calls)
        else:
            if now != self._iteration:
                self._iteration, self._num_calls, self._calls = now, 0, ()
            call = self._num_calls
            self._num_calls += 1
            self._calls = (*self._calls, (call, mark))[-_REMEMBERED:]
        return derive_seed(*now, self.seed_of_head, call)


def _recognise(mark: Tensor, calls: Sequence[tuple[int, Tensor]]) -> int:
    """Return the number of the call whose mark is nearest, of equal ones the newest."""
    if len(calls) == 1:
        return calls[0][0]
    alike = [(call, other) for call, other in reversed(calls) if other.shape == mark.shape]
    if not alike:
        return calls[-1][0]
    distances = torch.stack([(other - mark).abs().sum() for _, other in alike])
    return alike[int(distances.nan_to_num(math.inf).argmin())][0]


def point_of_return(layers: Sequence[nn.Module], last: int, shape: tuple[int, ...]) -> int:
    """Return how many layers to run on shuffled rows, so that the fewest numbers travel back.

    Args:
        layers: run one after the other.
        last: the index of the last one that must see shuffled rows.
        shape: of an input row.

    Returns:
        The number of layers after which a row is smallest, more than ``last``; of equal ones the
        largest, as shuffled rows are shared equally among the ranks.
    """
    sizes = []
    for layer in layers:
        shape = _row_shape(layer, shape)
        sizes.append(math.prod(shape))
    return min(range(last, len(layers)), key=lambda i: (sizes[i], -i)) + 1


def _row_shape(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a layer of detectron2's heads gives a row."""
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
