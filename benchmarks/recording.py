"""What recording costs: a training step with a recorder over one without, beside its peers.

`python -m benchmarks.recording [TASK …] [--steps 200] [--arms ARM …] [--out DIR]`; `--details` has
an arm for each quantity beyond norms, measured alone and at every step. All arms take
their steps in one process on one thread, each on a copy of the network of its own with its own
optimizer: a round is one step of every arm, in an order drawn anew, so that none is always behind
another. All is made anew eight times, in an order drawn anew: one of two equal networks may be
slower by some per cent as long as it lives, by where its memory lies. What counts is the ratio of
an arm's step to the bare step of the same round: its median each time, of these the median with a
95 % interval, and the ratio of the means, which also has the steps that are seldom, and what
gradflow pays to empty its buffers. Tables in memory; files are `benchmarks.limits`.

A step is zero_grad, forward, loss, backward, what the arm records, and the optimizer's step. With
DIR, `recording.csv`, `recording.md` and `recording.png` are written there. A peer that is not
installed is left out, and said so. Cockpit 1.0.2 lists neither setuptools below 82 (it imports
pkg_resources, which was dropped there) nor Pillow; BackPACK lists torchvision, which would replace
torch, and does not need it here: hence `--no-deps`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from gradflow import Recorder, build_network, networks, plots
from gradflow.recording import quantities
from gradflow.recording.quantities import QUANTITIES
from gradflow.recording.schedules import Schedule, every
from gradflow.run import set_up_process
from gradflow.styles import style

STEPS, WARM_UP, TIMES = 200, 12, 8


# --- tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network with its batch: inputs and one label for each row of logits."""

    title: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    labels: int
    classes: int

    def batch(self) -> tuple[Tensor, Tensor]:
        """The same random inputs and labels for every arm and every step."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.shape, generator=generator)
        return inputs, torch.randint(0, self.classes, (self.labels,), generator=generator)


def _residual(depth: int) -> Task:
    def make() -> nn.Module:
        network = build_network("cifar", depth=depth, in_channels=1)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    return Task(f"residual, {depth} layers", make, (64, 1, 8, 8), 64, 10)


TASKS: dict[str, Task] = {
    **{str(depth): _residual(depth) for depth in (20, 56, 152)},
    "transformer": Task(
        "transformer, 12 layers",
        partial(networks.transformer, 12, 128, heads=4, seed=0),
        (8, 64, 128),
        8 * 64,
        128,
    ),
    # The worst case: the most modules for the least arithmetic.
    "mlp": Task(
        "MLP, 100 layers of 64",
        partial(
            build_network, "mlp", depth=100, width=64, in_channels=64, norm="none", skip="none"
        ),
        (64, 64),
        64,
        10,
    ),
}


# --- arms -----------------------------------------------------------------------------------------


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Recording:
    """What an arm does in each step, and what it puts off to the end: its part of a mean step."""

    step: Callable[[Tensor], Any] = _nothing
    flush: Callable[[], None] = _nothing
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


Watch = Callable[[nn.Module, torch.optim.Optimizer], contextlib.AbstractContextManager[Recording]]


@dataclass(frozen=True)
class Arm:
    """A way to record; `install` names what a peer needs."""

    watch: Watch
    content: str
    install: str = ""
    ours: bool = False


@contextlib.contextmanager
def _bare(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Recording]:
    yield Recording()


@contextlib.contextmanager
def _gradflow(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    quantities: str | tuple[str, ...] = "default",
    schedule: Schedule | dict[str, Schedule] | None = None,
    flight: int | None = None,
) -> Iterator[Recording]:
    with Recorder(network, quantities, schedule, optimizer, flight=flight) as recorder:
        yield Recording(recorder.step, recorder.flush)


@contextlib.contextmanager
def _wandb(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Recording]:
    wandb = importlib.import_module("wandb")
    with tempfile.TemporaryDirectory() as scratch:
        # Nothing but the gradients: no statistics of the machine, no console, no code.
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        run = wandb.init(mode="offline", dir=scratch, project="cost", settings=settings)
        wandb.watch(network, log="gradients", log_freq=1)
        try:
            yield Recording(lambda loss: run.log({"loss": loss.item()}))
        finally:
            wandb.unwatch(network)
            run.finish()


@contextlib.contextmanager
def _lightning(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Recording]:
    from pytorch_lightning.utilities import grad_norm

    kept: list[dict[str, float]] = []

    def step(loss: Tensor) -> None:
        kept.append({name: float(value) for name, value in grad_norm(network, 2).items()})

    yield Recording(step)


@contextlib.contextmanager
def _cockpit(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Recording]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources, which it imports, is deprecated
        module = importlib.import_module("cockpit.quantities")
    # The quantities alone: they spare what its `Cockpit` does around each backward pass.
    # UpdateSize asks for step −1 too.
    quantities = [kind(lambda step: step >= 0) for kind in (module.GradNorm, module.UpdateSize)]
    parameters, made = list(network.parameters()), iter(range(10**9))

    def step(loss: Tensor) -> None:
        number = next(made)
        for quantity in quantities:
            quantity.track(number, parameters, loss)

    yield Recording(step)


def _gradient_norms(network: nn.Module) -> dict[str, float]:
    """The loop that everybody copies."""
    named = network.named_parameters()
    return {name: p.grad.norm().item() for name, p in named if p.grad is not None}


@contextlib.contextmanager
def _snippet(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Recording]:
    kept: list[dict[str, float]] = []
    yield Recording(lambda loss: kept.append(_gradient_norms(network)))


@contextlib.contextmanager
def _snippet_outputs(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Recording]:
    """The loop, and the hooks that everybody copies, on modules with parameters of their own."""
    kept: list[dict[str, float]] = []
    seen: dict[str, float] = {}

    def forward(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        seen[f"{name}.output"] = output.norm().item()

    def backward(name: str, module: nn.Module, into: Any, out_of: tuple[Tensor, ...]) -> None:
        seen[f"{name}.gradient"] = out_of[0].norm().item()

    def step(loss: Tensor) -> None:
        kept.append(seen | _gradient_norms(network))
        seen.clear()

    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(partial(forward, name))
            module.register_full_backward_hook(partial(backward, name))
    with warnings.catch_warnings():  # the first module's input needs no gradient: so it fires
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield Recording(step)


@contextlib.contextmanager
def _hooks(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Recording]:
    """What hooks in Python cost at least, on each output and its gradient."""

    def forward(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(_nothing)

    for module in network.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(forward)
    yield Recording()


@contextlib.contextmanager
def _anomaly(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Recording]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        yield Recording(around=torch.autograd.detect_anomaly)


_WEIGHTS = ("weight_grad_norm", "weight_norm", "update_norm")

ARMS: dict[str, Arm] = {
    "none": Arm(_bare, "the bare step"),
    "gradients": Arm(
        partial(_gradflow, quantities=("weight_grad_norm",)),
        "gradient norm of each module, every step",
        ours=True,
    ),
    "default": Arm(
        _gradflow,
        "gradient norms every step; weights, outputs and blocks every tenth",
        ours=True,
    ),
    "updates": Arm(
        partial(_gradflow, quantities=("weight_grad_norm", "update_norm")),
        "gradient and update norms of each module, every step",
        ours=True,
    ),
    "weights, all": Arm(
        partial(_gradflow, quantities=_WEIGHTS, schedule=every(1)),
        "gradient, weight and update norms, every step",
        ours=True,
    ),
    "outputs": Arm(
        partial(_gradflow, schedule={"outputs": every(1)}),
        "default, but outputs and their gradients every step",
        ours=True,
    ),
    "everything": Arm(
        partial(_gradflow, quantities="all", schedule=every(1)),
        "all norms of all tables, every step",
        ours=True,
    ),
    "flight": Arm(
        partial(_gradflow, flight=16),
        "default, with a flight recorder: all its norms every step, the last 16 kept",
        ours=True,
    ),
    "empty hooks": Arm(
        _hooks, "on each output and its gradient, a hook that does nothing: the least for outputs"
    ),
    "anomaly mode": Arm(_anomaly, "torch.autograd.detect_anomaly, which names what gives NaN"),
    "snippet": Arm(_snippet, "the usual loop: gradient norm of each parameter, every step"),
    "snippet, outputs": Arm(
        _snippet_outputs, "the loop, and hooks for outputs and their gradients, every step"
    ),
    "lightning": Arm(
        _lightning,
        "grad_norm: gradient norm of each parameter, every step",
        "pip install pytorch-lightning",
    ),
    "cockpit": Arm(
        _cockpit,
        "GradNorm and UpdateSize of each parameter, every step",
        "pip install --no-deps cockpit-for-pytorch backpack-for-pytorch einops unfoldNd "
        "json-tricks 'setuptools<82'",
    ),
    "wandb": Arm(
        _wandb,
        "watch: a histogram of each parameter's gradient, every step, offline",
        "pip install wandb",
    ),
}

DETAILS = {
    name: Arm(
        partial(_gradflow, quantities=(name,), schedule=every(1)),
        f"{name} of each {'block' if QUANTITIES[name].table == 'blocks' else 'module'} alone, "
        "every step",
        ours=True,
    )
    for name in quantities.DETAILS
}
ARMS |= DETAILS


# --- measuring ------------------------------------------------------------------------------------


class _Trainee:
    """An arm's own network, optimizer and recording."""

    def __init__(self, task: Task, watch: Watch, stack: contextlib.ExitStack):
        self.network = task.network()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)
        self.recording = stack.enter_context(watch(self.network, self.optimizer))
        self._inputs, self._labels = task.batch()

    def step(self) -> float:
        """One training step; its seconds."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        with self.recording.around():
            logits = self.network(self._inputs)
            loss = functional.cross_entropy(logits.reshape(len(self._labels), -1), self._labels)
            loss.backward()
        self.recording.step(loss)
        self.optimizer.step()
        return time.perf_counter() - began

    def flush(self) -> float:
        began = time.perf_counter()
        self.recording.flush()
        return time.perf_counter() - began


def available(names: Iterable[str]) -> list[str]:
    """Those of the arms that can be had here; says of each other how to get it."""
    found = []
    for name in names:
        network = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        try:
            with ARMS[name].watch(network, optimizer):
                found.append(name)
        except ImportError as error:
            print(f"{name}: left out ({error}): {ARMS[name].install}", flush=True)
    return found


def seconds(task: Task, names: Sequence[str], steps: int = STEPS) -> dict[str, np.ndarray]:
    """Seconds of each arm's steps, [times, rounds + 1]; last, what it put off in that time."""
    times = min(TIMES, steps)
    taken = [_seconds_once(task, list(names), steps // times, seed) for seed in range(times)]
    return {name: np.array([once[name] for once in taken]) for name in names}


def _seconds_once(task: Task, order: list[str], rounds: int, seed: int) -> dict[str, list[float]]:
    shuffle = random.Random(seed).shuffle
    shuffle(order)
    with contextlib.ExitStack() as stack:
        arms = {name: _Trainee(task, ARMS[name].watch, stack) for name in order}
        for arm in arms.values():
            for _ in range(WARM_UP):
                arm.step()
            arm.flush()
        gc.collect()
        gc.freeze()  # else one arm's garbage makes another look through all that was imported
        taken: dict[str, list[float]] = {name: [] for name in order}
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                taken[name].append(arms[name].step())
        for name, arm in arms.items():
            taken[name].append(arm.flush())
        gc.unfreeze()
    return taken


def median_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """The median and its interval by order statistics, which presumes no distribution."""
    ordered = np.sort(values)
    rank = max(1, int(stats.binom.ppf((1 - level) / 2, len(ordered), 0.5)))
    return float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank])


