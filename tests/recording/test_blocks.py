"""Branch and skip of a block, against autograd by hand."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
import torch
from recorded import TOLERANCE, Block, column, near, norm, record, rms
from torch import Tensor, nn

from gradflow import Skip, build_network


def skips() -> Iterator[Any]:
    for kind in ("none", "identity", "forward_only", "backward_only", "rezero", "highway"):
        yield pytest.param(kind, {}, id=kind)
    yield pytest.param(
        "dosed", {"skip_forward": 0.5, "skip_backward": 2.0, "branch_scale": -3.0}, id="dosed"
    )
    yield pytest.param("identity", {"branch_scale": 0.0}, id="no branch")
    yield pytest.param("stochastic_depth", {"drop_rate": 0.0}, id="kept")
    yield pytest.param("stochastic_depth", {"drop_rate": 1 - 1e-9}, id="dropped")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "options"), list(skips()))
def test_blocks_against_autograd_by_hand(
    kind: str, options: dict[str, float], dtype: torch.dtype
) -> None:
    skip = Skip(kind, channels=4, **options)
    if kind == "rezero":
        nn.init.constant_(skip.beta, 0.25)
    block = Block(skip, dtype)
    network = nn.Sequential(nn.Linear(4, 4, dtype=dtype), block)
    x, upstream = torch.randn(6, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    recorder = record(network, lambda: (network(x) * upstream).sum())
    ((block_x, branch),) = block.seen
    leaves = [t.detach().requires_grad_() for t in (block_x, branch)]
    terms = skip.terms(*leaves)
    y = terms[1] if terms[0] is None else terms[1] + terms[0]
    gradients = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
    through_x, through_branch = (0.0 if g is None else norm(g) for g in gradients)
    expected = {
        "branch_rms": rms(terms[1]),
        "skip_rms": 0.0 if terms[0] is None else rms(terms[0]),
        "branch_grad_norm": through_branch,
        "skip_grad_norm": through_x,
    }
    (row,) = recorder.table("blocks").to_dict("records")
    assert row["layer"] == "1.skip"
    found = {name: row[name] for name in expected}
    assert found == near(expected, rel=TOLERANCE[dtype])

    whole = norm(upstream)
    closed = {  # what the formula says: skip's RMS over x's, gradients over the output's
        "none": (0, 1, 0),
        "identity": (1, options.get("branch_scale", 1), 1),
        "forward_only": (1, 1, 0),
        "backward_only": (0, 1, 1),
        "dosed": (0.5, 3, 2),
        "rezero": (1, 0.25, 1),
        "stochastic_depth": (1, float(options.get("drop_rate", 0) == 0), 1),
    }
    if kind in closed:
        forward, of_branch, of_skip = closed[kind]
        assert row["skip_rms"] == near(forward * rms(block_x), rel=1e-6)
        assert row["branch_grad_norm"] == near(of_branch * whole, rel=1e-6)
        assert row["skip_grad_norm"] == near(of_skip * whole, rel=1e-6)


def test_the_gradient_through_the_skip_is_that_part_alone() -> None:
    """At the block's input the two parts add up to the whole gradient."""
    block = Block(Skip(), torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    recorder = record(block, lambda: (block(x) * upstream).sum())
    through_branch = (upstream @ block.inner.weight.detach()) * (1 - torch.tanh(x.detach()) ** 2)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream + through_branch)
    (row,) = recorder.table("blocks").to_dict("records")
    assert row["skip_grad_norm"] == near(norm(upstream), rel=1e-12)
    assert row["skip_grad_norm"] != near(norm(x.grad), rel=1e-2)


def test_no_gradient_is_claimed_where_none_was_asked_for() -> None:
    """The input of the first block needs none: that is not measured, and not zero."""
    block = Block(Skip(), torch.float32)
    recorder = record(block, lambda: block(torch.randn(3, 4)).sum())
    assert column(recorder, "blocks", "skip_grad_norm") == {"skip": None}
    assert column(recorder, "blocks", "branch_grad_norm")["skip"] > 0
    block.inner.requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    recorder = record(block, lambda: block(x).sum())
    assert column(recorder, "blocks", "skip_grad_norm")["skip"] > 0


