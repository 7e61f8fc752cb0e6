"""What a report keeps: the same report with it and without, by one process and by two."""

import json
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import report_store

from gradflow import cache, helpers, plots, reading, report, schema, sketches
from gradflow.cache import Cache
from gradflow.errors import GradflowError
from gradflow.helpers import Helpers
from gradflow.sketches import sketch
from gradflow.store import load_runs


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """Runs are kept however new they are, and figures are made without being drawn."""
    monkeypatch.setattr(cache, "SETTLED", 0.0)

    def save(figure, stem):
        path = stem.with_name(f"{stem.name}.svg")
        path.write_text("<svg/>")
        return [path]

    monkeypatch.setattr(plots, "save", save)


@pytest.fixture
def read(monkeypatch):
    """Names of the runs that are read, not taken from what was kept."""
    names, original = [], reading.read
    monkeypatch.setattr(
        reading, "read", lambda task: names.append(task.path.name) or original(task)
    )
    return names


def gather(runs, kept):
    return report.gather(load_runs(runs), Cache(kept), Helpers(1))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- reports --------------------------------------------------------------------------------------


def test_tables_are_the_same_with_a_cache_or_none_and_by_one_process_or_two(tmp_path, monkeypatch):
    """Every kind of run; the second process is one of its own."""
    monkeypatch.setattr(helpers, "WORTH", 2)
    report_store.write_store(tmp_path / "runs")
    runs = load_runs(tmp_path / "runs")
    found = {}
    for name, processes in (("one", 1), ("two", 2)):
        for again in ("", " again"):
            page = report.write_report(runs, tmp_path / name, processes=processes)
            found[name + again] = contents(page.parent / "tables")
    assert len(found["one"]["profiles.csv"]) > 100_000
    assert found["one"] == found["one again"] == found["two"] == found["two again"]
    plain = report.gather(runs)
    kept = report.gather(runs, Cache(tmp_path / "one" / cache.DIRECTORY))
    assert plain.views == kept.views
    for name in ("profiles", "curves", "blocks", "diagnoses", "heat", "overview", "pairs"):
        pd.testing.assert_frame_equal(getattr(plain, name), getattr(kept, name))


def test_a_second_report_reads_nothing_and_draws_nothing(tmp_path, read, monkeypatch):
    report_store.write_pairs(tmp_path / "runs")
    report.write_report(load_runs(tmp_path / "runs"), tmp_path / "report")
    assert len(read) == 12
    drawn = []
    monkeypatch.setattr(sketches, "files", lambda piece: drawn.append(piece))
    page = report.write_report(load_runs(tmp_path / "runs"), tmp_path / "report")
    assert (len(read), drawn) == (12, [])
    assert {path.suffix for path in (page.parent / "figures").iterdir()} == {".svg"}
    assert (page.parent / "tables" / "profiles.csv").read_text().count("\n") > 1000


def test_a_new_run_alone_is_read_and_only_its_groups_figures_are_drawn(tmp_path, read, monkeypatch):
    for rate in (0.01, 0.02):
        for skip in ("none", "identity"):
            for seed in (0, 1):
                report_store.write_run(tmp_path / "runs", depth=8, skip=skip, seed=seed, lr=rate)
    report.write_report(load_runs(tmp_path / "runs"), tmp_path / "report")
    drawn, original = [], sketches.files
    monkeypatch.setattr(sketches, "files", lambda piece: drawn.append(piece) or original(piece))
    for rate in (0.01, 0.02):  # one of the two makes the smaller group the first
        del drawn[:], read[:]
        _new_run_alone(tmp_path, rate, read, drawn)


def _new_run_alone(tmp_path, rate, read, drawn):
    new = report_store.write_run(tmp_path / "runs", depth=8, skip="none", seed=2, lr=rate)
    report.write_report(load_runs(tmp_path / "runs"), tmp_path / "report")
    assert read == [new.name]
    frames = [argument for piece in drawn if isinstance(piece, sketches.Sketch)
              for argument in piece.arguments if isinstance(argument, pd.DataFrame)]  # fmt: skip
    assert frames
    assert all(set(frame["title"]) == {f"lr={rate}"} for frame in frames)
    sheets = [piece.frame for piece in drawn if isinstance(piece, sketches.Sheet)]
    assert len(sheets) == 3
    assert all(set(frame["title"]) == {f"lr={rate}"} for frame in sheets)
    groups = pd.read_csv(tmp_path / "report" / "tables" / "profiles.csv")
    runs = pd.read_csv(tmp_path / "report" / "tables" / "runs.csv").set_index("run")["group"]
    assert (groups["group"] == groups["run"].map(runs)).all()
    assert groups["group"].is_monotonic_increasing


