"""One run on several ranks: real processes, and the numbers of a single one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import gradflow
from gradflow import ranks
from gradflow.errors import GradflowError, SpecError
from gradflow.ranks import Ranks
from gradflow.spec import Execution, RunSpec
from gradflow.store import Run
from gradflow.training import checkpoint

TABLES = ("weights", "outputs", "blocks", "steps", "evaluations")
TINY = {"depth": 8, "width": 4, "batch_size": 100, "norm": "none", "padding": "circular"}
MLP = {"network": "mlp", "depth": 6, "width": 16, "batch_size": 100, "norm": "none"}
LONG = TINY | {"epochs": 100_000, "batch_size": 60}
ENDS = 10.0
"""Seconds within which everything has ended after a death."""


def run(store: Path, keys: dict, **settings):
    settings = {"devices": 2, "device": "cpu", "threads": 1} | settings
    return gradflow.run(RunSpec(**keys), runs_dir=str(store), **settings)


def children(pid: int) -> list[int]:
    """Processes that a process has started, in that order."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(c) for thread in threads for c in (thread / "children").read_text().split())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 60.0) -> float:
    """Until it holds; the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)
    return time.monotonic() - began


def numbers(done: Run, table: str) -> dict[str, np.ndarray]:
    frame = done.frame(table)
    return {
        name: column.astype(str).to_numpy()
        if name in ("layer", "split")
        else column.to_numpy(float, na_value=-1.0)
        for name, column in frame.items()
    }


def assert_same_run(shared: Run, single: Run, rtol: float, accuracy: float = 1e-6) -> None:
    """All that is recorded is equal to rounding; what was trained on is the same."""
    assert shared.status == single.status == "done"
    assert shared.record["certificate"] == single.record["certificate"]
    assert shared.table("modules").equals(single.table("modules"))
    for table in TABLES:
        mine, theirs = numbers(shared, table), numbers(single, table)
        assert list(mine) == list(theirs), table
        for name in mine:
            if name in ("layer", "split", "step"):
                assert (mine[name] == theirs[name]).all(), (table, name)
            else:
                within = accuracy if name == "accuracy" else rtol
                np.testing.assert_allclose(
                    mine[name], theirs[name], rtol=within, atol=1e-30, err_msg=f"{table}.{name}"
                )


# --- what can be asked for ------------------------------------------------------------------------


def test_shares_are_contiguous_and_make_the_whole():
    places = [Ranks(rank, world=6, devices=3) for rank in range(6)]
    shares = [list(range(12))[place.share(12)] for place in places]
    assert [i for share in shares for i in share] == list(range(12))
    assert {len(share) for share in shares} == {2}
    assert [(p.node, p.local_rank, p.nodes) for p in places][4] == (1, 1, 2)


@pytest.mark.parametrize(
    ("keys", "settings", "message"),
    [
        ({"batch_size": 64}, {"devices": 3},
         r"batch_size=64: does not divide into 3 ranks \(devices=3\); nearest are 63 and 66"),
        ({"batch_size": 3}, {"devices": 2, "nodes": 2, "launcher": "slurm"},
         r"into 4 ranks \(devices=2, nodes=2\); nearest is 4"),
        ({}, {"devices": 2, "device": "cpu"}, "devices=2: norm=batch has no statistics"),
        ({}, {"devices": 2, "device": "cuda:1"}, "devices=2: device=cuda:1 is one device"),
        ({}, {"devices": 2, "device": "mps"}, "device=mps cannot share a run"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_in_a_line(tmp_path, keys, settings, message):
    spec = RunSpec(**keys)
    with pytest.raises(SpecError, match=message) as caught:
        ranks.check(spec, Execution(**settings))
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match=message):
        gradflow.run(spec, runs_dir=str(tmp_path), **settings)
    assert not list(tmp_path.iterdir())


def test_batch_statistics_are_refused_where_the_device_turns_out_to_be_a_cpu(tmp_path):
    with pytest.raises(SpecError, match="devices=2: norm=batch has no statistics"):
        gradflow.run(RunSpec(batch_size=100), runs_dir=str(tmp_path), devices=2)


# --- the numbers of a single process --------------------------------------------------------------


def test_two_ranks_are_one_process_and_are_reused(tmp_path):
    keys = TINY | {"precision": "fp64", "record": "all", "batch_size": 50, "accumulate": 2}
    keys |= {"epochs": 1}
    shared = run(tmp_path / "two", keys)
    single = run(tmp_path / "one", keys, devices=1)
    assert_same_run(shared, single, rtol=1e-10)
    assert shared.record["environment"]["devices"] == 2
    assert single.record["environment"]["devices"] == 1
    for table, name, said in (
        ("weights", "weight_grad_norm", True), ("weights", "weight_norm", False),
        ("outputs", "output_rms", True), ("steps", "loss", True), ("steps", "lr", False),
    ):  # fmt: skip
        notes = [one.table(table).schema.field(name).metadata for one in (shared, single)]
        assert (b"reduced over 2 ranks" in notes[0][b"meaning"]) == said
        assert b"ranks" not in notes[1][b"meaning"]
    events: list[dict] = []
    again = run(tmp_path / "two", keys, emit=events.append)
    assert [(e["event"], e["reused"]) for e in events] == [("end", True)]
    assert again.path == shared.path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "rtol"),
    [
        (MLP | {"skip": "identity", "optimizer": "adam", "lr": 1e-3}, 1e-5),
        (MLP | {"skip": "backward_only", "branch_scale": 0.0, "precision": "fp64"}, 1e-10),
        (MLP | {"skip": "highway", "norm": "layer", "precision": "fp64"}, 1e-10),
        (TINY | {"skip": "stochastic_depth", "depth": 14, "precision": "fp64"}, 1e-10),
        (TINY | {"norm": "layer", "padding": "zeros", "clip": 0.1, "precision": "fp64"}, 1e-10),
        (
            TINY
            | {
                "norm": "group",
                "groups": 2,
                "batch_size": 50,
                "accumulate": 3,
                "precision": "fp64",
            },
            1e-10,
        ),
    ],
)
def test_networks_of_several_kinds(tmp_path, keys, rtol):
    keys = keys | {"max_steps": 15, "record": "all"}
    shared, single = run(tmp_path / "two", keys), run(tmp_path / "one", keys, devices=1)
    assert_same_run(shared, single, rtol)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    keys = TINY | {"precision": "fp64", "record": "all", "max_steps": 10}
    shared = run(tmp_path / "four", keys, devices=4)
    assert_same_run(shared, run(tmp_path / "one", keys, devices=1), rtol=1e-10)


@pytest.mark.slow
def test_recording_changes_nothing(tmp_path):
    done = [
        run(tmp_path, TINY | {"max_steps": 30, "record": record}, devices=4)
        for record in ("none", "default", "all")
    ]
    assert len({one.record["final_parameters"] for one in done}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [0, 1])
def test_all_ranks_stop_where_the_run_diverges(tmp_path, outputs):
    keys = TINY | {"lr": 1e9, "schedule": "constant", "max_steps": 40}
    keys |= {"record": {"every": {"outputs": outputs, "blocks": 0}}}
    shared, single = run(tmp_path / "two", keys), run(tmp_path / "one", keys, devices=1)
    assert shared.status == single.status == "diverged"
    assert shared.record["divergence"] == single.record["divergence"]
    assert shared.record["steps"] == single.record["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_a_run_goes_on_bit_for_bit(tmp_path, monkeypatch, devices):
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SECONDS", (-1.0, -1.0))
    keys = TINY | {"batch_size": 90, "max_steps": 25, "optimizer": "adam", "record": "all"}
    whole = run(tmp_path / "whole", keys, devices=devices)

    class Stop(Exception):
        pass

    def stop(event):
        if event.get("step", -1) >= 11:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "parts", keys, devices=devices, emit=stop)
    assert not children(os.getpid())
    done = run(tmp_path / "parts", keys, devices=devices)
    assert done.record["resumed"][0]["updates"] >= 10
    for name in ("certificate", "final_parameters", "metrics"):
        assert done.record[name] == whole.record[name], name
    for table in TABLES:
        assert done.table(table).equals(whole.table(table)), table


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SECONDS", (-1.0, -1.0))
    keys = TINY | {"max_steps": 20, "precision": "fp64", "record": "all"}

    def stop(event):
        if event.get("step", -1) >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", keys, emit=stop)
    done = run(tmp_path / "two", keys, devices=1)
    assert done.record["environment"]["devices"] == 2
    assert done.record["resumed"][0]["environment"]["devices"] == 1
    assert_same_run(done, run(tmp_path / "one", keys, devices=1), rtol=1e-10)


def test_step_0_alone_needs_no_other_process(tmp_path):
    started: list[int] = []
    done = run(
        tmp_path, TINY | {"max_steps": 0}, emit=lambda e: started.extend(children(os.getpid()))
    )
    assert done.status == "done"
    assert not started


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_run_at_once(tmp_path, devices):
    killed: list[float] = []

    def kill(event):
        if event["event"] == "step" and not killed:
            os.kill(children(os.getpid())[0], signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(GradflowError, match=r"^rank 1: .*killed by signal 9 \(SIGKILL\)"):
        run(tmp_path, LONG, devices=devices, emit=kill)
    assert time.monotonic() - killed[0] < ENDS
    assert not children(os.getpid())
    [failed] = gradflow.load_runs(tmp_path)
    assert failed.status == "failed"
    assert failed.record["failure"] == "system"  # a sweep tries it again
    assert "rank 1" in failed.record["error"]
    assert len(failed.frame("steps")) > 0


@pytest.fixture
def start(tmp_path):
    """Starts `gradflow.run` of keys in a process that tells of its first step; (process, ranks)."""
    processes: list[subprocess.Popen] = []
    started: list[int] = []

    def call(keys: dict, **settings) -> tuple[subprocess.Popen, list[int]]:
        settings = {
            "devices": 3,
            "device": "cpu",
            "threads": 1,
            "runs_dir": str(tmp_path),
        } | settings
        code = (
            "import sys, json, gradflow\n"
            "from gradflow.spec import RunSpec\n"
            "keys, settings = json.loads(sys.argv[1])\n"
            "tell = lambda event: print(event['event'], flush=True)\n"
            "gradflow.run(RunSpec(**keys), emit=tell, **settings)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps([keys, settings])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line == "step\n":
                break
        started.extend(children(process.pid))
        return process, children(process.pid)

    yield call
    for pid in filter(alive, started):  # where the test failed: a stopped one would stay for ever
        os.kill(pid, signal.SIGKILL)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process(tmp_path, start, number):
    process, others = start(LONG)
    assert len(others) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=ENDS)
    assert "KeyboardInterrupt" in errors
    wait_for(lambda: not any(map(alive, others)), ENDS)
    [stopped] = gradflow.load_runs(tmp_path)
    assert stopped.status == "interrupted"


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_all_and_is_rank_0s_to_handle(tmp_path, start):
    process, others = start(LONG)
    for pid in (*others, process.pid):
        os.kill(pid, signal.SIGINT)
    process.communicate(timeout=ENDS)
    wait_for(lambda: not any(map(alive, others)), ENDS)
    [stopped] = gradflow.load_runs(tmp_path)
    assert stopped.status == "interrupted"


@pytest.mark.slow
def test_ranks_die_with_rank_0(start):
    process, others = start(LONG)
    process.kill()
    wait_for(lambda: not any(map(alive, others)), ENDS)


@pytest.mark.slow
def test_a_rank_that_hangs_does_not_keep_rank_0(tmp_path, start):
    """Rank 0 waits for it in torch, where Python hears of no signal."""
    process, others = start(LONG)
    os.kill(others[0], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=2 * ENDS)
    wait_for(lambda: not any(map(alive, others)), ENDS)
    [stopped] = gradflow.load_runs(tmp_path)
    assert stopped.status == "interrupted"


NETWORK = """
import os, sys
import torch
from torch import nn

