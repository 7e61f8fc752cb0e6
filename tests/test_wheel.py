"""The built wheel in an empty environment, used from a directory that has no checkout.

`make test-wheel`: the environment is made with pip and constraints.txt, takes 1.7 GB and about two
minutes, and is removed afterwards.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import gradflow

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).resolve().parents[1]
LOOP = """
import torch
import gradflow

model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with gradflow.Recorder(model, save="runs/loop", meta={"depth": 3}) as recorder:
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        recorder.step(loss)
        optimizer.step()
assert len(recorder.table("weights")) == 12
print(gradflow.__version__, gradflow.__file__)
"""
TINY = ("depth=8", "width=4", "batch_size=400", "epochs=1")


def call(*words: str | Path, cwd: Path, **environment: str) -> str:
    """The command's output. Nothing of the process that tests reaches it: neither path nor name."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "COV_CORE_SOURCE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=900,
        env={**kept, **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(place: Path, *packages: str | Path) -> Path:
    """Python of a new environment with these packages, and what they need, alone."""
    call(sys.executable, "-m", "venv", place, cwd=place.parent)
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    call(
        place / "bin" / "python", *pip, "-c", ROOT / "constraints.txt", *packages, cwd=place.parent
    )
    return place / "bin" / "python"


@pytest.fixture(scope="session")
def builder(tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("builder") / "venv", "hatchling")


def build(builder: Path, what: str, source: Path, target: Path) -> Path:
    """A `wheel` or `sdist` of a source tree, as any frontend has it built."""
    code = "import os, sys; from hatchling import build; os.chdir(sys.argv[1])"
    call(builder, "-c", f"{code}; build.build_{what}(sys.argv[2])", source, target, cwd=target)
    [made] = target.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="session")
def wheel(builder, tmp_path_factory) -> Path:
    return build(builder, "wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def python(wheel, tmp_path_factory) -> Iterator[Path]:
    """Python of an environment that has the wheel, what it needs, and nothing else."""
    place = tmp_path_factory.mktemp("empty") / "venv"
    yield environment(place, wheel)
    shutil.rmtree(place)


@pytest.fixture(scope="session")
def abroad(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("abroad")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def tracked(*folders: str) -> list[Path]:
    """Files of a checkout that git has, or would take."""
    listed = call("git", "ls-files", "-co", "--exclude-standard", "-z", *folders, cwd=ROOT)
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


# --- what is in it --------------------------------------------------------------------------------


def test_the_wheel_has_every_file_of_the_package_and_of_conf_and_nothing_else(wheel):
    expected = {
        path.relative_to("src").as_posix(): (ROOT / path).read_bytes()
        for path in tracked("src/gradflow")
    }
    expected |= {
        f"gradflow/{path.as_posix()}": (ROOT / path).read_bytes() for path in tracked("conf")
    }
    found = contents(wheel)
    inside = {name: data for name, data in found.items() if name.startswith("gradflow/")}
    assert inside == expected
    assert {"gradflow/py.typed", "gradflow/conf/config.yaml"} <= set(inside)
    others = {Path(name).name for name in set(found) - set(inside)}
    assert others == {"METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt"}


def metadata(wheel: Path) -> Message:
    [text] = [data for name, data in contents(wheel).items() if name.endswith("/METADATA")]
    return Parser().parsestr(text.decode())


def test_its_metadata_are_the_projects(wheel):
    found = metadata(wheel)
    assert found["Name"] == "gradflow-harness"
    assert found["Version"] == gradflow.__version__
    assert found["License-Expression"] == "MIT"
    assert found["License-File"] == "LICENSE"
    assert found["Requires-Python"] == "<3.14,>=3.11"
    extras = found.get_all("Provides-Extra")
    assert sorted(extras) == ["dev", "slurm", "tensorboard", "vision", "wandb"]
    assert found.get_payload().startswith("# ")


def test_the_source_distribution_builds_the_same_wheel(builder, wheel, tmp_path):
    with tarfile.open(build(builder, "sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = (path for path in tmp_path.iterdir() if path.is_dir())
    again = build(builder, "wheel", unpacked, tmp_path)
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


# --- what it does ---------------------------------------------------------------------------------


def test_the_environment_has_what_the_wheel_asks_for_and_no_checkout(python, abroad):
    assert call(python, "-m", "pip", "check", cwd=abroad).startswith("No broken requirements")
    names = call(python, "-m", "pip", "list", "--format=freeze", cwd=abroad).splitlines()
    installed = {line.partition("=")[0].lower() for line in names}
    assert "gradflow-harness" in installed
    assert not installed & {
        "pytest",
        "wandb",
        "tensorboard",
        "submitit",
        "torchvision",
        "hatchling",
    }
    where = call(python, "-c", "import gradflow; print(gradflow.__file__)", cwd=abroad)
    assert where.startswith(str(python.parents[1]))


def test_help_version_and_presets(python, abroad):
    command = python.parent / "gradflow"
    assert call(command, "--version", cwd=abroad) == f"gradflow {gradflow.__version__}\n"
    assert call(python, "-m", "gradflow", "--help", cwd=abroad) == call(
        command, "--help", cwd=abroad
    )
    for path in tracked("conf"):
        group, name = path.parent.name, path.stem
        if group not in ("network", "data", "record"):
            continue
        shown = call(command, "--cfg", "job", "-p", group, f"{group}={name}", cwd=abroad)
        builds_on = re.search(r"^name: \w+$", (ROOT / path).read_text(), re.M)
        assert builds_on is not None
        assert f"{builds_on[0]}\n" in shown
    assert "hydra_bash_completion gradflow" in call(command, "-sc", "install=bash", cwd=abroad)


def test_a_run_a_sweep_and_a_report(python, abroad):
    said = call(python, "-m", "gradflow", *TINY, "logger=csv", cwd=abroad)
    assert "done: 3 updates" in said
    sweep = ("-m", "gradflow", "-m", *TINY, "skip=true,false", "seed=1", "jobs=2")
    assert "2 runs: 2 done." in call(python, *sweep, cwd=abroad)
    assert call(python, "-c", LOOP, cwd=abroad).startswith(f"{gradflow.__version__} ")
    call(python, "-m", "gradflow.report", "runs", cwd=abroad)
    assert (abroad / "report" / "index.html").stat().st_size > 10_000
    assert sorted(path.name for path in abroad.iterdir()) == ["report", "runs"]
    assert len(list((abroad / "runs").glob("*/run.json"))) == 4


@pytest.mark.parametrize("extra", ["wandb", "tensorboard"])
def test_what_an_extra_brings_is_asked_for_by_its_name(python, abroad, extra):
    done = subprocess.run(
        [python, "-m", "gradflow", *TINY, f"logger={extra}"],
        cwd=abroad,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"pip install 'gradflow-harness[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1
