"""The layer rule: which rooms may know which libraries, and each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "gradflow"
HYDRA, LIGHTNING = ("hydra", "omegaconf"), ("pytorch_lightning", "lightning")

# Room (a module or package below gradflow) -> what it must never import, at any depth.
FORBIDDEN = {
    "networks": (*HYDRA, *LIGHTNING, "wandb", "gradflow.recording"),
    "recording": (*HYDRA, *LIGHTNING, "wandb", "gradflow.networks"),
    **dict.fromkeys(
        (
            "store",
            "schema",
            "tables",
            "plots",
            "styles",
            "captions",
            "diagnosis",
            "report",
            "reading",
            "cache",
            "helpers",
            "sketches",
            "serve",
            "atlas",
            "page",
            "verdicts",
            "views",
            "findings",
            "measures",
            "errors",
            "spec",
            "seeding",
        ),
        ("torch", *LIGHTNING, *HYDRA, "wandb"),
    ),
    **dict.fromkeys(("sweep", "progress", "worker"), ("torch", *LIGHTNING, *HYDRA, "wandb")),
    **dict.fromkeys(
        ("run", "data", "vision", "folder", "augmentation", "tracking", "environment"),
        (*LIGHTNING, *HYDRA),
    ),
    "theory": ("torch", *LIGHTNING, *HYDRA, "wandb", "pandas"),
    "training": (*HYDRA, "wandb"),
    "cli": ("torch", *LIGHTNING, "wandb"),
    "config": ("torch", *LIGHTNING, "wandb"),
}
ONLY = {"hydra": {"cli", "config"}, "omegaconf": {"cli", "config"},
        "pytorch_lightning": {"training"}, "wandb": {"tracking"},
        "torch.utils.tensorboard": {"tracking"},
        "torchvision": {"vision", "folder"}}  # fmt: skip


def imports(path: Path) -> set[str]:
    """All modules a file imports anywhere, lazily or not; those under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_nothing_it_must_not_know(path):
    found = imports(path)
    for library in FORBIDDEN.get(room(path), ()):
        assert not [n for n in found if n == library or n.startswith(f"{library}.")], library
    for library, rooms in ONLY.items():
        if room(path) not in rooms:
            assert not [n for n in found if n == library or n.startswith(f"{library}.")], library


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("gradflow", ("torch", "pandas", "hydra")),
        ("gradflow.spec", ("torch", "pandas", "numpy")),
        ("gradflow.sweep", ("torch", "pytorch_lightning", "hydra")),
        ("gradflow.store", ("torch", "pandas", "pytorch_lightning", "hydra")),
        ("gradflow.diagnosis", ("torch", "pytorch_lightning", "hydra", "matplotlib")),
        ("gradflow.recording.diagnose", ("pandas", "pyarrow", "gradflow.networks")),
        ("gradflow.report", ("torch", "pytorch_lightning", "hydra")),
        ("gradflow.recording", ("pandas", "pyarrow", "pytorch_lightning", "gradflow.networks")),
        ("gradflow.theory", ("torch", "pandas", "pytorch_lightning", "hydra")),
        ("gradflow.run", ("pytorch_lightning", "hydra", "wandb")),
        ("gradflow.cli", ("torch", "hydra")),
    ],
)
def test_what_importing_a_room_loads(module, absent):
    code = f"import sys, {module}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names_resolve_lazily_and_stay_functions():
    code = (
        "import gradflow, gradflow.run, gradflow.sweep\n"
        "assert dir(gradflow) == sorted([*gradflow.__all__, '__version__'])\n"
        "found = [getattr(gradflow, name) for name in gradflow.__all__]\n"
        "modules = [gradflow.diagnosis, gradflow.networks, gradflow.probes, gradflow.theory]\n"
        "assert all(callable(one) or one in modules for one in found)\n"
        "from gradflow.run import run\n"
        "assert gradflow.run is run\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
