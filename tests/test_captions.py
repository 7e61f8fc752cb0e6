"""The words of a run and of groups of runs: each diagnosis is that of `gradflow.diagnosis`."""

import math

import pandas as pd
import pytest
import report_store

from gradflow import captions, diagnosis, tables
from gradflow.errors import StoreError
from gradflow.store import Run, RunWriter, load_runs

# --- a run's summary ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "skip", "name"),
    [(20, "none", "healthy"), (56, "none", "exploding"), (56, "identity", "healthy")],
)
def test_the_summary_of_a_run_has_the_words_of_its_diagnosis(tmp_path, depth, skip, name):
    """1.21 a layer is 17 over 18 layers, which trains, and 17,000 over 54, which does not."""
    path = report_store.write_run(tmp_path, 0.1, depth=depth, skip=skip, seed=0)
    first, initial, final, last = captions.summary(Run(path))
    assert first.startswith("done: 12 updates in ")
    assert first.endswith("; training accuracy 0.900; test accuracy 0.850")
    examined = diagnosis.diagnose_run(Run(path))
    assert [one.names for one in examined] == [(name,)] * 2
    assert initial == f"at initialisation: {name}: {examined[0].findings[0].sentence}"
    assert final == f"after 11 updates: {name}: {examined[1].findings[0].sentence}"
    assert last == f"recorded in {path}"
    if skip == "none":
        assert f", 1.21× a layer toward the input ({depth // 3} layers, 95 % 1.21" in initial


def test_the_summary_of_a_diverged_run_and_of_zeros(tmp_path):
    runs = {run.path.name: run for run in load_runs(report_store.write_store(tmp_path))}
    diverged = next(run for run in runs.values() if run.status == "diverged")
    lines = captions.summary(diverged)
    assert lines[0] == (
        f"diverged at step 5: output_rms not finite in conv1; 6 updates in "
        f"{diverged.record['seconds']:.1f} s"
    )
    assert lines[2] == (
        "after 5 updates: not finite: NaN or Inf: gradients of weights in 111 modules"
    )
    vanishing = next(run for run in runs.values() if run.path.name.startswith("mlp"))
    assert captions.summary(vanishing)[1:3] == [
        "at initialisation: vanishing: the norm of the weights' gradient at 3 layers from layers.0 "
        f"on is in the median at most {tables.short(0.24**23)} times that at 3 up to layers.29 "
        "(exactly zero in 4 of 28 layers)",
        "at initialisation: dead units: no gradient at all reaches 5 layers: it is exactly zero "
        "there",
    ]


def test_the_summary_of_a_run_without_a_record_of_weights(tmp_path):
    with RunWriter(tmp_path / "bare", {"depth": 8}) as writer:
        pass
    assert captions.summary(Run(writer.path)) == [
        f"done in {Run(writer.path).record['seconds']:.1f} s", f"recorded in {writer.path}",
    ]  # fmt: skip


def test_the_summary_of_a_run_without_its_modules_is_an_error_of_ours(tmp_path):
    path = report_store.write_run(tmp_path, depth=8, skip="none")
    (path / "modules.parquet").unlink()
    with pytest.raises(StoreError, match=r"modules\.parquet: missing"):
        captions.summary(Run(path))


def test_a_summary_reads_each_table_once(tmp_path, monkeypatch):
    path, read, original = report_store.write_run(tmp_path, depth=20, skip="none"), [], Run._read
    monkeypatch.setattr(Run, "_read", lambda run, name: read.append(name) or original(run, name))
    captions.summary(Run(path))
    assert sorted(read) == ["flight", "modules", "outputs", "probes", "weights"]


# --- conditions -----------------------------------------------------------------------------------


def test_the_conditions_of_what_diverged_are_the_updates_asked_for(tmp_path):
    keys = {"depth": 8, "skip": "none", "status": "diverged"}
    report_store.write_run(tmp_path, None, **keys, steps=4, max_steps=15)
    (run,) = load_runs(tmp_path)
    assert ", 15 updates (diverged after 4), seed 0" in captions.conditions([run])
    report_store.write_run(tmp_path, None, **keys, seed=1, steps=6, epochs=2)  # of 22 batches
    told = captions.conditions(load_runs(tmp_path))
    assert "2 epochs, 15 and 44 updates (2 of 2 diverged, after 4 and 6), seeds 0 and 1" in told
    on = {"on_divergence": "continue", "seed": 2}
    report_store.write_run(tmp_path / "on", None, **keys, **on, steps=15, max_steps=15)
    (gone_on,) = load_runs(tmp_path / "on")
    at = gone_on.record["divergence"]["step"]
    assert f"15 updates (diverged after {at})" in captions.conditions([gone_on])
    report_store.write_external(tmp_path, "own", {})
    assert "15 and 44" in captions.conditions(load_runs(tmp_path))


