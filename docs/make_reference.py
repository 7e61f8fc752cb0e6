"""Writes reference.md from the docstrings of the public names: `make docs`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gradflow
from gradflow import diagnosis, networks, store, theory
from gradflow.recording import divergence, probes, schedules
from gradflow.recording.quantities import QUANTITIES
from gradflow.spec import Execution
from gradflow.sweep import SweepResult

PAGE = Path(__file__).with_name("reference.md")
HEAD = """\
# Reference

Written from the docstrings by `make docs`; do not edit. Shapes, units, and whether a norm is
squared stand with each name. Errors are `GradflowError` or its kinds: `SpecError` (a value that is
not allowed) and `StoreError` (a file).
"""
WIDTH = 96


def _defined(module: ModuleType) -> list[Any]:
    """The functions and classes that a module defines, in its order."""
    public = [value for name, value in vars(module).items() if not name.startswith("_")]
    return [value for value in public if getattr(value, "__module__", "") == module.__name__]


# Title -> how its names are reached, and these.
SECTIONS: dict[str, tuple[str, list[Any]]] = {
    "Recording": (
        "gradflow",
        [gradflow.Recorder, gradflow.GradientFlow, gradflow.diagnose],
    ),
    "Recording: when, and what was found": (
        "gradflow.recording",
        [schedules.every, divergence.Divergence],
    ),
    "Diagnoses": (
        "gradflow.diagnosis",
        [diagnosis.Examination, diagnosis.Diagnosis, diagnosis.diagnose_run, diagnosis.diagnoses],
    ),
    "Runs": ("gradflow", [gradflow.RunSpec, gradflow.run, gradflow.sweep]),
    "Runs: settings and results": ("gradflow", [Execution, SweepResult]),
    "Reading": ("gradflow", [gradflow.load_runs]),
    "Reading: what it gives": ("gradflow.store", [store.Runs, store.Run]),
    "Networks": ("gradflow", [gradflow.Skip, gradflow.build_network]),
    "Networks: parts": (
        "gradflow.networks",
        [getattr(networks, n) for n in networks.__all__ if n not in gradflow.__all__],
    ),
    "Probes": ("gradflow.probes", [getattr(probes, n) for n in probes.__all__]),
    "Theory": ("gradflow.theory", _defined(theory)),
}  # fmt: skip

# --- a name ---------------------------------------------------------------------------------------


def entry(prefix: str, item: Any) -> Iterator[str]:
    """A name's heading, signature and docstring, and after a class those of its members."""
    yield f"### {item.__name__}\n"
    if is_dataclass(item) and any("help" in one.metadata for one in fields(item)):
        yield _prose(item)
        yield from _keys(item)
    else:
        yield _code(f"{prefix}.{item.__name__}", item)
        yield _prose(item)
    for name, member in _members(item):
        told = member.fget if isinstance(member, property) else member
        yield f"**`.{name}`**\n" if told is not member else _code(f".{name}", member, drop="self")
        yield _prose(told)


def _members(item: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that have a docstring, in the order of their definition."""
    if not inspect.isclass(item):
        return
    for name, member in vars(item).items():
        plain = member.fget if isinstance(member, property) else member
        if not name.startswith("_") and inspect.isfunction(plain) and plain.__doc__:
            yield name, member


def _keys(item: Any) -> Iterator[str]:
    """The fields of a spec, with their defaults and help."""
    yield "| field | default | |\n|---|---|---|"
    for one in fields(item):
        default = "" if not isinstance(one.default, str | int | float) else f"`{one.default}`"
        yield f"| `{one.name}` | {default} | {one.metadata['help'].replace('|', chr(92) + '|')} |"
    yield ""


def _code(name: str, item: Any, drop: str = "") -> str:
    """Its call, as Python: on one line, or a parameter a line."""
    signature = inspect.signature(item)
    shown = [_parameter(p) for p in signature.parameters.values() if p.name != drop]
    kinds = [p.kind for p in signature.parameters.values() if p.name != drop]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        last = max(i for i, k in enumerate(kinds) if k is inspect.Parameter.POSITIONAL_ONLY)
        shown.insert(last + 1, "/")
    result = signature.return_annotation
    tail = "" if result is signature.empty or inspect.isclass(item) else f" -> {_type(result)}"
    line = f"{name}({', '.join(shown)}){tail}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {one},\n" for one in shown) + f"){tail}"
    return f"```text\n{line}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    text = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
    if parameter.annotation is not parameter.empty:
        text += f": {_type(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {parameter.default!r}"
    return text


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


# --- a docstring ----------------------------------------------------------------------------------


def _prose(item: Any) -> str:
    """A docstring as Markdown: its sections (`Args:`, `Raises:`, …) become lists."""
    text = inspect.cleandoc(item.__doc__ or "")
    parts = re.split(r"^([A-Z][\w ]*):\n(?=    )", text, flags=re.MULTILINE)
    written = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        block, rest = _indented(body)
        listed = title not in ("Returns", "Yields")
        written += [f"*{title}:*", _list(block) if listed else textwrap.dedent(block).strip(), rest]
    return "\n\n".join(filter(None, written)) + "\n"


def _indented(body: str) -> tuple[str, str]:
    """The indented lines that a section begins with, and what comes after them."""
    lines = body.split("\n")
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return "\n".join(lines[:end]), "\n".join(lines[end:]).strip()


def _list(block: str) -> str:
    items: list[str] = []
    for line in textwrap.dedent(block).strip("\n").split("\n"):
        if line.startswith(" ") or not line:
            items[-1] += f"\n  {line.strip()}"
        else:
            items.append(line)
    return "\n".join(f"- {re.sub(r'^([^:`]+):', r'`' + chr(92) + r'1`:', item)}" for item in items)


# --- the page -------------------------------------------------------------------------------------


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, (prefix, items) in SECTIONS.items():
        lines.append(f"## {title}\n")
        for item in items:
            lines += entry(prefix, item)
    lines += ["## Quantities\n", "| name | table | unit | meaning |\n|---|---|---|---|"]
    lines += [f"| `{q.name}` | {q.table} | {q.unit} | {q.meaning} |" for q in QUANTITIES.values()]
    return "\n".join(lines).rstrip() + "\n"


def undocumented() -> list[str]:
    """Public names of the page without a docstring."""
    return [item.__name__ for _, items in SECTIONS.values() for item in items if not item.__doc__]


if __name__ == "__main__":
    PAGE.write_text(page())
