"""Probes against closed forms, by hand, and against slow versions of themselves."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from recorded import near
from torch import Generator, Tensor, nn
from torch.nn import functional

from gradflow import Recorder, Skip, build_network
from gradflow.errors import GradflowError, SpecError
from gradflow.recording import probes
from gradflow.recording.modules import block_owners
from gradflow.recording.probes import Reading

F64 = torch.float64


class Block(nn.Module):
    """y = skip(x, branch(x))."""

    def __init__(self, branch: nn.Module, skip: Skip | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.skip = skip or Skip("identity")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.skip(x, self.branch(x))
        return y


class Own(nn.Module):
    """A block that declares its terms itself, and makes its own branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(1))

    def terms(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.gain * branch

    def forward(self, x: Tensor) -> Tensor:
        skip_term, branch_term = self.terms(x, self.inner(x))
        return branch_term + skip_term


def linear(weight: Tensor | Sequence[Sequence[float]], bias: float | None = None) -> nn.Linear:
    """A map by that matrix, in float64."""
    matrix = torch.as_tensor(weight, dtype=F64)
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, dtype=F64)
    layer.weight.data.copy_(matrix)
    if bias is not None:
        layer.bias.data.fill_(bias)
    return layer


def scalars(factors: Sequence[float], skip: str = "identity") -> nn.Sequential:
    """Blocks x + a·x of one feature."""
    return nn.Sequential(*(Block(linear([[a]]), Skip(skip)) for a in factors))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=F64)


def by_layer(readings: list[Reading]) -> dict[str | None, float]:
    return {reading.layer: reading.value for reading in readings}


def values(readings: list[Reading], probe: str) -> list[float]:
    return [reading.value for reading in readings if reading.probe == probe]


# --- the model is left as it was ------------------------------------------------------------------


def noisy_network() -> nn.Sequential:
    """Of all that a pass could change: running statistics, draws, modes of its parts, `.grad`."""
    torch.manual_seed(1)
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    frozen = nn.BatchNorm2d(4).eval()
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        frozen,
        nn.Dropout(0.3),
        Block(branch, Skip("stochastic_depth", drop_rate=0.3)),
        Block(nn.Identity(), Skip("highway", channels=4)),
        nn.Flatten(2),
    )
    network(torch.randn(5, 3, 4, 4)).square().sum().backward()
    return network


BATCH = torch.randn(6, 3, 4, 4, generator=Generator().manual_seed(2))

RUNS: dict[str, Callable[[nn.Module], object]] = {
    "batch_variance": lambda m: probes.batch_variance(m, BATCH),
    "layer_std": lambda m: probes.layer_std(m, BATCH),
    "cosine_map": lambda m: probes.cosine_map(m, *probes.pairs_at(BATCH, 0.5)),
    "token_cosine": lambda m: probes.token_cosine(nn.Sequential(m, Tokens()), BATCH),
    "jacobian_spectrum": lambda m: probes.jacobian_spectrum(m, BATCH[:1]),
    "jacobian_moments": lambda m: probes.jacobian_moments(m, BATCH, seed=0, vectors=2),
    "shattering": lambda m: probes.shattering(m, points=16, shape=(3, 4, 4)),
    "path_length": lambda m: probes.path_length(m, BATCH, seed=0),
    "underflow_depth": lambda m: probes.underflow_depth(m, BATCH, torch.bfloat16, seed=0),
    "displacement": lambda m: probes.displacement(m, copy.deepcopy(m)),
    "lesion": lambda m: probes.lesion(m, lambda: m(BATCH).mean().item(), BATCH, seed=0, draws=1),
}


def network_for(name: str) -> nn.Module:
    """In training mode, but for the batch norms where it is about Jacobians."""
    network = noisy_network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and name.startswith("jacobian"):
            module.eval()
    return network


class Tokens(nn.Module):
    """A block with outputs (N, tokens, width), of no effect."""

    def terms(self, x: Tensor, branch: Tensor) -> tuple[None, Tensor]:
        return None, branch

    def forward(self, x: Tensor) -> Tensor:
        return self.terms(x, x)[1]


