"""The command line: Hydra composes and expands the configuration; everything else is ours.

`hydra.main`'s task only hands the configs over, so that nothing trains inside Hydra. What the user
got wrong becomes one line on the standard error and exit code 1.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradflow import __version__
from gradflow.errors import GradflowError, SpecError
from gradflow.interrupt import Interrupt, reader_may_leave
from gradflow.spec import Execution, RunSpec

INTERRUPTED = 130
_GROUPS = ("network", "data", "record", "recipe")
_REFUSED = {
    "hydra/launcher": "gradflow launches sweeps itself; use launcher=local or launcher=slurm",
    "hydra/sweeper": "a sweep expands its overrides and no more; use -m (launcher=local, slurm)",
    "--config-path": "use --config-dir DIR, whose presets come beside gradflow's own",
    "--experimental-rerun": "nothing is kept to be run again; give the same keys",
}
_ANY = ("any",)
_OPTIONS: dict[str, tuple[str, ...]] = {
    "--multirun": (), "--run": (), "--resolve": (), "--hydra-help": (), "--shell-completion": (),
    "--cfg": ("job", "hydra", "all"), "--package": _ANY, "--config-dir": _ANY,
    "--config-name": _ANY, "--config-path": _ANY, "--experimental-rerun": _ANY,
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}  # fmt: skip
"""Hydra's options, and the values that each takes."""
_SHORT = {"-m": "--multirun", "-r": "--run", "-c": "--cfg", "-p": "--package", "-i": "--info",
          "-cd": "--config-dir", "-cn": "--config-name", "-cp": "--config-path",
          "-sc": "--shell-completion"}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m gradflow`: one run, or with -m a sweep. Returns the exit code."""
    with reader_may_leave():
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    return 0  # the reader has left


def _main(given: list[str]) -> int:
    if {"-h", "--help"} & set(given):
        from gradflow.help import text

        print(text())
        return 0
    if "--version" in given:
        print(f"gradflow {__version__}")
        return 0
    interrupt = Interrupt()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        configured = _configure(given)
        sweeping = len(configured) > 1 or "--multirun" in _split(given)[0]
        return _execute(configured, sweeping=sweeping)
    except GradflowError as error:
        print(f"gradflow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "gradflow: interrupted; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return INTERRUPTED


# --- from arguments to specs ----------------------------------------------------------------------


def _configure(arguments: list[str]) -> list[tuple[RunSpec, Execution]]:
    """Specs of all jobs the arguments describe; none where they only ask Hydra to show something.

    Raises:
        GradflowError: one line for what is wrong with them.
    """
    import hydra
    import yaml
    from hydra.errors import HydraException
    from hydra.plugins.sweeper import Sweeper
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from gradflow import config

    options, overrides = _split(arguments)
    completing = "--shell-completion" in options
    if not completing:
        _check_overrides(overrides, config.known_keys())
    config.register_schema()
    composed: list[DictConfig] = []
    task = hydra.main(
        version_base="1.3", config_path=str(config.conf_directory()), config_name="config"
    )(composed.append)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions instead of Hydra's own report and exit
    kept, validate = sys.argv, Sweeper.validate_batch_is_legal
    # Hydra shows things through logging, which would trace each line that nobody reads any more.
    told, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        with tempfile.TemporaryDirectory(prefix="gradflow-") as scratch:
            # Hydra leaves a multirun.yaml in the sweep's directory; the store is our only output.
            place = [] if completing else [f"hydra.sweep.dir={scratch}"]
            # A probe is a name without presets: no group of configuration files stands behind it.
            given = [re.sub("^probe=", "probe.name=", override) for override in overrides]
            sys.argv = [kept[0], *given, *place, *options]
            # Composes all jobs once more, for launchers that compose elsewhere: ours has only this.
            Sweeper.validate_batch_is_legal = lambda *_: None  # type: ignore[method-assign]
            task()
        return [config.specs_from(item) for item in composed]
    except (HydraException, OmegaConfBaseException) as error:
        raise SpecError(_one_line(error, config.known_keys())) from None
    except GradflowError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a file of the user's
        raise SpecError(_unreadable(error, options)) from None
    finally:
        sys.argv, Sweeper.validate_batch_is_legal = kept, validate  # type: ignore[method-assign]
        logging.raiseExceptions = told


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's options, each as one word, and the overrides, wherever either stand.

    Raises:
        SpecError: an option that there is not, or a value that it does not take.
    """
    options, overrides, rest = [], [], list(arguments)
    while rest:
        name, sign, value = rest.pop(0).partition("=")
        if not name.startswith("-"):
            overrides.append(name + sign + value)
            continue
        name = _SHORT.get(name, name)
        if name not in _OPTIONS:
            raise SpecError(f"{name}: no such option; {_nearest_option(name)}")
        allowed = _OPTIONS[name]
        if allowed and not sign and rest and (allowed == _ANY or rest[0] in allowed):
            sign, value = "=", rest.pop(0)
        if name in _REFUSED:
            raise SpecError(f"{name}: {_REFUSED[name]}")
        known = value in allowed or (allowed == _ANY and value)
        if not (known if allowed and (sign or name != "--info") else not sign):
            words = "a value" if allowed == _ANY else ", ".join(allowed) or "no value"
            raise SpecError(f"{name}{sign}{value}: wants {words}")
        options.append(name + sign + value)
    return options, overrides


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else "`--help` lists the keys"


def _nearest_option(name: str) -> str:
    """By their letters alone: two dashes make any two options of four letters alike."""
    near = difflib.get_close_matches(name.strip("-"), [known[2:] for known in _OPTIONS])
    if near:
        return f"did you mean {' or '.join(f'--{one}' for one in near)}?"
    return f"there are --help, {', '.join(name for name in _OPTIONS if name not in _REFUSED)}"


def _check_overrides(arguments: list[str], known: list[str]) -> None:
    """Refuse unknown keys with the nearest known ones, before Hydra says it in nine lines."""
    for argument in arguments:
        name, sign, value = argument.partition("=")
        key = name.lstrip("+~")
        if key in _REFUSED:
            raise SpecError(f"{argument}: {_REFUSED[key]}")
        if name.startswith("~"):
            raise SpecError(f"{argument}: a key cannot be taken away; give it a value")
        if not sign or not key:
            raise SpecError(f"{argument}: give keys as KEY=VALUE")
        if key in _GROUPS and re.search("(^|,) *(null|~)? *(,|$)", value):
            raise SpecError(f"{argument}: a name is needed here; `--help` lists them")
        if key == "record.every":
            raise SpecError(
                f"{argument}: allowed is record.every.weights=N, .outputs, .blocks, .details"
            )
        if key == "slurm":
            raise SpecError(f"{argument}: allowed is slurm.partition=NAME, slurm.time=MINUTES, …")
        free = name.startswith("+") or key.startswith(("hydra.", "hydra/", "network.args."))
        if not free and key not in known:
            raise SpecError(f"{key}: no such key; {_nearest(key, known)}")


_GLOBAL = "let the file begin with `# @package _global_`"
_NO_LIST = "a list or a word stands where lines of KEY: VALUE are wanted"


