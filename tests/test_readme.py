"""The README's commands and examples do what it says, as they stand there."""

import re
import shlex
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

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
    for name in ("profile.png", "blocks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(load_runs("runs")) == 4
    picture = scope["recorder"].plot()
    assert len(picture.axes) == 2  # of four blocks: their layers, and below them their sums
    assert [text.get_text() for text in picture.legends[0].get_texts()][-1] == "exactly zero"
    fit_as_written(scope)


class Regression(pl.LightningModule):
    """A model of a reader's own."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )

    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_as_written(scope):
    """The line that the README leaves to the reader, with a model and data for its dots."""
    (block,) = (block for block in PYTHON if "pl.Trainer" in block)
    (line,) = (line.removeprefix("# ") for line in block.splitlines() if line.startswith("# "))
    data = torch.utils.data.TensorDataset(torch.randn(16, 8))
    scope |= {"given": (Regression(), torch.utils.data.DataLoader(data, batch_size=4))}
    exec(line.replace("…", "*given"), scope)
    recorder = scope["flow"].recorder
    steps = set(recorder.table("weights")["step"])
    assert steps == set(range(12))
    assert [ax.get_title() for ax in recorder.plot().axes] == ["initialisation", "after 11 updates"]
    assert len(load_runs("runs")) == 5


@pytest.mark.parametrize(
    ("line", "words"), list(zip(THREE, ("vanishing", "exploding", "healthy"), strict=True))
)
def test_three_gradients(tmp_path, monkeypatch, capsys, line, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line)) == 0
    assert f"at initialisation: {words}: the" in capsys.readouterr().out


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
