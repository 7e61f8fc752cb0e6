"""Theory against closed forms, slow integrals, simulated networks and published numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special

from gradflow import spec, theory
from gradflow.errors import SpecError
from gradflow.networks import build_network

PI = math.pi
LENGTHS = (1e-6, 1e-3, 0.3, 1.0, 25.0, 100.0, 400.0)
CORRELATIONS = (-1.0, -0.999, -0.5, 0.0, 0.3, 0.9, 0.999, 1 - 1e-9, 1.0)
SLOPE = 0.2
NAMES = theory.ACTIVATIONS
FUNCTIONS = {
    "relu": F.relu, "leaky_relu": lambda x: F.leaky_relu(x, SLOPE), "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "gelu": F.gelu, "silu": F.silu, "linear": lambda x: x,
    "erf": torch.erf, "crelu": F.relu,
}  # fmt: skip


def rounded(value: float, printed: str) -> bool:
    """Whether a value, rounded to as many places, is the printed one."""
    return float(f"{value:.{len(printed.split('.')[1])}f}") == float(printed)


def phi(name: str):
    """The activation as torch has it, on float64 arrays."""
    return lambda u: FUNCTIONS[name](torch.as_tensor(u, dtype=torch.float64)).numpy()


def slope_of(name: str):
    def slope(u):
        x = torch.as_tensor(u, dtype=torch.float64).clone().requires_grad_()
        return torch.autograd.grad(FUNCTIONS[name](x).sum(), x)[0].numpy()

    return slope


# --- quadrature and moments -----------------------------------------------------------------------


def test_numbers_at_which_gauss_hermite_fails():
    fourth = [theory.slope_moment("tanh", q) for q in (25.0, 100.0)]
    assert rounded(fourth[0], "0.1057")
    assert rounded(fourth[1], "0.0531")
    assert theory.expectation(slope_of("relu"), 3.0) == pytest.approx(0.5, rel=1e-14)


@pytest.mark.parametrize("q", [*LENGTHS, 1e8])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "erf", "linear"])
def test_quadrature_equals_closed_forms(name, q):
    f, slope = phi(name), slope_of(name)
    given = (name, q, SLOPE)
    assert theory.expectation(f, q) == pytest.approx(theory.mean(*given), rel=1e-12, abs=1e-13)
    second = theory.expectation(lambda u: f(u) ** 2, q)
    assert second == pytest.approx(theory.second_moment(*given), rel=1e-12)
    squared = theory.expectation(lambda u: slope(u) ** 2, q)
    assert squared == pytest.approx(theory.slope_moment(*given), rel=1e-12)


Z = np.arange(-10, 10, 0.002)
WEIGHTS = 0.002 * np.exp(-(Z**2) / 2) / math.sqrt(2 * PI)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu"])
@pytest.mark.parametrize("q", LENGTHS)
def test_quadrature_equals_a_brute_sum(name, q):
    u = math.sqrt(q) * Z
    values, slopes = phi(name)(u), slope_of(name)(u)
    assert theory.second_moment(name, q) == pytest.approx(WEIGHTS @ values**2, rel=1e-11)
    assert theory.slope_moment(name, q) == pytest.approx(WEIGHTS @ slopes**2, rel=1e-11)
    assert theory.mean(name, q) == pytest.approx(WEIGHTS @ values, rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("q", LENGTHS)
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "erf", "linear"])
def test_pair_quadrature_equals_closed_forms(name, q):
    """To 1e-12 of the value at c = 1."""
    second = theory.second_moment(name, q, SLOPE)
    for c in CORRELATIONS:
        closed = theory.correlation_map(name, c, q, sigma_w2=1.0, negative_slope=SLOPE)
        found = theory.pair_expectation(phi(name), q, c) / second
        assert found == pytest.approx(closed, abs=1e-12)


@pytest.mark.parametrize(
    ("q", "c"), [(1.0, 0.5), (1.0, -0.7), (25.0, 0.9), (400.0, 0.99), (0.01, 0.3)]
)
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu"])
def test_pair_quadrature_equals_a_brute_sum(name, q, c):
    z, weights = Z[::10], 10 * WEIGHTS[::10]
    u = math.sqrt(q) * z
    v = math.sqrt(q) * (c * z[:, None] + math.sqrt(1 - c**2) * z)
    f = phi(name)
    brute = (weights * f(u)) @ f(v) @ weights
    assert theory.pair_expectation(f, q, c) == pytest.approx(brute, rel=1e-10)
    mapped = theory.correlation_map(name, c, q, sigma_w2=1.7, sigma_b2=0.3)
    second = theory.length_map(name, q, sigma_w2=1.7, sigma_b2=0.3)
    assert mapped == pytest.approx((1.7 * brute + 0.3) / second, rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_at_the_ends_are_moments_of_one(name):
    for q in LENGTHS:
        same, independent = (
            theory.correlation_map(name, c, q, sigma_w2=1.0, negative_slope=SLOPE)
            for c in (1.0, 0.0)
        )
        assert same == pytest.approx(1.0, rel=1e-12)
        expected = theory.mean(name, q, SLOPE) ** 2 / theory.second_moment(name, q, SLOPE)
        assert independent == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_every_activation_of_the_library_is_known_and_no_other():
    assert {*theory.ACTIVATIONS} == {*spec.ACTIVATIONS, "erf"}
    with pytest.raises(SpecError, match=r"activation=cosine: allowed is relu, leaky_relu, .*erf"):
        theory.mean("cosine", 1.0)
    with pytest.raises(SpecError, match="negative_slope=null"):
        theory.chi("leaky_relu", 1.0, sigma_w2=1.0)
    with pytest.raises(SpecError, match="q=-1: allowed is a number from 0"):
        theory.second_moment("relu", -1.0)
    with pytest.raises(SpecError, match="c=2: allowed is a number from -1 to 1"):
        theory.correlation_map("tanh", 2.0, 1.0, sigma_w2=1.0)


def test_crelu_is_relu_per_input_of_the_next_layer():
    """Mean over both halves of relu(±u): E φ² = q/2, E φ'² = ½, and the pair's product."""
    q, c = 3.0, 0.4
    both = theory.pair_expectation(lambda u: np.maximum(u, 0), q, c)
    both += theory.pair_expectation(lambda u: np.maximum(-u, 0), q, c)
    assert theory.second_moment("crelu", q) == pytest.approx(q / 2)
    assert theory.slope_moment("crelu", q) == 0.5
    mapped = theory.correlation_map("crelu", c, q, sigma_w2=2.0)
    assert mapped * q == pytest.approx(2 * both / 2, rel=1e-12)


# --- maps, fixed points, depth scales -------------------------------------------------------------


def test_rectifiers_maps():
    assert theory.length_map("relu", 3.0, sigma_w2=1.4, sigma_b2=0.2) == pytest.approx(2.3)
    assert theory.chi("relu", 3.0, sigma_w2=1.4) == pytest.approx(0.7)
    leaky = theory.chi("leaky_relu", 3.0, sigma_w2=1.4, negative_slope=0.3)
    assert leaky == pytest.approx(1.4 * (1 + 0.3**2) / 2)


@pytest.mark.parametrize(
    ("sigma_w2", "sigma_b2", "length", "growth"),
    [
        (1.0, 0.05, "0.1936", "0.7590"),
        (1.5, 0.05, "0.4180", "0.9386"),
        (2.5, 0.05, None, "1.1335"),
        (2.25, 0.0, None, "1.1393"),
        (4.0, 0.0, None, "1.3627"),
    ],
)
def test_tanh_fixed_points(sigma_w2, sigma_b2, length, growth):
    q = theory.length_fixed_point("tanh", sigma_w2=sigma_w2, sigma_b2=sigma_b2)
    assert theory.length_map("tanh", q, sigma_w2=sigma_w2, sigma_b2=sigma_b2) == pytest.approx(q)
    assert length is None or rounded(q, length)
    assert rounded(theory.chi("tanh", q, sigma_w2=sigma_w2), growth)


def test_critical_points():
    tanh = theory.critical_sigma_w2("tanh", 0.05)
    assert rounded(tanh.sigma_w2, "1.7610")
    assert tanh.q == pytest.approx(0.57004788)
    nearby = theory.length_fixed_point("tanh", sigma_w2=1.7610, sigma_b2=0.05)
    assert rounded(nearby, "0.5701")
    assert theory.critical_sigma_w2("tanh") == pytest.approx((1.0, 0.0))
    relu = theory.critical_sigma_w2("relu")
    assert relu.sigma_w2 == 2
    assert math.isnan(relu.q)
    leaky = theory.critical_sigma_w2("leaky_relu", negative_slope=0.5)
    assert leaky.sigma_w2 == pytest.approx(1.6)
    assert theory.critical_sigma_w2("erf").sigma_w2 == pytest.approx(PI / 4)
    with pytest.raises(SpecError, match=r"sigma_b2=0.1: no sigma_w2 is critical for relu"):
        theory.critical_sigma_w2("relu", 0.1)


@pytest.mark.parametrize("name", ["tanh", "erf", "sigmoid", "gelu", "silu"])
def test_critical_points_are_fixed_points_without_growth(name):
    for sigma_b2 in (0.01, 0.3):
        sigma_w2, q = theory.critical_sigma_w2(name, sigma_b2)
        assert theory.length_map(name, q, sigma_w2=sigma_w2, sigma_b2=sigma_b2) == pytest.approx(q)
        assert theory.chi(name, q, sigma_w2=sigma_w2) == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "repels"), [("gelu", True), ("silu", True), ("tanh", False)])
def test_critical_lengths_repel_for_gelu_and_silu(name, repels):
    sigma_w2, q = theory.critical_sigma_w2(name, 0.1)
    above = theory.length_map(name, 1.01 * q, sigma_w2=sigma_w2, sigma_b2=0.1)
    assert (above > 1.01 * q) == repels


def test_fixed_points_of_the_length_in_every_case():
    fixed = theory.length_fixed_point
    assert fixed("relu", sigma_w2=1.0, sigma_b2=0.3) == pytest.approx(0.6, rel=1e-12)
    assert fixed("relu", sigma_w2=1.0) == 0
    assert fixed("relu", sigma_w2=2.0, q0=7.0) == 7
    assert fixed("relu", sigma_w2=2.1) == math.inf
    assert fixed("tanh", sigma_w2=1.0) == 0
    assert fixed("tanh", sigma_w2=1.5, q0=0.0) == pytest.approx(fixed("tanh", sigma_w2=1.5, q0=9.0))
    q = fixed("sigmoid", sigma_w2=1.0)
    for _ in range(60):
        assert q == pytest.approx(theory.second_moment("sigmoid", q), rel=1e-12)


def test_correlation_fixed_points():
    ordered = {"sigma_w2": 1.5, "sigma_b2": 0.05}
    chaotic = {"sigma_w2": 2.5, "sigma_b2": 0.05}
    assert theory.correlation_fixed_point("tanh", **ordered) == 1
    assert theory.correlation_fixed_point("tanh", sigma_w2=4.0) == 0
    assert theory.correlation_fixed_point("relu", sigma_w2=2.0) == 1
    q = theory.length_fixed_point("tanh", **chaotic)
    limits = []
    for c in (0.05, 0.999):
        for _ in range(300):
            c = theory.correlation_map("tanh", c, q, **chaotic)
        limits.append(c)
    assert theory.correlation_fixed_point("tanh", **chaotic) == pytest.approx(limits[0], rel=1e-9)
    assert limits[0] == pytest.approx(limits[1], rel=1e-9)
    with pytest.raises(SpecError, match=r"sigma_w2=3: lengths grow without end"):
        theory.correlation_fixed_point("relu", sigma_w2=3.0)


@pytest.mark.parametrize("name", ["tanh", "erf", "sigmoid", "gelu", "silu", "linear"])
@pytest.mark.parametrize("q", [0.1, 1.0, 25.0])
def test_chi_is_the_slope_of_the_correlation_map_at_one(name, q):
    """dc'/dc = χ₁·q/q', so χ₁ at a fixed point."""
    options = {"sigma_w2": 1.3, "sigma_b2": 0.2}
    step = 1e-6 / q
    below, twice = (theory.correlation_map(name, 1 - k * step, q, **options) for k in (1, 2))
    slope = (3 - 4 * below + twice) / (2 * step)
    growth = theory.chi(name, q, sigma_w2=1.3) * q / theory.length_map(name, q, **options)
    assert slope == pytest.approx(growth, rel=1e-5)


def test_chi_is_the_slope_of_the_correlation_map_at_a_fixed_point():
    options = {"sigma_w2": 1.5, "sigma_b2": 0.05}
    q = theory.length_fixed_point("tanh", **options)
    slope = (1 - theory.correlation_map("tanh", 1 - 1e-7, q, **options)) / 1e-7
    assert slope == pytest.approx(theory.chi("tanh", q, sigma_w2=1.5), rel=1e-5)
    assert slope == pytest.approx(math.exp(-1 / theory.depth_scale("tanh", **options)), rel=1e-5)


def test_depth_scales():
    assert rounded(theory.depth_scale("tanh", sigma_w2=1.0, sigma_b2=0.05), "3.63")
    assert theory.depth_scale("relu", sigma_w2=1.0) == pytest.approx(1 / math.log(2))
    assert theory.depth_scale("relu", sigma_w2=2.0) == math.inf
    assert theory.depth_scale("tanh", sigma_w2=1.0) == math.inf
    critical = theory.critical_sigma_w2("tanh", 0.05).sigma_w2
    assert theory.depth_scale("tanh", sigma_w2=critical, sigma_b2=0.05) > 1e6


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_depth_scales_are_rates_of_the_maps(name):
    """In the chaotic phase, where correlations end below 1; and of the length."""
    options = {"sigma_w2": 2.5, "sigma_b2": 0.05}
    q = theory.length_fixed_point(name, **options)
    c = theory.correlation_fixed_point(name, **options)
    for scale, at, mapped in (
        (theory.depth_scale(name, **options), c,
         lambda x: theory.correlation_map(name, x, q, **options)),
        (theory.length_depth_scale(name, **options), q,
         lambda x: theory.length_map(name, x, **options)),
    ):  # fmt: skip
        slope = (mapped(at + 1e-5) - mapped(at - 1e-5)) / 2e-5
        assert math.exp(-1 / scale) == pytest.approx(slope, rel=1e-6)


# --- initialisations ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "crelu"])
@pytest.mark.parametrize("init", spec.INITIALIZATIONS)
def test_sigmas_are_those_of_the_networks(init, activation):
    if init == "looks_linear" and activation != "crelu":
        pytest.skip("looks_linear needs crelu")
    slope = {"negative_slope": 0.5} if activation == "leaky_relu" else {}
    given = {"sigma_w": 1.3, "sigma_b": 0.4} if init == "gaussian" else {}
    network = build_network(
        "mlp", depth=3, width=400, skip=False, activation=activation, init=init, norm="none",
        in_channels=4, **slope, **given,
    )  # fmt: skip
    weight = network.get_parameter("layers.1.weight").double()
    bias = network.get_parameter("layers.1.bias").double()
    sigma_w2, sigma_b2 = theory.sigmas(init, activation, width=400, **slope, **given)
    assert weight.square().mean().item() * weight.shape[1] == pytest.approx(sigma_w2, rel=0.02)
    assert bias.square().mean().item() == pytest.approx(sigma_b2, rel=0.25)


def test_sigmas_that_cannot_be_known():
    with pytest.raises(SpecError, match=r"init=zeros: allowed is he, .*gaussian"):
        theory.sigmas("zeros", "relu")
    with pytest.raises(SpecError, match="width=null"):
        theory.sigmas("pytorch", "relu")
    with pytest.raises(SpecError, match="set sigma_w and sigma_b"):
        theory.sigmas("gaussian", "relu")
    with pytest.raises(SpecError, match="negative_slope=null"):
        theory.sigmas("he", "leaky_relu")


@pytest.mark.parametrize(
    ("activation", "init", "growth"),
    [("relu", "he", 1.0), ("relu", "xavier", 0.5), ("relu", "pytorch", 1 / 6)],
)
def test_growth_of_common_initialisations(activation, init, growth):
    sigma_w2, sigma_b2 = theory.sigmas(init, activation, width=256)
    profile = theory.plain_profile(50, activation, sigma_w2=sigma_w2, sigma_b2=sigma_b2)
    assert profile.mean_growth(4) == pytest.approx(growth)


def test_growth_of_tanh_and_sigmoid():
    sigma_w2, sigma_b2 = theory.sigmas("pytorch", "tanh", width=256)
    tanh = theory.plain_profile(50, "tanh", sigma_w2=sigma_w2, sigma_b2=sigma_b2)
    assert tanh.mean_growth(4) == pytest.approx(0.3327, rel=0.003)  # as measured; 1/3 without bias
    sigmoid = theory.plain_profile(50, "sigmoid", sigma_w2=1.0)
    assert rounded(sigmoid.mean_growth(4), "0.0557")


# --- normalisation --------------------------------------------------------------------------------


def test_batch_norm_growth():
    relu = theory.batch_norm_growth("relu")
    assert relu == pytest.approx(PI / (PI - 1), rel=1e-14)
    assert rounded(relu, "1.46694")
    assert rounded(math.sqrt(relu), "1.2112")
    assert theory.batch_norm_growth("linear") == 1
    tanh = theory.slope_moment("tanh", 1.0) / theory.second_moment("tanh", 1.0)
    assert theory.batch_norm_growth("tanh") == tanh == theory.layer_norm_growth("tanh")
    assert tanh == pytest.approx(1.19, rel=0.02)  # measured
    assert theory.layer_norm_growth("relu") == 1
    assert theory.layer_norm_growth("leaky_relu", 0.3) == 1


@pytest.mark.parametrize(
    ("batch", "measured"), [(512, 1.461), (128, 1.478), (32, 1.531), (8, 1.790)]
)
def test_batch_norm_growth_at_finite_batch_is_the_measured_one(batch, measured):
    assert theory.batch_norm_growth("relu", batch=batch) == pytest.approx(measured, rel=0.0065)


def test_batch_norm_growth_tends_to_that_of_large_batches():
    for name in ("relu", "leaky_relu", "linear", "crelu"):
        large = theory.batch_norm_growth(name, 0.3)
        finite = theory.batch_norm_growth(name, 0.3, batch=10**6)
        assert finite == pytest.approx(large, rel=1e-5)
    assert theory.batch_norm_growth("linear", batch=8) == pytest.approx(6 / 5)
    with pytest.raises(SpecError, match="batch=3"):
        theory.batch_norm_growth("relu", batch=3)
    with pytest.raises(SpecError, match="batch=32: allowed is null with activation=tanh"):
        theory.batch_norm_growth("tanh", batch=32)


@pytest.mark.parametrize(("slope", "batch"), [(0.0, 6), (0.0, 24), (0.3, 8)])
def test_batch_norm_growth_at_finite_batch_is_that_of_many_random_neurons(slope, batch):
    """One layer of an infinitely wide network: Gaussian neurons and gradients, both spread as G."""
    random, neurons = np.random.default_rng(0), 600_000 // batch
    z, gradient = random.standard_normal((2, neurons, batch))
    z, gradient = (x - x.mean(1, keepdims=True) for x in (z, gradient))
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    y = math.sqrt(batch) * z / norm
    outputs = np.where(y > 0, y, slope * y)
    through = np.where(y > 0, 1.0, slope) * gradient
    through -= through.mean(1, keepdims=True) + y * (y * through).mean(1, keepdims=True)
    back = batch * (through / norm) ** 2
    # Pre-activations have variance 1 here and outputs.var in the next layer, up to σ_w² in both.
    growth = back.sum() / (gradient**2).sum() / outputs.var(axis=1, ddof=1).mean()
    given = ("leaky_relu", slope)
    assert growth == pytest.approx(theory.batch_norm_growth(*given, batch=batch), rel=0.02)


# --- profiles against simulated networks ----------------------------------------------------------


def simulated(word, activation, *, blocks, width=500, samples=32, seeds=2, sigma_w2=1.0,
              sigma_b2=0.0, scale=1.0, forward=1.0, backward=1.0, q0=1.0):  # fmt: skip
    """ln of the mean squares of x_l and of the gradients' sums of squares, averaged over seeds."""
    logs = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, generator=generator):
            return torch.randn(*shape, generator=generator)

        x = (math.sqrt(q0) * normal(samples, width)).requires_grad_()
        stream = [x]
        for _ in range(blocks):
            h = x
            for letter in reversed(word):
                if letter == "W":
                    h = h @ normal(width, width) * math.sqrt(sigma_w2 / width)
                    h = h + math.sqrt(sigma_b2) * normal(width)
                elif letter == "f":
                    h = FUNCTIONS[activation](h)
                elif letter == "B":
                    h = F.batch_norm(h, None, None, training=True, eps=1e-9)
                else:
                    h = F.layer_norm(h, h.shape[1:], eps=1e-9)
            x = forward * x.detach() + backward * (x - x.detach()) + scale * h
            x.retain_grad()
            stream.append(x)
        (x * normal(samples, width)).sum().backward()
        lengths = [x.detach().square().mean().log().item() for x in stream]
        logs.append([lengths, [x.grad.square().sum().log().item() for x in stream]])
    return np.mean(logs, axis=0)


