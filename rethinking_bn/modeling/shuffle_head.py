"""Running the normalised layers of a head of detectron2's on RoIs shuffled over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from rethinking_bn.modeling.norm_head import NormHead
from rethinking_bn.shuffle.layers import ShuffledLayers, mixes_rows_of_a_rank


class ShuffleHead(ShuffledLayers, NormHead):
    """Mixin, before a NormHead: its BN layers see rows of all ranks, mixed at random.

    What is shuffled, when, and by which permutation is said at
    :class:`~rethinking_bn.shuffle.layers.ShuffledLayers`. With ``norm_images`` = k, each
    rank splits its share into (images on the rank / k) equal normalisation batches: 8 ranks with
    two images each and k = 1 make the 16 batches of 16 ranks with one image each.

    Under a trainer that announces no iterations, they are those of detectron2's event storage.
    detectron2's losses on zero rows depend on the head's result, as those of all ranks must.
    """

    def shuffled_norms(self) -> list[nn.Module]:
        """Return the norm layers whose result depends on which rows are on this rank."""
        return [norm for norm in self.batch_norms() if mixes_rows_of_a_rank(norm)]

    def unannounced_iteration(self) -> int:
        """Return the iteration of detectron2's event storage, 0 outside of one."""
        return get_event_storage().iter if has_event_storage() else 0

    def run_on_shuffled(self, layers: Sequence[nn.Module], rows: Tensor) -> Tensor:
        """Run layers on rows that came from a shuffle, normalised in equal batches."""
        with self.normalizing_images(len(rows), shuffled=True):
            return super().run_on_shuffled(layers, rows)
