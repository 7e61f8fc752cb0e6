"""What the README's examples leave behind; that they run at all, `test_docs` would show as well."""

import re

import pages
import pytorch_lightning as pl
import torch

from gradflow import load_runs

README = pages.ROOT / "README.md"
PYTHON = [block.text for block in pages.blocks(README) if block.kind == "python"]


def test_the_examples_run_in_order_and_leave_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = pages.run(README, tmp_path, slow=False)
    for name in ("profile.png", "blocks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    picture = scope["recorder"].plot()
    assert len(picture.axes) == 2  # of four blocks: their layers, and below them their sums
    assert [text.get_text() for text in picture.legends[0].get_texts()][-1] == "exactly zero"
    before = len(load_runs("runs"))
    fit_as_written(scope)
    assert len(load_runs("runs")) == before + 1


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


def test_it_is_short_and_has_pictures():
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
