"""The page: self-contained, escaped, equal to the store, and there whatever the store holds."""

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import report_store
import torch
from html_page import Page

from gradflow import captions, cli, diagnosis, page, plots, report, schema, store, styles
from gradflow.errors import GradflowError
from gradflow.page import ASSETS
from gradflow.recording import Recorder
from gradflow.recording.quantities import QUANTITIES
from gradflow.spec import RunSpec
from gradflow.store import Run, load_runs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with every kind of run, and its report."""
    place = tmp_path_factory.mktemp("whole")
    report_store.write_store(place / "runs")
    path = report.write_report(load_runs(place / "runs"), place / "report")
    text = path.read_text(encoding="utf-8")
    return place, text, Page(text)


def test_the_page_needs_nothing_but_itself(whole):
    place, text, page = whole
    own = text.replace(
        (ASSETS / "uPlot.iife.min.js").read_text(encoding="utf-8"), ""
    )  # names its home in a comment
    assert "http://" not in own
    assert "https://" not in own
    assert "<script src" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    assert page.resources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.resources)
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (place / "report" / link).is_file()
    assert len(page.ids) == len(set(page.ids))


def test_every_figure_is_inline_described_and_a_file_in_three_formats(whole):
    place, _, page = whole
    names = {path.stem for path in (place / "report" / "figures").iterdir()}
    assert len(page.images) == len(names)
    assert {"degradation", "profile-first", "profile-last", "profile-norm-first", "heatmap",
            "curves", "benefit", "blocks-residual-first"} <= names  # fmt: skip
    inline = {base64.b64decode(source.partition(",")[2]) for source in page.resources}
    for name in names:
        files = [place / "report" / "figures" / f"{name}.{kind}" for kind in plots.FORMATS]
        assert all(path.stat().st_size > 1000 for path in files)
        assert files[0].read_bytes() in inline
    assert all(len(image["alt"]) > 20 for image in page.images)
    # 7.2 inches wide, and 5 with a single panel: text of one size
    assert {image["style"] for image in page.images} == {"--own:54.0rem", "--own:37.5rem"}


def test_what_users_wrote_is_escaped(whole):
    _, text, _ = whole
    assert "mine &lt;b&gt;&amp;" in text
    assert "mine <b>" not in text


def test_the_question_comes_first(whole):
    _, text, _ = whole
    order = [text.index(f'<h2 id="{anchor}"') for anchor in (
        "overview", "explore", "comparison", "diagnosis", "initialisation", "later", "heatmaps",
        "curves", "benefit", "blocks", "runs", "conditions", "problems")]  # fmt: skip
    assert order == sorted(order)
    assert text.index('id="figure-degradation"') < text.index('id="figure-profile-first"')


def test_numbers_on_the_page_equal_the_store(whole):
    place, text, page = whole
    rows = {row[0]: row for row in page.rows if row}
    for run in load_runs(place / "runs"):
        row = rows[run.path.name]
        metrics = run.metrics
        expected = [
            f"{metrics[name]:.3f}" if name in metrics else ""
            for name in ("train_accuracy", "test_accuracy")
        ]
        assert row[-2:] == expected
        count = run.record.get("certificate", {}).get("parameter_count")
        assert row[4] == (f"{count:,}" if count else "")
        assert row[7] == ("1.2%" if "recorder_share" in run.record else "")
    assert ["56", "0.500±0.248, 1 of 4 diverged", "0.992±0.015", "+0.490±0.237", "3/4",
            "3 of 3"] in page.rows  # fmt: skip
    assert "residual networks is lower than that of plain ones by 0.490 ± 0.237 (3 seeds)." in text
    assert ["56", "plain", "1.210×", "grows", "4 of 4", "2.95e4"] in page.rows
    heads = {row[5] for row in page.rows if "a layer toward the input" in row[:3]}
    assert heads == {"first/last convolution", "first/last linear layer"}


def test_diagnoses_are_those_of_the_runs_and_no_other_word_is_used(whole):
    """The growth of 1.21 a layer is the same at depth 20 and 56: only the latter explodes."""
    place, _, page = whole
    rows = {row[0]: row for row in page.rows if row}
    told = []
    for run in load_runs(place / "runs"):  # external ones, too
        examined = [", ".join(one.names) for one in diagnosis.diagnose_run(run)]
        told.append("; later ".join(dict.fromkeys(examined)))
        assert rows[run.path.name][2] == told[-1]
    assert sorted(told) == [
        *["exploding"] * 3, "exploding; later not finite", *["healthy"] * 13,
        "vanishing, dead units",
    ]  # fmt: skip
    (one,) = (row for row in page.rows if row[:3] == ["56", "plain", "initialisation"])
    assert one[3:5] == ["exploding", "4 of 4"]
    assert one[5].startswith(
        "the norm of the weights' gradient at 3 layers from layer1.0.conv1 on is in the median "
        "1.67e4 times that at 3 up to layer3.8.conv2, 1.21× a layer toward the input"
    )
    # 1.21^25 > 100: all that are 25 layers or more before the last but one of 54
    assert one[6] == "layer1.0.conv1, layer1.0.conv2, layer1.1.conv1, …, layer2.4.conv2 (28 in all)"
    (own,) = (row for row in page.rows if row[:3] == ["–", "unnamed", "after 2 updates"])
    assert own[3:5] == ["healthy", "1 of 1"]


def test_the_evidence_of_every_run_is_a_file(whole):
    place, text, _ = whole
    frame = pd.read_csv(place / "report" / "tables" / "diagnoses.csv")
    assert len(frame) == 2 * 18 - 1 + 1  # the MLP has one moment, and two diagnoses
    one = frame[(frame["diagnosis"] == "exploding") & (frame["moment"] == "first")].iloc[0]
    numbers = json.loads(one["evidence"])
    assert numbers["rate"] == pytest.approx(report_store.GROWTH)
    # Medians of three of the 54 convolutions that the blocks have: 51 layers apart.
    assert numbers["first_over_last"] == pytest.approx(report_store.GROWTH**51)
    advice = text[text.index('<h2 id="diagnosis"') : text.index('<h2 id="initialisation"')]
    assert "Usually helps against exploding: Add skip connections" in advice
    assert (
        "Not looked for in every record here, for want of what tells of it: underflow, dead units,"
    ) in advice
    runs = pd.read_csv(place / "report" / "tables" / "runs.csv").set_index("run")
    assert runs.loc["nameless", "diagnosis"] == "healthy"
    rates = pd.read_csv(place / "report" / "tables" / "rates.csv")
    assert set(rates["trend"].dropna()) == {"grows"}


def test_each_table_of_a_run_is_read_once(tmp_path, monkeypatch):
    for seed in (0, 1):
        report_store.write_run(tmp_path, depth=8, skip="identity", seed=seed)
    read, original = [], Run._read
    monkeypatch.setattr(
        Run, "_read", lambda run, name: read.append((run.path, name)) or original(run, name)
    )
    found = report.gather(load_runs(tmp_path))
    assert len(found.diagnoses) == 4
    assert len(set(found.heat["run"])) == 1
    assert sorted(read) == sorted(set(read))
    assert {name for _, name in read} == {
        "modules", "weights", "outputs", "blocks", "steps", "evaluations", "probes", "flight",
    }  # fmt: skip


def test_what_led_to_a_divergence_is_told(tmp_path):
    """A user's loop whose rate is far too large, in the page, the text and a file."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    meta = {"depth": 2, "skip": False, "seed": 7}
    recorder = Recorder(net, optimizer=optimizer, flight=4, save=tmp_path / "runs/own", meta=meta)
    with recorder:
        while recorder.divergence is None:
            optimizer.zero_grad()
            loss = net(torch.ones(8, 4)).square().mean()
            loss.backward()
            recorder.step(loss)
            optimizer.step()
    found = recorder.divergence
    told = f"Step {found.step}: {found.quantity} of {found.layer} is the first that is not finite"
    runs = load_runs(tmp_path / "runs")
    assert f"depth 2, plain, seed 7: {told}" in report.text_report(runs)
    assert captions.summary(next(iter(runs)))[-4].startswith(told)
    report.write_report(runs, tmp_path / "report")
    assert told in (tmp_path / "report/index.html").read_text()
    stories = pd.read_csv(tmp_path / "report/tables/stories.csv")
    assert stories["step"].tolist() == [found.step]
    assert stories["story"][0].startswith(told)


