"""Training the last blocks alone: exactly which parameters remain, and that the others stay."""

from typing import Any

import pytest
import torch
from torch import nn

from gradflow.errors import SpecError
from gradflow.networks import build_network, chain, freeze_all_but_last

NORM = ("weight", "bias")


def trainable(network: nn.Module, blocks: int) -> set[str]:
    freeze_all_but_last(network, blocks)
    return {name for name, p in network.named_parameters() if p.requires_grad}


def block(name: str, *, convolutions: int = 2) -> set[str]:
    numbers = range(1, convolutions + 1)
    norms = {f"{name}.bn{i}.{tensor}" for i in numbers for tensor in NORM}
    return {f"{name}.conv{i}.weight" for i in numbers} | norms


READOUT = {"fc.weight", "fc.bias"}
FINAL_NORM = {"bn_final.weight", "bn_final.bias"}


@pytest.mark.parametrize("skip", [True, False])
def test_residual_networks_and_their_plain_twins(skip: bool) -> None:
    made = build_network("cifar", depth=20, width=2, skip=skip)
    assert trainable(made, 1) == READOUT | block("layer3.2")
    four = {"layer2.2", "layer3.0", "layer3.1", "layer3.2"}
    made = build_network("cifar", depth=20, width=2, skip=skip)
    assert trainable(made, 4) == READOUT.union(*(block(name) for name in four))


def test_preactivation_trains_the_last_norm_with_the_readout() -> None:
    made = build_network("cifar", depth=8, width=2, order="pre")
    assert trainable(made, 1) == READOUT | FINAL_NORM | block("layer3.0")


def test_projections_and_gates_are_their_blocks() -> None:
    made = build_network("cifar", depth=8, width=2, shortcut="B", skip="highway")
    projection = {"0.weight", "1.weight", "1.bias"}
    own = {f"layer3.0.downsample.{tensor}" for tensor in projection}
    own |= {f"layer3.0.skip.gate.{tensor}" for tensor in NORM}
    assert trainable(made, 1) == READOUT | block("layer3.0") | own


def test_bottlenecks() -> None:
    made = build_network("imagenet", depth=50, width=2)
    assert trainable(made, 1) == READOUT | block("layer4.2", convolutions=3)


def mlp(**options: Any) -> nn.Module:
    return build_network("mlp", depth=8, width=4, in_channels=3, **options)


def names(*modules: str, bias: bool = True) -> set[str]:
    return {f"{m}.{t}" for m in modules for t in (NORM if bias else ("weight",))}


@pytest.mark.parametrize("skip", [True, False])
def test_perceptrons(skip: bool) -> None:
    """Layers 1 to 6 are hidden; a layer's norm is its own (post) or the one before (pre)."""
    post = names("layers.5", "layers.6", bias=False) | names("norms.5", "norms.6", "readout")
    assert trainable(mlp(skip=skip), 2) == post
    pre = names("layers.6", bias=False) | names("norms.5", "norms.6", "readout")
    assert trainable(mlp(skip=skip, order="pre"), 1) == pre
    assert trainable(mlp(skip=skip, norm="none"), 1) == names("layers.6", "readout")


def test_perceptrons_with_two_layers_a_branch_and_gates() -> None:
    made = mlp(skip="highway", branch_layers=2)
    expected = names("layers.5", "layers.6", bias=False)
    expected |= names("norms.5", "norms.6", "skips.2.gate", "readout")
    assert trainable(made, 1) == expected


def test_all_blocks_leave_out_what_comes_before_them() -> None:
    assert trainable(mlp(), 6) == set(dict(mlp().named_parameters())) - {
        "layers.0.weight", "norms.0.weight", "norms.0.bias",
    }  # fmt: skip


def test_only_they_move_and_running_statistics_still_do() -> None:
    network = build_network("cifar", depth=8, width=4)
    freeze_all_but_last(network, 1)
    before = {name: values.clone() for name, values in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network(x).square().sum().backward()
    optimizer.step()
    moved = {n for n, values in network.state_dict().items() if not torch.equal(values, before[n])}
    learnt = {name for name in moved if "running" not in name and "tracked" not in name}
    assert learnt == READOUT | block("layer3.0")
    assert "bn1.running_mean" in moved


@pytest.mark.parametrize(
    ("network", "blocks", "message"),
    [
        (build_network("cifar", depth=8, width=2), 4, "trainable_blocks=4: the network has 3"),
        (mlp(), 7, "trainable_blocks=7: the network has 6 blocks"),
        (mlp(skip=True, branch_layers=2), 4, "trainable_blocks=4: the network has 3 blocks"),
        (mlp(), 0, "trainable_blocks=0: allowed is a whole number from 1"),
        (chain(2, 4, seed=0), 1, "trainable_blocks=1: allowed for ResNet and MLP, not Chain"),
    ],
)
def test_what_cannot_be_frozen_is_left_as_it_was(
    network: nn.Module, blocks: int, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        freeze_all_but_last(network, blocks)
    assert all(p.requires_grad for p in network.parameters())