class Troubled(nn.Flatten):
    calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls == 5 and torch.distributed.is_initialized():
            trouble(torch.distributed.get_rank())
        return super().forward(x)

def trouble(rank):
    if os.environ["TROUBLE"] == "one" and rank == 1:
        raise ValueError("as written")
    if os.environ["TROUBLE"] == "all":
        raise ValueError("as written")
    if os.environ["TROUBLE"] == "leave" and rank == 1:
        sys.exit(0)

def make():
    return nn.Sequential(Troubled(), nn.Linear(64, 10))

def normed():
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("one", GradflowError, "^rank 1: (.|\n)*ValueError: as written"),
        ("all", ValueError, "^as written"),
        ("leave", GradflowError, r"^rank 1: sys.exit\(0\) was called"),
    ],
)
def test_a_rank_that_raises(tmp_path, monkeypatch, trouble, kind, message):
    (tmp_path / "troubled.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TROUBLE", trouble)
    with pytest.raises(kind, match=message):
        run(
            tmp_path / "runs",
            {"network": {"target": "troubled.make"}, "batch_size": 100, "max_steps": 50},
        )
    assert not children(os.getpid())
    [failed] = gradflow.load_runs(tmp_path / "runs")
    assert failed.record["failure"] == "raised"
    assert "as written" in failed.record["error"] or "sys.exit" in failed.record["error"]