def test_what_is_not_told_is_not_diagnosed(tmp_path, monkeypatch):
    for seed in range(3):
        report_store.write_run(tmp_path, depth=8, skip="none", seed=seed)
    monkeypatch.setattr(report, "TOLD_RUNS", 2)
    monkeypatch.setattr(diagnosis, "_examine", None)
    told = "3 runs: python -m gradflow.report RUNS tells what the gradient did in each"
    assert told in report.text_report(load_runs(tmp_path))


def test_tables_are_files_with_the_values_of_the_store(whole):
    place, _, _ = whole
    folder = place / "report" / "tables"
    runs = pd.read_csv(folder / "runs.csv")
    assert len(runs) == 18
    raw = (folder / "profiles.csv").read_text()
    assert ",NaN," in raw
    assert ",inf," in raw
    profiles = pd.read_csv(folder / "profiles.csv")
    run = next(r for r in load_runs(place / "runs") if r.path.name.startswith("cifar-56-none-s1"))
    here = profiles[(profiles["run"] == run.path.name) & (profiles["step"] == 11)]
    table = run.frame("weights")
    table = table[table["step"] == 11].set_index("layer")["weight_grad_norm"]
    assert len(here) == len(table) == 111
    for layer, value in zip(here["layer"], here["weight_grad_norm"], strict=True):
        assert value == pytest.approx(float(table[layer]), rel=1e-12)
    for name in ("pairs", "degradation", "benefit", "comparison", "curves", "blocks", "rates"):
        assert len(pd.read_csv(folder / f"{name}.csv")) > 0


