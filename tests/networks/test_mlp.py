"""Multilayer perceptrons against the written-out formulas and exact theory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow import spec
from gradflow.networks import build_network


def vectors(features: int = 12, batch: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, features, generator=generator)


@pytest.mark.parametrize(
    ("depth", "width", "features", "classes"), [(2, 7, 5, 3), (20, 256, 192, 10), (101, 9, 4, 2)]
)
def test_counts(depth: int, width: int, features: int, classes: int) -> None:
    matrices = features * width + (depth - 2) * width**2
    readout = (width + 1) * classes
    sizes = {"depth": depth, "width": width, "in_channels": features, "num_classes": classes}
    for skip, order in itertools.product((True, False), spec.ORDERS):
        normed = build_network("mlp", skip=skip, order=order, **sizes)
        assert sum(p.numel() for p in normed.parameters()) == (
            matrices + 2 * width * (depth - 1) + readout
        )
        bare = build_network("mlp", skip=skip, order=order, norm="none", **sizes)
        assert sum(p.numel() for p in bare.parameters()) == matrices + width * (depth - 1) + readout


def reference(
    network: nn.Module, x: Tensor, depth: int, order: str, branch_layers: int, skip: bool
) -> Tensor:
    """tanh and layer norm, written out."""
    state, act = network.state_dict(), torch.tanh

    def linear(h: Tensor, k: int) -> Tensor:
        return h @ state[f"layers.{k}.weight"].T

    def norm(h: Tensor, k: int) -> Tensor:
        scaled = F.layer_norm(h, h.shape[1:])
        return scaled * state[f"norms.{k}.weight"] + state[f"norms.{k}.bias"]

    h, k = linear(x.flatten(1), 0), 1
    h = act(norm(h, 0)) if order == "post" else h
    while k < depth - 1:
        if order == "pre":
            f = linear(act(norm(h, k - 1)), k)
            if branch_layers == 2:
                f = linear(act(norm(f, k)), k + 1)
        else:
            f = norm(linear(h, k), k)
            if branch_layers == 2:
                f = norm(linear(act(f), k + 1), k + 1)
        k += branch_layers
        h = f + h if skip else f
        h = act(h) if order == "post" else h
    h = act(norm(h, depth - 2)) if order == "pre" else h
    return F.linear(h, state["readout.weight"], state["readout.bias"])


@pytest.mark.parametrize(
    ("order", "branch_layers", "skip"),
    [*itertools.product(spec.ORDERS, (1, 2), (True,)), ("post", 1, False), ("pre", 1, False)],
)
def test_network_is_the_written_out_one(order: str, branch_layers: int, skip: bool) -> None:
    options = {"branch_layers": branch_layers} if skip else {}
    network = build_network(
        "mlp", depth=8, width=10, skip=skip, order=order, activation="tanh", norm="layer",
        in_channels=12, **options,
    ).double()  # fmt: skip
    with torch.no_grad():  # norms that differ, so that a wrong one is seen
        for k in range(7):
            network.get_parameter(f"norms.{k}.weight").add_(0.1 * k)
    x = vectors().double().reshape(16, 3, 2, 2)
    expected = reference(network, x, 8, order, branch_layers, skip)
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", spec.ORDERS)
def test_plain_network_is_the_same_for_either_branch(order: str) -> None:
    """With doses (0, 0) written out or with skip=false: one network, whatever the branch."""
    plain = build_network("mlp", depth=8, width=10, skip=False, order=order, in_channels=12)
    two = build_network("mlp", depth=8, width=10, order=order, in_channels=12, branch_layers=2,
                        branch_scale=1.0, skip_forward=0.0, skip_backward=0.0)  # fmt: skip
    assert torch.equal(plain(vectors()), two(vectors()))


@pytest.mark.parametrize(("order", "branch_layers"), list(itertools.product(spec.ORDERS, (1, 2))))
def test_backward_only_is_plain_in_the_forward_pass(order: str, branch_layers: int) -> None:
    plain, other = (
        build_network("mlp", depth=12, width=16, skip=skip, order=order, in_channels=12,
                      branch_layers=branch_layers)
        for skip in ("none", "backward_only")
    )  # fmt: skip
    x = vectors()
    assert torch.equal(plain(x), other(x))
    for network in (plain, other):
        network(x).square().sum().backward()
    name = "layers.0.weight"
    assert not torch.allclose(plain.get_parameter(name).grad, other.get_parameter(name).grad)


def test_forward_only_lets_no_gradient_through_the_skip() -> None:
    """With zero branches nothing but the skip could carry it: exactly zero at the first layer."""
    gradients = {}
    for skip in ("identity", "forward_only"):
        network = build_network("mlp", depth=8, width=16, skip=skip, order="pre", in_channels=12)
        for k in range(1, 7):
            nn.init.zeros_(network.get_parameter(f"layers.{k}.weight"))
        network(vectors()).square().sum().backward()
        gradients[skip] = network.get_parameter("layers.0.weight").grad
    assert gradients["identity"].norm() > 1e-3
    assert torch.equal(gradients["forward_only"], torch.zeros(16, 12))


def test_deep_orthogonal_linear_chain_keeps_the_gradient_norm() -> None:
    network = build_network(
        "mlp", depth=60, width=64, in_channels=64, skip=False, activation="linear", norm="none",
        init="orthogonal",
    )  # fmt: skip
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for k in range(59):
        network.get_submodule(f"layers.{k}").register_forward_hook(keep)
    x = vectors(64)
    network(x).square().sum().backward()
    gradients = [output.grad for output in outputs]
    norms = torch.stack([g.norm() for g in gradients if g is not None])
    assert len(norms) == 59
    torch.testing.assert_close(norms / norms[-1], torch.ones(59), rtol=1e-5, atol=0)
    sizes = torch.stack([output.detach().norm() for output in outputs])
    torch.testing.assert_close(sizes / x.norm(), torch.ones(59), rtol=1e-5, atol=0)
