"""What can be known of launcher=slurm without a Slurm: scripts stand in for its commands.

The rest is in tests/cluster, on a real one.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest

from gradflow import slurm
from gradflow.errors import GradflowError
from gradflow.spec import Execution, RunSpec
from gradflow.store import CHECKPOINT, Run, RunWriter
from gradflow.sweep import End

SPECS = [RunSpec(depth=depth, seed=seed) for depth in (20, 8) for seed in range(3)]


@pytest.fixture
def says(monkeypatch, tmp_path):
    """Puts a command in the place of all others: what it prints, and its exit code."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(command, output="", code=0, errors=""):
        path = folder / command
        path.write_text(
            f"#!/bin/sh\necho \"$@\" >>'{folder}/{command}.asked'\n"
            f"cat <<'END'\n{output}\nEND\necho '{errors}' >&2\nexit {code}\n"
        )
        path.chmod(0o755)
        return folder / f"{command}.asked"

    for command in ("sbatch", "sacct", "squeue", "scancel", "scontrol"):
        put(command)
    return put


def job(folder, log="", **fields):
    (folder / "5_2_0_log.out").write_text(log)
    return slurm._Job("5_2", folder, {}, folder / "5.json", **fields)


# --- what has to be there -------------------------------------------------------------------------


def test_submitit_missing_is_one_line_that_names_the_extra(says, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GradflowError, match=r"pip install 'gradflow-harness\[slurm\]'$"):
        slurm.check()


def test_no_slurm_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GradflowError, match="there is no sbatch on this machine"):
        slurm.check()


def test_no_accounting_is_one_line(says):
    says("sacct", code=1, errors="Slurm accounting storage is disabled")
    with pytest.raises(GradflowError, match=r"sacct does not answer \(Slurm accounting storage is"):
        slurm.check()
    says("sacct")
    slurm.check()


# --- what Slurm says ------------------------------------------------------------------------------


def test_the_queue_is_asked_once_for_all_jobs_by_their_arrays(says):
    asked = says(
        "squeue", "5_0|RUNNING|None\n5_1|PENDING|Priority\n5_9|RUNNING|None\n7|PENDING|A|B"
    )
    assert slurm.squeue(["5_0", "5_1", "5_2", "7"]) == {
        "5_0": ("RUNNING", "None"),
        "5_1": ("PENDING", "Priority"),
        "7": ("PENDING", "A|B"),
    }
    assert asked.read_text().splitlines() == ["--noheader --array --format=%i|%T|%r --jobs=5,7"]


def test_a_job_that_slurm_has_forgotten_is_not_in_the_queue_and_silence_is_no_answer(says):
    says("squeue", code=1, errors="slurm_load_jobs error: Invalid job id specified")
    assert slurm.squeue(["5"]) == {}
    says("squeue", code=1, errors="slurm_load_jobs error: Unable to contact slurm controller")
    assert slurm.squeue(["5"]) is None


def test_accounting_tells_only_ends(says):
    says(
        "sacct",
        "5_0|COMPLETED|0:0|n1\n5_1|RUNNING|0:0|n1\n5_2|CANCELLED by 0|0:15|n2\n8|FAILED|1:0|",
    )
    assert slurm.sacct(["5_0", "5_1", "5_2"]) == {
        "5_0": ("COMPLETED", "0:0", "n1"),
        "5_2": ("CANCELLED by 0", "0:15", "n2"),
    }


@pytest.mark.parametrize(
    ("record", "log", "said"),
    [
        (("CANCELLED by 0", "0:15", "n2"), "",
         "on n2: cancelled by root (CANCELLED, exit code 0, signal 15)"),
        (("CANCELLED by 987654", "0:0", "None assigned"), "",
         "Slurm job 5_2: cancelled by user 987654 (CANCELLED, exit code 0)"),
        (("NODE_FAIL", "0:0", "n1"), "", "on n1: its node failed (NODE_FAIL, exit code 0)"),
        (("OUT_OF_MEMORY", "0:125", "n1"), "", "exceeded its memory (OUT_OF_MEMORY, exit code 0, "),
        (("TIMEOUT", "0:0", "n1"), "", "on n1: exceeded its time (TIMEOUT, exit code 0)"),
        (("FAILED", "1:0", "n1"), "Traceback\nKeyError", "on n1: failed (FAILED, exit code 1)"),
        (("FAILED", "9:0", "n1"), "slurmstepd: error: StepId=2.0 exceeded memory limit (3 > 2)",
         "on n1: exceeded its memory (FAILED, exit code 9)"),
        (None, "", "cancelled before it began, as it seems"),
    ],
)  # fmt: skip
def test_the_fate_of_a_job_in_words(tmp_path, record, log, said):
    record = None if record is None else slurm.Record(*record)
    assert said in slurm.fate(job(tmp_path, log), record)


