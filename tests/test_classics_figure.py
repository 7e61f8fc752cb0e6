"""The figure of five networks: its numbers are those of single passes."""

from functools import partial

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from analysis import classics
from gradflow.networks import build_network, lenet5


def small(skip: bool, seed: int) -> torch.nn.Module:
    return build_network("imagenet", depth=18, width=4, skip=skip, seed=seed)


SUBJECTS = (
    classics.SUBJECTS[0],
    classics.Subject("plain", partial(small, False), (3, 32, 32), 10, "He", "plain"),
    classics.Subject("residual", partial(small, True), (3, 32, 32), 10, "He", "residual"),
)


def test_a_profile_is_that_of_a_pass_by_hand():
    frame = classics.profile(SUBJECTS[0], images=4, seed=3)
    torch.manual_seed(3)
    network = lenet5()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (4,), generator=generator)
    outputs = {}
    for name, module in network.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(
                lambda module, args, y, name=name: (
                    (y.retain_grad(), outputs.update({name: y}))[:0] or None
                )
            )
    cross_entropy(network(images), labels).backward()
    assert list(frame["layer"]) == list(outputs)
    assert list(frame["place"]) == [0, 0.25, 0.5, 0.75, 1]
    assert set(frame["parameters"]) == {61_706}
    for row in frame.itertuples():
        layer = network.get_submodule(row.layer)
        own = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])
        assert row.weight_grad_norm == pytest.approx(own.norm().item(), rel=1e-4)
        norm = outputs[row.layer].grad.norm().item()
        assert row.output_grad_norm == pytest.approx(norm, rel=1e-4)


def test_the_command_draws_and_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classics, "SUBJECTS", SUBJECTS)
    assert classics.main(["--out", str(tmp_path / "deep" / "er"), "--images", "4"]) == 0
    printed = capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "deep" / "er").iterdir())
    assert names == ["classics.csv", "classics.pdf", "classics.png", "classics.svg"]
    frame = pd.read_csv(tmp_path / "deep" / "er" / "classics.csv")
    assert frame.groupby("network", sort=False).size().to_dict() == {
        "LeNet-5": 5, "plain": 18, "residual": 18,
    }  # fmt: skip
    assert "61,706" in printed
    assert "residual" in printed


def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classics, "SUBJECTS", SUBJECTS[:1])
    file = tmp_path / "file"
    file.write_text("")
    assert classics.main(["--out", str(file)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"classics: --out {file}: File exists"
    for wrong, line in {
        "1": "--images: batch normalisation wants two or more",
        "few": "argument --images: invalid int value: 'few'; --help lists what there is",
    }.items():
        assert classics.main(["--images", wrong]) == 1
        assert capsys.readouterr().err == f"classics: {line}\n"
