"""The last m values of a statistic, and how the official MABN code saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

_HALF_TYPES = (torch.float16, torch.bfloat16)


class FullPrecisionBuffers(nn.Module):
    """A module whose buffers never become half types: a mean square of 256² overflows float16."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in _HALF_TYPES:
                self._buffers[name] = old.to(new.device)
        return self


class ValueRing(FullPrecisionBuffers):
    """A ring of m values (C,) in the order in which they were pushed; first, set its length.

    The buffer of the values is named after m (``last_16``), as some checkpointers drop keys of
    another shape before this class sees them. Loading another m keeps the newest values; a longer
    ring is filled up with their mean, so that its average starts where the shorter one's was. A
    checkpoint without a ring leaves this one as it is, one with a part of a ring empties it. The
    number of pushes is a buffer, too: no GPU waits for it, and a compiler sees one graph.
    """

    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        count: Tensor
    __jit_unused_properties__ = ["values", "pushed"]

    def __init__(self, num_features: int, device: Any = None) -> None:
        super().__init__()
        self.num_features = num_features
        self.length: int | None = None
        self.register_buffer("count", torch.zeros((), dtype=torch.long, device=device))

    def set_length(self, length: int, like: Tensor) -> None:
        """Make the ring m = ``length`` values long, in ``like``'s type; values that fit stay."""
        # an inference tensor could not be written in later training
        with torch.inference_mode(False), torch.no_grad():
            values = torch.zeros(length, self.num_features, dtype=like.dtype, device=like.device)
            if self.length is not None:
                values.copy_(resize_ring(self.values, self.pushed, length))
                del self._buffers[f"last_{self.length}"]
        self.length = length
        self.register_buffer(f"last_{length}", values)

    @property
    def pushed(self) -> int:
        """How many values were pushed in all. The host waits for the device."""
        return int(self.count)

    @property
    def values(self) -> Tensor:
        """(m, C). The i-th value ever pushed (from 0) is or was in row i mod m."""
        if self.length is None:
            raise RuntimeError("the ring has no length yet: call set_length first")
        return self._buffers[f"last_{self.length}"]  # type: ignore[return-value]

    def clear(self) -> None:
        """Forget every value and the count."""
        for buffer in self.buffers():
            buffer.zero_()

    def push(self, value: Tensor) -> Tensor:
        """Append a value (C,) that needs no gradient; return how many were pushed.

        Channels in which it is not finite (an overflow under a gradient scaler) repeat the value
        before, so that m averages do not suffer from one such step.
        """
        values, t, m = self.values, self.count, len(self.values)
        value = value.to(values.dtype)[None]
        value = value.where(value.isfinite(), values.index_select(0, (t - 1).remainder(m)[None]))
        values.index_copy_(0, t.remainder(m)[None], value)
        return t.add_(1)

    def mean(self) -> Tensor:
        """Return (C,), the mean of the last m values or of the fewer there are."""
        return self.values.sum(0) / self.count.clamp(1, len(self.values))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        stored = [state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix + "last_")]
        count = state_dict.get(prefix + "count")
        if stored and count is not None:
            values = stored[0]
            if self.length is None:
                self.set_length(len(values), values.new_empty(0, device=self.count.device))
            kept = resize_ring(values, int(count), len(self.values))
            state_dict[f"{prefix}last_{self.length}"] = kept
        elif stored or count is not None:
            self.clear()  # a count alone would promise values
            state_dict.pop(prefix + "count", None)
        # what the checkpoint does not have stays as it is, and is not reported as missing
        for name, buffer in self._buffers.items():
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def resize_ring(values: Tensor, pushed: int, length: int) -> Tensor:
    """Return a ring (length, C) with the newest values of another one, laid out for ``pushed``.

    Args:
        values: (m, C), the i-th value pushed in row i mod m.
        pushed: how many values were pushed in all.
        length: of the new ring. Values older than the m known ones become their mean.
    """
    m = len(values)
    if m == length:
        return values
    newest = values.roll(-(pushed % m), 0)[max(0, m - pushed) :][-length:]
    wanted = min(pushed, length)
    older = newest.mean(0).expand(wanted - len(newest), -1)
    resized = values.new_zeros(length, *values.shape[1:])
    resized[torch.arange(pushed - wanted, pushed) % length] = torch.cat([older, newest])
    return resized


def is_official(state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Return whether the official MABN code saved the layer at ``prefix``.

    Its general layer keeps the mean square as ``running_var`` of shape (1, C, 1, 1), which no
    BatchNorm does; the layer of its classification code as (C,) beside a ``sta_matrix``.
    """
    running = state_dict.get(prefix + "running_var")
    return running is not None and (running.ndim == 4 or prefix + "sta_matrix" in state_dict)


def convert_official(state_dict: MutableMapping[str, Any], prefix: str) -> bool:
    """Rename and reshape, in place, what the official code saved of one layer.

    The official rings hold the value of iteration t (from 1) in row t mod m, ours in row
    (t - 1) mod m. The classification code averages over groups of images within one iteration,
    which has no counterpart here: its layers start the warm-up again.

    Returns:
        whether the layer at ``prefix`` was one of the official code; else nothing has changed.
    """
    if not is_official(state_dict, prefix):
        return False
    state_dict[prefix + "running_mean_square"] = state_dict.pop(prefix + "running_var").flatten()
    for name in ("sta_matrix", "pre_x2", "pre_gz"):
        state_dict.pop(prefix + name, None)
    names = ("iters", "buffer_x2", "buffer_gz")
    count, *rings = [state_dict.pop(prefix + name, None) for name in names]
    if count is not None and all(values is not None for values in rings):
        for name, values in zip(("mean_square_ring", "gradient_ring"), rings, strict=True):
            state_dict[f"{prefix}{name}.count"] = count.reshape(())
            state_dict[f"{prefix}{name}.last_{len(values)}"] = values.roll(-1, 0)
    return True
