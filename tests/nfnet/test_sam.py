"""Sharpness-aware minimisation against its equations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nfnet


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def test_a_step_is_its_equations() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    by_hand = copy.deepcopy(model)
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 3
    sam = nfnet.SAM(torch.optim.SGD(model.parameters(), lr=0.3), rho=0.1)
    loss(model, x[:4], y[:4]).backward()
    sam.ascend()
    assert all(p.grad is None for p in model.parameters())
    loss(model, x, y).backward()
    sam.step()

    weights = list(by_hand.parameters())
    g = torch.autograd.grad(loss(by_hand, x[:4], y[:4]), weights)
    norm = torch.cat([part.flatten() for part in g]).norm()
    origin = [w.clone() for w in weights]
    with torch.no_grad():
        for w, part in zip(weights, g, strict=True):
            w += 0.1 * part / norm
    g = torch.autograd.grad(loss(by_hand, x, y), weights)
    for actual, w, part in zip(model.parameters(), origin, g, strict=True):
        torch.testing.assert_close(actual, w - 0.3 * part)


def test_weights_return_to_the_bit_and_gradients_may_come_in_pieces() -> None:
    model = nn.Linear(50, 3)
    x, y = torch.randn(8, 50), torch.arange(8) % 3
    sam = nfnet.SAM(nfnet.SGD_AGC(model.parameters(), lr=0.0), rho=0.7)
    before = copy.deepcopy(model)
    displaced = []
    for pieces in (1, 4):
        for part in torch.arange(8).chunk(pieces):
            (loss(model, x[part], y[part]) / pieces).backward()
        sam.ascend()
        displaced.append([p.detach().clone() for p in model.parameters()])
        sam.step()
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(p, q)
    moved = torch.cat(
        [(p - q).flatten() for p, q in zip(displaced[0], before.parameters(), strict=True)]
    )
    assert moved.norm().item() == pytest.approx(0.7, rel=1e-4)
    for p, q in zip(*displaced, strict=True):
        torch.testing.assert_close(p, q)


def test_refuses_what_cannot_be() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"rho is 0\.0, expected a number above 0"):
        nfnet.SAM(optimizer, rho=0.0)
    sam = nfnet.SAM(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    sam.ascend()
    with pytest.raises(RuntimeError, match="ascend was called twice"):
        sam.ascend()


def test_gradients_in_float16_whose_squares_overflow_move_the_weights_by_rho() -> None:
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    sam = nfnet.SAM(torch.optim.SGD([p], lr=0.1), rho=0.05)
    p.grad = torch.full_like(p, 60.0 * 256)
    sam.ascend()
    assert p.float().norm().item() == pytest.approx(0.05, rel=1e-3)