def all_of(network: nn.Module) -> list[object]:
    """Everything about a model that a probe must not change, tensors by identity and by value."""
    tensors = [*network.parameters(), *network.buffers()]
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    return [
        [id(t) for t in (*tensors, *gradients)],
        [t.dtype for t in tensors],
        [p.requires_grad for p in network.parameters()],
        [m.training for m in network.modules()],
        hooks,
        ["terms" in vars(m) for m in network.modules()],
        torch.cat([t.detach().double().flatten() for t in (*tensors, *gradients)]).tolist(),
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("name", RUNS)
def test_the_model_is_left_as_it_was(name: str) -> None:
    network = network_for(name)
    before = all_of(network)
    run = RUNS[name]
    first = run(network)
    assert all_of(network) == before
    assert run(network) == first  # and so the second time reads the same
    with torch.no_grad():
        assert run(network) == first
    assert BATCH.grad is None
    assert not BATCH.requires_grad


@pytest.mark.parametrize("name", [name for name in RUNS if name != "displacement"])
def test_it_is_left_as_it_was_by_passes_that_fail(name: str) -> None:
    network = network_for(name)

    def fail(*_: object) -> None:
        raise RuntimeError("mid-way")

    network[5].register_forward_hook(fail)
    before = all_of(network)
    with pytest.raises(RuntimeError, match="mid-way"):
        RUNS[name](network)
    assert all_of(network) == before


def test_a_paused_recorder_sees_nothing() -> None:
    network = network_for("jacobian")
    with Recorder(network) as recorder:
        with recorder.paused():
            for run in RUNS.values():
                run(network)
        recorder.step()
    assert recorder.table("outputs").empty


# --- a random linear readout ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_propagate_is_the_backward_pass_of_a_random_linear_readout(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(5, 3, dtype=dtype)
    r = torch.randn(5, 2, generator=Generator().manual_seed(7)).to(dtype)
    expected = torch.autograd.grad((network(x) * r).sum(), list(network.parameters()))
    state = torch.get_rng_state()
    probes.propagate(network, x, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=0)


# --- signals --------------------------------------------------------------------------------------


class Backwards(nn.Module):
    """Registered in another order than executed; one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last = linear([[1.0, -2.0]])
        self.norm = nn.LayerNorm(2, elementwise_affine=False)
        self.twice = linear([[2.0, 0.0], [1.0, 1.0]])
        self.skip = Skip("identity")

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(x, torch.relu(self.twice(x)))
        y: Tensor = self.last(self.norm(self.twice(x)))
        return y


def test_batch_variance_and_std_by_hand() -> None:
    network, x = Backwards(), drawn(5, 2)
    outputs: dict[str, list[Tensor]] = {"twice": [network.twice(x)]}
    joined = x + torch.relu(outputs["twice"][0])
    outputs["twice"].append(network.twice(joined))
    normed = functional.layer_norm(outputs["twice"][1], (2,))
    outputs |= {"skip": [joined], "norm": [normed], "last": [network.last(normed)]}

    def variance(y: Tensor) -> float:
        """Unit by unit, in plain Python."""
        units = y.T.tolist()
        means = [sum(unit) / len(unit) for unit in units]
        spreads = [
            sum((v - m) ** 2 for v in unit) / len(unit)
            for unit, m in zip(units, means, strict=True)
        ]
        return sum(spreads) / len(spreads)

    readings = probes.batch_variance(network, x)
    assert [r.layer for r in readings] == ["twice", "skip", "norm", "last"]
    assert {r.probe for r in readings} == {"batch_variance"}
    expected = {name: float(np.mean([variance(y) for y in ys])) for name, ys in outputs.items()}
    assert by_layer(readings) == near(expected, rel=1e-12)
    readings = probes.layer_std(network, x)
    expected = {n: float(np.mean([np.std(y.tolist()) for y in ys])) for n, ys in outputs.items()}
    assert by_layer(readings) == near(expected, rel=1e-12)
    assert {r.probe for r in readings} == {"response_std"}


def test_batch_variance_takes_every_place_of_a_map_for_itself() -> None:
    """A picture that differs from place to place, and not from input to input, has none."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(3.0)
    same = torch.randn(1, 1, 4, 4).expand(5, 1, 4, 4)
    assert probes.batch_variance(conv, same)[0].value == 0
    assert probes.layer_std(conv, same)[0].value > 0
    offsets = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    (reading,) = probes.batch_variance(conv, same[:2] + offsets)
    assert (reading.layer, reading.value) == ("Conv2d", near(9.0, rel=1e-5))


def test_batch_variance_grows_by_one_a_block_where_norms_end_the_branches() -> None:
    """De & Smith 2020: Var x_l = l + 1."""
    branches = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)) for _ in range(8)]
    network = nn.Sequential(nn.BatchNorm1d(64), *map(Block, branches)).double()
    found = by_layer(probes.batch_variance(network, drawn(512, 64)))
    grown = [found["0"], *(found[f"{k + 1}.skip"] for k in range(8))]
    assert grown == near([float(k + 1) for k in range(9)], rel=0.1)


def test_what_is_not_finite_is_read_as_it_is() -> None:
    network = nn.Sequential(linear([[1e300]]), linear([[1e300]]), nn.Linear(1, 1).double())
    found = list(by_layer(probes.batch_variance(network, drawn(4, 1))).values())
    assert found[0] == math.inf
    assert math.isnan(found[2])


@pytest.mark.parametrize("cosine", [-1.0, -0.3, 0.0, 0.9, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (F64, 1e-14)])
def test_pairs_have_that_cosine_and_equal_norms(
    cosine: float, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = drawn(7, 3, 2, 2).to(dtype)
    first, second = probes.pairs_at(inputs, cosine)
    assert torch.equal(first, inputs[:3])
    assert (second.shape, second.dtype) == (first.shape, dtype)
    a, b = (t.double().flatten(1) for t in (first, second))
    lengths = a.norm(dim=1) * b.norm(dim=1)
    torch.testing.assert_close(
        (a * b).sum(dim=1) / lengths, torch.full((3,), cosine, dtype=F64), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=tolerance, atol=0)
    across = inputs[3:6].double().flatten(1)  # in its plane, on its side
    across = across - (across * a).sum(1, keepdim=True) / a.square().sum(1, keepdim=True) * a
    leaning = (across * b).sum(dim=1) / (across.norm(dim=1) * b.norm(dim=1))
    sine = torch.full((3,), (1 - cosine**2) ** 0.5, dtype=F64)
    torch.testing.assert_close(leaning, sine, rtol=0, atol=10 * tolerance)


def test_pairs_that_cannot_be() -> None:
    with pytest.raises(SpecError, match="cosine=2: allowed is -1 to 1"):
        probes.pairs_at(drawn(4, 2), 2)
    with pytest.raises(SpecError, match="inputs: 1 make no pair"):
        probes.pairs_at(drawn(1, 2), 0.5)


def test_cosines_by_hand_both_halves_in_one_batch() -> None:
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)]
    network = nn.Sequential(*layers).double()
    first, second = drawn(3, 6), drawn(3, 6, seed=1)
    expected, y = {}, torch.cat([first, second])
    for place, layer in enumerate(network):
        y = layer(y)
        pairs = functional.cosine_similarity(y[:3], y[3:], dim=1)
        expected[str(place)] = pairs.mean().item()
    del expected["2"]  # the activation is none of the layers
    readings = probes.cosine_map(network, first, second)
    assert by_layer(readings) == near(expected, rel=1e-9)
    assert {r.probe for r in readings} == {"cosine"}
    zero = nn.Linear(6, 2, bias=False)
    nn.init.zeros_(zero.weight)
    assert math.isnan(probes.cosine_map(zero, first.float(), second.float())[0].value)