def test_captions_name_the_conditions_and_what_is_seen(whole):
    _, text, _ = whole
    captions_ = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    first = next(c for c in captions_ if c.startswith("Final error against depth"))
    for words in ("learning rate 0.02", "one-cycle schedule", "batch 64", "digits",
                  "12 and 264 updates (1 of 15 diverged, after 6)", "seeds 0, 1, 2, 3 and 4",
                  ):  # fmt: skip
        assert words in first
    assert "Crosses at the upper edge: runs that diverged" in first
    assert any("values drawn 5 are exactly zero" in c for c in captions_)
    assert any("56 are NaN or Inf" in c for c in captions_)
    seen = "Norm at the first convolution over that at the last: depth 20 30.9 (plain), 7.85"
    assert any(seen in c for c in captions_)
    assert "network cifar, width 16, post-activation, norm batch" in text
    assert "12 epochs" in text


def test_problems_are_named_on_the_page(whole):
    _, text, _ = whole
    problems = text[text.index('<h2 id="problems"') :]
    assert "cifar-20-none-s9-0000000000/run.json: unreadable" in problems
    assert "unfinished: its process is gone" in problems
    assert "diverged at step 5: output_rms not finite in conv1" in problems
    assert "not matched" not in problems  # what diverged has seen fewer batches, and is named


def test_every_quantity_has_a_label():
    assert list(styles.LABELS) == list(QUANTITIES)


def test_the_environment_and_the_command_that_repeats_it(whole):
    _, text, _ = whole
    assert "python 3.11.7; torch 2.13.0; cpu, 1 thread; commit 0123456789" in text
    assert "network=mlp norm=none activation=sigmoid init=xavier max_steps=0" in text


# --- whatever there is ----------------------------------------------------------------------------


def only(run_store, tmp_path):
    """The report of a store, and its page."""
    path = report.write_report(load_runs(run_store), tmp_path / "report")
    return path, path.read_text(encoding="utf-8")


@pytest.fixture
def fast(monkeypatch):
    """Figures are made, and not drawn."""

    def save(figure, stem):
        path = stem.with_name(f"{stem.name}.svg")
        path.write_text("<svg/>")
        return [path]

    monkeypatch.setattr(plots, "save", save)


