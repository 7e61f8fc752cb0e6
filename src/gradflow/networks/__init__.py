"""Networks with and without skips: a plain and a residual one start from equal parameters."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gradflow.errors import SpecError
from gradflow.networks.activations import TailoredReLU
from gradflow.networks.chains import chain, conv_chain
from gradflow.networks.classics import alexnet, lenet5, vgg16
from gradflow.networks.freezing import freeze_all_but_last
from gradflow.networks.initialization import initialized
from gradflow.networks.layers import Layers, check_sizes
from gradflow.networks.mlp import MLP
from gradflow.networks.resnet import IMAGENET_BLOCKS, ResNet, cifar_blocks
from gradflow.networks.skips import Skip
from gradflow.networks.transformer import transformer
from gradflow.networks.weights import load_weights
from gradflow.seeding import derived_seed
from gradflow.spec import NETWORK_KEYS, RunSpec

__all__ = [
    "Skip",
    "TailoredReLU",
    "alexnet",
    "build",
    "build_network",
    "chain",
    "conv_chain",
    "freeze_all_but_last",
    "lenet5",
    "transformer",
    "vgg16",
]


def build_network(
    name: str,
    *,
    depth: int | None = None,
    skip: str | bool | None = None,
    in_channels: int = 3,
    num_classes: int = 10,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """A network of gradflow's: images or vectors in, logits (N, num_classes) out.

    Networks of one name, depth, width and seed start from the same parameters, bit for bit, with
    and without skips; torch's global random generator is neither used nor changed.

    Args:
        name: `cifar`: (N, in_channels, H, W) from 8×8, depth 6n+2, basic blocks (He et al. 2015,
            arXiv 1512.03385, §4.2). `imagenet`: depth 18, 34, 50, 101 or 152, parameter names
            those of torchvision. `mlp`: (N, …), flattened to in_channels features; depth counts
            weight layers, the first and the readout included.
        skip: True or False, or a kind of skip: `none`, `identity`, `forward_only`, …; see `Skip`.
        options: the network's other keys, as on the command line: `width`, `norm`, `init`, ….

    Raises:
        SpecError: one line with the key, the value and what is allowed.
    """
    used = NETWORK_KEYS.get(name) if isinstance(name, str) else None
    for key in sorted(options):
        if key not in RunSpec.__dataclass_fields__:
            raise SpecError(f"{key}: no such key")
        if used is not None and key not in used:
            raise SpecError(f"{key}={options[key]}: network={name} does not use {key}")
    given: dict[str, Any] = {**options, "network": name, "depth": depth, "skip": skip, "seed": seed}
    return build(RunSpec(**given), in_channels=in_channels, num_classes=num_classes)


def build(spec: RunSpec, *, in_channels: int, num_classes: int) -> nn.Module:
    """The network that `spec` describes, on the CPU, with its initial parameters or `spec.weights`.

    In float64 where `spec.precision` is fp64, else in float32.

    Args:
        in_channels: channels of the images; for `mlp` the number of input features.
        num_classes: number of logits.

    A `custom` network knows both from its own arguments: `network.target` is called with exactly
    `network.args`, torch's global generator seeded from `spec.seed` and put back afterwards.

    Raises:
        SpecError: sizes below 1; a `network.target` that is no callable, fails or makes no module;
            `spec.weights` that are not this network's.
    """
    check_sizes(in_channels=in_channels, num_classes=num_classes)
    if spec.network.name == "custom":
        return _custom(spec)
    network = initialized(
        lambda: _network(spec, in_channels, num_classes),
        spec,
        seed=spec.seed,
        dtype=torch.float64 if spec.precision == "fp64" else torch.float32,
    )
    spec.check_weights()
    if spec.weights is not None and spec.weights_digest is not None:
        load_weights(network, spec.weights, spec.weights_digest)
    return network


def _network(spec: RunSpec, in_channels: int, num_classes: int) -> nn.Module:
    """The network before its initialisation."""
    name, depth, width, order = spec.network.name, spec.depth, spec.width, spec.order
    assert depth is not None
    assert width is not None
    assert order is not None
    layers = Layers.of(spec)
    make_skip = partial(_skip, spec)
    if name == "mlp":
        return MLP(
            depth,
            width=width,
            branch_layers=spec.branch_layers or 1,
            order=order,
            layers=layers,
            make_skip=make_skip,
            in_features=in_channels,
            num_classes=num_classes,
        )
    return ResNet(
        cifar_blocks(depth) if name == "cifar" else IMAGENET_BLOCKS[depth],
        width=width,
        stem=name,
        bottleneck=name == "imagenet" and depth >= 50,
        order=order,
        shortcut=spec.shortcut or "B",
        layers=layers,
        make_skip=make_skip,
        in_channels=in_channels,
        num_classes=num_classes,
    )


def _skip(spec: RunSpec, block: int, blocks: int, channels: int) -> Skip:
    """The skip of a block, counted from 1; chances to be dropped rise linearly to `drop_rate`.

    Huang et al. 2016 (arXiv 1603.09382, eq. 4): block l of L survives with 1 − l/L·drop_rate.
    """
    return Skip(
        spec.skip or "none",
        skip_forward=spec.skip_forward,
        skip_backward=spec.skip_backward,
        branch_scale=1.0 if spec.branch_scale is None else spec.branch_scale,
        channels=channels,
        drop_rate=None if spec.drop_rate is None else block / blocks * spec.drop_rate,
    )


def callable_of(spec: RunSpec) -> Callable[..., Any]:
    """What `network.target` names.

    Raises:
        SpecError: it cannot be imported or is no callable; or `depth`, `width` or `skip` is set
            and is neither among `network.args` nor the callable's own default.
    """
    target, args = spec.network.target, spec.network.args
    assert target is not None
    assert args is not None
    module_name, _, attribute = target.rpartition(".")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise SpecError(f"network.target={target}: cannot be imported: {_said(error)}") from error
    if not callable(make):
        raise SpecError(f"network.target={target}: is a {type(make).__name__}, not a callable")
    for name, value in spec.claims_beyond(_defaults(make) | args).items():
        raise SpecError(
            f"{name}={value}: {target} is not called with it; network.args={{{name}:'${{{name}}}'}}"
            " passes it on"
        )
    return make


def _defaults(make: Callable[..., Any]) -> dict[str, Any]:
    """Defaults of the parameters that are called like a key of a custom network.

    One that knows of no skip may be called plain.
    """
    try:
        parameters = inspect.signature(make).parameters
    except (ValueError, TypeError):  # of something built in
        parameters = MappingProxyType({})
    found = {
        name: parameters[name].default for name in NETWORK_KEYS["custom"] if name in parameters
    }
    return {"skip": "none"} | found


def _custom(spec: RunSpec) -> nn.Module:
    """What `network.target` makes of `network.args`."""
    make, target, args = callable_of(spec), spec.network.target, spec.network.args or {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(spec.seed, "network.target"))
        try:
            network = make(**args)
        except Exception as error:
            raise SpecError(f"network.target={target}: the call failed: {_said(error)}") from error
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise SpecError(f"network.target={target}: returned a {kind}, not a torch.nn.Module")
    return network


def _said(error: Exception) -> str:
    """An exception's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
