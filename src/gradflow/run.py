"""One run: a spec becomes a record in the store."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from gradflow.data import Batches, Data, consumed_digest, load_data, seed_step
from gradflow.environment import environment
from gradflow.errors import GradflowError
from gradflow.networks import build, callable_of
from gradflow.networks.freezing import freeze_all_but_last
from gradflow.probe import measure, readout_seed, table
from gradflow.ranks import Group, Ranks, check
from gradflow.recording import Recorder
from gradflow.recording.probes import propagate
from gradflow.recording.quantities import ALL, DEFAULT
from gradflow.recording.schedules import FIRST_STEPS, Schedule, every
from gradflow.spec import OWN, Execution, RunSpec
from gradflow.store import CHECKPOINT, Run, RunWriter, damaged, encode, find, prepare
from gradflow.tracking import Mirror
from gradflow.training.evaluation import evaluate

Emit = Callable[[dict[str, Any]], None]


def run(spec: RunSpec, *, emit: Emit | None = None, **settings: Any) -> Run:
    """Compute a run and record it, unless the store has it already.

    With several devices (and nodes) this process is the first of those that share the run, and
    starts the others; see `ranks`.

    Args:
        spec: what to run.
        emit: is told what happens, one dict of plain JSON data at a time: `claimed`,
            `begin`, `step`, `evaluation`, `end`.
        settings: fields of `Execution`: runs_dir, device, devices, nodes, threads, logger.

    Returns:
        The finished run; its status is `done`, or `diverged`, which is a result too.

    Raises:
        SpecError: devices that cannot share this run.
        GradflowError: a device, file or directory that is not there; a rank that died.
        KeyboardInterrupt: on Ctrl-C; the run is `interrupted` and all recorded so far readable.
        Exception: whatever a network of the user's raises; the run is `failed`.
    """
    execution = Execution(**settings)
    check(spec, execution)
    tell: Emit = (lambda event: emit(encode(event))) if emit is not None else (lambda event: None)
    store = prepare(execution.runs_dir)
    found = _finished(store, spec)
    reused = found is not None
    if found is None:
        found, reused = _run(store, spec, execution, tell)
    tell(
        {"event": "end", "run": spec.name, "status": found.status, "path": str(found.path)}
        | {"metrics": found.metrics, "error": found.record.get("error"), "reused": reused}
    )
    return found


def _finished(store: Path, spec: RunSpec) -> Run | None:
    """The run, if the store has its result; of a user's files only if they are what they were."""
    found = find(store, spec)
    if found is not None and spec.data.name in OWN:
        return found if _is_on(found, load_data(spec.data)) else None
    return found


def _is_on(found: Run, data: Data) -> bool:
    return found.record.get("certificate", {}).get("data") == data.digest


class _DoneMeanwhile(Exception):
    """Another process has finished the run since it was looked for: the argument."""


def _run(store: Path, spec: RunSpec, execution: Execution, tell: Emit) -> tuple[Run, bool]:
    """The run, and whether another process was faster."""
    device = _device(execution.device, spec, execution.devices)
    check(spec, execution, device.type)
    set_up_process(execution.threads, execution.devices)
    data = load_data(spec.data)
    # Before the run's directory is made: what cannot be is a mistake, and no run. To build the
    # network may take long, and is for the process alone that holds the run.
    Batches(data.train, batch_size=spec.batch_size, accumulate=spec.accumulate)
    if spec.network.name == "custom":
        callable_of(spec)
    state: dict[str, Any] = {}

    def keep(attempt: Path) -> int:
        found = find(store, spec)
        if found is not None and _is_on(found, data):
            raise _DoneMeanwhile(found)
        tell({"event": "claimed", "run": spec.name})
        state.update(_read_checkpoint(attempt, spec, data) or {})
        return int(state.get("part", 0))

    try:
        writer = RunWriter(store / spec.name, spec.to_dict(), keep=keep)
    except _DoneMeanwhile as done:
        return done.args[0], True
    # A single pass is not worth other processes.
    alone = replace(execution, devices=1, nodes=1) if spec.max_steps == 0 else execution
    group = Group(spec, alone, device.type, torch.get_num_threads())
    mirror = Mirror(execution.logger)  # closed last: it mirrors what the record has become
    with mirror, writer, group:
        try:
            _compute(spec, data, device, writer, state, mirror, tell, group)
        except SystemExit as error:  # in a network of the user's
            raise GradflowError(f"{spec.name}: its network called sys.exit({error.code})") from None
    return Run(writer.path), False