CASES = [
    ("Wf", "relu", {"sigma_w2": 2.0}, 0.0),
    ("Wf", "tanh", {"sigma_w2": 2.0, "sigma_b2": 0.1}, 0.0),
    ("Wf", "sigmoid", {"sigma_w2": 4.0}, 0.0),
    ("Wf", "silu", {"sigma_w2": 3.0, "q0": 4.0}, 0.0),
    ("WfL", "relu", {"sigma_w2": 1.0}, 0.0),
    ("WfL", "gelu", {"sigma_w2": 1.0, "sigma_b2": 0.2}, 0.0),
    ("Wf", "gelu", {"sigma_w2": 2.0, "scale": 0.5}, 1.0),
    ("Wf", "tanh", {"sigma_w2": 1.5, "sigma_b2": 0.1, "q0": 2.0}, 1.0),
    ("WfWf", "relu", {"sigma_w2": 2.0, "scale": 0.4}, 1.0),
    ("WfW", "relu", {"sigma_w2": 1.5, "scale": 0.4}, 1.0),
    ("fW", "tanh", {"sigma_w2": 1.5, "q0": 0.5}, 1.0),
    ("fW", "erf", {"sigma_w2": 1.0, "scale": 0.7}, 1.0),
    ("WfL", "relu", {"sigma_w2": 2.0}, 1.0),
    ("WfLWfL", "tanh", {"sigma_w2": 1.0}, 1.0),
    ("WfB", "relu", {"sigma_w2": 2.0}, 1.0),
    ("WfBWfB", "relu", {"sigma_w2": 2.0, "q0": 0.5}, 1.0),
    ("WfBWfB", "sigmoid", {"sigma_w2": 2.0}, 1.0),
    ("BWf", "relu", {"sigma_w2": 2.0}, 1.0),
    ("fW", "tanh", {"sigma_w2": 1.5, "backward": 0.5}, 0.8),
]


