"""What defines a run: its keys, their defaults, what is allowed, and the run's id.

Standard library only, so that a bad value is refused, and a sweep planned, without loading torch.
`RunSpec` holds what decides the results and is hashed; `Execution` holds where and how they are
computed and is not. Both are canonical after construction: whatever has several spellings
(`true`/`identity`, `2e-2`/`0.02`) has one, and two equal specs have one id.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from gradflow.errors import SpecError

RECIPE = 1
"""Raised when a change of code changes results: runs of older recipes are then not reused."""

# Names that the implementations must offer; tests hold the two lists equal.
SKIPS = ("none", "identity", "forward_only", "backward_only", "rezero", "highway",
         "stochastic_depth", "dosed")  # fmt: skip
PRESETS = {
    "none": (0.0, 0.0),
    "identity": (1.0, 1.0),
    "forward_only": (1.0, 0.0),
    "backward_only": (0.0, 1.0),
}
"""Dosed skips that have a name: (skip_forward a, skip_backward b)."""
ORDERS = ("post", "pre")
NORMS = ("batch", "layer", "group", "none")
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "gelu", "silu", "linear", "crelu")
INITIALIZATIONS = ("he", "xavier", "lecun", "pytorch", "orthogonal", "delta_orthogonal",
                   "gaussian", "looks_linear")  # fmt: skip
PADDINGS = ("zeros", "circular")
SHORTCUTS = ("A", "B")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine", "one_cycle")
PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
ON_DIVERGENCE = ("stop", "continue")
DETAILS = (
    "update_ratio", "grad_max", "grad_nonfinite", "grad_zeros", "grad_subnormals", "grad_cosine",
    "noise_scale", "grad_rank", "output_max", "output_nonfinite", "output_spread",
    "output_grad_zeros", "output_grad_subnormals", "dead_units", "branch_x_grad_norm",
    "x_grad_cosine",
)  # fmt: skip
"""What is recorded where it is asked for only: `recording.quantities` describes each."""
RECORDS = ("default", "none", "all")
LOGGERS = ("none", "csv", "tensorboard", "wandb")
LAUNCHERS = ("local", "slurm")
IMAGENET_DEPTHS = (18, 34, 50, 101, 152)
FORMATS = ("fp16", "bf16", "fp32", "fp64")

# The keys each network uses, with their defaults. A key outside its network's list is refused.
_BLOCK_KEYS = {
    "skip": "identity",
    "skip_forward": None,
    "skip_backward": None,
    "branch_scale": 1.0,
    "drop_rate": 0.5,
    "order": "post",
    "norm": "batch",
    "groups": 8,
    "activation": "relu",
    "negative_slope": 0.01,
    "init": "he",
    "sigma_w": 1.0,
    "sigma_b": 0.0,
    "trainable_blocks": None,
}
NETWORK_KEYS: dict[str, dict[str, Any]] = {
    "cifar": {"depth": 20, "width": 16, **_BLOCK_KEYS, "padding": "zeros", "shortcut": "A"},
    "imagenet": {"depth": 18, "width": 64, **_BLOCK_KEYS, "padding": "zeros",
                 "weights": None, "weights_digest": None},
    "mlp": {"depth": 20, "width": 256, **_BLOCK_KEYS, "branch_layers": 1},
    "custom": {"depth": None, "width": None, "skip": None},
}  # fmt: skip
NETWORKS = tuple(NETWORK_KEYS)


class PublicSet(NamedTuple):
    """A file of a set, below data.root; its images to train on; their channels, height, width."""

    file: str
    train: int
    shape: tuple[int, int, int]


PUBLIC = {
    "fashion_mnist": PublicSet("FashionMNIST/raw/train-images-idx3-ubyte", 60_000, (1, 28, 28)),
    "mnist": PublicSet("MNIST/raw/train-images-idx3-ubyte", 60_000, (1, 28, 28)),
    "cifar10": PublicSet("cifar-10-batches-py/data_batch_1", 50_000, (3, 32, 32)),
    "cifar100": PublicSet("cifar-100-python/train", 50_000, (3, 32, 32)),
    "svhn": PublicSet("train_32x32.mat", 73_257, (3, 32, 32)),
}
"""Sets that are the same wherever they lie."""
_PUBLIC_KEYS = {"root": "data", "download": False, "train": None, "test": None, "size": None,
                "augment": False}  # fmt: skip
DATA_KEYS: dict[str, dict[str, Any]] = {
    "digits": {},
    "synthetic": {"seed": 0, "size": 8, "train": 4000, "test": 1000},
    "gaussian": {"seed": 0, "channels": 3, "size": 8, "train": 1024, "test": 256},
    "files": {"root": None},
    **dict.fromkeys(PUBLIC, _PUBLIC_KEYS),
    "imagefolder": {"root": None, "train": None, "test": None, "augment": True, "size": 224,
                    "resize": None, "workers": 2},
}  # fmt: skip
DATA = tuple(DATA_KEYS)
OWN = ("files", "imagefolder")
"""Files of the user's, which may change: a finished run is reused only where they have not."""
PROBE_KEYS: dict[str, dict[str, Any]] = {
    "propagation": {},
    "cosine": {"cosine": 0.0},
    "token_cosine": {},
    "jacobian": {},
    "shattering": {"points": 256, "extent": 2.0},
    "path_length": {},
    "length_ratio": {"networks": 400},
    "underflow": {"format": "fp32"},
    "displacement": {},
    "lesion": {},
}
"""Measurements with passes of their own, and the keys that each uses."""
PROBES = tuple(PROBE_KEYS)
OF_TRAINED = ("displacement", "lesion")
"""Probes that say nothing of a network that was not trained."""
OF_ONE_INPUT = ("jacobian", "length_ratio")
"""Probes of a single input, which has no batch statistics."""
DIGITS_TRAIN = 1437
INSTALL_VISION = 'pip install "gradflow-harness[vision]"'
EPOCHS = 12