def _read_checkpoint(attempt: Path, spec: RunSpec, data: Data) -> dict[str, Any] | None:
    """What an earlier, unfinished attempt at the run, on the same data, left to go on from.

    Nothing where a part of the record that belongs to it is damaged: the run begins again.
    """
    if spec.max_steps == 0 or not (attempt / CHECKPOINT).exists():
        return None
    from gradflow.training.checkpoint import read_checkpoint

    state = read_checkpoint(attempt, spec)
    if state is None or state["data"] != data.digest:
        return None
    broken = damaged(attempt, state["part"])
    if broken is not None:
        print(f"{broken}: damaged; the run begins again", file=sys.stderr)
        return None
    return state


def _compute(
    spec: RunSpec,
    data: Data,
    device: torch.device,
    writer: RunWriter,
    state: dict[str, Any],
    mirror: Mirror,
    tell: Emit,
    group: Group,
) -> None:
    ranks = group.ranks
    here = environment(str(device), torch.get_num_threads(), ranks.devices, ranks.nodes)
    if state:
        writer.spent = state["seconds"]
        attempts = writer.record.get("resumed", [])
        attempt = {"updates": state["updates"], "started": time.time(), "environment": here}
        writer.update(resumed=[*attempts, attempt])
    else:
        writer.update(environment=here)
    network = _network(spec, data, device, ranks)
    steps = spec.updates(len(data.train))
    start = state.get("updates", 0)
    tell(
        {"event": "begin", "run": spec.name, "steps": steps, "start": start}
        | {"path": str(writer.path)}
    )
    certificate = {
        "parameter_count": sum(p.numel() for p in network.parameters()),
        "parameters": {name: _digest(p) for name, p in network.named_parameters()},
        "data": data.digest,
    }
    writer.update(certificate=certificate)
    data = data.to(device, _dtype(spec))
    mirror.begin(writer, spec)
    fields = _measure(network, data, spec, device, writer, mirror, tell, state, group)
    if spec.probe.name is not None:
        _probe(network, data, spec, writer, fields["steps"])
    status = "done" if fields["divergence"] is None else "diverged"
    certificate["batches"] = fields.pop("batches_digest")
    fields["final_parameters"] = _digest_all(network)
    writer.finish(status, certificate=certificate, **fields)


def _measure(
    network: nn.Module,
    data: Data,
    spec: RunSpec,
    device: torch.device,
    writer: RunWriter,
    mirror: Mirror,
    tell: Emit,
    state: dict[str, Any],
    group: Group,
) -> dict[str, Any]:
    """Train, or measure initialisation alone; what run.json says of the outcome."""
    if spec.max_steps == 0:
        return _measure_initialisation(network, data, spec, writer)
    from gradflow.training.fit import train

    outcome = train(
        network,
        data,
        spec,
        device=device,
        schedule=_schedules(spec),
        quantities=_quantities(spec),
        writer=writer,
        mirror=mirror,
        emit=tell,
        state=state or None,
        group=group,
    )
    return {
        "steps": outcome.steps,
        "metrics": outcome.metrics,
        "batches_digest": outcome.batches_digest,
        "recorder_seconds": outcome.recorder_seconds,
        "recorder_share": outcome.recorder_seconds / outcome.fit_seconds,
        "divergence": None if outcome.divergence is None else asdict(outcome.divergence),
    }


def follow(
    spec: RunSpec, ranks: Ranks, *, device: str, threads: int, address: tuple[str, int]
) -> None:
    """Compute a run as one of its ranks other than 0, and record nothing.

    Args:
        device: the device's type.
        address: where rank 0 is found.

    Raises:
        GradflowError: a device or file that is not there, or other data than rank 0's.
    """
    name = f"{device}:{ranks.local_rank}" if device == "cuda" else device
    place = _device(name, spec)
    set_up_process(threads)
    data = load_data(spec.data)
    from gradflow.training.fit import follow as train_along

    train_along(
        _network(spec, data, place, ranks),
        data.to(place, _dtype(spec)),
        spec,
        device=place,
        schedule=_schedules(spec),
        quantities=_quantities(spec),
        ranks=ranks,
        address=address,
    )


