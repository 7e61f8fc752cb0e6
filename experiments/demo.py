"""The matched comparison on real data, whole: `make demo`, or `python -m experiments.demo`.

Plain and residual networks of depth 20, 56 and 152 (He et al. 2015, arXiv 1512.03385, §4.2) on
scikit-learn's handwritten digits, three seeds. First the gradient profile at initialisation, then
all 18 runs, two one-thread processes side by side, then the report.

Cost: about five minutes on two CPU cores. Expected: residual networks of every depth fit the
training data, the plain one of depth 152 stays near chance.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from gradflow.errors import GradflowError
from gradflow.options import Parser
from gradflow.spec import RunSpec

DEPTHS, SEEDS = (20, 56, 152), (0, 1, 2)
SPECS = tuple(
    RunSpec(depth=depth, skip=skip, seed=seed)
    for depth in DEPTHS
    for skip in ("none", "identity")
    for seed in SEEDS
)


def draw_initialisation(specs: tuple[RunSpec, ...], path: Path) -> Path:
    """Draw the first seed's gradient profiles at initialisation into `path`, in seconds."""
    import gradflow
    from gradflow import plots, report

    with tempfile.TemporaryDirectory() as store:
        for spec in specs:
            if spec.seed == SEEDS[0]:
                gradflow.run(spec.but(max_steps=0), runs_dir=store, threads=1)
        profiles = report.gather(gradflow.load_runs(store)).profiles
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.profile(profiles).savefig(path, dpi=150)
    return path


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the exit code is 1 if a run failed."""
    parser = Parser(prog="python -m experiments.demo", description=__doc__)
    parser.add_argument("--runs", default="runs", metavar="DIR", help="the store (runs)")
    parser.add_argument("--out", default="report", metavar="DIR", help="the report (report)")
    try:
        options = parser.parse_args(arguments)
        return _demo(options.runs, Path(options.out))
    except GradflowError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _demo(runs_dir: str, out: Path) -> int:
    from experiments import load
    from gradflow import load_runs, report, sweep
    from gradflow.progress import Display

    print("The gradient at initialisation, plain and residual …", flush=True)
    drawn = draw_initialisation(SPECS, out / "figures" / "initialisation.png")
    print(f"  {drawn}", flush=True)
    with Display() as display:
        result = sweep(SPECS, display=display, runs_dir=runs_dir, jobs=2, threads=1)
    runs = load_runs(runs_dir)
    page = report.write_report(runs, out, findings=load().values())
    print(report.comparison(runs))
    print(page)
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
