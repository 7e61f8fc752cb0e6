"""Data-parallel training: how ranks find each other, and what Lightning is told of them.

Each rank computes the gradient of its share of every batch, DDP averages them (Li et al. 2020,
arXiv 2006.15704), and all make the same update. Over gloo on CPUs, over NCCL on GPUs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed import distributed_c10d

from gradflow.errors import GradflowError
from gradflow.ranks import Group, Ranks

_JOINING = timedelta(minutes=10)
_WORKING = timedelta(days=1)
"""How long a rank waits for the others, which may have to wait for an evaluation: that one of them
has died is noticed by whoever started it."""
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}


@contextlib.contextmanager
def leading(group: Group) -> Iterator[None]:
    """Rank 0: wait for the others, and be one of them in this block."""
    if dist.is_initialized():
        raise GradflowError(
            f"devices={group.ranks.devices}: this process has a torch.distributed group already"
        )
    store = dist.TCPStore(
        "127.0.0.1",
        group.port,
        is_master=True,
        wait_for_workers=False,
        timeout=_JOINING,
        master_listen_fd=group.take_listener(),
    )
    others = [f"rank {rank}" for rank in range(1, group.ranks.world)]
    until = time.monotonic() + _JOINING.total_seconds()
    while not store.check(others):  # rather than in torch, which would not notice a death
        group.check()
        if time.monotonic() > until:
            raise GradflowError(f"devices={group.ranks.devices}: not all ranks have come")
        time.sleep(0.02)
    with _joined(group.ranks, store):
        group.abort = _abort
        yield


@contextlib.contextmanager
def following(ranks: Ranks, address: tuple[str, int]) -> Iterator[None]:
    """Any other rank: join rank 0, which is at `address`, for this block."""
    store = dist.TCPStore(*address, is_master=False, timeout=_JOINING)
    store.set(f"rank {ranks.rank}", "")
    with _joined(ranks, store):
        yield


@contextlib.contextmanager
def _joined(ranks: Ranks, store: dist.Store) -> Iterator[None]:
    # CPU tensors are exchanged too where the devices are GPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _on_loopback() if ranks.nodes == 1 else contextlib.nullcontext():
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=_JOINING
        )
    # Public from torch 2.14 on, where the older name warns.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_timeout(_WORKING, None)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """On one node nothing goes through the network, whatever the machine's name resolves to."""
    name = "GLOO_SOCKET_IFNAME"
    loopback = _LOOPBACK.get(sys.platform)
    if name in os.environ or loopback is None:
        yield
        return
    os.environ[name] = loopback
    try:
        yield
    finally:
        del os.environ[name]


def _abort() -> None:
    """End NCCL's operations, which would wait for a dead rank; gloo's end by themselves."""
    world = dist.group.WORLD
    if world is not None and torch.cuda.is_available():
        world.abort()


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def trainer_options(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Arguments of a Trainer, by which it trains on its rank's device together with the others.

    Parameters that a step does not use are looked for: branches that a network leaves out in some
    steps have some, and only so do DDP's buckets, by which sums are made, stay as they are from the
    first update on, so that a resumed run adds up in the same order.
    """
    cuda = device.type == "cuda"
    accelerator = "gpu" if cuda else device.type
    if ranks.world == 1:
        return {"accelerator": accelerator, "devices": [device.index or 0] if cuda else 1}
    strategy = DDPStrategy(
        process_group_backend="nccl" if cuda else "gloo",
        find_unused_parameters=True,
    )
    return {
        "accelerator": accelerator,
        "devices": ranks.devices,
        "num_nodes": ranks.nodes,
        "strategy": strategy,
        "plugins": [_Cluster(ranks)],
    }


class _Cluster(ClusterEnvironment):
    """Tells Lightning of ranks that exist already, whatever scheduler it would detect."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"  # of no use: the process group is there

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._ranks.world

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self._ranks.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self._ranks.local_rank

    def node_rank(self) -> int:
        return self._ranks.node
