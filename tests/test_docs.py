"""The documentation's examples run, and its tables name what is there."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gradflow import cli
from gradflow.recording.quantities import DETAILS
from gradflow.spec import DATA, LOGGERS, PUBLIC, RunSpec
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


# --- trackers and configuration -------------------------------------------------------------------

TRACKERS = (ROOT / "docs" / "trackers.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def _matching(word: str) -> list[str]:
    """What a shell makes of a word."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


@pytest.mark.slow
def test_the_commands_of_trackers_do_what_they_say(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    harmless = {"tensorboard": ("-m", "tensorboard.main", "--inspect"),
                "wandb": ("-m", "wandb", "sync", "--dry-run")}  # fmt: skip
    shown = {}
    for line in commands(TRACKERS):
        program, *words = shlex.split(line)
        if program == "python":
            assert cli.main([*words[2:], "threads=1"]) == 0
            continue
        words = [name for word in words for name in _matching(word)]
        arguments = [*harmless[program], *(word for word in words if word != "sync")]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown[program] = done.stdout + done.stderr
    assert "loss/test" in shown["tensorboard"]
    assert "Would sync 4 run(s)" in shown["wandb"]
    assert "logger=" not in capsys.readouterr().err


def test_every_logger_is_described() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \| [|`]", TRACKERS, re.M)) == ("none", *LOGGERS[1:])


def test_the_presets_of_configuration_are_the_keys_that_they_set(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, block in re.findall(r"`(\S+)`:\n\n```yaml\n(.*?)```", CONFIGURATION, re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    found = [
        [spec for spec, _ in cli._configure(shlex.split(line)[3:])]
        for line in commands(CONFIGURATION)
    ]
    assert [len(specs) for specs in found] == [0, 0, 0, 0, 12, 10, 1, 4, 1]
    small = {"name": "synthetic", "size": 16, "train": 500}
    wide = RunSpec(network="mlp", width=64, depth=10, norm="none")  # type: ignore[arg-type]
    assert found[-3] == [wide.but(data=small)]
    fast = [spec.but(lr=0.3, batch_size=32) for spec in (wide, RunSpec(network="mlp", depth=10))]  # type: ignore[arg-type]
    assert found[-2] == [spec.but(depth=depth) for spec in fast for depth in (10, 20)]
    assert found[-1] == [RunSpec(depth=8, schedule="cosine", epochs=3)]
