"""Models: sizes, shapes, randomness by key, signal propagation, errors."""

import math
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.models.nfnet import NfCfg, NormFreeNet
from torch import Tensor, nn

import nfnet

SMALL = {"depths": (1, 2), "widths": (16, 32), "stem_width": 8}
RANDOM = {"drop_rate": 0.4, "stochdepth_rate": 0.5}


def randomise_skip_gains(model: nn.Module) -> None:
    """Initial skip gains of 0 would hide every residual branch."""
    for name, p in model.named_parameters():
        if name.endswith("skipinit_gain"):
            nn.init.uniform_(p, 0.5, 1.5)


def count(parameters: list[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


# arXiv 2102.06171, table 1 and its + variants; arXiv 2101.08692, and its batch-normalised twins.
PAPERS = """
dm_nfnet_f0 dm_nfnet_f1 dm_nfnet_f2 dm_nfnet_f3 dm_nfnet_f4 dm_nfnet_f5 dm_nfnet_f6 dm_nfnet_f7
dm_nfnet_f0+ dm_nfnet_f1+ dm_nfnet_f2+ dm_nfnet_f3+
dm_nfnet_f4+ dm_nfnet_f5+ dm_nfnet_f6+ dm_nfnet_f7+
dm_nf_resnet50 dm_nf_resnet101 dm_nf_resnet152 dm_nf_resnet200
preact_resnet50 preact_resnet101 preact_resnet152 preact_resnet200
"""


def test_the_models_are_the_papers_and_timms_and_four_for_small_images() -> None:
    names = nfnet.list_models()
    assert names == sorted(names)
    timms = set(timm.list_models(module="nfnet")) - {"test_nfnet"}
    sizes = ("digits", "small")
    small = {f"{family}_{size}" for family in ("dm_nf_resnet", "preact_resnet") for size in sizes}
    assert set(names) == {*PAPERS.split(), *timms, *small}


@pytest.mark.slow
# arXiv 2102.06171, table 3: millions of parameters, and billions of multiply-adds at test size.
@pytest.mark.parametrize(
    ("size", "pixels", "parameters", "flops"),
    [
        (0, 256, 71.5, 12.38),
        (1, 320, 132.6, 35.54),
        (2, 352, 193.8, 62.59),
        (3, 416, 254.9, 114.76),
        (4, 512, 316.1, 215.24),
        (5, 544, 377.2, 289.76),
        (6, 576, 438.4, 377.28),
    ],
)
def test_sizes_are_the_papers(size: int, pixels: int, parameters: float, flops: float) -> None:
    with torch.device("meta"):
        model = nfnet.create_model(f"dm_nfnet_f{size}")
    assert count(list(model.parameters())) / 1e6 == pytest.approx(parameters, rel=0.005)
    assert nfnet.count_flops(model, pixels) / 1e9 == pytest.approx(flops, rel=0.005)


# The paper says 527 M and 367 G of F4+ at 512 px.
def test_the_wider_variants_have_the_published_size() -> None:
    with torch.device("meta"):
        model = nfnet.create_model("dm_nfnet_f4+")
    assert count(list(model.parameters())) / 1e6 == pytest.approx(526.9, abs=0.05)
    assert nfnet.count_flops(model, 512) / 1e9 == pytest.approx(365.2, abs=0.05)
    assert model.get_submodule("stages.0.0.conv1").out_channels == 256


def test_flops_of_a_network_counted_by_hand() -> None:
    model = nfnet.create_model(
        "preact_resnet50", depths=(1,), widths=(8,), stem="3x3", stem_width=4, num_classes=3
    )
    # Stem 3x3, 3 to 4; block of inner width 2: 1x1, 3x3, 1x1 and the shortcut; the classifier.
    per_pixel = 9 * 3 * 4 + 4 * 2 + 9 * 2 * 2 + 2 * 8 + 4 * 8
    assert nfnet.count_flops(model, (5, 7)) == 5 * 7 * per_pixel + 8 * 3


@pytest.mark.parametrize(
    ("size", "make", "blocks"),
    [
        ("50", torchvision.models.resnet50, 16),
        ("101", torchvision.models.resnet101, 33),
        ("152", torchvision.models.resnet152, 50),
        ("200", timm.models.resnet.resnet200, 66),
    ],
)
def test_parameter_counts_follow_from_usual_resnets(
    size: str, make: Callable[[], nn.Module], blocks: int
) -> None:
    with torch.device("meta"):
        theirs = make()
        nf, twin = (nfnet.create_model(f"{f}{size}") for f in ("dm_nf_resnet", "preact_resnet"))
    # The same convolutions; gain and bias stand for batch norm's two; one skip gain per block.
    assert count(list(nf.parameters())) == count(list(theirs.parameters())) + blocks
    kernels = [[p for p in m.parameters() if p.ndim == 4] for m in (theirs, twin)]
    assert count(kernels[0]) == count(kernels[1])
    assert not any(name.endswith("conv1.bias") for name, _ in twin.named_parameters())


def test_parameter_names_and_shapes_are_timms() -> None:
    """Of the authors' ResNet, which timm can build but has no name for; test_timm.py has others."""
    ours = nfnet.create_model("dm_nf_resnet50", depths=(1, 2), widths=(32, 64))
    theirs = NormFreeNet(
        NfCfg(
            depths=(1, 2),
            channels=(32, 64),
            stem_type="7x7_pool",
            stem_chs=64,
            bottle_ratio=0.25,
            skipinit=True,
            act_layer="relu",
        )
    )
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("family", ["dm_nf_resnet", "preact_resnet"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (50, 31), (8, 8)])
def test_any_image_size_works(family: str, height: int, width: int) -> None:
    model = nfnet.create_model(f"{family}50", num_classes=5, **SMALL).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, height, width))
        assert model(torch.randn(2, 3, height, width)).shape == (2, 5)
    # Stem, pool and second stage halve, each rounding up.
    assert features.shape == (2, 32, math.ceil(height / 8), math.ceil(width / 8))


