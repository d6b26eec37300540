"""Domain-specific BatchNorm for code that calls a layer once per level."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from rethinking_bn.layers.multi_domain import DomainBatchNormBase
from rethinking_bn.layers.population_layer import as_leaf
from rethinking_bn.numerics.moments import Moments, affine_normalize
from rethinking_bn.randomness import is_recomputing


class CycleBatchNorm2d(DomainBatchNormBase):
    """BatchNorm with statistics of its own for each of L successive calls, and one affine.

    Row 4 of Table 5 (arXiv 2105.07576) as a drop-in for heads that loop over the levels; same
    state dict as detectron2's CycleBatchNormList. The level is a call counter, so bracket every
    pass over the levels::

        with layer.cycle():
            outputs = [layer(x) for x in levels]

    A pass with another number of calls raises at its end; an exception inside leaves the counter
    at 0. Without the bracket the counter is checked at ``train()``, ``eval()`` and
    ``state_dict()``: all raise in mid-cycle, so that statistics never shift to another level.
    Where the caller has all levels at hand, MultiDomainBatchNorm2d needs no counter and with
    ``sync`` one collective instead of L.

    Args:
        num_features: C.
        num_domains: L.
        options: sync, eps, momentum, process_group, device and dtype, as of
            MultiDomainBatchNorm2d; each call is pooled over the ranks by itself.

    Shape:
        (N, C, H, W) -> (N, C, H, W), in the input's type. May be empty.

    Raises:
        ValueError: for an input of another shape.
        RuntimeError: for a pass with a wrong number of calls.
    """

    __jit_unused_properties__ = ["population_domains", "calls"]

    def __init__(self, num_features: int, num_domains: int, **options: Any) -> None:
        super().__init__(
            num_features,
            num_domains,
            train_stats="domain_specific",
            population_stats="domain_specific",
            affine="shared",
            **options,
        )
        self._scripted_calls = 0
        # for each thread that is in mid-cycle its calls, and those within cycle()
        self._calls: dict[int, int] = {}
        self._bracketed: set[int] = set()

    @property
    def calls(self) -> int:
        """This thread's calls in the current cycle."""
        return self._calls.get(_thread(), 0)

    @contextmanager
    def cycle(self) -> Iterator[None]:
        """Bracket one pass over the L levels.

        Raises:
            RuntimeError: when entered in mid-cycle, or left after another number of calls than L.
        """
        thread = _thread()
        if thread in self._bracketed:
            raise RuntimeError("CycleBatchNorm2d.cycle() does not nest: one bracket is one pass")
        self.check_can_change_mode("cycle()")
        self._bracketed.add(thread)
        try:
            yield
            if self.calls != self.num_domains:
                raise RuntimeError(
                    f"a cycle is {self.num_domains} calls, one per domain, got {self.calls}"
                )
        finally:
            self.reset_cycle()
            self._bracketed.discard(thread)

    def reset_cycle(self) -> None:
        """Start over at level 0, after unbracketed calls were interrupted."""
        self._calls.pop(_thread(), None)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            level = self._scripted_calls
            self._scripted_calls = (level + 1) % self.num_domains
            return self.infer_levels([x] * self.num_domains)[level]
        else:  # not compiled by TorchScript
            return as_leaf(self, x) if isinstance(x, Proxy) else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, H, W), got {tuple(x.shape)}")
        thread, level = _thread(), self.calls
        if is_recomputing() and thread not in self._bracketed:
            raise RuntimeError(
                "activation checkpointing recomputes a call of a CycleBatchNorm2d outside of its "
                "cycle(), where its level is not known: checkpoint the whole pass over the levels, "
                "or use MultiDomainBatchNorm2d"
            )
        if level == self.num_domains:
            raise RuntimeError(f"a cycle is {self.num_domains} calls, got one more")
        y = self._normalize_level(x, self._modules[str(level)])
        self._calls[thread] = level + 1
        if level + 1 == self.num_domains and thread not in self._bracketed:
            self.reset_cycle()
        return y

    def _normalize_level(self, x: Tensor, level: Any) -> Tensor:
        if self.training or self.batch_stats_at_inference:
            return self._normalize([x], self.weight, self.bias, [0], [0], [level])[0]
        state = (level.running_mean, level.running_var, self.weight, self.bias)
        return affine_normalize(x, *state, self.eps)

    def _report(self, moments: Moments) -> None:
        """Report one row for each level, of which one has seen something."""
        rows = Moments(*(v.new_zeros(self.num_domains, *v.shape[1:]) for v in moments))
        for row, value in zip(rows, moments, strict=True):
            row[self.calls] = value[0]
        super()._report(rows)

    def train(self, mode: bool = True) -> CycleBatchNorm2d:
        self.check_can_change_mode("train()" if mode else "eval()")
        super().train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.check_can_change_mode("state_dict()")
        return super().state_dict(*args, **kwargs)

    def check_can_change_mode(self, where: str) -> None:
        """Raise a RuntimeError, naming ``where``, in mid-cycle."""
        if self.calls:
            raise RuntimeError(
                f"{where} after {self.calls} of {self.num_domains} calls of a CycleBatchNorm2d: "
                "the next call would use another level's statistics. Bracket each pass with "
                "`with layer.cycle():`, or call reset_cycle() after an interrupted one and "
                "train() or eval() again: only the modules before this one have the new mode"
            )

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts at level 0
        return {**super().__getstate__(), "_calls": {}, "_bracketed": set()}


def _thread() -> int:
    # a compiler cannot ask, and traces the calls of one thread
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
