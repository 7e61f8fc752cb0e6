"""The findings, what they cost, and what the evidence says so far.

Usage:
    python -m experiments          list them
    python -m experiments ID …     run what is missing of these, and give the verdicts
    python -m experiments --all    the same of all, without what goes beyond the verdicts
    … --quick                      fewer seeds and depths; verdicts marked as such
    … --check                      exit 1 if a verdict is not the recorded one
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

import experiments
from gradflow import findings
from gradflow.errors import GradflowError
from gradflow.findings import Finding, Result, Verdict
from gradflow.options import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a run failed, or with --check a verdict is not the recorded one."""
    parser = Parser(
        prog="python -m experiments", description="Published findings, each with a verdict."
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="findings to run and judge")
    parser.add_argument("--all", action="store_true", help="all findings")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and depths")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if a verdict is not the recorded one"
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="the store (runs)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (cores)")
    try:
        options = parser.parse_args(arguments)
        known = experiments.load()
        chosen = _chosen(known, options.ids, options.all)
        if not chosen:
            print(_listing(known, options.runs, options.quick), flush=True)
            return 0
        return _run(chosen, options)
    except GradflowError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print("experiments: interrupted; the same command goes on from there", file=sys.stderr)
        return 130


def _chosen(known: dict[str, Finding], ids: list[str], every: bool) -> list[Finding]:
    for name in ids:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "without an ID they are listed"
            raise GradflowError(f"{name}: no such finding; {hint}")
    return list(known.values()) if every else [known[name] for name in dict.fromkeys(ids)]


def _listing(known: dict[str, Finding], runs: str, quick: bool) -> str:
    lines = []
    for heading, members in findings.by_chapter(known.values()).items():
        lines += [heading, ""]
        for finding in members:
            words = _judged(finding, runs, quick).words
            lines.append(f"  {finding.id}: {words}")
            lines.append(f"      {finding.claim}.")
            lines.append(f"      {finding.source}. {finding.part('Cost')}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _judged(finding: Finding, runs: str, quick: bool) -> Verdict:
    return findings.verdict(finding, findings.lookup(finding, [runs]), quick=quick)


def _run(chosen: list[Finding], options: argparse.Namespace) -> int:
    from gradflow import sweep
    from gradflow.progress import Display

    extended = not options.all
    specs = [s for f in chosen for s in f.runs(quick=options.quick, extended=extended)]
    with Display() as display:
        done = sweep(
            specs,
            display=display,
            runs_dir=options.runs,
            threads=1,
            jobs="auto" if options.jobs is None else options.jobs,
        )
    verdicts = [_judged(finding, options.runs, options.quick) for finding in chosen]
    print("\n\n".join(map(_told, verdicts)))
    print(f"\n{findings.counted(verdicts)}.\n{done.summary()}")
    others = [verdict for verdict in verdicts if not verdict.as_recorded]
    for verdict in others if options.check else ():
        finding = verdict.finding
        print(
            f"experiments: {finding.id}: {verdict.words}; recorded is {finding.recorded}",
            file=sys.stderr,
        )
    return 1 if done.failures or (options.check and others) else 0


def _told(verdict: Verdict) -> str:
    finding = verdict.finding
    lines = [f"{finding.id}: {verdict.words}", f"  {finding.claim}."]
    return "\n".join([*lines, *(f"    {_numbers(result)}" for result in verdict.results)])


def _numbers(result: Result) -> str:
    asked = result.comparison
    words = findings.measured_words(result)
    theory = "" if asked.region.theory is None else f", theory {asked.region.theory:.4g}"
    region = findings.region_words(asked.region)
    return f"{asked.name}: {words}; region {region}{theory}: {result.word}"


if __name__ == "__main__":
    sys.exit(main())
