"""Recipes compose to runs with the numbers of their sources, and say what they are."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from gradflow import cli, config
from gradflow.errors import SpecError
from gradflow.help import text
from gradflow.spec import RunSpec
from gradflow.training.module import rate

DIRECTORY = config.conf_directory() / "recipe"
RECIPES = [name for name in config.recipes() if name != "none"]
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text()
SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "step"}


def composed(*arguments: str) -> list[RunSpec]:
    return [spec for spec, _ in cli._configure(list(arguments))]


def header(name: str) -> str:
    """The comments of a recipe's file, without their marks."""
    lines = (DIRECTORY / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def commands(name: str) -> list[list[str]]:
    said = header(name).partition("Command:")[2].partition("Hardware:")[0].replace("\\\n", " ")
    lines = [shlex.split(line) for line in said.strip().splitlines()]
    return [words[3:] for words in lines if words[:3] == ["python", "-m", "gradflow"]]


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
@pytest.mark.parametrize("skip", ["none", "identity"])
def test_he2015_cifar(depth, skip):
    [spec] = composed("recipe=he2015_cifar", f"depth={depth}", f"skip={skip}")
    expected = RunSpec(
        depth=depth, skip=skip, data={"name": "cifar10", "augment": True}, batch_size=128,
        milestones=(32_000, 48_000), max_steps=64_000,
        record={"every": {"weights": 100, "outputs": 1000, "blocks": 1000}}, **SGD,
    )  # fmt: skip
    assert spec == expected
    assert spec.to_dict() == expected.to_dict()
    assert (spec.width, spec.shortcut) == (16, None if skip == "none" else "A")
    assert spec.updates(50_000) == 64_000


@pytest.mark.parametrize("depth", [110, 1202])
def test_he2015_cifar_deep_warms_up_at_a_tenth_of_the_rate(depth):
    [usual] = composed("recipe=he2015_cifar", f"depth={depth}")
    [spec] = composed("recipe=he2015_cifar_deep", f"depth={depth}")
    assert spec == usual.but(warmup=400, warmup_lr=0.01)
    assert composed("recipe=he2015_cifar_deep")[0].depth == 110
    rates = {step: 0.1 * rate(step, spec, 64_000) for step in (0, 399, 400, 31_999, 32_000, 48_000)}
    assert rates == pytest.approx(
        {0: 0.01, 399: 0.01, 400: 0.1, 31_999: 0.1, 32_000: 0.01, 48_000: 0.001}, rel=1e-12
    )


@pytest.mark.parametrize(
    ("depth", "skip"),
    [(18, "none"), (34, "none"), *((depth, "identity") for depth in (18, 34, 50, 101, 152))],
)
def test_he2015_imagenet(depth, skip):
    [spec] = composed("recipe=he2015_imagenet", "data.root=DIR", f"depth={depth}", f"skip={skip}")
    assert spec == RunSpec(
        network="imagenet", depth=depth, skip=skip, data={"name": "imagefolder", "root": "DIR"},
        batch_size=256, milestones=(150_000, 300_000, 450_000), max_steps=600_000,
        record={"every": {"weights": 100, "outputs": 1000, "blocks": 1000}}, **SGD,
    )  # fmt: skip
    assert (spec.data.size, spec.data.resize, spec.data.augment) == (224, 256, True)
    epochs = 150_000 / (1_281_167 // 256)
    assert epochs == pytest.approx(30, abs=0.03)


def test_fashion_degradation():
    [words] = commands("fashion_degradation")
    specs = composed(*[word.replace("=0,1,2,3,4", "=3") for word in words])
    data = {"name": "fashion_mnist", "size": 14, "train": 12_800, "test": 2000}
    assert specs == [
        RunSpec(
            depth=depth, skip=skip, seed=3, data=data, width=8, batch_size=128, lr=0.05, epochs=4
        )
        for depth in (20, 56)
        for skip in ("identity", "none")
    ]
    assert {spec.updates(12_800) for spec in specs} == {400}


# --- composing ------------------------------------------------------------------------------------


def test_a_recipe_changes_no_id_beyond_what_its_keys_say():
    assert composed("recipe=none") == composed() == [RunSpec()]
    assert composed("recipe=none")[0].run_id == "6bb0234d92"
    assert composed("recipe=fashion_degradation", "seed=0")[0].run_id == "5704ad40b5"


@pytest.mark.parametrize("before", [True, False])
def test_what_stands_beside_a_recipe_wins(before):
    given = ["lr=0.3", "milestones=[5]", "data=synthetic", "data.augment=null"]
    both = [*given, "recipe=he2015_cifar"] if before else ["recipe=he2015_cifar", *given]
    [spec] = composed(*both)
    assert (spec.lr, spec.milestones, spec.data.name, spec.batch_size) == (
        0.3,
        (5,),
        "synthetic",
        128,
    )


@pytest.mark.parametrize("name", ["none", "all", "default"])
def test_what_is_recorded_may_be_chosen_beside_a_recipe(name):
    [spec] = composed("recipe=he2015_cifar", f"record={name}")
    assert spec.record == RunSpec(record=name).record


def test_a_sweep_over_recipes():
    specs = composed("-m", "recipe=none,fashion_degradation", "seed=1,2")
    assert [(spec.data.name, spec.seed) for spec in specs] == [
        (name, seed) for name in ("digits", "fashion_mnist") for seed in (1, 2)
    ]


def test_a_name_that_is_none_is_refused():
    names = ", ".join(config.recipes())
    with pytest.raises(SpecError, match=f"^recipe=he2016: allowed is {names}$"):
        composed("recipe=he2016")
    for bad in ("recipe=null", "recipe=", "recipe=none,null", "network=null"):
        with pytest.raises(SpecError, match=f"^{bad}: a name is needed here"):
            composed("-m", bad)
    with pytest.raises(SpecError, match=r"^warmup_lr=0\.01: name its steps, warmup=400$"):
        composed("warmup_lr=0.01")


# --- what they say --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_header_has_its_parts_and_commands_that_compose(name):
    said = header(name)
    parts = ("Source:", "Command:", "Hardware:", "Time:", "Expected:")
    places = [said.index(f"\n{part} ") for part in parts]
    assert places == sorted(places)
    assert re.search(r"Expected: .*\d", said, re.S)
    assert commands(name)
    for words in commands(name):  # the first run of each sweep
        assert f"recipe={name}" in words
        assert composed(*[re.sub(r"(=[^,\[]*),.*", r"\1", word) for word in words])
    assert f"`recipe={name}`" in PAGE


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("he2015")])
def test_what_was_not_run_says_so(name):
    said = header(name).partition("Time:")[2]
    assert said.strip().startswith("not run here")
    assert said.strip().endswith("Not run here")


def test_help_lists_the_recipes():
    shown = text()
    assert all(f"\n    {name} " in shown for name in config.recipes())


# --- a constant warm-up in training ---------------------------------------------------------------


def test_a_constant_warm_up_reaches_the_optimizer(tmp_path):
    import gradflow

    spec = RunSpec(
        depth=8, width=4, schedule="step", milestones=(5,), lr=0.1, warmup=3, warmup_lr=0.01,
        max_steps=7, batch_size=32,
    )  # fmt: skip
    steps = gradflow.run(spec, runs_dir=str(tmp_path), threads=1).frame("steps")
    rates = [0.01] * 3 + [0.1] * 2 + [0.01] * 2
    torch.testing.assert_close(
        torch.tensor(steps["lr"].to_numpy(float)), torch.tensor(rates).double()
    )


def test_depth_1202_is_a_network():
    """19.4 million parameters, as the paper's table 6 says."""
    with torch.device("meta"):
        [spec] = composed("recipe=he2015_cifar_deep", "depth=1202")
        from gradflow.networks import _network

        network: nn.Module = _network(spec, 3, 10)
    assert sum(p.numel() for p in network.parameters()) == 19_421_274
