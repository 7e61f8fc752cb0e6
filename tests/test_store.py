"""Runs on disk: written so that a kill leaves them readable, locked, found again, read together."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crash import die

from gradflow import load_runs, schema, store
from gradflow.errors import StoreError
from gradflow.spec import RunSpec
from gradflow.store import CHECKPOINT, Run, RunWriter, decode, encode, find, mark_dead, prepare

LAYERS = ["conv1", "bn1", "fc"]


def weights(step: int, value: float = 1.0) -> pa.Table:
    layer = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), LAYERS)
    norms = np.float32([value, 2 * value, 3 * value])
    return schema.table("weights", {"step": [step] * 3, "layer": layer, "weight_norm": norms})


def modules() -> pa.Table:
    columns: dict[str, Any] = {"layer": LAYERS, "position": [0, 1, 2], "stage": [1, 1, 2]}
    return schema.table("modules", columns | {"kind": ["conv", "norm", "linear"]})


def write(
    path: Path, spec: dict[str, Any] | RunSpec, *, status: str = "done", **fields: Any
) -> Run:
    """A small run of two steps, of `spec`'s; external if that is a dict."""
    origin, content = "external", spec
    if isinstance(spec, RunSpec):
        origin, content, path = "gradflow", spec.to_dict(), path / spec.name
    writer = RunWriter(path, content, origin=origin)
    writer.write("modules", modules())
    for step in range(2):
        writer.append("weights", weights(step))
    writer.append("steps", schema.table("steps", {"step": [0, 1], "loss": [1.0, 0.5]}))
    writer.finish(status, **fields)
    return Run(writer.path)


def names(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


# --- JSON -----------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_words_in_json() -> None:
    value = {"a": [1, -2.5, math.inf], "b": {"c": -math.inf, "d": None}, "e": "text", "f": True}
    plain = encode(value | {"g": (math.nan, 1)})
    assert plain["a"] == [1, -2.5, "Infinity"]
    assert plain["b"]["c"] == "-Infinity"
    assert plain["g"] == ["NaN", 1]
    back = decode(json.loads(json.dumps(plain, allow_nan=False)))
    assert math.isnan(back.pop("g")[0])
    assert back == value


# --- writing --------------------------------------------------------------------------------------


def test_parts_while_running_one_file_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunWriter(path, {"depth": 3}) as writer:
        assert names(path) == ["attempt-1", "run.json", "spec.json"]
        assert names(writer.attempt) == ["claim.json"]
        for step in range(12):
            writer.append("weights", weights(step))
        writer.append("steps", weights(0).slice(0, 0))  # no rows, no file
        parts = [f"weights-{count:06d}.parquet" for count in range(1, 13)]
        assert names(writer.attempt) == ["claim.json", *parts]
        running = Run(path)
        assert (running.status, running.alive) == ("running", True)
        assert running.frame("weights")["step"].tolist() == [s for s in range(12) for _ in LAYERS]
        assert not list(path.rglob("*.tmp"))
    assert names(path) == ["run.json", "spec.json", "weights.parquet"]
    done = Run(path)
    assert (done.status, done.alive) == ("done", False)
    assert done.frame("weights").equals(running.frame("weights"))
    assert done.table("steps") is None
    assert done.frame("steps").empty
    lasted = done.record["ended"] - done.record["started"]
    assert 0 <= done.record["seconds"] == pytest.approx(lasted, abs=1e-2)
    assert pq.read_metadata(path / "weights.parquet").num_rows == 36


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, "done", None),
        (ValueError("no"), "failed", "ValueError: no"),
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(0), "interrupted", None),
    ],
)
def test_the_status_is_how_the_writer_was_left(
    error: BaseException | None, status: str, said: str | None, tmp_path: Path
) -> None:
    def run() -> None:
        with RunWriter(tmp_path, {}) as writer:
            writer.append("weights", weights(0))
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    found = Run(tmp_path)
    assert (found.status, found.record.get("error")) == (status, said)
    assert len(found.frame("weights")) == 3