class Own(nn.Module):
    """A block that declares its terms itself: y = F(x) + x/2, F a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.conv = nn.Conv1d(3, 3, 1)
        self.gate = nn.Linear(5, 5)

    def terms(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * self.gate(x), branch

    def forward(self, x: Tensor) -> Tensor:
        skip_term, branch_term = self.terms(x, self.conv(x))
        return skip_term + branch_term


def test_a_block_may_declare_its_terms_itself() -> None:
    """Its branch keeps its kind; what its terms execute is no layer of the network's main path."""
    network = nn.Sequential(Own(), Own())
    x = torch.randn(2, 3, 5, requires_grad=True)
    recorder = record(network, lambda: network(x).square().sum())
    blocks = recorder.table("blocks").set_index("layer")
    assert list(blocks.index) == ["0", "1"]
    assert blocks.loc["0", "skip_rms"] == near(rms(0.5 * network[0].gate(x)), rel=1e-6)
    assert blocks.loc["0", "branch_rms"] == near(rms(network[0].conv(x)), rel=1e-6)
    y = network[0](x).detach().requires_grad_()
    skip_term, branch_term = network[1].terms(y, network[1].conv(y.detach()))
    (gradient,) = torch.autograd.grad((skip_term + branch_term).square().sum(), y)
    assert blocks.loc["1", "skip_grad_norm"] == near(norm(gradient), rel=1e-6)
    modules = recorder.table("modules").set_index("layer")
    assert modules["kind"].to_dict() == {
        "0.conv": "conv", "0": "block", "0.gate": "other",
        "1.conv": "conv", "1": "block", "1.gate": "other",
    }  # fmt: skip
    assert modules.loc["0", ["shape", "parameters"]].tolist() == ["1", 1]  # its own: the scale
    assert "0" in column(recorder, "weights", "weight_norm")


class Lent(nn.Module):
    """A block that uses its gate's weights without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)

    def terms(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(x, self.gate.weight), branch

    def forward(self, x: Tensor) -> Tensor:
        skip_term, branch_term = self.terms(x, self.inner(x))
        return skip_term + branch_term


def test_what_a_block_uses_without_calling_it_stands_behind_it() -> None:
    network = nn.Sequential(Lent(), Lent())
    recorder = record(network, lambda: network(torch.randn(3, 4)).sum())
    layers = ["0.inner", "0", "0.gate", "1.inner", "1", "1.gate"]
    assert recorder.table("modules")["layer"].tolist() == layers


def test_gates_are_no_layers() -> None:
    network = build_network("mlp", depth=6, width=8, in_channels=4, skip="highway")
    recorder = record(network, lambda: network(torch.randn(3, 4)).sum())
    modules = recorder.table("modules")
    gates = modules["layer"].str.endswith(".gate")
    assert gates.sum() == 4
    assert set(modules[gates]["kind"]) == {"other"}
    assert (modules["kind"] == "linear").sum() == 6


class Polynomial(nn.Module):
    """Has something of the same name that means another thing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def terms(self, degree: int) -> list[int]:
        return list(range(degree))

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.weight[i] * x**i for i in self.terms(3)), torch.zeros(()))


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.terms = nn.Embedding(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.terms(tokens)


def test_other_things_called_terms_are_left_alone() -> None:
    for network, x in ((Polynomial(), torch.randn(4)), (Dictionary(), torch.arange(3))):
        recorder = record(network, lambda network=network, x=x: network(x).sum())
        assert "block" not in recorder.table("modules")["kind"].tolist()
        assert len(recorder.table("weights")) == 1


@pytest.mark.parametrize("kind", ["none", "identity", "rezero"])
def test_a_sum_that_is_overwritten_in_place_is_measured_before(kind: str) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(4)
        network = nn.Sequential(nn.Linear(4, 4), Block(Skip(kind), torch.float32), nn.ReLU(inplace))
        if kind == "rezero":
            nn.init.constant_(network[1].skip.beta, 0.5)
        x = torch.randn(6, 4)
        recorder = record(network, lambda network=network, x=x: network(x).sum())
        found.append(recorder.table("blocks"))
    pd.testing.assert_frame_equal(*found)
    assert found[0]["branch_grad_norm"].item() > 0
