"""The moving average on numbers worked out by hand. The authors' are in test_golden.py."""

import pytest
import torch
from torch import nn

from nfnet import EMA


def test_early_steps_follow_faster_than_the_decay() -> None:
    net = nn.Linear(1, 1)
    nn.init.constant_(net.weight, 1.0)
    ema = EMA(net, decay=0.5)
    nn.init.constant_(net.weight, 2.0)
    ema.update(net, step=0)  # decay 1/10
    assert ema.model.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    nn.init.constant_(net.weight, 4.0)
    ema.update(net, step=1000)  # decay 0.5, not 1001/1010
    assert ema.model.weight.item() == pytest.approx(0.5 * 1.9 + 0.5 * 4)


def test_buffers_are_averaged_and_counters_copied() -> None:
    net = nn.BatchNorm1d(1)
    ema = EMA(net, decay=0.0)
    net(torch.tensor([[1.0], [3.0]]))
    ema.update(net, step=0)
    assert ema.model.running_mean.item() == pytest.approx(net.running_mean.item())
    assert ema.model.num_batches_tracked.item() == 1


def test_the_copy_is_for_evaluation_only() -> None:
    net = nn.Linear(1, 1)
    ema = EMA(net)
    assert not ema.model.training
    assert net.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_state_goes_round() -> None:
    net = nn.Linear(2, 2)
    ema, other = EMA(net), EMA(nn.Linear(2, 2))
    nn.init.zeros_(net.weight)
    ema.update(net, 5)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.model.weight, ema.model.weight)


def test_refuses_a_decay_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"decay is 1.0, expected a number in \[0, 1\)"):
        EMA(nn.Linear(1, 1), decay=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shadows_of_half_precision_move_by_less_than_its_last_bit(dtype: torch.dtype) -> None:
    net = nn.Linear(1, 1).to(dtype)
    nn.init.constant_(net.weight, 1.0)
    ema = EMA(net, decay=0.9999)
    nn.init.constant_(net.weight, 2.0)
    for step in range(10**6, 10**6 + 100):
        ema.update(net, step)
    assert ema.model.weight.item() == pytest.approx(2 - 0.9999**100, rel=1e-5)
    assert net.weight.dtype == dtype