# --- what is asked for ----------------------------------------------------------------------------


def test_resources_by_key():
    execution = Execution(
        launcher="slurm", threads=2, devices=3, nodes=2, jobs=4,
        slurm={"partition": "long", "memory": 1.5, "time": 90, "gpus": 3, "args": {"nice": 100}},
    )  # fmt: skip
    asked = slurm.parameters(execution, 10)
    assert (asked["partition"], asked["mem"], asked["time"]) == ("long", "1536M", 90)
    assert (asked["nodes"], asked["ntasks_per_node"], asked["cpus_per_task"]) == (2, 1, 6)
    assert (asked["gpus_per_node"], asked["array_parallelism"]) == (3, 4)
    assert asked["additional_parameters"] == {"requeue": True, "nice": 100}
    assert slurm.parameters(Execution(launcher="slurm"), 10)["array_parallelism"] == 10


def test_runs_are_dealt_out_so_that_every_job_has_long_and_short_ones(says, monkeypatch, tmp_path):
    packs = []

    def submit(given, execution, folder):
        packs.extend(given)
        return [f"5_{place}" for place in range(len(given))]

    monkeypatch.setattr(slurm, "submit", submit)
    execution = Execution(launcher="slurm", runs_per_job=2, jobs=2, runs_dir=str(tmp_path))
    sweep = slurm.Slurm(execution, lambda event: None, most=len(SPECS))
    assert sweep.size == 2
    sweep._place(SPECS)
    assert packs == [[SPECS[0], SPECS[3]], [SPECS[1], SPECS[4]], [SPECS[2], SPECS[5]]]
    assert json.loads((tmp_path / ".slurm/5.json").read_text())["jobs"]["5_1"] == [
        SPECS[1].name,
        SPECS[4].name,
    ]


# --- what becomes of a job's runs -----------------------------------------------------------------


@pytest.fixture
def sweep(says, monkeypatch, tmp_path):
    """A sweep that has submitted SPECS as job 5_0; `placed` is what it submits afterwards."""
    monkeypatch.setattr(slurm, "_TURN", 0.01)
    execution = Execution(launcher="slurm", runs_per_job=9, runs_dir=str(tmp_path))
    monkeypatch.setattr(slurm, "submit", lambda packs, *_: ["5_0"])
    sweep = slurm.Slurm(execution, lambda event: None, most=len(SPECS))
    sweep._place(SPECS)
    sweep.placed = []
    monkeypatch.setattr(sweep, "_place", sweep.placed.extend)
    return sweep


def writes(tmp_path, *events):
    with (tmp_path / ".slurm/5_0.jsonl").open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events))


def end(spec, status, error=None):
    said = {"event": "end", "run": spec.name, "status": status, "path": "", "metrics": {}}
    return said | {"error": error, "reused": False}


def test_the_run_at_work_is_lost_with_its_job_and_what_had_no_turn_is_placed_anew(
    sweep, says, tmp_path
):
    writes(tmp_path, {"event": "start", "run": SPECS[0].name}, end(SPECS[0], "done"),
           {"event": "start", "run": SPECS[1].name})  # fmt: skip
    writer = RunWriter(tmp_path / SPECS[1].name, SPECS[1].to_dict())
    writer._claim.release(keep=True)  # as a kill does
    says("sacct", "5_0|NODE_FAIL|0:0|n1")
    (tmp_path / ".slurm/5_0_0_log.out").write_text("the last words\n")
    for known in list(sweep._jobs.values()):
        sweep._hear(known)
    sweep._turn()
    assert sweep._jobs == {}
    assert sweep.ends[SPECS[0].run_id] == End("done", "", False)
    lost = sweep.ends[SPECS[1].run_id]
    assert lost.status == "failed"
    assert lost.error == (
        "the last words\nSlurm job 5_0 on n1: its node failed (NODE_FAIL, exit code 0); "
        f"log: {tmp_path}/.slurm/5_0_0_log.out"
    )
    record = Run(tmp_path / SPECS[1].name).record
    assert (record["status"], record["failure"]) == ("failed", "killed")
    assert "its node failed" in record["error"]
    assert sweep.placed == SPECS[2:]