def test_relu_takes_orthogonal_inputs_to_a_cosine_of_one_over_pi() -> None:
    """Theory's c ↦ [√(1 − c²) + (π − arccos c)·c]/π, at 0 and at its value there."""
    network = build_network(
        "mlp", depth=4, width=1500, skip=False, norm="none", in_channels=1500, num_classes=2
    )
    pairs = probes.pairs_at(torch.randn(40, 1500), 0.0)
    found = by_layer(probes.cosine_map(network, *pairs))

    def relu(c: float) -> float:
        return (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi

    measured = [found[f"layers.{k}"] for k in range(3)]
    assert measured == pytest.approx([0, relu(0), relu(relu(0))], abs=0.05)
    assert relu(0) == pytest.approx(1 / math.pi)


def test_token_cosine_against_a_loop_over_pairs() -> None:
    network = nn.Sequential(Block(nn.Linear(5, 5).double()), nn.Linear(5, 5).double(), Own(5))
    network.double()
    x = drawn(3, 4, 5)
    y = network[0](x)
    z = network(x)

    def slow(tokens: Tensor) -> float:
        found = [
            functional.cosine_similarity(sample[i], sample[j], dim=0).item()
            for sample in tokens
            for i, j in itertools.permutations(range(4), 2)
        ]
        return sum(found) / len(found)

    readings = probes.token_cosine(network, x)
    assert [r.layer for r in readings] == ["0.skip", "2"]
    assert by_layer(readings) == near({"0.skip": slow(y), "2": slow(z)}, rel=1e-9)


def test_token_cosine_of_equal_and_of_orthogonal_tokens() -> None:
    block = Block(nn.Identity())
    equal = drawn(2, 1, 6).expand(2, 3, 6)
    (reading,) = probes.token_cosine(block, equal)
    assert (reading.layer, reading.value) == ("skip", near(1.0, rel=1e-12))
    orthogonal = torch.eye(4, dtype=F64).expand(2, 4, 4)
    assert probes.token_cosine(block, orthogonal)[0].value == pytest.approx(0, abs=1e-15)
    with pytest.raises(GradflowError, match="no block has an output of shape"):
        probes.token_cosine(block, drawn(3, 4))


# --- Jacobians ------------------------------------------------------------------------------------


def test_spectrum_of_a_product_of_matrices() -> None:
    """More outputs than one backward pass takes, fewer than inputs, and each input alike."""
    matrices = [drawn(170, 180, seed=1), drawn(160, 170, seed=2), drawn(150, 160, seed=3)]
    network = nn.Sequential(*map(linear, matrices))
    product = matrices[2] @ matrices[1] @ matrices[0]
    squares = torch.linalg.svdvals(product).square()
    readings = probes.jacobian_spectrum(network, drawn(2, 180))
    spectrum = [r for r in readings if r.probe == "jacobian_squared_singular_value"]
    assert [(r.x_name, r.x) for r in spectrum] == [("index", float(i)) for i in range(300)]
    assert [r.value for r in spectrum] == near(squares.tolist() * 2, rel=1e-9)
    assert [(r.x_name, r.x) for r in readings[300:]] == [("input", 0.0), ("input", 1.0)] * 2
    means, spreads = (
        values(readings, f"jacobian_{name}")
        for name in ("mean_squared_singular_value", "spectrum_variance")
    )
    assert means == near([squares.mean().item()] * 2, rel=1e-9)
    spread = ((squares - squares.mean()) ** 2).mean() / squares.mean() ** 2
    assert spreads == near([spread.item()] * 2, rel=1e-9)
    assert probes.spectrum_variance(squares.numpy()) == near(spread.item(), rel=1e-12)
    assert probes.spectrum_variance([1, 3]) == 0.25


def test_spectrum_of_a_nonlinear_network_against_autograd_by_rows() -> None:
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Block(nn.Conv2d(3, 3, 1), Skip("forward_only")),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 7),
    ).double()
    network.eval()
    inputs = drawn(2, 2, 4, 4)
    expected: list[float] = []
    for x in inputs:
        matrix = torch.autograd.functional.jacobian(lambda x: network(x[None])[0], x)
        expected += torch.linalg.svdvals(matrix.reshape(7, 32)).square().tolist()
    found = values(probes.jacobian_spectrum(network, inputs), "jacobian_squared_singular_value")
    # LayerNorm after ReLU's zeros leaves some of them zero.
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-20)