def _one_line(error: BaseException, known: list[str]) -> str:
    options = getattr(error, "options", None)
    missing = getattr(error, "missing_cfg_file", None)
    if missing is not None:
        group, sign, choice = str(missing).partition("/")
        if not sign:
            return f"--config-name {group}: neither gradflow nor --config-dir has {group}.yaml"
        names = ", ".join(options or ()) or "a file of the configuration directory"
        return f"{group}={choice}: allowed is {names}"
    override = getattr(error, "override", None)
    if override is not None:
        return f"{override}: cannot be read; half a pair of quotes or brackets, a comma too many?"
    message = str(error).strip() or type(error).__name__
    composing = re.match(r"In '(.*?)': (\w+) raised while composing config:\n(.*)", message)
    key = re.search(r"full_key: (\S+)", message)
    if composing is not None:
        file, kind, reason = composing.groups()
        if kind == "ConfigKeyError" and key is not None:
            reason = _unknown_in(file, key[1], known)
        elif re.search(r"ListConfig|Merge error", reason):
            reason = _NO_LIST
        return f"{file}.yaml: {reason}"
    primary = re.match(r"primary config '(.*?)' must be a DictConfig", message)
    if primary is not None:
        return f"{primary[1]}.yaml: {_NO_LIST}"
    reason = re.split(r"\s*\n\s*(?:full_key|object_type|reference_type)", message)[0]
    wanted = re.fullmatch(r"Interpolation key '(.*)' not found", reason)
    if wanted is not None:
        reason = f"${{{wanted[1]}}} is no key; {_nearest(wanted[1], known)}"
    place = f"{key[1]}: " if key is not None else ""
    return place + re.sub(r"\.?\s*\n\s*", "; ", reason)


def _unknown_in(file: str, key: str, known: list[str]) -> str:
    """A key of a preset that there is not, and what it should have been."""
    if key == file.partition("/")[0]:  # a group of no keys of its own, such as recipe
        return f"its keys would go below {key}; {_GLOBAL}"
    name = key.rpartition(".")[2]
    if name != key and name in known:
        return f"{key}: no such key; for {name} itself, {_GLOBAL}"
    return f"{key}: no such key; {_nearest(name, [one.rpartition('.')[2] for one in known])}"


def _unreadable(error: Exception, options: list[str]) -> str:
    """Which preset of the user's cannot be read, and why."""
    folders = [option.partition("=")[2] for option in options if option.startswith("--config-dir=")]
    if isinstance(error, RecursionError):
        return f"{', '.join(folders)}: presets there choose one another without end"
    if isinstance(error, UnicodeDecodeError):
        for path in sorted(path for folder in folders for path in Path(folder).rglob("*.yaml")):
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return f"{path}: is not text in UTF-8"
            except OSError:
                continue
    mark = getattr(error, "problem_mark", None)
    place = f"{mark.name}, line {mark.line + 1}: " if mark is not None else ""
    return f"{place}{getattr(error, 'problem', None) or ' '.join(str(error).split())}"


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
        spec.check_files()
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
    if spec.claims_beyond(spec.network.args or {}):
        from gradflow.networks import callable_of  # loads torch, to see the callable's defaults

        callable_of(spec)


def _run(spec: RunSpec, execution: Execution) -> int:
    from gradflow.captions import summary
    from gradflow.progress import Display, guarded

    last: dict[str, Any] = {}
    where = Path(execution.runs_dir) / spec.name
    try:
        with Display() as display:
            from gradflow.run import run

            draw = guarded(display)

            def emit(event: dict[str, Any]) -> None:
                last.update(event)
                draw(event)

            finished = run(spec, emit=emit, **asdict(execution))
    except KeyboardInterrupt:
        print(f"interrupted; what was recorded lies in {where}", file=sys.stderr)
        raise
    except GradflowError:
        raise
    except Exception:  # in a network of the user's, who wants to see where
        if not where.exists():
            raise
        traceback.print_exc()
        print(f"gradflow: the run failed; what was recorded lies in {where}", file=sys.stderr)
        return 1
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
