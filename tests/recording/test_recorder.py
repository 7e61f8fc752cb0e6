"""Closed forms, and that recording changes nothing."""

import math

import pytest
import torch
from recorded import ALWAYS, TOLERANCE, column, near, norm, record, rms
from torch import Tensor, nn

from gradflow import Recorder, Skip, build_network
from gradflow.spec import SKIPS


def chain(a: float, layers: int, width: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    linear = [nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)]
    with torch.no_grad():
        for module in linear:
            module.weight.copy_(a * torch.eye(width, dtype=dtype))
    return nn.Sequential(*linear)


@pytest.mark.parametrize("a", [0.5, 2.0])
def test_a_linear_chain_gives_powers_of_a_exactly(a: float) -> None:
    """W = aI, x = 1 of shape (2, 2), loss Σy: ∂/∂y_l is a^(L−1−l), ∂/∂W is 2·a^(L−1), all over."""
    layers = 24
    network = chain(a, layers, width=2)
    recorder = record(network, lambda: network(torch.ones(2, 2)).sum())
    output_grad = column(recorder, "outputs", "output_grad_norm")
    assert output_grad == {str(i): 2 * a ** (layers - 1 - i) for i in range(layers)}
    assert column(recorder, "outputs", "output_rms") == {
        str(i): a ** (i + 1) for i in range(layers)
    }
    weight_grad = column(recorder, "weights", "weight_grad_norm")
    assert weight_grad == {str(i): 4 * a ** (layers - 1) for i in range(layers)}
    weights = column(recorder, "weights", "weight_norm")
    assert list(weights.values()) == near([a * math.sqrt(2)] * layers, rel=1e-7)
    (steps,) = recorder.table("steps").to_dict("records")
    assert steps["loss"] == 4 * a**layers
    assert steps["grad_norm"] == near(math.sqrt(layers) * 4 * a ** (layers - 1), rel=1e-14)


@pytest.mark.parametrize("a", [0.7, 1.3])
def test_a_linear_chain_in_float64(a: float) -> None:
    layers = 50
    network = chain(a, layers, width=3, dtype=torch.float64)
    recorder = record(network, lambda: network(torch.ones(5, 3, dtype=torch.float64)).sum())
    found = column(recorder, "outputs", "output_grad_norm")
    expected = [math.sqrt(15) * a ** (layers - 1 - i) for i in range(layers)]
    assert list(found.values()) == near(expected, rel=1e-12)
    forward = column(recorder, "outputs", "output_rms")
    assert list(forward.values()) == near([a ** (i + 1) for i in range(layers)], rel=1e-12)
    weight_grad = list(column(recorder, "weights", "weight_grad_norm").values())
    assert weight_grad == near([15 * a ** (layers - 1)] * layers, rel=1e-12)


class Joined(nn.Module):
    """Two factors on ones and a skip: every kind of tensor has the values that one gives it."""

    def __init__(self, x: Tensor, branch: Tensor) -> None:
        super().__init__()
        self.first, self.second, self.skip = Factor(x), Factor(branch), Skip()

    def forward(self) -> Tensor:
        return self.skip(self.first(), self.second())


class Factor(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(values.clone())

    def forward(self) -> Tensor:
        return self.factor * torch.ones_like(self.factor)


def spread(count: int) -> Tensor:
    return 10 ** (torch.rand(count, dtype=torch.float64) * 50 - 28) * torch.randn(count).sign()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [50, 3000])
