"""Claims on a run's directory: of this machine by lock, of other machines by lease."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from crash import die

from gradflow import claim, store
from gradflow.claim import Claim
from gradflow.errors import Busy
from gradflow.store import Run, RunWriter, mark_dead


@pytest.fixture
def hosts(monkeypatch):
    """Call with a name to be on that machine from then on; locks do not reach another one."""
    here = {"name": "one"}
    monkeypatch.setattr(claim, "_here", lambda: {"host": here["name"], "boot": here["name"]})
    monkeypatch.setattr(claim, "lock", lambda path, patience=0.0: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(claim, "BEAT", 0.02)
    monkeypatch.setattr(claim, "LEASE", 0.5)

    def move(name: str) -> None:
        here["name"] = name

    return move


def row(step: int) -> Any:
    from gradflow import schema

    return schema.table("steps", {"step": [step], "loss": [1.0]})


def test_an_attempt_is_numbered_on(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        held = Claim(tmp_path, after=number - 1)
        assert held.attempt == tmp_path / f"attempt-{number}"
        assert claim.alive(tmp_path)
        held.release(keep=False)
        assert list(tmp_path.iterdir()) == []
        assert not claim.alive(tmp_path)


def test_what_is_kept_moves_into_the_next_attempt(tmp_path: Path) -> None:
    held = Claim(tmp_path)
    (held.attempt / "checkpoint.pt").write_text("x")
    held.release(keep=True)
    again = Claim(tmp_path)
    assert (again.number, (again.attempt / "checkpoint.pt").read_text()) == (2, "x")
    again.release(keep=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["attempt-2", "checkpoint.pt"]


def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {})
    writer.append("steps", row(0))
    with pytest.raises(Busy, match="another process is computing this run"):
        RunWriter(tmp_path, {})
    die(writer)
    began = time.monotonic()
    RunWriter(tmp_path, {}, keep=lambda attempt: 1).finish("done")
    assert time.monotonic() - began < claim.LEASE / 4
    assert Run(tmp_path).frame("steps")["step"].tolist() == [0]


def test_a_claim_that_is_renewed_on_another_machine_stands(tmp_path: Path, hosts) -> None:
    writer = RunWriter(tmp_path, {})
    hosts("two")
    assert Run(tmp_path).alive
    for _ in range(3):
        with pytest.raises(Busy, match="a process on one is computing this run"):
            RunWriter(tmp_path, {})
    writer.append("steps", row(0))
    writer.finish("done")
    assert Run(tmp_path).status == "done"


def test_a_lease_that_is_over_is_taken_and_the_former_owner_publishes_nothing(
    tmp_path: Path, hosts, capsys
) -> None:
    first = RunWriter(tmp_path, {"by": "one"})
    first.append("steps", row(0))
    first._claim._ended.set()  # cut off: it lives, and renews nothing
    hosts("two")
    began = time.monotonic()
    second = RunWriter(tmp_path, {"by": "two"}, keep=lambda attempt: 1)
    assert time.monotonic() - began >= claim.LEASE
    assert capsys.readouterr().err == (
        f"{tmp_path}: claimed by a process on one; watching for up to 0.5 s whether it lives\n"
    )
    for action in (
        lambda: first.append("steps", row(1)),
        lambda: first.update(metrics={"train_loss": 1.0}),
        lambda: first.write("modules", row(1)),
        lambda: first.finish("done"),
    ):
        with pytest.raises(Busy, match="another process has taken over"):
            action()
    assert Run(tmp_path).status == "running"
    second.append("steps", row(1))
    second.finish("done")
    assert Run(tmp_path).spec == {"by": "two"}
    assert Run(tmp_path).frame("steps")["step"].tolist() == [0, 1]
    with pytest.raises(Busy), first:
        first.append("steps", row(2))
    assert (Run(tmp_path).status, Run(tmp_path).record["attempt"]) == ("done", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "spec.json", "steps.parquet"]


def test_it_is_taken_over_while_it_publishes(tmp_path: Path, hosts, monkeypatch) -> None:
    """Between its tables and its run.json: the record that stands is the second's alone."""
    from gradflow import schema

    first = RunWriter(tmp_path, {})
    first.append("steps", row(0))
    first._claim._ended.set()
    hosts("two")
    count, taken = schema.count, []

    def cut_off(path: Path) -> int:
        monkeypatch.setattr(schema, "count", count)
        taken.append(RunWriter(tmp_path, {}, keep=lambda attempt: 0))
        return 1

    monkeypatch.setattr(schema, "count", cut_off)
    with pytest.raises((Busy, FileNotFoundError)):
        first.finish("done")
    assert Run(tmp_path).status == "running"
    taken[0].append("steps", row(7))
    taken[0].finish("done")
    assert Run(tmp_path).frame("steps")["step"].tolist() == [7]