def test_one_of_a_thing_is_no_plural(tmp_path):
    path = report_store.write_run(tmp_path, depth=8, skip="none", epochs=1, steps=1)
    run = Run(path)
    assert "1 epoch, 1 update, seed 0" in captions.conditions([run])
    assert captions.summary(run)[0].startswith("done: 1 update in ")
    assert captions.marks(pd.Series([0.0, 1.0, math.inf])) == (
        " Of 3 values drawn 1 is exactly zero and 1 is NaN or Inf."
    )


# --- diagnoses ------------------------------------------------------------------------------------


def rows(*given):
    """The frame of diagnoses: (run, seed, moment, step, diagnosis) of one arm."""
    names = ["run_id", "seed", "moment", "step", "diagnosis"]
    return pd.DataFrame(given, columns=names).assign(
        depth=pd.array([56] * len(given), "Int64"), arm="plain", layers="a, b", remarks="",
        sentence=lambda f: f["run_id"] + " is " + f["diagnosis"], unmeasured="shattered",
    )  # fmt: skip


def test_a_runs_diagnoses_in_words():
    frame = rows(
        ("x", 0, "first", 0, "exploding"), ("x", 0, "first", 0, "shattered"),
        ("x", 0, "last", 9, "healthy"),
        ("y", 1, "first", 0, "healthy"), ("y", 1, "last", 9, "healthy"),
        ("z", 2, "first", 0, "healthy"), ("z", 2, "last", 4, "not finite"),
    )  # fmt: skip
    assert captions.diagnosed(frame) == {
        "x": "exploding, shattered; later healthy",
        "y": "healthy",
        "z": "healthy; later not finite",
    }
    assert captions.diagnosed(pd.DataFrame()) == {}


def test_the_evidence_of_several_seeds_is_counted_and_told_by_the_lowest():
    frame = rows(
        ("z", 2, "first", 0, "exploding"), ("z", 2, "first", 0, "shattered"),
        ("y", 1, "first", 0, "shattered"), ("x", 0, "first", 0, "exploding"),
        ("x", 0, "last", 9, "healthy"), ("z", 2, "last", 4, "not measured"),
    )  # fmt: skip
    found = captions.evidence(frame)
    assert found.drop(columns=["depth", "arm", "layers"]).to_numpy().tolist() == [
        ["initialisation", "exploding", "2 of 3", "x is exploding"],
        ["initialisation", "shattered", "2 of 3", "y is shattered"],
        ["after 4 to 9 updates", "healthy", "1 of 2", "x is healthy"],
        ["after 4 to 9 updates", "not measured", "1 of 2", "z is not measured"],
    ]
    assert set(found["layers"]) == {"a, b"}
    against = [line.partition(":")[0] for line in captions.advice(found["diagnosis"])]
    assert against == ["Usually helps against exploding", "Usually helps against shattered"]


def test_the_evidence_is_sorted_by_depth_and_arm():
    plain = rows(("x", 0, "first", 0, "healthy"))
    unknown = plain.assign(depth=pd.array([None], "Int64"), arm="unnamed", layers="")
    frame = pd.concat([unknown, plain.assign(arm="residual"), plain, plain.assign(depth=20)])
    found = captions.evidence(frame)
    assert found[["depth", "arm"]].to_numpy().tolist() == [
        [20, "plain"], [56, "plain"], [56, "residual"], ["–", "unnamed"],
    ]  # fmt: skip


def test_remarks_are_few_and_what_is_not_measured_is_named_once():
    parts = [
        rows((f"{n}", n, "first", 0, "healthy")).assign(remarks=f"{n} layers wait")
        for n in range(4)
    ]
    assert captions.reservations(pd.concat([*parts, parts[0]])) == [
        "No trouble: 0 layers wait.",
        "No trouble: 1 layers wait.",
        "In diagnoses.csv: 2 more remarks of this kind.",
        "Not looked for in every record here, for want of what tells of it: shattered.",
    ]