@pytest.mark.parametrize(("word", "activation", "options", "skip"), CASES)
def test_profiles_are_those_of_simulated_networks(word, activation, options, skip):
    blocks = 5
    options = {"forward": skip, "backward": skip, **options}
    samples = 128 if "B" in word else 32
    lengths, gradients = simulated(word, activation, blocks=blocks, samples=samples, **options)
    renamed = {"scale": "branch_scale", "forward": "skip_forward", "backward": "skip_backward"}
    theirs = {renamed.get(name, name): value for name, value in options.items()}
    profile = theory.residual_profile(blocks, activation, branch=word, **theirs)
    np.testing.assert_allclose(np.log(profile.length), lengths, atol=0.08)
    np.testing.assert_allclose(profile.log_gradient, gradients - gradients[-1], atol=0.08)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("norm", "letter"), [("none", ""), ("layer", "L"), ("batch", "B")])
def test_plain_profile_is_that_of_blocks_without_skips(name, norm, letter):
    options = {"sigma_w2": 1.7, "negative_slope": SLOPE}
    plain = theory.plain_profile(9, name, norm=norm, q0=0.6, **options)
    blocks = theory.residual_profile(
        8, name, branch=f"Wf{letter}", q0=0.6 * 1.7, skip_forward=0.0, skip_backward=0.0, **options
    )
    np.testing.assert_allclose(plain.length, blocks.length, rtol=1e-12)
    np.testing.assert_allclose(plain.growth, blocks.growth, rtol=1e-12)
    if norm == "batch":
        np.testing.assert_allclose(plain.variance, blocks.variance, rtol=1e-12)
        assert plain.growth[1:] == pytest.approx(theory.batch_norm_growth(name, SLOPE))
    else:
        assert plain.variance is None