SKIP_KEYS = ("skip", "skip_forward", "skip_backward", "branch_scale", "branch_layers", "drop_rate",
             "shortcut")  # fmt: skip
"""The keys in which the two arms of a matched pair may differ."""

# Keys that only one value of another key uses. Those of the skip are dropped where they do not
# apply, so that one sweep may set them for all its arms; the others are refused.
_ONLY_WITH = {
    "groups": ("norm", "group"),
    "negative_slope": ("activation", "leaky_relu"),
    "sigma_w": ("init", "gaussian"),
    "sigma_b": ("init", "gaussian"),
    "milestones": ("schedule", "step"),
    "momentum": ("optimizer", "sgd"),
}


# --- checks: a value in any spelling -> its canonical form, or ValueError(what is allowed) --------


_MOST = 2**63 - 1  # that a column of a table can hold


def _integer(low: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        whole = (
            isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
        )
        if not whole or not low <= value <= _MOST:
            most = f" to {_MOST}" if whole and value > _MOST else ""
            raise ValueError(f"a whole number from {low}{most}")
        return int(value)

    return check


def _real(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[Any], float]:
    bounds = f"a number {'above' if above else 'from'} {low:g}" if low > -math.inf else "a number"
    bounds += f" and {'below' if below else 'up to'} {high:g}" if high < math.inf else ""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(bounds)
        number = float(value)
        inside = low <= number <= high and not (above and number == low)
        if not inside or (below and number == high) or not math.isfinite(number):
            raise ValueError(bounds)
        return number + 0.0  # -0.0 is 0.0

    return check


def _choice(
    names: tuple[str, ...], aliases: Mapping[Any, str] | None = None
) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        for spelled, name in (aliases or {}).items():
            if spelled == value and type(spelled) is type(value):  # True == 1, but skip=1 is wrong
                value = name
        if value not in names or not isinstance(value, str):
            switches = [_spelled(one) for one in aliases or () if isinstance(one, bool)]
            raise ValueError(", ".join([*names, *switches]))
        return value

    check.allowed = names  # type: ignore[attr-defined]
    return check


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _import_path(value: Any) -> str:
    parts = _text(value).split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError("an import path such as package.module.callable")
    return value


def _arguments(value: Any) -> dict[str, Any]:
    try:
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError):
        pass
    raise ValueError("names with plain values, such as {depth:20}")


def _milestones(value: Any) -> tuple[int, ...]:
    allowed = "a rising list of steps, such as [32000,48000]"
    if not isinstance(value, list | tuple):
        raise ValueError(allowed)
    steps = tuple(_integer(1)(step) for step in value)
    if list(steps) != sorted(set(steps)):
        raise ValueError(allowed)
    return steps


def _details(value: Any) -> tuple[str, ...]:
    known = isinstance(value, list | tuple) and value and set(value) <= set(DETAILS)
    if not known:
        raise ValueError(f"a list of {', '.join(DETAILS)}")
    return tuple(name for name in DETAILS if name in value)


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise ValueError("16 hexadecimal digits")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true, false")
    return value