def test_orthogonal_layers_have_one_singular_value() -> None:
    layers = [linear(torch.linalg.qr(drawn(12, 12, seed=k))[0]) for k in range(20)]
    readings = probes.jacobian_spectrum(nn.Sequential(*layers), drawn(1, 12))
    assert values(readings, "jacobian_squared_singular_value") == near([1.0] * 12, rel=1e-13)
    assert values(readings, "jacobian_spectrum_variance") == pytest.approx([0], abs=1e-25)
    # By random signs it is exact too, for any number of them.
    readings = probes.jacobian_moments(nn.Sequential(*layers), drawn(1, 12), seed=0, vectors=1)
    assert [r.value for r in readings] == pytest.approx([1.0, 0.0], abs=1e-12)


def test_a_jacobian_that_is_not_finite_has_no_spectrum() -> None:
    network = nn.Sequential(linear([[1e300]]), linear([[1e300]]))
    readings = probes.jacobian_spectrum(network, drawn(1, 1))
    assert len(readings) == 3
    assert all(math.isnan(reading.value) for reading in readings)


@pytest.mark.parametrize("shape", [(20, 30, 25), (25, 30, 20)])
def test_moments_by_random_vectors_meet_those_of_the_spectrum(shape: tuple[int, ...]) -> None:
    """Over inputs whose ReLUs differ, for Jacobians wide and high."""
    first, second = (linear(drawn(b, a, seed=a) / a**0.5) for a, b in itertools.pairwise(shape))
    network = nn.Sequential(first, nn.ReLU(), second)
    inputs = drawn(3, shape[0])
    exact = probes.jacobian_spectrum(network, inputs)[-6:]
    found = probes.jacobian_moments(network, inputs, seed=0, vectors=4000)
    assert [(r.probe, r.x_name, r.x) for r in found] == [(r.probe, r.x_name, r.x) for r in exact]
    assert [r.value for r in found] == near([r.value for r in exact], rel=0.05)
    assert found != probes.jacobian_moments(network, inputs, seed=1, vectors=4000)


def test_moments_are_jv_and_its_way_back_exactly() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    x = drawn(1, 4)
    signs = torch.randint(2, (3, 4), generator=Generator().manual_seed(5)).double() * 2 - 1
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x[None])[0], x[0])
    second = np.mean([(jacobian @ v).square().sum().item() for v in signs]) / 4
    fourth = np.mean([(jacobian.T @ jacobian @ v).square().sum().item() for v in signs]) / 4
    readings = probes.jacobian_moments(network, x, seed=5, vectors=3)
    assert [r.value for r in readings] == near([second, fourth / second**2 - 1], rel=1e-9)


@pytest.mark.parametrize("probe", ["spectrum", "moments"])
def test_a_jacobian_with_the_statistics_of_a_batch_is_refused(probe: str) -> None:
    """In evaluation mode it is diag(γ/√(σ² + ε)), γ = 3 and σ² = 4."""
    norm = nn.BatchNorm1d(5, eps=0.0, dtype=F64)
    norm.weight.data.fill_(3)
    norm.running_var.fill_(4)  # type: ignore[union-attr]
    network = nn.Sequential(nn.Identity(), nn.Sequential(norm), nn.BatchNorm1d(5, eps=0.0).double())

    def run(model: nn.Module) -> list[Reading]:
        if probe == "spectrum":
            return probes.jacobian_spectrum(model, drawn(2, 5))
        return probes.jacobian_moments(model, drawn(2, 5), seed=0, vectors=2)

    network.eval()
    assert values(run(network), "jacobian_mean_squared_singular_value") == near([9 / 4] * 2)
    network[2].train()
    with pytest.raises(GradflowError, match=r"^2: a Jacobian needs batch norm in evaluation mode"):
        run(network)
    network.train()
    with pytest.raises(GradflowError, match=r"^1\.0: a Jacobian needs"):
        run(network)
    with pytest.raises(GradflowError, match=r"^BatchNorm1d: .* with running statistics$"):
        run(nn.BatchNorm1d(5, track_running_stats=False).eval())


# --- shattering -----------------------------------------------------------------------------------


class Slopes(nn.Module):
    """One output whose derivative at the k-th point is the k-th of these; a second one, ignored."""

    def __init__(self, slopes: Sequence[float]) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor(slopes, dtype=F64))

    def forward(self, t: Tensor) -> Tensor:
        return torch.cat([self.slopes[:, None].detach() * t, t**3], dim=1)


def test_autocorrelation_by_hand() -> None:
    def found(*slopes: float, lags: int = 15) -> list[float]:
        readings = probes.shattering(Slopes(slopes), points=len(slopes), lags=lags)
        assert [(r.x_name, r.x) for r in readings] == [
            ("lag", float(k)) for k in range(1, len(readings) + 1)
        ]
        return [r.value for r in readings]

    assert found(1, -1, 1, -1) == near([-3 / 4, 2 / 4, -1 / 4], rel=1e-12)
    assert found(5, 5, 7, 7) == near([1 / 4, -2 / 4, -1 / 4], rel=1e-12)  # the mean is taken off
    assert found(5, 5, 7, 7, lags=1) == near([1 / 4], rel=1e-12)
    assert all(math.isnan(value) for value in found(3, 3, 3, 3))
    assert math.isnan(found(1, math.inf, 1)[0])
    assert found(1, 1 + 1e-6, 1, 1 + 1e-6)[0] == near(-3 / 4, rel=1e-6)
    assert math.isnan(found(1, 1 + 1e-9, 1, 1 + 1e-9)[0])  # no more than rounding


