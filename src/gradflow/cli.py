"""The command line: Hydra composes and expands the configuration; everything else is ours.

`hydra.main`'s task only hands the configs over, so that nothing trains inside Hydra. What the user
got wrong becomes one line on the standard error and exit code 1.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradflow.errors import GradflowError, SpecError
from gradflow.interrupt import Interrupt
from gradflow.spec import Execution, RunSpec

INTERRUPTED = 130
_REFUSED = {
    "hydra/launcher": "gradflow launches sweeps itself; use launcher=local or launcher=slurm",
    "hydra/sweeper": "a sweep expands its overrides and no more; use -m (launcher=local, slurm)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m gradflow`: one run, or with -m a sweep. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        from gradflow.help import text

        print(text())
        return 0
    interrupt = Interrupt()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        configured = _configure(given)
        sweeping = len(configured) > 1 or bool({"-m", "--multirun"} & set(given))
        return _execute(configured, sweeping=sweeping)
    except GradflowError as error:
        print(f"gradflow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gradflow: interrupted; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED


# --- from arguments to specs ----------------------------------------------------------------------


def _configure(arguments: list[str]) -> list[tuple[RunSpec, Execution]]:
    """Specs of all jobs the arguments describe; none where they only ask Hydra to show something.

    Raises:
        GradflowError: one line for what is wrong with them.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from gradflow import config

    _check_overrides(arguments, config.known_keys())
    config.register_schema()
    composed: list[DictConfig] = []
    task = hydra.main(
        version_base="1.3", config_path=str(config.conf_directory()), config_name="config"
    )(composed.append)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions instead of Hydra's own report and exit
    kept = sys.argv
    try:
        with tempfile.TemporaryDirectory(prefix="gradflow-") as scratch:
            # Hydra leaves a multirun.yaml in the sweep's directory; the store is our only output.
            # A probe is a name without presets: no group of configuration files stands behind it.
            given = [re.sub("^probe=", "probe.name=", argument) for argument in arguments]
            sys.argv = [kept[0], *given, f"hydra.sweep.dir={scratch}"]
            task()
        return [config.specs_from(item) for item in composed]
    except (HydraException, OmegaConfBaseException) as error:
        raise SpecError(_one_line(error)) from None
    finally:
        sys.argv = kept


def _check_overrides(arguments: list[str], known: list[str]) -> None:
    """Refuse unknown keys with the nearest known ones, before Hydra says it in nine lines."""
    takes_value = False
    for argument in arguments:
        if argument.startswith("-") or takes_value:
            takes_value = argument in ("-cd", "--config-dir", "-cn", "--config-name", "-cp",
                                       "--config-path", "-c", "--cfg", "-p", "--package",
                                       "-i", "--info")  # fmt: skip
            continue
        name, sign, _ = argument.partition("=")
        key = name.lstrip("+~")
        if key in _REFUSED:
            raise SpecError(f"{argument}: {_REFUSED[key]}")
        if name.startswith("~"):
            raise SpecError(f"{argument}: a key cannot be taken away; give it a value")
        if key == "record.every":
            raise SpecError(
                f"{argument}: allowed is record.every.weights=N, .outputs, .blocks, .details"
            )
        if key == "slurm":
            raise SpecError(f"{argument}: allowed is slurm.partition=NAME, slurm.time=MINUTES, …")
        if not sign:
            raise SpecError(f"{argument}: give keys as KEY=VALUE")
        free = name.startswith("+") or key.startswith(("hydra.", "hydra/", "network.args."))
        if not free and key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`--help` lists the keys"
            raise SpecError(f"{key}: no such key; {hint}")


def _one_line(error: BaseException) -> str:
    options = getattr(error, "options", None)
    missing = getattr(error, "missing_cfg_file", None)
    if missing is not None:
        group, _, choice = str(missing).partition("/")
        names = ", ".join(options or ()) or "a file of the configuration directory"
        return f"{group}={choice}: allowed is {names}"
    message = str(error).strip() or type(error).__name__
    return re.sub(r"\.?\s*\n\s*", "; ", message)


# --- from specs to runs ---------------------------------------------------------------------------


def _execute(configured: list[tuple[RunSpec, Execution]], *, sweeping: bool) -> int:
    if not configured:
        return 0
    specs, execution = [spec for spec, _ in configured], configured[0][1]
    for name in asdict(execution):
        values = {str(getattr(other, name)) for _, other in configured}
        if len(values) > 1:
            raise SpecError(f"{name}={','.join(sorted(values))}: one value for a whole sweep")
    _check_surroundings(specs, execution)
    if sweeping or execution.launcher != "local":
        return _sweep(specs, execution)
    return _run(specs[0], execution)


def _check_surroundings(specs: list[RunSpec], execution: Execution) -> None:
    """What can be found missing without loading torch; and what is to be fetched, first."""
    from gradflow import ranks
    from gradflow.sweep import fetch
    from gradflow.tracking import check_logger

    for spec in specs:
        spec.data.check_files()
        _check_target(spec)
        spec.check_device(execution.device)
        ranks.check(spec, execution)
    check_logger(execution.logger)

    from gradflow.store import prepare

    prepare(execution.runs_dir)
    fetch(specs)


def _check_target(spec: RunSpec) -> None:
    target = spec.network.target
    if target is None:
        return
    package = target.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise SpecError(f"network.target={target}: there is no module {package!r}")


def _run(spec: RunSpec, execution: Execution) -> int:
    from gradflow.captions import summary
    from gradflow.progress import Display, guarded

    last: dict[str, Any] = {}
    try:
        with Display() as display:
            from gradflow.run import run

            draw = guarded(display)

            def emit(event: dict[str, Any]) -> None:
                last.update(event)
                draw(event)

            finished = run(spec, emit=emit, **asdict(execution))
    except KeyboardInterrupt:
        where = Path(execution.runs_dir) / spec.name
        print(f"interrupted; what was recorded lies in {where}", file=sys.stderr)
        raise
    if last["reused"]:
        print("in the store already, not run again:")
    for line in summary(finished):
        print(line)
    return 0


def _sweep(specs: list[RunSpec], execution: Execution) -> int:
    from gradflow.progress import Display
    from gradflow.sweep import sweep

    with Display() as display:
        result = sweep(specs, display=display, **asdict(execution))
    print(result.summary())
    return 1 if result.failures else 0