def test_a_run_at_work_shows_what_it_has(tmp_path, fast):
    spec = RunSpec(depth=8, skip="none")
    writer = store.RunWriter(tmp_path / "runs" / spec.name, spec.to_dict())
    modules = report_store.cifar_modules(8)
    writer.write("modules", report_store.table_of("modules", modules))
    columns = report_store.weight_columns(modules, range(3), 8, "none", 0)
    writer.append("weights", store.schema.table("weights", columns))
    _, text = only(tmp_path / "runs", tmp_path)
    assert 'id="figure-profile-first"' in text
    assert "running; not among the final errors" in text
    assert "No run has a final training error." in text
    writer.finish("done")


def test_a_store_of_one_users_loop(tmp_path, fast):
    report_store.write_external(tmp_path / "runs", "mine", {})
    _, text = only(tmp_path / "runs", tmp_path)
    assert 'id="figure-profile-last"' in text
    assert "has no final training error" in text
    assert "python -m gradflow" not in text


def test_step_zero_alone(tmp_path, fast):
    report_store.write_vanishing(tmp_path / "runs")
    _, text = only(tmp_path / "runs", tmp_path)
    assert 'id="figure-profile-first"' in text
    assert 'id="later"' not in text
    assert 'id="heatmaps"' not in text


def test_a_damaged_table_costs_its_run_that_part_alone(tmp_path, fast):
    path = report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    (path / "weights.parquet").write_bytes(b"PAR1 cut off")
    _, text = only(tmp_path / "runs", tmp_path)
    assert "weights unreadable" in text
    assert 'id="figure-curves"' in text
    assert 'id="figure-profile-first"' not in text


def test_a_run_given_twice_counts_once(tmp_path):
    path = report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    copy = shutil.copytree(path, tmp_path / "others" / path.name)
    found = report.gather(load_runs(tmp_path / "runs", tmp_path / "others"))
    assert len(found.overview) == 1
    assert found.problems == [f"{copy}: the same run as {path}"]


def test_initialisation_alone_has_no_final_error_to_miss(tmp_path, fast):
    report_store.write_vanishing(tmp_path / "runs")
    _, text = only(tmp_path / "runs", tmp_path)
    assert "None: every run was read" in text


def test_a_run_without_its_modules_is_named(tmp_path, fast, capsys):
    path = report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    (path / "modules.parquet").unlink()
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    line = f"{path}/modules.parquet: missing"
    assert capsys.readouterr().err == f"passed over: {line}\n"
    assert line in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [{"metrics": {"train_accuracy": "high"}}, {"certificate": None}])
def test_a_run_whose_record_is_of_wrong_types_is_passed_over(tmp_path, fast, capsys, change):
    report_store.write_run(tmp_path / "runs", 0.25, depth=8, skip="none")
    path = report_store.write_run(tmp_path / "runs", 0.5, depth=8, skip="none", seed=1)
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | change))
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(f"passed over: {path}/run.json: unreadable")
    assert re.search(r"^8 +0\.750 +1$", printed.out, re.MULTILINE)


def test_a_spec_that_is_none_is_named(tmp_path, fast):
    report_store.write_run(tmp_path / "runs", 0.25, depth=8, skip="none")
    path = report_store.write_run(tmp_path / "runs", 0.5, depth=8, skip="none", seed=1)
    (path / "spec.json").write_text('{"depth": "abc"}')
    _, text = only(tmp_path / "runs", tmp_path)
    problems = text[text.index('<h2 id="problems"') :]
    assert f"{path}/spec.json: not a spec of this version&#x27;s (depth=abc: allowed is" in problems
    assert "<h3>unknown network</h3>" in text
    assert "None" not in re.findall(r"<h3>(.*?)</h3>", text)


def test_layers_of_one_arm_alone_leave_the_profile(tmp_path, fast):
    report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    own = ("extra.weight", "conv1.bias")  # a layer, and no more than a parameter
    path = report_store.write_run(tmp_path / "runs", depth=8, skip="identity", extra=own)
    modules = report_store.cifar_modules(8)
    modules.insert(1, modules[0] | {"layer": "extra"})
    modules = [row | {"position": place} for place, row in enumerate(modules)]
    schema.write(report_store.table_of("modules", modules), path / "modules.parquet")
    columns = report_store.weight_columns(modules, range(1), 8, "identity", 0)
    schema.write(schema.table("weights", columns), path / "weights.parquet")
    profiles = report.gather(load_runs(tmp_path / "runs")).profiles
    chains = [
        part["layer"].tolist()
        for _, part in profiles[profiles["family"] == "weights"].groupby(["run_id", "step"])
    ]
    assert len(set(map(tuple, chains))) == 1
    assert len(chains[0]) == 8
    assert profiles[profiles["family"] == "aside"]["layer"].tolist() == ["extra"]
    _, text = only(tmp_path / "runs", tmp_path)
    assert "1 module of the skips&#x27; path, or of one arm alone, is left out" in text


