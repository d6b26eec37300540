"""Every BN-like layer of a model as the diagnosis sees it: what it stores, what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from rethinking_bn.distributed import get_world_size
from rethinking_bn.layers import BatchStatNorm2d, MultiDomainBatchNorm2d, SplitBatchNorm2d
from rethinking_bn.layers.population_layer import PopulationLayer
from rethinking_bn.numerics.moments import Moments

Statistics = tuple[Tensor, Tensor]  # mean and variance, each (D, C), float64 on the CPU


class DiagnosedLayer:
    """One BN-like layer: torch's, the package's, or a FrozenBatchNorm2d of any project.

    A *use* is one tensor that the layer normalises in a forward of the model: the k-th call, or
    the level of a list. Uses share a row of stored statistics (D rows) or have one each.

    Args:
        name: in the model.
        layer: see :func:`find_layers`.
        frozen: whether it normalises by stored statistics in training, too.

    Attributes:
        depth: the order in which the layers were found.
        apart: whether training normalises each use by statistics of its own.
        by_batch: whether inference uses no stored statistics.
        mean_square: whether the statistics are a mean square alone (MABN): read as mean 0 with
            that variance.
        stored: the statistics at construction, None where there are none.
    """

    def __init__(self, name: str, layer: Any, frozen: bool, depth: int = 0) -> None:
        self.name, self.layer, self.frozen, self.depth = name, layer, frozen, depth
        self.mean_square = hasattr(layer, "running_mean_square")
        self.by_batch = isinstance(layer, BatchStatNorm2d) or (
            isinstance(layer, _BatchNorm) and layer.running_mean is None
        )
        shared = isinstance(layer, MultiDomainBatchNorm2d) and layer.train_stats == "shared"
        self.apart = not (frozen or shared or self.mean_square)
        self.eps = float(layer.eps)
        self.channels = int(next(t for t in layer.state_dict().values() if t.dim() == 1).numel())
        self.stored = self._read()

    def _read(self) -> Statistics | None:
        layer = self.layer
        if self.mean_square:
            square = _copy(layer.read_population()[0])
            return torch.zeros_like(square), square
        if layer.__dict__.get("_buffers", {}).get("running_mean", 0) is None:
            return None
        if isinstance(layer, PopulationLayer):
            mean, var = layer.read_population()
        else:
            mean, var = layer.running_mean[None], layer.running_var[None]
        return _copy(mean), _copy(var)

    @torch.no_grad()
    def write(self, statistics: Statistics) -> None:
        """Write a mean and variance, (D, C), into the layer's buffers."""
        mean, var = statistics
        if isinstance(self.layer, PopulationLayer):
            count = torch.full((len(mean),), 2.0, dtype=mean.dtype)
            # of two values per channel, M2 is the unbiased variance
            moments = Moments(count, var if self.mean_square else mean, var)
            device = self.stored_on()
            target = torch.device("cpu") if device.type == "mps" else device
            self.layer.write_population(moments.to(target))
        else:
            self.layer.running_mean.copy_(mean[0])
            self.layer.running_var.copy_(var[0])

    def stored_on(self) -> torch.device:
        """Return the device of the layer's buffers."""
        module: nn.Module = self.layer
        return next(module.buffers()).device

    @property
    def rows(self) -> int:
        """D, the sets of stored statistics."""
        return 1 if self.stored is None else len(self.stored[0])

    @property
    def momentum(self) -> float | None:
        """Fraction of the new value in the moving average; None: a cumulative average."""
        return getattr(self.layer, "momentum", None)

    @property
    def steps(self) -> int | None:
        """Updates that the stored statistics have seen, where the layer counts them."""
        names = [n for n, _ in self.layer.named_buffers() if n.endswith("num_batches_tracked")]
        if not names or self.layer.get_buffer(names[0]) is None:
            return None
        return int(self.layer.get_buffer(names[0]))

    @property
    def ranks(self) -> int:
        """How many ranks' samples are normalised together."""
        pools = "SyncBatchNorm" in type(self.layer).__name__ or getattr(self.layer, "sync", False)
        return get_world_size(getattr(self.layer, "process_group", None)) if pools else 1

    @property
    def groups(self) -> int:
        """How many groups of its rows are normalised apart (MODEL.*.NORM_IMAGES)."""
        return max(1, len(getattr(self.layer, "_groups", None) or ()))

    def row_of(self, use: int) -> int:
        """Return which row of the stored statistics a use is normalised by."""
        return use % self.rows

    def normalise_by_batch(self) -> None:
        """Let the layer normalise by mini-batches from now on, unless it is frozen."""
        if not self.frozen:
            # its children too; train() may do more, or refuse
            for module in self.layer.modules():
                module.training = True

    def normalise_by_population(self) -> None:
        """Let the layer normalise by what is in its buffers from now on."""
        for module in self.layer.modules():
            module.training = False

    def state_untouched(self) -> AbstractContextManager[Any]:
        """Return a context in which the forwards of a layer of ours in training change no state."""
        if isinstance(self.layer, PopulationLayer) and not self.frozen:
            return self.layer.observing(_ignore)
        return nullcontext()

    @contextmanager
    def watching(self, see: Any) -> Iterator[None]:
        """Call ``see(tensors)`` before each call, with the list of tensors (N, C, *) it is given.

        Rows that belong to domains (a layer of the package's that is told which) come as one
        tensor per domain.
        """

        def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            see(self._tensors(x))

        handle = self.layer.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _tensors(self, x: Any) -> list[Tensor]:
        tensors = [x] if isinstance(x, Tensor) else list(x)
        rows = getattr(self.layer, "_rows", None)
        if not isinstance(self.layer, SplitBatchNorm2d) or rows is None:
            return tensors
        domains = range(self.layer.num_domains)
        each = torch.as_tensor([rows] * len(tensors[0]) if isinstance(rows, int) else rows)
        return [t[(each == d).to(t.device)] for t in tensors for d in domains]