def _auto(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def accept(value: Any) -> Any:
        try:
            return value if value == "auto" else check(value)
        except ValueError as error:
            raise ValueError(f"auto, or {error}") from None

    return accept


def _device(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", value):
        raise ValueError("auto, cpu, cuda, cuda:N, mps, xpu, xpu:N")
    return value


_SKIP_ALIASES = {True: "identity", False: "none", "true": "identity", "false": "none"}
_PRECISION_ALIASES = {
    32: "fp32", 16: "fp16", 64: "fp64", "32": "fp32", "16": "fp16", "64": "fp64",
    "32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16", "64-true": "fp64",
}  # fmt: skip


def key(default: Any, check: Callable[[Any], Any] | None, text: str, *, omit: Any = None) -> Any:
    """A field: its default, its check, its help, and the frozen value at which no id names it.

    `omit` never changes once released: it is the value that stands for "as before this key came",
    whatever the default of today.
    """
    factory = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return field(**factory, metadata={"check": check, "help": text, "omit": omit})


def _checked(owner: Any, name: str, value: Any, label: str) -> Any:
    check = owner.__dataclass_fields__[name].metadata["check"]
    if value is None or check is None:
        return value
    try:
        return check(value)
    except ValueError as error:
        raise SpecError(f"{label}={_spelled(value)}: allowed is {error}") from None


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _check_all(owner: Any, prefix: str = "") -> None:
    for item in fields(owner):
        value = _checked(owner, item.name, getattr(owner, item.name), prefix + item.name)
        required = item.default is not MISSING and item.default is not None
        if value is None and required:
            raise SpecError(f"{prefix}{item.name}=null: a value is needed here")
        object.__setattr__(owner, item.name, value)


def _fill(
    owner: Any, used: Mapping[str, Any], candidates: tuple[str, ...], prefix: str, by: str
) -> None:
    """Give used keys their default and refuse the others where they are set."""
    for name in candidates:
        value = getattr(owner, name)
        if name not in used and value is not None:
            raise SpecError(f"{prefix}{name}={_spelled(value)}: {by} does not use {prefix}{name}")
        if name in used and value is None:
            object.__setattr__(owner, name, used[name])


# --- the parts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkSpec:
    """Which network: one of gradflow's by name, or any callable by import path."""

    name: str = key("cifar", _choice(NETWORKS), "family of networks")
    target: str | None = key(
        None, _import_path, "import path of any other network's callable; the run is named custom"
    )
    args: dict[str, Any] | None = key(
        None, _arguments, "what target is called with, e.g. {depth:'${depth}'}"
    )

    def __post_init__(self) -> None:
        _check_all(self, "network.")
        if self.target is not None:
            if self.name not in ("cifar", "custom"):
                raise SpecError(f"network={self.name}: network.target names another network")
            object.__setattr__(self, "name", "custom")
            object.__setattr__(self, "args", self.args or {})
        elif self.name == "custom":
            raise SpecError("network=custom: name the callable, network.target=package.module.f")
        elif self.args is not None:
            raise SpecError("network.args: only network.target is called with them")


@dataclass(frozen=True)
class DataSpec:
    """What the network is trained on. Keys that the chosen data does not use are None."""

    name: str = key("digits", _choice(DATA), "what to train on")
    seed: int | None = key(None, _integer(0), "what generated images are drawn from")
    channels: int | None = key(None, _integer(1), "gaussian: channels of an image")
    size: int | None = key(
        None,
        _integer(1),
        "height and width of an image: generated; imagefolder: of a crop (224); public sets: "
        "averaged to a divisor of theirs",
    )
    train: int | None = key(
        None,
        _integer(1),
        "images to train on: generated, or a fixed choice of those that there are",
    )
    test: int | None = key(None, _integer(1), "images to test on, the same")
    root: str | None = key(
        None,
        _text,
        "where a public set lies; files: the directory of train.npz and test.npz; imagefolder: of "
        "train/CLASS/* and val/CLASS/*",
    )
    augment: bool | None = key(
        None, _flag, "train on random crops, flipped at random; by default imagefolder alone"
    )
    resize: int | None = key(
        None, _integer(1), "imagefolder: shorter side before the crop to test on [size × 256/224]"
    )
    workers: int | None = key(
        None, _integer(0), "imagefolder: processes that decode; no part of a run's identity"
    )
    download: bool | None = key(
        None, _flag, "public sets: fetch what is missing; no part of a run's identity"
    )

    def __post_init__(self) -> None:
        _check_all(self, "data.")
        keys = tuple(item.name for item in fields(self) if item.name != "name")
        _fill(self, DATA_KEYS[self.name], keys, "data.", f"data={self.name}")
        if self.name == "files" and self.root is None:
            raise SpecError("data=files: name the directory of train.npz and test.npz, data.root=…")
        if self.name == "synthetic" and (self.size or 0) < 8:
            raise SpecError(f"data.size={self.size}: allowed is a whole number from 8")
        if self.name == "imagefolder":
            self._check_folder()
        if self.name in PUBLIC and self.size is not None:
            self._check_averaged()

    def _check_folder(self) -> None:
        if self.root is None:
            raise SpecError("data=imagefolder: name the directory of train/ and val/, data.root=…")
        size = self.size or 0
        if self.resize is None:
            object.__setattr__(self, "resize", size * 256 // 224)
        elif self.resize < size:
            raise SpecError(f"data.resize={self.resize}: allowed is a whole number from {size}")

    def _check_averaged(self) -> None:
        side = PUBLIC[self.name].shape[1]
        assert self.size is not None
        if side % self.size:
            raise SpecError(f"data.size={self.size}: allowed is a divisor of {side}")
        if self.size == side:
            object.__setattr__(self, "size", None)

    @property
    def incidental(self) -> tuple[str, ...]:
        """Keys that decide no result: where a public set lies, how it gets there and is read."""
        return ("download", "workers", "root") if self.name in PUBLIC else ("download", "workers")

    @property
    def train_size(self) -> int | None:
        """Images in the training split, where that is known without reading them."""
        if self.name == "digits":
            return DIGITS_TRAIN
        return self.train or (PUBLIC[self.name].train if self.name in PUBLIC else None)

    def check_files(self) -> None:
        """Raise SpecError, without reading them, where files, or what reads them, are missing."""
        if self.root is None:
            return
        if self.name != "files" and importlib.util.find_spec("torchvision") is None:
            raise SpecError(f"data={self.name}: torchvision is missing: {INSTALL_VISION}")
        if self.download:
            return
        helps = f"; to fetch it: {self.remedy}" if self.name in PUBLIC else ""
        if not Path(self.root).is_dir():
            raise SpecError(f"data.root={self.root}: no such directory{helps}")
        for name in self._files():
            if not (Path(self.root) / name).exists():
                raise SpecError(f"data.root={self.root}: has no {name}{helps}")

    def _files(self) -> tuple[str, ...]:
        if self.name in PUBLIC:
            return (PUBLIC[self.name].file,)
        return ("train.npz", "test.npz") if self.name == "files" else ("train", "val")

    @property
    def remedy(self) -> str:
        """What helps where files of a public set are missing or damaged."""
        return f"python -m gradflow data={self.name} data.root={self.root} data.download=true"


@dataclass(frozen=True)
class EverySpec:
    """How often each table is measured: every so many steps, 0 for never."""

    weights: int | None = key(None, _integer(0), "every so many steps; 0 never")
    outputs: int | None = key(None, _integer(0), "the same, and always the first five steps")
    blocks: int | None = key(None, _integer(0), "the same, and always the first five steps")
    details: int | None = key(None, _integer(0), "the same, of record.details")


@dataclass(frozen=True)
class RecordSpec:
    """What is recorded. `default`: norms of weights' gradients every step, of weights, outputs and
    blocks every tenth; `all`: all norms at every step; `none`: loss and total norm only."""

    name: str = key("default", _choice(RECORDS), "what to record")
    every: EverySpec = key(EverySpec, None, "how often each table is measured")
    details: tuple[str, ...] | None = key(
        None, _details, f"a list of what to record beside norms: {', '.join(DETAILS)}"
    )
    flight: int | None = key(
        None, _integer(1), "steps whose norms are kept, and written where one is not finite"
    )

    def __post_init__(self) -> None:
        _check_all(self, "record.")
        norms = {"default": (1, 10, 10), "all": (1, 1, 1), "none": (0, 0, 0)}[self.name]
        usual = (*norms, None if self.details is None else 10)
        every = self.every
        if isinstance(every, Mapping):
            every = _part(EverySpec, every, "record.every.")
        _check_all(every, "record.every.")
        filled = {}
        for item, rate in zip(fields(every), usual, strict=True):
            value = getattr(every, item.name)
            if self.name == "none" and value:
                raise SpecError(f"record.every.{item.name}={value}: record=none records nothing")
            filled[item.name] = rate if value is None else value
        if filled["details"] is not None and self.details is None:
            raise SpecError(f"record.every.details={filled['details']}: record.details is not set")
        for name in ("details", "flight"):
            value = getattr(self, name)
            if self.name == "none" and value is not None:
                raise SpecError(f"record.{name}={_spelled(value)}: record=none records nothing")
        object.__setattr__(self, "every", EverySpec(**filled))
        if not any(filled.values()) and self.details is None and self.flight is None:
            object.__setattr__(self, "name", "none")


@dataclass(frozen=True)
class ProbeSpec:
    """A measurement with passes of its own, made at the run's end: `recording.probes`.

    A run with a probe is one of initialisation alone unless it sets epochs or max_steps; it records
    the pass of a random linear readout in place of the loss's.
    """

    name: str | None = key(None, _choice(PROBES), "a measurement with passes of its own")
    cosine: float | None = key(None, _real(-1, 1), "cosine: of each pair of inputs")
    points: int | None = key(None, _integer(8), "shattering: points of the line of inputs")
    extent: float | None = key(
        None, _real(0, above=True), "shattering: the line is [-extent, extent]"
    )
    networks: int | None = key(None, _integer(2), "length_ratio: networks drawn")
    format: str | None = key(None, _choice(FORMATS), "underflow: number format of all tensors")

    def __post_init__(self) -> None:
        _check_all(self, "probe.")
        keys = ("cosine", "points", "extent", "networks", "format")
        used = PROBE_KEYS[self.name] if self.name else {}
        _fill(self, used, keys, "probe.", f"probe={self.name or 'null'}")


def _part(kind: type, value: Any, prefix: str) -> Any:
    """A part given as itself, as its name alone, or as a mapping of its keys."""
    names = {item.name for item in fields(kind)}
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and "name" in names:
        return kind(name=value)
    if isinstance(value, Mapping):
        unknown = set(value) - names
        if unknown:
            raise SpecError(f"{prefix}{min(unknown)}: no such key")
        return kind(**value)
    allowed = "a name" if "name" in names else f"{prefix}KEY=VALUE"
    raise SpecError(f"{prefix.rstrip('.')}={_spelled(value)}: allowed is {allowed}")


# --- the run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run's results. Equal specs have equal `run_id`s.

    A key whose default depends on the network (`depth`, `width`, …) is given as None for that
    default, and holds None afterwards only where the network does not use it.

    Raises:
        SpecError: one line with the key, the value and what is allowed.
    """

    network: NetworkSpec = key(NetworkSpec, None, "cifar, imagenet, mlp")
    depth: int | None = key(
        None, _integer(1), "weight layers: 6n+2 for cifar; 18, 34, 50, 101, 152 for imagenet"
    )
    width: int | None = key(None, _integer(1), "channels of the first stage, or of a layer (mlp)")
    skip: str | None = key(None, _choice(SKIPS, _SKIP_ALIASES), "true, false, or a kind of skip")
    skip_forward: float | None = key(None, _real(), "a: dose of the skip in the forward pass")
    skip_backward: float | None = key(None, _real(), "b: dose of the skip in the backward pass")
    branch_scale: float | None = key(None, _real(), "β: factor on every branch")
    branch_layers: int | None = key(
        None, _integer(1), "mlp with skips: linear maps a branch, 1 or 2"
    )
    drop_rate: float | None = key(
        None, _real(0, 1, below=True), "stochastic_depth: chance that the last block is dropped"
    )
    order: str | None = key(
        None, _choice(ORDERS), "activation after the addition or before the weights"
    )
    norm: str | None = key(None, _choice(NORMS), "normalisation")
    groups: int | None = key(None, _integer(1), "norm=group: groups of channels")
    activation: str | None = key(None, _choice(ACTIVATIONS), "after a normalised layer")
    negative_slope: float | None = key(None, _real(), "leaky_relu: slope below zero")
    init: str | None = key(None, _choice(INITIALIZATIONS), "initialisation of the weights")
    sigma_w: float | None = key(None, _real(0), "gaussian: weights' deviation times √fan_in")
    sigma_b: float | None = key(None, _real(0), "gaussian: biases' deviation")
    trainable_blocks: int | None = key(
        None, _integer(1), "train the last so many blocks and the readout alone; all by default"
    )
    padding: str | None = key(None, _choice(PADDINGS), "padding of convolutions")
    shortcut: str | None = key(
        None,
        _choice(SHORTCUTS),
        "cifar: where shapes change, subsample and pad, or projection",
    )
    weights: str | None = key(
        None, _text, "imagenet: file of parameters to start from; a run is known by its content"
    )
    weights_digest: str | None = key(
        None, _digest, "imagenet: SHA-256 that the file must have, its first 16 digits [its own]"
    )

    data: DataSpec = key(DataSpec, None, "what to train on")
    batch_size: int = key(64, _integer(1), "images a batch", omit=64)
    accumulate: int = key(1, _integer(1), "batches an update", omit=1)

    optimizer: str = key("sgd", _choice(OPTIMIZERS), "update rule", omit="sgd")
    lr: float = key(0.02, _real(0, above=True), "learning rate, at its peak", omit=0.02)
    momentum: float | None = key(None, _real(0, 1, below=True), "sgd: momentum")
    weight_decay: float = key(1e-4, _real(0), "weight decay", omit=1e-4)
    schedule: str = key(
        "one_cycle", _choice(SCHEDULES), "of the learning rate over steps", omit="one_cycle"
    )
    milestones: tuple[int, ...] | None = key(
        None, _milestones, "step: the steps at which the rate is divided by ten"
    )
    warmup: int = key(0, _integer(0), "steps over which the rate rises first", omit=0)
    warmup_lr: float | None = key(
        None, _real(0, above=True), "constant rate of the warm-up, in place of one that rises"
    )
    clip: float | None = key(None, _real(0, above=True), "clip the total gradient norm to this")
    precision: str = key(
        "fp32", _choice(PRECISIONS, _PRECISION_ALIASES), "number format", omit="fp32"
    )
    epochs: int | None = key(None, _integer(1), "passes over the training data")
    max_steps: int | None = key(
        None, _integer(0), "updates, in place of epochs; 0 measures initialisation alone"
    )
    on_divergence: str = key(
        "stop", _choice(ON_DIVERGENCE), "when loss or gradient is not finite", omit="stop"
    )
    seed: int = key(0, _integer(0), "seed of parameters and batch order", omit=0)

    record: RecordSpec = key(RecordSpec, None, "default, all, none")
    probe: ProbeSpec = key(ProbeSpec, None, "a measurement with passes of its own")

    def __post_init__(self) -> None:
        for name, kind in PARTS.items():
            object.__setattr__(self, name, _part(kind, getattr(self, name), f"{name}."))
        _check_all(self)
        network = self.network.name
        _fill(self, NETWORK_KEYS[network], _NETWORK_ONLY, "", f"network={network}")
        if network != "custom":
            self._canonical_skip()
            self._check_depth()
            self._check_weights()
        self._check_conditional_keys()
        self._check_mirrored()
        self._check_training()

    def _canonical_skip(self) -> None:
        skip, forward, backward = self.skip, self.skip_forward, self.skip_backward
        preset = PRESETS.get(str(skip), (None, None))
        if skip in PRESETS or skip == "dosed":
            forward = preset[0] if forward is None else forward
            backward = preset[1] if backward is None else backward
            if forward is None or backward is None:
                raise SpecError("skip=dosed: set both skip_forward and skip_backward")
            named = [name for name, pair in PRESETS.items() if pair == (forward, backward)]
            skip = named[0] if named else "dosed"
        elif forward is not None or backward is not None:
            raise SpecError(f"skip_forward, skip_backward: skip={skip} has no doses")
        scaled = self.branch_scale if forward is not None else None
        drop_rate = self.drop_rate if skip == "stochastic_depth" else None
        shown = {
            "skip": skip, "skip_forward": forward, "skip_backward": backward,
            "branch_scale": scaled, "drop_rate": drop_rate,
            "branch_layers": None if skip == "none" else self.branch_layers,
            "shortcut": None if skip == "none" else self.shortcut,
        }  # fmt: skip
        if skip in ("rezero", "highway", "stochastic_depth") and self.branch_scale != 1.0:
            raise SpecError(f"branch_scale={self.branch_scale:g}: skip={skip} has no factor β")
        for name, value in shown.items():
            object.__setattr__(self, name, value)

    def _check_depth(self) -> None:
        network, depth = self.network.name, self.depth
        assert depth is not None
        if network == "cifar" and (depth < 8 or (depth - 2) % 6):
            below = max(8, depth - (depth - 2) % 6)
            raise SpecError(
                f"depth={depth}: allowed is 6n+2 for network=cifar; "
                f"nearest are {below} and {below + 6}"
            )
        if network == "imagenet" and depth not in IMAGENET_DEPTHS:
            nearest = sorted(sorted(IMAGENET_DEPTHS, key=lambda known: abs(known - depth))[:2])
            raise SpecError(
                f"depth={depth}: allowed is one of 18, 34, 50, 101, 152 for network=imagenet; "
                f"nearest are {nearest[0]} and {nearest[1]}"
            )
        if network == "mlp":
            if depth < 2:
                raise SpecError("depth=1: allowed is a whole number from 2 for network=mlp")
            if self.branch_layers not in (None, 1, 2):
                raise SpecError(f"branch_layers={self.branch_layers}: allowed is 1, 2")
            if self.branch_layers == 2 and depth % 2:
                raise SpecError(
                    f"depth={depth}: branches of two layers want an even depth; "
                    f"nearest are {depth - 1} and {depth + 1}"
                )

    def _check_weights(self) -> None:
        """Know the file of parameters by its content, wherever it lies."""
        if self.weights is None:
            return
        if self.skip == "none":
            raise SpecError(f"weights={self.weights}: they are a residual network's, not skip=none")
        if self.weights_digest is None:
            object.__setattr__(self, "weights_digest", file_digest(self.weights))

    def _check_conditional_keys(self) -> None:
        defaults = {**NETWORK_KEYS[self.network.name], "momentum": 0.9, "milestones": ()}
        for name, (other, wanted) in _ONLY_WITH.items():
            if name not in defaults:
                continue
            value, default = getattr(self, name), defaults[name]
            if getattr(self, other) == wanted:
                object.__setattr__(self, name, default if value is None else value)
            elif value is not None and value != default:
                raise SpecError(f"{name}={_spelled(value)}: only {other}={wanted} uses it")
            else:
                object.__setattr__(self, name, None)
        if self.schedule == "step" and not self.milestones:
            raise SpecError("schedule=step: name the steps, milestones=[32000,48000]")
        width, groups = self.width, self.groups
        if width is not None and groups is not None and width % groups:
            raise SpecError(f"groups={groups}: does not divide width={width}")

    def _check_mirrored(self) -> None:
        """crelu doubles the features, which only the mlp's next linear map takes."""
        if self.activation == "crelu" and self.network.name != "mlp":
            raise SpecError("activation=crelu: only network=mlp has it")
        if self.activation == "crelu" and self.order == "post" and self.skip != "none":
            raise SpecError("order=post: activation=crelu with skips wants order=pre")
        if self.init == "looks_linear" and self.activation != "crelu":
            raise SpecError("init=looks_linear: only activation=crelu uses it")

    def _check_training(self) -> None:
        size, per_update = self.data.train_size, self.batch_size * self.accumulate
        if size is not None and per_update > size:
            product = f" × accumulate={self.accumulate}" if self.accumulate > 1 else ""
            raise SpecError(
                f"batch_size={self.batch_size}{product}: data={self.data.name} "
                f"has {size} training images"
            )
        if self.batch_size == 1 and self.norm == "batch" and self.network.name != "cifar":
            raise SpecError("batch_size=1: norm=batch has no statistics of one value a channel")
        if self.max_steps is not None:
            object.__setattr__(self, "epochs", None)
        elif self.epochs is None and self.probe.name in (None, *OF_TRAINED):
            object.__setattr__(self, "epochs", EPOCHS)
        elif self.epochs is None:
            object.__setattr__(self, "max_steps", 0)
        self._check_probe()
        if self.warmup and self.schedule == "one_cycle":
            raise SpecError(f"warmup={self.warmup}: schedule=one_cycle has a warm-up of its own")
        if self.warmup_lr is not None and not self.warmup:
            raise SpecError(f"warmup_lr={self.warmup_lr:g}: name its steps, warmup=400")

    def _check_probe(self) -> None:
        probe = self.probe.name
        if probe in OF_ONE_INPUT and self.norm == "batch":
            raise SpecError(f"norm=batch: probe={probe} is of one input, without batch statistics")
        autocast = self.precision in ("bf16", "fp16")
        if autocast and probe not in (None, "propagation", "displacement"):
            raise SpecError(f"precision={self.precision}: probe={probe} wants fp32 or fp64")
        if self.max_steps == 0 and self.probe.name in OF_TRAINED:
            raise SpecError(f"probe={self.probe.name}: says nothing of a network not trained")

    @property
    def run_id(self) -> str:
        """Ten hexadecimal digits: a hash of the recipe and of all keys not at their omit value."""
        named = {label: value for label, value, omit in _leaves(self) if value != omit}
        for name in ("weights", *(f"data.{name}" for name in self.data.incidental)):
            named.pop(name, None)
        text = json.dumps({"recipe": RECIPE, **named}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def __hash__(self) -> int:
        return hash(self.run_id)

    @property
    def name(self) -> str:
        """`<network>-<depth>-<skip>-s<seed>-<run_id>`: the run's directory in the store."""
        depth = "na" if self.depth is None else self.depth
        return f"{self.network.name}-{depth}-{self.skip or 'na'}-s{self.seed}-{self.run_id}"

    def claims_beyond(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """What a user's network is said to be (`depth`, `width`, `skip`) beyond its arguments.

        Runs are named and compared by these keys, but the network is made of its arguments alone: a
        value that is not among them says nothing true.
        """
        if self.network.name != "custom":
            return {}
        passed = list(_scalars(args))
        claims = {name: getattr(self, name) for name in NETWORK_KEYS["custom"]}
        return {name: v for name, v in claims.items() if v is not None and v not in passed}

    def check_files(self) -> None:
        """Raise SpecError, without reading them, where files of the run's are missing."""
        self.data.check_files()
        self.check_weights()

    def check_weights(self) -> None:
        """Raise SpecError where the run starts from a file that is not named."""
        if self.weights_digest is not None and self.weights is None:
            raise SpecError(
                f"weights_digest={self.weights_digest}: name the file that has it, weights=PATH"
            )

    def check_device(self, device: str) -> None:
        """Raise SpecError where that kind of device cannot compute the run."""
        if self.precision == "fp16" and device == "cpu":
            raise SpecError("precision=fp16: the CPU trains in fp32, bf16 or fp64")

    def to_dict(self) -> dict[str, Any]:
        """All keys that decide the results, with defaults written out, parts as nested mappings:
        the text of spec.json."""
        values = self.to_job()
        del values["weights"]
        for name in self.data.incidental:
            del values["data"][name]
        return values

    def to_job(self) -> dict[str, Any]:
        """All keys, those too that decide no result: what another process is told to compute.

        But not to fetch anything: whoever tells it has done so.
        """
        values = asdict(self)
        values["data"]["download"] = None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSpec:
        """The spec that `to_dict`, `to_job`, or a configuration with the same keys, describes."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise SpecError(f"{min(unknown)}: no such key")
        return cls(**values)

    def columns(self) -> dict[str, Any]:
        """The spec as one flat row: `data.seed` becomes `data_seed`, a part's name its own key."""
        return flatten(self.to_dict())

    def but(self, **changes: Any) -> RunSpec:
        """The same run with other values; what depended on the old ones takes its default anew."""
        stale = set(_NETWORK_ONLY) if "network" in changes else set()
        if "skip" in changes:
            stale |= {"skip_forward", "skip_backward", "drop_rate"}
        if "weights" in changes:
            stale.add("weights_digest")
        stale |= {name for name, (other, _) in _ONLY_WITH.items() if other in changes}
        return replace(self, **{**dict.fromkeys(stale), **changes})

    def updates(self, train_size: int) -> int:
        """Updates of the whole run on a training split of that size; a partial batch is dropped."""
        if self.max_steps is not None:
            return self.max_steps
        return (self.epochs or EPOCHS) * (train_size // (self.batch_size * self.accumulate))


PARTS: dict[str, type] = {"network": NetworkSpec, "data": DataSpec, "record": RecordSpec,
                          "probe": ProbeSpec}  # fmt: skip
_NETWORK_ONLY = tuple(dict.fromkeys(name for keys in NETWORK_KEYS.values() for name in keys))


@dataclass(frozen=True)
class SlurmSpec:
    """What a job asks Slurm for, with launcher=slurm. None leaves it to the cluster's defaults."""

    partition: str | None = key(None, _text, "slurm: partition")
    account: str | None = key(None, _text, "slurm: account to charge")
    qos: str | None = key(None, _text, "slurm: quality of service")
    constraint: str | None = key(None, _text, "slurm: features that a node must have")
    time: int | None = key(None, _integer(1), "slurm: minutes a job may take before it is requeued")
    memory: float | None = key(None, _real(0, above=True), "slurm: GB of memory a node")
    gpus: int | None = key(None, _integer(1), "slurm: GPUs a node")
    args: dict[str, Any] | None = key(
        None, _arguments, "slurm: any other options of sbatch, e.g. {nice:100}"
    )

    def __post_init__(self) -> None:
        _check_all(self, "slurm.")


@dataclass(frozen=True)
class Execution:
    """Where and how runs are computed: no part of a run's identity."""

    device: str = key("auto", _device, "auto (CUDA, else the CPU), cpu, cuda, cuda:1, mps")
    devices: int = key(1, _integer(1), "processes that share one run, a device each, on each node")
    nodes: int = key(1, _integer(1), "slurm: nodes that share one run")
    threads: int | str = key(
        "auto", _auto(_integer(1)), "a run's CPU threads: all cores for one run, one in a sweep"
    )
    logger: str = key("none", _choice(LOGGERS), "a mirror of the run's progress")
    launcher: str = key("local", _choice(LAUNCHERS), "where a sweep runs")
    jobs: int | str = key(
        "auto", _auto(_integer(1)), "runs side by side: as many as cores; slurm: jobs, no limit"
    )
    jobs_per_device: int = key(1, _integer(1), "runs side by side on one GPU")
    runs_per_job: int = key(1, _integer(1), "slurm: runs that one job computes, one after another")
    timeout: float | None = key(
        None, _real(0, above=True), "seconds a run of a sweep may take; then it has failed"
    )
    retry_failed: bool = key(False, _flag, "try runs again that failed in an earlier sweep")
    fail_fast: bool = key(False, _flag, "end the sweep at the first failure")
    runs_dir: str = key("runs", _text, "the store")
    slurm: SlurmSpec = key(SlurmSpec, None, "what a job asks Slurm for")

    def __post_init__(self) -> None:
        object.__setattr__(self, "slurm", _part(SlurmSpec, self.slurm, "slurm."))
        _check_all(self)
        if self.launcher != "slurm":
            if self.nodes > 1:
                raise SpecError(f"nodes={self.nodes}: only launcher=slurm has nodes")
            if self.slurm != SlurmSpec():
                raise SpecError("slurm: only launcher=slurm uses its keys")


def file_digest(path: str) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256: what a run knows `weights` by.

    Raises:
        SpecError: it is not there or cannot be read.
    """
    try:
        about = Path(path).stat()
        return _file_digest(path, about.st_mtime_ns, about.st_size)
    except OSError as error:
        raise SpecError(f"weights={path}: {error.strerror or error}") from None


@lru_cache
def _file_digest(path: str, changed: int, size: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _leaves(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for item in fields(part):
        value = getattr(part, item.name)
        if hasattr(value, "__dataclass_fields__"):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value, item.metadata["omit"]


def _scalars(value: Any) -> Iterator[Any]:
    """All values of nested mappings and lists; a boolean as the skip that it stands for."""
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _scalars(item)
    else:
        yield _SKIP_ALIASES[value] if isinstance(value, bool) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by underscores; `name` of a part stands under the part's own key.

    A network's `args`, the one free mapping, becomes its JSON text.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        label = prefix.rstrip("_") if name == "name" and prefix else prefix + name
        if label == "network_args":
            flat[label] = None if value is None else json.dumps(value, sort_keys=True)
        elif isinstance(value, Mapping):
            flat.update(flatten(value, f"{label}_"))
        else:
            flat[label] = str(list(value)) if isinstance(value, list | tuple) else value
    return flat