def test_an_older_report_is_replaced_and_nothing_else(tmp_path, fast):
    report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    path, _ = only(tmp_path / "runs", tmp_path)
    figures = path.parent / "figures"
    (figures / "mine.svg").write_text("a user's own")
    (path.parent / "notes.txt").write_text("kept")
    assert (figures / "degradation.svg").exists()
    record = Run(next((tmp_path / "runs").iterdir()))
    (record.path / "run.json").write_text('{"origin": "gradflow", "status": "failed"}')
    only(tmp_path / "runs", tmp_path)
    assert not (figures / "degradation.svg").exists()  # the new report has none
    assert (figures / "mine.svg").exists()
    assert (path.parent / "notes.txt").exists()
    assert not list(path.parent.glob(".new-*"))


def test_a_report_that_fails_leaves_the_old_one(tmp_path, fast, monkeypatch):
    report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    path, before = only(tmp_path / "runs", tmp_path)

    def fail(*args, **options):
        raise RuntimeError("in the middle")

    report_store.write_run(tmp_path / "runs", depth=8, skip="none", seed=1)
    monkeypatch.setattr(plots, "curves", fail)
    with pytest.raises(RuntimeError):
        report.write_report(load_runs(tmp_path / "runs"), tmp_path / "report")
    assert path.read_text(encoding="utf-8") == before
    assert not list(path.parent.glob(".new-*"))


def test_many_groups_are_in_the_tables_and_few_are_drawn(tmp_path, fast, monkeypatch):
    monkeypatch.setattr(report, "DRAWN_GROUPS", 1)
    for rate in (0.01, 0.02, 0.05):
        report_store.write_run(tmp_path / "runs", 0.1, depth=8, skip="none", lr=rate)
    _, text = only(tmp_path / "runs", tmp_path)
    assert "Of 3 groups of comparable runs the 1 largest are drawn" in text
    assert text.count('id="figure-degradation') == 1
    for rate in ("0.01", "0.02", "0.05"):
        assert f"<h3>lr={rate}</h3>" in text


