"""Whole runs on images: pairs, ranks, resumed runs, and the command line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import formats
import numpy as np
import pytest

import gradflow
from gradflow.spec import RunSpec
from gradflow.store import CHECKPOINT, Run
from gradflow.training import checkpoint

pytestmark = pytest.mark.vision

TINY = {"depth": 8, "width": 4, "norm": "none", "padding": "circular", "precision": "fp64"}
TABLES = ("weights", "outputs", "blocks", "steps", "evaluations")


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """CIFAR-10 in its format, and a folder of JPEGs."""
    root = tmp_path_factory.mktemp("sets")
    formats.write("cifar10", root)
    formats.write_folder(root / "folder", classes=4, train=25, val=5)
    return root


def data_of(name: str, root: Path) -> dict:
    if name == "imagefolder":
        return {"name": name, "root": str(root / "folder"), "size": 32, "workers": 2}
    return {"name": name, "root": str(root), "augment": True}


def spec_of(name: str, root: Path, **keys) -> RunSpec:
    return RunSpec(**TINY | {"batch_size": 20, "epochs": 2} | keys, data=data_of(name, root))  # type: ignore[arg-type]


def run(spec: RunSpec, store: Path, **settings) -> Run:
    settings = {"device": "cpu", "threads": 1} | settings
    return gradflow.run(spec, runs_dir=str(store), **settings)


def assert_same(one: Run, other: Run, rtol: float = 0.0) -> None:
    """The same images in the same batches, and all that was recorded, to rounding of the sums."""
    assert one.status == other.status == "done"
    assert one.record["certificate"] == other.record["certificate"]
    for table in TABLES:
        mine, theirs = one.frame(table), other.frame(table)
        assert list(mine) == list(theirs)
        for name, column in mine.items():
            if name in ("layer", "split"):
                assert (column == theirs[name]).all()
            else:
                numbers = (c.to_numpy(float, na_value=-1.0) for c in (column, theirs[name]))
                within = max(rtol, 1e-6) if rtol and name == "accuracy" else rtol  # is float32
                np.testing.assert_allclose(*numbers, within, 1e-30, err_msg=f"{table}.{name}")


@pytest.mark.parametrize("name", ["cifar10", "imagefolder"])
def test_two_ranks_train_on_what_one_process_does(tmp_path, root, name):
    spec = spec_of(name, root, epochs=1, accumulate=2, record="all")
    shared = run(spec, tmp_path / "two", devices=2)
    assert_same(shared, run(spec, tmp_path / "one"), rtol=1e-9)


@pytest.mark.parametrize("name", ["cifar10", "imagefolder"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path, root, name, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", (-1.0, -1.0))
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    spec = spec_of(name, root, epochs=3)
    total = spec.updates(200 if name == "cifar10" else 100)

    def stop_at(update: int):
        def emit(event):
            if event.get("step", -1) >= update:
                raise Stop

        return emit

    for update in (total // 4, total // 2):  # within an epoch, and within the next
        with pytest.raises(Stop):
            run(spec, tmp_path / "parts", emit=stop_at(update))
    done = run(spec, tmp_path / "parts")
    assert len(done.record["resumed"]) == 2
    whole = run(spec, tmp_path / "whole")
    assert_same(done, whole)
    assert done.record["final_parameters"] == whole.record["final_parameters"]


@pytest.mark.parametrize("name", ["cifar10", "imagefolder"])
def test_the_arms_of_a_pair_match(tmp_path, root, name):
    arms = [run(spec_of(name, root, epochs=1, skip=skip), tmp_path) for skip in (True, False)]
    certificates = [arm.record["certificate"] for arm in arms]
    assert certificates[0] == certificates[1]
    first = [arm.frame("outputs").query("step == 0 and layer == 'conv1'") for arm in arms]
    assert first[0]["output_rms"].iloc[0] == first[1]["output_rms"].iloc[0] > 0


def test_augmentation_is_seen_in_training_alone(tmp_path, root):
    """Without an update, losses in training mode differ and those of the evaluation do not."""
    keys = {"epochs": 1, "lr": 1e-30, "weight_decay": 0}
    plain = spec_of("cifar10", root, **keys)
    plain = plain.but(data=data_of("cifar10", root) | {"augment": False})
    one, other = run(plain, tmp_path), run(spec_of("cifar10", root, **keys), tmp_path)
    assert one.record["certificate"] == other.record["certificate"]
    losses = [found.frame("steps")["loss"].to_numpy(float) for found in (one, other)]
    assert (np.abs(losses[0] - losses[1]) > 1e-6).all()
    for key in ("train_loss", "test_loss"):
        assert one.metrics[key] == pytest.approx(other.metrics[key], rel=1e-12)


def test_a_finished_run_is_reused_wherever_a_public_set_lies(tmp_path, root):
    spec = spec_of("cifar10", root, max_steps=2)
    first = run(spec, tmp_path / "runs")
    moved = spec.but(data=data_of("cifar10", tmp_path / "elsewhere"))
    events: list[dict] = []
    again = run(moved, tmp_path / "runs", emit=events.append)
    assert again.path == first.path
    assert [event["event"] for event in events] == ["end"]
    assert "root" not in first.spec["data"]


def test_a_folder_that_has_changed_is_read_anew(tmp_path):
    formats.write_folder(tmp_path / "folder")
    spec = spec_of("imagefolder", tmp_path, max_steps=1, batch_size=8)
    first = run(spec, tmp_path / "runs").record["certificate"]
    assert run(spec, tmp_path / "runs").record["certificate"] == first
    (tmp_path / "folder/train/n00000000/train_0_1.JPEG").unlink()
    assert run(spec, tmp_path / "runs").record["certificate"]["data"] != first["data"]


def test_a_sweep_in_worker_processes(tmp_path, root):
    specs = [spec_of(name, root, max_steps=2) for name in ("cifar10", "imagefolder")]
    result = gradflow.sweep(specs, runs_dir=str(tmp_path), jobs=1)
    assert [done.status for done in result.runs] == ["done", "done"]
    assert not result.failures


def test_a_sweep_fetches_once_before_its_workers_start(tmp_path, monkeypatch):
    from gradflow import vision

    fetched = []

    def fetch(spec):
        formats.write(spec.name, tmp_path)
        fetched.append(spec.name)

    monkeypatch.setattr(vision, "download", fetch)
    data = {"name": "mnist", "root": str(tmp_path), "download": True}
    specs = [RunSpec(**TINY, data=data, max_steps=0, seed=seed) for seed in (0, 1)]  # type: ignore[arg-type]
    result = gradflow.sweep(specs, runs_dir=str(tmp_path / "runs"), jobs=2)
    assert [done.status for done in result.runs] == ["done", "done"]
    assert fetched == ["mnist"]


def test_the_command_line(tmp_path, root, command):
    arguments = ("depth=8", "width=4", "max_steps=2", "batch_size=20", "threads=1")
    done = command("-m", "gradflow", "data=cifar10", f"data.root={root}", *arguments)
    assert done.returncode == 0, done.stderr
    assert "done: 2 updates" in done.stdout
    done = command("-m", "gradflow", "data=cifar10", *arguments)
    assert done.returncode == 1
    assert done.stderr == (
        "gradflow: data.root=data: no such directory; to fetch it: "
        "python -m gradflow data=cifar10 data.root=data data.download=true\n"
    )


def test_a_damaged_picture_ends_the_run_in_one_line(tmp_path, command):
    formats.write_folder(tmp_path / "folder")
    path = tmp_path / "folder" / "train" / "n00000002" / "train_2_5.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    arguments = ("data.size=32", "depth=8", "width=4", "epochs=1", "batch_size=8")
    done = command("-m", "gradflow", "data=imagefolder", "data.root=folder", *arguments)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("gradflow: folder/train/n00000002/train_2_5.JPEG: damaged (")
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_quiet(tmp_path, root):
    """It reaches the processes that decode as well."""
    arguments = ["data=imagefolder", f"data.root={root / 'folder'}", "data.size=32", "depth=8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gradflow", *arguments, "batch_size=20", "max_steps=100000"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("runs/*/attempt-*/steps-*.parquet")))
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "interrupted; what was recorded lies in runs/" in said


def test_a_killed_run_leaves_no_decoder_and_no_lock(tmp_path, root):
    """The processes that decode have copies of its lock and pipes."""
    folder = {**data_of("imagefolder", root)}
    keys = {**TINY, "batch_size": 20, "max_steps": 100_000, "data": folder}
    code = (
        "import sys, json, gradflow\n"
        "from gradflow.spec import RunSpec\n"
        "from gradflow.training import checkpoint\n"
        "checkpoint.SECONDS = (0.0, 0.1)\n"
        f"gradflow.run(RunSpec(**{keys!r}), runs_dir={str(tmp_path)!r}, threads=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: list(tmp_path.glob(f"*/attempt-*/{CHECKPOINT}")))
        decoders = children(process.pid)
        assert len(decoders) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in decoders), seconds=2.0)

    def emit(event):
        if event["event"] == "step":
            raise Stop

    with pytest.raises(Stop):  # at once, not "another process is at work on it"
        run(RunSpec(**keys), tmp_path, emit=emit)
    (found,) = (Run(path) for path in tmp_path.iterdir() if (path / "run.json").exists())
    assert found.record["resumed"][0]["updates"] > 0


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def wait_for(condition, seconds: float = 60.0) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)