def test_a_run_that_grows_is_read_anew_each_time(tmp_path, read):
    """Its parts change, run.json and the directory's name do not."""
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    columns = {"step": [0, 0], "layer": ["a", "b"], "weight_grad_norm": [1.0, 2.0]}
    modules = {"layer": ["a", "b"], "position": [0, 1], "kind": ["conv"] * 2, "stage": [1, 1],
               "shape": ["1x1"] * 2, "parameters": [1, 1], "calls": [1, 1]}  # fmt: skip
    with report_store.RunWriter(runs / "own", {}, origin="external") as writer:
        writer.write("modules", schema.table("modules", modules))
        for step in range(4):
            data = columns | {"step": [step, step], "weight_grad_norm": [1.0 + step, 2.0]}
            writer.append("weights", schema.table("weights", data))
            profiles = gather(runs, kept).profiles
            assert profiles["step"].max() == step
            assert profiles["weight_grad_norm"].max() == max(1.0 + step, 2.0)
            gather(runs, kept)
            assert len(read) == step + 1
    gather(runs, kept)  # merged into one file
    assert len(read) == 5


def test_a_run_that_is_replaced_by_one_of_equal_size_is_seen(tmp_path, read):
    """Equal name, size and modification time: another file all the same."""
    path = report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    before = gather(tmp_path / "runs", tmp_path / "kept").profiles["weight_grad_norm"]
    weights = path / "weights.parquet"
    about = weights.stat()
    data = schema.read(weights)
    place = data.column_names.index("weight_grad_norm")
    values = pa.array(np.asarray(data["weight_grad_norm"])[::-1])
    schema.write(data.set_column(place, "weight_grad_norm", values), weights)
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    after = gather(tmp_path / "runs", tmp_path / "kept").profiles["weight_grad_norm"]
    assert len(read) == 2
    assert not np.array_equal(before, after)