def test_plain_profile_uses_each_layers_own_length():
    profile = theory.plain_profile(4, "tanh", sigma_w2=1.5, sigma_b2=0.05, q0=2.0)
    q, lengths, growths = 1.5 * 2.0 + 0.05, [], []
    for _ in range(4):
        lengths.append(q)
        growths.append(1.5 * theory.slope_moment("tanh", q))
        q = 1.5 * theory.second_moment("tanh", q) + 0.05
    np.testing.assert_allclose(profile.length, lengths)
    np.testing.assert_allclose(profile.growth, growths[:3])
    expected = [growths[0] * growths[1] * growths[2], growths[1] * growths[2], growths[2], 1.0]
    np.testing.assert_allclose(profile.gradient, expected)
    weights = profile.weight_gradient(sigma_w2=1.5, sigma_b2=0.05)
    inputs = [2.0, *(theory.second_moment("tanh", q) for q in lengths[:3])]
    np.testing.assert_allclose(weights, np.multiply(expected, inputs) / inputs[-1])


def test_plain_profile_at_finite_batch():
    profile = theory.plain_profile(6, "relu", sigma_w2=2.0, norm="batch", batch=8)
    assert profile.growth[1:] == pytest.approx(theory.batch_norm_growth("relu", batch=8))
    assert profile.growth[0] * 2 == pytest.approx(profile.growth[1] * profile.variance[1])
    with pytest.raises(SpecError, match="norm=instance"):
        theory.plain_profile(6, "relu", sigma_w2=2.0, norm="instance")


