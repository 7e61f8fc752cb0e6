"""One run on several devices, and nodes: the processes that share it, a *rank* each.

Rank 0 is the process that calls `run`. It alone decides whether there is anything to compute, and
it alone records, evaluates, and tells how the run goes; the others train with it. On its own node
it starts them itself. For a run on several nodes a scheduler starts a process on each node, with
node 0's address in MASTER_ADDR and a port that is free there in MASTER_PORT:

    node 0:      run(spec, launcher="slurm", nodes=N, devices=D, …), as often as it likes, and at
                 the very end `dismiss(N)`
    the others:  `serve(node)`, which starts that node's ranks for each run that node 0 computes

No rank outlives rank 0, and a rank that dies ends the run: whoever started a process holds a pipe
to it, and between nodes there is a connection; what ends at one end is noticed at the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from gradflow.errors import GradflowError, SpecError
from gradflow.spec import Execution, RunSpec

COMMAND = (sys.executable, "-P", "-m", "gradflow.ranks")
LAST_LINES = 6
"""Lines of what a dead rank wrote that are handed on."""
_PATIENCE = 600.0  # seconds for all nodes to come to a run
_IDLE = 3600.0  # seconds that a node waits for the next run
_NOTICE = 2.0  # seconds for a rank's death to be known, once it has been felt
_GRACE = 30.0  # seconds for the others to end after rank 0 has finished
_HEARING = 5.0  # seconds for rank 0 to follow a signal


@dataclass(frozen=True)
class Ranks:
    """A process's place among those that share a run.

    Attributes:
        rank: from 0, over all nodes.
        world: how many ranks there are.
        devices: how many of them are on each node.
    """

    rank: int = 0
    world: int = 1
    devices: int = 1

    @property
    def nodes(self) -> int:
        return self.world // self.devices

    @property
    def node(self) -> int:
        return self.rank // self.devices

    @property
    def local_rank(self) -> int:
        return self.rank % self.devices

    def share(self, count: int) -> slice:
        """Which of `count` images are this rank's: as many as every other's, in a row."""
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)


def check(spec: RunSpec, execution: Execution, device: str | None = None) -> None:
    """Raise SpecError where the run cannot be shared as asked; needs no torch.

    Args:
        device: the device's type, once it is known; otherwise as far as `execution` tells.
    """
    world = execution.devices * execution.nodes
    if world == 1:
        return
    asked = f"devices={execution.devices}"
    asked += f", nodes={execution.nodes}" if execution.nodes > 1 else ""
    if spec.batch_size % world:
        below = spec.batch_size // world * world
        near = [str(size) for size in (below, below + world) if size]
        raise SpecError(
            f"batch_size={spec.batch_size}: does not divide into {world} ranks ({asked}); "
            f"nearest {'are' if len(near) > 1 else 'is'} {' and '.join(near)}"
        )
    device = device or execution.device
    if execution.devices > 1 and ":" in device:
        raise SpecError(f"{asked}: device={device} is one device; allowed is auto, cpu, cuda")
    if device == "mps":
        raise SpecError(f"{asked}: device=mps cannot share a run; allowed is cpu, cuda")
    if device == "cpu" and spec.norm == "batch":
        raise SpecError(
            f"{asked}: norm=batch has no statistics over several ranks on the CPU; "
            "allowed is layer, group, none"
        )


class RankKilled(GradflowError, OSError):
    """A rank that did not end by itself: killed, or lost with its node."""


class Failure(NamedTuple):
    """Why a rank ended before its time."""

    text: str
    killed: bool


# --- rank 0 ---------------------------------------------------------------------------------------


class Group:
    """The ranks of one run as rank 0 sees them; a context manager that starts and ends the others.

    Args:
        spec, execution: the run.
        device: the device's type, the same for all.
        threads: CPU threads of each rank.

    Attributes:
        ranks: rank 0's own place.
        port: where the others find rank 0.
        abort: called, from another thread, when a rank has died.

    Raises:
        GradflowError: a rank has failed, on leaving the block in place of what that led to.
    """

    def __init__(self, spec: RunSpec, execution: Execution, device: str, threads: int):
        world = execution.devices * execution.nodes
        self.ranks = Ranks(0, world, execution.devices)
        self.abort: Callable[[], None] = lambda: None
        self._failure: Failure | None = None
        self._noticed = threading.Event()
        self._ending = threading.Event()
        self._signals = contextlib.ExitStack()
        self._local: _Processes | None = None
        self._nodes: dict[int, socket.socket] = {}
        self._job = {"spec": spec.to_job(), "device": device, "threads": threads}
        self._job |= {"world": world, "devices": execution.devices}

    def __enter__(self) -> Self:
        if self.ranks.world == 1:
            return self
        several = self.ranks.nodes > 1
        address = _address()[0] if several else "127.0.0.1"
        # Ours to bind, so that the port is certainly free, and on one node not seen from outside.
        self._listener = socket.create_server(("" if several else address, 0))
        self.port = self._listener.getsockname()[1]
        self._job |= {"address": address, "port": self.port}
        try:
            self._local = _Processes(self._job, range(1, self.ranks.devices), self._fail)
            self._signals.enter_context(_overheard(self._follow_signal))
            if several:
                self._call_nodes()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.ranks.world == 1:
            return
        if kind is None and self._local is not None:
            self._local.wait(_GRACE)
        # A collective operation that loses a rank raises a RuntimeError, at once.
        if kind is not None and issubclass(kind, RuntimeError):
            self._noticed.wait(_NOTICE)
        self._end()
        if kind is not None and issubclass(kind, RuntimeError):
            self.check(error)

    def take_listener(self) -> int:
        """The socket at `port` as a descriptor; from now on the caller's."""
        return self._listener.detach()

    def check(self, cause: BaseException | None = None) -> None:
        """Raise GradflowError if a rank has failed."""
        if self._failure is not None:
            kind = RankKilled if self._failure.killed else GradflowError
            raise kind(self._failure.text) from cause

    def _call_nodes(self) -> None:
        with _calling(self.ranks.nodes, _PATIENCE, self.check) as arrivals:
            for node, connection in arrivals:
                self._nodes[node] = connection
                _send(connection, self._job)
                threading.Thread(target=self._hear, args=(node, connection), daemon=True).start()

    def _hear(self, node: int, connection: socket.socket) -> None:
        """Wait for a node's end: in good order, with a failure, or the connection's alone."""
        for said in _lines(connection):
            if said.get("event") == "ended":
                return
            self._fail(Failure(said["error"], said["killed"]))
            return
        self._fail(Failure(f"node {node}: the connection to it is lost", True))

    def _fail(self, failure: Failure) -> None:
        if self._failure is None and not self._ending.is_set():
            self._failure = failure
            self._stop_others()  # so that none of them is waited for
            self._noticed.set()
            self.abort()

    def _follow_signal(self) -> None:
        """A rank that hangs keeps rank 0 waiting where Python does not hear of signals."""
        if not self._ending.wait(_HEARING):
            self._ending.set()
            self._stop_others()

    def _stop_others(self) -> None:
        if self._local is not None:
            self._local.kill()
        for connection in self._nodes.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _end(self) -> None:
        self._ending.set()
        self._signals.close()
        self._stop_others()
        if self._local is not None:
            self._local.wait(_GRACE)
        for connection in self._nodes.values():
            connection.close()
        self._listener.close()