@pytest.mark.parametrize("name", ["1e-30", "1e25", "spread", "zeros"])
def test_norms_of_every_table_over_the_whole_range(
    name: str, count: int, dtype: torch.dtype
) -> None:
    """Values and gradients, of weights, outputs and both terms of a block."""
    made = {"spread": spread(count), "zeros": torch.zeros(count)}
    values = made.get(name)
    if values is None:
        values = torch.full((count,), float(name))
    values = values.to(dtype)
    network = Joined(values, values.flip(0))
    recorder = record(network, lambda: (network() * values / values.abs().max()).sum())
    assert network.first.factor.grad is not None
    gradient = norm(network.first.factor.grad)
    expected = {
        ("weights", "weight_norm"): norm(values),
        ("weights", "weight_grad_norm"): gradient,
        ("outputs", "output_rms"): rms(values),
        ("outputs", "output_grad_norm"): gradient,
        ("blocks", "branch_rms"): rms(values),
        ("blocks", "skip_rms"): rms(values),
        ("blocks", "branch_grad_norm"): gradient,
        ("blocks", "skip_grad_norm"): gradient,
    }
    for (table, quantity), value in expected.items():
        found = list(column(recorder, table, quantity).values())
        wanted = near([value] * len(found), rel=TOLERANCE[dtype], nan_ok=True)
        assert found == wanted, quantity


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_gradients_of_every_table_over_the_whole_range(scale: float) -> None:
    network = Joined(torch.ones(400), torch.ones(400))
    recorder = record(network, lambda: (network() * scale).sum())
    wanted = near([20 * scale] * 2, rel=1e-6)
    assert list(column(recorder, "weights", "weight_grad_norm").values()) == wanted
    assert list(column(recorder, "outputs", "output_grad_norm").values()) == wanted
    both = [column(recorder, "blocks", f"{term}_grad_norm")["skip"] for term in ("branch", "skip")]
    assert both == wanted
    assert recorder.table("steps")["grad_norm"].item() == near(20 * math.sqrt(2) * scale, rel=1e-6)


def test_squared_norms_over_modules_add_up_to_the_total() -> None:
    network = build_network("cifar", depth=14, width=4, norm="batch", skip="highway")
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    recorder = record(network, lambda: nn.functional.cross_entropy(network(images), labels))
    by_module = column(recorder, "weights", "weight_grad_norm")
    whole = norm(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert math.hypot(*by_module.values()) == near(whole, rel=1e-6)
    assert recorder.table("steps")["grad_norm"].item() == near(whole, rel=1e-7)
    for name, module in network.named_modules():
        own = [p.grad.flatten() for p in module.parameters(recurse=False) if p.grad is not None]
        if own:
            assert by_module.pop(name) == near(norm(torch.cat(own)), rel=1e-6), name
    assert not by_module
    assert recorder.table("modules")["parameters"].sum() == sum(
        p.numel() for p in network.parameters()
    )


# --- nothing that is measured changes what is computed --------------------------------------------


@pytest.mark.parametrize("kind", SKIPS)
def test_parameters_and_buffers_are_bitwise_those_without_a_recorder(kind: str) -> None:
    doses = {"skip_forward": 0.5, "skip_backward": 2.0} if kind == "dosed" else {}
    images, labels = torch.randn(5, 6, 3, 8, 8), torch.randint(10, (5, 6))

    def train(recorded: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        network = build_network("cifar", depth=14, width=4, skip=kind, **doses)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        recorder = Recorder(network, "all", ALWAYS, optimizer)
        if recorded:
            recorder.__enter__()
        for x, y in zip(images, labels, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            loss.backward()
            if recorded:
                recorder.step(loss)
            optimizer.step()
        if recorded:
            recorder.__exit__(None, None, None)
            for table in ("weights", "outputs", "blocks"):
                assert set(recorder.table(table)["step"]) == set(range(5))
        return network.state_dict()

    without, measured = train(False), train(True)
    assert all(torch.equal(without[name], measured[name]) for name in without)
    assert any(name.endswith("running_var") for name in without)


def test_norms_are_those_before_clipping() -> None:
    network = nn.Linear(5, 3)
    with Recorder(network) as recorder:
        loss = network(torch.randn(4, 5)).square().sum()
        loss.backward()
        before = [norm(p.grad) for p in network.parameters() if p.grad is not None]
        recorder.step(loss)
        nn.utils.clip_grad_norm_(network.parameters(), 1e-3)
    assert column(recorder, "weights", "weight_grad_norm") == {
        "Linear": near(math.hypot(*before), rel=1e-6)
    }
    assert recorder.table("steps")["grad_norm"].item() > 1