@pytest.mark.slow
def test_a_users_batch_statistics_are_refused(tmp_path, monkeypatch):
    (tmp_path / "troubled.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(GradflowError, match="BatchNorm2d has no statistics over several ranks"):
        run(
            tmp_path / "runs",
            {"network": {"target": "troubled.normed"}, "batch_size": 100, "max_steps": 5},
        )
    assert not children(os.getpid())


# --- several nodes --------------------------------------------------------------------------------


@pytest.fixture
def nodes(monkeypatch):
    """Starts what the other nodes run; (processes by node)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    processes: list[subprocess.Popen] = []

    def call(count: int) -> list[subprocess.Popen]:
        code = "import sys; from gradflow import ranks; ranks.serve(int(sys.argv[1]))"
        processes.extend(
            subprocess.Popen([sys.executable, "-c", code, str(node)]) for node in range(1, count)
        )
        return processes

    yield call
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.slow
def test_two_nodes_compute_run_after_run(tmp_path, nodes):
    others = nodes(2)
    settings = {"launcher": "slurm", "nodes": 2}
    keys = TINY | {"precision": "fp64", "record": "all", "max_steps": 8}
    for devices, seed in ((1, 0), (2, 1), (1, 1)):
        shared = run(tmp_path / "two", keys | {"seed": seed}, devices=devices, **settings)
        single = run(tmp_path / "one", keys | {"seed": seed}, devices=1)
        assert_same_run(shared, single, rtol=1e-10)
    assert shared.record["environment"]["nodes"] == 2
    assert shared.record["environment"]["devices"] == 2  # found in the store, and not computed
    ranks.dismiss(2)
    assert [process.wait(ENDS) for process in others] == [0]


@pytest.mark.slow
def test_what_dies_on_another_node(tmp_path, nodes):
    """A rank: the run fails, and the next one is computed. The node: the run fails."""
    [other] = nodes(2)
    settings = {"launcher": "slurm", "nodes": 2, "devices": 1}

    def killer(find):
        killed: list[int] = []

        def kill(event):
            if event["event"] == "step" and not killed:
                killed.append(find())
                os.kill(killed[0], signal.SIGKILL)

        return kill

    with pytest.raises(GradflowError, match=r"^rank 1: .*SIGKILL"):
        run(tmp_path, LONG, **settings, emit=killer(lambda: children(other.pid)[0]))
    assert run(tmp_path, TINY | {"max_steps": 3}, **settings).status == "done"
    with pytest.raises(GradflowError, match="node 1: the connection to it is lost"):
        run(tmp_path, LONG | {"seed": 1}, **settings, emit=killer(lambda: other.pid))


@pytest.mark.slow
def test_a_stranger_at_the_port_is_sent_away(nodes):
    others = nodes(1)
    assert not others
    told: list[bool] = []

    def visit():
        for said in (b"GET / HTTP/1.0\r\n\r\n", b'{"node": 7}\n', b'{"node": 1}\n'):
            address = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    connection = socket.create_connection(address)
                    break
            with connection:
                connection.sendall(said)
                told.append(b"dismissed" in connection.recv(100))

    visitor = threading.Thread(target=visit)
    visitor.start()
    ranks.dismiss(2)
    visitor.join(ENDS)
    assert told == [False, False, True]


def test_nodes_need_an_address(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(GradflowError, match="MASTER_ADDR and MASTER_PORT must name node 0"):
        run(tmp_path, TINY | {"max_steps": 2}, nodes=2, devices=1, launcher="slurm")