def test_a_run_is_kept_once_its_last_change_is_a_while_ago(tmp_path, read, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", 1e6)
    report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    for count in (1, 2):
        gather(tmp_path / "runs", tmp_path / "kept")
        assert len(read) == count
    monkeypatch.setattr(cache, "SETTLED", 0.0)
    for _ in range(2):
        gather(tmp_path / "runs", tmp_path / "kept")
        assert len(read) == 3


def test_a_run_that_changes_while_it_is_read_is_not_kept(tmp_path, read, monkeypatch):
    path = report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    original = reading.read
    monkeypatch.setattr(
        reading, "read", lambda task: (original(task), os.utime(path / "weights.parquet"))[0]
    )
    gather(tmp_path / "runs", tmp_path / "kept")
    gather(tmp_path / "runs", tmp_path / "kept")
    assert len(read) == 2


def test_a_partner_with_layers_of_its_own_has_its_runs_read_anew(tmp_path, read):
    """Which layers a run has alone depends on the other runs, and on no file of its own."""
    report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    assert set(gather(tmp_path / "runs", tmp_path / "kept").profiles["family"]) == {
        "weights", "norm"
    }  # fmt: skip
    report_store.write_run(tmp_path / "runs", depth=8, skip="rezero", extra=("conv1.gate.alpha",))
    gather(tmp_path / "runs", tmp_path / "kept")
    assert len(read) == 3


def test_the_heatmap_of_another_run_costs_no_more_than_the_heatmap(tmp_path, monkeypatch):
    asked, original = [], reading.read
    monkeypatch.setattr(reading, "read", lambda task: asked.append(task) or original(task))
    for seed in (1, 0):
        report_store.write_run(tmp_path / "runs", depth=8, skip="none", seed=seed)
        found = gather(tmp_path / "runs", tmp_path / "kept")
        assert set(found.heat["seed"]) == {seed}
        assert len(found.profiles["run"].unique()) == 2 - seed
    (lowest,) = (run.path for run in load_runs(tmp_path / "runs") if run.spec["seed"] == 0)
    (lowest / "spec.json").unlink()
    (lowest / "run.json").unlink()
    assert set(gather(tmp_path / "runs", tmp_path / "kept").heat["seed"]) == {1}
    assert [task.names == tuple(reading.READERS) for task in asked] == [True, True]


def test_what_is_damaged_is_named_each_time(tmp_path, read):
    path = report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    (path / "weights.parquet").write_bytes(b"PAR1")
    first = gather(tmp_path / "runs", tmp_path / "kept").problems
    assert len(first) == 1
    assert "weights unreadable" in first[0]
    assert gather(tmp_path / "runs", tmp_path / "kept").problems == first
    assert len(read) == 2


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:31], lambda data: data[:40], lambda data: data[:-1],
    lambda data: data + b"x", lambda data: bytes([data[0] ^ 1]) + data[1:],
    lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    lambda data: data[:-9] + bytes([data[-9] ^ 128]) + data[-8:], lambda data: b"\n" * len(data),
])  # fmt: skip
def test_what_was_kept_and_is_damaged_is_made_anew(tmp_path, read, damage):
    report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    first = gather(tmp_path / "runs", tmp_path / "kept")
    entries = {path: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert sorted(path.suffix for path in entries) == [".heat", ".run"]
    for path, whole in entries.items():
        path.write_bytes(damage(whole))
    again = gather(tmp_path / "runs", tmp_path / "kept")
    assert len(read) == 2
    pd.testing.assert_frame_equal(first.profiles, again.profiles)
    pd.testing.assert_frame_equal(first.heat, again.heat)
    assert all(path.read_bytes() == whole for path, whole in entries.items())


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, read):
    report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    (tmp_path / "kept").write_text("a file")
    for count in (1, 2):
        assert len(gather(tmp_path / "runs", tmp_path / "kept").profiles)
        assert len(read) == count


# --- the cache ------------------------------------------------------------------------------------


def test_an_entry_is_found_under_its_name_and_key_and_replaced_by_the_next(tmp_path):
    kept = Cache(tmp_path / "a" / "b")
    assert kept.load("run", "1") is None
    parts = {"x": b"\x00\n\xff" * 5, "empty": b"", "y": b"{}"}
    kept.save("run", "1", parts)
    assert kept.load("run", "1") == parts
    assert kept.load("run", "2") is None
    assert kept.load("walk", "1") is None
    kept.save("run", "2", {})
    assert kept.load("run", "1") is None
    assert kept.load("run", "2") == {}
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run"]
    other = Cache(tmp_path / "a" / "b")
    other.save("new", "1", {})
    other.prune()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["new"]
    assert Cache().load("run", "2") is None


def test_a_digest_tells_apart_what_differs_and_nothing_else(monkeypatch):
    frame = pd.DataFrame({"a": [1.0, np.nan], "b": ["x", None], "c": [1, "1"]})
    null = pd.arrays.ArrowExtensionArray(pa.array([1.0, None]))
    measured = pd.arrays.ArrowExtensionArray(pa.array([1.0, np.nan], from_pandas=False))
    different = [
        (), (frame,), (frame, frame), (frame.assign(a=[1.0, 2.0]),), (frame.assign(a=null),),
        (frame.assign(a=measured),), (frame.assign(c=[1, 1]),), (frame.assign(c=["1", "1"]),),
        (frame.rename(columns={"a": "d"}),), (frame[["b", "a", "c"]],), (frame[:1],),
        (frame.assign(b=["x", ""]),), ("a",), (b"a",), (1,), ("1",), (["a"],), ("a", "b"), ("ab",),
        (None,),
    ]  # fmt: skip
    assert len({cache.digest(*values) for values in different}) == len(different)
    assert cache.digest(frame) == cache.digest(pd.concat([frame[:1], frame[1:]]).copy())
    assert cache.digest(frame) == cache.digest(frame.set_axis([5, 6]))
    before = cache.digest("a")
    monkeypatch.setattr(cache, "code", lambda: "another version")
    assert cache.digest("a") != before


