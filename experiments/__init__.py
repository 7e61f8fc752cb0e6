"""One file a published finding; `python -m experiments` lists and runs them.

A file here that has a `FINDING` is a finding, known by the file's name. Its docstring says the
claim (first paragraph), `Source:`, `Measured:`, `Deviations:` and `Cost:`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

from gradflow.errors import GradflowError, SpecError
from gradflow.findings import CHAPTERS, FIRST_SEED, Finding

HERE = Path(__file__).resolve().parent
PARTS = ("Source", "Measured", "Deviations", "Cost")
"""Paragraphs that a finding's docstring has."""


def load() -> dict[str, Finding]:
    """All findings by id, in the order of the course.

    Raises:
        GradflowError: a file that cannot be imported, or whose finding is not complete.
    """
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        try:
            module = importlib.import_module(f"experiments.{path.stem}")
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise GradflowError(f"{path.name}: {said}") from error
        if hasattr(module, "FINDING"):
            found[path.stem] = _checked(path, module.FINDING, module.__doc__ or "")
    chapters = list(CHAPTERS)
    return dict(sorted(found.items(), key=lambda item: chapters.index(item[1].chapter)))


def _checked(path: Path, finding: object, text: str) -> Finding:
    if not isinstance(finding, Finding):
        raise GradflowError(f"{path.name}: FINDING is a {type(finding).__name__}, not a Finding")
    finding = replace(finding, id=path.stem, text=text)
    for label in PARTS:
        if not finding.part(label):
            raise GradflowError(f"{path.name}: its docstring has no paragraph '{label}:'")
    for arm in finding.specs:
        try:
            finding.spec(arm, FIRST_SEED)
        except (TypeError, SpecError) as error:
            raise GradflowError(f"{path.name}: {arm}: {error}") from None
    return finding