def test_profile_outlives_underflow():
    profile = theory.plain_profile(1000, "sigmoid", sigma_w2=1.0)
    assert profile.gradient[0] == 0
    assert np.isfinite(profile.log_gradient).all()
    assert rounded(profile.mean_growth(4), "0.0557")


def test_branches_that_are_none():
    for word, message in (("WfX", "a word of W, f, B and L"), ("fW", "only if it is odd"),
                          ("WfWfB", "left of a B")):  # fmt: skip
        with pytest.raises(SpecError, match=message):
            theory.residual_profile(3, "relu", branch=word, sigma_w2=1.0)
    with pytest.raises(SpecError, match="branch=WfW has 2 W"):
        theory.residual_profile(3, "relu", branch="WfW", sigma_w2=(1.0, 2.0, 3.0))


# --- residual networks: published numbers ---------------------------------------------------------


def test_branches_of_two_maps_scaled_down():
    """(1 + α²)^L both ways, α = 1/√L: 2.697 at 64."""
    profile = theory.residual_profile(
        64, "relu", branch="WfW", sigma_w2=(2.0, 1.0), branch_scale=1 / 8
    )
    assert rounded(profile.gradient[0], "2.697")
    assert rounded(profile.length[-1], "2.697")


def test_tanh_residual_recursion():
    profile = theory.residual_profile(200, "tanh", branch="fW", sigma_w2=1.0)
    assert f"{profile.gradient[0]:.2e}" == "3.87e+06"
    q, logs = 1.0, 0.0
    for _ in range(200):
        logs += math.log1p(theory.slope_moment("tanh", q))
        q += theory.second_moment("tanh", q)
    assert profile.log_gradient[0] == pytest.approx(logs)
    # ln g grows as √L: over four times the depth about twice, not four times.
    short = theory.residual_profile(50, "tanh", branch="fW", sigma_w2=1.0)
    assert profile.log_gradient[0] / short.log_gradient[0] == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("v0", [1.0, 0.3])
