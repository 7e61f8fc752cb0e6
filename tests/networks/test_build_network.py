"""build_network: matched pairs, options, other people's networks."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradflow
from gradflow import spec
from gradflow.errors import SpecError
from gradflow.networks import build, build_network
from gradflow.spec import RunSpec

FAMILIES = {
    "cifar-A": ("cifar", {"depth": 14, "width": 4}),
    "cifar-B": ("cifar", {"depth": 14, "width": 4, "shortcut": "B"}),
    "cifar-pre-B": ("cifar", {"depth": 14, "width": 4, "shortcut": "B", "order": "pre"}),
    "cifar-bare": ("cifar", {"depth": 14, "width": 4, "norm": "none", "init": "pytorch"}),
    "basic": ("imagenet", {"depth": 18, "width": 4}),
    "bottleneck": ("imagenet", {"depth": 50, "width": 4}),
    "mlp": ("mlp", {"depth": 8, "width": 8}),
    "mlp-2": ("mlp", {"depth": 8, "width": 8, "branch_layers": 2, "order": "pre"}),
}
PLAIN_KINDS = ("identity", "forward_only", "backward_only", "stochastic_depth")


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(family: str, skip: str | bool, seed: int = 0) -> nn.Module:
    name, options = FAMILIES[family]
    features = 192 if name == "mlp" else 3
    return build_network(name, skip=skip, seed=seed, in_channels=features, **options)


def projections(family: str) -> set[str]:
    """Parameters of the shortcuts, which only an arm with skips has."""
    stages = {
        "cifar-B": (2, 3),
        "cifar-pre-B": (2, 3),
        "basic": (2, 3, 4),
        "bottleneck": (1, 2, 3, 4),
    }
    tensors = ["0.weight", *([] if "pre" in family else ["1.weight", "1.bias"])]
    return {
        f"layer{stage}.0.downsample.{tensor}"
        for stage in stages.get(family, ())
        for tensor in tensors
    }


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("kind", [*PLAIN_KINDS, "dosed", "rezero", "highway"])
def test_pairs_are_matched_bit_for_bit_and_extras_are_known(family: str, kind: str) -> None:
    name, options = FAMILIES[family]
    doses = {"skip_forward": 0.5, "skip_backward": 0.25} if kind == "dosed" else {}
    residual = build_network(
        name, skip=kind, in_channels=192 if name == "mlp" else 3, **options, **doses
    )
    plain = network(family, skip=False)
    theirs, ours = dict(residual.named_parameters()), dict(plain.named_parameters())
    for parameter, values in ours.items():
        assert torch.equal(values, theirs[parameter]), parameter
    own = {"rezero": ["beta"], "highway": ["gate.weight", "gate.bias"]}.get(kind, [])
    skips = [
        label for label, module in residual.named_modules() if isinstance(module, gradflow.Skip)
    ]
    gates = {f"{label}.{parameter}" for label in skips for parameter in own}
    assert set(theirs) - set(ours) == gates | projections(family)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_backward_only_is_plain_in_the_forward_pass(family: str) -> None:
    plain, other = network(family, "none"), network(family, "backward_only")
    assert torch.equal(plain(images()), other(images()))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_plain_and_forward_only_differ_in_the_forward_pass(family: str) -> None:
    assert not torch.allclose(network(family, "none")(images()), network(family, True)(images()))
    forward, identity = network(family, "forward_only"), network(family, "identity")
    assert torch.equal(forward(images()), identity(images()))


def test_defaults_are_those_of_the_spec() -> None:
    parameters = inspect.signature(build_network).parameters
    assert parameters["seed"].default == RunSpec().seed
    usual, spelt = build_network("cifar"), build(RunSpec(), in_channels=3, num_classes=10)
    options = {key: spec.NETWORK_KEYS["cifar"][key] for key in ("depth", "width", "norm", "init")}
    written = build_network("cifar", **options)
    for other in (spelt, written):
        for name, values in usual.state_dict().items():
            assert torch.equal(values, other.state_dict()[name])


def test_gradflow_offers_it() -> None:
    assert gradflow.build_network is build_network


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {}, "name=resnet: allowed is cifar, imagenet, mlp"),
        ("cifar", {"depth": 21}, "depth=21: allowed is 6n.2 .*nearest are 20 and 26"),
        ("cifar", {"depth": "abc"}, "depth=abc: allowed is a whole number"),
        ("imagenet", {"depth": 20}, "depth=20: allowed is one of 18, 34, 50, 101, 152"),
        ("mlp", {"depth": 1}, "depth=1: allowed is a whole number from 2"),
        ("mlp", {"depth": 7, "branch_layers": 2}, "depth=7: branches of two"),
        ("mlp", {"branch_layers": 3}, "branch_layers=3: allowed is 1, 2"),
        ("mlp", {"padding": "circular"}, "padding=circular: network=mlp does not use padding"),
        ("cifar", {"branch_layers": 1}, "branch_layers=1: network=cifar does not use"),
        ("cifar", {"lr": 0.1}, "lr=0.1: network=cifar does not use lr"),
        ("cifar", {"dept": 20}, "dept: no such key"),
        ("cifar", {"width": -3}, "width=-3: allowed is a whole number from 1"),
        ("cifar", {"skip": "idenity"}, "skip=idenity: allowed is none, identity"),
        ("cifar", {"norm": "group", "groups": 3}, "groups=3: does not divide width=16"),
        ("cifar", {"activation": "swish"}, "activation=swish: allowed is relu"),
        ("cifar", {"seed": -1}, "seed=-1: allowed is a whole number from 0"),
        ("cifar", {"in_channels": 0}, "in_channels=0: allowed is a whole number from 1"),
        ("mlp", {"num_classes": 2.5}, "num_classes=2.5: allowed is a whole number from 1"),
        ("custom", {}, "network=custom: name the callable"),
    ],
)
def test_bad_values_are_one_line(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        build_network(name, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# --- networks of others ---------------------------------------------------------------------------


def custom(target: str, seed: int = 0, **args: object) -> nn.Module:
    chosen = RunSpec(network={"target": target, "args": args}, seed=seed)  # type: ignore[arg-type]
    return build(chosen, in_channels=3, num_classes=10)


def test_custom_network_is_called_with_exactly_its_arguments() -> None:
    made = custom("torch.nn.Linear", in_features=4, out_features=3, bias=False)
    assert isinstance(made, nn.Linear)
    assert made.weight.shape == (3, 4)
    assert made.bias is None


def test_custom_network_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = custom("torch.nn.Linear", in_features=4, out_features=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = custom("torch.nn.Linear", in_features=4, out_features=3)
    other = custom("torch.nn.Linear", seed=1, in_features=4, out_features=3)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


MODULE = """
from torch import nn
number = 3
def plain(): return nn.Linear(2, 2)
def no_module(): return [1]
def fails(): raise ValueError("first line\\nsecond line")
"""


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gradflow_their_nets.number", "is a int, not a callable"),
        ("gradflow_their_nets.no_module", "returned a list, not a torch.nn.Module"),
        ("gradflow_their_nets.fails", "the call failed: ValueError: first line second line"),
        ("gradflow_their_nets.missing", "cannot be imported: AttributeError"),
        ("gradflow_no_such.net", "cannot be imported: ModuleNotFoundError"),
        ("gradflow_broken_nets.net", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_custom_targets_that_do_not_work(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gradflow_their_nets.py").write_text(MODULE)
    (tmp_path / "gradflow_broken_nets.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(custom("gradflow_their_nets.plain"), nn.Linear)
    with pytest.raises(SpecError, match=f"network.target={target}: .*{message}") as caught:
        custom(target)
    assert "\n" not in str(caught.value)


LABELLED = """
from torch import nn
def plain(): return nn.Linear(2, 2)
def deep(depth, skip=True, k=1): return nn.Linear(2, 2)
"""


@pytest.mark.parametrize(
    ("target", "args", "keys", "refused"),
    [
        ("plain", {}, {"skip": False}, None),
        ("plain", {}, {"depth": 3}, "depth=3"),
        ("plain", {}, {"skip": True}, "skip=identity"),
        ("deep", {"depth": 3}, {"depth": 3, "skip": True}, None),
        ("deep", {"depth": 3}, {"depth": 3, "skip": "identity"}, None),
        ("deep", {"depth": 3, "skip": False}, {"depth": 3, "skip": "none"}, None),
        ("deep", {"depth": 3, "skip": False}, {"skip": True}, "skip=identity"),
        ("deep", {"depth": 3}, {"depth": 6}, "depth=6"),
        ("deep", {"depth": 3}, {"skip": False}, "skip=none"),
        ("deep", {"depth": 3, "k": [1, {"n": 8}]}, {"width": 8}, None),
        ("deep", {"depth": 3}, {"width": 8}, "width=8"),
    ],
)
def test_a_custom_network_is_what_the_keys_that_name_it_say(
    target: str,
    args: dict[str, object],
    keys: dict[str, object],
    refused: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "gradflow_labelled.py").write_text(LABELLED)
    monkeypatch.syspath_prepend(tmp_path)
    target = f"gradflow_labelled.{target}"
    spec = RunSpec(network={"target": target, "args": args}, **keys)  # type: ignore[arg-type]
    if refused is None:
        assert isinstance(build(spec, in_channels=1, num_classes=2), nn.Linear)
        return
    with pytest.raises(SpecError) as caught:
        build(spec, in_channels=1, num_classes=2)
    name = refused.partition("=")[0]
    assert str(caught.value) == (
        f"{refused}: {target} is not called with it; network.args={{{name}:'${{{name}}}'}} "
        "passes it on"
    )


def test_custom_arguments_that_do_not_fit() -> None:
    with pytest.raises(SpecError, match="the call failed: TypeError"):
        custom("torch.nn.Linear", features=4)