def interrupted_in_a_library() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise RuntimeError("made of it") from None


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ValueError("no"), "raised"),
        (FileNotFoundError(errno.ENOENT, "a file of the network's"), "raised"),
        (OSError(errno.ENOSPC, "full"), "system"),
        (StoreError("cannot be written"), "system"),
        (MemoryError(), "system"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "system"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "system"),
    ],
)
def test_what_ended_a_failed_run(error: BaseException, failure: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), RunWriter(tmp_path, {}):
        raise error
    assert (Run(tmp_path).status, Run(tmp_path).record["failure"]) == ("failed", failure)


def test_an_interrupt_that_a_library_turned_into_something_else(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunWriter(tmp_path, {}):
        interrupted_in_a_library()
    assert Run(tmp_path).status == "interrupted"


def test_a_status_given_before_the_end_stays(tmp_path: Path) -> None:
    def run() -> None:
        with RunWriter(tmp_path, {}) as writer:
            writer.finish("diverged", steps=7)
            raise ValueError

    with pytest.raises(ValueError):
        run()
    assert Run(tmp_path).record["status"] == "diverged"
    assert Run(tmp_path).record["steps"] == 7


def test_a_kill_while_parts_are_merged_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file it is killed before: some tables whole, some in parts, none twice."""
    expected = {"weights": [0, 0, 0, 1, 1, 1], "steps": [0, 1]}
    write_file = schema.write

    def fill(path: Path) -> RunWriter:
        writer = RunWriter(path, {})
        for step in range(2):
            writer.append("weights", weights(step))
            writer.append("steps", schema.table("steps", {"step": [step], "loss": [1.0]}))
        return writer

    for survived in range(3):
        writer = fill(tmp_path / str(survived))
        left = iter(range(survived))

        def limited(data: pa.Table, path: Path, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            write_file(data, path)

        monkeypatch.setattr(schema, "write", limited)
        if survived < 2:
            with pytest.raises(KeyboardInterrupt):
                writer.finish("done")
        else:
            writer.finish("done")
        monkeypatch.setattr(schema, "write", write_file)
        found = Run(writer.path)
        assert found.status == ("done" if survived == 2 else "running")
        for name, steps in expected.items():
            assert found.frame(name)["step"].tolist() == steps


def test_a_table_merged_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path, {})
    writer.append("weights", weights(0))
    reader, read = Run(tmp_path), schema.read

    def too_late(path: Path, *options: object) -> pa.Table:
        monkeypatch.setattr(schema, "read", read)
        writer.finish("done")
        return read(path, *options)

    monkeypatch.setattr(schema, "read", too_late)
    assert len(reader.frame("weights")) == 3
    assert Run(tmp_path).status == "done"


# --- one process at a time ------------------------------------------------------------------------


def test_two_writers_on_one_directory_refuse(tmp_path: Path) -> None:
    first = RunWriter(tmp_path, {"depth": 1})
    first.append("weights", weights(0))
    with pytest.raises(StoreError, match="another process is computing this run"):
        RunWriter(tmp_path, {"depth": 2})
    assert Run(tmp_path).spec == {"depth": 1}
    assert len(Run(tmp_path).frame("weights")) == 3
    first.finish("done")
    RunWriter(tmp_path, {"depth": 2}).finish("done")
    assert Run(tmp_path).spec == {"depth": 2}


def test_what_an_unfinished_attempt_left_is_removed(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {"depth": 1})
    writer.append("weights", weights(0))
    writer.write("modules", modules())
    writer.finish("failed", error="KeyError")
    (tmp_path / ".weights.parquet.123.tmp").touch()
    (tmp_path / "attempt-7").mkdir()
    (tmp_path / "attempt-7" / "steps-000001.parquet").touch()
    (tmp_path / "wandb").mkdir()
    RunWriter(tmp_path, {"depth": 1}).finish("done")
    assert names(tmp_path) == ["run.json", "spec.json", "wandb"]
    assert Run(tmp_path).record.get("error") is None


def test_a_stale_checkpoint_is_removed_with_its_parts(tmp_path: Path) -> None:
    """Else a third attempt could go on from the first's checkpoint with the second's parts."""
    writer = RunWriter(tmp_path, {})
    writer.append("weights", weights(0))
    (writer.attempt / CHECKPOINT).touch()
    writer.finish("failed")
    RunWriter(tmp_path, {}, keep=lambda path: 1).finish("failed")
    assert names(tmp_path) == ["attempt-2", "run.json", "spec.json"]
    assert names(tmp_path / "attempt-2") == [CHECKPOINT, "weights-000001.parquet"]
    assert "tables" not in Run(tmp_path).record
    RunWriter(tmp_path, {}).finish("failed")
    assert names(tmp_path) == ["run.json", "spec.json"]


def test_a_damaged_record_does_not_stop_what_can_go_on(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {})
    writer.append("weights", weights(0))
    (writer.attempt / CHECKPOINT).touch()
    writer.finish("failed")
    (tmp_path / "run.json").write_text("{")
    RunWriter(tmp_path, {}, keep=lambda path: 1).finish("done")
    assert len(Run(tmp_path).frame("weights")) == 3


def test_a_directory_that_is_no_run_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_text("precious")
    for _ in range(2):  # and is not left locked
        with pytest.raises(StoreError, match=r"holds other files, and no run$"):
            RunWriter(tmp_path, {})
    assert names(tmp_path) == ["mine.parquet"]
    (tmp_path / "mine.parquet").unlink()
    (tmp_path / ".hidden").touch()
    RunWriter(tmp_path, {}).finish("done")


def test_a_writer_that_cannot_begin_leaves_no_lock(tmp_path: Path) -> None:
    RunWriter(tmp_path, {}).finish("failed")
    (tmp_path / "weights.parquet").mkdir()
    with pytest.raises(StoreError, match="cannot be written") as caught:
        RunWriter(tmp_path, {})
    assert "\n" not in str(caught.value)
    (tmp_path / "weights.parquet").rmdir()
    RunWriter(tmp_path, {}).finish("done")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/run: cannot be written \(Not a directory\)"):
        RunWriter(tmp_path / "file" / "run", {})
    with pytest.raises(StoreError, match=r"^runs_dir=.*file: cannot be written"):
        prepare(tmp_path / "file")
    assert prepare(tmp_path / "new" / "runs").is_dir()
    assert names(tmp_path / "new" / "runs") == []


def test_only_the_dead_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "run"
    mark_dead(path, "failed", "killed")  # never begun
    assert not path.exists()
    writer = RunWriter(path, {})
    mark_dead(path, "failed", "killed")  # alive
    assert Run(path).status == "running"
    writer.append("weights", weights(0))
    die(writer)
    mark_dead(path, "failed", "killed by signal 9")
    assert Run(path).status == "failed"
    assert Run(path).record["error"] == "killed by signal 9"
    assert len(Run(path).frame("weights")) == 3
    mark_dead(path, "interrupted", "again")  # has ended already
    assert Run(path).status == "failed"


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", '{"status": "do'),
        ("run.json", "[1, 2]"),
        ("run.json", '{"status": "finished"}'),
        ("run.json", "{}"),
        ("spec.json", ""),
        ("spec.json", b"\xff\xfe\x00"),
        ("spec.json", None),
        ("run.json", None),
    ],
)
def test_a_damaged_run_is_a_problem_and_not_the_end(
    name: str, content: str | bytes | None, tmp_path: Path
) -> None:
    write(tmp_path / "good", {"depth": 1})
    write(tmp_path / "bad", {"depth": 2})
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one.svg").touch()
    (tmp_path / "note.txt").touch()
    path = tmp_path / "bad" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(StoreError, match=f"bad/{name}: (unreadable|missing)"):
        Run(tmp_path / "bad")
    runs = load_runs(tmp_path)
    assert [run.path.name for run in runs] == ["good"]
    assert [problem.split(":")[0] for problem in runs.problems] == [str(path)]
    assert not any("\n" in problem for problem in runs.problems)
    assert runs.weights()["step"].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", ["weights", "modules"])
@pytest.mark.parametrize("keep", [0, 100, -8])
def test_a_truncated_file_is_a_problem_and_not_the_end(
    name: str, keep: int, tmp_path: Path
) -> None:
    write(tmp_path / "good", {"depth": 1})
    write(tmp_path / "bad", {"depth": 2})
    path = tmp_path / "bad" / f"{name}.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=f"bad: {name} unreadable"):
        Run(tmp_path / "bad").frame(name)
    runs = load_runs(tmp_path)
    for _ in range(2):  # named once, however often it is asked for
        assert runs.weights()["depth"].tolist() == [1] * 6
        assert len(runs.problems) == 1
        assert "bad" in runs.problems[0]
        assert "\n" not in runs.problems[0]
    assert len(runs.steps()) == 4


def test_a_truncated_part_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.append("weights", weights(0))
    writer.append("weights", weights(1))
    path = tmp_path / "run" / "attempt-1" / "weights-000002.parquet"
    path.write_bytes(path.read_bytes()[:50])
    runs = load_runs(tmp_path)
    assert runs.weights().empty
    assert len(runs.problems) == 1
    writer.append("steps", schema.table("steps", {"step": [0], "loss": [1.0]}))
    assert len(runs.steps()) == 1


def test_a_table_of_somebody_else_is_a_problem(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {})
    pq.write_table(pa.table({"a": [1]}), run.path / "weights.parquet")
    with pytest.raises(StoreError, match=r"weights unreadable \(has no layer, step\)"):
        run.frame("weights")
    assert load_runs(tmp_path).weights("weight_norm").empty


def test_no_store_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere: no such directory of runs$"):
        load_runs(tmp_path / "nowhere")
    empty = load_runs(tmp_path)
    assert len(empty) == 0
    assert empty.problems == []
    assert empty.runs.empty
    assert empty.weights().empty
    assert empty.meanings() == {}


# --- reuse ----------------------------------------------------------------------------------------


def test_a_finished_run_of_the_same_spec_is_found(tmp_path: Path) -> None:
    spec = RunSpec(depth=8)
    assert find(tmp_path, spec) is None
    for status in ("done", "diverged"):
        write(tmp_path, spec, status=status)
        found = find(tmp_path, spec)
        assert found is not None
        assert found.status == status
        assert found.run_id == spec.run_id


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_an_unfinished_run_is_not_reused(status: str, tmp_path: Path) -> None:
    spec = RunSpec(depth=8)
    write(tmp_path, spec, status=status)
    assert find(tmp_path, spec) is None


def test_a_run_that_is_not_what_its_name_says_is_not_reused(tmp_path: Path) -> None:
    spec = RunSpec(depth=8, network="cifar", milestones=[3, 5], schedule="step")
    run = write(tmp_path, spec)
    assert find(tmp_path, spec) is not None  # also with a tuple in it
    path = run.path / "spec.json"
    for change in ({"lr": 0.5}, {"data": {"name": "synthetic"}}, {"depth": None}):
        path.write_text(json.dumps(json.loads(json.dumps(spec.to_dict())) | change))
        assert find(tmp_path, spec) is None
    path.write_text("{")
    assert find(tmp_path, spec) is None
    path.unlink()
    assert find(tmp_path, spec) is None


# --- many -----------------------------------------------------------------------------------------


def fill(path: Path) -> store.Runs:
    for depth, skip in ((8, False), (8, True), (14, True)):
        metrics = {"train_loss": math.nan if skip else 0.5, "train_accuracy": 0.25}
        write(
            path, RunSpec(depth=depth, skip=skip), metrics=metrics,
            certificate={"parameter_count": depth * 1000}, recorder_share=0.01,
        )  # fmt: skip
    write(path / "mine", {"depth": 3, "skip": "none", "optimizer": "lion", "status": "x"})
    return load_runs(path)


def test_one_row_a_run(tmp_path: Path) -> None:
    runs = fill(tmp_path)
    frame = runs.runs
    assert len(frame) == len(runs) == 4
    assert frame["origin"].tolist() == ["gradflow"] * 3 + ["external"]
    assert frame["status"].tolist() == ["done"] * 4
    assert frame["depth"].tolist() == [14, 8, 8, 3]
    assert frame["network"].isna().tolist() == [False] * 3 + [True]
    assert frame["optimizer"].tolist() == ["sgd"] * 3 + ["lion"]
    assert frame["data_seed"].isna().all()
    assert frame["parameter_count"].isna().tolist() == [False] * 3 + [True]
    assert frame["run_id"].is_unique
    assert frame["run_id"].tolist()[1] == RunSpec(depth=8, skip=True).run_id
    loss = frame["train_loss"]  # NaN was measured; the last was not
    assert loss.isna().tolist() == [False, False, False, True]
    assert [math.isnan(value) for value in loss.tolist()[:3]] == [True, True, False]
    types = {name: str(frame[name].dtype) for name in ("depth", "skip", "lr", "run", "seconds")}
    assert types == {
        "depth": "int64[pyarrow]", "skip": "string[pyarrow]", "lr": "double[pyarrow]",
        "run": "string[pyarrow]", "seconds": "double[pyarrow]",
    }  # fmt: skip
    assert {
        "run_id", "run", "path", "origin", "status", "network", "depth", "skip", "seed", "data",
        "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "parameter_count",
        "steps", "seconds", "recorder_share", "error", "record_every_weights",
    } <= set(frame.columns)  # fmt: skip


def test_a_table_over_all_runs(tmp_path: Path) -> None:
    runs = fill(tmp_path)
    frame = runs.weights()
    assert len(frame) == 4 * 6
    assert frame.columns[0] == "run_id"
    core = ["network", "depth", "skip", "seed", "data", "lr"]
    assert {*core, "optimizer"} <= set(frame.columns)  # and that in which they differ
    assert not {"norm", "momentum", "batch_size"} & set(frame.columns)
    assert frame["layer"].tolist() == LAYERS * 8
    assert frame["position"].tolist() == [0, 1, 2] * 8
    assert frame["kind"].tolist() == ["conv", "norm", "linear"] * 8
    assert frame["weight_norm"].tolist() == [1, 2, 3] * 8
    assert frame["depth"].tolist() == [14] * 6 + [8] * 12 + [3] * 6
    for run in runs:
        own = frame[frame["run_id"] == run.run_id]
        assert own["weight_norm"].tolist() == run.frame("weights")["weight_norm"].tolist()
    chosen = runs.weights(fields=["depth"]).columns.tolist()
    assert chosen == [
        "run_id", "depth", "step", "layer", "weight_norm", "position", "stage", "kind"
    ]  # fmt: skip
    assert runs.modules(fields=())["layer"].tolist() == LAYERS * 4
    assert runs.steps("loss", fields=())["loss"].tolist() == [1.0, 0.5] * 4
    assert runs.outputs().empty
    assert runs.weights("update_norm").empty


def test_some_steps_of_a_table_alone(tmp_path: Path) -> None:
    run = write(tmp_path / "mine", {})
    assert run.steps_of("weights").tolist() == run.steps_of("steps").tolist() == [0, 1]
    assert run.steps_of("outputs").tolist() == []
    frame = run.with_modules("weights", [1, 7])
    assert frame["step"].tolist() == [1] * 3
    assert frame["position"].tolist() == [0, 1, 2]
    assert run.with_modules("weights", []).empty
    assert len(run.with_modules("weights")) == 6


def test_a_run_that_is_held_reads_each_table_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read, original = write(tmp_path / "mine", {}), [], Run._read

    def look(run: Run, name: str, *options: object) -> pa.Table | None:
        read.append(name)
        return original(run, name, *options)

    monkeypatch.setattr(Run, "_read", look)
    held = run.held()
    assert held.held() is held
    for _ in range(2):
        assert len(held.with_modules("weights")) == 6
        assert held.table("outputs") is None
    assert read == ["weights", "modules", "outputs"]
    run.table("weights")
    run.table("weights")
    assert read[3:] == ["weights"] * 2


def test_a_quantity_alone_comes_without_its_nulls(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    values = np.ma.masked_array([1.0, math.nan, 3.0], [False, False, True])
    writer.append("steps", schema.table("steps", {"step": [0, 1, 2], "loss": values}))
    writer.append("steps", schema.table("steps", {"step": [3], "lr": [0.1]}))
    runs = load_runs(tmp_path)
    alone = runs.steps("loss")
    assert alone["step"].tolist() == [0, 1]
    assert "lr" not in runs.steps("loss", fields=())
    assert alone["loss"].tolist()[0] == 1
    assert math.isnan(alone["loss"].tolist()[1])
    assert runs.steps()["loss"].isna().tolist() == [False, False, True, True]


def test_users_may_call_things_as_they_like(tmp_path: Path) -> None:
    """Words and numbers in one column, lists, and what one has and another lacks."""
    write(tmp_path / "a", {"depth": 56, "seed": 0, "widths": [1, 2], "lr": 1})
    write(tmp_path / "b", {"depth": "deep", "seed": None, "lr": 0.5, "nested": {"x": {"y": 2}}})
    runs = load_runs(tmp_path)
    for frame in (runs.runs, runs.weights().drop_duplicates("run_id")):
        assert frame["depth"].tolist() == ["56", "deep"]
        assert frame["lr"].tolist() == [1.0, 0.5]
        assert frame["seed"].isna().tolist() == [False, True]
    assert runs.runs["widths"].tolist()[0] == "[1, 2]"
    assert runs.runs["nested_x_y"].tolist()[1] == 2


def test_stores_are_read_together_and_a_run_alone(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a", {})
    write(tmp_path / "two" / "b", {})
    (tmp_path / "two" / ".trash").mkdir()
    both = load_runs(tmp_path / "one", str(tmp_path / "two"))
    assert [run.path.name for run in both] == ["a", "b"]
    assert both.problems == []
    assert [run.path.name for run in load_runs(tmp_path / "one" / "a")] == ["a"]
    (tmp_path / "mine").mkdir()
    outer = load_runs(tmp_path)
    assert len(outer) == 0
    assert outer.problems == [
        f"{tmp_path / name}: a store in the store; load it by its path" for name in ("one", "two")
    ]
    inner = load_runs(tmp_path, tmp_path / "one")
    assert [run.path.name for run in inner] == ["a"]
    assert inner.problems == outer.problems[1:]


@pytest.mark.parametrize("name", ["two\nlines", "a\ttab", "a\u2028b", "bell\a"])
def test_a_name_that_would_break_a_line_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError) as caught:
        RunWriter(tmp_path / name, {}, origin="external")
    assert str(caught.value).endswith(": a run's name has no line breaks or control characters")
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())
    RunWriter(tmp_path / "größe 2 – a&b", {}, origin="external").finish("done")


# --- what guards reuse, and what is not replaced --------------------------------------------------


def finished(path: Path, **options: str) -> Path:
    with RunWriter(path, {"seed": 0}, **options) as writer:
        writer.write("modules", schema.table("modules", {"layer": ["a", "b"], "position": [0, 1]}))
        writer.append("weights", weights(0))
    return path


def test_a_finished_run_whose_tables_are_damaged_is_not_reused(tmp_path: Path) -> None:
    spec = RunSpec()
    with RunWriter(tmp_path / spec.name, spec.to_dict()) as writer:
        writer.append("weights", weights(0))
    path = tmp_path / spec.name
    assert find(tmp_path, spec) is not None
    size = (path / "weights.parquet").stat().st_size
    assert Run(path).record["tables"] == {"weights": {"rows": 3, "bytes": size}}
    whole = (path / "weights.parquet").read_bytes()
    (path / "weights.parquet").write_bytes(whole[: len(whole) // 2])
    assert find(tmp_path, spec) is None
    (path / "weights.parquet").unlink()
    assert find(tmp_path, spec) is None
    schema.write(weights(0).slice(0, 0), path / "weights.parquet")
    assert find(tmp_path, spec) is None
    record = Run(path).record
    del record["tables"]  # as older runs are
    (path / "run.json").write_text(json.dumps(record))
    assert find(tmp_path, spec) is not None
    write(tmp_path, spec)  # computed again, over what was left
    found = find(tmp_path, spec)
    assert found is not None
    rows = {name: table["rows"] for name, table in found.record["tables"].items()}
    assert rows == {"modules": 3, "weights": 6, "steps": 2}


def test_a_finished_record_of_a_users_loop_is_not_replaced(tmp_path: Path) -> None:
    finished(tmp_path / "mine", origin="external")
    with pytest.raises(StoreError, match="mine: holds a finished run; save elsewhere"):
        RunWriter(tmp_path / "mine", {}, origin="external")
    ours = finished(tmp_path / "ours")
    RunWriter(ours, {}).finish("failed")
    with pytest.raises(StoreError, match="ours: holds a run of another origin"):
        RunWriter(ours, {}, origin="external")
    assert Run(tmp_path / "mine").status == "done"
    (tmp_path / "mine" / "run.json").write_text('{"status": "done",}')  # edited by hand
    with pytest.raises(StoreError, match=r"run\.json: unreadable"):
        RunWriter(tmp_path / "mine", {}, origin="external")
    assert len(pq.read_table(tmp_path / "mine" / "weights.parquet")) == 3


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_an_unfinished_record_is_replaced_by_its_own_kind_alone(
    status: str, tmp_path: Path
) -> None:
    for spec, path, own, other in (
        ({"depth": 1}, tmp_path / "mine", "external", "gradflow"),
        (RunSpec(), tmp_path, "gradflow", "external"),
    ):
        path = write(path, spec, status=status).path
        with pytest.raises(StoreError, match="holds a run of another origin; save elsewhere"):
            RunWriter(path, {}, origin=other)
        assert len(Run(path).frame("weights")) == 6
        RunWriter(path, {}, origin=own).finish("done")
        assert Run(path).frame("weights").empty


def test_layers_without_their_modules_are_named(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    run = Run(path)
    assert run.with_modules("weights")["position"].tolist()[:2] != [None, None]
    assert run.with_modules("modules").equals(run.frame("modules"))
    (path / "modules.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="modules unreadable"):
        run.with_modules("weights")
    (path / "modules.parquet").unlink()
    with pytest.raises(StoreError, match=r"modules\.parquet: missing"):
        Run(path).with_modules("weights")
    runs = load_runs(tmp_path)
    assert runs.weights().empty
    assert "modules.parquet: missing" in runs.problems[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metrics", {"train_loss": "low"}),
        ("metrics", {"test_accuracy": None}),
        ("metrics", {"test_accuracy": True}),
        ("metrics", None),
        ("certificate", None),
        ("certificate", {"parameter_count": "many"}),
        ("certificate", {"parameters": []}),
        ("environment", []),
        ("environment", {"versions": ["torch"]}),
        ("environment", {"git": "main"}),
        ("origin", None),
        ("seconds", "long"),
        ("error", ["a", "b"]),
        ("divergence", 3),
        ("resumed", {}),
        ("tables", [3]),
        ("status", 3),
    ],
)
def test_a_record_of_wrong_types_is_named_and_passed_over(
    tmp_path: Path, name: str, value: object
) -> None:
    path = finished(tmp_path / "run")
    record = json.loads((path / "run.json").read_text()) | {name: value}
    (path / "run.json").write_text(json.dumps(record))
    runs = load_runs(tmp_path)
    assert len(runs) == 0
    (problem,) = runs.problems
    assert problem.startswith(
        f"{path / 'run.json'}: unreadable ({'no ' * (name == 'status')}{name}"
    )


def test_what_a_record_may_leave_open(tmp_path: Path) -> None:
    nulls = {"recorder_share": None, "error": None, "divergence": None, "steps": None}
    for name, record in (("bare", {}), ("null", nulls | {"environment": {"git": None}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"status": "done"} | record))
        (tmp_path / name / "spec.json").write_text("{}")
    runs = load_runs(tmp_path)
    assert runs.problems == []
    assert runs.runs["steps"].isna().tolist() == [True, True]


def test_one_name_in_two_stores_is_two_runs_and_one_directory_counts_once(tmp_path: Path) -> None:
    for place in ("a", "b"):
        finished(tmp_path / place / "run", origin="external")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    again = [tmp_path / "a", f"{tmp_path}/b/../a", tmp_path / "link", tmp_path / "b" / "run"]
    both = load_runs(tmp_path / "a", tmp_path / "b", *again)
    assert len(both) == 2
    assert both.runs["run_id"].nunique() == both.weights()["run_id"].nunique() == 2
    assert Run(tmp_path / "link" / "run").run_id == both.runs["run_id"].tolist()[0]


def test_huge_numbers_in_meta_are_text(tmp_path: Path) -> None:
    write(tmp_path / "a", {"depth": 10**30, "seed": 10**20, "lr": 0.5})
    write(tmp_path / "b", {"depth": "deep", "seed": 1, "lr": 10**30}, steps=10**20)
    runs = load_runs(tmp_path)
    for frame in (runs.runs, runs.steps().drop_duplicates("run_id")):
        assert frame["depth"].tolist() == [str(10**30), "deep"]
        assert frame["seed"].tolist() == [str(10**20), "1"]
        assert frame["lr"].tolist() == ["0.5", str(10**30)]


def test_nothing_recorded_is_an_empty_frame_with_its_columns(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", {}).finish("done")
    frame = load_runs(tmp_path).weights("weight_grad_norm")
    types = {name: str(dtype) for name, dtype in frame.dtypes.items()}
    assert types == {
        "run_id": "category", "step": "int32[pyarrow]", "layer": "category",
        "weight_grad_norm": "double[pyarrow]",
    }  # fmt: skip
    assert frame.empty
    assert list(load_runs(tmp_path).steps()) == ["run_id", "step"]


def test_a_run_of_a_newer_version_is_reused_and_read(tmp_path: Path) -> None:
    """Its id says that the keys unknown here are as if they were not there."""
    spec = RunSpec(depth=8)
    path = write(tmp_path, spec).path
    newer = spec.to_dict() | {"sharpness": 2, "data": {"name": "digits", "crop": False}}
    (path / "spec.json").write_text(json.dumps(newer))
    assert find(tmp_path, spec) is not None
    runs = load_runs(tmp_path)
    assert runs.runs["sharpness"].tolist() == [2]
    assert runs.problems == []


# --- few files ------------------------------------------------------------------------------------


def test_many_parts_become_few_and_no_row_is_lost(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    most = 0
    for step in range(200):
        writer.append("weights", weights(step))
        writer.append("steps", schema.table("steps", {"step": [step], "loss": [1.0]}))
        if step % 10 == 9:
            writer.settle()
            most = max(most, len(list(writer.attempt.glob("*.parquet"))))
    assert most <= 2 * 8
    reader = Run(tmp_path / "run")
    assert reader.frame("steps")["step"].tolist() == list(range(200))
    assert reader.frame("weights")["step"].tolist() == [s for s in range(200) for _ in LAYERS]
    writer.finish("done")
    assert Run(tmp_path / "run").frame("steps").equals(reader.frame("steps"))


def test_a_kill_while_parts_are_joined_doubles_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter(tmp_path, {})
    for step in range(4):
        writer.append("weights", weights(step))
    unlink, left = Path.unlink, iter(range(2))

    def killed(path: Path, **options: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.settle()
    assert len(list(writer.attempt.glob("weights-*"))) == 3  # the joined one, and two of four
    assert Run(tmp_path).frame("weights")["step"].tolist() == [s for s in range(4) for _ in LAYERS]
    die(writer)
    again = RunWriter(tmp_path, {}, keep=lambda attempt: 4)
    assert names(again.attempt) == ["claim.json", "weights-000001-000004.parquet"]
    again.append("weights", weights(4))
    again.finish("done")
    assert len(Run(tmp_path).frame("weights")) == 15


def test_a_users_long_loop_leaves_few_parts(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {}, origin="external")
    for step in range(640):
        writer.append("steps", schema.table("steps", {"step": [step]}))
    assert len(list(writer.attempt.glob("*.parquet"))) <= 10
    assert Run(tmp_path).frame("steps")["step"].tolist() == list(range(640))
