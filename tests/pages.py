"""The documentation's pages: their blocks of code, run as a reader would run them.

Python blocks of a page share one scope, from the top to the bottom; commands run in a shell, in the
same directory. A block of text after a block of code is what that printed, `…` standing for what is
left out. A comment before a block says how it is treated:

    <!-- slow: why -->      by the slow tests alone, which run the whole page as it is written
    <!-- not run: why -->   by no test; `test_docs.NOT_RUN` lists these
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "bash")

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>slow|not run): (?P<reason>.*?) -->\n)?"
    r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: `kind` is its language, `mark` is empty, `slow` or `not run`."""

    kind: str
    text: str
    mark: str
    reason: str
    line: int

    @property
    def commands(self) -> list[str]:
        """Of a shell's block: its lines, continued ones put together, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            found["kind"],
            found["text"],
            found["mark"] or "",
            found["reason"] or "",
            text.count("\n", 0, found.start("text")),
        )
        for found in _BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def run(page: Path, directory: Path, *, slow: bool) -> dict[str, Any]:
    """Run a page's blocks in a directory, which is the working directory; its Python scope."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    said: str | None = None
    for block in blocks(page):
        where = f"{name(page)}:{block.line}"
        if block.kind == "text":
            assert said is None or _matches(block.text, said), f"{where}: printed was\n{said}"
            said = None
        elif block.kind in RUN:
            skipped = block.mark == "not run" or (block.mark == "slow" and not slow)
            said = None if skipped else _printed(block, where, scope, directory, slow)
    return scope


def _printed(block: Block, where: str, scope: dict[str, Any], directory: Path, slow: bool) -> str:
    if block.kind == "bash":
        own = all(command.startswith("python -m gradflow ") for command in block.commands)
        return _here(block, where) if own and not slow else _in_shell(block, where, directory)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.text, where, "exec"), scope)
    return out.getvalue()


def _here(block: Block, where: str) -> str:
    """Commands of gradflow's in this process, which has its libraries loaded."""
    from gradflow import cli

    out = io.StringIO()
    for command in block.commands:
        with contextlib.redirect_stdout(out):
            code = cli.main(shlex.split(command, comments=True)[3:])
        assert code == 0, f"{where}: {command}"
    return out.getvalue()


def _in_shell(block: Block, where: str, directory: Path) -> str:
    """In a shell whose `python` is this one, and which knows the checkout's packages."""
    programs = directory.parent / f"{directory.name}-bin"
    programs.mkdir(exist_ok=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    paths = (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=directory,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join(filter(None, paths)),
        },
        check=False,
    )
    assert done.returncode == 0, f"{where}: {done.stdout}\n{done.stderr}"
    return done.stdout


_MEASURED = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+")
_TOLERANCE = 0.1


def _matches(expected: str, said: str) -> bool:
    """Whether that text was printed, in any spacing; `…` stands for anything.

    Numbers that are no integers are equal to a tenth: behind fifty layers rounding alone, which
    differs by processor and number of threads, changes them by some hundredths.
    """
    parts = re.split(rf"( ?… ?|{_MEASURED.pattern})", f"…{' '.join(expected.split())}")
    return _begins(" ".join(said.split()), [part for part in parts if part])


def _begins(said: str, parts: list[str]) -> bool:
    if not parts:
        return True
    part, *rest = parts
    if "…" in part:
        return any(_begins(said[start:], rest) for start in range(len(said) + 1))
    if not _MEASURED.fullmatch(part):
        return said.startswith(part) and _begins(said[len(part) :], rest)
    found = _MEASURED.match(said)
    close = found and math.isclose(float(part), float(found[0]), rel_tol=_TOLERANCE)
    return bool(found and close and _begins(said[found.end() :], rest))