def _measure_initialisation(
    network: nn.Module, data: Data, spec: RunSpec, writer: RunWriter
) -> dict[str, Any]:
    """Step 0 alone: one forward and backward pass, recorded, and no update.

    Of a network with `weights` the test split is evaluated first: the pass, in training mode, moves
    the running statistics.
    """
    batches = Batches(
        data.train, batch_size=spec.batch_size, accumulate=spec.accumulate, seed=spec.seed
    )
    quantities = [name for name in _quantities(spec) if not name.startswith("update_")]
    device = next(network.parameters()).device
    tested = {}
    if spec.weights is not None:
        tested = evaluate(network, data.test, _autocast(spec, device))
    network.train()
    first_pass = _pass_of_loss if spec.probe.name is None else _pass_of_readout
    with Recorder(network, quantities, _schedules(spec), save=writer) as recorder:
        if tested:
            recorder.evaluate("test", step=0, **tested)
        consumed = first_pass(network, batches, spec, recorder)
    divergence = recorder.divergence
    return {
        "steps": 0,
        "metrics": {f"test_{name}": value for name, value in tested.items()},
        "batches_digest": consumed,
        "recorder_seconds": recorder.seconds,
        "divergence": None if divergence is None else asdict(divergence),
    }


def _pass_of_loss(network: nn.Module, batches: Batches, spec: RunSpec, recorder: Recorder) -> str:
    """The pass of the first update; the digest of its batches."""
    consumed = ""
    loss, right = torch.zeros(()), torch.zeros(())
    for place, batch in enumerate(itertools.islice(batches, spec.accumulate)):
        images, labels, indices = batch
        seed_step(spec.seed, 0, place)
        consumed = consumed_digest(consumed, indices)
        with _autocast(spec, images.device):
            logits = network(images)
            part = functional.cross_entropy(logits, labels) / spec.accumulate
        part.backward()
        loss = loss + part.detach().cpu()
        right = right + (logits.argmax(dim=1) == labels).float().mean().cpu()
    recorder.step(loss, accuracy=right / spec.accumulate)
    return consumed


def _pass_of_readout(
    network: nn.Module, batches: Batches, spec: RunSpec, recorder: Recorder
) -> str:
    """The pass of a random linear readout: theory's, for any output; the digest of its batch."""
    images, _, indices = next(iter(batches))
    seed_step(spec.seed, 0, 0)
    with _autocast(spec, images.device):
        propagate(network, images, seed=readout_seed(spec))
    recorder.step()
    return consumed_digest("", indices)


def _probe(network: nn.Module, data: Data, spec: RunSpec, writer: RunWriter, step: int) -> None:
    """What the spec's probe measures, at the parameters after `step` updates."""
    batches = Batches(data.train, batch_size=spec.batch_size, accumulate=1, seed=spec.seed)
    images, _, _ = next(iter(batches))
    seed_step(spec.seed, step, 0)
    network.zero_grad()
    writer.append("probes", table(measure(spec, network, data, images), step))


def _network(spec: RunSpec, data: Data, device: torch.device, ranks: Ranks) -> nn.Module:
    inputs = data.inputs(spec.network.name)
    network = build(spec, in_channels=inputs, num_classes=data.num_classes)
    if spec.trainable_blocks is not None:
        freeze_all_but_last(network, spec.trainable_blocks)
    if spec.network.name == "custom" and not (spec.probe.name and spec.max_steps == 0):
        _try_out(network, spec, data)
    if ranks.world > 1:
        network = _synchronised(network, device)
    # Channels last is the layout that convolutions prefer, on CPUs and GPUs; it moves no number.
    return network.to(device, _dtype(spec)).to(memory_format=torch.channels_last)  # type: ignore


