"""Several forward/backward passes per optimiser step, where detectron2 has one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import Tensor

from rethinking_bn.engine.rank_state import normalizers_of_pass


class AccumulatingTrainer(SimpleTrainer):
    """detectron2's SimpleTrainer whose step takes a batch in k equal parts, one after another.

    An iteration stays one optimiser step over one batch of the loader. The gradients of the k
    passes are averaged, as those of k processes would be; under DistributedDataParallel they are
    reduced once, with the last pass. So W ranks with k passes take the step of W·k ranks, up to
    rounding, as long as each layer normalises what is in its own pass (BN, GN).

    Each pass keeps its own moving loss normaliser (of detectron2's dense detectors). BN's moving
    averages and MABN's iterations move k times per iteration. The log has the losses' means over
    the passes.
    """

    def __init__(self, *args: Any, accumulation_steps: int = 1, **kwargs: Any) -> None:
        """
        Args:
            accumulation_steps: passes k per step, at least 1. Every batch of the loader is a
                sequence whose length k divides.
            args, kwargs: SimpleTrainer's.
        """
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        super().__init__(*args, **kwargs)
        self.accumulation_steps = accumulation_steps

    def run_step(self) -> None:
        """Take one optimiser step: data, k passes, gradients, optimizer.

        Raises:
            RuntimeError, ValueError: for a model in eval mode; if k does not divide the batch.
        """
        if not self.model.training:
            raise RuntimeError("the model was changed to eval mode")
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        parts = split_batch(data, self.accumulation_steps)

        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        no_sync = getattr(self.model, "no_sync", nullcontext)
        means: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            with (
                nullcontext() if is_last else no_sync(),  # of a data-parallel wrapper
                normalizers_of_pass(self.model, index, len(parts)),
            ):
                with self._autocast():
                    losses = self.model(part)
                    if isinstance(losses, Tensor):
                        losses = {"total_loss": losses}
                    total = sum(losses.values()) / len(parts)
                if index == 0 and not self.zero_grad_before_forward:
                    self.optimizer.zero_grad()
                self._backward(total)
            for name, loss in losses.items():
                mean = loss.detach() / len(parts)
                means[name] = means[name] + mean if name in means else mean

        self.after_backward()
        if self.async_write_metrics:
            self.concurrent_executor.submit(self._write_metrics, means, data_time, iter=self.iter)
        else:
            self._write_metrics(means, data_time)
        self._step_optimizer()

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _step_optimizer(self) -> None:
        self.optimizer.step()


class AccumulatingAMPTrainer(AccumulatingTrainer, AMPTrainer):
    """:class:`AccumulatingTrainer` with the mixed precision of detectron2's AMPTrainer, on CUDA.

    One scale of the loss holds for all passes of a step; an overflow in any of them skips the
    step. Takes AMPTrainer's arguments and ``accumulation_steps``.
    """

    def _autocast(self) -> AbstractContextManager[Any]:
        if not torch.cuda.is_available():
            raise RuntimeError("AccumulatingAMPTrainer needs CUDA, as detectron2's AMPTrainer does")
        return torch.autocast("cuda", dtype=self.precision)

    def _backward(self, loss: Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def _step_optimizer(self) -> None:
        if self.log_grad_scaler:
            scale = self.grad_scaler.get_scale()
            get_event_storage().put_scalar("[metric]grad_scaler", scale)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


class CPUAutocastTrainer(AccumulatingTrainer):
    """:class:`AccumulatingTrainer` with the forward in bfloat16 autocast on the CPU.

    bfloat16 has float32's range, so there is no gradient scaler.
    """

    precision = torch.bfloat16

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=self.precision)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Return a batch, a sequence of samples or a tensor (N, ...), in equal parts, in order."""
    if parts == 1:
        return [batch]
    if not isinstance(batch, (Sequence, Tensor)):
        raise ValueError(f"accumulation_steps {parts}: the loader yields a {type(batch).__name__}")
    size, rest = divmod(len(batch), parts)
    if rest or not size:
        raise ValueError(f"accumulation_steps {parts} does not divide the {len(batch)} samples")
    return [batch[start : start + size] for start in range(0, len(batch), size)]
