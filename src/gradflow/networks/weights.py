"""Parameters from a file: what others have trained, for a network of the same names and shapes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import SpecError


def load_weights(network: nn.Module, path: str, digest: str) -> None:
    """Give `network` the parameters and buffers of a file that `torch.save(state_dict)` wrote.

    The file is read as data (`weights_only`): it cannot run code. BatchNorm's counter of batches,
    which files from before 2018 lack, may be missing.

    Raises:
        SpecError: no file, another one than that of the digest, one that is no state_dict, or one
            of a network of other names or shapes, of which the first is named.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SpecError(f"weights={path}: {error.strerror or error}") from None
    found = hashlib.sha256(content).hexdigest()[:16]
    if found != digest:
        raise SpecError(f"weights={path}: has the digest {found}, wanted is {digest}")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # in whatever way, and words that advise to let the file run its code
        raise SpecError(
            f"weights={path}: damaged, or not what torch.save makes of a state_dict"
        ) from None
    _check(network, path, state)
    network.load_state_dict(state, strict=False)


def _check(network: nn.Module, path: str, state: Any) -> None:
    tensors = isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors:
        raise SpecError(f"weights={path}: wants a state_dict, has {_kind(state)}")
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in state]
    missing = [name for name in missing if not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in state if name not in wanted]
    for what, names in (("lacks", missing), ("has, and the network has not,", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SpecError(f"weights={path}: {what} {names[0]}{more}")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{list(tensor.shape)}, the network's is {list(wanted[name].shape)}"
            raise SpecError(f"weights={path}: {name} is {shapes}")


def _kind(state: Any) -> str:
    """What a file holds in place of a state_dict: a checkpoint's keys help to find it."""
    if isinstance(state, Mapping):
        return f"keys {', '.join(map(str, list(state)[:4]))}"
    return f"a {type(state).__name__}"