def test_pre_activation_batch_norm_grows_as_a_power(maps, v0):
    profile = theory.residual_profile(100, "relu", branch="WfB" * maps, sigma_w2=2.0, q0=v0)
    c, offset = (PI / (PI - 1)) ** maps, v0 / (1 - 1 / PI)
    assert v0 != 1 or rounded(offset, "1.467")
    np.testing.assert_allclose(profile.growth, 1 + c / (np.arange(100) + offset), rtol=1e-12)
    deep = theory.residual_profile(3000, "relu", branch="WfB" * maps, sigma_w2=2.0, q0=v0)
    fit = np.polyfit(np.log(deep.variance[500:-500]), deep.log_gradient[500:-500], 1)[0]
    assert -fit == pytest.approx(theory.power_law_exponent(maps), rel=0.005)


def test_power_law_exponents():
    assert rounded(theory.power_law_exponent(1), "1.467")
    assert rounded(theory.power_law_exponent(2), "2.152")


def test_ratio_to_one():
    for depth in (10, 30, 100):
        printed = 1.076 / (depth / 2 + 1.47)
        assert theory.ratio_to_one(depth) == pytest.approx(printed, rel=1e-3)
    profile = theory.residual_profile(1000, "relu", branch="WfBWfB", sigma_w2=2.0)
    exact = math.sqrt(profile.growth[500]) - 1
    assert theory.ratio_to_one(1000) == pytest.approx(exact, rel=2e-3)


def test_batch_norm_last_adds_one_to_the_variance_a_block():
    profile = theory.residual_profile(60, "relu", branch="BWf", sigma_w2=2.0)
    np.testing.assert_allclose(profile.variance, np.arange(61) + 1.0)
    np.testing.assert_allclose(profile.length, np.arange(61) + 1.0)


def test_mean_path_lengths():
    blocks = 54
    unscaled = theory.residual_profile(blocks, "relu", sigma_w2=2.0)
    assert theory.mean_path_length(unscaled.growth) == pytest.approx(27)
    scaled = theory.residual_profile(blocks, "relu", sigma_w2=2.0, branch_scale=blocks**-0.5)
    assert rounded(theory.mean_path_length(scaled.growth), "0.98")
    normed = theory.residual_profile(blocks, "relu", branch="WfBWfB", sigma_w2=2.0)
    assert rounded(theory.mean_path_length(normed.growth), "6.25")


def test_binomial_paths():
    paths = theory.path_length_binomial(54)
    assert paths.mean == 27
    assert rounded(paths.sd, "3.67")
    assert rounded(100 * paths.share, "0.4537")
    assert theory.path_length_binomial(3, 0, 9).share == 1


def test_expected_depth_of_stochastic_depth():
    assert theory.expected_depth(54) == 40.25
    drops = [0.3 * block / 10 for block in range(1, 11)]
    assert theory.expected_depth(10, 0.3) == pytest.approx(10 - sum(drops))


def test_highway_gate():
    gate = float(special.expit(-4.0))
    assert rounded(theory.highway_growth(gate), "0.9647")
    assert theory.highway_growth(0.5, branch_chi=3.0) == 1


def test_shortcut_scaling():
    profile = theory.residual_profile(54, "relu", sigma_w2=2.0, branch_scale=0.0,
                                      skip_forward=0.5, skip_backward=0.5)  # fmt: skip
    assert math.sqrt(profile.gradient[0]) == pytest.approx(0.5**54, rel=1e-12)


def test_halves_of_a_skip():
    """Forward-only has the lengths of identity; backward-only those of plain."""
    a = theory.residual_profile(20, "tanh", branch="Wf", sigma_w2=1.0)
    forward, backward, plain = (
        theory.residual_profile(20, "tanh", sigma_w2=1.0, skip_forward=f, skip_backward=b)
        for f, b in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0))
    )
    np.testing.assert_array_equal(forward.length, a.length)
    np.testing.assert_array_equal(backward.length, plain.length)
    np.testing.assert_allclose(forward.growth, a.growth - 1)
    np.testing.assert_allclose(backward.growth, plain.growth + 1)


# --- cosines --------------------------------------------------------------------------------------


def test_relu_cosine_map():
    c = np.linspace(-1, 1, 41)
    poole = (np.sqrt(1 - c**2) + (PI - np.arccos(c)) * c) / PI
    np.testing.assert_allclose(theory.relu_cosine_map(c), poole, atol=1e-14)
    np.testing.assert_allclose(theory.relu_cosine_map(c, 1.0), c)
    assert theory.relu_cosine_map(0.3) == pytest.approx(
        theory.correlation_map("relu", 0.3, 5.0, sigma_w2=2.0)
    )


def test_relu_cosines_collapse():
    cosines = theory.cosine_profile(30, "relu", sigma_w2=2.0)
    assert rounded(cosines[10], "0.8715")
    assert rounded(cosines[30], "0.9720")


def test_tailored_slopes():
    for depth, printed in ((20, "0.181"), (50, "0.431"), (100, "0.570")):
        slope = theory.tailored_slope(depth)
        assert rounded(slope, printed)
        cosines = theory.cosine_profile(depth, "leaky_relu", sigma_w2=1.0, negative_slope=slope)
        assert cosines[-1] == pytest.approx(0.9, abs=1e-12)
    with pytest.raises(SpecError, match=r"cosine=0.9: allowed is above 0 and up to 0.4937"):
        theory.tailored_slope(2)


