"""The text of `python -m gradflow --help`, written from the specs' own fields."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, fields
from typing import Any

from gradflow.spec import (
    DATA_KEYS,
    EPOCHS,
    NETWORK_KEYS,
    PROBE_KEYS,
    DataSpec,
    EverySpec,
    Execution,
    NetworkSpec,
    ProbeSpec,
    RecordSpec,
    RunSpec,
    SlurmSpec,
)

_HEAD = """\
gradflow: train matched plain and residual networks and record how the gradient flows.

  python -m gradflow depth=152 skip=false                          one run
  python -m gradflow -m depth=20,56,152 skip=true,false seed=0,1,2  a sweep
  python -m gradflow depth=56 skip=false max_steps=0               initialisation alone: seconds
  python -m gradflow.report runs                                   the report over all runs

Keys, as KEY=VALUE, with their defaults:"""

_TAIL = """\
Every run lies in RUNS_DIR/<network>-<depth>-<skip>-s<seed>-<id>; one that is done is not run again.
Hydra's own: -m sweep, --cfg job show the configuration, --config-dir DIR presets of yours:
docs/configuration.md."""

_TITLES = {
    "network": "Network",
    "data": "Data",
    "optimizer": "Training",
    "record": "Recording",
    "probe": "Probes (measured at initialisation, unless epochs or max_steps is set)",
}


# Defaults that apply only where another key leaves room for them.
_LATE = {"epochs": str(EPOCHS), "momentum": "0.9"}


def text() -> str:
    """The whole help, grouped, at most 100 columns wide."""
    lines = [_HEAD, "", *_recipes()]
    for item in fields(RunSpec):
        if item.name in _TITLES:
            lines += ["", f"{_TITLES[item.name]}:"]
        if item.name == "network":
            lines += _part("network", NetworkSpec, RunSpec)
        elif item.name == "data":
            lines += _part("data", DataSpec, RunSpec)
        elif item.name == "record":
            lines += _part("record", RecordSpec, RunSpec)
            lines += [_line(f"record.every.{rate.name}", rate) for rate in fields(EverySpec)]
        elif item.name == "probe":
            lines += _part("probe", ProbeSpec, RunSpec)
        else:
            lines.append(_line(item.name, item))
    lines += ["", "Execution (no part of a run's identity):"]
    lines += [_line(item.name, item) for item in fields(Execution) if item.name != "slurm"]
    lines += [_line(f"slurm.{item.name}", item) for item in fields(SlurmSpec)]
    return "\n".join([*lines, "", _TAIL])


def _recipes() -> list[str]:
    """The recipes, each with the first line of its file."""
    from gradflow.config import recipes

    lines = [
        "Recipes (conf/recipe):",
        _entry("recipe", "values for many keys; those named beside it win [none]"),
    ]
    return lines + [_entry(f"  {name}", about) for name, about in recipes().items()]


def _part(name: str, kind: Any, owner: Any) -> list[str]:
    items = [item for item in fields(kind) if item.name not in ("name", "every")]
    chosen = kind.__dataclass_fields__["name"]
    return [_line(name, chosen), *(_line(f"{name}.{item.name}", item) for item in items)]


def _line(label: str, item: Any) -> str:
    words = item.metadata["help"]
    allowed = getattr(item.metadata["check"], "allowed", None)
    if allowed is not None:
        words += f": {', '.join(name for name in allowed if name != 'custom')}"
    default = _default(label, item)
    words += f" [{default}]" if default else ""
    return _entry(label, words)


def _entry(label: str, words: str) -> str:
    return textwrap.fill(
        words, width=98, initial_indent=f"  {label:<22}", subsequent_indent=" " * 24
    )


def _default(label: str, item: Any) -> str:
    name = label.rpartition(".")[2]
    if label in _LATE:
        return _LATE[label]
    for part, every in {"data.": DATA_KEYS, "probe.": PROBE_KEYS}.items():
        if label.startswith(part):
            usual = (keys.get(name) for keys in every.values())
            return next((str(value) for value in usual if value and value is not True), "")
    if name in NETWORK_KEYS["cifar"] or name in NETWORK_KEYS["mlp"]:
        values = {
            network: keys[name]
            for network, keys in NETWORK_KEYS.items()
            if keys.get(name) is not None
        }
        if len(set(values.values())) == 1:
            return str(next(iter(values.values())))
        return ", ".join(f"{network} {value}" for network, value in values.items())
    default = item.default
    return "" if default in (None, MISSING) else f"{default}"
