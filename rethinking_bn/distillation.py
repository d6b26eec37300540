"""Losses against a teacher's soft targets; torch only.

The Kullback-Leibler divergence between predictions softened by a temperature T, times T², so that
its gradient keeps its size whatever T is: Hinton, Vinyals and Dean, arXiv 1503.02531.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["binary_kl_soft_loss", "kl_soft_loss"]


def kl_soft_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 5.0
) -> Tensor:
    """Return T² · KL(teacher ‖ student) of softmax predictions softened by T.

    With p = softmax(teacher / T) and q = softmax(student / T) over the classes, this is
    T² · Σ p (log p − log q), summed over the classes and divided by the number of all other
    positions: by N for logits (N, K), by N·H·W for dense maps (N, K, H, W), not by N. Its gradient
    in a student's logit is T (q − p) / positions. The teacher gets none.

    Args:
        student_logits, teacher_logits: (N, K, ...), classes in dimension 1; of any floating type.
            A teacher's −inf is a class that cannot be.

    Returns:
        a scalar, computed and returned in float32 (float64 for float64); 0 without positions.

    Raises:
        ValueError: for unequal shapes, fewer than two dimensions, or T not above 0.
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    if student.dim() < 2:
        raise ValueError(
            f"logits need the classes in dimension 1, got the shape {tuple(student.shape)}"
        )
    log_q, log_p = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    total = _expected_difference(log_p.exp(), log_p, log_q).sum()
    return _mean(total, student.numel() // max(student.shape[1], 1), temperature)


def binary_kl_soft_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 5.0
) -> Tensor:
    """Return T² · KL(teacher ‖ student) of sigmoid predictions softened by T.

    Every logit is a Bernoulli variable of its own, as in the heads of dense detectors: with
    p = σ(teacher / T) and q = σ(student / T), the mean of
    T² · (p (log p − log q) + (1 − p) (log(1 − p) − log(1 − q))) over all elements: N·K·H·W for
    dense maps, not N or the objects. Concatenate levels before, so that each position counts alike.
    Its gradient in a student's logit is T (q − p) / elements. The teacher gets none.

    Args:
        student_logits, teacher_logits: of one shape and any floating types.

    Returns:
        a scalar, computed and returned in float32 (float64 for float64); 0 without elements.

    Raises:
        ValueError: for unequal shapes, or T not above 0.
    """
    student, teacher = _softened(student_logits, teacher_logits, temperature)
    total = student.new_zeros(())
    for sign in (1, -1):  # 1 − σ(x) is σ(−x), without the cancellation
        log_p, log_q = F.logsigmoid(sign * teacher), F.logsigmoid(sign * student)
        total = total + _expected_difference(torch.sigmoid(sign * teacher), log_p, log_q).sum()
    return _mean(total, student.numel(), temperature)


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            "the student's and the teacher's logits must be of one shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    # half types cannot tell probabilities near 1 apart, nor hold a sum over many positions
    kind = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(kind) / temperature, teacher.detach().to(kind) / temperature


def _expected_difference(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p − log q), which is 0 where p is, whatever the logarithms are."""
    return torch.where(p > 0, p * (log_p - log_q), 0.0)


def _mean(total: Tensor, count: int, temperature: float) -> Tensor:
    return total * (temperature**2 / max(count, 1))
