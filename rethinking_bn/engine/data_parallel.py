"""Data-parallel training on any device, with gradients that do not depend on buckets."""

# Without "from __future__ import annotations": torch compares the annotations of a communication
# hook with its own classes.

from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed import GradBucket

from rethinking_bn.distributed import all_gather, data_parallel


def wrap_data_parallel(model: nn.Module, on_gpu: bool) -> nn.Module:
    """Wrap a model for data-parallel training, if there are several processes.

    Buffers stay each rank's own, see :func:`rethinking_bn.distributed.data_parallel`.

    On the CPU the gradients of three or more ranks are added up in the order of the ranks. gloo's
    order depends on the place in a bucket, and torch lays buckets out anew after the first step of
    a process, so a resumed run would round differently.

    Args:
        model: on its device.
        on_gpu: whether that is this process's GPU.
    """
    if comm.get_world_size() == 1:
        return model
    wrapped = data_parallel(model, device_ids=[comm.get_local_rank()] if on_gpu else None)
    if not on_gpu and comm.get_world_size() > 2:  # a sum of two has no order
        wrapped.register_comm_hook(None, _mean_in_rank_order)
    return wrapped


def _mean_in_rank_order(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    gathered = all_gather(bucket.buffer())  # (W, elements)
    total = gathered[0].clone()
    for rank in gathered[1:]:
        total += rank
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(total / len(gathered))
    return future