# --- other nodes ----------------------------------------------------------------------------------


def serve(node: int) -> None:
    """Compute this node's ranks of all runs that node 0 computes, until it says that it is over.

    INT, TERM and USR2 are left to node 0: they stay blocked in this thread and in the ranks.

    Args:
        node: this node's number, from 1.

    Raises:
        GradflowError: node 0 does not call for an hour.
    """
    with _without_signals():
        while True:
            with _connection() as connection:
                _send(connection, {"node": node})
                said = _lines(connection)
                job = next(said, None)
                if job is not None and job.get("event") == "dismissed":
                    return
                if job is not None:
                    _serve(job, node, connection, said)


def dismiss(nodes: int) -> None:
    """On node 0: tell the other nodes that there is nothing more to compute."""
    if nodes == 1:
        return
    with _calling(nodes, 2 * _GRACE, lambda: None) as arrivals:
        for _, connection in arrivals:
            _send(connection, {"event": "dismissed"})
            connection.close()


def _serve(
    job: dict[str, Any], node: int, connection: socket.socket, said: Iterator[dict[str, Any]]
) -> None:
    def fail(failure: Failure) -> None:
        _send(connection, {"error": failure.text, "killed": failure.killed})

    def tell_the_end() -> None:
        if processes.wait(None):
            _send(connection, {"event": "ended"})

    first = node * job["devices"]
    processes = _Processes(job, range(first, first + job["devices"]), fail)
    threading.Thread(target=tell_the_end, daemon=True).start()
    try:
        for _ in said:  # nothing more comes: the run lasts as long as the connection
            pass
    finally:
        processes.kill()
        processes.wait(_GRACE)


# --- processes ------------------------------------------------------------------------------------


