"""The documentation does what it says: its code runs, its links lead somewhere, its tables name
what is there. See `pages` for how blocks of code are run."""

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pages
import pytest
import torch
from pages import PAGES, ROOT

import gradflow
from gradflow import cli
from gradflow.recording.quantities import DETAILS
from gradflow.spec import DATA, LOGGERS, PUBLIC, RunSpec
from gradflow.spec import DETAILS as NAMES

NOT_RUN = {
    "README.md": {"tests/test_demo.py runs the demo, and `make test` would run itself"},
    "docs/questions.md": {"wants DuckDB, which is no dependency"},
    "docs/data.md": {"installs", "downloads CIFAR-10", "installs, as root"},
    "docs/tutorial.md": {"installs"},
    "docs/configuration.md": {
        "trains for minutes; what it composes is compared with its keys",
    },
    "docs/trackers.md": {"wants a server or a network; a test of its own runs it without"},
    "docs/report.md": {"over runs of the reader's; tests of their own run them"},
    "docs/recipes.md": {
        "wants data sets, and minutes to days", "wants ImageNet and trained parameters",
        "wants torchvision, timm and CIFAR-10; tests/vision runs the like",
        "of a module of the reader's; tests/vision runs the like",
    },
    "docs/howto/sweeps.md": {"wants a Slurm cluster; tests/cluster runs the like"},
}  # fmt: skip
"""What no test runs, by page: the reasons that stand there, and no others."""

RECORDING = (ROOT / "docs" / "recording.md").read_text()
DATA_PAGE = (ROOT / "docs" / "data.md").read_text()

# --- pages ----------------------------------------------------------------------------------------

BLOCKS = {page: pages.blocks(page) for page in PAGES}
CODE = {page: [block for block in BLOCKS[page] if block.kind in pages.RUN] for page in PAGES}
README = ROOT / "README.md"  # test_readme looks at what its code leaves behind
FAST = [p for p in PAGES if p != README and any(not block.mark for block in CODE[p])]
SLOW = [p for p in PAGES if any(block.mark == "slow" for block in CODE[p])]