@pytest.mark.parametrize("name", ["dm_nf_resnet_digits", "preact_resnet_digits"])
def test_digits_models(name: str) -> None:
    model = nfnet.create_model(name)
    assert model(torch.randn(4, 1, 8, 8)).shape == (4, 10)
    assert model.forward_features(torch.randn(4, 1, 8, 8)).shape == (4, 128, 2, 2)
    assert [p.shape[0] for n, p in model.named_parameters() if n.endswith("conv3.weight")] == [
        32,
        64,
        128,
    ]


@pytest.mark.parametrize("name", ["dm_nf_resnet_small", "preact_resnet_small"])
def test_models_for_28_pixels(name: str) -> None:
    model = nfnet.create_model(name)
    found = model.forward_intermediates(torch.randn(2, 1, 28, 28), intermediates_only=True)
    shapes = [tuple(features.shape[1:]) for features in found]
    assert shapes == [(16, 14, 14), (32, 7, 7), (64, 4, 4), (128, 2, 2)]
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    kernels = [p for n, p in model.named_parameters() if n.endswith("conv2.weight")]
    assert [p.shape[0] for p in kernels] == [16, 32, 32, 64, 64]
    assert nfnet.preprocessing(name).test_size == 28


def test_the_batch_normalised_twin_is_its_equations() -> None:
    model = nfnet.create_model("preact_resnet_digits", depths=(1, 2), widths=(32, 64))
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    model.eval()
    x = torch.randn(2, 1, 9, 9)
    h = torch.conv2d(x, model.stem.conv.weight, padding=1)
    for (s, b), stride in {(0, 0): 1, (1, 0): 2, (1, 1): 1}.items():
        block = model.stages[s][b]
        a = block.norm1(h).relu()
        shortcut = torch.conv2d(a, block.downsample.conv.weight, stride=stride) if b == 0 else h
        a = block.norm2(torch.conv2d(a, block.conv1.weight)).relu()
        a = torch.conv2d(a, block.conv2.weight, stride=stride, padding=1)
        h = shortcut + torch.conv2d(block.norm3(a).relu(), block.conv3.weight)
    expected = model.head.fc(model.norm(h).relu().mean((2, 3)))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_initial_head() -> None:
    fc = nfnet.create_model("dm_nf_resnet_digits", num_classes=500).head.fc
    assert fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(fc.bias, torch.zeros(500))


