"""The documentation's tables name tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_each_row_of_the_correctness_tables_is_held_by_a_test() -> None:
    rows = re.findall(r"^\|.*\| (.*) \|$", (ROOT / "docs" / "recording.md").read_text(), re.M)
    named = [row.strip("`") for row in rows if row not in ("test",) and not row.startswith("-")]
    assert len(named) > 30
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in written] == []
