"""The command line as a user meets it: keys, one line for each mistake, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gradflow import cli, config, load_runs
from gradflow.help import text
from gradflow.spec import Execution, RunSpec

TINY = ["depth=8", "width=4", "threads=1"]


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """`python -m gradflow ARGUMENTS` in this process and an empty directory."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    yield call
    signal.signal(signal.SIGTERM, handler)


# --- good input -----------------------------------------------------------------------------------


def test_overrides_become_specs():
    got = cli._configure(
        ["-m", "depth=20,56", "skip=true,false", "lr=5e-3", "record.every.outputs=2", "jobs=3"]
    )
    assert [spec for spec, _ in got] == [
        RunSpec(depth=depth, skip=skip, lr=0.005, record={"every": {"outputs": 2}})  # type: ignore[arg-type]
        for depth in (20, 56)
        for skip in (True, False)
    ]
    assert {execution for _, execution in got} == {Execution(jobs=3)}


def test_groups_and_custom_targets():
    [(spec, _)] = cli._configure(["network=mlp", "data=synthetic", "data.size=16", "record=all"])
    assert spec == RunSpec(
        network="mlp", data={"name": "synthetic", "size": 16}, record="all"  # type: ignore[arg-type]
    )  # fmt: skip
    [(spec, _)] = cli._configure(
        ["network.target=package.module.f", "network.args={depth:'${depth}',k:1}", "depth=11"]
    )
    assert spec.network.args == {"depth": 11, "k": 1}
    assert spec.name.startswith("custom-11-na-s0-")


def test_one_run_says_what_happened_and_where_and_leaves_only_the_store(main, tmp_path):
    code, out, err = main(*TINY, "max_steps=2", "batch_size=32")
    assert code == 0, err
    [run] = load_runs(tmp_path / "runs")
    assert run.status == "done"
    assert str(run.path.name) in out
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    before = (run.path / "run.json").stat().st_mtime_ns
    code, out, _ = main(*TINY, "max_steps=2", "batch_size=32")
    assert code == 0
    assert out.startswith("in the store already, not run again")
    assert (run.path / "run.json").stat().st_mtime_ns == before


def test_step_0_comes_without_lightning_and_a_sweep_without_torch(command):
    code = (
        "import sys, gradflow.cli as cli; assert cli.main({}) == 0; "
        "sys.exit(any(name in sys.modules for name in {}))"
    )
    once = [*TINY, "max_steps=0"]
    alone = command("-c", code.format(once, ["pytorch_lightning"]))
    assert alone.returncode == 0, alone.stderr
    sweep = command(
        "-c", code.format(["-m", *TINY, "max_steps=0", "seed=0,1", "jobs=1"], ["torch"])
    )
    assert sweep.returncode == 0, sweep.stderr


def test_a_sweep_runs_what_is_missing(main, tmp_path):
    arguments = ["-m", *TINY, "max_steps=0", "skip=true,false", "jobs=1"]
    code, out, err = main(*arguments)
    assert code == 0, err
    assert sorted(run.spec["skip"] for run in load_runs(tmp_path / "runs")) == ["identity", "none"]
    code, out, _ = main(*arguments)
    assert code == 0
    assert "2 of them from before" in out
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_divergence_is_a_result(main, tmp_path):
    code, out, _ = main(*TINY, "max_steps=40", "lr=1e9", "schedule=constant", "norm=none")
    assert code == 0
    [run] = load_runs(tmp_path / "runs")
    assert run.status == "diverged"
    assert "diverged" in out


def test_help_explains_every_key():
    shown = text()
    for name in config.known_keys():
        if name not in (
            "network.name",
            "data.name",
            "record.name",
            "probe.name",
            "record.every",
            "slurm",
        ):
            assert f"\n  {name} " in shown, name
    assert max(map(len, shown.splitlines())) <= 100


def test_help_and_bad_values_load_neither_torch_nor_lightning(command):
    for arguments, expected in ((["--help"], 0), (["depth=21"], 1)):
        code = (
            f"import sys, gradflow.cli as cli; code = cli.main({arguments}); "
            "loaded = {'torch', 'pytorch_lightning'} & set(sys.modules); "
            "sys.exit(99 if loaded else code)"
        )
        assert command("-c", code).returncode == expected