def test_white_noise_has_no_autocorrelation_and_a_line_no_gradient_to_correlate() -> None:
    noise = drawn(4096).tolist()
    readings = probes.shattering(Slopes(noise), points=4096)
    assert len(readings) == 15
    assert all(abs(r.value) < 4 / 4096**0.5 for r in readings)
    deep = nn.Sequential(nn.Linear(1, 50), nn.Linear(50, 50), nn.Linear(50, 1))
    assert all(math.isnan(r.value) for r in probes.shattering(deep))


def test_the_line_of_inputs_goes_through_as_one_batch() -> None:
    """The gradient of Σy in each point, over batch statistics, against a Jacobian of all points."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)
    ).double()
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    readings = probes.shattering(network, points=40, extent=3.0, lags=4, shape=(2, 3), seed=8)
    (inputs,) = seen
    t = np.linspace(-3, 3, 40)
    direction = inputs[-1] / 3
    assert direction.square().mean().item() == near(1.0, rel=1e-6)
    torch.testing.assert_close(inputs, torch.as_tensor(t).view(-1, 1, 1) * direction)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x)[:, 0], inputs)
    slopes = (jacobian.sum(dim=0) * direction).sum(dim=(1, 2)).numpy()
    centred = slopes - slopes.mean()
    expected = [
        float(sum(centred[i] * centred[i + lag] for i in range(40 - lag)) / sum(centred**2))
        for lag in range(1, 5)
    ]
    assert [r.value for r in readings] == near(expected, rel=1e-9)
    assert readings != probes.shattering(
        network, points=40, extent=3.0, lags=4, shape=(2, 3), seed=9
    )


def test_plain_networks_with_batch_norm_shatter_with_depth() -> None:
    """Balduzzi et al. 2017, Fig. 1: smooth at one layer, noise at many; residual ones between."""

    def at_lag_one(depth: int, skip: bool, scale: float = 1.0) -> float:
        network = build_network(
            "mlp", depth=depth, width=100, skip=skip, branch_scale=scale, norm="batch",
            in_channels=1, num_classes=1,
        )  # fmt: skip
        return probes.shattering(network)[0].value

    assert at_lag_one(2, False) > 0.9
    assert abs(at_lag_one(40, False)) < 0.3
    assert at_lag_one(40, True, 0.1) > 0.7


# --- paths of the gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "identity", "forward_only", "rezero"])
def test_scaling_the_gradient_of_branches_leaves_their_values(kind: str) -> None:
    block = Block(nn.Linear(3, 3), Skip(kind)).double()
    if kind == "rezero":
        nn.init.constant_(block.skip.beta, 0.5)
    x, upstream = drawn(4, 3), drawn(4, 3, seed=1)
    plain = torch.autograd.grad((block(x) * upstream).sum(), block.branch.parameters())
    y = block(x)
    with probes.scaled_branch_gradient(block, 0.25):
        scaled = block(x)
        found = torch.autograd.grad((scaled * upstream).sum(), block.branch.parameters())
    assert torch.equal(scaled, y)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, 0.25 * theirs)
    assert "terms" not in vars(block.skip)


def path_length(network: nn.Module, inputs: Tensor, **options: float) -> float:
    (reading,) = probes.path_length(network, inputs, seed=0, **options)  # type: ignore[arg-type]
    assert (reading.probe, reading.layer, reading.x) == ("path_length", None, None)
    return reading.value


@pytest.mark.parametrize("a", [0.1, 1.0, 3.0])
def test_path_length_of_scalar_blocks(a: float) -> None:
    """G ∝ (1 + s·a)^(2L), hence L·a/(1 + a)."""
    assert path_length(scalars([a] * 9), drawn(5, 1)) == near(9 * a / (1 + a), rel=1e-6)


def test_every_path_of_a_plain_network_is_as_long_as_the_network() -> None:
    blocks = [Block(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), Skip("none")) for _ in range(7)]
    assert path_length(nn.Sequential(nn.Linear(5, 8), *blocks), torch.randn(6, 5)) == near(
        7.0, rel=1e-6
    )


def test_path_length_of_a_linear_chain_by_the_derivative_of_its_product() -> None:
    """The stem before the first block is on no path; x₀ is what that block is given."""
    matrices = [0.4 * drawn(6, 6, seed=k) for k in range(5)]
    network = nn.Sequential(linear(drawn(6, 4)), *(Block(linear(m)) for m in matrices))
    r = torch.randn(3, 6, generator=Generator().manual_seed(0)).double().T
    factors = [torch.eye(6, dtype=F64) + m for m in matrices]

    def back(replaced: int | None = None) -> Tensor:
        """∂L/∂x₀, or its part through one block's branch."""
        gradient = r
        for place in reversed(range(5)):
            gradient = (matrices if place == replaced else factors)[place].T @ gradient
        return gradient

    g, slope = back(), sum(back(place) for place in range(5))
    expected = ((g * slope).sum() / g.square().sum()).item()  # d ln G/ds = 2 g·g'/‖g‖²
    assert path_length(network, drawn(3, 4)) == near(expected, rel=1e-7)
    assert path_length(network.float(), drawn(3, 4).float()) == near(expected, rel=1e-5)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 10.0), (20**-0.5, 20 / 21)])
