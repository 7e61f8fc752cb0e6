"""CReLU and looks-linear networks, and tailored rectifiers, against what they are exactly."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradflow.errors import SpecError
from gradflow.networks import TailoredReLU, build, build_network, chain
from gradflow.networks.activations import CReLU, MirroredLinear
from gradflow.spec import RunSpec


def vectors(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def looks_linear(depth: int, width: int, features: int, **options: Any) -> nn.Module:
    spec = RunSpec(
        network="mlp", depth=depth, width=width, norm="none", activation="crelu",
        init="looks_linear", precision="fp64", **options,
    )  # fmt: skip
    return build(spec, in_channels=features, num_classes=5)


def test_crelu_keeps_everything() -> None:
    x = torch.tensor([[-1.0, 2.0, 0.0]])
    expected = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0, 0.0]])
    assert torch.equal(CReLU()(x), expected)
    assert torch.equal(x, torch.tensor([[-1.0, 2.0, 0.0]]))


def test_mirrored_maps_undo_crelu() -> None:
    mirrored = MirroredLinear(7, 3, bias=False).double()
    half = vectors(3, 7)
    with torch.no_grad():
        mirrored.weight.copy_(torch.cat([half, -half], dim=1))
    x = vectors(4, 7)
    torch.testing.assert_close(mirrored(CReLU()(x)), x @ half.T, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("order", ["post", "pre"])
def test_shapes_follow_the_doubling(order: str) -> None:
    network = build_network(
        "mlp", depth=4, width=6, skip=False, order=order, activation="crelu", in_channels=9
    )
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes == {
        "layers.0.weight": (6, 9), "layers.1.weight": (6, 12), "layers.2.weight": (6, 12),
        **{f"norms.{k}.{tensor}": (6,) for k in range(3) for tensor in ("weight", "bias")},
        "readout.weight": (10, 12), "readout.bias": (10,),
    }  # fmt: skip


@pytest.mark.parametrize("order", ["post", "pre"])
def test_200_layers_are_the_product_of_their_orthogonal_matrices(order: str) -> None:
    """Outputs, gradients, and the norms of all layers' outputs and their gradients: to 1e-12."""
    depth, width = 201, 24
    network = looks_linear(depth, width, width, skip=False, order=order)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for k in range(depth - 1):
        network.get_submodule(f"layers.{k}").register_forward_hook(keep)
    matrices = [network.get_parameter("layers.0.weight")]
    for name in [*(f"layers.{k}" for k in range(1, depth - 1)), "readout"]:
        weight = network.get_parameter(f"{name}.weight")
        assert torch.equal(weight[:, :width], -weight[:, width:])
        matrices.append(weight[:, :width])
    product = torch.eye(width, dtype=torch.float64)
    for matrix in matrices:
        product = matrix.detach() @ product
    x, g = vectors(6, width).requires_grad_(), vectors(6, 5, seed=1)
    logits = network(x)
    logits.backward(g)
    torch.testing.assert_close(logits, x @ product.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, g @ product, rtol=0, atol=1e-12)
    sizes = torch.stack([output.detach().norm() for output in outputs]) / x.detach().norm()
    gradients = [output.grad for output in outputs if output.grad is not None]
    back = torch.stack([gradient.norm() for gradient in gradients]) / g.norm()
    assert len(back) == len(sizes) == depth - 1
    torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=0, atol=1e-12)
    torch.testing.assert_close(back, torch.ones_like(back), rtol=0, atol=1e-12)


@pytest.mark.parametrize("branch_layers", [1, 2])
def test_residual_looks_linear_networks_are_linear(branch_layers: int) -> None:
    """h + ½·Ω…h for each block of order pre."""
    network = looks_linear(10, 8, 8, order="pre", branch_scale=0.5, branch_layers=branch_layers)
    halves = [network.get_parameter(f"layers.{k}.weight")[:, :8] for k in range(9)]
    x = vectors(4, 8)
    h = x @ halves[0].T
    for first in range(1, 9, branch_layers):
        f = h
        for k in range(first, first + branch_layers):
            f = f @ halves[k].T
        h = h + 0.5 * f
    expected = h @ network.get_parameter("readout.weight")[:, :8].T
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)


def test_other_inits_keep_the_signal_of_crelu_as_of_relu() -> None:
    """He's gain 2 over 2n inputs of mean square q/2 gives q; √2 rows of 2n orthogonal ones too."""
    for init in ("he", "orthogonal"):
        network = chain(20, 300, branch="act linear", activation="crelu", init=init, seed=0)
        x = vectors(16, 300).float()
        assert (network(x).norm() / x.norm()).item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar", {"activation": "crelu"}, "activation=crelu: only network=mlp has it"),
        ("imagenet", {"activation": "crelu"}, "activation=crelu: only network=mlp has it"),
        ("mlp", {"activation": "crelu", "skip": True}, "order=post: activation=crelu with skips"),
        ("mlp", {"activation": "crelu", "skip": "backward_only"}, "order=post: activation=crelu"),
        ("mlp", {"init": "looks_linear"}, "init=looks_linear: only activation=crelu uses it"),
        ("cifar", {"init": "looks_linear"}, "init=looks_linear: only activation=crelu uses it"),
    ],
)
def test_what_has_no_crelu_says_so(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build_network(name, **options)


# --- tailored rectifiers --------------------------------------------------------------------------


def test_tailored_relu_is_a_leaky_relu_of_unit_second_moment() -> None:
    x = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    factor = math.sqrt(2 / 1.25)
    expected = torch.tensor([-0.5 * factor, 2 * factor], dtype=torch.float64)
    torch.testing.assert_close(TailoredReLU(0.5)(x), expected)
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    for slope in (0.0, 0.181, 0.57, 1.0):
        moment = torch.trapezoid(TailoredReLU(slope)(z).square() * density, z).item()
        assert moment == pytest.approx(1, abs=1e-8)


def test_lecun_with_tailored_relu_is_he_with_leaky_relu() -> None:
    """The whole chain, from the same numbers: the factor only moves from the weights."""
    slope, depth = 0.431, 50
    he = chain(depth, 32, activation="leaky_relu", negative_slope=slope, init="he", seed=2)
    lecun = chain(depth, 32, activation="leaky_relu", negative_slope=slope, init="lecun", seed=2)
    act = TailoredReLU(slope).double()
    x = expected = vectors(8, 32)
    for k in range(depth):
        expected = act(
            expected @ lecun.get_parameter(f"blocks.{k}.branch.linear1.weight").double().T
        )
    torch.testing.assert_close(he.double()(x), expected, rtol=1e-4, atol=1e-6)


def cosine_after(depth: int, slope: float, cosine: float = 0.0) -> float:
    """The cosine map of leaky_relu, iterated."""
    factor = (1 - slope) ** 2 / (math.pi * (1 + slope**2))
    for _ in range(depth):
        c = cosine
        cosine = c + factor * (math.sqrt(max(0.0, 1 - c * c)) - c * math.acos(min(1.0, c)))
    return cosine


def test_slope_for_a_depth_keeps_the_cosine() -> None:
    """Slopes .181, .431, .570 for depths 20, 50, 100 (Zhang et al. 2022)."""
    for depth, slope in ((20, 0.181), (50, 0.431), (100, 0.570)):
        tailored = TailoredReLU.at_depth(depth, cosine=0.9)
        assert tailored.negative_slope == pytest.approx(slope, abs=6e-4)
        assert cosine_after(depth, tailored.negative_slope) == pytest.approx(0.9, abs=1e-6)
