"""Chains against the written-out formulas and the closed forms they are made for."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow import Recorder
from gradflow.errors import SpecError
from gradflow.networks import Skip, build, chain, conv_chain
from gradflow.spec import RunSpec


def vectors(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def squared_ratios(network: nn.Module, x: Tensor) -> tuple[float, float]:
    """‖f(x)‖²/‖x‖², and the same of a random gradient on its way back."""
    x = x.requires_grad_()
    y = network(x)
    g = vectors(*y.shape, seed=9).to(y.dtype)
    (back,) = torch.autograd.grad(y, x, g)
    forward = (y.norm() / x.norm()).square().item()
    return forward, (back.norm() / g.norm()).square().item()


def written_out(network: nn.Module, branch: str, x: Tensor, skip: bool, scale: float) -> Tensor:
    """tanh, and layer normalisation for the word norm."""
    h = x.flatten(1)
    state = network.state_dict()
    for k in range(3):
        f, linear = h, 0
        for word in branch.split():
            if word == "linear":
                linear += 1
                name = f"blocks.{k}.branch.linear{linear}"
                f = f @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)
            elif word == "act":
                f = torch.tanh(f)
            else:
                f = F.layer_norm(f, f.shape[1:])
        h = h + scale * f if skip else f
    return h


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    "branch", ["linear", "linear act", "act linear", "linear act linear", "norm act linear",
               "linear act linear norm", "norm act linear norm act linear"]
)  # fmt: skip
def test_chain_is_the_written_out_one(branch: str, skip: bool) -> None:
    norm = "layer" if "norm" in branch else "none"
    scale = 0.5 if skip else 1.0
    network = chain(3, 12, branch=branch, skip=skip, branch_scale=scale, activation="tanh",
                    norm=norm, init="pytorch", seed=0, dtype="float64")  # fmt: skip
    x = vectors(5, 3, 2, 2)
    torch.testing.assert_close(network(x), written_out(network, branch, x, skip, scale))


def test_batch_normalisation_last_in_the_branch() -> None:
    """Every branch adds mean 0 and variance 1 (De & Smith 2020): exactly, by its last norm."""
    network = chain(4, 16, branch="linear act linear norm", skip=True, norm="batch", seed=0)
    seen: list[Tensor] = []
    for block in network.blocks:
        block.branch.register_forward_hook(lambda module, args, output: seen.append(output))
    network(vectors(64, 16).float())
    for branch in seen:
        torch.testing.assert_close(branch.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
        torch.testing.assert_close(branch.var(0, correction=0), torch.ones(16), atol=1e-3, rtol=0)
    assert len(seen) == 4


def test_names_and_biases() -> None:
    bare = chain(2, 5, branch="linear act linear", seed=0)
    assert [name for name, _ in bare.named_parameters()] == [
        f"blocks.{k}.branch.linear{i}.{tensor}"
        for k in (0, 1)
        for i in (1, 2)
        for tensor in ("weight", "bias")
    ]
    normed = chain(1, 5, branch="norm act linear", norm="batch", seed=0)
    assert [name for name, _ in normed.named_parameters()] == [
        "blocks.0.branch.norm1.weight", "blocks.0.branch.norm1.bias",
        "blocks.0.branch.linear1.weight",
    ]  # fmt: skip
    convolutions = conv_chain(1, 3, seed=0)
    shapes = {name: tuple(p.shape) for name, p in convolutions.named_parameters()}
    assert shapes == {
        "blocks.0.branch.conv1.weight": (3, 3, 3, 3), "blocks.0.branch.conv1.bias": (3,)
    }  # fmt: skip


# --- initial values -------------------------------------------------------------------------------


def test_each_linear_map_of_a_branch_has_its_init() -> None:
    """One seed: He's numbers are LeCun's times √2."""
    names = [f"blocks.{k}.branch.linear{i}.weight" for k in range(3) for i in (1, 2)]
    both = chain(3, 8, branch="linear act linear", init=["he", "lecun"], seed=4)
    he = chain(3, 8, branch="linear act linear", init="he", seed=4)
    for name in names:
        factor = 1 if "linear1" in name else 2**0.5
        wanted = he.get_parameter(name)
        torch.testing.assert_close(both.get_parameter(name) * factor, wanted, rtol=1e-6, atol=0)


def test_gaussian_draws_biases_and_may_stand_for_one_map_alone() -> None:
    network = chain(1, 400, init="gaussian", sigma_w=1.5, sigma_b=0.2, seed=0)
    weight, bias = network.parameters()
    assert weight.var().item() * 400 == pytest.approx(1.5**2, rel=0.02)
    assert bias.std().item() == pytest.approx(0.2, rel=0.15)
    zero = chain(2, 6, branch="linear act linear", skip=True, init=["he", "gaussian"],
                 sigma_w=0, sigma_b=0, seed=0, dtype="float64")  # fmt: skip
    x = vectors(4, 6)
    assert torch.equal(zero(x), x)
    assert zero.get_parameter("blocks.1.branch.linear1.weight").norm() > 1


def test_zero_branches_leave_one_gradient_in_all_blocks() -> None:
    """Bit for bit (Fixup, arXiv 1901.09321); with shortcuts scaled by ½, 2⁻ᵏ of it."""
    for dose, factor in ((None, 1.0), (0.5, 0.5)):
        network = chain(20, 6, branch="linear act linear", skip=True, skip_forward=dose,
                        skip_backward=dose, init=["he", "gaussian"], sigma_w=0.0, sigma_b=0.0,
                        seed=0)  # fmt: skip
        x = vectors(4, 6).float().requires_grad_()
        inputs = [x]
        for block in network.blocks:
            inputs.append(block(inputs[-1]))
        g = vectors(4, 6, seed=1).float()
        gradients = torch.autograd.grad(inputs[-1], inputs, g)
        for k, gradient in enumerate(gradients):
            assert torch.equal(gradient, g * factor ** (20 - k))


def test_seed_decides_or_the_global_generator() -> None:
    state = torch.get_rng_state()
    first, again = chain(2, 6, seed=3), chain(2, 6, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, values in first.named_parameters():
        assert torch.equal(values, again.get_parameter(name))
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(conv_chain(1, 2).get_parameter("blocks.0.branch.conv1.weight"))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    one = chain(2, 6, seed=3).get_parameter("blocks.1.branch.linear1.weight")
    deeper = chain(9, 6, skip="highway", seed=3).get_parameter("blocks.1.branch.linear1.weight")
    assert torch.equal(one, deeper)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("chains.chain", {"depth": 3, "width": 6, "branch": "linear act linear",
                          "init": ["he", "lecun"], "skip": "dosed", "skip_forward": 0.5,
                          "skip_backward": 1.0, "branch_scale": 0.1}),
        ("chains.conv_chain", {"depth": 3, "channels": 2, "activation": "tanh"}),
        ("transformer.transformer", {"depth": 1, "width": 8, "order": "post"}),
    ],
)  # fmt: skip
def test_specs_name_them_by_import_path(target: str, args: dict[str, object]) -> None:
    def made(seed: int) -> nn.Module:
        network = {"target": f"gradflow.networks.{target}", "args": args}
        spec = RunSpec(network=network, seed=seed)  # type: ignore[arg-type]
        assert json.loads(json.dumps(spec.to_dict()["network"]["args"])) == args
        return build(spec, in_channels=1, num_classes=2)

    first, again, other = made(0), made(0), made(1)
    for name, values in first.named_parameters():
        assert torch.equal(values, again.get_parameter(name))
    weights = [name for name, values in first.named_parameters() if values.std() > 0]
    assert len(weights) >= 3
    for name in weights:
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


# --- what theory says -----------------------------------------------------------------------------


def test_convolutions_keep_norms_over_200_layers() -> None:
    for options in ({}, {"kernel": 5}):
        network = conv_chain(200, 8, seed=0, dtype="float64", **options)  # type: ignore[arg-type]
        for ratio in squared_ratios(network, vectors(2, 8, 8, 8)):
            assert ratio == pytest.approx(1, abs=1e-12)
    for ratio in squared_ratios(conv_chain(200, 8, seed=0), vectors(2, 8, 8, 8).float()):
        assert ratio == pytest.approx(1, abs=1e-4)


def test_circular_convolutions_commute_with_shifts_and_zero_padding_does_not() -> None:
    x = vectors(2, 4, 6, 6)
    for padding, commutes in (("circular", True), ("zeros", False)):
        network = conv_chain(3, 4, init="he", activation="relu", padding=padding, seed=0,
                             dtype="float64")  # fmt: skip
        shifted = network(x.roll((1, 2), (2, 3))).roll((-1, -2), (2, 3))
        assert torch.allclose(shifted, network(x), atol=1e-12) == commutes


def test_orthogonal_linear_chain_is_an_isometry() -> None:
    network = chain(100, 16, branch="linear", activation="linear", init="orthogonal", seed=0,
                    dtype="float64")  # fmt: skip
    jacobian = network(torch.eye(16, dtype=torch.float64))
    values = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-13, rtol=0)


def test_residual_blocks_of_two_layers_grow_by_one_plus_alpha_squared() -> None:
    """Taki 2017: (1 + α²)^L both ways, here with α = 1/√L; E over the weights, ±10 % at 512."""
    network = chain(16, 512, branch="linear act linear", skip=True, branch_scale=0.25,
                    init=["he", "lecun"], seed=0)  # fmt: skip
    for ratio in squared_ratios(network, vectors(32, 512).float()):
        assert ratio == pytest.approx((1 + 1 / 16) ** 16, rel=0.1)


def test_constant_highway_gate() -> None:
    """T = σ(−4) everywhere; squared growth near T² + (1 − T)² a block (Srivastava et al. 2015)."""
    gate = 1 / (1 + math.exp(4))
    network = chain(30, 512, skip="highway", gate_bias=-4, seed=0, dtype="float64")
    x = vectors(8, 512)
    block = network.blocks[7]
    torch.testing.assert_close(block(x), gate * block.branch(x) + (1 - gate) * x)
    _, backward = squared_ratios(network, x)
    assert backward ** (1 / 30) == pytest.approx(gate**2 + (1 - gate) ** 2, rel=0.002)
    usual = chain(1, 512, skip="highway", seed=0).get_parameter("blocks.0.skip.gate.bias")
    assert torch.equal(usual, torch.full((512,), -2.0))


def test_mirrored_branches_make_a_linear_residual_chain() -> None:
    """x + α·[Ω, −Ω]·crelu(x) = (1 + αΩ)x."""
    network = chain(5, 8, branch="act linear", skip=True, branch_scale=0.5, activation="crelu",
                    init="looks_linear", seed=0, dtype="float64")  # fmt: skip
    expected = x = vectors(4, 8)
    for k in range(5):
        weight = network.get_parameter(f"blocks.{k}.branch.linear1.weight")
        assert weight.shape == (8, 16)
        expected = expected + 0.5 * expected @ weight[:, :8].T
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)


def test_recorder_sees_every_block() -> None:
    network = chain(6, 8, skip=True, branch="linear act linear", seed=0)
    assert sum(isinstance(module, Skip) for module in network.modules()) == 6
    with Recorder(network) as recorder:
        network(vectors(4, 8).float()).square().sum().backward()
        recorder.step()
        table = recorder.table("blocks")
    assert list(table["layer"]) == [f"blocks.{k}.skip" for k in range(6)]
    assert (table["branch_rms"] > 0).all()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth=0: allowed is a whole number from 1"),
        ({"width": 2.5}, "width=2.5: allowed is a whole number from 1"),
        ({"branch": "linear relu"}, "branch=linear relu: allowed is linear, act, norm"),
        ({"branch": "act"}, "branch=act: allowed is linear, act, norm, with a linear"),
        ({"branch": ["linear"]}, "branch=.'linear'.: allowed is linear"),
        ({"branch": "norm linear"}, "norm=none: branch=norm linear has the word"),
        ({"norm": "batch"}, "norm=batch: branch=linear act lacks the word"),
        ({"init": ["he", "he"]}, "init=.*: allowed is one name, or 1 for"),
        ({"init": "hee"}, "init=hee: allowed is he"),
        ({"init": ["he", "hee"], "branch": "linear linear"}, "init=hee: allowed is he"),
        ({"sigma_w": 2.0}, "sigma_w=2.0: only init=gaussian"),
        ({"activation": "swish"}, "activation=swish: allowed is relu"),
        ({"skip": "idenity"}, "skip=idenity: allowed is none"),
        ({"skip": True, "gate_bias": -3}, "gate_bias=-3: only skip=highway"),
        ({"dtype": "float16"}, "dtype=float16: allowed is float32, float64"),
        ({"activation": "crelu"}, "activation=crelu: in branch=linear act not every act"),
        ({"init": "looks_linear"}, "init=looks_linear: only activation=crelu"),
    ],
)
def test_bad_values_are_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        chain(**{"depth": 2, "width": 4, "seed": 0, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 2}, "kernel=2: allowed is an odd number"),
        ({"padding": "reflect"}, "padding=reflect: allowed is zeros, circular"),
        ({"activation": "crelu"}, "activation=crelu: only network=mlp"),
        ({"channels": -1}, "channels=-1: allowed is a whole number"),
    ],
)
def test_bad_values_of_convolutions(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        conv_chain(**{"depth": 2, "channels": 4, **options})  # type: ignore[arg-type]


def test_an_input_of_another_size_is_one_line() -> None:
    with pytest.raises(SpecError, match="width=6: the input has 12 features"):
        chain(2, 6, seed=0)(torch.zeros(2, 3, 2, 2))


def test_the_input_may_be_scaled():
    x = torch.randn(2, 4, 8, 8)
    options = {"activation": "tanh", "seed": 3}
    scaled = conv_chain(5, 4, scale=0.1, **options)
    assert torch.equal(scaled(x), conv_chain(5, 4, **options)(0.1 * x))


def test_gates_start_as_the_first_map_of_a_branch():
    options = {"branch": "linear act linear", "init": ["he", "gaussian"], "sigma_w": 9.0}
    network = chain(1, 64, skip="highway", sigma_b=0.0, seed=0, **options)
    gate = network.get_parameter("blocks.0.skip.gate.weight")
    assert float(gate.detach().std()) == pytest.approx(math.sqrt(2 / 64), rel=0.05)