def test_independent_branches_are_taken_or_not(scale: float, expected: float) -> None:
    """Paths of n blocks: Binomial(n, ½); with branches scaled by α, Σ α²/(1 + α²)."""
    branches = [linear(drawn(256, 256, seed=k) / 16) for k in range(20)]
    blocks = [Block(branch, Skip(branch_scale=scale)) for branch in branches]
    assert path_length(nn.Sequential(*blocks), drawn(8, 256)) == near(expected, rel=0.05)


def test_a_model_without_blocks_has_no_paths() -> None:
    with pytest.raises(GradflowError, match="no block"):
        probes.path_length(nn.Linear(2, 2), drawn(3, 2), seed=0)


# --- lesions --------------------------------------------------------------------------------------


def test_deleting_blocks_is_leaving_them_out() -> None:
    blocks = [Block(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Skip("none")) for _ in range(3)]
    network = nn.Sequential(nn.Linear(4, 4), *blocks, Own(4))
    x = torch.randn(5, 4)
    whole = network(x)
    for names in (["2.skip"], ["2"]):
        with probes.deleted(network, names):
            assert torch.equal(network(x), network[4](network[3](network[1](network[0](x)))))
    with probes.deleted(network, ["1.skip", "3.skip", "4"]):
        assert torch.equal(network(x), network[2](network[0](x)))
    assert torch.equal(network(x), whole)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("order", ["pre", "post"])
def test_deleting_a_block_of_a_resnet(order: str) -> None:
    network = build_network("cifar", depth=14, skip=True, width=4, order=order).eval()
    x = torch.randn(2, 3, 8, 8)
    with probes.deleted(network, ["layer1.1.skip"]):
        found = network(x)
    network.layer1[1] = nn.Identity()
    assert torch.equal(network(x), found)


def test_what_cannot_be_deleted() -> None:
    network = build_network("cifar", depth=8, skip=False, width=4)
    with pytest.raises(SpecError, match="names=layer9: the model has no such module"), \
            probes.deleted(network, ["layer1.0", "layer9"]):  # fmt: skip
        raise AssertionError
    assert not network.layer1[0]._forward_hooks
    for name in ("layer2.0.skip", "layer2.0"):
        with (
            probes.deleted(network, [name]),
            pytest.raises(SpecError, match=f"{name}: cannot be deleted, .*2x4x8x8 to 2x8x4x4"),
        ):
            network(torch.randn(2, 3, 8, 8))


