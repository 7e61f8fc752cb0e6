"""The page's views of two runs, and of a group, as files: from the store's values to the figure."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import report_store

from analysis import compare, facets
from gradflow import report, tables, views
from gradflow.errors import GradflowError
from gradflow.store import Run, load_runs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    place = tmp_path_factory.mktemp("compare") / "runs"
    report_store.write_pairs(place)
    report_store.write_external(place, "a user's", {})
    return place


def named(store, start):
    (path,) = store.glob(f"{start}-*")
    return str(path)


def files(place):
    return sorted(path.name for path in place.iterdir())


def test_a_run_s_layers_are_those_of_the_page_and_its_values_the_store_s(store):
    run = Run(named(store, "cifar-20-none-s0"))
    frame = views.layered(run, "weight_grad_norm", step=7)
    weights = frame[(frame["family"] == "weights") & (frame["step"] == 7)]
    expected = [report_store.gradient(20, "none", i, 7, 0) for i in range(1, 21)]
    assert weights.sort_values("ordinal")["weight_grad_norm"].tolist() == pytest.approx(expected)
    header, _ = views.unpack(views.pack(run))
    for name, quantity in (("weights", "weight_grad_norm"), ("blocks", "skip_rms")):
        page, here = header["tables"][name], views.layered(run, quantity)
        known = here.drop_duplicates("layer").set_index("layer").loc[page["layer"]]
        assert known["family"].tolist() == page["family"]
        assert known["ordinal"].tolist() == page["ordinal"]
    with pytest.raises(GradflowError, match=r"loss was not recorded \(recorded: weight_grad_norm"):
        views.layered(run, "loss")


def test_two_runs_in_numbers_and_three_formats(store, tmp_path, capsys):
    plain, residual = named(store, "cifar-56-none-s1"), named(store, "cifar-56-identity-s1")
    names = Path(plain).name, residual.rsplit("-", 1)[-1]  # a name, and an id
    out = tmp_path / "deep" / "figures"
    options = ["--runs", str(store), "--out", str(out)]
    assert compare.main([*names, *options]) == 0
    told = capsys.readouterr().out
    assert f"A: plain, depth 56, seed 1; training error 0.400, test error 0.300 ({plain})" in told
    assert "certificate: matched\n" in told
    ends = [tables.short(report_store.gradient(56, "none", i, 0, 1)) for i in (1, 56)]
    ratio = 1 / report_store.GROWTH**55
    assert re.search(rf"first \(conv1\) +{re.escape(ends[0])} +2 +{tables.short(ratio)}\n", told)
    assert re.search(rf"last \(fc\) +{ends[1]} +{tables.short(2 * 56**-0.7)} +", told)
    stem = f"comparison-{plain[-10:]}-{residual[-10:]}-weight_grad_norm-step0"
    assert files(out) == [f"{stem}.{kind}" for kind in ("pdf", "png", "svg")]
    assert "not recorded at step" not in told


def test_other_depths_other_steps_and_other_quantities(store, tmp_path, capsys):
    a, b = named(store, "cifar-56-none-s0"), named(store, "cifar-20-identity-s0")
    out = ["--out", str(tmp_path)]
    assert compare.main([a, b, "--quantity", "branch_rms", "--step", "7", *out]) == 0
    told = capsys.readouterr().out
    assert told.count("branch_rms was not recorded at step 7; step 10 is used") == 2
    assert "certificate" not in told
    assert "first (layer1.0.skip) 1 1     1" in told
    assert "last (layer3.8.skip / layer3.2.skip)" in told
    options = ["--family", "norm", "--axis", "relative", "--step", "11"]
    assert compare.main([a, b, *options, *out]) == 0
    told = capsys.readouterr().out
    assert "first (bn1)" in told
    assert "after 11 updates" in told
    assert len(files(tmp_path)) == 6


def test_the_page_names_the_command(store, tmp_path, capsys):
    """What the explorer joins is the path in its index; it may be given as it stands."""
    page = report.write_report(load_runs(store), tmp_path / "report").read_text("utf-8")
    index = json.loads(re.search(r'id="gradflow-index">(.*?)</script>', page, re.S)[1])
    paths = {run["name"]: run["path"] for run in index["runs"]}
    assert shlex.split(paths["a user's"]) == [str(store / "a user's")]
    mine = paths[Path(named(store, "cifar-20-none-s0")).name]
    arguments = shlex.split(" ".join([mine, paths["a user's"]]))
    assert compare.main([*arguments, "--out", str(tmp_path / "figures")]) == 0
    assert "B: a user's; no final error (done)" in capsys.readouterr().out
    assert 'id="static-command"' in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none", "{b}"], "none: no directory of a run, and no name or id of one in {store}"),
        (["{a}", "{a}"], "{a}: A and B are the same run"),
        (["{a}", "{b}", "--quantity", "los"], "los was not recorded (recorded: weight_grad_norm, "),
        (["{a}", "{b}", "--family", "block"], "no layers of the family block (has weights, norm)"),
        (["{a}", "{b}", "--out", "{store}/{a}/run.json"], "run.json: cannot be written ("),
    ],
)
def test_wrong_input_is_one_line(store, capsys, arguments, words):
    known = {"store": str(store), "a": Path(named(store, "cifar-20-none-s0")).name,
             "b": Path(named(store, "cifar-20-identity-s0")).name}  # fmt: skip
    given = [argument.format(**known) for argument in arguments]
    assert compare.main([*given, "--runs", str(store)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("gradflow: ")
    assert told.count("\n") == 1
    assert words.format(**known) in told


def test_two_names_that_end_alike(store, tmp_path):
    for name in ("mine-x", "other-x"):
        report_store.write_external(tmp_path, name, {})
    with pytest.raises(GradflowError, match="x: mine-x, other-x end so"):
        compare.find("x", str(tmp_path))


@pytest.mark.parametrize("by", ["depth", "seed"])
def test_a_group_s_facets(store, tmp_path, capsys, monkeypatch, by):
    drawn = []
    draw = facets.plots.profile
    monkeypatch.setattr(
        facets.plots, "profile", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1]
    )
    assert facets.main([str(store), "--by", by, "--step", "7", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(
        "group 0 (cifar), 12 runs, after 7 updates\nconditions: network cifar"
    )
    assert told.err == ""
    titles = [ax.get_title() for ax in drawn[0].axes]
    assert titles == [f"{by} {value}" for value in {"depth": (20, 56), "seed": range(3)}[by]]
    expected = report_store.gradient(20, "none", 1, 7, 0)
    first = [line.get_ydata()[0] for line in drawn[0].axes[0].get_lines() if len(line.get_ydata())]
    assert np.isclose(first, expected).sum() == 1
    assert files(tmp_path)[0] == f"facets-{by}-weight_grad_norm-step7.pdf"


def test_facets_of_what_is_not_there(store, capsys):
    assert facets.main([str(store), "--group", "2"]) == 1
    assert capsys.readouterr().err == "gradflow: --group 2: groups are numbered 0 to 1\n"
    (one,) = store.glob("cifar-20-none-s0-*")
    assert facets.main([str(one), "--group", "1"]) == 1
    assert capsys.readouterr().err == "gradflow: --group 1: there is one group, 0\n"
    assert facets.main([str(store), "--quantity", "los"]) == 1
    assert "los was not recorded" in capsys.readouterr().err


def test_facets_of_an_empty_store(tmp_path, capsys):
    assert facets.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"gradflow: {tmp_path}: no runs that can be read\n"


def test_facets_say_which_step_is_used(store, tmp_path, capsys):
    assert facets.main([str(store), "--step", "82", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(
        "12 runs: weight_grad_norm was not recorded at step 82; step 11 is used\n"
        "group 0 (cifar), 12 runs, after 11 updates\n"
    )


@pytest.mark.parametrize("module", ["analysis.compare", "analysis.facets"])
def test_both_commands_answer(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, "none", "none"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("gradflow: none: no ")


def test_the_documentation_s_commands_are_understood(tmp_path, monkeypatch, capsys):
    """Where there are no runs each ends with that alone, and not with a word on its options."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "report.md").read_text("utf-8")
    found = re.findall(r"^python -m analysis\.(\w+) (.*)$", text, re.M)
    assert [name for name, _ in found] == ["compare", "compare", "facets"]
    for name, arguments in found:
        assert {"compare": compare, "facets": facets}[name].main(shlex.split(arguments)) == 1
    assert capsys.readouterr().err.count("no directory of a run") == 2