def test_cosines_follow_the_maps_layer_by_layer():
    options = {"sigma_w2": 1.5, "sigma_b2": 0.1}
    cosines = theory.cosine_profile(5, "tanh", q0=2.0, cosine=0.2, **options)
    q, c = 2.0, 0.2
    for found in cosines:
        assert found == pytest.approx(c, rel=1e-12)
        c = theory.correlation_map("tanh", c, q, **options)
        q = theory.length_map("tanh", q, **options)
    with pytest.raises(SpecError, match="cosines have no theory here with B"):
        theory.cosine_profile(5, "tanh", branch="WfB", sigma_w2=1.0)


@pytest.mark.parametrize(
    ("word", "skip"), [("Wf", 0.0), ("Wf", 1.0), ("WfL", 0.0), ("WfL", 1.0), ("WfWf", 1.0)]
)
def test_cosines_are_those_of_a_simulated_network(word, skip):
    """Mean over all pairs of 40 inputs, orthogonal at first."""
    width, blocks, samples = 1000, 4, 40
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, width, generator=generator)
    found = []
    for _ in range(blocks + 1):
        directions = F.normalize(x)
        cosines = directions @ directions.T
        found.append((cosines.sum().item() - samples) / (samples * (samples - 1)))
        h = x
        for letter in reversed(word):
            if letter == "W":
                h = h @ torch.randn(width, width, generator=generator) / math.sqrt(width / 2)
            else:
                h = F.relu(h) if letter == "f" else F.layer_norm(h, h.shape[1:])
        x = skip * x + h
    profile = theory.cosine_profile(blocks, "relu", branch=word, sigma_w2=2.0, skip_forward=skip)
    np.testing.assert_allclose(profile, found, atol=0.05)


def test_gradient_correlation():
    cosines = theory.cosine_profile(12, "relu", sigma_w2=2.0)
    angles = np.arccos(cosines)
    assert theory.gradient_correlation(cosines) == pytest.approx(np.prod(1 - angles / PI))
    assert theory.gradient_correlation([0.0]) == 0.5
    shared = theory.pair_expectation(slope_of("leaky_relu"), 1.0, 0.3)
    expected = shared / theory.slope_moment("leaky_relu", 1.0, SLOPE)
    assert theory.gradient_correlation([0.3], SLOPE) == pytest.approx(expected, rel=1e-12)


# --- convolutions, widths, formats ----------------------------------------------------------------


def test_padding_leak():
    assert rounded(theory.padding_leak(8), "0.9212")
    assert rounded(theory.padding_leak(2), "0.444")
    for size in (1, 2, 5, 8, 32):
        closed = ((1 + 2 * math.cos(PI / (size + 1))) / 3) ** 2
        assert theory.padding_leak(size) == pytest.approx(closed, rel=1e-12)
    both = theory.padding_leak((8, 2))
    assert both == pytest.approx(math.sqrt(theory.padding_leak(8) * theory.padding_leak(2)))
    assert theory.padding_leak(8, kernel=1) == 1
    with pytest.raises(SpecError, match="kernel=2"):
        theory.padding_leak(8, kernel=2)


def test_padding_profile_is_that_of_convolutions():
    """Squared kernels of mean 1/9 act on squared maps as the exact average over weights does."""
    kernel = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    squares = torch.full((1, 1, 6, 4), 1 / 24, dtype=torch.float64)
    profile = theory.padding_profile(40, (6, 4))
    for left in profile:
        assert left == pytest.approx(squares.sum().item(), rel=1e-12)
        squares = F.conv2d(squares, kernel, padding=1)
    assert profile[-1] / profile[-2] == pytest.approx(theory.padding_leak((6, 4)), rel=1e-6)


def test_jacobian_variances():
    values = [
        theory.jacobian_variance(name, 10, orthogonal=orthogonal)
        for name in ("linear", "relu")
        for orthogonal in (False, True)
    ]
    assert values == pytest.approx([10, 0, 20, 10], abs=1e-12)


def test_log_length_variance():
    variance = theory.log_length_variance([100] * 20)
    assert variance == pytest.approx(1.0)
    assert rounded(math.exp(-variance / 2), "0.607")


@pytest.mark.parametrize(
    ("growth", "measured"),
    [
        (1 / 2, {"fp16": 57, "bf16": 255, "fp32": 282}),
        (1 / 6, {"fp16": 22, "bf16": 104, "fp32": 115}),
        (0.0557, {"fp16": 13, "bf16": 65, "fp32": 72}),
        (2.0, {"fp16": 27, "bf16": 272, "fp32": 272}),
    ],
)
def test_underflow_depth_is_near_the_measured_one(growth, measured):
    for name, depth in measured.items():
        predicted = theory.underflow_depth(growth, name, elements=64 * 64)
        assert predicted == pytest.approx(depth, rel=0.15)


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "fp64"])
def test_formats_are_torchs(name):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32,
             "fp64": torch.float64}[name]  # fmt: skip
    smallest, largest = theory.FORMATS[name]
    info = torch.finfo(dtype)
    assert largest == info.max
    assert smallest == info.tiny * info.eps
    # Elements of one size: halved until they are zero.
    x, halvings = torch.ones((), dtype=dtype), 0
    while x > 0:
        x, halvings = x / 2, halvings + 1
    assert theory.underflow_depth(0.25, name) == pytest.approx(halvings)
    assert theory.underflow_depth(1.0, name) == math.inf


def test_unknown_format():
    with pytest.raises(SpecError, match="format=fp8: allowed is fp16, bf16, fp32, fp64"):
        theory.underflow_depth(0.5, "fp8")


# --- arguments that no network has ----------------------------------------------------------------

