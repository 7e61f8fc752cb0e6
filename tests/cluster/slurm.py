"""A Slurm cluster of two nodes on this machine, from Debian's packages, for tests.

    with Cluster(directory) as cluster:                 a context manager …
        subprocess.run(["sinfo"], env=cluster.environment)
    python tests/cluster/slurm.py up DIRECTORY          … or from a shell: prints what to export
    python tests/cluster/slurm.py down DIRECTORY
    python tests/cluster/slurm.py check                 says what this machine lacks for it

All of it is in the directory: configuration, keys, sockets, database, logs, and the ids of the
processes, by which they are stopped. It listens on loopback alone, at ports that were free, with
its own munge socket, and starts no system service; a Slurm that the machine has stays as it is.
Accounting (slurmdbd) is part of it, a job that exceeds its memory is killed, and the partition
`high` preempts `low`. It wants root, as slurmd does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
}
"""Program -> Debian's package of it."""
NODES = ("n1", "n2")
CORES = 2
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_PATIENCE = 60.0  # seconds for any part to come up, or to end
_POLL = 0.05

_SLURM_CONF = """\
ClusterName=gradflow
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its former credential has expired.
AuthInfo=socket={d}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1500
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd}
AccountingStoragePass={d}/munge.socket
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool.%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.%n.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd.%n.log
PlugStackConfig=/dev/null
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports}] \
CPUs={cores} RealMemory=4000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
_SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={d}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={slurmdbd}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile={d}/slurmdbd.log
PidFile={d}/slurmdbd.pid
"""


def missing() -> str:
    """What this machine lacks, in one line; empty if nothing."""
    lacking = [package for program, package in PACKAGES.items() if _which(program) is None]
    if lacking:
        return f"Slurm is missing: apt-get install --no-install-recommends {' '.join(lacking)}"
    return "" if os.geteuid() == 0 else "the cluster wants root"