def test_cfg_shows_the_configuration_and_runs_nothing(main, tmp_path):
    code, out, _ = main("--cfg", "job", "depth=56")
    assert code == 0
    assert "depth: 56" in out
    assert not list(tmp_path.iterdir())


def test_a_users_own_presets(main, tmp_path):
    (tmp_path / "mine" / "network").mkdir(parents=True)
    (tmp_path / "mine" / "network" / "small.yaml").write_text("name: mlp\n")
    [(spec, _)] = cli._configure(["--config-dir", str(tmp_path / "mine"), "network=small"])
    assert spec == RunSpec(network="mlp")


# --- bad input ------------------------------------------------------------------------------------

BAD = [
    ("depht=20", "depht: no such key; did you mean depth?"),
    ("depth", "depth: give keys as KEY=VALUE"),
    ("depth=abc", "depth=abc: allowed is a whole number from 1"),
    ("depth=21", "nearest are 20 and 26"),
    ("width=-3", "width=-3: allowed is a whole number from 1"),
    ("skip=foo", "skip=foo: allowed is none, identity"),
    ("network=foo", "network=foo: allowed is cifar, imagenet, mlp"),
    ("data=foo", "data=foo: allowed is cifar10, cifar100, digits, fashion_mnist, files, gaussian"),
    ("batch_size=5000", "data=digits has 1437 training images"),
    ("data=files data.root=/no/such/place", "data.root=/no/such/place: no such directory"),
    ("runs_dir=/dev/null/runs", "runs_dir=/dev/null/runs: cannot be written"),
    ("network.target=nowhere.f", "network.target=nowhere.f: there is no module 'nowhere'"),
    ("hydra/launcher=joblib", "launcher=local"),
    ("hydra/sweeper=optuna", "launcher=local"),
    ("+foo=1", "foo: no such key"),
    ("~runs_dir", "~runs_dir: a key cannot be taken away"),
    ("record.every=3", "record.every=3: allowed is record.every.weights=N"),
    ("network.args={depth:${dept}} network.target=a.f", "dept"),
    ("-m depth=8,14 runs_dir=a,b", "runs_dir=a,b: one value for a whole sweep"),
    ("device=cpu precision=fp16", "precision=fp16: the CPU trains in"),
    ("lr=[1", "gradflow: "),
    ("-m depth=20,21", "depth=21: allowed is 6n+2"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_a_bad_value_is_one_line_and_exit_1(main, tmp_path, arguments, message):
    code, out, err = main(*arguments.split())
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_data_that_is_damaged_is_one_line(main, tmp_path):
    (tmp_path / "train.npz").write_bytes(b"not an archive")
    np.savez(tmp_path / "test.npz", x=np.zeros((4, 1, 8, 8)), y=np.zeros(4, int))
    code, _, err = main(*TINY, "data=files", f"data.root={tmp_path}", "max_steps=0")
    assert code == 1
    assert "train.npz: unreadable" in err
    assert "Traceback" not in err


def test_ctrl_c_leaves_an_interrupted_run_that_can_be_read(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "gradflow", *TINY, "max_steps=100000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/attempt-*/steps-*.parquet")):  # the first flush
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err.splitlines()[-1]
    assert "Traceback" not in err
    [run] = load_runs(tmp_path / "runs")
    assert run.status == "interrupted"
    steps = run.frame("steps")
    assert len(steps) >= 22  # an epoch, at whose end the first checkpoint flushes
    assert list(steps["step"]) == list(range(len(steps)))


def test_run_json_is_plain_json(main, tmp_path):
    main(*TINY, "max_steps=0")
    [run] = load_runs(tmp_path / "runs")
    record = json.loads((run.path / "run.json").read_text())
    assert record["origin"] == "gradflow"
    assert record["environment"]["threads"] == 1
    assert os.fspath(tmp_path) not in json.dumps(record["certificate"])