@pytest.mark.parametrize("name", ["dm_nf_resnet_digits", "preact_resnet_digits"])
def test_cutting_a_batch_with_its_keys_changes_nothing(name: str) -> None:
    model = nfnet.create_model(name, **RANDOM, depths=(2, 2, 2))
    randomise_skip_gains(model)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()  # its statistics belong to the batch; test_batch_norm.py covers them
    x, keys = torch.randn(8, 1, 8, 8), nfnet.hash_keys(0, 0, torch.arange(8))
    whole = model(x, keys)
    parts = torch.cat([model(x[:3], keys[:3]), model(x[3:], keys[3:])])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(whole, model(x, nfnet.hash_keys(0, 1, torch.arange(8))), atol=1e-4)
    model.eval()
    torch.testing.assert_close(model(x, keys), model(x))


def test_without_keys_the_default_generator_decides() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits", **RANDOM)
    randomise_skip_gains(model)
    x = torch.randn(8, 1, 8, 8)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)


def test_stochastic_depth_drops_whole_branches_at_a_rising_rate_and_never_rescales() -> None:
    model = nfnet.create_model(
        "dm_nf_resnet_digits", depths=(4,), widths=(16,), stochdepth_rate=0.8
    )
    randomise_skip_gains(model)
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    for block in model.stages[0]:
        block.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out)))
    n = 2000
    drops: list[Tensor] = []
    with torch.no_grad():
        model(torch.randn(n, 1, 2, 2), nfnet.hash_keys(torch.arange(n)))
        for b, (block, h, out) in enumerate(list(calls)):
            full = block(h)
            if b == 0:  # rate 0, and its shortcut is a convolution
                torch.testing.assert_close(out, full)
                continue
            dropped = (out == h).flatten(1).all(1)
            torch.testing.assert_close(out[~dropped], full[~dropped])
            rate = 0.8 * b / 4
            assert abs(dropped.double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
            drops.append(dropped.double())
    # Blocks drop independently of one another.
    correlations = torch.corrcoef(torch.stack(drops)) - torch.eye(3)
    assert correlations.abs().max() < 5 / math.sqrt(n)


def test_dropout_zeroes_single_channels_and_rescales_the_rest() -> None:
    head = nfnet.create_model(
        "dm_nf_resnet_digits", drop_rate=0.3, widths=(32, 64, 100), num_classes=100
    ).head
    nn.init.eye_(head.fc.weight)
    with torch.no_grad():
        kept = head(torch.ones(200, 100, 2, 2), nfnet.hash_keys(torch.arange(200)))
    assert torch.all((kept == 0) | ((kept - 1 / 0.7).abs() < 1e-5))
    share = (kept == 0).double()
    assert abs(share.mean() - 0.3) < 5 * math.sqrt(0.21 / 20_000)
    # Neither samples nor channels share their draws.
    assert share.mean(0).max() < 0.5
    assert share.mean(1).max() < 0.55


def test_dropout_and_stochastic_depth_share_no_random_numbers() -> None:
    model = nfnet.create_model(
        "dm_nfnet_f0", depths=(6,), widths=(16,), group_size=8, drop_rate=0.4, stochdepth_rate=0.6
    )
    randomise_skip_gains(model)
    dropped: list[Tensor] = []
    for block in model.stages[0][1:]:  # the first one is always kept
        block.register_forward_hook(
            lambda m, args, out: dropped.append((out == args[0]).flatten(1).all(1)[:, None])
        )
    model.head.fc.register_forward_pre_hook(lambda m, args: dropped.append(args[0] == 0))
    n = 4000
    with torch.no_grad():
        model(torch.randn(n, 3, 8, 8), nfnet.hash_keys(torch.arange(n)))
    blocks, channels = torch.cat(dropped[:-1], 1), dropped[-1]
    assert blocks.shape == (n, 5)
    assert channels.shape == (n, 32)  # by GELU none is 0 but those that were dropped
    assert abs(channels.double().mean() - 0.4) < 0.01
    # Of each block with each channel, five standard errors of independent ones.
    pairs = torch.corrcoef(torch.cat([blocks, channels], 1).double().T)[:5, 5:]
    assert pairs.abs().max() < 5 / math.sqrt(n)


def test_layer_groups() -> None:
    for name in ("dm_nf_resnet50", "preact_resnet50"):
        with torch.device("meta"):
            model = nfnet.create_model(name)
        groups = {n: nfnet.layer_group(n) for n, _ in model.named_parameters()}
        assert set(groups.values()) == {"stem", "stage1", "stage2", "stage3", "stage4", "head"}
        assert groups["stem.conv.weight"] == "stem"
        assert groups["stages.2.5.conv1.weight"] == "stage3"
        assert groups["head.fc.bias"] == "head"
    assert nfnet.layer_group("norm.weight") == "head"
    assert nfnet.layer_group("final_conv.gain") == "final_conv"
    with pytest.raises(ValueError, match=r"'module\.stem\.conv\.weight' is not in a stem"):
        nfnet.layer_group("module.stem.conv.weight")


@pytest.mark.parametrize("name", ["dm_nf_resnet_digits", "preact_resnet_digits"])
def test_models_can_be_pickled(name: str) -> None:
    model = nfnet.create_model(name).eval()
    twin = pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("name", ["dm_nf_resnet_digits", "preact_resnet_digits"])
def test_bfloat16_autocast_stays_close(name: str) -> None:
    model = nfnet.create_model(name)
    randomise_skip_gains(model)
    x = torch.randn(16, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.forward_features(x)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), model.forward_features(x), rtol=0.1, atol=0.15)


