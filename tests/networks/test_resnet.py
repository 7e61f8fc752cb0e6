"""ResNets: counts, names, blocks against slow references."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow import spec
from gradflow.networks import Skip, build_network
from gradflow.networks.layers import ACTIVATIONS, NORMS
from gradflow.networks.resnet import IMAGENET_BLOCKS, SubsampleAndPad


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def images(size: int = 8, channels: int = 3, batch: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, generator=generator)


# --- parameter counts -----------------------------------------------------------------------------


def cifar_count(depth: int, w: int = 16, channels: int = 3, classes: int = 10) -> int:
    """Convolutions of 3×3 without biases, batch norms of two parameters a channel, readout."""
    n = (depth - 2) // 6
    convolutions = channels * w + 2 * n * w**2
    convolutions += w * 2 * w + (2 * n - 1) * (2 * w) ** 2
    convolutions += 2 * w * 4 * w + (2 * n - 1) * (4 * w) ** 2
    norms = w + 2 * n * (w + 2 * w + 4 * w)
    return 9 * convolutions + 2 * norms + (4 * w + 1) * classes


def test_known_counts_of_cifar_networks() -> None:
    for depth, expected in {20: 269_722, 56: 853_018, 110: 1_727_962}.items():
        assert cifar_count(depth) == expected
        for skip in (True, False):
            assert count(build_network("cifar", depth=depth, skip=skip)) == expected


@pytest.mark.parametrize(
    ("depth", "width", "channels", "classes"),
    [(8, 16, 3, 10), (14, 5, 1, 7), (152, 16, 1, 10), (1202, 4, 3, 10)],
)
def test_counts_of_cifar_networks(depth: int, width: int, channels: int, classes: int) -> None:
    expected = cifar_count(depth, width, channels, classes)
    sizes = {"in_channels": channels, "num_classes": classes}
    residual = build_network("cifar", depth=depth, width=width, **sizes)
    assert count(residual) == expected
    projected = build_network("cifar", depth=depth, width=width, shortcut="B", **sizes)
    extra = width * 2 * width + 2 * width * 4 * width + 2 * (2 * width + 4 * width)
    assert count(projected) == expected + extra


def imagenet_count(depth: int, classes: int = 1000) -> int:
    blocks = {
        18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
    }[depth]  # fmt: skip
    bottleneck = depth >= 50
    total, channels = 49 * 3 * 64 + 2 * 64, 64
    for stage, number in enumerate(blocks):
        inner = 64 * 2**stage
        outer = 4 * inner if bottleneck else inner
        for _ in range(number):
            if bottleneck:
                maps = channels * inner + 9 * inner**2 + inner * outer
                norms = 2 * inner + outer
            else:
                maps, norms = 9 * (channels * inner + inner**2), 2 * inner
            if channels != outer:
                maps, norms = maps + channels * outer, norms + outer
            total, channels = total + maps + 2 * norms, outer
    return total + (channels + 1) * classes


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_counts_of_imagenet_networks(depth: int, expected: int) -> None:
    network = build_network("imagenet", depth=depth, num_classes=1000)
    assert count(network) == imagenet_count(depth) == expected


@pytest.mark.parametrize("depth", spec.IMAGENET_DEPTHS)
def test_depth_counts_the_weight_layers_of_the_plain_network(depth: int) -> None:
    plain = build_network("imagenet", depth=depth, width=1, skip=False)
    layers = [m for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


# --- names ----------------------------------------------------------------------------------------


def torchvision_state(depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of torchvision.models.resnet{depth}().state_dict(), in its order."""
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 152: (3, 8, 36, 3)}[depth]

    def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{tensor}", (channels,)
        yield f"{name}.num_batches_tracked", ()

    yield "conv1.weight", (64, 3, 7, 7)
    yield from norm("bn1", 64)
    inplanes = 64
    for layer, (planes, number) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
        out = planes * (4 if depth >= 50 else 1)
        for block in range(number):
            name = f"layer{layer}.{block}"
            if depth >= 50:
                yield f"{name}.conv1.weight", (planes, inplanes, 1, 1)
                yield from norm(f"{name}.bn1", planes)
                yield f"{name}.conv2.weight", (planes, planes, 3, 3)
                yield from norm(f"{name}.bn2", planes)
                yield f"{name}.conv3.weight", (out, planes, 1, 1)
                yield from norm(f"{name}.bn3", out)
            else:
                yield f"{name}.conv1.weight", (planes, inplanes, 3, 3)
                yield from norm(f"{name}.bn1", planes)
                yield f"{name}.conv2.weight", (planes, planes, 3, 3)
                yield from norm(f"{name}.bn2", planes)
            if inplanes != out:
                yield f"{name}.downsample.0.weight", (out, inplanes, 1, 1)
                yield from norm(f"{name}.downsample.1", out)
            inplanes = out
    yield "fc.weight", (1000, inplanes)
    yield "fc.bias", (1000,)