@pytest.mark.parametrize("page", FAST, ids=pages.name)
def test_a_page_s_code_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    pages.run(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=pages.name)
def test_a_page_s_code_runs_as_a_whole(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    pages.run(page, tmp_path, slow=True)


def test_what_no_test_runs_is_known() -> None:
    found = {
        pages.name(page): {block.reason for block in CODE[page] if block.mark == "not run"}
        for page in PAGES
    }
    assert {page: reasons for page, reasons in found.items() if reasons} == NOT_RUN


def test_every_fence_is_a_block_whose_kind_is_known() -> None:
    for page in PAGES:
        fences = re.findall(r"^\s*```", page.read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(BLOCKS[page]), pages.name(page)
        assert {block.kind for block in BLOCKS[page]} <= {"python", "bash", "text", "yaml"}
        marks = re.findall(r"<!-- (?:slow|not run): ", page.read_text())
        assert len(marks) == sum(bool(block.mark) for block in BLOCKS[page])


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", pages.prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / unquote(path)).resolve() if path else page
        assert there.exists(), f"{target} in {pages.name(page)}"
        if anchor:
            assert anchor in _anchors(there), f"{target} in {pages.name(page)}"


def _anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    titles = re.findall(r"^#+ (.*)$", pages.prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, to_read = set(), [README]
    while to_read:
        page = to_read.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)\s#]+\.md)[)#]", page.read_text()):
            there = (page.parent / target).resolve()
            if there not in seen and there.exists():
                to_read.append(there)
    assert set(PAGES) <= seen


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_commands_in_the_text_are_understood(page: Path) -> None:
    """`python -m …` and `make …` inside a sentence, unless a pattern with … or CAPITALS."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in re.findall(r"`((?:python -m|make) [^`]+)`", pages.prose(page)):
        words = shlex.split(" ".join(command.split()))
        if words[0] == "make":
            assert words[1] in targets, command
            continue
        module, arguments = words[2], words[3:]
        assert importlib.util.find_spec(module) is not None, command
        pattern = "…" in command or re.search(r"\b[A-Z]{2,}\b", command)
        if module == "gradflow" and "--help" not in arguments and not pattern:
            assert cli._configure(arguments), command


# --- reference ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_that_of_the_docstrings(reference: ModuleType) -> None:
    assert reference.PAGE.read_text() == reference.page(), "stale: `make docs` writes it anew"


def test_every_public_name_is_in_it_and_has_a_docstring(reference: ModuleType) -> None:
    items = [item for _, listed in reference.SECTIONS.values() for item in listed]
    assert [item.__name__ for item in items if not inspect.getdoc(item)] == []
    shown = {id(item) for item in items}
    public = [getattr(gradflow, name) for name in gradflow.__all__]
    assert [one for one in public if not inspect.ismodule(one) and id(one) not in shown] == []
    for item in filter(inspect.isclass, items):
        for name, member in vars(item).items():
            overrides = any(hasattr(base, name) for base in item.__mro__[1:])
            if inspect.isfunction(member) and not name.startswith("_") and not overrides:
                assert member.__doc__, f"{item.__name__}.{name}"


def test_errors_that_a_public_function_raises_itself_are_in_its_docstring(
    reference: ModuleType,
) -> None:
    for _, listed in reference.SECTIONS.values():
        for item in filter(inspect.isfunction, listed):
            raised = set(re.findall(r"raise (\w+Error)\(", inspect.getsource(item)))
            told = inspect.getdoc(item) or ""
            assert [one for one in raised if one not in told] == [], item.__name__


# --- tables ---------------------------------------------------------------------------------------


def section(title: str) -> str:
    return RECORDING.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_each_row_of_the_correctness_tables_is_held_by_a_test() -> None:
    tables = section("Models") + section("Ways to train")
    rows = re.findall(r"^\|.*\| (.*) \|$", tables, re.M)
    named = [row.strip("`") for row in rows if row not in ("test",) and not row.startswith("-")]
    assert len(named) > 30
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in written] == []


def test_every_detail_is_described_and_may_be_asked_of_a_run() -> None:
    described = re.findall(r"^\| (`.*?`) \| (?:module|block) ", section("Beyond norms"), re.M)
    assert re.findall(r"`(\w+)`", " ".join(described)) == list(DETAILS)
    assert NAMES == DETAILS


def test_every_data_set_is_described_with_its_shape_and_size() -> None:
    rows = re.findall(r"^\| `(\w+)`.*? \| (.*?) \| (.*?) \|", DATA_PAGE, re.M)
    assert tuple(name for name, *_ in rows) == DATA
    described = {name: (shape, sizes) for name, shape, sizes in rows}
    for name, known in PUBLIC.items():
        shape, sizes = described[name]
        assert shape.startswith("×".join(map(str, known.shape)))
        assert sizes.startswith(f"{known.train:,} / ")


# --- trackers and configuration -------------------------------------------------------------------

TRACKERS = (ROOT / "docs" / "trackers.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def _matching(word: str) -> list[str]:
    """What a shell makes of a word."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


@pytest.mark.slow
def test_the_commands_of_trackers_do_what_they_say(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    harmless = {"tensorboard": ("-m", "tensorboard.main", "--inspect"),
                "wandb": ("-m", "wandb", "sync", "--dry-run")}  # fmt: skip
    shown = {}
    for line in commands(TRACKERS):
        program, *words = shlex.split(line)
        if program == "python":
            assert cli.main([*words[2:], "threads=1"]) == 0
            continue
        words = [name for word in words for name in _matching(word)]
        arguments = [*harmless[program], *(word for word in words if word != "sync")]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown[program] = done.stdout + done.stderr
    assert "loss/test" in shown["tensorboard"]
    assert "Would sync 4 run(s)" in shown["wandb"]
    assert "logger=" not in capsys.readouterr().err


def test_every_logger_is_described() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \| [|`]", TRACKERS, re.M)) == ("none", *LOGGERS[1:])


def test_the_presets_of_configuration_are_the_keys_that_they_set(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, block in re.findall(r"`(\S+)`:\n\n```yaml\n(.*?)```", CONFIGURATION, re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    found = [
        [spec for spec, _ in cli._configure(shlex.split(line)[3:])]
        for line in commands(CONFIGURATION)
    ]
    assert [len(specs) for specs in found] == [0, 0, 0, 0, 12, 10, 1, 4, 1]
    small = {"name": "synthetic", "size": 16, "train": 500}
    wide = RunSpec(network="mlp", width=64, depth=10, norm="none")  # type: ignore[arg-type]
    assert found[-3] == [wide.but(data=small)]
    fast = [spec.but(lr=0.3, batch_size=32) for spec in (wide, RunSpec(network="mlp", depth=10))]  # type: ignore[arg-type]
    assert found[-2] == [spec.but(depth=depth) for spec in fast for depth in (10, 20)]
    assert found[-1] == [RunSpec(depth=8, schedule="cosine", epochs=3)]