class _Processes:
    """A node's ranks, as far as they are processes of their own.

    Args:
        job: what they compute.
        ranks: which ones they are.
        failed: told, from another thread, of each that ends before its time.
    """

    def __init__(
        self, job: dict[str, Any], ranks: Iterable[int], failed: Callable[[Failure], None]
    ):
        self._failed = failed
        self._ending = False
        self._processes: list[subprocess.Popen[str]] = []
        self._watches: list[threading.Thread] = []
        try:
            for rank in ranks:
                process = _start(job | {"rank": rank})
                self._processes.append(process)
                watch = threading.Thread(target=self._watch, args=(rank, process), daemon=True)
                self._watches.append(watch)
                watch.start()
        except BaseException:
            self.kill()
            raise

    def _watch(self, rank: int, process: subprocess.Popen[str]) -> None:
        with process:  # closes its pipes
            assert process.stdout is not None
            lines = deque((line.rstrip() for line in process.stdout), maxlen=LAST_LINES)
            code = process.wait()
        if code and not self._ending:
            how = f"killed by signal {-code} ({_signal(-code)})" if code < 0 else ""
            text = "\n".join([*lines, f"its process was {how}"] if how else lines)
            self._failed(Failure(f"rank {rank}: {text or f'exit code {code}'}", code < 0))

    def kill(self) -> None:
        self._ending = True
        for process in self._processes:
            process.kill()

    def wait(self, seconds: float | None) -> bool:
        """Whether all have ended well by then."""
        until = None if seconds is None else time.monotonic() + seconds
        for watch in self._watches:
            watch.join(None if until is None else max(0.0, until - time.monotonic()))
        return all(process.poll() == 0 for process in self._processes)


def _start(job: dict[str, Any]) -> subprocess.Popen[str]:
    """A rank. Its input stays open as long as this process lives, and it no longer than that."""
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    with _without_signals():  # a rank is ended by whoever started it
        process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": paths},  # a user's modules are found as here
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has died, which is noticed in its turn
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    return process


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Blocks the signals that ask for an end, in this thread and in processes started meanwhile."""
    asked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _overheard(told: Callable[[], None]) -> Iterator[None]:
    """Call `told` in a thread when INT or TERM arrives, whatever the main thread is at."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                told()

    heard, said = socket.socketpair()
    said.setblocking(False)
    before = signal.set_wakeup_fd(said.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        said.close()
        thread.join()
        heard.close()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


# --- between nodes: lines of JSON -----------------------------------------------------------------


def _address() -> tuple[str, int]:
    """Where node 0 is called."""
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise GradflowError(
            "nodes: MASTER_ADDR and MASTER_PORT must name node 0 and a free port there"
        ) from None


@contextlib.contextmanager
def _calling(
    nodes: int, patience: float, check: Callable[[], None]
) -> Iterator[Iterator[tuple[int, socket.socket]]]:
    """On node 0: the other nodes and their connections, as they come."""
    address, port = _address()
    try:
        listener = socket.create_server(("", port))
    except OSError as error:
        raise GradflowError(f"MASTER_PORT={port}: {error.strerror or error}") from None

    def arrivals() -> Iterator[tuple[int, socket.socket]]:
        missing, until = set(range(1, nodes)), time.monotonic() + patience
        listener.settimeout(0.5)
        while missing:
            check()
            if time.monotonic() > until:
                named = ", ".join(map(str, sorted(missing)))
                raise GradflowError(f"nodes={nodes}: node {named} did not come to {address}:{port}")
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                node = _greeting(connection)
                if node in missing:
                    missing.remove(node)
                    yield node, connection
                else:
                    connection.close()

    with listener:
        yield arrivals()


def _greeting(connection: socket.socket) -> int | None:
    """The number of the node that has connected; None if it is something else."""
    connection.settimeout(5.0)
    try:
        number = next(_lines(connection), {}).get("node")
    except TimeoutError:
        return None
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return number if isinstance(number, int) else None


def _connection() -> socket.socket:
    """To node 0, as soon as it calls."""
    address, until = _address(), time.monotonic() + _IDLE
    while time.monotonic() < until:
        try:
            connection = socket.create_connection(address, timeout=5.0)
        except OSError:
            time.sleep(0.2)
            continue
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection
    raise GradflowError(f"node 0 did not call at {address[0]}:{address[1]}")


def _send(connection: socket.socket, said: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # whoever reads notices that the other end is gone
        connection.sendall(json.dumps(said).encode() + b"\n")


def _lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """What the other end says, until it is gone."""
    rest = b""
    while True:
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:
            return
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            try:
                said = json.loads(line)
            except ValueError:
                return
            if not isinstance(said, dict):
                return
            yield said


# --- a rank ---------------------------------------------------------------------------------------


def main() -> None:
    """`python -m gradflow.ranks`: one rank of a run; its job is a line of JSON on stdin."""
    code = 1
    try:
        _compute()
        code = 0
    except GradflowError as error:
        print(error)
    except SystemExit as error:  # in a network of the user's
        print(f"sys.exit({error.code}) was called")
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    # Threads of gloo's may still give tensors back, which aborts a Python that is ending.
    os._exit(code)


def _compute() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_starter, daemon=True).start()
    from gradflow.ranks import Ranks  # not this module's own, which is called __main__
    from gradflow.run import follow

    place = Ranks(job["rank"], job["world"], job["devices"])
    follow(
        RunSpec.from_dict(job["spec"]),
        place,
        device=job["device"],
        threads=job["threads"],
        address=(job["address"], job["port"]),
    )


def _end_with_starter() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