def test_a_new_classifier_keeps_the_features() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits").double().eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    before = model.forward_features(x)
    model.reset_classifier(3)
    assert torch.equal(model.forward_features(x), before)
    assert model(x).shape == (2, 3)
    assert (model.variant.num_classes, model.training, model.head.training) == (3, False, False)
    model.reset_classifier(0)
    assert torch.equal(model(x), before.mean((2, 3)))
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    with pytest.raises(ValueError, match="num_classes is -1"):
        model.reset_classifier(-1)


def test_features_on_the_way_have_the_sizes_that_are_told() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits").eval()
    x = torch.randn(1, 1, 24, 24)
    for told, found in zip(
        model.feature_info, model.forward_intermediates(x, intermediates_only=True), strict=True
    ):
        assert isinstance(found, torch.Tensor)
        assert found.shape == (1, told["num_chs"], *[24 // told["reduction"]] * 2)
    for indices in ([4], [-5], [], 0, 5):
        with pytest.raises(ValueError, match="expected places of 4 features"):
            model.forward_intermediates(x, indices)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_new_classifier_is_frozen_where_the_old_one_was(frozen: bool) -> None:
    model = nfnet.create_model("dm_nf_resnet_digits")
    model.head.fc.requires_grad_(not frozen)
    model.reset_classifier(3)
    assert [p.requires_grad for p in model.head.parameters()] == [not frozen] * 2


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits", **RANDOM, depths=(2, 2, 2))
    randomise_skip_gains(model)
    x, keys = torch.randn(8, 1, 8, 8), nfnet.hash_keys(0, 0, torch.arange(8))
    grads, inner = [], []
    hook = model.stages[1][0].conv1.register_forward_hook(lambda *_: inner.append(1))
    for checkpointing in (False, True):
        model.grad_checkpointing = checkpointing
        model.zero_grad()
        model(x, keys).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    hook.remove()
    assert len(inner) == 3  # once, then on the way there and on the way back
    assert len(grads[0]) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    twin = nfnet.create_model("preact_resnet_digits")
    twin.grad_checkpointing = True
    with pytest.raises(ValueError, match="batch norm would take its statistics twice"):
        twin(torch.randn(2, 1, 8, 8))


def test_gradient_checkpointing_leaves_a_frozen_stem_and_asked_for_gradients_alone() -> None:
    # The blocks' input then needs no gradient, but their weights do.
    model = nfnet.create_model("dm_nf_resnet_digits", **RANDOM, depths=(2, 2, 2))
    randomise_skip_gains(model)
    model.stem.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x, keys = torch.randn(8, 1, 8, 8), nfnet.hash_keys(0, 0, torch.arange(8))
    expected = torch.autograd.grad(model(x, keys).square().sum(), list(trained.values()))
    assert all(grad.norm() > 0 for grad in expected)
    model.grad_checkpointing = True
    model(x, keys).square().sum().backward()
    for (name, p), grad in zip(trained.items(), expected, strict=True):
        assert p.grad is not None, name
        assert torch.equal(p.grad, grad), name
    # As sensitivity analyses and gradient penalties ask for them.
    asked = torch.autograd.grad(model(x, keys).square().sum(), list(trained.values()))
    assert all(torch.equal(a, b) for a, b in zip(asked, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dm_nf_resnet51", {}, "no model 'dm_nf_resnet51'; did you mean dm_nf_resnet5?0?"),
        ("vgg", {}, "no model 'vgg'; did you mean dm_nf"),
        ("dm_nf_resnet50", {"width": (1,)}, "no setting 'width'; did you mean widths"),
        ("dm_nf_resnet50", {"alpha": 1.0}, "no setting 'alpha'"),
        ("dm_nf_resnet50", {"depths": (1, 1)}, r"depths \(1, 1\) and widths .* differ in length"),
        ("dm_nf_resnet50", {"depths": (), "widths": ()}, "expected one of each per stage"),
        ("dm_nf_resnet50", {"depths": (1, 0, 1, 1)}, "a depth is 0, expected a whole number"),
        ("dm_nf_resnet50", {"widths": (8, 8, 8, 6)}, "width 6 times the bottleneck ratio 0.25"),
        ("dm_nf_resnet50", {"stem": "5x5"}, "stem is '5x5', expected one of 7x7_pool, deep"),
        ("dm_nfnet_f0", {"group_size": 0}, "group_size is 0, expected a whole number"),
        ("dm_nfnet_f0", {"widths": (32, 64, 96, 96)}, "leaves 16 channels inside a block, fewer"),
        ("dm_nfnet_f0", {"reference": "jax"}, "reference is 'jax', expected one of authors, timm"),
        ("nfnet_f0", {"reference": "authors"}, "nfnet_f0 is timm's own model"),
        ("nfnet_f9", {}, "no model 'nfnet_f9'; did you mean nfnet_f"),
        ("dm_nf_resnet50", {"stem_width": 0}, "stem_width is 0, expected a whole number"),
        ("dm_nf_resnet50", {"num_classes": -1}, "num_classes is -1"),
        ("dm_nf_resnet50", {"drop_rate": 1.0}, r"drop_rate is 1.0, expected a number in \[0, 1\)"),
        ("dm_nf_resnet50", {"stochdepth_rate": -0.1}, "stochdepth_rate is -0.1"),
    ],
)
def test_refuses_what_it_does_not_know(
    name: str, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nfnet.create_model(name, **overrides)


def test_refuses_images_and_keys_of_another_shape() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits")
    with pytest.raises(ValueError, match=r"images have 3 x 8 pixels, fewer than .* stride of 4"):
        model(torch.zeros(2, 1, 3, 8))
    with pytest.raises(ValueError, match=r"shape \(2, 8, 8, 1\), expected \(N, 1, H, W\)"):
        model(torch.zeros(2, 8, 8, 1))
    with pytest.raises(
        ValueError, match=r"keys are torch.int64 of shape \(3,\), expected .*\(2,\)"
    ):
        model(torch.zeros(2, 1, 8, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"keys are torch.float32"):
        model(torch.zeros(2, 1, 8, 8), torch.zeros(2))