def _copy(x: Tensor) -> Tensor:
    """Return a float64 copy on the CPU; zeros for torch's meta device, which has no numbers."""
    x = x.detach()
    return torch.zeros(x.shape, dtype=torch.float64) if x.is_meta else x.cpu().double().clone()


def _ignore(moments: Moments) -> None:
    """Take in what an observed layer reports; the diagnosis reads the inputs itself."""


def find_layers(model: nn.Module) -> list[DiagnosedLayer]:
    """Return every BN-like layer of a model, each once, in the order of its modules.

    BN-like are nn.BatchNorm1d/2d/3d, nn.SyncBatchNorm and subclasses, the package's own layers,
    and any module called FrozenBatchNorm* with ``running_mean`` and ``running_var`` (torchvision's
    and detectron2's, which is not imported). A frozen one is of the last kind, says so itself
    (``frozen``), or is in eval mode in a model that is in training mode.

    Raises:
        ValueError: for a lazy layer that has no size yet.
    """
    found: list[DiagnosedLayer] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside or not _is_like_batch_norm(module):
            continue
        inside.update(module.modules())
        if any(is_lazy(tensor) for tensor in [*module.parameters(), *module.buffers()]):
            raise ValueError(f"{name}: a lazy layer; run one forward first, so that it has a size")
        frozen = (
            type(module).__name__.startswith("FrozenBatchNorm")
            or bool(getattr(module, "frozen", False))
            or (model.training and not module.training)
        )
        if next(iter(module.state_dict().values()), None) is None:
            continue  # neither affine nor statistics: nothing that could be wrong
        found.append(DiagnosedLayer(name, module, frozen, len(found)))
    return found


def _is_like_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, (_BatchNorm, PopulationLayer)):
        return True
    frozen = type(module).__name__.startswith("FrozenBatchNorm")
    return frozen and hasattr(module, "running_mean") and hasattr(module, "running_var")
