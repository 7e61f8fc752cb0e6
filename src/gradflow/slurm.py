"""A sweep's runs as jobs of a Slurm cluster, through submitit: `launcher=slurm`.

The missing runs are dealt out to jobs of `runs_per_job`, which are submitted as one array. A job
computes its runs one after another as a local sweep does, each in a worker process. The parent
watches: what a job says stands in a file, and what became of it in Slurm's accounting. All of it
lies in the store, under `.slurm/`:

    <array>.json                which runs each job computes; locked by the sweep that tends it
    <job>.jsonl                 what the job says, a line of JSON each: the events of a local sweep
    <job>_submitted.pkl, …      submitit's
    <job>_<node>_log.out        what its processes print; this one stays

Nothing is submitted twice: a sweep waits for what an earlier one, or one beside it, has in the
queue. Jobs need no parent: one that is killed leaves them at work.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from gradflow import ranks
from gradflow.environment import LOG, slurm_job
from gradflow.errors import GradflowError, StoreError
from gradflow.interrupt import Interrupt
from gradflow.progress import Display, guarded
from gradflow.spec import Execution, RunSpec
from gradflow.store import FINISHED, Run, encode, find, mark_dead
from gradflow.sweep import End, Pool, Say
from gradflow.worker import GRACE, LAST_LINES

FOLDER = ".slurm"
"""Where in the store the jobs' files lie."""
_TURN = 2.0  # seconds between looks at the queue
_WARNING = 45  # seconds before the end of its time at which a job is told to stop
_PATIENCE = 60.0  # seconds for Slurm to write down, or to bring about, a job's end
_STALLS = 3  # times that a job may be stopped without its runs getting any further
_PORTS = range(20_000, 30_000)  # at which the nodes of a job meet; below those that are lent out
_INTERRUPTED = 130
_WAITS = ("None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Dependency",
          "Cleaning")  # fmt: skip
"""Why a job waits, where it need not be told."""
_FATES = {
    "CANCELLED": "cancelled",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "exceeded its memory",
    "TIMEOUT": "exceeded its time",
    "DEADLINE": "exceeded its deadline",
    "PREEMPTED": "preempted, and not requeued",
    "BOOT_FAIL": "its node did not boot",
    "FAILED": "failed",
    "COMPLETED": "ended",
}
_MEMORY = re.compile(r"exceeded (job |step )?memory limit|oom[-_ ]kill", re.IGNORECASE)