@pytest.mark.parametrize("depth", [18, 50, 152])
def test_imagenet_state_is_that_of_torchvision(depth: int) -> None:
    network = build_network("imagenet", depth=depth, num_classes=1000)
    state = [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]
    assert state == list(torchvision_state(depth))


def test_strides_are_those_of_torchvision() -> None:
    """The stage's first block halves the map: on the 3×3 convolution of a bottleneck."""
    network = build_network("imagenet", depth=50, width=2)
    strided = {
        name: module.stride[0]
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1)
    }
    expected = {
        f"layer{stage}.0.{name}" for stage in (2, 3, 4) for name in ("conv2", "downsample.0")
    }
    assert strided == dict.fromkeys({"conv1", *expected}, 2)
    basic = build_network("imagenet", depth=18, width=2)
    assert basic.get_submodule("layer2.0.conv1").stride == (2, 2)
    assert basic.get_submodule("layer2.0.conv2").stride == (1, 1)


def test_names_stay_whatever_the_norm() -> None:
    expected = {name for name, _ in build_network("cifar", depth=8, shortcut="B").named_modules()}
    for norm in spec.NORMS:
        network = build_network("cifar", depth=8, shortcut="B", norm=norm)
        assert {name for name, _ in network.named_modules()} == expected
        biases = {name for name, _ in network.named_parameters() if name.endswith("conv1.bias")}
        assert bool(biases) == (norm == "none")


# --- blocks and whole networks against slow references --------------------------------------------


def batch_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    scaled = (x - mean) / (variance + 1e-5).sqrt()
    return scaled * weight[:, None, None] + bias[:, None, None]


