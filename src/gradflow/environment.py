"""Under which circumstances a run was computed: versions, device, threads, commit."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

LOG = "GRADFLOW_LOG"
"""The environment variable by which a job of a cluster tells its processes where its log lies."""

_PACKAGES = ("torch", "pytorch-lightning", "numpy", "gradflow-harness")


def environment(device: str, threads: int, devices: int = 1, nodes: int = 1) -> dict[str, Any]:
    """What run.json says of the place a run was computed in.

    Args:
        devices, nodes: how many devices of each of how many nodes shared it, `threads` each.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "device": device,
        "threads": threads,
        "devices": devices,
        "nodes": nodes,
        "git": git_state(),
        **({"slurm": slurm_job()} if slurm_job() else {}),
    }


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def slurm_job() -> dict[str, str]:
    """The Slurm job that this process belongs to, its node and its log; empty outside of one."""
    of, place = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{of}_{place}" if of and place else os.environ.get("SLURM_JOB_ID")
    said = {"job": job, "node": os.environ.get("SLURMD_NODENAME"), "log": os.environ.get(LOG)}
    return {name: value for name, value in said.items() if value and job}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def git_state() -> dict[str, Any] | None:
    """Commit of gradflow's checkout and whether it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5, check=True
    )
    return done.stdout.strip()