def test_swapping_is_loading_each_others_state() -> None:
    def block(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(3)
        norm.running_mean = torch.randn(3)
        return nn.Sequential(nn.Linear(3, 3), norm)

    network = nn.Sequential(block(0), nn.ReLU(), block(1)).eval()
    crossed = nn.Sequential(block(1), nn.ReLU(), block(0)).eval()
    x = torch.randn(5, 3)
    whole, parameters = network(x), list(network.parameters())
    with probes.swapped(network, "0", "2"):
        assert torch.equal(network(x), crossed(x))
        assert not torch.equal(network(x), whole)
    with pytest.raises(KeyError), probes.swapped(network, "0", "2"):
        raise KeyError
    assert torch.equal(network(x), whole)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    with pytest.raises(SpecError, match="names=0,1: they differ"), \
            probes.swapped(network, "0", "1"):  # fmt: skip
        raise AssertionError
    with pytest.raises(SpecError, match="names=9: the model has no such module"), \
            probes.swapped(network, "0", "9"):  # fmt: skip
        raise AssertionError


def test_lesion_of_scalar_blocks() -> None:
    """The output for 1 is Π(1 + a) over the blocks that are there."""
    factors = [1.0, 2.0, 4.0, 6.0]
    network = nn.Sequential(*scalars(factors), nn.Dropout(0.5))
    one = torch.ones(1, 1, dtype=F64)

    def product(*left_out: int) -> float:
        return math.prod(1 + a for k, a in enumerate(factors) if k not in left_out)

    def accuracy() -> float:
        assert not any(module.training for module in network.modules())
        assert not torch.is_grad_enabled()
        return network(one)

    readings = probes.lesion(network, accuracy, one, seed=0, several=(2, 3, 9), draws=4, swaps=2)
    assert values(readings, "lesion_none") == [product()]
    alone = [r for r in readings if r.probe == "lesion_delete"]
    assert by_layer(alone) == {f"{k}.skip": product(k) for k in range(4)}
    for count in (2, 3):
        together = [r.value for r in readings if (r.x_name, r.x) == ("blocks", float(count))]
        assert len(together) == 4
        assert set(together) <= {product(*c) for c in itertools.combinations(range(4), count)}
    assert len(values(readings, "lesion_delete_several")) == 8  # nine there are not
    assert values(readings, "lesion_swap") == [product()] * 2  # numbers commute
    order = ["lesion_none", "lesion_delete", "lesion_delete_several", "lesion_swap"]
    assert list(dict.fromkeys(r.probe for r in readings)) == order
    assert readings == probes.lesion(
        network, accuracy, one, seed=0, several=(2, 3, 9), draws=4, swaps=2
    )
    some = probes.lesion(network, accuracy, one, seed=0, blocks=["3.skip", "1.skip"])
    assert by_layer([r for r in some if r.probe == "lesion_delete"]) == {
        "1.skip": product(1),
        "3.skip": product(3),
    }
    assert set(values(some, "lesion_delete_several")) == {product(1, 3)}


def test_lesion_swaps_each_pair_of_like_blocks() -> None:
    """y ← y + (a·y + b) do not commute; the block of another structure changes place with none."""
    torch.manual_seed(0)
    blocks = [Block(nn.Linear(1, 1)) for _ in range(3)]
    network = nn.Sequential(blocks[0], Block(nn.Linear(1, 1, bias=False)), *blocks[1:])
    one = torch.ones(1, 1)

    def swapped(a: int, b: int) -> float:
        order = list(range(4))
        order[a], order[b] = b, a
        x = one
        for place in order:
            x = network[place](x)
        return x.item()

    readings = probes.lesion(network, lambda: network(one).item(), one, seed=0, several=())
    swaps = [r for r in readings if r.probe == "lesion_swap"]
    assert {(r.layer, r.x_name, r.x): r.value for r in swaps} == near(
        {(str(a), "other", float(b)): swapped(a, b) for a, b in ((0, 2), (0, 3), (2, 3))}, rel=1e-6
    )


def test_blocks_whose_parameters_are_elsewhere_are_not_swapped() -> None:
    """An MLP has its layers in one list and its skips in another."""
    network = build_network("mlp", depth=5, skip=True, width=4, in_channels=4)
    readings = probes.lesion(network, lambda: 0.5, torch.randn(3, 4), seed=0, several=())
    assert [r.layer for r in readings] == [None, "skips.0", "skips.1", "skips.2"]


@pytest.mark.parametrize(
    ("skip", "several"),
    [(False, ["layer1.0"]), (True, ["layer1.0", "layer2.0", "layer3.0"])],
)
def test_which_blocks_can_be_deleted(skip: bool, several: list[str]) -> None:
    """Those whose branch has the shape of what the skip is given: plain ones do not resize it."""
    network = build_network("cifar", depth=8, skip=skip, width=4)
    x = torch.randn(2, 3, 8, 8)
    readings = probes.lesion(network, lambda: 0.5, x, seed=0)
    alone = [r.layer for r in readings if r.probe == "lesion_delete"]
    assert alone == [f"{name}.skip" for name in several]
    with pytest.raises(SpecError, match=r"blocks=fc: allowed is layer1\.0\.skip"):
        probes.lesion(network, lambda: 0.5, x, seed=0, blocks=["fc"])
    with pytest.raises(GradflowError, match="the model has no block: none of its modules"):
        probes.lesion(nn.Linear(2, 2), lambda: 0.5, torch.randn(1, 2), seed=0)
    narrowing = Block(nn.Linear(2, 1), Skip("none"))
    with pytest.raises(GradflowError, match="lesion: no block has a branch of the shape"):
        probes.lesion(narrowing, lambda: 0.5, torch.randn(1, 2), seed=0)


def test_whose_a_blocks_parameters_are() -> None:
    network = build_network("cifar", depth=8, skip=True, width=4)
    stages = [f"layer{stage}.0" for stage in (1, 2, 3)]
    assert block_owners(network) == {f"{name}.skip": name for name in stages}
    assert block_owners(build_network("mlp", depth=5, skip=True)) == {}  # three in one list
    assert block_owners(nn.Sequential(Own(2), nn.Sequential(Own(2)))) == {"0": "0", "1.0": "1.0"}


# --- formats --------------------------------------------------------------------------------------

FORMATS = [torch.float16, torch.bfloat16, torch.float32, F64]
DEEP = dict(zip(FORMATS, (60, 320, 320, 1120), strict=True))


def depths(weight: float, dtype: torch.dtype, x: float) -> dict[str, float]:
    """Of a chain of one feature, with a Skip and an activation between."""
    layers = [Block(nn.Sequential(linear([[weight]]), nn.ReLU()), Skip("none"))] * DEEP[dtype]
    readings = probes.underflow_depth(
        nn.Sequential(*layers), torch.tensor([[x]], dtype=F64), dtype, seed=1
    )
    return {reading.probe: reading.value for reading in readings}


def steps_until(
    happens: Callable[[Tensor], bool], start: float, factor: float, dtype: torch.dtype
) -> float:
    """How often a number of that format has to be multiplied."""
    value = torch.tensor(start, dtype=F64).to(dtype)
    for count in range(2000):
        if happens(value):
            return float(count)
        value = value * factor
    return math.nan


@pytest.mark.parametrize("dtype", FORMATS)
def test_depth_of_underflow_of_halving_layers(dtype: torch.dtype) -> None:
    """Outputs of 2^15 at first never vanish before the gradient does."""
    r = abs(torch.randn((1, 1), generator=Generator().manual_seed(1)).item())
    back = steps_until(lambda v: not v.any(), r, 0.5, dtype)
    # From layer k's output to the first one's the gradient passes k − 1 layers.
    found = depths(0.5, dtype, 2.0**15)
    assert found.pop("first_all_zero_gradient") == back + 1
    assert all(math.isnan(value) for value in found.values())
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal
    assert back == pytest.approx(-math.log2(smallest) + 1 + math.log2(r), abs=1)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_gradient_is_gone_where_the_outputs_are(dtype: torch.dtype) -> None:
    """What ReLU is given is zero before the gradient would be."""
    start = torch.finfo(dtype).smallest_normal
    found = depths(0.5, dtype, start)
    gone = steps_until(lambda v: not v.any(), start, 0.5, dtype)
    assert found["first_all_zero_gradient"] == gone + 1  # layer k's own activation is not passed


@pytest.mark.parametrize(
    ("dtype", "exponent"), [*zip(FORMATS, (16.0, 128.0, 128.0, 1024.0), strict=True)]
)
def test_depth_of_overflow_of_doubling_layers(dtype: torch.dtype, exponent: float) -> None:
    assert depths(2.0, dtype, 1.0)["first_overflow"] == exponent
    # Outputs that start 2^13 lower let the gradient overflow first.
    r = abs(torch.randn((1, 1), generator=Generator().manual_seed(1)).item())
    back = steps_until(lambda v: not v.isfinite().all(), r, 2.0, dtype)
    found = depths(2.0, dtype, 2.0**-13)
    assert found["first_overflow"] == exponent + 13
    assert found["first_overflow_gradient"] == back + 1
    assert math.isnan(found["first_all_zero_gradient"])


def test_gradients_beyond_an_overflow_say_nothing() -> None:
    """The derivative of SiLU at infinity is ∞·0."""
    layers = [nn.Sequential(linear([[2.0]]), nn.SiLU())] * 150
    x = torch.tensor([[64.0]])
    found = probes.underflow_depth(nn.Sequential(*layers), x, torch.float32, seed=1)
    assert found[0] == Reading("first_overflow", 122.0)
    assert all(math.isnan(reading.value) for reading in found[1:])


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_in_place_leave_the_layers_outputs(inplace: bool) -> None:
    """ReLU makes 0 of the −2^17, infinite in float16, that layer 16 puts out."""
    weights = [2.0] * 15 + [-4.0] + [1.0] * 4
    layers = [nn.Sequential(linear([[w]]), nn.ReLU(inplace=inplace)) for w in weights]
    network, one = nn.Sequential(*layers), torch.ones(1, 1)
    found = probes.underflow_depth(network, one, torch.float16, seed=1)
    assert found[0] == Reading("first_overflow", 16.0)
    # In float32 no gradient passes that ReLU, from layer 17 on; layer 16's own is not on the way.
    found = probes.underflow_depth(network, one, torch.float32, seed=1)
    assert found[1] == Reading("first_all_zero_gradient", 17.0)


def test_a_network_that_keeps_its_numbers_never_runs_out_of_them() -> None:
    found = depths(1.0, torch.float16, 1.0)
    assert all(math.isnan(value) for value in found.values())
    with pytest.raises(GradflowError, match="underflow_depth: the model has no"):
        probes.underflow_depth(nn.ReLU(), drawn(1, 1), torch.float16, seed=0)


# --- displacement ---------------------------------------------------------------------------------


def test_displacement_by_hand() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), Block(nn.Linear(4, 4)), Own(4), nn.Linear(4, 2))

    now, initial = network(), network()
    with torch.no_grad():
        now[0].weight += 1  # twelve elements: ‖ΔW‖ = √12
        now[1].branch.bias.mul_(3)
        now[2].gain += 0.5

    def size(*tensors: Tensor) -> float:
        return math.sqrt(sum(t.double().square().sum().item() for t in tensors))

    block, own = list(initial[1].parameters()), list(initial[2].parameters())
    bias = initial[1].branch.bias
    expected = {
        "0": math.sqrt(12) / size(*initial[0].parameters()),
        "1": 2 * size(bias) / size(*block),
        "1.branch": 2 * size(bias) / size(*block),
        "2": 0.5 / size(*own),  # a block that is its own: with its branch
        "2.inner": 0.0,
        "3": 0.0,  # frozen: exactly
    }
    readings = probes.displacement(now, initial)
    assert [r.layer for r in readings] == list(expected)
    assert {r.probe for r in readings} == {"displacement"}
    assert by_layer(readings) == near(expected, rel=1e-6)


