"""Mixed precision without a GPU."""

from __future__ import annotations

import time

import torch
from detectron2.engine import SimpleTrainer


class CPUAutocastTrainer(SimpleTrainer):
    """detectron2's SimpleTrainer with the forward in bfloat16 autocast on the CPU.

    bfloat16 has float32's range, so there is no gradient scaler. (detectron2's AMPTrainer is for
    CUDA alone.) The backward runs outside, each operation in the type of its forward.
    """

    def run_step(self) -> None:
        """Take one training step: data, loss in autocast, gradients, optimizer."""
        if not self.model.training:
            raise RuntimeError("the model was changed to eval mode")
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = self.model(data)
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            total = sum(losses.values())
        self.optimizer.zero_grad()
        total.backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.optimizer.step()
