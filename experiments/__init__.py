"""One file a published finding; `python -m experiments` lists and runs them.

A file here that has a `FINDING` is a finding, known by the file's name. Its docstring says the
claim (first paragraph), `Source:`, `Measured:`, `Deviations:` and `Cost:`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

from gradflow.errors import GradflowError
from gradflow.findings import CHAPTERS, Finding

HERE = Path(__file__).resolve().parent


def load() -> dict[str, Finding]:
    """All findings by id, in the order of the course.

    Raises:
        GradflowError: a file that cannot be imported.
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
            text = module.__doc__ or ""
            found[path.stem] = replace(module.FINDING, id=path.stem, text=text)
    chapters = list(CHAPTERS)
    return dict(sorted(found.items(), key=lambda item: chapters.index(item[1].chapter)))
