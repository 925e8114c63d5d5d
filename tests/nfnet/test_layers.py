"""Padding, standardised kernels and gammas against their definitions."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nfnet.layers import ACTIVATIONS, SameConv2d, SameMaxPool2d, ScaledStdConv2d


def test_same_padding_puts_the_odd_pixel_at_the_end() -> None:
    conv = SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    row = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # TensorFlow pads 1 2 3 4 to 1 2 3 4 0; PyTorch's padding=1 would give 3 and 9.
    expected = torch.tensor([1.0 + 2 + 3, 3.0 + 4])
    image = torch.zeros(1, 1, 3, 4)
    image[0, 0, 1] = row
    torch.testing.assert_close(conv(image)[0, 0, 0], expected)
    torch.testing.assert_close(conv(image.transpose(2, 3))[0, 0, :, 0], expected)


def test_max_pool_pads_with_less_than_anything() -> None:
    image = -torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    expected = torch.tensor([[-1.0, -3.0], [-9.0, -11.0]])
    torch.testing.assert_close(SameMaxPool2d(3, stride=2)(image)[0, 0], expected)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 13), st.integers(1, 13), st.sampled_from([1, 3, 7]), st.sampled_from([1, 2, 3])
)
def test_same_convolution_is_a_loop_over_windows(h: int, w: int, k: int, stride: int) -> None:
    conv = SameConv2d(1, 1, k, stride=stride)
    image = torch.randn(1, 1, h, w)
    out_h, out_w = math.ceil(h / stride), math.ceil(w / stride)
    top = max((out_h - 1) * stride + k - h, 0) // 2
    left = max((out_w - 1) * stride + k - w, 0) // 2
    canvas = np.zeros((h + 4 * k, w + 4 * k))
    canvas[top : top + h, left : left + w] = image[0, 0].numpy()
    kernel = conv.weight.detach().numpy()[0, 0]
    expected = [
        [(canvas[y : y + k, x : x + k] * kernel).sum() for x in range(0, out_w * stride, stride)]
        for y in range(0, out_h * stride, stride)
    ]
    np.testing.assert_allclose(conv(image)[0, 0].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(("shape", "groups"), [((6, 4, 3, 3), 1), ((6, 2, 3, 3), 2)])
def test_kernel_is_the_papers_formula(shape: tuple[int, ...], groups: int, mixed: bool) -> None:
    conv = ScaledStdConv2d(shape[1] * groups, 6, 3, groups=groups, input_scale=1.7)
    with torch.no_grad():
        conv.weight.normal_(mean=0.3, std=2.0)
        conv.weight[0] = 0.5  # variance 0: the lower bound decides
        conv.weight[1] = 1e-4 * torch.randn(shape[1:])
        conv.gain.uniform_(-1, 2)
    assert conv.weight.shape == shape
    w = conv.weight.detach().double().numpy()
    fan_in = w[0].size
    mean, var = w.mean((1, 2, 3), keepdims=True), w.var((1, 2, 3), keepdims=True)
    gain = conv.gain.detach().double().numpy()
    expected = (w - mean) * gain / np.sqrt(np.maximum(var * fan_in, 1e-4)) * 1.7
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        kernel = conv.kernel()
    assert kernel.dtype == torch.float32
    np.testing.assert_allclose(kernel.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [None, 1e-5], ids=["authors", "timm"])
def test_under_autocast_a_kernel_loses_no_digits_before_it_is_standardised(
    eps: float | None,
) -> None:
    conv = ScaledStdConv2d(16, 8, 3, eps=eps)
    with torch.no_grad():
        # In bfloat16, with its 8 bits, numbers around 100 are half a unit apart.
        conv.weight.copy_(100 + 0.1 * torch.randn_like(conv.weight))
    w = conv.weight.detach().double()
    centred = w - w.mean((1, 2, 3), keepdim=True)
    kernel = centred / centred.square().sum((1, 2, 3), keepdim=True).sqrt()
    x = torch.randn(2, 16, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    expected = F.conv2d(x.double(), kernel, padding=1)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("eps", [None, 1e-6])
def test_a_kernel_in_half_precision_is_rounded_once(eps: float | None) -> None:
    conv = ScaledStdConv2d(64, 32, 3, eps=eps)
    torch.nn.init.normal_(conv.weight, mean=1.0)
    half = copy.deepcopy(conv).bfloat16()
    exact = copy.deepcopy(half).float().kernel()
    assert half.kernel().dtype == torch.bfloat16
    assert torch.equal(half.kernel(), exact.bfloat16())


def test_input_scale_scales_the_input_but_not_the_bias() -> None:
    plain, scaled = ScaledStdConv2d(2, 3, 3), ScaledStdConv2d(2, 3, 3, input_scale=2.5)
    torch.nn.init.normal_(plain.bias)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(scaled(x), plain(2.5 * x))


def test_a_constant_kernel_has_a_finite_gradient() -> None:
    conv = ScaledStdConv2d(2, 3, 3)
    torch.nn.init.zeros_(conv.weight)
    conv(torch.randn(1, 2, 5, 5)).square().sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_initial_weights() -> None:
    conv = ScaledStdConv2d(64, 64, 3)
    assert conv.weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.05)
    assert torch.equal(conv.gain, torch.ones(64, 1, 1, 1))
    assert torch.equal(conv.bias, torch.zeros(64))
    plain = SameConv2d(64, 64, 3)
    assert plain.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert plain.bias is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gamma_keeps_a_unit_normal_at_unit_variance(name: str) -> None:
    function, gamma = ACTIVATIONS[name]
    # Gauss's quadrature rather than samples: exact but for the kinks.
    x, weight = np.polynomial.hermite_e.hermegauss(180)
    weight = weight / weight.sum()
    y = function(torch.from_numpy(x)).numpy() * gamma
    mean = (weight * y).sum()
    assert (weight * (y - mean) ** 2).sum() == pytest.approx(1, abs=5e-3)


def test_gelu_is_the_tanh_form() -> None:
    x = torch.linspace(-3, 3, 20)
    cubic = x + 0.044715 * x**3
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic))
    torch.testing.assert_close(ACTIVATIONS["gelu"][0](x), expected)
    assert not torch.allclose(ACTIVATIONS["gelu"][0](x), F.gelu(x), atol=1e-5)
