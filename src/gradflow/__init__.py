"""gradflow: where do gradients vanish or explode, does depth hurt, how much does a skip help?

The public names are imported when first used: `import gradflow` alone does not load torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradflow import diagnosis, networks, theory
    from gradflow.networks import Skip, build_network
    from gradflow.recording import Recorder, probes
    from gradflow.recording.diagnose import diagnose
    from gradflow.run import run
    from gradflow.spec import RunSpec
    from gradflow.store import load_runs
    from gradflow.sweep import sweep
    from gradflow.training.callback import GradientFlow

_HOMES = {
    "GradientFlow": "gradflow.training.callback",
    "Recorder": "gradflow.recording",
    "RunSpec": "gradflow.spec",
    "Skip": "gradflow.networks",
    "build_network": "gradflow.networks",
    "diagnose": "gradflow.recording.diagnose",
    "load_runs": "gradflow.store",
    "run": "gradflow.run",
    "sweep": "gradflow.sweep",
}
_MODULES = {
    "networks": "gradflow.networks",
    "diagnosis": "gradflow.diagnosis",
    "probes": "gradflow.recording.probes",
    "theory": "gradflow.theory",
}

__version__ = "0.1.0"
__all__ = [
    "GradientFlow",
    "Recorder",
    "RunSpec",
    "Skip",
    "build_network",
    "diagnose",
    "diagnosis",
    "load_runs",
    "networks",
    "probes",
    "run",
    "sweep",
    "theory",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'gradflow' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """`gradflow.run` and `gradflow.sweep` stay functions when the modules of that name load."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("run", "sweep") and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