def compare(task: str, names: Iterable[str], steps: int = STEPS) -> pd.DataFrame:
    """A row an arm: task, arm, median ratio, low, high, mean ratio, milliseconds, steps, times."""
    names = ["none", *(name for name in names if name != "none")]
    taken = seconds(TASKS[task], names, steps)
    bare = taken["none"]
    rows = []
    for name, values in taken.items():
        ratios = values[:, :-1] / bare[:, :-1]
        median, low, high = median_interval(np.median(ratios, axis=1))
        rows.append(
            {
                "task": task,
                "arm": name,
                "ratio": median,
                "low": low,
                "high": high,
                "mean_ratio": values.sum() / bare.sum(),
                "milliseconds": float(np.median(values[:, :-1])) * 1e3,
                "steps": ratios.size,
                "times": len(ratios),
            }
        )
    return pd.DataFrame(rows)


# --- what is shown --------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores, threads, versions and how busy it is: what the numbers hold for."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{model}, {os.cpu_count()} cores{load}; {torch.get_num_threads()} thread; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def markdown(frame: pd.DataFrame) -> str:
    """The table: arms by tasks, median ratio [95 % interval], ratio of the means."""
    tasks = list(dict.fromkeys(frame["task"]))
    cells = {(row.task, row.arm): _cell(row) for row in frame.itertuples()}
    lines = [["arm", *(TASKS[task].title for task in tasks)], ["---"] * (1 + len(tasks))]
    lines += [
        [arm, *(cells.get((task, arm), "") for task in tasks)]
        for arm in dict.fromkeys(frame["arm"])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Any) -> str:
    if row.arm == "none":
        return f"{row.milliseconds:.1f} ms"
    return f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]; {row.mean_ratio:.3f}"