class Slurm:
    """The jobs of one sweep.

    Args:
        execution: what they ask for.
        say: is told what happens, in the events of a local sweep.
        most: how many runs there are to compute.

    Attributes:
        size: how many runs are computed side by side, if Slurm has room for them.
        ends: run_id -> how it ended, of each run that has.

    Raises:
        GradflowError: submitit, Slurm or its accounting are not there.
    """

    def __init__(self, execution: Execution, say: Say, most: int) -> None:
        check()
        jobs = -(-most // execution.runs_per_job)
        self.size = jobs if execution.jobs == "auto" else min(jobs, int(execution.jobs))
        self.ends: dict[str, End] = {}
        self._execution, self._say = execution, say
        self._store = Path(execution.runs_dir)
        self._folder = self._store.resolve() / FOLDER
        self._jobs: dict[str, _Job] = {}
        self._arrays: dict[Path, int] = {}  # those that this sweep looks after, and their locks
        self._told: set[str] = set()
        self._stopping: float | None = None

    def compute(self, specs: list[RunSpec]) -> dict[str, End]:
        """Compute them all. On any exception, first end the jobs in good order.

        Raises:
            GradflowError: Slurm refuses the jobs.
        """
        try:
            self._place(specs)
            while self._jobs:
                time.sleep(_TURN)
                self._turn()
        except GradflowError:
            raise
        except BaseException:
            self._stop()
            raise
        finally:
            self._tidy()
        return self.ends

    # --- submitting -------------------------------------------------------------------------------

    def _place(self, specs: Iterable[RunSpec]) -> None:
        """See that each run is in a job: one that is there already, or a new one."""
        wanted = {spec.name: spec for spec in specs}
        if not wanted:
            return
        self._folder.mkdir(exist_ok=True)
        with _locked(self._folder / "lock"):
            self._adopt(wanted)
            placed = {name for job in self._jobs.values() for name in job.runs}
            rest = [spec for name, spec in wanted.items() if name not in placed]
            if rest:
                self._submit(rest)

    def _adopt(self, wanted: Mapping[str, RunSpec]) -> None:
        """Watch other sweeps' jobs that compute wanted runs; forget arrays that have ended."""
        arrays = {path: _read_array(path) for path in self._folder.glob("*.json")}
        states = squeue(job for jobs in arrays.values() for job in jobs)
        if states is None:
            raise GradflowError("launcher=slurm: squeue does not answer")
        for path, jobs in arrays.items():
            handle = None if path in self._arrays else _try_lock(path)
            if handle is not None and not states.keys() & jobs:
                _remove(path, jobs)
                os.close(handle)
                continue
            if handle is not None:
                self._arrays[path] = handle
            for job_id in states.keys() & jobs:
                runs = {name: wanted[name] for name in jobs[job_id] if name in wanted}
                if runs:
                    known = self._jobs.get(job_id)
                    runs |= {} if known is None else known.runs
                    self._jobs[job_id] = _Job(job_id, self._folder, runs, path)

    def _submit(self, specs: list[RunSpec]) -> None:
        """One array: each job has long runs and short ones, and the longest of all is first."""
        count = -(-len(specs) // self._execution.runs_per_job)
        packs = [specs[place::count] for place in range(count)]
        ids = submit(packs, self._execution, self._folder)
        path = self._folder / f"{ids[0].partition('_')[0]}.json"
        names = [[spec.name for spec in pack] for pack in packs]
        self._arrays[path] = _write_array(path, dict(zip(ids, names, strict=True)))
        for job_id, pack in zip(ids, packs, strict=True):
            runs = {spec.name: spec for spec in pack}
            self._jobs[job_id] = _Job(job_id, self._folder, runs, path)

    def _tidy(self) -> None:
        """Remove the files of arrays that have ended; leave the others to the next sweep."""
        alive = {job.array for job in self._jobs.values()}
        for path, handle in self._arrays.items():
            if path not in alive:
                _remove(path, _read_array(path))
            os.close(handle)

    # --- watching ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Ask for all jobs at once, hear what they say, look after those that have left."""
        queue = squeue(self._jobs)
        if queue is None:
            self._tell("squeue does not answer; asking again")
            return
        for job in list(self._jobs.values()):
            waiting = queue.get(job.id)
            if waiting is None or waiting.state != "PENDING":
                self._hear(job)
            elif waiting.reason not in _WAITS:
                self._tell(f"Slurm job {job.id} waits: {waiting.reason}")
        self._bury([job for job in self._jobs.values() if job.id not in queue])
        if self._stopping is not None:
            self._press(queue)

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say({"event": "output", "run": None, "line": line})

    def _hear(self, job: _Job) -> None:
        for event in job.news():
            spec = job.runs.get(event.get("run", ""))
            if event["event"] == "requeued":
                self._say({"event": "output", "run": None, "line": f"Slurm job {job.id}: requeued"})
            elif spec is None:
                continue  # some other sweep's
            elif event["event"] != "end":
                job.begun.add(spec.name)
                self._say(event)
            elif event["status"] != "interrupted" or self._stopping is not None:
                if "(SIGKILL)" in (event["error"] or ""):
                    job.killed.append(spec)
                self._note(job, spec, event)

    def _note(self, job: _Job, spec: RunSpec, event: dict[str, Any]) -> None:
        job.runs.pop(spec.name, None)
        self.ends[spec.run_id] = End(event["status"], event["error"] or "", event["reused"])
        self._say(event)
        if event["status"] == "failed" and self._execution.fail_fast and self._stopping is None:
            self._give_up()

    def _bury(self, gone: list[_Job]) -> None:
        """Settle what has left the queue, as soon as Slurm's accounting knows how it ended."""
        clear = [job for job in gone if not job.runs and not job.killed]
        doubtful = [job for job in gone if job.runs or job.killed]
        records = sacct(job.id for job in doubtful) if doubtful else {}
        for job in doubtful:
            job.left = job.left or time.monotonic()
            over = self._stopping is not None or time.monotonic() - job.left > _PATIENCE
            if job.id in records or over:
                clear.append(job)
        for job in clear:
            del self._jobs[job.id]
            self._settle(job, records.get(job.id))

    def _settle(self, job: _Job, record: Record | None) -> None:
        """Say of each run of a job that is over how it ended; place anew what had no turn."""
        cause = fate(job, record)
        if record is not None and record.state == "OUT_OF_MEMORY":
            for spec in job.killed:  # a worker; the job went on without it
                self.ends[spec.run_id] = End("failed", self._with_log(job, cause))
        for spec in list(job.runs.values()):
            self._take_from_store(job, spec, record)
        if self._stopping is not None:
            lost = [spec for spec in job.runs.values() if spec.name in job.begun]
        elif record is None or record.state.startswith("CANCELLED"):
            lost = list(job.runs.values())
        else:
            lost = [spec for spec in job.runs.values() if spec.name in job.begun]
            lost = lost or list(job.runs.values())
        for spec in lost:
            self._lose(job, spec, cause)
        if self._stopping is None:
            self._place(job.runs.values())

    def _take_from_store(self, job: _Job, spec: RunSpec, record: Record | None) -> None:
        """What another sweep, which had the job's files, has removed stands there too."""
        run = find(self._store, spec) or _load(self._store / spec.name)
        told = spec.name in job.begun or (record is not None and record.state == "COMPLETED")
        if run is not None and (run.status in FINISHED or (run.status == "failed" and told)):
            end = {"event": "end", "run": spec.name, "status": run.status, "path": str(run.path)}
            error = run.record.get("error")
            self._note(job, spec, end | {"metrics": run.metrics, "error": error, "reused": True})

    def _lose(self, job: _Job, spec: RunSpec, cause: str) -> None:
        status = "failed" if self._stopping is None else "interrupted"
        path = self._store / spec.name
        if spec.name in job.begun:
            with contextlib.suppress(StoreError):  # this sweep still reports it
                mark_dead(path, status, cause, certain=True)
        end = {"event": "end", "run": spec.name, "status": status, "path": str(path)}
        error = self._with_log(job, cause)
        self._note(job, spec, end | {"metrics": {}, "error": error, "reused": False})

    def _with_log(self, job: _Job, cause: str) -> str:
        log = self._store / FOLDER / job.log.name
        return "\n".join([*job.last_lines(), f"{cause}; log: {log}"])

    # --- stopping ---------------------------------------------------------------------------------

    def _stop(self) -> None:
        """End the jobs and wait for them; a second Ctrl-C leaves at once."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._stopping is None:
            self._give_up()
        while self._jobs:
            time.sleep(_TURN)
            self._turn()

    def _give_up(self) -> None:
        """Take back what waits, interrupt what is at work; leave other sweeps' jobs alone."""
        self._stopping = time.monotonic()
        self._say({"event": "stopping"})
        others = [job.id for job in self._jobs.values() if job.array not in self._arrays]
        for job_id in others:
            del self._jobs[job_id]
        if others:
            self._tell(f"{len(others)} Slurm jobs of another sweep go on")
        if self._jobs:
            self._press(squeue(self._jobs) or {})

    def _press(self, queue: Mapping[str, Waiting]) -> None:
        """Each job is interrupted once; what waits, or does not end in its time, is cancelled."""
        assert self._stopping is not None
        late = time.monotonic() - self._stopping > GRACE + _PATIENCE
        mine = [job for job in self._jobs.values() if job.id in queue]
        at_work = [job for job in mine if queue[job.id].state == "RUNNING" and not late]
        asked = [job for job in at_work if not job.interrupted]
        for job in asked:
            job.interrupted = True
        _scancel("--quiet", [job.id for job in mine if job not in at_work])
        _scancel("--signal=INT", [job.id for job in asked])


@dataclass
class _Job:
    """A job that this sweep waits for.

    Attributes:
        runs: by name, those of its runs that this sweep wants and that have not ended.
        array: the file that names it.
        begun: the names of those it has begun.
        killed: those whose worker was killed.
        left: when it was first seen to have left the queue.
    """

    id: str
    folder: Path
    runs: dict[str, RunSpec]
    array: Path
    begun: set[str] = field(default_factory=set)
    killed: list[RunSpec] = field(default_factory=list)
    left: float | None = None
    interrupted: bool = False
    _heard: int = 0

    @property
    def log(self) -> Path:
        return self.folder / f"{self.id}_0_log.out"

    def news(self) -> Iterator[dict[str, Any]]:
        """What it has said since the last time."""
        try:
            with (self.folder / f"{self.id}.jsonl").open("rb") as file:
                file.seek(self._heard)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._heard += len(whole + newline)
        yield from _events(whole)

    def last_lines(self) -> list[str]:
        """The end of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 10_000))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]


def _events(text: bytes) -> list[dict[str, Any]]:
    """One a line; a line that a kill has cut short is passed over."""
    events = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def _load(path: Path) -> Run | None:
    try:
        return Run(path)
    except StoreError:
        return None


# --- the files of an array ------------------------------------------------------------------------


def _read_array(path: Path) -> dict[str, list[str]]:
    """Job -> the names of its runs; none if the file has just been removed."""
    try:
        return json.loads(path.read_text())["jobs"]
    except FileNotFoundError:
        return {}


def _write_array(path: Path, jobs: Mapping[str, list[str]]) -> int:
    """Its lock, held from before it can be seen."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"jobs": jobs}))
    handle = _try_lock(new)
    new.replace(path)
    return -1 if handle is None else handle


def _remove(path: Path, jobs: Iterable[str]) -> None:
    """Remove all that lies there of an array, but its logs."""
    for job_id in jobs:
        leftovers = [f"{job_id}.jsonl", f"{job_id}_submitted.pkl"]
        for file in [*leftovers, *(p.name for p in path.parent.glob(f"{job_id}_*_result.pkl"))]:
            (path.parent / file).unlink(missing_ok=True)
    (path.parent / f"{path.stem}_submission.sh").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _try_lock(path: Path) -> int | None:
    """Lock a file; None if another process has it, or there are no locks."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- Slurm's commands -----------------------------------------------------------------------------


class Waiting(NamedTuple):
    """A job in the queue: its state, and why it waits."""

    state: str
    reason: str


class Record(NamedTuple):
    """What Slurm's accounting says of a job that has ended."""

    state: str
    exit_code: str
    nodes: str


def check() -> None:
    """Raise GradflowError, without importing anything, where something that it takes is missing."""
    if importlib.util.find_spec("submitit") is None:
        raise GradflowError(
            "launcher=slurm: submitit is not installed; pip install 'gradflow-harness[slurm]'"
        )
    if shutil.which("sbatch") is None:
        raise GradflowError("launcher=slurm: there is no sbatch on this machine")
    # Without accounting nobody tells how a job ended.
    asked = _call("sacct", "--noheader", "--allocations", "--jobs=1")
    if asked.returncode:
        raise GradflowError(f"launcher=slurm: sacct does not answer ({_last(asked.stderr)})")


def squeue(jobs: Iterable[str]) -> dict[str, Waiting] | None:
    """Those of the jobs that are in the queue; None if it cannot be asked."""
    ids = set(jobs)
    if not ids:
        return {}
    asked = _call("squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={_arrays(ids)}")
    if asked.returncode and "Invalid job id" not in asked.stderr:  # said when none is there
        return None
    rows = [line.split("|", 2) for line in asked.stdout.splitlines()]
    return {row[0]: Waiting(*row[1:]) for row in rows if row[0] in ids}


def sacct(jobs: Iterable[str]) -> dict[str, Record]:
    """Those of the jobs whose end is known."""
    ids = set(jobs)
    columns = "--format=JobID,State,ExitCode,NodeList"
    asked = _call(
        "sacct", "--noheader", "--allocations", "--parsable2", columns, f"--jobs={_arrays(ids)}"
    )
    rows = [line.split("|", 3) for line in asked.stdout.splitlines()]
    records = {row[0]: Record(*row[1:]) for row in rows if row[0] in ids}
    return {job: r for job, r in records.items() if r.state.split()[0] in _FATES}


def fate(job: _Job, record: Record | None) -> str:
    """What became of a job, in a line."""
    if record is None:
        return (
            f"Slurm job {job.id}: cancelled before it began, as it seems:"
            " Slurm's accounting does not know it"
        )
    word, _, uid = record.state.partition(" by ")
    said = _FATES[word.split()[0]]
    if uid.isdigit():
        said += f" by {_user(int(uid))}"
    elif any(_MEMORY.search(line) for line in job.last_lines()):
        said = _FATES["OUT_OF_MEMORY"]
    code, _, number = record.exit_code.partition(":")
    details = [word, f"exit code {code}"] + (
        [f"signal {number}"] if number not in ("", "0") else []
    )
    place = f" on {record.nodes}" if record.nodes and "None" not in record.nodes else ""
    return f"Slurm job {job.id}{place}: {said} ({', '.join(details)})"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _scancel(option: str, jobs: list[str]) -> None:
    if jobs:
        _call("scancel", option, *jobs)  # what has ended meanwhile is no error


def _arrays(jobs: Iterable[str]) -> str:
    return ",".join(sorted({job.partition("_")[0] for job in jobs}))


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error}")


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"


def submit(packs: list[list[RunSpec]], execution: Execution, folder: Path) -> list[str]:
    """Submit a job for each pack, as one array; their ids.

    Raises:
        GradflowError: Slurm refuses them.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    executor = SlurmExecutor(folder, python=f"{shlex.quote(sys.executable)} -P")
    settings = asdict(execution)
    try:
        executor.update_parameters(**parameters(execution, len(packs)))
        with _outside_of_jobs(), executor.batch():
            jobs = [executor.submit(work, [s.to_job() for s in p], settings) for p in packs]
    except FailedJobError as error:
        for path in folder.glob("????????????????????????????????.pkl"):
            path.unlink(missing_ok=True)
        hint = "; raise runs_per_job" if "array specification" in str(error) else ""
        raise GradflowError(f"launcher=slurm: {_refusal(str(error))}{hint}") from None
    finally:
        for path in folder.glob(".submission_file_*.sh"):  # submitit leaves it
            path.unlink(missing_ok=True)
    return [job.job_id for job in jobs]


def _refusal(error: str) -> str:
    lines = [line for line in error.splitlines() if "error:" in line]
    return lines[-1].strip() if lines else _last(error)


def parameters(execution: Execution, jobs: int) -> dict[str, Any]:
    """What submitit asks sbatch for."""
    asked = execution.slurm
    cores = _threads(execution) * execution.devices
    others = dict(asked.args or {})
    if "no-requeue" not in others:
        others = {"requeue": True, **others}
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return {
        "job_name": "gradflow",
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "time": asked.time,
        "mem": None if asked.memory is None else f"{round(asked.memory * 1024)}M",
        "gpus_per_node": asked.gpus,
        "nodes": execution.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cores,
        "array_parallelism": jobs if execution.jobs == "auto" else int(execution.jobs),
        "wckey": None,
        "signal_delay_s": _WARNING,
        "stderr_to_stdout": True,
        # A step does not inherit the job's cores from Slurm 22.05 on.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cores}"],
        "setup": [f"export PYTHONPATH={shlex.quote(paths)}"],  # modules are found as in the parent
        "additional_parameters": others,
    }


def _threads(execution: Execution) -> int:
    return 1 if execution.threads == "auto" else int(execution.threads)


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """A sweep that is started inside a job hands nothing of that job's on to its own."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and name != "SLURM_CONF":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


# --- in a job -------------------------------------------------------------------------------------


def work(packed: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """What a job does: compute its runs, and requeue itself when it is told to stop.

    On each node of the job, and anew each time that Slurm starts it: what has ended stays so, and
    what was interrupted goes on from its checkpoint.
    """
    execution = Execution(**settings)
    job, node = slurm_job()["job"], int(os.environ["SLURM_PROCID"])
    os.environ.update(_meeting_point(execution.nodes))
    for name in ("SLURM_NTASKS", "SLURM_NPROCS"):  # by which Lightning would take this job in hand
        os.environ.pop(name, None)
    if node:
        ranks.serve(node)
        return
    stop = _Stop()
    folder = Path(os.environ["SUBMITIT_FOLDER"])
    os.environ[LOG] = str(Path(execution.runs_dir) / FOLDER / f"{job}_0_log.out")
    diary = _Diary(folder / f"{job}.jsonl")
    specs = [RunSpec.from_dict(values) for values in packed]
    specs = [spec for spec in specs if spec.name not in diary.ended]
    try:
        _compute(specs, execution, diary)
    except KeyboardInterrupt:
        if stop.requeue and _in_queue_as_running(job):
            _requeue(job, specs, execution, diary)
        else:
            ranks.dismiss(execution.nodes)
        sys.exit(_INTERRUPTED)
    ranks.dismiss(execution.nodes)


def _meeting_point(nodes: int) -> dict[str, str]:
    """Where the nodes of a job meet: at the first one, at a port that follows from the job's id."""
    if nodes == 1:
        return {}
    listed = _call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"])
    first = listed.stdout.split()[0]
    try:
        address = socket.gethostbyname(first)
    except OSError:  # a name that Slurm alone knows
        shown = _call("scontrol", "--oneliner", "show", "node", first).stdout
        address = dict(re.findall(r"(\w+)=(\S+)", shown))["NodeAddr"]
    port = _PORTS[0] + int(os.environ["SLURM_JOB_ID"]) % len(_PORTS)
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _compute(specs: list[RunSpec], execution: Execution, diary: _Diary) -> None:
    local = replace(execution, jobs=1, threads=_threads(execution))
    with Display() as display:
        say = guarded(display)

        def tell(event: dict[str, Any]) -> None:
            diary.write(event)
            say(event)

        Pool(local, tell, most=len(specs)).compute(specs)


def _in_queue_as_running(job: str) -> bool:
    """Whether Slurm still means the job to run: not if it has cancelled or requeued it itself."""
    waiting = (squeue([job]) or {}).get(job)
    return waiting is not None and waiting.state == "RUNNING"


def _requeue(job: str, specs: list[RunSpec], execution: Execution, diary: _Diary) -> None:
    """Requeue this job, unless it was stopped again and again before its run got any further."""
    left = [spec for spec in specs if spec.name not in diary.ended]
    if not left:
        return
    store = Path(execution.runs_dir)
    reached = [[spec.name, _checkpointed(store / spec.name)] for spec in left]
    diary.write({"event": "requeued", "reached": reached})
    if diary.requeued[-_STALLS:] != [reached] * _STALLS:
        _call("scontrol", "requeue", job)
        return
    error = f"stopped {_STALLS} times by Slurm before it got any further; raise slurm.time"
    end = {"event": "end", "run": left[0].name, "status": "failed", "error": error}
    with contextlib.suppress(StoreError):
        mark_dead(store / left[0].name, "failed", error)
    diary.write(end | {"path": str(store / left[0].name), "metrics": {}, "reused": False})


def _checkpointed(path: Path) -> int:
    """When the run last wrote a checkpoint; 0 for never."""
    times = [file.stat().st_mtime_ns for file in path.glob("attempt-*/checkpoint.pt")]
    return max(times, default=0)


class _Stop:
    """Interrupts this process when Slurm wants the job to stop.

    USR2 comes before the end of the job's time, TERM at preemption: the job is requeued. INT
    comes from the sweep: it is not.

    Slurm sends a signal to every process of the job. A worker knows INT and TERM; USR2, which would
    kill it, it inherits blocked.
    """

    def __init__(self) -> None:
        self.requeue = False
        self._interrupt = Interrupt()
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._told)
        signal.signal(signal.SIGUSR2, self._told)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        signal.sigwait({signal.SIGUSR2})
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _told(self, number: int, frame: Any) -> None:
        self.requeue = True
        self._interrupt()


class _Diary:
    """What a job says, for whichever sweep reads it.

    Attributes:
        ended: the names of runs that have ended, in an earlier life of the job or in this one.
        requeued: how far its runs had come, each time it was requeued.
    """

    def __init__(self, path: Path) -> None:
        self.ended: set[str] = set()
        self.requeued: list[Any] = []
        self._said = -_TURN
        for event in _events(path.read_bytes() if path.exists() else b""):
            self._take_in(event)
        self._path = path
        self._add("\n")  # after a line that a kill may have cut short

    def write(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            if time.monotonic() - self._said < _TURN:
                return
            self._said = time.monotonic()
        self._take_in(event)
        self._add(json.dumps(encode(event), allow_nan=False) + "\n")

    def _add(self, text: str) -> None:
        """A network file system shows other machines what was written once the file is closed."""
        with self._path.open("a") as file:
            file.write(text)

    def _take_in(self, event: dict[str, Any]) -> None:
        if event["event"] == "end" and event["status"] != "interrupted":
            self.ended.add(event["run"])
        elif event["event"] == "requeued":
            self.requeued.append(event["reached"])