def test_a_cancelled_job_is_not_placed_anew(sweep, says):
    says("sacct", "5_0|CANCELLED by 0|0:0|n1")
    sweep._turn()
    assert {end.status for end in sweep.ends.values()} == {"failed"}
    assert len(sweep.ends) == len(SPECS)
    assert sweep.placed == []


def test_a_job_that_dies_before_its_first_run_is_not_tried_for_ever(sweep, says):
    says("sacct", "5_0|FAILED|1:0|n1")
    sweep._turn()
    assert len(sweep.ends) == len(SPECS)
    assert sweep.placed == []


def test_a_worker_killed_for_its_memory_is_told_as_that(sweep, says, tmp_path):
    killed = end(SPECS[0], "failed", "killed by signal 9 (SIGKILL)")
    writes(tmp_path, killed, *(end(spec, "done") for spec in SPECS[1:]))
    sweep._hear(sweep._jobs["5_0"])
    says("sacct", "5_0|OUT_OF_MEMORY|0:125|n1")
    sweep._turn()
    assert "exceeded its memory" in sweep.ends[SPECS[0].run_id].error


def test_a_job_that_has_left_is_waited_for_until_accounting_knows_it(sweep, says):
    says("sacct", "5_0|RUNNING|0:0|n1")
    sweep._turn()
    assert list(sweep._jobs) == ["5_0"]
    says("sacct", "5_0|TIMEOUT|0:0|n1")
    sweep._turn()
    assert "exceeded its time" in sweep.ends[SPECS[0].run_id].error


def test_silence_of_the_queue_is_waited_out(sweep, says):
    says("squeue", code=1, errors="Unable to contact slurm controller")
    sweep._turn()
    assert list(sweep._jobs) == ["5_0"]
    assert sweep.ends == {}


def test_interrupts_are_no_ends_where_the_job_is_to_be_requeued(sweep, says, tmp_path):
    says("squeue", "5_0|RUNNING|None")
    writes(tmp_path, {"event": "start", "run": SPECS[0].name}, end(SPECS[0], "interrupted"))
    sweep._turn()
    assert sweep.ends == {}


# --- in a job -------------------------------------------------------------------------------------


def test_a_diary_knows_after_a_kill_what_has_ended(tmp_path):
    path = tmp_path / "5.jsonl"
    diary = slurm._Diary(path)
    diary.write(end(SPECS[0], "done"))
    diary.write(end(SPECS[1], "interrupted"))
    with path.open("a") as file:
        file.write('{"event": "end", "run": "cut sh')
    again = slurm._Diary(path)
    assert again.ended == {SPECS[0].name}
    again.write(end(SPECS[2], "failed", "why"))
    assert slurm._Diary(path).ended == {SPECS[0].name, SPECS[2].name}


def test_a_job_is_requeued_as_long_as_its_runs_get_further(says, tmp_path):
    asked = says("scontrol")
    execution = Execution(launcher="slurm", runs_dir=str(tmp_path))
    checkpoint = tmp_path / SPECS[0].name / "attempt-1" / CHECKPOINT
    checkpoint.parent.mkdir(parents=True)
    for turn in range(6):
        checkpoint.touch()
        os.utime(checkpoint, ns=(turn, turn))
        slurm._requeue("5_0", SPECS, execution, slurm._Diary(tmp_path / "5_0.jsonl"))
    assert asked.read_text() == "requeue 5_0\n" * 6
    for _ in range(2):
        diary = slurm._Diary(tmp_path / "5_0.jsonl")
        slurm._requeue("5_0", SPECS, execution, diary)
    assert asked.read_text() == "requeue 5_0\n" * 7
    assert diary.ended == {SPECS[0].name}


def test_usr2_interrupts_the_job_once_and_kills_no_worker():
    code = (
        "import subprocess, sys, time\n"
        "from gradflow.slurm import _Stop\n"
        "stop = _Stop()\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "try:\n"
        "    print(worker.pid, flush=True)\n"  # the signals may come at once
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    worker.communicate(b'go on')\n"
        "    print(stop.requeue, worker.returncode)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    os.kill(int(job.stdout.readline()), signal.SIGUSR2)
    job.send_signal(signal.SIGUSR2)
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=60)[0] == "True 0\n"


def test_the_command_line_hands_over_also_a_single_run(command, tmp_path):
    done = command("-m", "gradflow", "depth=8", "launcher=slurm", PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "gradflow: launcher=slurm: there is no sbatch on this machine\n"
