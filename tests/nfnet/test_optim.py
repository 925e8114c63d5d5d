"""The optimizer against torch.optim.SGD, its state, and the three parameter groups."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

import nfnet
from nfnet import optim


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def backward(net: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    net.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_clipping_it_is_torchs_sgd(nesterov: bool, weight_decay: float) -> None:
    net = make_net()
    twin = copy.deepcopy(net)
    ours = nfnet.SGD_AGC(
        net.parameters(), lr=0.1, nesterov=nesterov, weight_decay=weight_decay, clipping=None
    )
    theirs = torch.optim.SGD(
        twin.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay
    )
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (ours, theirs)]
    for step in range(5):
        for model, optimizer in ((net, ours), (twin, theirs)):
            backward(model, step)
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert ours.clipped_fraction == {}


def test_kernels_of_one_pixel_are_updated_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nfnet.create_model("dm_nf_resnet_small", num_classes=3, in_channels=1)
    model = model.to(memory_format=torch.channels_last)
    ways = []

    def noted(*arguments: object, fused: bool, **settings: object) -> None:
        ways.append(fused)

    monkeypatch.setattr(optim, "sgd", noted)
    optimizer = nfnet.SGD_AGC(nfnet.param_groups(model, 1e-4, 0.04), lr=0.1)
    model(torch.randn(2, 1, 28, 28).to(memory_format=torch.channels_last)).sum().backward()
    optimizer.step()
    assert ways and all(ways)


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_in_which_order_tensors_lie_in_memory_changes_nothing(device: str) -> None:
    torch.manual_seed(0)
    shape, last = (4, 3, 2, 2), torch.channels_last
    every_other = torch.randn(4, 6, 2, 2, device=device)[:, ::2]
    plain = torch.randn(shape, device=device)
    weights = [plain, plain.to(memory_format=last), every_other]
    for weight in weights:
        for layout in (torch.contiguous_format, last):
            p, q = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
            if weight is every_other:  # a clone is dense
                p.data = weight.repeat_interleave(2, 1)[:, ::2]
            ours = nfnet.SGD_AGC([p], lr=0.1, clipping=None, weight_decay=0.1)
            theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
            for step in range(3):
                grad = torch.randn(shape, device=device)
                grad = grad.to(memory_format=layout if step else last)
                p.grad, q.grad = grad.clone(), grad.clone()
                ours.step()
                theirs.step()
                assert torch.equal(p.grad, grad)  # clipping alone writes to it
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_how_a_group_is_cut_for_the_cache_changes_no_bit(
    nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = {}
    for size in (1, 200, 1 << 30):
        monkeypatch.setattr(optim, "_PART_BYTES", size)
        torch.manual_seed(0)
        net = make_net()
        optimizer = nfnet.SGD_AGC(net.parameters(), lr=0.1, nesterov=nesterov, weight_decay=0.1)
        optimizer.ratios = {}
        for step in range(3):
            backward(net, step)
            optimizer.step()
        shares = [optimizer.clipped_fraction[p] for p in net.parameters()]
        ratios = [optimizer.ratios[p] for p in net.parameters()]
        cuts[size] = [*net.parameters(), *shares, *ratios]
    for size in (1, 200):
        assert all(map(torch.equal, cuts[size], cuts[1 << 30]))


def test_clipped_fraction_counts_units_of_clipped_parameters_only() -> None:
    weight, classifier = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [weight]}, {"params": [classifier], "clipping": None}]
    optimizer = nfnet.SGD_AGC(groups, lr=0.1, clipping=0.1)
    weight.grad = torch.tensor([[1.0, 1.0], [0.01, 0.0], [0.0, 0.0], [9.0, 9.0]])
    classifier.grad = torch.full((2, 2), 9.0)
    optimizer.step()
    assert list(optimizer.clipped_fraction) == [weight]
    assert optimizer.clipped_fraction[weight].item() == 0.5
    assert torch.equal(classifier.grad, torch.full((2, 2), 9.0))


def test_clipped_fraction_is_the_same_mapping_at_every_step() -> None:
    """A compiled step gives a new one to nobody."""
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = nfnet.SGD_AGC([p], lr=0.1, clipping=0.01)
    found = optimizer.clipped_fraction
    for size in (1.0, 0.0):
        p.grad = torch.full_like(p, size)
        optimizer.step()
        assert found is optimizer.clipped_fraction
        assert float(found[p]) == size


@pytest.mark.slow
def test_a_compiled_step_updates_and_tells_as_a_plain_one() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = make_net()
        optimizer = nfnet.SGD_AGC(net.parameters(), lr=0.1, clipping=0.5, weight_decay=0.01)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for number in range(3):
            backward(net, number)
            step()
        shares = [optimizer.clipped_fraction[p] for p in net.parameters()]
        assert 0 < float(torch.stack(shares).mean()) < 1
        found.append([*net.parameters(), *shares])
    for plain, compiled_one in zip(*found, strict=True):
        assert torch.allclose(plain, compiled_one, rtol=1e-6)


def test_a_restored_optimizer_continues_where_the_first_one_stopped() -> None:
    net = make_net()
    first = nfnet.SGD_AGC(net.parameters(), lr=0.1, weight_decay=0.01)
    for step in range(3):
        backward(net, step)
        first.step()
    twin = copy.deepcopy(net)
    second = nfnet.SGD_AGC(twin.parameters(), lr=9.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.clipped_fraction == {}
    for step in range(3, 6):
        for model, optimizer in ((net, first), (twin, second)):
            backward(model, step)
            optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_closure_computes_the_gradients() -> None:
    net = make_net()
    optimizer = nfnet.SGD_AGC(net.parameters(), lr=0.01)
    losses = [optimizer.step(lambda: backward(net, 0).item()) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, expected 0 or more"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": 0.1, "momentum": 1.0}, r"momentum is 1.0, expected a number in \[0, 1\)"),
        ({"lr": 0.1, "weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"lr": 0.1, "clipping": 0.0}, "clipping is 0.0, expected a number above 0; pass None"),
        ({"lr": 0.1, "eps": -1.0}, "eps is -1.0"),
    ],
)
def test_refuses_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nfnet.SGD_AGC([torch.ones(1)], **settings)
    with pytest.raises(ValueError, match=message):
        nfnet.SGD_AGC([{"params": [torch.ones(1)], **settings}], lr=0.1)


@pytest.mark.parametrize("name", ["dm_nf_resnet_digits", "preact_resnet_digits"])
def test_the_three_groups(name: str) -> None:
    model = nfnet.create_model(name)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = nfnet.param_groups(model, weight_decay=1e-4, clipping=0.08)
    vectors, classifier, weights = ({names[id(p)] for p in g["params"]} for g in groups)
    assert [(g["weight_decay"], g["clipping"]) for g in groups] == [
        (0.0, 0.08),
        (1e-4, None),
        (1e-4, 0.08),
    ]
    assert classifier == {"head.fc.weight"}
    stages = [f"stages.{s}.0" for s in range(3)]
    convs = ["conv1", "conv2", "conv3", "downsample.conv"]
    assert weights == {"stem.conv.weight"} | {f"{s}.{c}.weight" for s in stages for c in convs}
    assert vectors == set(names.values()) - classifier - weights
    assert {"head.fc.bias"} < vectors


def test_no_clipping_is_no_clipping_in_every_group() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits")
    assert [g["clipping"] for g in nfnet.param_groups(model, 0.0, None)] == [None] * 3


def test_frozen_parameters_are_in_no_group() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits").requires_grad_(False)
    model.head.requires_grad_(True)
    groups = nfnet.param_groups(model, 1e-4, 0.01)
    assert [len(g["params"]) for g in groups] == [1, 1, 0]
    nfnet.SGD_AGC(groups, lr=0.1)


def test_layers_before_the_classifier_learn_more_slowly() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits")
    groups = nfnet.param_groups(model, 0.0, None, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g["lr_factor"] for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    assert {found[n] for n in found if n.startswith("head")} == {1.0}
    assert [found[f"stages.{s}.0.conv1.weight"] for s in (2, 1, 0)] == [0.5, 0.25, 0.125]
    assert found["stem.conv.weight"] == 0.0625
    assert len(nfnet.param_groups(model, 1e-4, 0.01)) == 3
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    nfnet.SGD_AGC(groups, lr=0.1, momentum=0.0, nesterov=False).step()
    for name, p in model.named_parameters():
        step = (before[name] - p.detach()).mean()
        assert float(step) == pytest.approx(0.1 * found[name], rel=1e-4)
    with pytest.raises(ValueError, match="layer_decay is 0"):
        nfnet.param_groups(model, 0.0, None, layer_decay=0)


def test_a_state_from_before_there_were_factors_loads() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits")
    optimizer = nfnet.SGD_AGC(nfnet.param_groups(model, 1e-4, 0.01), lr=0.1)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["lr_factor"]
    optimizer.load_state_dict(state)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_groups_of_a_model_from_elsewhere() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    groups = nfnet.param_groups(model, 1e-4, 0.01, layer_decay=0.9, classifier="fc")
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    assert (found["fc.weight"]["clipping"], found["fc.weight"]["lr_factor"]) == (None, 1.0)
    assert (found["fc.bias"]["clipping"], found["fc.bias"]["weight_decay"]) == (0.01, 0.0)
    assert found["layer4.1.conv1.weight"]["lr_factor"] == 0.9
    assert found["layer4.1.conv1.weight"]["clipping"] == 0.01
    assert found["bn1.weight"]["weight_decay"] == 0.0
    assert found["conv1.weight"]["lr_factor"] < found["layer1.0.conv1.weight"]["lr_factor"]
    nfnet.SGD_AGC(groups, lr=0.1)
    # Shortcuts are of their blocks: 8 of these, the first convolution and norm, and the classifier.
    assert len({g["lr_factor"] for g in groups}) == 11
    assert found["layer2.0.downsample.0.weight"] is found["layer2.0.conv1.weight"]
    with pytest.raises(ValueError, match="the parts of a ResNet are not known"):
        nfnet.param_groups(model, 1e-4, 0.01, unclipped=("stage1",), classifier="fc")


def test_what_is_unclipped_without_clipping_changes_no_group() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits")
    sizes = [
        [len(g["params"]) for g in nfnet.param_groups(model, 1e-4, None, unclipped)]
        for unclipped in (("head",), ("head", "stage1"), ())
    ]
    assert sizes[0] == sizes[1] == sizes[2]


def test_param_groups_needs_a_classifier() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no parameter head.fc.weight"):
        nfnet.param_groups(make_net(), 1e-4, 0.01)
