"""shuffle_rows and unshuffle_rows in one process: a permutation that comes back bit for bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rethinking_bn.layers import shuffle_rows, unshuffle_rows

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
TRAILING = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SEEDS = st.integers(-(2**70), 2**70)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of any bit pattern, NaNs and denormals of floating types included."""
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    size = torch.empty((), dtype=dtype).element_size()
    flat = torch.randint(256, (*shape, size), generator=generator).to(torch.uint8)
    return flat.view(dtype).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one type, one shape and the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def permutation(rows: int, seed: int) -> Tensor:
    return shuffle_rows(torch.arange(rows), generator_seed=seed)[0]


@settings(deadline=None, max_examples=80)
@given(rows=st.integers(0, 9), trailing=TRAILING, dtype=st.sampled_from(DTYPES), seed=SEEDS)
def test_round_trip_is_exact_for_any_shape_and_type(rows, trailing, dtype, seed):
    x = random_bits((rows, *trailing), dtype, torch.Generator().manual_seed(seed % 1000))
    before = x.clone()
    shuffled, state = shuffle_rows(x, generator_seed=seed)
    order = permutation(rows, seed)
    assert order.sort().values.tolist() == list(range(rows))
    assert same_bits(shuffled, x[order])
    assert same_bits(unshuffle_rows(shuffled, state), before)
    assert same_bits(x, before)
    assert shuffled.grad_fn is None and not shuffled.requires_grad


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 6),
    trailing=TRAILING,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=SEEDS,
)
def test_gradients_are_exact(rows, trailing, dtype, seed):
    x = torch.randn(rows, *trailing).to(dtype).requires_grad_()
    by_slot, by_row = torch.randn_like(x), torch.randn_like(x)
    shuffled, state = shuffle_rows(x, generator_seed=seed)
    out = unshuffle_rows(shuffled * by_slot, state)
    (gradient,) = torch.autograd.grad(out, x, by_row)
    slot_of_row = permutation(rows, seed).argsort()
    assert same_bits(gradient, by_row * by_slot[slot_of_row])


def test_every_permutation_is_equally_likely():
    draws = 2400
    seen = Counter(tuple(permutation(4, seed).tolist()) for seed in range(draws))
    expected = draws / 24
    chi_square = sum((seen[order] - expected) ** 2 / expected for order in seen)
    assert len(seen) == 24
    # 23 degrees of freedom: 49.7 is exceeded once in a thousand choices of the seeds.
    assert chi_square < 49.7


def test_one_seed_gives_one_permutation_and_others_give_others():
    orders = [permutation(50, seed) for seed in (7, 7, 8, 7 + 2**32, 7 + 2**64, -7)]
    assert torch.equal(orders[0], orders[1])
    assert len({tuple(order.tolist()) for order in orders}) == 5


def test_global_random_state_is_left_alone():
    x = torch.randn(5)
    before = torch.random.get_rng_state()
    shuffle_rows(x, generator_seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[::2],
        lambda x: x[:, 1:2],
        lambda x: x.flatten(1)[:, 1:8],  # misaligned
        lambda x: x[:1].expand(5, -1, -1, -1),
        lambda x: x.permute(3, 2, 1, 0),
        lambda x: x.flip(0).transpose(2, 3),
    ],
)
def test_any_strides(view):
    x = view(torch.randn(6, 4, 3, 5))
    rows, state = shuffle_rows(x, generator_seed=11)
    assert torch.equal(rows, x[permutation(len(x), 11)])
    assert torch.equal(unshuffle_rows(rows, state), x)


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (1, 4, 3, 2), (5, 4, 3, 2, 2)])
def test_channels_last_stays_channels_last(shape):
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    rows, state = shuffle_rows(x, generator_seed=2)
    out = unshuffle_rows(rows, state)
    out.backward(torch.ones_like(out, memory_format=torch.contiguous_format))
    assert torch.equal(rows, x[permutation(len(x), 2)]) and torch.equal(out, x)
    assert x.grad is not None
    for tensor in (rows, out, x.grad):
        assert tensor.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(4, 1, 3, 2), (4, 3, 1, 1), (0, 3, 2, 2), (4, 0, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ambiguous_formats(shape, memory_format):
    x = torch.randn(shape).to(memory_format=memory_format)
    rows, state = shuffle_rows(x, generator_seed=2)
    assert torch.equal(rows, x[permutation(len(x), 2)])
    assert torch.equal(unshuffle_rows(rows, state), x)


def test_what_comes_back_may_differ_from_what_went_in():
    x = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    rows, state = shuffle_rows(x, generator_seed=5)
    logits = unshuffle_rows(rows.double() @ weight, state)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, x.double() @ weight)
    labels = unshuffle_rows(rows.argmax(1), state)
    assert torch.equal(labels, x.argmax(1)) and not labels.requires_grad


def test_no_node_where_no_gradient_is_needed():
    x = torch.randn(4, 2, requires_grad=True)
    with torch.no_grad():
        rows, state = shuffle_rows(x, generator_seed=0)
        assert not rows.requires_grad
    assert not unshuffle_rows(rows, state).requires_grad
    rows, state = shuffle_rows(x, generator_seed=0)
    assert not unshuffle_rows(rows.detach(), state).requires_grad
    rows, state = shuffle_rows(x.detach(), generator_seed=0)
    out = unshuffle_rows(rows * x.new_ones((), requires_grad=True), state)
    assert not rows.requires_grad and out.requires_grad


def test_results_may_be_changed_in_place():
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    rows, state = shuffle_rows(x, generator_seed=0)
    out = unshuffle_rows(rows.relu_(), state).mul_(2)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 2.0 * (x > 0))


def test_differentiable_once():
    x = torch.randn(4, requires_grad=True)
    rows, _ = shuffle_rows(x, generator_seed=0)
    (gradient,) = torch.autograd.grad(rows.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(3, 2), (5, 2), ()])
def test_wrong_number_of_rows(shape):
    _, state = shuffle_rows(torch.randn(4, 2), generator_seed=0)
    with pytest.raises(ValueError, match=r"the 4 rows .* shape \(") as error:
        unshuffle_rows(torch.randn(shape), state)
    assert str(shape) in str(error.value)


def test_a_tensor_without_rows():
    with pytest.raises(ValueError, match="0-dimensional"):
        shuffle_rows(torch.tensor(1.0), generator_seed=0)


@pytest.mark.parametrize("seed", [1.0, "1", None])
def test_the_seed_is_an_integer(seed):
    with pytest.raises(TypeError):
        shuffle_rows(torch.randn(3), generator_seed=seed)
