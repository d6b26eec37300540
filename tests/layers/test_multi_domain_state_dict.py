"""Keys of the state dict, and checkpoints of one layout in a layer of the other."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from rethinking_bn.layers import MultiDomainBatchNorm2d
from tests import reference
from tests.layers.test_multi_domain import L, build
from tests.reference import CHANNELS


def test_shared_keys_equal_batch_norm_and_domain_keys_cycle_list() -> None:
    assert (
        build("shared", "shared", "shared").state_dict().keys()
        == nn.BatchNorm2d(1).state_dict().keys()
    )
    separate = nn.ModuleList(nn.BatchNorm2d(1, affine=False) for _ in range(L))
    got = set(build("domain_specific", "domain_specific", "shared").state_dict())
    assert got == {"weight", "bias", *separate.state_dict()}


def test_domain_specific_checkpoint_becomes_shared_as_a_mixture(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, target = (
        build("shared", "domain_specific", "shared"),
        build("shared", "shared", "shared"),
    )
    source(reference.levels())
    caplog.set_level(logging.INFO, "rethinking_bn")
    target.load_state_dict(source.state_dict())
    mean, var = source.read_population()
    torch.testing.assert_close(target.running_mean, mean.mean(0))
    torch.testing.assert_close(target.running_var, var.mean(0) + mean.var(0, unbiased=False))
    assert "population training is due" in caplog.text


def test_shared_checkpoint_is_copied_to_every_domain() -> None:
    source, target = build("shared", "shared", "shared"), build(*("domain_specific",) * 3)
    source(reference.levels())
    target.load_state_dict(source.state_dict())
    for level in range(L):
        for name in ("running_mean", "running_var", "weight", "bias", "num_batches_tracked"):
            assert torch.equal(
                getattr(target.get_submodule(str(level)), name), getattr(source, name)
            )


@pytest.mark.parametrize("assign", [False, True])
def test_domains_share_no_memory_after_conversion(assign: bool) -> None:
    target = build(*("domain_specific",) * 3)
    target.load_state_dict(build("shared", "shared", "shared").state_dict(), assign=assign)
    pointers = [value.data_ptr() for value in target.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_unconvertible_checkpoints_name_the_key() -> None:
    target = nn.ModuleDict({"norm": build("shared", "shared", "shared")})
    affine_only = {"norm.weight": torch.ones(CHANNELS), "norm.bias": torch.zeros(CHANNELS)}
    with pytest.raises(RuntimeError, match=r"norm\.running_mean is not in the checkpoint"):
        target.load_state_dict(affine_only, strict=False)
    separate = {
        f"norm.{k}": v for k, v in build("shared", "shared", "domain_specific").state_dict().items()
    }
    with pytest.raises(RuntimeError, match=r"norm\.weight: 4 different affines"):
        target.load_state_dict(separate, strict=False)
    more = MultiDomainBatchNorm2d(CHANNELS, L + 1, population_stats="domain_specific")
    with pytest.raises(RuntimeError, match=r"norm\.4\.running_mean.*more domains"):
        target.load_state_dict({f"norm.{k}": v for k, v in more.state_dict().items()}, strict=False)
    row_5 = MultiDomainBatchNorm2d(CHANNELS, L + 1, affine="domain_specific")
    with pytest.raises(RuntimeError, match=r"4\.weight.*more domains"):
        build("shared", "shared", "domain_specific").load_state_dict(
            row_5.state_dict(), strict=False
        )


def test_a_checkpoint_without_the_layer_leaves_it_fresh() -> None:
    target = nn.ModuleDict({"norm": build("shared", "shared", "shared")})
    result = target.load_state_dict({"backbone.weight": torch.ones(1)}, strict=False)
    assert "norm.running_mean" in result.missing_keys