class Cluster:
    """The cluster whose state is in `directory`. Raises RuntimeError where a part stays down.

    Attributes:
        environment: variables with which Slurm's commands speak to this cluster.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).resolve()
        self.environment = {**os.environ, "SLURM_CONF": str(self.directory / "slurm.conf")}
        self._pids = self.directory / "pids.json"
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def up(self) -> None:
        """Start every part and wait until both nodes are idle; on any trouble stop them again."""
        if reason := missing():
            raise RuntimeError(reason)
        try:
            self._configure()
            self._start_munge()
            self._start_accounting()
            self._start_slurm()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End the jobs, then the daemons, the last first, by the ids noted."""
        if not self._pids.exists():
            return
        with contextlib.suppress(RuntimeError, subprocess.SubprocessError):
            self.call("scancel", "--user", str(os.geteuid()))
            _wait(lambda: not self.call("squeue", "--noheader"), "the end of the jobs")
        for pid, started in reversed(json.loads(self._pids.read_text())):
            if _started(pid) == started:
                _end(pid, signal.SIGTERM)
        for child in self._children:  # of this process, if it started them
            child.wait()
        for pid in self._left():  # of jobs: they know the cluster from their environment
            _end(pid, signal.SIGKILL)
        self._pids.unlink()

    def call(self, *command: str) -> str:
        """What one of Slurm's commands prints. Raises CalledProcessError."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    def resume(self) -> None:
        """Take back into service what was set down; wait until every node is idle."""
        for node, state in zip(NODES, self._nodes(), strict=True):
            if state.startswith("down"):
                self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        _wait(lambda: self._nodes() == ["idle"] * len(NODES), "the nodes")

    def _nodes(self) -> list[str]:
        listing = ("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T")
        return self.call(*listing).split()

    # --- the parts --------------------------------------------------------------------------------

    def _configure(self) -> None:
        for name in ("", "state", "database", *(f"spool.{node}" for node in NODES)):
            (self.directory / name).mkdir(parents=True, exist_ok=True, mode=0o755)
        self.directory.chmod(0o755)  # munged wants its socket to be reachable
        slurmctld, slurmdbd, first = _free_ports(len(NODES))
        values = {
            "d": self.directory,
            "slurmctld": slurmctld,
            "slurmdbd": slurmdbd,
            "nodes": ",".join(NODES),
            "ports": f"{first}-{first + len(NODES) - 1}",
            "cores": CORES,
        }
        for name, text in {"slurm.conf": _SLURM_CONF, "slurmdbd.conf": _SLURMDBD_CONF}.items():
            (self.directory / name).write_text(text.format(**values))
            (self.directory / name).chmod(0o600)
        (self.directory / "munge.key").write_bytes(os.urandom(128))
        (self.directory / "munge.key").chmod(0o600)
        self._note([])

    def _start_munge(self) -> None:
        options = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        paths = [f"--{name}={self.directory / file}" for name, file in options.items()]
        munged = self._start("munged", "--foreground", "--force", *paths)
        self._wait(munged, lambda: (self.directory / "munge.socket").exists(), "munged")

    def _start_accounting(self) -> None:
        data, database = self.directory / "database", self.directory / "db.socket"
        self._call("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root",
                   "--skip-test-db", "--auth-root-authentication-method=normal")  # fmt: skip
        mariadbd = self._start("mariadbd", "--no-defaults", f"--datadir={data}", "--user=root",
                               "--skip-networking", f"--socket={database}",
                               "--innodb-flush-log-at-trx-commit=0")  # fmt: skip
        self._wait(mariadbd, lambda: _answers(database), "mariadbd")
        slurmdbd = self._start("slurmdbd", "-D", MYSQL_UNIX_PORT=str(database))
        self._wait(slurmdbd, lambda: self._says("sacctmgr", "-n", "list", "cluster"), "slurmdbd")
        self._call("sacctmgr", "--immediate", "add", "cluster", "gradflow")

    def _start_slurm(self) -> None:
        slurmctld = self._start("slurmctld", "-D")
        self._wait(slurmctld, lambda: self._says("scontrol", "ping"), "slurmctld")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node, note=node)
        _wait(lambda: self._nodes() == ["idle"] * len(NODES), "the nodes")

    # --- processes --------------------------------------------------------------------------------

    def _start(
        self, program: str, *arguments: str, note: str = "", **environment: str
    ) -> subprocess.Popen[bytes]:
        path = _which(program)
        assert path is not None
        with (self.directory / f"{program}{note}.out").open("ab") as output:
            process = subprocess.Popen(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                env={**self.environment, **environment},
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
        self._children.append(process)
        noted = json.loads(self._pids.read_text())
        self._note([*noted, [process.pid, _started(process.pid)]])
        return process

    def _note(self, processes: list[list[object]]) -> None:
        self._pids.write_text(json.dumps(processes))

    def _wait(
        self, process: subprocess.Popen[bytes], condition: Callable[[], bool], part: str
    ) -> None:
        def ready() -> bool:
            if process.poll() is not None:
                logs = [self.directory / f"{part}.out", self.directory / f"{part}.log"]
                said = [path.read_text()[-500:] for path in logs if path.exists()]
                raise RuntimeError(f"{part} exited with code {process.returncode}: {said}")
            return condition()

        _wait(ready, part)

    def _call(self, program: str, *arguments: str) -> None:
        with (self.directory / "setup.out").open("ab") as output:
            subprocess.run(
                [_which(program) or program, *arguments],
                env=self.environment, stdout=output, stderr=output, timeout=_PATIENCE, check=True,
            )  # fmt: skip

    def _says(self, *command: str) -> bool:
        try:
            return "DOWN" not in self.call(*command)
        except subprocess.SubprocessError:
            return False

    def _left(self) -> list[int]:
        """Processes of the cluster's jobs that are still there."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                pid = int(path.parent.name)
                entries = path.read_bytes().split(b"\0")
                if mark in entries and b"SLURM_JOB_ID" in b"".join(entries) and pid != os.getpid():
                    found.append(pid)
        return found


def _which(program: str) -> str | None:
    return shutil.which(program, path=_PATH)


def _free_ports(row: int) -> tuple[int, int, int]:
    """Two free ports, and the first of `row` free ones that follow on each other."""
    for first in range(17_000, 30_000, row):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + row):
                    stack.enter_context(_bound(port))
                slurmctld, slurmdbd = (stack.enter_context(_bound(0)) for _ in range(2))
            except OSError:
                continue
            return slurmctld.getsockname()[1], slurmdbd.getsockname()[1], first
    raise RuntimeError("no free ports")


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    try:
        bound.bind(("127.0.0.1", port))
    except OSError:
        bound.close()
        raise
    return bound


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {_PATIENCE:g} s in vain for {what}")
        time.sleep(_POLL)


def _started(pid: int) -> str | None:
    """When a process was started: with its id it is one process and no other. None if it is gone.

    One that only waits to be buried by its parent is gone.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else rest[18]


def _end(pid: int, number: int) -> None:
    started, deadline = _started(pid), time.monotonic() + _PATIENCE / 4
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        while started is not None and _started(pid) == started:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL)


def main(arguments: list[str]) -> int:
    if arguments == ["check"]:
        if reason := missing():
            print(f"test-cluster: {reason}", file=sys.stderr)
        return bool(reason)
    if len(arguments) != 2 or arguments[0] not in ("up", "down"):
        print("usage: python tests/cluster/slurm.py up|down DIRECTORY", file=sys.stderr)
        return 2
    cluster = Cluster(arguments[1])
    try:
        getattr(cluster, arguments[0])()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments[0] == "up":
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