def test_of_many_takers_one_succeeds(tmp_path: Path, hosts) -> None:
    RunWriter(tmp_path, {})._claim._ended.set()
    hosts("two")
    taken, refused = [], []

    def take() -> None:
        try:
            taken.append(Claim(tmp_path))
        except Busy as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    assert claim.latest(tmp_path) == taken[0].attempt


def test_of_many_beginners_one_succeeds(tmp_path: Path, hosts) -> None:
    taken, refused = [], []

    def take() -> None:
        try:
            taken.append(Claim(tmp_path))
        except Busy as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    standing = [held for held in taken if held.attempt.exists()]
    assert len(standing) == 1
    for held in taken:
        if held is not standing[0]:  # overtaken between its attempt and its claim
            with pytest.raises(Busy):
                held.check()


def test_a_clock_that_goes_backwards_shortens_no_lease(tmp_path: Path, hosts) -> None:
    writer = RunWriter(tmp_path, {})
    writer._claim._ended.set()
    renewed = writer.attempt / claim.CLAIM
    hosts("two")
    past = time.time() - 1e6

    def renew() -> None:
        time.sleep(0.1)
        os.utime(renewed, (past, past))

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(Busy):
        RunWriter(tmp_path, {})
    thread.join()


def test_whose_machine_is_known_to_be_dead_is_marked_at_once(tmp_path: Path, hosts) -> None:
    writer = RunWriter(tmp_path, {})
    writer.append("steps", row(0))
    hosts("two")
    mark_dead(tmp_path, "failed", "node n1 is down", certain=True)
    run = Run(tmp_path)
    assert (run.status, run.record["error"]) == ("failed", "node n1 is down")
    assert run.record["failure"] == "killed"
    assert run.frame("steps")["step"].tolist() == [0]
    with pytest.raises(Busy):
        writer.finish("done")


def test_marking_the_dead_watches_nobody(tmp_path: Path, hosts) -> None:
    writer = RunWriter(tmp_path, {})
    writer._claim._ended.set()
    hosts("two")
    began = time.monotonic()
    mark_dead(tmp_path, "failed", "not known to be dead")
    assert time.monotonic() - began < claim.LEASE / 2
    assert Run(tmp_path).status == "running"


def test_without_locks_a_process_that_is_gone_is_known_by_its_number(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(claim, "lock", lambda path, patience=0.0: None)
    writer = RunWriter(tmp_path, {})
    writer._claim._ended.set()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    owner = json.loads((writer.attempt / claim.CLAIM).read_text()) | {"pid": process.pid}
    (writer.attempt / claim.CLAIM).write_text(json.dumps(owner))
    began = time.monotonic()
    RunWriter(tmp_path, {}).finish("done")
    assert time.monotonic() - began < claim.LEASE / 4


def test_a_file_system_without_locks_has_the_lease_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(claim, "lock", lambda path, patience=0.0: None)
    monkeypatch.setattr(claim, "BEAT", 0.02)
    monkeypatch.setattr(claim, "LEASE", 0.5)
    writer = RunWriter(tmp_path, {})
    with pytest.raises(Busy):
        RunWriter(tmp_path, {})
    writer._claim._ended.set()
    RunWriter(tmp_path, {}).finish("done")
    assert store.Run(tmp_path).status == "done"