def _words(frame: pd.DataFrame) -> str:
    arms = [f"- {arm}: {ARMS[arm].content}" for arm in dict.fromkeys(frame["arm"])]
    return (
        "A step over the bare step of the same round: median [95 % interval]; ratio of the means. "
        f"{frame['steps'].max()} rounds, with networks made anew {frame['times'].max()} times."
        f"\n\n{markdown(frame)}\n\n" + "\n".join(arms)
    )


@plots.themed
def figure(frame: pd.DataFrame, caption: str) -> Figure:
    """A panel a task, a row an arm: median ratio with its interval, and the ratio of the means."""
    tasks, arms = list(dict.fromkeys(frame["task"])), list(dict.fromkeys(frame["arm"]))
    arms.remove("none")
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (plots.WIDTH, 1.3 + rows * (0.5 + 0.17 * len(arms)))
    made = Figure(figsize=size, layout="constrained")
    axes = made.subplots(rows, columns, sharey=True, squeeze=False)
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    values = frame[["low", "high", "mean_ratio"]].to_numpy() - 1
    limits = (min(-0.01, 2 * values.min()), 4 * max(0.03, values.max()))  # room for the numbers
    for ax, task in zip(axes.flat, tasks, strict=False):
        _panel(ax, frame[frame["task"] == task].set_index("arm"), arms)
        _ratio_axis(ax, limits)
    made.supxlabel(
        f"a step over the bare step, whose time the title gives (linear up to 1.01)\n{caption}",
        fontsize=8,
    )
    handles = [
        Line2D([], [], color=style(arm)[0], marker=style(arm)[2], label=label)
        for arm, label in (("residual", "gradflow"), ("plain", "others"))
    ]
    hollow = {"color": "0.3", "linestyle": "", "marker": "|", "markersize": 8}
    handles.append(Line2D([], [], label="ratio of the means", **hollow))  # type: ignore[arg-type]
    made.legend(handles=handles, loc="outside upper center", ncols=3,
                title="What recording costs: median ratio and its 95 % interval")  # fmt: skip
    return made


