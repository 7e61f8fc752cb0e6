"""Hydra's schema from the specs, and Hydra's config to the specs: with `cli` the only rooms that
know Hydra and OmegaConf.

The schema carries keys and defaults alone. Types and allowed values are checked in one place, by
`RunSpec` and `Execution`, so that a bad value gets one message wherever it comes from.
"""

from __future__ import annotations

from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from gradflow.errors import SpecError
from gradflow.spec import PARTS, Execution, RunSpec

_NAMED = {part: kind().name for part, kind in PARTS.items() if kind().name is not None}
"""The parts that are chosen by a preset's name, and the usual choice."""


def register_schema() -> None:
    """Make the schema known to Hydra, under the name that conf/config.yaml starts from."""
    ConfigStore.instance().store(name="schema", node=_schema(RunSpec, Execution))


def conf_directory() -> Path:
    """Where the presets lie: beside the code in a wheel, at the top of a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "conf"
    return packaged if packaged.is_dir() else here.parents[1] / "conf"


def specs_from(config: DictConfig) -> tuple[RunSpec, Execution]:
    """The run and its execution that a composed config describes.

    Raises:
        SpecError: a value that is not allowed, or a preset that does not say on what it builds.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    for part in _NAMED:
        if values[part]["name"] is None:
            raise SpecError(f"{part}: the preset has no name, say `name: {_NAMED[part]}`")
    execution = {item.name: values.pop(item.name) for item in fields(Execution)}
    return RunSpec.from_dict(values), Execution(**execution)


def known_keys() -> list[str]:
    """All keys of the command line, dotted."""
    return [*_keys(RunSpec), *_keys(Execution), "recipe"]


def recipes() -> dict[str, str]:
    """The recipes, values of many keys at once, by name: what the first line of each says."""
    lines = {
        path.stem: [line for line in path.read_text().splitlines() if not line.startswith("# @")]
        for path in sorted((conf_directory() / "recipe").glob("*.yaml"))
    }
    return {name: found[0].removeprefix("# ") for name, found in lines.items()}


def _keys(kind: type, prefix: str = "") -> list[str]:
    names = []
    for item in fields(kind):
        names.append(prefix + item.name)
        if is_dataclass(item.default_factory):
            names += _keys(item.default_factory, f"{prefix}{item.name}.")
    return names


def _schema(*kinds: type) -> Any:
    """A dataclass type with the fields of `kinds`, every leaf of type Any."""
    items: list[Any] = []
    for kind in kinds:
        for item in fields(kind):
            factory = item.default_factory
            if is_dataclass(factory) and isinstance(factory, type):
                part = _schema(factory)
                items.append((item.name, part, field(default_factory=part)))
            else:
                # Each preset names what it builds on; one that does not must not get the default.
                named = item.name == "name" or item.default is MISSING
                default = None if named else item.default
                items.append((item.name, Any, field(default=default)))
    return make_dataclass(f"{kinds[0].__name__}Schema", items)
