"""Skips against their formulas, forward and backward."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from gradflow import spec
from gradflow.errors import SpecError
from gradflow.networks import Skip, build_network
from gradflow.networks.skips import SKIPS


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, branch = torch.randn(2, *shape, generator=generator, dtype=dtype)
    return x.requires_grad_(), branch.requires_grad_()


def test_names_are_those_of_the_spec() -> None:
    assert set(SKIPS) == set(spec.SKIPS)


DOSES = (0.0, 0.5, 1.0, -2.0)


@pytest.mark.parametrize(("a", "b", "beta"), list(itertools.product(DOSES, DOSES, (1.0, 0.3, 0.0))))
def test_dosed_skip_has_the_closed_form_gradients(a: float, b: float, beta: float) -> None:
    """y = (βw + a)·x and ∂(y·g)/∂x = (βw + b)·g for a branch F(x) = w·x."""
    x, g = pair(5, 7, dtype=torch.float64)
    w = torch.linspace(-1, 2, 35, dtype=torch.float64).reshape(5, 7)
    skip = Skip("dosed", skip_forward=a, skip_backward=b, branch_scale=beta)
    y = skip(x, w * x)
    torch.testing.assert_close(y, (beta * w + a) * x, rtol=1e-14, atol=1e-14)
    if beta == 0 and b == 0:
        assert not y.requires_grad
        return
    (gradient,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(gradient, (beta * w + b) * g, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", list(spec.PRESETS))
def test_presets_are_their_doses(kind: str) -> None:
    a, b = spec.PRESETS[kind]
    assert Skip("dosed", skip_forward=a, skip_backward=b).kind == kind
    x, branch = pair(4, 3)
    y = Skip(kind)(x, branch)
    assert torch.equal(y, branch + a * x.detach())
    through_x, through_branch = torch.autograd.grad(
        y, (x, branch), torch.ones(4, 3), allow_unused=True
    )
    assert torch.equal(through_branch, torch.ones(4, 3))
    if b == 0:
        assert through_x is None  # exactly nothing comes back
    else:
        assert torch.equal(through_x, torch.ones(4, 3))


def test_bools_and_overrides_are_presets() -> None:
    assert Skip(True).kind == Skip().kind == "identity"
    assert Skip(False).kind == Skip("none").kind == "none"
    assert Skip("none", skip_forward=1, skip_backward=1).kind == "identity"
    assert Skip("identity", skip_backward=0).kind == "forward_only"
    assert Skip("identity", skip_backward=0.5).kind == "dosed"


def test_only_none_does_without_its_input() -> None:
    made = {kind: Skip(kind, channels=2) for kind in spec.SKIPS if kind != "dosed"}
    assert [kind for kind, skip in made.items() if not skip.uses_skip] == ["none"]


def test_backward_only_is_plain_in_the_forward_pass_bit_for_bit() -> None:
    """Also where x dwarfs the branch, so that (F + x) − x would lose F to rounding."""
    x, branch = pair(1000)
    y = Skip("backward_only")(1e8 * x, branch)
    assert torch.equal(y, Skip("none")(x, branch))
    assert not torch.equal((branch + 1e8 * x) - 1e8 * x, branch)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.full((1000,), 1e8))


def test_what_has_coefficient_zero_is_not_computed() -> None:
    x, branch = pair(3)
    broken = torch.tensor([math.inf, -math.inf, math.nan])
    assert Skip("none")(broken, branch) is branch
    assert Skip("none").terms(x, branch)[0] is None
    assert torch.equal(Skip("identity", branch_scale=0)(x, broken), x)
    assert torch.equal(Skip("forward_only", branch_scale=0)(x, broken), x)


def test_factors_of_one_are_not_computed() -> None:
    x, branch = pair(3)
    skip_term, branch_term = Skip("identity").terms(x, branch)
    assert skip_term is x
    assert branch_term is branch


@pytest.mark.parametrize("kind", ["identity", "backward_only", "rezero", "highway"])
def test_forward_adds_up_what_terms_on_the_instance_returns(kind: str) -> None:
    """Whoever measures wraps `terms` on the instance, and sees every forward pass."""
    x, branch = pair(4, 3)
    skip = Skip(kind, channels=3)
    expected, inner, seen = skip(x, branch), skip.terms, []

    def watched(x: Tensor, branch: Tensor) -> tuple[Tensor | None, Tensor]:
        seen.append(inner(x, branch))
        return seen[-1]

    skip.terms = watched  # type: ignore[method-assign]
    assert torch.equal(skip(x, branch), expected)
    assert len(seen) == 1
    assert torch.equal(seen[0][0] + seen[0][1], expected)


def test_rezero_starts_as_the_identity_and_learns_its_factor() -> None:
    x, branch = pair(4, 3)
    skip = Skip("rezero")
    y = skip(x, branch)
    assert torch.equal(y, x)
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    through_x, through_branch, through_beta = torch.autograd.grad(y, (x, branch, skip.beta), g)
    assert torch.equal(through_x, g)
    assert torch.equal(through_branch, torch.zeros(4, 3))
    torch.testing.assert_close(through_beta, (g * branch).sum().reshape(1))
    with torch.no_grad():
        skip.beta.fill_(0.25)
    torch.testing.assert_close(skip(x, branch), x + 0.25 * branch)


def test_highway_with_a_constant_gate() -> None:
    """Bias −2 and no weights: T = σ(−2) everywhere."""
    x, branch = pair(2, 4, 5, 5)
    skip = Skip("highway", channels=4)
    nn.init.zeros_(skip.gate.weight)
    gate = 1 / (1 + math.exp(2))
    torch.testing.assert_close(skip(x, branch), gate * branch + (1 - gate) * x)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5, 3)])
def test_highway_gates_each_place_by_its_channels(shape: tuple[int, ...]) -> None:
    x, branch = pair(*shape)
    skip = Skip("highway", channels=4)
    expected = torch.empty(shape)
    for n in range(shape[0]):
        for place in itertools.product(*map(range, shape[2:])):
            at = (n, slice(None), *place)
            t = torch.sigmoid(skip.gate.weight @ x[at] + skip.gate.bias)
            expected[at] = t * branch[at] + (1 - t) * x[at]
    torch.testing.assert_close(skip(x, branch), expected)
    last = Skip("highway", channels=4, channel_dim=-1)
    last.load_state_dict(skip.state_dict())
    moved = last(x.movedim(1, -1), branch.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(moved, expected)


def test_stochastic_depth_draws_once_a_batch() -> None:
    """A keep frequency within five standard errors; each y is x + F or x, nothing between."""
    x, branch = pair(6, 3)
    skip = Skip("stochastic_depth", drop_rate=0.3)
    draws, kept = 2000, 0
    torch.manual_seed(0)
    for _ in range(draws):
        y = skip(x, branch)
        keeps = torch.equal(y, x + branch)
        assert keeps or torch.equal(y, x)
        kept += keeps
    assert abs(kept / draws - 0.7) < 5 * math.sqrt(0.3 * 0.7 / draws)


def test_stochastic_depth_uses_the_global_generator() -> None:
    x, branch = pair(2)
    skip = Skip("stochastic_depth", drop_rate=0.5)

    def series() -> list[float]:
        torch.manual_seed(3)
        return [skip(x, branch)[0].item() for _ in range(30)]

    first = series()
    assert len(set(first)) == 2
    assert first == series()


def test_a_dropped_branch_gets_a_gradient_of_zero() -> None:
    x, branch = pair(4)
    skip = Skip("stochastic_depth", drop_rate=0.999999)
    torch.manual_seed(0)
    through_x, through_branch = torch.autograd.grad(skip(x, branch).sum(), (x, branch))
    assert torch.equal(through_x, torch.ones(4))
    assert torch.equal(through_branch, torch.zeros(4))


def test_stochastic_depth_weighs_by_survival_in_evaluation() -> None:
    x, branch = pair(4)
    skip = Skip("stochastic_depth", drop_rate=0.25).eval()
    assert torch.equal(skip(x, branch), 0.75 * branch + x)


def test_survival_falls_linearly_with_the_block() -> None:
    """Block l of 54 survives with 1 − l/54·(1/2): (3·54 − 1)/4 = 40.25 of them (Huang 2016)."""
    network = build_network("cifar", depth=110, width=1, skip="stochastic_depth")
    rates = [module.drop_rate for module in network.modules() if isinstance(module, Skip)]
    assert rates == pytest.approx([block / 54 * 0.5 for block in range(1, 55)])
    assert sum(1 - rate for rate in rates) == pytest.approx(40.25)
    mlp = build_network("mlp", depth=6, width=4, skip="stochastic_depth", drop_rate=0.2)
    rates = [module.drop_rate for module in mlp.modules() if isinstance(module, Skip)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "idenity"}, "skip=idenity: allowed is none, identity"),
        ({"kind": 1}, "skip=1: allowed is"),
        ({"kind": "dosed"}, "skip=dosed: set both"),
        ({"kind": "highway"}, "channels=null: skip=highway"),
        ({"kind": "rezero", "skip_forward": 1.0}, "skip=rezero has no doses"),
        ({"kind": "highway", "branch_scale": 0.5, "channels": 2}, "skip=highway has no factor"),
        ({"kind": "stochastic_depth", "drop_rate": 1.5}, "drop_rate=1.5: allowed is"),
        ({"skip_forward": "much"}, "skip_forward=much: allowed is a number"),
    ],
)
def test_bad_values_are_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Skip(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