def test_frames_come_back_as_they_were_one_under_another():
    def arrow(values, kind=None):
        return pd.arrays.ArrowExtensionArray(pa.array(values, kind, from_pandas=False))

    one = pd.DataFrame({
        "step": [0, 1, 2], "value": [1.5, np.nan, np.inf],
        "measured": arrow([1.0, np.nan, None], pa.float32()), "text": ["é", "b", None],
        "layer": pd.Categorical(["b", "a", "b"], ["b", "a"]), "final": [True, False, True],
    })  # fmt: skip
    found, counts = cache.decode([cache.encode(one)])
    pd.testing.assert_frame_equal(found, one)
    assert counts == [3]
    assert found["measured"].array.__arrow_array__().null_count == 1
    other = one.assign(layer=pd.Categorical(["c", "a", "b"], ["c", "a", "b"]))
    found, counts = cache.decode([cache.encode(part) for part in (one, other[:2], one)])
    assert counts == [3, 2, 3]
    assert list(found["layer"]) == ["b", "a", "b", "c", "a", "b", "a", "b"]
    lacking = one.drop(columns="measured").assign(own=1)
    found, counts = cache.decode([cache.encode(part) for part in (one, lacking, one)])
    assert counts == [3, 3, 3]
    assert list(found["own"].isna()) == [True] * 3 + [False] * 3 + [True] * 3


def test_code_and_libraries_are_part_of_every_key(tmp_path, monkeypatch):
    before = cache.code()
    monkeypatch.setattr(cache, "version", lambda name: "0.0")
    cache.code.cache_clear()
    try:
        assert cache.code() != before
        (tmp_path / "one.py").write_text("x = 1")
        monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
        cache.code.cache_clear()
        first = cache.code()
        (tmp_path / "one.py").write_text("x = 2")
        cache.code.cache_clear()
        assert cache.code() != first
    finally:
        cache.code.cache_clear()


# --- sketches -------------------------------------------------------------------------------------


def test_a_sketch_is_known_by_all_that_it_is_made_of():
    frame = pd.DataFrame({"a": [1.0]})
    keys = {
        sketch(*given, **options).key()
        for given, options in (
            (("profile", frame), {}), (("profile", frame), {"title": "a"}),
            (("profile", frame), {"title": "b"}), (("heatmap", frame), {}),
            (("profile", frame + 1), {}), (("profile", frame, frame), {}),
            (("profile", frame, "title", "a"), {}), (("profile", frame), {"family": "a"}),
        )
    }  # fmt: skip
    assert len(keys) == 8
    assert sketch("profile", frame.copy(), title="a").key() in keys


# --- helpers --------------------------------------------------------------------------------------


def test_helpers_share_the_work_and_give_it_in_order(monkeypatch):
    monkeypatch.setattr(helpers, "WORTH", 1)
    with Helpers(2, ["json"]) as two:
        assert two.map(json.dumps, range(100)) == [str(number) for number in range(100)]
        assert two.map(json.dumps, []) == []
        assert len(two.map(os.getpgid, [0] * 50)) == 50
        (child,) = two._children
        assert child.poll() is None
    assert child.poll() is not None


def test_a_helpers_error_is_raised_here():
    with Helpers(2) as two:
        two.start()
        with pytest.raises(json.JSONDecodeError):
            two.map(json.loads, ["1", "x", "2"])


def test_what_a_helper_died_of_is_done_here():
    with Helpers(3) as three:
        three.start()
        one, _ = three._children
        one.kill()
        one.wait()
        assert three.map(json.dumps, range(20)) == [str(number) for number in range(20)]
        work = three.work(_die_elsewhere)
        for _ in range(3):
            work.add(os.getpid())
        assert work.results() == [os.getpid()] * 3


def _die_elsewhere(here):
    assert os.getpid() == here
    return here


def test_without_processes_all_is_done_here(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no more processes")

    monkeypatch.setattr(helpers.subprocess, "Popen", refuse)
    with Helpers(4) as alone:
        alone.start()
        assert alone.map(json.dumps, range(50)) == [str(number) for number in range(50)]


def test_a_report_without_runs_says_so(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(GradflowError, match="no runs"):
        report.write_report(load_runs(tmp_path / "runs"), tmp_path / "report")