def test_displacement_from_zero_and_to_what_is_not_finite() -> None:
    layers = [nn.Linear(2, 2, bias=False) for _ in range(3)]
    now, initial = nn.Sequential(*layers), nn.Sequential(*(nn.Linear(2, 2, False) for _ in "123"))
    for place in (0, 1):
        nn.init.zeros_(initial[place].weight)
    nn.init.zeros_(now[1].weight)
    now[2].weight.data[0, 0] = math.nan
    found = [r.value for r in probes.displacement(now, initial)]
    assert found[0] == math.inf
    assert math.isnan(found[1])
    assert math.isnan(found[2])


def test_displacement_of_a_resnets_blocks_and_of_another_network() -> None:
    make = [build_network("cifar", depth=8, skip=True, width=width) for width in (4, 4, 8)]
    for parameter in make[0].parameters():
        parameter.data *= 1.5
    found = by_layer(probes.displacement(make[0], make[1]))
    layers = ["conv1", "bn1", "fc"]
    layers += [
        f"layer{s}.0{m}" for s in (1, 2, 3) for m in ("", ".conv1", ".bn1", ".conv2", ".bn2")
    ]
    assert set(found) == set(layers)
    assert found == near(dict.fromkeys(found, 0.5), rel=1e-5)
    with pytest.raises(SpecError, match="initial: its parameters differ"):
        probes.displacement(make[0], make[2])