MANY = np.array([1.0, 2.0])
SENSELESS = [
    (lambda: theory.chi("relu", MANY, sigma_w2=2.0), "q=[1. 2.]: allowed is a number from 0"),
    (lambda: theory.second_moment("tanh", MANY), "q=[1. 2.]: allowed is a number from 0"),
    (lambda: theory.length_map("gelu", MANY, sigma_w2=1.0), "q=[1. 2.]: allowed is a number"),
    (lambda: theory.mean("tanh", math.nan), "q=nan: allowed is a number from 0"),
    (lambda: theory.chi("tanh", math.inf, sigma_w2=1.0), "q=inf: allowed is a number from 0"),
    (lambda: theory.chi("relu", 1.0, sigma_w2=-2.0), "sigma_w2=-2: allowed is a number from 0"),
    (lambda: theory.length_map("relu", 1.0, sigma_w2=1.0, sigma_b2=-1), "sigma_b2=-1: allowed"),
    (lambda: theory.correlation_map("relu", 0.5, 0.0, sigma_w2=2.0), "q=0: vectors of length 0"),
    (lambda: theory.pair_expectation(np.tanh, 1.0, 1.5), "c=1.5: allowed is a number from -1 to 1"),
    *[
        (lambda f=f, bad=bad: f("tanh", **{"sigma_w2": 1.5, **bad}), f"{key}=-0.1: allowed is")
        for f in (theory.length_fixed_point, theory.correlation_fixed_point, theory.depth_scale,
                  theory.length_depth_scale)
        for key, bad in ((k, {k: -0.1}) for k in ("sigma_w2", "sigma_b2", "q0"))
    ],
    (lambda: theory.critical_sigma_w2("tanh", -0.1), "sigma_b2=-0.1: allowed is a number from 0"),
    (lambda: theory.sigmas("pytorch", "relu", width=0), "width=0: allowed is a whole number"),
    *[
        (lambda f=f, bad=bad: f(bad, "relu", sigma_w2=2.0), f"{key}={bad}: allowed is a whole")
        for f, key in ((theory.plain_profile, "depth"), (theory.residual_profile, "blocks"),
                       (theory.cosine_profile, "blocks"))
        for bad in (0, -3, 2.5)
    ],
    (lambda: theory.plain_profile(3, "relu", sigma_w2=-1.0), "sigma_w2=-1: allowed"),
    (lambda: theory.plain_profile(3, "relu", sigma_w2=1.0, q0=0.0, norm="batch"),
     "q0=0: allowed is a number above 0"),
    (lambda: theory.plain_profile(3, "relu", sigma_w2=1.0).mean_growth(1), "trim=1: allowed is"),
    (lambda: theory.residual_profile(3, "relu", branch="WfW", sigma_w2=(1.0, -1.0)),
     "sigma_w2=-1: allowed"),
    (lambda: theory.residual_profile(3, "relu", branch="WfB", sigma_w2=1.0, q0=0.0),
     "branch=WfB: B is given a variance of 0"),
    (lambda: theory.cosine_profile(3, "relu", sigma_w2=1.0, cosine=2), "cosine=2: allowed is"),
    (lambda: theory.cosine_profile(3, "relu", sigma_w2=1.0, q0=0.0), "q=0: vectors of length 0"),
    (lambda: theory.power_law_exponent(0), "branch_layers=0: allowed is a whole number from 1"),
    (lambda: theory.ratio_to_one(0), "depth=0: allowed is a whole number from 1"),
    (lambda: theory.mean_path_length([2.0, 0.0]), "growth=0: allowed is a number above 0"),
    (lambda: theory.path_length_binomial(-1), "blocks=-1: allowed is a whole number from 1"),
    (lambda: theory.path_length_binomial(9, -1), "low=-1: allowed is a whole number from 0"),
    (lambda: theory.expected_depth(54, 1.5), "drop_rate=1.5: allowed is a number from 0 to 1"),
    (lambda: theory.highway_growth(1.5), "gate=1.5: allowed is a number from 0 to 1"),
    (lambda: theory.highway_growth(-0.1), "gate=-0.1: allowed is a number from 0 to 1"),
    (lambda: theory.highway_growth(0.5, -1.0), "branch_chi=-1: allowed is a number from 0"),
    (lambda: theory.tailored_slope(0), "depth=0: allowed is a whole number from 1"),
    (lambda: theory.padding_leak((8, 0)), "size=0: allowed is a whole number from 1"),
    (lambda: theory.padding_profile(-1, 8), "depth=-1: allowed is a whole number from 0"),
    (lambda: theory.jacobian_variance("relu", 0), "depth=0: allowed is a whole number from 1"),
    (lambda: theory.log_length_variance([9, 0]), "widths=0: allowed is a whole number from 1"),
    (lambda: theory.underflow_depth(0.0, "fp16"), "growth=0: allowed is a number above 0"),
    (lambda: theory.underflow_depth(-1, "fp16"), "growth=-1: allowed is a number above 0"),
    (lambda: theory.underflow_depth(0.5, "fp16", elements=0), "elements=0: allowed is a whole"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"), SENSELESS, ids=[f"{k}" for k in range(len(SENSELESS))]
)
def test_senseless_arguments_are_refused_in_one_line(call, message):
    with pytest.raises(SpecError) as caught:
        call()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_numbers_may_be_numpys_and_bounds_are_allowed():
    assert theory.length_map("relu", np.float32(2), sigma_w2=np.int64(3), sigma_b2=0) == 3
    assert theory.highway_growth(0) == theory.highway_growth(1) == 1
    assert theory.length_fixed_point("relu", sigma_w2=0.0, sigma_b2=0.3) == pytest.approx(0.3)
    assert theory.plain_profile(np.int64(1), "relu", sigma_w2=2.0).length == [2.0]
    # A branch that ends in a zero map has a variance of 0, which nothing divides by.
    still = theory.residual_profile(3, "relu", branch="WfBWfB", sigma_w2=(2.0, 0.0))
    assert still.growth.tolist() == [1, 1, 1]
