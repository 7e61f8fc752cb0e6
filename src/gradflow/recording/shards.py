"""Parameters of which each rank has a part, as FSDP2 leaves them: a rank's norm is not the norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradflow.ranks import Ranks
from gradflow.recording.buffers import Drained, over_ranks
from gradflow.recording.norms import gather
from gradflow.recording.quantities import Quantity


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor. To import its class would take longer than to ask like this."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    part: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return part


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks that a model which was made parallel is trained by: all there are."""
    parallel = isinstance(model, DistributedDataParallel) or any(
        map(is_sharded, model.parameters())
    )
    if parallel and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def share(parameter: Tensor | None, world: int) -> float:
    """What a rank's norm of it counts by, so that √Σ² over all ranks is the whole one's norm.

    1/√copies, where each part lies on as many ranks.
    """
    parts = 1
    if parameter is not None and is_sharded(parameter):
        placed: Any = parameter
        sizes = placed.device_mesh.shape
        placements = zip(sizes, placed.placements, strict=True)
        parts = math.prod(size for size, placement in placements if placement.is_shard())
    return math.sqrt(parts / world)


def reduce(drained: Drained, chosen: Sequence[Quantity], world: int, device: torch.device) -> None:
    """Make of what the ranks have of their parts of parameters that of the whole, on all of them.

    Every rank calls this with as many steps.
    """
    mine = np.where(drained.measured, drained.values, 0.0), drained.measured.astype(np.float64)
    values, measured = gather(torch.from_numpy(np.stack(mine)).to(device), world).cpu().unbind(1)
    for column, quantity in enumerate(chosen):
        whole = over_ranks(values[..., column], quantity.reduction)
        counts = quantity.reduction in ("sum", "share")  # parts of which ranks have copies
        drained.values[..., column] = (whole.round() if counts else whole).numpy()
    drained.measured[:] = measured.sum(dim=0).numpy() > 0
