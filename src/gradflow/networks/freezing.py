"""Training the last blocks alone: the control for what random features give by themselves."""

from __future__ import annotations

from torch import nn

from gradflow.errors import SpecError
from gradflow.networks.layers import check_sizes
from gradflow.networks.mlp import MLP
from gradflow.networks.resnet import Block, ResNet


def freeze_all_but_last(network: nn.Module, blocks: int) -> None:
    """Let only the last `blocks` residual blocks and the readout learn; in place.

    A block is what one skip, or its absence, spans: a `ResNet`'s Block with its norms, projection
    and gate; in an `MLP` `branch_layers` hidden layers with their norms and gate. With order `pre`
    the last norm is trained as part of the readout. Everything else has `requires_grad` off, the
    norms of frozen blocks too; their running statistics still move in training mode.

    Raises:
        SpecError: fewer blocks than that, or a network of another kind.
    """
    check_sizes(trainable_blocks=blocks)
    if isinstance(network, ResNet):
        every = [module for module in network.modules() if isinstance(module, Block)]
        trained = [*every[-blocks:], network.fc, *([network.bn_final] if network.pre else [])]
        count = len(every)
    elif isinstance(network, MLP):
        trained, count = _last_of_mlp(network, blocks), len(network.skips)
    else:
        kind = type(network).__name__
        raise SpecError(f"trainable_blocks={blocks}: allowed for ResNet and MLP, not {kind}")
    if blocks > count:
        raise SpecError(f"trainable_blocks={blocks}: the network has {count} blocks")
    network.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)


def _last_of_mlp(network: MLP, blocks: int) -> list[nn.Module]:
    """The last blocks of an MLP, counted by its skips, and its readout."""
    skips = list(network.skips)[-blocks:]
    count = len(skips) * network.branch_layers
    layers, norms = list(network.layers), list(network.norms)
    # With order pre a layer's norm comes before it, and one more before the readout.
    normed = count + 1 if network.pre else count
    tail = [*layers[len(layers) - count :], *norms[len(norms) - normed :]]
    return [*tail, *skips, network.readout]
