"""Initial values: distributions, orthogonality, and what they depend on."""

import math

import pytest
import torch
from torch import Tensor, nn

from gradflow import spec
from gradflow.errors import SpecError
from gradflow.networks import Skip, build, build_network
from gradflow.networks.initialization import INITIALIZATIONS, initialize
from gradflow.seeding import derived_seed
from gradflow.spec import RunSpec

FAN_IN = {"conv": 24 * 9, "linear": 200}
FAN_OUT = {"conv": 40 * 9, "linear": 300}


class Pair(nn.Module):
    """A convolution and a linear layer that are not square: fan_in and fan_out differ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 40, 3)
        self.linear = nn.Linear(200, 300)


def made(init: str, activation: str = "relu", **options: float) -> Pair:
    pair = Pair()
    initialize(pair, init, seed=0, activation=activation, **options)  # type: ignore[arg-type]
    return pair


def test_names_are_those_of_the_spec() -> None:
    assert set(INITIALIZATIONS) == set(spec.INITIALIZATIONS)


def assert_moments(numbers: Tensor, variance: float, *, uniform: bool = False) -> None:
    """Mean 0 and the variance, each within four standard errors; and the kurtosis of its kind.

    Standard errors for n independent numbers of kurtosis κ: σ/√n, σ²·√((κ − 1)/n); and √(24/n) for
    a normal's kurtosis of 3 (a uniform's is 1.8).
    """
    x, n = numbers.detach().double().flatten(), numbers.numel()
    kurtosis = 1.8 if uniform else 3.0
    assert abs(x.mean()) < 4 * math.sqrt(variance / n)
    square = x.square().mean()
    assert abs(square / variance - 1) < 4 * math.sqrt((kurtosis - 1) / n)
    assert abs(x.pow(4).mean() / square**2 - kurtosis) < 4 * math.sqrt(24 / n)


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_variances(layer: str) -> None:
    fan_in, fan_out = FAN_IN[layer], FAN_OUT[layer]
    expected = {
        ("he", "relu", None): 2 / fan_in,
        ("he", "tanh", None): 2 / fan_in,
        ("he", "leaky_relu", 0.5): 2 / (1.25 * fan_in),
        ("xavier", "relu", None): 2 / (fan_in + fan_out),
        ("lecun", "relu", None): 1 / fan_in,
    }
    for (init, activation, slope), variance in expected.items():
        options = {} if slope is None else {"negative_slope": slope}
        module = made(init, activation, **options).get_submodule(layer)
        assert_moments(module.weight, variance)
        assert torch.equal(module.bias, torch.zeros_like(module.bias))


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_gaussian_has_its_two_deviations(layer: str) -> None:
    module = made("gaussian", sigma_w=1.3, sigma_b=0.2).get_submodule(layer)
    assert_moments(module.weight, 1.3**2 / FAN_IN[layer])
    wide = nn.Linear(3, 20_000)
    initialize(wide, "gaussian", seed=0, activation="tanh", sigma_w=1.0, sigma_b=0.2)
    assert_moments(wide.bias, 0.04)


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_pytorch_is_the_default_of_its_layers(layer: str) -> None:
    """U(±1/√fan_in): variance 1/(3·fan_in), biases too."""
    bound = FAN_IN[layer] ** -0.5
    module, default = made("pytorch").get_submodule(layer), Pair().get_submodule(layer)
    assert_moments(module.weight, bound**2 / 3, uniform=True)
    for name in ("weight", "bias"):
        ours, theirs = getattr(module, name), getattr(default, name)
        assert 0.85 * bound < ours.abs().max() <= bound
        assert 0.85 * bound < theirs.abs().max() <= bound * (1 + 1e-6)


GAINS = {("relu", None): 2**0.5, ("leaky_relu", 0.5): 1.6**0.5, ("tanh", None): 1.0,
         ("linear", None): 1.0}  # fmt: skip


@pytest.mark.parametrize("init", ["orthogonal", "delta_orthogonal"])
@pytest.mark.parametrize(("activation", "slope"), list(GAINS))
def test_orthogonal_maps(init: str, activation: str, slope: float | None) -> None:
    """All singular values are the gain; the shorter side is orthogonal."""
    options = {} if slope is None else {"negative_slope": slope}
    pair = made(init, activation, **options)
    square = GAINS[activation, slope] ** 2
    wide = pair.conv.weight.detach()
    if init == "delta_orthogonal":
        outside = wide.clone()
        outside[:, :, 1, 1] = 0
        assert torch.equal(outside, torch.zeros_like(outside))
        tall = wide[:, :, 1, 1]
        gram, size = tall.T @ tall, 24
    else:
        flat = wide.flatten(1)
        gram, size = flat @ flat.T, 40
    torch.testing.assert_close(gram, square * torch.eye(size), atol=1e-5, rtol=0)
    linear = pair.linear.weight.detach()
    torch.testing.assert_close(linear.T @ linear, square * torch.eye(200), atol=1e-5, rtol=0)


def test_orthogonal_matrices_are_not_all_alike() -> None:
    first, second = nn.Linear(30, 30), nn.Linear(30, 30)
    initialize(first, "orthogonal", seed=0, activation="linear")
    initialize(second, "orthogonal", seed=1, activation="linear")
    assert (first.weight - second.weight).norm() > 1
    assert_moments(torch.cat([first.weight, second.weight]), 1 / 30)


def test_deep_delta_orthogonal_convolutions_keep_norms() -> None:
    """Forward and backward through 24 linear convolutions of a stage, with circular padding."""
    network = build_network(
        "cifar", depth=74, skip=False, norm="none", activation="linear", padding="circular",
        init="delta_orthogonal",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 8, 8, generator=generator).requires_grad_()
    y = network.get_submodule("layer1")(x)
    g = torch.randn(2, 16, 8, 8, generator=generator)
    (gradient,) = torch.autograd.grad(y, x, g)
    assert abs(y.norm() / x.norm() - 1) < 1e-5
    assert abs(gradient.norm() / g.norm() - 1) < 1e-5


# --- what the numbers depend on -------------------------------------------------------------------


def test_seed_and_name_decide() -> None:
    shallow = dict(build_network("cifar", depth=8, seed=4).named_parameters())
    deep = dict(
        build_network("cifar", depth=20, order="pre", norm="none", seed=4).named_parameters()
    )
    other = dict(build_network("cifar", depth=8, seed=5).named_parameters())
    convolutions = [name for name in shallow if "conv" in name]
    assert len(convolutions) == 7
    for name in [*convolutions, "fc.weight"]:
        assert torch.equal(shallow[name], deep[name])
        assert not torch.equal(shallow[name], other[name])
    assert not torch.equal(shallow["layer1.0.conv1.weight"], shallow["layer1.0.conv2.weight"])


@pytest.mark.parametrize("init", spec.INITIALIZATIONS)
def test_everything_is_set_anew(init: str) -> None:
    """Whatever was there before: parameters and running statistics of each kind of module."""
    sigmas = {"sigma_w": 1.0, "sigma_b": 0.1} if init == "gaussian" else {}
    if init == "looks_linear":
        family, options = "mlp", {"order": "pre", "activation": "crelu"}
    else:
        family, options = "cifar", {"activation": "relu"}
    for skip in ("highway", "rezero"):
        chosen = {"depth": 8, "width": 4, "skip": skip, "init": init, **options, **sigmas}
        fresh, spoilt = build_network(family, **chosen), build_network(family, **chosen)
        for tensor in spoilt.state_dict().values():
            tensor.fill_(7)
        initialize(spoilt, init, seed=0, activation=options["activation"], **sigmas)
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(tensor, spoilt.state_dict()[name]), name


@pytest.mark.parametrize("init", ["gaussian", "pytorch"])
def test_norms_and_skips_keep_their_own_start(init: str) -> None:
    sigmas = {"sigma_w": 1.0, "sigma_b": 0.1} if init == "gaussian" else {}
    for skip in ("highway", "rezero"):
        network = build_network("cifar", depth=8, skip=skip, init=init, **sigmas)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert torch.equal(module.weight, torch.ones_like(module.weight))
                assert torch.equal(module.bias, torch.zeros_like(module.bias))
            elif isinstance(module, Skip) and skip == "rezero":
                assert torch.equal(module.beta, torch.zeros(1))
            elif isinstance(module, Skip):
                assert torch.equal(module.gate.bias, torch.full_like(module.gate.bias, -2.0))
                assert module.gate.weight.std() > 0.01


@pytest.mark.parametrize("init", ["orthogonal", "delta_orthogonal"])
def test_orthogonal_maps_are_so_to_the_precision_of_their_type(init: str) -> None:
    """From the same float32 numbers; those of float32 are what torch makes of them."""
    narrow, wide = Pair(), Pair().double()
    for pair in (narrow, wide):
        initialize(pair, init, seed=0, activation="linear")
    for name in ("conv.weight", "linear.weight"):
        torch.testing.assert_close(
            narrow.get_parameter(name).double(), wide.get_parameter(name), atol=1e-5, rtol=0
        )
    gram = wide.linear.weight.T @ wide.linear.weight
    torch.testing.assert_close(gram, torch.eye(200).double(), atol=1e-13, rtol=0)
    generator = torch.Generator().manual_seed(derived_seed(0, "linear.weight"))
    theirs = nn.init.orthogonal_(torch.empty(300, 200), generator=generator)
    assert torch.equal(narrow.linear.weight, theirs)


def test_fp64_specs_make_float64_networks() -> None:
    """Of the same numbers."""
    keys = {"network": "mlp", "depth": 4, "width": 8}
    narrow, wide = (
        build(RunSpec(**keys, precision=precision), in_channels=3, num_classes=2)
        for precision in ("fp32", "fp64")
    )
    for name, values in narrow.named_parameters():
        assert wide.get_parameter(name).dtype == torch.float64
        assert torch.equal(values.double(), wide.get_parameter(name))


def test_one_layer_may_have_another_init() -> None:
    pair, alike = Pair(), Pair()
    initialize(pair, "he", seed=0, activation="relu", others={"linear": "lecun"})
    initialize(alike, "he", seed=0, activation="relu")
    assert torch.equal(pair.conv.weight, alike.conv.weight)
    torch.testing.assert_close(pair.linear.weight * 2**0.5, alike.linear.weight)


def test_memory_format_and_type_change_nothing() -> None:
    plain, strided, wide = Pair(), Pair().to(memory_format=torch.channels_last), Pair().double()
    for pair in (plain, strided, wide):
        initialize(pair, "he", seed=0, activation="relu")
    assert not strided.conv.weight.is_contiguous()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, strided.get_parameter(name))
        assert torch.equal(parameter.double(), wide.get_parameter(name))


def test_global_generator_and_default_device_do_not_matter() -> None:
    state = torch.get_rng_state()
    usual = build_network("cifar", depth=8, skip="highway")
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        other = build_network("cifar", depth=8, skip="highway")
    for name, tensor in usual.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_bad_values() -> None:
    with pytest.raises(SpecError, match="init=hee: allowed is he, xavier"):
        made("hee")
    with pytest.raises(SpecError, match="init=gaussian: set sigma_w and sigma_b"):
        made("gaussian", sigma_w=1.0)
    with pytest.raises(SpecError, match="init=looks_linear: only activation=crelu uses it"):
        made("looks_linear")
    with pytest.raises(SpecError, match="init=hee: allowed is he, xavier"):
        initialize(Pair(), "he", seed=0, activation="relu", others={"conv": "hee"})
