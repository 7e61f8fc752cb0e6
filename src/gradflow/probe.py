"""The probe that a spec names, on the network and data of its run: readings for probes.parquet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pyarrow as pa
import torch
from torch import Tensor, nn

from gradflow import schema
from gradflow.data import Data
from gradflow.networks import build
from gradflow.recording import probes
from gradflow.recording.probes import Reading
from gradflow.seeding import derived_seed
from gradflow.spec import RunSpec
from gradflow.training.evaluation import evaluate

_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def measure(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    """What the spec's probe reads from the network of a run.

    Args:
        network: at its initial parameters, or after training.
        data: on the network's device, in its type.
        images: one batch of the training split.
    """
    assert spec.probe.name is not None
    network.train()
    return PROBES[spec.probe.name](spec, network, data, images)


def table(readings: list[Reading], step: int) -> pa.Table:
    """Readings as rows of probes.parquet: those of one layer each stand at its position."""
    values = {name: [getattr(reading, name) for reading in readings] for name in Reading.__slots__}
    return schema.table("probes", {"step": [step] * len(readings), **values})


def length_ratios(make: Callable[[int], nn.Module], images: Tensor, networks: int) -> list[Reading]:
    """ln(‖f(x)‖²/‖x‖²) of so many networks, for the first of `images`: its spread over networks.

    Hanin & Rolnick 2018 (arXiv 1803.01719): the variance grows as the sum of 1/width over layers.

    Args:
        make: number of a network -> the network.
    """
    x = images[:1]
    found = []
    with torch.no_grad():
        for number in range(networks):
            y = make(number)(x)
            value = (y.double().square().sum().log() - x.double().square().sum().log()).item()
            found.append(Reading("log_length_ratio", value, x_name="network", x=float(number)))
    return found


# --- one function a probe of the specs ------------------------------------------------------------


def _propagation(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    return probes.batch_variance(network, images)


def _cosine(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    assert spec.probe.cosine is not None
    return probes.cosine_map(network, *probes.pairs_at(images, spec.probe.cosine))


def _token_cosine(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    return probes.token_cosine(network, images)


def _jacobian(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    return probes.jacobian_spectrum(network, images[:1])


def _shattering(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    assert spec.probe.points is not None
    assert spec.probe.extent is not None
    return probes.shattering(
        network,
        points=spec.probe.points,
        extent=spec.probe.extent,
        shape=images.shape[1:],
        seed=derived_seed("line", spec.seed),
    )


def _path_length(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    return probes.path_length(network, images, seed=readout_seed(spec))


def _length_ratio(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    assert spec.probe.networks is not None
    inputs = data.inputs(spec.network.name)

    def make(number: int) -> nn.Module:
        another = spec.but(seed=derived_seed("network", spec.seed, number))
        made = build(another, in_channels=inputs, num_classes=data.num_classes)
        return made.to(images.device, images.dtype).train()

    return length_ratios(make, images, spec.probe.networks)


def _underflow(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    assert spec.probe.format is not None
    dtype = _DTYPES[spec.probe.format]
    return probes.underflow_depth(network, images, dtype, seed=readout_seed(spec))


def _displacement(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    inputs = data.inputs(spec.network.name)
    initial = build(spec, in_channels=inputs, num_classes=data.num_classes)
    return probes.displacement(network, initial.to(images.device, images.dtype))


def _lesion(spec: RunSpec, network: nn.Module, data: Data, images: Tensor) -> list[Reading]:
    def accuracy() -> float:
        return evaluate(network, data.train, contextlib.nullcontext())["accuracy"]

    return probes.lesion(network, accuracy, images, seed=derived_seed("lesion", spec.seed))


def readout_seed(spec: RunSpec) -> int:
    """What the random linear readout of a run's probe is drawn from."""
    return derived_seed("readout", spec.seed)


PROBES: dict[str, Callable[[RunSpec, nn.Module, Data, Tensor], list[Reading]]] = {
    "propagation": _propagation,
    "cosine": _cosine,
    "token_cosine": _token_cosine,
    "jacobian": _jacobian,
    "shattering": _shattering,
    "path_length": _path_length,
    "length_ratio": _length_ratio,
    "underflow": _underflow,
    "displacement": _displacement,
    "lesion": _lesion,
}