def _panel(ax: Axes, part: pd.DataFrame, arms: list[str]) -> None:
    task = TASKS[str(part["task"].iloc[0])]
    ax.set_title(f"{task.title}: {part['milliseconds']['none']:.0f} ms", fontsize=8)
    overheads = part[["ratio", "low", "high", "mean_ratio"]].to_numpy(float) - 1
    known = dict(zip(part.index, overheads.tolist(), strict=True))
    for place, arm in enumerate(arms):
        if arm not in known:
            continue
        color, _, marker = style("residual" if ARMS[arm].ours else "plain")
        median, low, high, mean = known[arm]
        ax.plot([low, high], [place, place], color=color, linewidth=1.4)
        ax.plot(median, place, marker, color=color, markersize=4)
        ax.plot(mean, place, "|", color=color, markersize=8)
        words = f"{1 + median:.{3 if median < 0.1 else 2}f}"
        ax.annotate(words, (max(high, mean), place), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=6.5, color=color)  # fmt: skip
    ax.set_yticks(range(len(arms)), arms, fontsize=8)
    ax.set_ylim(len(arms) - 0.5, -0.5)


def _ratio_axis(ax: Axes, limits: tuple[float, float]) -> None:
    """Overheads, labelled as ratios: they differ by factors, and near nothing may be negative."""
    ax.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    ticks = [tick for tick in (0, 0.01, 0.1, 1, 9) if tick < limits[1]]
    ax.set_xticks(ticks, [f"{1 + tick:g}" for tick in ticks], fontsize=7)
    ax.set_xticks([0.03, 0.3, 3], minor=True)
    ax.set_xlim(*limits)
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Measure, print the table, and write it and its figure where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--steps", type=int, default=STEPS)
    usual = [name for name in ARMS if name not in DETAILS]
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=usual, metavar="ARM")
    parser.add_argument("--details", action="store_true", help="an arm for each of these instead")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if set(given.tasks) - set(TASKS):
        parser.error(f"TASK: choose from {', '.join(TASKS)}")
    set_up_process(threads=1)
    arms = ["none", *DETAILS] if given.details else given.arms
    names, parts = available(arms), []
    for task in given.tasks or TASKS:
        parts.append(compare(task, names, given.steps))
        print(f"\n{TASKS[task].title}")
        print(
            parts[-1].drop(columns=["task", "steps", "times"]).round(3).to_string(index=False),
            flush=True,
        )
    frame, here = pd.concat(parts, ignore_index=True), machine()
    print(f"\n{_words(frame)}\n\n{here}")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        frame.to_csv(given.out / "recording.csv", index=False)
        (given.out / "recording.md").write_text(f"{_words(frame)}\n\n{here}\n")
        drawn = figure(frame, here)
        drawn.dpi = 150
        FigureCanvasAgg(drawn).print_png(given.out / "recording.png")
    return frame


if __name__ == "__main__":
    main()
