"""The documentation's examples run, and its tables name what is there."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from gradflow.recording.quantities import DETAILS
from gradflow.spec import DATA, PUBLIC
from gradflow.spec import DETAILS as NAMES

ROOT = Path(__file__).resolve().parents[1]
RECORDING = (ROOT / "docs" / "recording.md").read_text()
DATA_PAGE = (ROOT / "docs" / "data.md").read_text()


def section(title: str) -> str:
    return RECORDING.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_each_row_of_the_correctness_tables_is_held_by_a_test() -> None:
    tables = section("Models") + section("Ways to train")
    rows = re.findall(r"^\|.*\| (.*) \|$", tables, re.M)
    named = [row.strip("`") for row in rows if row not in ("test",) and not row.startswith("-")]
    assert len(named) > 30
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in written] == []


def test_every_detail_is_described_and_may_be_asked_of_a_run() -> None:
    described = re.findall(r"^\| (`.*?`) \| (?:module|block) ", section("Beyond norms"), re.M)
    assert re.findall(r"`(\w+)`", " ".join(described)) == list(DETAILS)
    assert NAMES == DETAILS


@pytest.mark.parametrize("title", ["Beyond norms", "A flight recorder"])
def test_the_examples_run(title: str) -> None:
    scope: dict[str, object] = {}
    said = io.StringIO()
    blocks = re.findall(r"```python\n(.*?)```", RECORDING.partition(f"## {title}")[0], re.DOTALL)
    blocks += re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)
    with contextlib.redirect_stdout(said):
        for block in blocks:
            exec(compile(block, "recording.md", "exec"), scope)
    if title == "Beyond norms":
        assert "grad_rank" in said.getvalue()
    else:
        assert re.search(r"Step 1\d\d.* 16 steps .* lr, from step 100 on", said.getvalue(), re.S)


def test_every_data_set_is_described_with_its_shape_and_size() -> None:
    rows = re.findall(r"^\| `(\w+)`.*? \| (.*?) \| (.*?) \|", DATA_PAGE, re.M)
    assert tuple(name for name, *_ in rows) == DATA
    described = {name: (shape, sizes) for name, shape, sizes in rows}
    for name, known in PUBLIC.items():
        shape, sizes = described[name]
        assert shape.startswith("×".join(map(str, known.shape)))
        assert sizes.startswith(f"{known.train:,} / ")