def _synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """With batch statistics over all ranks, which there are on GPUs alone."""
    norms = [type(m).__name__ for m in network.modules() if isinstance(m, _BatchNorm)]
    if norms and device.type != "cuda":
        raise GradflowError(f"devices: {norms[0]} has no statistics over several ranks on the CPU")
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def _try_out(network: nn.Module, spec: RunSpec, data: Data) -> None:
    """Pass two images through a user's network, in both modes and back, before it is trained.

    Raises:
        GradflowError: it cannot take them, returns no logits, or has nothing to train.
    """
    label = f"network.target={spec.network.target}"
    images, _ = next(iter(data.train.batches(2)))
    wanted = [2, data.num_classes]
    for training, mode in ((False, ""), (True, " in training mode")):
        network.train(training)
        kept = [] if not training else [(buffer, buffer.clone()) for buffer in network.buffers()]
        try:
            with torch.set_grad_enabled(training), torch.random.fork_rng():
                seed_step(spec.seed, 0, 0)  # lazy layers draw their parameters here
                logits = network(images)
        except Exception as error:
            raise GradflowError(
                f"{label}: images {list(images.shape)} do not pass{mode}: {_reason(error)}"
            ) from error
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if found != wanted:
            hint = " alone: switch other heads off, e.g. by {aux_logits:false}" if training else ""
            raise GradflowError(f"{label}: returns {found}{mode}, wants logits {wanted}{hint}")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise GradflowError(f"{label}: has no parameters to train")
    try:
        logits.sum().backward()
    except Exception as error:
        hint = _reason(error) if logits.requires_grad else "they are detached from its parameters"
        raise GradflowError(f"{label}: its logits have no gradient: {hint}") from error
    network.zero_grad()
    with torch.no_grad():  # not before: the way back needs what the pass there left
        for buffer, before in kept:
            buffer.copy_(before)


def _reason(error: Exception) -> str:
    """The first line of what it says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _dtype(spec: RunSpec) -> torch.dtype:
    return torch.float64 if spec.precision == "fp64" else torch.float32


def _autocast(spec: RunSpec, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(spec.precision)
    return torch.autocast(device.type, half) if half is not None else contextlib.nullcontext()


def _quantities(spec: RunSpec) -> tuple[str, ...]:
    norms = {"none": (), "default": DEFAULT, "all": ALL}[spec.record.name]
    return (*norms, *(spec.record.details or ()))


def _schedules(spec: RunSpec) -> dict[str, Schedule]:
    rates = spec.record.every
    weights = every(rates.weights or 0)
    schedules = {
        "weights": weights,
        "outputs": every(rates.outputs or 0, first=FIRST_STEPS),
        "blocks": every(rates.blocks or 0, first=FIRST_STEPS),
        "details": every(rates.details or 0, first=FIRST_STEPS),
    }
    if spec.record.name == "default":  # weights move slowly: every tenth time that gradients are
        seldom = every(10 * (rates.weights or 0), first=FIRST_STEPS)
        schedules["weight_norm"] = lambda step: weights(step) and seldom(step)
    return schedules


def _digest_all(network: nn.Module) -> str:
    """One digest of all parameters and buffers."""
    state = sorted((name, _digest(tensor)) for name, tensor in network.state_dict().items())
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def _digest(parameter: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in its logical order, whatever its layout in memory."""
    values = parameter.detach().cpu().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def _device(name: str, spec: RunSpec, devices: int = 1) -> torch.device:
    """The device of that name; the first of several, all of which must be there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    several = name == "cuda" and devices > 1
    for one in [f"cuda:{number}" for number in range(devices)] if several else [name]:
        try:
            torch.empty(0, device=one)
        except (RuntimeError, AssertionError):
            raise GradflowError(f"device={one}: this machine has no such device") from None
    device = torch.device("cuda:0" if several else name)
    spec.check_device(device.type)
    return device


def set_up_process(threads: int | str, processes: int = 1) -> None:
    """Set the CPU threads of this process, and how it keeps its memory.

    Args:
        threads: `auto` leaves all, or what falls to each of several `processes`.
    """
    if threads != "auto":
        torch.set_num_threads(int(threads))
    elif processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    if platform.system() == "Linux":
        # glibc hands large blocks back to the system and faults them in again, step by step;
        # keeping them gains 5 to 15 % of a step and steadies it.
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            trim_threshold, mmap_threshold = -1, -3
            libc.mallopt(mmap_threshold, 32 * 2**20)
            libc.mallopt(trim_threshold, 512 * 2**20)