def reference(network: nn.Module, x: Tensor, depth: int, order: str, shortcut: str) -> Tensor:
    """A CIFAR-style network with identity skips, in training mode, written out."""
    state, relu = network.state_dict(), torch.relu

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = conv(x, "conv1")
    x = relu(batch_norm(x, state, "bn1")) if order == "post" else x
    for stage, block in itertools.product((1, 2, 3), range((depth - 2) // 6)):
        at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
        carried = x
        if stride == 2 and shortcut == "A":
            carried = torch.cat([x[:, :, ::2, ::2], torch.zeros_like(x[:, :, ::2, ::2])], 1)
        elif stride == 2:
            carried = conv(x, f"{at}.downsample.0", 2)
            if order == "post":
                carried = batch_norm(carried, state, f"{at}.downsample.1")
        if order == "post":
            y = relu(batch_norm(conv(x, f"{at}.conv1", stride), state, f"{at}.bn1"))
            x = relu(carried + batch_norm(conv(y, f"{at}.conv2"), state, f"{at}.bn2"))
        else:
            y = conv(relu(batch_norm(x, state, f"{at}.bn1")), f"{at}.conv1", stride)
            x = carried + conv(relu(batch_norm(y, state, f"{at}.bn2")), f"{at}.conv2")
    x = relu(batch_norm(x, state, "bn_final")) if order == "pre" else x
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("order", "shortcut"), list(itertools.product(spec.ORDERS, spec.SHORTCUTS))
)
def test_network_is_the_written_out_one(order: str, shortcut: str) -> None:
    network = build_network("cifar", depth=14, order=order, shortcut=shortcut).double()
    x = images(9).double()
    expected = reference(network, x, 14, order, shortcut)
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


def test_bottleneck_is_the_written_out_one() -> None:
    network = build_network("imagenet", depth=50, width=2, num_classes=3)
    block, x = network.get_submodule("layer2.0"), images(8, channels=8)
    state = block.state_dict()
    y = torch.relu(batch_norm(F.conv2d(x, state["conv1.weight"]), state, "bn1"))
    y = F.conv2d(y, state["conv2.weight"], stride=2, padding=1)
    y = torch.relu(batch_norm(y, state, "bn2"))
    y = batch_norm(F.conv2d(y, state["conv3.weight"]), state, "bn3")
    carried = F.conv2d(x, state["downsample.0.weight"], stride=2)
    expected = torch.relu(y + batch_norm(carried, state, "downsample.1"))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_imagenet_stem_is_the_written_out_one() -> None:
    """7×7 of stride 2, norm, ReLU, max pooling: a quarter of the size before the first stage."""
    network, x, seen = build_network("imagenet", depth=18, width=8), images(33), []
    network.get_submodule("layer1").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(x)
    y = F.conv2d(x, network.get_parameter("conv1.weight"), stride=2, padding=3)
    y = torch.relu(batch_norm(y, network.state_dict(), "bn1"))
    expected = F.max_pool2d(y, 3, stride=2, padding=1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_option_a_subsamples_and_pads() -> None:
    x = images(5, channels=2)
    y = SubsampleAndPad(6, 2)(x)
    assert y.shape == (4, 6, 3, 3)
    for i, j in itertools.product(range(3), repeat=2):
        assert torch.equal(y[:, :2, i, j], x[:, :, 2 * i, 2 * j])
    assert torch.equal(y[:, 2:], torch.zeros(4, 4, 3, 3))


@pytest.mark.parametrize(
    ("family", "depth", "block", "channels"),
    [("cifar", 14, "layer1.1", 16), ("imagenet", 50, "layer1.1", 16)],
)
@pytest.mark.parametrize("norm", spec.NORMS)
def test_pre_activation_block_with_a_zero_branch_is_the_identity(
    family: str, depth: int, block: str, channels: int, norm: str
) -> None:
    width = 16 if family == "cifar" else 4
    groups = {"groups": 2} if norm == "group" else {}
    network = build_network(family, depth=depth, width=width, order="pre", norm=norm, **groups)
    member, x = network.get_submodule(block), images(8, channels=channels)
    assert not torch.equal(member(x), x)
    last = "conv3" if family == "imagenet" else "conv2"
    nn.init.zeros_(member.get_parameter(f"{last}.weight"))
    assert torch.equal(member(x), x)


def test_scaled_shortcuts_scale_the_gradient_by_a_power() -> None:
    """λ-scaled skips and no branches: λ^blocks (He et al. 2016, eq. 6), exactly for λ = 1/2."""
    network = build_network(
        "cifar", depth=56, width=2, order="pre", branch_scale=0.0,
        skip_forward=0.5, skip_backward=0.5,
    )  # fmt: skip
    stage = network.get_submodule("layer1")
    x = images(8, channels=2).requires_grad_()
    g = images(8, channels=2, seed=1)
    (gradient,) = torch.autograd.grad(stage(x), x, g)
    assert torch.equal(gradient, 0.5**9 * g)


# --- what networks take ---------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (8, 3), (9, 3), (32, 1)])
@pytest.mark.parametrize("order", spec.ORDERS)
@pytest.mark.parametrize(
    ("family", "depth", "width"), [("cifar", 8, 4), ("imagenet", 18, 4), ("imagenet", 50, 2)]
)
def test_sizes_from_eight_up(
    family: str, depth: int, width: int, order: str, size: int, channels: int
) -> None:
    network = build_network(
        family, depth=depth, width=width, order=order, in_channels=channels, num_classes=7
    )
    logits = network(images(size, channels))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("size", [8, 9])
def test_maps_halve_rounding_up(size: int) -> None:
    network, seen = build_network("cifar", depth=8, width=4), []
    for stage in (1, 2, 3):
        network.get_submodule(f"layer{stage}").register_forward_hook(
            lambda _, __, output: seen.append(tuple(output.shape[1:]))
        )
    network(images(size))
    half, quarter = -(-size // 2), -(-size // 4)
    assert seen == [(4, size, size), (8, half, half), (16, quarter, quarter)]


def test_circular_padding_commutes_with_shifts() -> None:
    x = images(8)
    for padding, commutes in {"circular": True, "zeros": False}.items():
        network = build_network("cifar", depth=8, norm="none", padding=padding)
        stage = nn.Sequential(network.get_submodule("conv1"), network.get_submodule("layer1"))
        shifted = stage(x.roll((2, 3), (2, 3)))
        unlike = (shifted - stage(x).roll((2, 3), (2, 3))).abs().max()
        assert (unlike < 1e-5) == commutes


# --- norms and activations ------------------------------------------------------------------------


def test_tables_have_the_names_of_the_spec() -> None:
    assert set(NORMS) == set(spec.NORMS)
    assert set(ACTIVATIONS) == set(spec.ACTIVATIONS)
    assert set(IMAGENET_BLOCKS) == set(spec.IMAGENET_DEPTHS)


def normalized(groups: Tensor, over: tuple[int, ...]) -> Tensor:
    mean = groups.mean(over, keepdim=True)
    variance = (groups - mean).square().mean(over, keepdim=True)
    return (groups - mean) / (variance + 1e-5).sqrt()


def uneven(*shape: int) -> Tensor:
    """Every sample and channel with a mean and a deviation of its own."""
    generator = torch.Generator().manual_seed(0)
    each = (*shape[:2], *[1] * (len(shape) - 2))
    shift, factor = torch.randn(2, *each, generator=generator)
    return shift + factor.exp() * torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    ("norm", "over"), [("batch", (0, 3, 4)), ("layer", (1, 2, 3, 4)), ("group", (2, 3, 4))]
)
def test_norms_of_maps(norm: str, over: tuple[int, ...]) -> None:
    """Over which dimensions of (N, groups, C/groups, H, W) each one normalises."""
    x = uneven(4, 8, 6, 6)
    expected = normalized(x.reshape(4, 4, 2, 6, 6), over).reshape(x.shape)
    torch.testing.assert_close(NORMS[norm][0](8, 4)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("norm", "over"), [("batch", (0,)), ("layer", (1, 2)), ("group", (2,))])
def test_norms_of_vectors(norm: str, over: tuple[int, ...]) -> None:
    x = uneven(16, 64)
    expected = normalized(x.reshape(16, 4, 16), over).reshape(x.shape)
    torch.testing.assert_close(NORMS[norm][1](64, 4)(x), expected, rtol=1e-4, atol=1e-5)


def test_no_norm_is_the_identity() -> None:
    x = images()
    assert NORMS["none"][0](3, None)(x) is x


@pytest.mark.parametrize(
    ("name", "slope", "expected"),
    [  # at −1 and 2
        ("relu", None, (0.0, 2.0)),
        ("leaky_relu", 0.2, (-0.2, 2.0)),
        ("tanh", None, (-0.7615942, 0.9640276)),
        ("sigmoid", None, (0.2689414, 0.8807971)),
        ("gelu", None, (-0.1586553, 1.9544997)),
        ("silu", None, (-0.2689414, 1.7615942)),
        ("linear", None, (-1.0, 2.0)),
        ("crelu", None, (0.0, 2.0, 1.0, 0.0)),
    ],
)
def test_activations(name: str, slope: float | None, expected: tuple[float, ...]) -> None:
    x = torch.tensor([-1.0, 2.0])
    torch.testing.assert_close(ACTIVATIONS[name](slope)(x), torch.tensor(expected))
    assert torch.equal(x, torch.tensor([-1.0, 2.0]))  # not in place


@pytest.mark.parametrize("name", spec.ACTIVATIONS)
def test_every_activation_is_used_by_the_networks(name: str) -> None:
    slope = {"negative_slope": 0.3} if name == "leaky_relu" else {}
    for family in ("mlp",) if name == "crelu" else ("cifar", "mlp"):
        network = build_network(
            family, depth=8, width=8, order="pre", activation=name, in_channels=3, **slope
        )
        member = network.get_submodule("layer1.0.activation" if family == "cifar" else "activation")
        kind = type(ACTIVATIONS[name](0.3))
        assert type(member) is kind
        assert getattr(member, "negative_slope", 0.3) == 0.3
        assert not any(getattr(module, "inplace", False) for module in network.modules())


@pytest.mark.parametrize("kind", [kind for kind in spec.SKIPS if kind != "dosed"])
@pytest.mark.parametrize("order", spec.ORDERS)
def test_every_block_has_its_skip(kind: str, order: str) -> None:
    network = build_network("cifar", depth=14, width=4, skip=kind, order=order)
    skips = {name: m.kind for name, m in network.named_modules() if isinstance(m, Skip)}
    assert skips == {f"layer{s}.{b}.skip": kind for s in (1, 2, 3) for b in (0, 1)}
    assert network(images()).isfinite().all()