def test_probe_tasks_are_counted_and_left_out(tmp_path, fast, capsys):
    """They are in no frame, and none of their tables is read."""
    report_store.write_run(tmp_path / "runs", 0.25, depth=8, skip="none")
    for seed in range(3):
        path = report_store.write_probe(tmp_path / "runs", seed=seed)
        (path / "outputs.parquet").write_bytes(b"PAR1 cut off")
    runs = load_runs(tmp_path / "runs")
    found = report.gather(runs)
    assert len(found.overview) == len(found.members) == 1
    assert set(found.profiles["run"]) == {found.members[0].path.name}
    assert found.problems == []
    _, text = only(tmp_path / "runs", tmp_path)
    assert "1 run in" in text
    assert "; 3 probe tasks: not shown; report of" in text
    assert "mlp-" not in text
    assert report.main([str(tmp_path / "runs"), "--text"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("3 probe tasks: python -m analysis makes their atlas\n\n")
    assert "mlp-" not in told


def test_finished_runs_without_a_final_error_are_counted(tmp_path):
    for name in ("a", "b"):
        report_store.write_external(tmp_path / "runs", name, {})
    told = report.comparison(load_runs(tmp_path / "runs"))
    assert told == "2 finished runs, none with a final training error"


def test_runs_without_a_seed_are_named_below_their_heatmap(tmp_path):
    report_store.write_external(tmp_path / "runs", "mine", {})
    page = report.write_report(load_runs(tmp_path / "runs"), tmp_path / "report")
    assert "one run a panel (mine)." in page.read_text(encoding="utf-8")


def test_probe_tasks_alone(tmp_path, capsys):
    path = report_store.write_probe(tmp_path / "runs", status="failed")
    out = tmp_path / "report"
    assert report.main([str(path.parent), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"no finished runs to compare\n\n{out / 'index.html'}\n"
    text = Page((out / "index.html").read_text(encoding="utf-8"))
    assert text.images == []
    assert "1 probe task (1 not done): not shown" in (out / "index.html").read_text("utf-8")
    assert report.main([str(path.parent), "--text"]) == 0
    told = capsys.readouterr().out
    assert told == "1 probe task (1 not done): python -m analysis makes their atlas\n"
    assert report.comparison(load_runs(path.parent)) == "no finished runs to compare"


def test_probe_tasks_alone_beside_what_cannot_be_read(tmp_path):
    report_store.write_probe(tmp_path / "runs")
    report_store.write_corrupted(tmp_path / "runs")
    _, text = only(tmp_path / "runs", tmp_path)
    assert "cifar-20-none-s9-0000000000/run.json: unreadable" in text


def test_a_users_own_word_for_a_probe_is_no_probe_task(tmp_path):
    report_store.write_external(tmp_path, "mine", {"probe": "shattering", "max_steps": 0})
    assert len(report.gather(load_runs(tmp_path)).members) == 1


def test_many_probe_tasks_are_no_burden(tmp_path, monkeypatch):
    """What a thousand of them take is the reading of their run.json and spec.json."""
    report_store.write_run(tmp_path, 0.25, depth=8, skip="none")
    first = report_store.write_probe(tmp_path)
    for number in range(300):
        shutil.copytree(first, tmp_path / f"{first.name[:-10]}{number:010d}")
    read = []
    monkeypatch.setattr(Run, "_read", lambda run, name: read.append(run.path.name))
    began = time.process_time()
    report.text_report(load_runs(tmp_path))
    assert time.process_time() - began < 3
    assert all(name.startswith("cifar") for name in read)


def test_a_page_of_an_older_report_goes_with_its_files(tmp_path):
    def compose(*names):
        def write(directory):
            for name in names:
                one = page.Page(directory)
                one.csv(name, pd.DataFrame({"a": [1]}))
                one.text(page.link(f"tables/{name}.csv", name))
                one.text(page.link("index.html", "back"))
                one.write(name, name, f"{name}.html")
            index = page.Page(directory)
            for name in names:
                index.text(page.Html(f"{page.link(f'{name}.html', name)}, a < b"))
            index.write("all", "of them")

        return write

    out = tmp_path / "out"
    page.publish(out, compose("atlas", "other"))
    (out / "mine.html").write_text("a user's own")
    page.publish(out, compose("other"))
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert left == ["index.html", "mine.html", "other.html", "tables/other.csv"]


def test_html_stays_html_and_text_is_escaped(tmp_path):
    one = page.Page(tmp_path)
    one.table(pd.DataFrame({"a": [page.link("x.html", "a<b"), "<i>", 60 * "x"]}, dtype=object))
    assert '<td class="long" style="min-width:10ch">xxx' in one.parts[0]
    one.heading("1 < 2", "anchor")
    assert '<td><a href="x.html">a&lt;b</a></td>' in one.parts[0]
    assert "<td>&lt;i&gt;</td>" in one.parts[0]
    assert one.parts[1] == '<h3 id="anchor">1 &lt; 2</h3>'


# --- words ----------------------------------------------------------------------------------------


def test_the_comparison_as_text(tmp_path):
    report_store.write_pairs(tmp_path)
    lines = report.comparison(load_runs(tmp_path)).splitlines()
    cells = [re.split("  +", line) for line in lines]
    assert cells[0] == ["depth", "plain", "residual", "difference", "seeds", "matched"]
    assert cells[2] == ["20", "1.000", "1.000", "+0.000", "3", "3 of 3"]
    assert cells[3] == ["56", "0.500±0.248", "0.990±0.025", "+0.490±0.237", "3", "3 of 3"]
    assert lines[3].index("+0.490") == lines[0].index("difference")
    assert lines[-1] == (
        "training accuracy, evaluation mode; ± 95 % t interval over seeds, if they differ"
    )


def test_the_comparison_fits_a_terminal(tmp_path):
    report_store.write_pairs(tmp_path)
    for seed, error in ((0, 0.2), (1, 0.3)):
        report_store.write_run(tmp_path, error, depth=110, skip="none", seed=seed)
        report_store.write_run(tmp_path, error / 2, depth=110, skip="identity", seed=seed)
    report_store.write_run(tmp_path, None, depth=110, skip="none", seed=2, status="diverged")
    text = report.comparison(load_runs(tmp_path))
    assert "0.750±0.635, 1 of 3 diverged" in text
    assert max(map(len, text.splitlines())) <= 80


def parse(line):
    """The specs that a command of ours asks for, as Hydra reads it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = [w for w in shlex.split(line)[3:] if w != "-m"]
    values = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(words)}
    for part in {"network", "data", "record"} & values.keys():
        values[f"{part}.name"] = values.pop(part)
    lists = {k: v.list if hasattr(v, "list") else [v] for k, v in values.items()}
    specs = [{}]
    for key, options in lists.items():
        specs = [s | {key: option} for s in specs for option in options]
    return {RunSpec.from_dict(captions._nested(spec)).run_id for spec in specs}


@pytest.mark.parametrize(
    "keys",
    [
        [
            {"depth": d, "skip": s, "seed": n}
            for d in (20, 56)
            for s in (True, False)
            for n in (0, 1)
        ],
        [{"depth": 20, "skip": True, "seed": 3}, {"depth": 56, "skip": False, "seed": 0}],
        [{"network": "mlp", "depth": 30, "skip": False, "norm": "none", "max_steps": 0}],
        [{"depth": 20, "skip_forward": 0.5, "skip_backward": 1, "lr": 0.1, "optimizer": "adam"}],
        [{"schedule": "step", "milestones": [5, 10], "record": {"every": {"outputs": 3}}}],
        [{"data": {"name": "synthetic", "size": 16}, "record": "none", "skip": "rezero"}],
        [{"network": {"target": "a.b", "args": {"depth": 4, "wide": True}}, "depth": 4}],
    ],
)
def test_commands_repeat_exactly_the_runs(tmp_path, keys):
    specs = [RunSpec(**key) for key in keys]
    for spec in specs:
        with store.RunWriter(tmp_path / spec.name, spec.to_dict()):
            pass
    lines = captions.commands(load_runs(tmp_path))
    asked = [parse(line) for line in lines]
    assert set().union(*asked) == {spec.run_id for spec in specs}
    assert sum(map(len, asked)) == len(specs)


AWKWARD = [
    "a b,c=d", "", "true", "NULL", "nan", "1", "1e5", "it's", 'say "x"', "end\\", "\\'", "\\\n",
    "-1", "${depth}", "\\${a}", "[1,2]", "{a:b}", "glob(*)", "#c", " lead ", "é", "x:y/z.w", "???",
]  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        *(
            {"data": {"name": "files", "root": root}}
            for root in ("/my data", "a,b", "a=b", "it's\\")
        ),
        {"network": {"target": "a.b", "args": {"words": AWKWARD, "nested": {"a b:c": AWKWARD[0]}}}},
        {
            "network": {
                "target": "a.b",
                "args": {"x": 1.0, "y": 1, "z": 1e-7, "n": None, "f": False},
            }
        },
        {"lr": 1e-5, "momentum": 0.0, "weight_decay": 1 / 3},
    ],
)
def test_commands_quote_what_hydra_would_read_otherwise(tmp_path, keys):
    specs = [RunSpec(**keys, seed=seed) for seed in (0, 1)]
    for spec in specs:
        with store.RunWriter(tmp_path / spec.name, spec.to_dict()):
            pass
    (line,) = captions.commands(load_runs(tmp_path))
    assert [spec for spec, _ in cli._configure(shlex.split(line)[3:])] == specs


def test_commands_are_short(tmp_path):
    report_store.write_pairs(tmp_path)
    (line,) = captions.commands(load_runs(tmp_path))
    assert line == "python -m gradflow -m depth=20,56 skip=true,false seed=0,1,2"


def test_commands_count_depths_and_seeds_by_their_size(tmp_path):
    for depth, seed in ((8, 0), (14, 0), (110, 0), (8, 10), (14, 10), (110, 10), (8, 2)):
        report_store.write_run(tmp_path, depth=depth, skip="identity", seed=seed)
    lines = captions.commands(load_runs(tmp_path))
    asked = [re.findall(r"depth=(\S+) skip=true seed=(\S+)", line)[0] for line in lines]
    assert asked == [(d, s) for d, n in (("8", 3), ("14", 2), ("110", 2)) for s in ("0", "2", "10")
                     if n == 3 or s != "2"]  # fmt: skip
    for depth in (14, 110):
        report_store.write_run(tmp_path, depth=depth, skip="identity", seed=2)
    (line,) = captions.commands(load_runs(tmp_path))
    assert line == "python -m gradflow -m depth=8,14,110 skip=true seed=0,2,10"


# --- command line ---------------------------------------------------------------------------------


def test_the_command_line_writes_and_names_what_it_passed_over(tmp_path, capsys, fast):
    report_store.write_run(tmp_path / "runs", 0.25, depth=8, skip="none")
    report_store.write_corrupted(tmp_path / "runs")
    out = tmp_path / "out"
    assert report.main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(out / "index.html")
    assert re.search(r"^8 +0\.750 +1$", printed.out, re.MULTILINE)
    assert printed.err.count("\n") == 1
    assert "cifar-20-none-s9-0000000000/run.json: unreadable" in printed.err


def test_the_report_as_text_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report_store.write_store(tmp_path / "runs")
    assert report.main(["--text"]) == 0
    text = capsys.readouterr().out
    assert "0.500±0.248, 1 of 4 diverged" in text
    assert "56     plain     1.210×                    grows" in text
    assert "\ndepth 20, plain, initialisation: healthy (4 of 4): the gradient's norm at" in text
    assert "\ndepth 56, plain, initialisation: exploding (4 of 4): the norm of the weights'" in text
    assert re.search(r"^nameless +done +healthy +no partner$", text, re.MULTILINE)
    assert "cifar-20-none-s9-0000000000/run.json: unreadable" in text
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such directory of runs"),
        (lambda path: path.mkdir(), "no runs that can be read"),
        (report_store.write_corrupted, "no runs that can be read; "),
    ],
)
def test_nothing_to_report_is_one_line_and_exit_1(tmp_path, capsys, make, words):
    make(tmp_path / "runs")
    for options in (["--out", str(tmp_path / "out")], ["--text"]):
        assert report.main([str(tmp_path / "runs"), *options]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    (tmp_path / "file").write_text("")
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(GradflowError):
        report.write_report(load_runs(tmp_path / "runs"), tmp_path / "file" / "below")


@pytest.mark.parametrize("below", ["", "report"])
def test_a_report_does_not_lie_among_the_runs(tmp_path, capsys, below):
    path = report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    out = str(tmp_path / "runs" / below)
    assert report.main([str(tmp_path / "runs"), "--out", out]) == 1
    told = f"gradflow: --out {out}: lies in {tmp_path}/runs, among the runs; name another place\n"
    assert capsys.readouterr().err == told
    assert list((tmp_path / "runs").iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--foo"], "unrecognized arguments: --foo; --help lists what there is"),
        (["--port", "x"], "argument --port: invalid int value: 'x'; --help lists what there is"),
        (["--text", "--serve"], "--text and --serve: one of them"),
    ],
)
def test_wrong_options_are_one_line_and_exit_1(capsys, options, words):
    assert report.main(options) == 1
    assert capsys.readouterr().err == f"gradflow: {words}\n"


def test_help_is_the_usage_and_exit_0(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m gradflow.report ")


@pytest.mark.parametrize("module", ["analysis", "gradflow.report"])
def test_both_commands_answer(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, str(tmp_path / "none")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"gradflow: {tmp_path / 'none'}: no such directory of runs\n"


def test_a_report_is_quick(tmp_path):
    report_store.write_pairs(tmp_path / "runs")
    began = time.process_time()
    report.gather(load_runs(tmp_path / "runs"))
    assert time.process_time() - began < 10
