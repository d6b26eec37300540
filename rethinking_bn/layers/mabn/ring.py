"""The last m values of a per-channel statistic, kept for their simple moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rethinking_bn.numerics.running import host_reads

_HALF_TYPES = (torch.float16, torch.bfloat16)


class FullPrecisionBuffers(nn.Module):
    """A module whose buffers move with it but never drop to a half type.

    ``model.half()`` is for weights and activations: a mean square over 65504, which activations
    of 256 reach, is infinite in float16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in _HALF_TYPES:
                self._buffers[name] = old.to(new.device)
        return self


class ValueRing(FullPrecisionBuffers):
    """A ring of m values (C,) in the order they were pushed.

    The buffer that holds them is named after m (``last_16``), so checkpoints of different m
    share no key with different shapes, which some checkpointers would drop unseen. Loading
    another m keeps the newest values; a longer ring is filled up with their mean, so that its
    average starts where the shorter one's was. A checkpoint without ring keys leaves the ring
    alone, one with a part of them empties it. How many values were pushed is a buffer, which only
    the CPU reads: a GPU never waits for it, and a compiler sees one graph in every iteration.

    Args:
        num_features: C.
        length: m, or None when :meth:`set_length` will be called later.
    """

    if TYPE_CHECKING:  # TorchScript would read annotations of attributes
        count: Tensor
    __jit_unused_properties__ = ["values", "pushed"]

    def __init__(
        self, num_features: int, length: int | None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.length: int | None = None
        self.register_buffer("count", torch.zeros((), dtype=torch.long, device=device))
        if length is not None:
            self.set_length(length, torch.empty(0, device=device, dtype=dtype))

    def set_length(self, length: int, like: Tensor) -> None:
        """Make the ring m = ``length`` values long, on ``like``'s device and in its type.

        Values it held already are kept as far as they fit (see :func:`resize_ring`).
        """
        # an inference tensor could not be written in later training
        with torch.inference_mode(False), torch.no_grad():
            values = torch.zeros(length, self.num_features, dtype=like.dtype, device=like.device)
            if self.length is not None:
                values.copy_(resize_ring(self.values, self.pushed, length))
                del self._buffers[_buffer_name(self.length)]
        self.length = length
        self.register_buffer(_buffer_name(length), values)

    @property
    def pushed(self) -> int:
        """How many values were pushed in all (waits for the device)."""
        return int(self.count)

    @property
    def values(self) -> Tensor:
        """(m, C); the i-th value ever pushed (from 0) is or was in row i mod m."""
        if self.length is None:
            raise RuntimeError("the ring has no length yet: call set_length first")
        values = self._buffers[_buffer_name(self.length)]
        assert values is not None
        return values

    def clear(self) -> None:
        """Forget every value and the count."""
        for buffer in self.buffers():
            buffer.zero_()

    def clock(self) -> int | Tensor:
        """Return how many values were pushed: a number where nobody waits for it, else ``count``.

        A number spares the operators that let a device choose for itself.
        """
        return int(self.count) if host_reads(self.count) else self.count

    def push(self, value: Tensor, finite: Tensor | None = None) -> int | Tensor:
        """Append a value (C,) that needs no gradient; return the clock after it.

        Channels in which it is not finite (an overflow under a gradient scaler) repeat the value
        before, so that one such step does not outlive itself in m averages.

        Args:
            finite: (C,) whether it is, where that is cheaper to tell than of any value.
        """
        values, m, t = self.values, self.length, self.clock()
        assert m is not None  # there are values
        if finite is None:
            zero = value - value  # or NaN
            finite = zero == zero
        value = value.to(values.dtype)
        if isinstance(t, int):
            torch.where(finite, value, values[(t - 1) % m], out=values[t % m])
            self.count.add_(1)
            return t + 1
        newest = (t - 1).remainder_(m).view(1)
        value = torch.where(finite, value, values.index_select(0, newest))
        values.index_copy_(0, t.remainder(m).view(1), value)
        return self.count.add_(1)

    def mean(self, clock: int | Tensor | None = None) -> Tensor:
        """Return (C,), the mean of the last m values or of the fewer there are.

        Args:
            clock: as :meth:`push` has returned it; None: asked for.
        """
        values, t = self.values, self.clock() if clock is None else clock
        if not isinstance(t, int):
            return values.sum(0) / t.clamp(1, len(values))
        m: int = self.length  # type: ignore[assignment]
        return values.mean(0) if t >= m else values.sum(0) / max(t, 1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        keys = [key for key in state_dict if key.startswith(prefix + "last_")]
        stored = [state_dict.pop(key) for key in keys]
        count = state_dict.get(prefix + "count")
        if stored and count is not None:
            values = stored[0]
            if self.length is None:
                self.set_length(len(values), values.new_empty(0, device=self.count.device))
            assert self.length is not None  # by now
            name = prefix + _buffer_name(self.length)
            state_dict[name] = resize_ring(values, int(count), self.length)
        elif stored or count is not None:
            self.clear()  # a count alone would promise values
            state_dict.pop(prefix + "count", None)
        # what the checkpoint does not say stays as it is, and is not reported as missing
        for name, buffer in self._buffers.items():
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _buffer_name(length: int) -> str:
    return f"last_{length}"


def resize_ring(values: Tensor, pushed: int, length: int) -> Tensor:
    """Return a ring of ``length`` rows that holds the newest values of another one.

    Args:
        values: (m, C), the i-th value pushed in row i mod m.
        pushed: how many values were pushed in all.
        length: rows of the new ring; rows for older values than the m known hold their mean.

    Returns:
        (length, C), laid out for the same ``pushed``; ``values`` itself when the length is equal.
    """
    m = len(values)
    if m == length:
        return values
    known = values.roll(-(pushed % m), 0) if pushed >= m else values[:pushed]
    known = known[-length:]
    resized = values.new_zeros(length, *values.shape[1:])
    wanted = min(pushed, length)
    if wanted:
        older = known.mean(0).expand(wanted - len(known), *known.shape[1:])
        rows = torch.arange(pushed - wanted, pushed, device=values.device) % length
        resized[rows] = torch.cat([older, known])
    return resized


def window(simulated_batch_size: int, batch_size: int) -> int:
    """Return m, the iterations whose statistics simulate the larger batch.

    Raises:
        ValueError: naming both sizes, when the batch size does not divide the simulated one.
    """
    if batch_size < 1 or simulated_batch_size < 1 or simulated_batch_size % batch_size:
        raise ValueError(
            f"the simulated batch size {simulated_batch_size} is not a multiple of the batch size "
            f"{batch_size} (images per rank)"
        )
    return simulated_batch_size // batch_size
