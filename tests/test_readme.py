"""The README's commands and examples do what it says, as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

from gradflow import cli, load_runs

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^python -m gradflow (.*)$", README.replace("\\\n", ""), re.MULTILINE)
THREE = [line for line in COMMANDS if "max_steps=0" in line]


def test_the_python_examples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in PYTHON:
        exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert len(load_runs("runs")) == 4


@pytest.mark.parametrize(
    ("line", "words"), list(zip(THREE, ("vanishing", "exploding", "healthy"), strict=True))
)
def test_three_gradients(tmp_path, monkeypatch, capsys, line, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line)) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in THREE])
def test_all_other_commands_are_understood(line):
    arguments = shlex.split(line, comments=True)
    if "--help" not in arguments:
        assert cli._configure(arguments)


def test_every_picture_is_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert len(pictures) == 3
    for picture in pictures:
        assert (Path(__file__).resolve().parents[1] / picture).is_file()
