"""The clipping rule against a loop over units, and its laws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nfnet import adaptive_clip_grad_

SHAPES = st.lists(
    st.one_of(
        st.just(()),
        st.tuples(st.integers(1, 5)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=5,
)
CLIPPINGS = st.sampled_from([0.01, 0.16, 1.0])


def draw(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    """Parameters whose units have gradient to weight ratios from far below to far above 1."""
    rng = np.random.default_rng(seed)
    params = []
    for shape in shapes:
        rows = (shape[0], *[1] * (len(shape) - 1)) if shape else ()
        weight = rng.standard_normal(shape) * 10.0 ** rng.uniform(-5, 1, rows)
        grad = rng.standard_normal(shape) * 10.0 ** rng.uniform(-7, 2, rows)
        p = torch.tensor(weight, dtype=torch.float32)
        p.grad = torch.tensor(grad, dtype=torch.float32)
        params.append(p)
    return params


def units(x: np.ndarray) -> list[tuple[int, ...] | tuple[()]]:
    """Where each unit of an array is."""
    if sum(size > 1 for size in x.shape) <= 1:
        return [()]
    return [(i,) for i in range(x.shape[0])]


def clip_unit_by_unit(
    weight: np.ndarray, grad: np.ndarray, clipping: float, eps: float
) -> tuple[np.ndarray, float]:
    """The paper's equation 3 as it is written."""
    result, clipped = grad.copy(), 0
    for unit in units(weight):
        weight_norm = max(np.sqrt((weight[unit] ** 2).sum()), eps)
        grad_norm = np.sqrt((grad[unit] ** 2).sum())
        if grad_norm / weight_norm > clipping:
            result[unit] = clipping * weight_norm / max(grad_norm, 1e-6) * grad[unit]
            clipped += 1
    return result, clipped / len(units(weight))


@settings(deadline=None, max_examples=60)
@given(SHAPES, CLIPPINGS, st.integers(0, 2**32 - 1))
def test_agrees_with_a_loop_over_units(
    shapes: list[tuple[int, ...]], clipping: float, seed: int
) -> None:
    params = draw(shapes, seed)
    before = [(p.double().numpy(), p.grad.double().numpy().copy()) for p in params]
    shares = adaptive_clip_grad_(params, clipping)
    for p, share, (weight, grad) in zip(params, shares, before, strict=True):
        expected, expected_share = clip_unit_by_unit(weight, grad, clipping, eps=1e-3)
        np.testing.assert_allclose(p.grad.numpy(), expected, rtol=1e-5, atol=1e-12)
        assert share.shape == ()
        assert share.item() == pytest.approx(expected_share, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(SHAPES, CLIPPINGS, st.integers(0, 2**32 - 1))
def test_no_unit_exceeds_its_bound_and_units_below_it_are_untouched(
    shapes: list[tuple[int, ...]], clipping: float, seed: int
) -> None:
    params = draw(shapes, seed)
    before = [p.grad.clone() for p in params]
    adaptive_clip_grad_(params, clipping)
    for p, old in zip(params, before, strict=True):
        for unit in units(p.numpy()):
            bound = clipping * max(p[unit].norm().item(), 1e-3)
            assert p.grad[unit].norm().item() <= bound * (1 + 1e-5)
            if old[unit].norm().item() < bound * (1 - 1e-5):
                assert torch.equal(p.grad[unit], old[unit])


@settings(deadline=None, max_examples=30)
@given(SHAPES, CLIPPINGS, st.integers(0, 2**32 - 1), st.sampled_from([0.25, 2.0, 64.0]))
def test_scaling_weights_and_gradients_together_scales_the_result(
    shapes: list[tuple[int, ...]], clipping: float, seed: int, factor: float
) -> None:
    params, scaled = draw(shapes, seed), draw(shapes, seed)
    for p in scaled:
        p.mul_(factor)
        p.grad.mul_(factor)
    # Powers of two and an eps that scales along: equal to the last bit, but for the 1e-6.
    adaptive_clip_grad_(params, clipping, eps=1e-3)
    adaptive_clip_grad_(scaled, clipping, eps=1e-3 * factor)
    for p, s in zip(params, scaled, strict=True):
        torch.testing.assert_close(s.grad, p.grad * factor, rtol=1e-5, atol=1e-7)


def test_a_gain_shaped_like_a_kernel_is_one_unit() -> None:
    gain = torch.ones(4, 1, 1, 1)
    gain.grad = torch.tensor([3.0, 0.0, 0.0, 4.0]).view(4, 1, 1, 1)
    (share,) = adaptive_clip_grad_(gain, clipping=0.5)
    # Weight norm 2, gradient norm 5: all four are scaled by 0.5 * 2 / 5.
    torch.testing.assert_close(gain.grad.flatten(), torch.tensor([0.6, 0.0, 0.0, 0.8]))
    assert share == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_norms_do_not_overflow_or_lose_digits(dtype: torch.dtype) -> None:
    weight = torch.full((2, 30_000), 0.01)
    p = weight.to(dtype)
    p.grad = torch.full((2, 30_000), 300.0).to(dtype)
    adaptive_clip_grad_([p], clipping=0.1)
    # The squares alone would pass float16's largest number, 65504.
    torch.testing.assert_close(p.grad.float(), weight * 0.1, rtol=2e-2, atol=0)


def test_parameters_without_gradient_are_skipped() -> None:
    with_grad, without = torch.ones(3), torch.ones(3)
    with_grad.grad = torch.ones(3)
    assert len(adaptive_clip_grad_([without, with_grad], clipping=0.1)) == 1
    assert without.grad is None
    assert adaptive_clip_grad_([without], clipping=0.1) == []
    # An iterator is read once.
    assert len(adaptive_clip_grad_(iter([with_grad]), clipping=0.1)) == 1


def test_a_broken_gradient_stays_visible() -> None:
    p = torch.ones(2, 3)
    p.grad = torch.tensor([[float("nan"), 1.0, 1.0], [0.0, 0.0, 0.0]])
    adaptive_clip_grad_([p], clipping=0.1)
    assert p.grad[0, 0].isnan()
    assert torch.equal(p.grad[1], torch.zeros(3))


@pytest.mark.parametrize("clipping", [0.0, -0.01, float("nan")])
def test_refuses_a_clipping_that_is_not_positive(clipping: float) -> None:
    with pytest.raises(ValueError, match=f"clipping is {clipping}, expected a number above 0"):
        adaptive_clip_grad_(torch.ones(3), clipping)
