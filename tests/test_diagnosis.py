"""Diagnoses: on networks built to have one trouble alone, on healthy ones, and from a store."""

import math

import numpy as np
import pandas as pd
import patients
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gradflow
from gradflow import diagnosis, probes, schema, tables
from gradflow.diagnosis import diagnose_run, diagnose_tables
from gradflow.errors import GradflowError
from gradflow.recording import elements
from gradflow.recording.slopes import Slopes
from gradflow.spec import RunSpec

SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)))


def examined(make, *args, seed=0):
    torch.manual_seed(seed)
    return gradflow.diagnose(*make(*args))


# --- one trouble alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("depth", "width"), [(15, 64), (30, 32), (30, 128)])
@pytest.mark.parametrize("name", ["vanishing", "exploding"])
def test_a_gain_that_is_wrong_in_every_layer(name, depth, width, seed):
    found = examined(getattr(patients, name), depth, width, seed=seed)
    assert found.names == (name,)
    (one,) = found.findings
    gain = {"vanishing": 0.6, "exploding": 1.7}[name]
    slope = math.sqrt((1 + 0.8**2) / 2)  # of a leaky unit, root mean square
    assert one.evidence["rate"] == pytest.approx(gain * slope, rel=0.1)
    low, high = one.evidence["rate_low"], one.evidence["rate_high"]
    assert low <= one.evidence["rate"] <= high or math.isnan(low)
    assert one.layers[0] == "0"
    assert f"{one.evidence['rate']:.3g}× a layer" in one.sentence
    assert "arXiv" in one.advice


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("depth", [44, 56])
def test_plain_networks_with_batch_normalisation_explode(depth, seed):
    """Yang et al. 2019: √(π/(π − 1)) a layer; their gradients may be shattered as well."""
    found = examined(patients.exploding_bn, depth, seed=seed)
    assert set(found.names) - {"shattered"} == {"exploding"}
    assert found.findings[0].evidence["rate"] == pytest.approx(1.2, abs=0.05)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("depth", "width"), [(8, 64), (15, 32), (30, 128)])
def test_dead_units(depth, width, seed):
    found = examined(patients.dead, depth, width, seed=seed)
    assert found.names == ("dead units",)
    assert len(found.findings[0].layers) == depth - 1
    assert found.findings[0].evidence["dead_units"] >= 0.75


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize(("depth", "width"), [(3, 32), (4, 128), (5, 64)])
def test_saturated(depth, width, activation, seed):
    found = examined(patients.saturated, depth, width, activation, seed=seed)
    assert found.names == ("saturated",)
    assert len(found.findings[0].layers) == depth - 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("depth", "width"), [(6, 64), (15, 128)])
def test_underflow(depth, width, dtype, seed):
    found = examined(patients.underflow, depth, width, dtype, seed=seed)
    assert found.names == ("underflow",)
    assert found.findings[0].evidence["subnormal_share"] > 0.9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("depth", "width"), [(3, 32), (10, 64), (25, 128)])
def test_shattered(depth, width, seed):
    found = examined(patients.shattered, depth, width, seed=seed)
    assert found.names == ("shattered",)
    assert abs(found.findings[0].evidence["input_gradient_cosine"]) < 0.5
    gentle = examined(patients.shattered, depth, width, 1.0, seed=seed)
    assert gentle.names == ("healthy",)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("depth", "width"), [(5, 64), (15, 32), (30, 128)])
def test_collapsed_inputs(depth, width, seed):
    found = examined(patients.collapsed, depth, width, seed=seed)
    assert found.names == ("collapsed inputs",)
    assert found.findings[0].layers[0] == "2"  # whose bias it is
    assert len(found.findings[0].layers) == depth - 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_inputs_that_are_all_zero(activation, bias):
    """Nothing comes to any unit: neither biases nor the number format are to blame."""
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(16, 16, bias=bias), activation())]
    net = nn.Sequential(*layers, nn.Linear(16, 10, bias=bias))
    for layer in net[::2] if bias else ():
        nn.init.zeros_(layer.bias)
    found = gradflow.diagnose(net, (torch.zeros(32, 16), patients.labels()), patients.entropy)
    assert found.names == ("collapsed inputs",)
    assert found.findings[0].sentence == "the inputs of 0 are exactly zero: all of them are alike"
    assert "dead units" in found.unmeasured


def test_not_finite():
    torch.manual_seed(0)
    net, batch, loss = patients.he_mlp(8, 32)
    with torch.no_grad():
        net[6].weight[0, 0] = math.nan
    found = gradflow.diagnose(net, batch, loss)
    assert found.names[0] == "not finite"
    assert set(found.findings[0].layers) >= {"6", "8", "14"}


def test_a_layer_whose_units_are_all_off_silences_what_is_before_it():
    """And what comes after it knows nothing of the input."""
    torch.manual_seed(0)
    net, batch, loss = patients.he_mlp(8, 32)
    with torch.no_grad():
        net[6].bias.fill_(-100.0)
        net[8].bias.normal_()
    found = gradflow.diagnose(net, batch, loss)
    assert found.names == ("dead units", "collapsed inputs")
    assert found.findings[0].layers == ("0", "2", "4", "6")
    assert found.findings[0].evidence["dead_units"] == 1
    assert found.findings[1].layers[1:] == ("8", "10", "12", "14")


def test_a_branch_whose_units_are_all_off_is_dead_beside_its_skip():
    torch.manual_seed(0)
    blocks = [
        patients.Residual(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32, bias=bias))
        for bias in (True, False, True)
    ]
    with torch.no_grad():
        blocks[1].branch[0].bias.fill_(-100.0)
    found = gradflow.diagnose(nn.Sequential(*blocks), patients.vectors(32), patients.entropy)
    assert found.names == ("dead units",)
    assert found.findings[0].layers == ("1.branch.0",)
    assert not found.remarks


class Step(nn.Module):
    """A function without a slope: its outputs vary, and no gradient passes."""

    def forward(self, x):
        return torch.sign(x)


def test_a_function_without_a_slope_is_told_by_what_it_silences():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Step(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10))
    found = gradflow.diagnose(net, patients.vectors(8), patients.entropy)
    assert found.names == ("dead units",)
    assert found.findings[0].layers == ("0",)


def test_a_gradient_that_is_zero_everywhere_is_below_the_format_or_the_loss_is_flat():
    torch.manual_seed(0)
    net, batch, _ = patients.he_mlp(6, 32)
    found = gradflow.diagnose(net, batch, lambda output, _: 1e-60 * output.square().mean())
    assert found.names == ("underflow",)
    assert "the loss is flat" in found.findings[0].sentence
    assert found.unmeasured["dead units"] == "no layer has a gradient"


class Detached(nn.Module):
    """A network whose gradient ends before the layer of that number, for one of three reasons."""

    def __init__(self, net, place, how="detach"):
        super().__init__()
        self.net, self.place, self.how = net, place, how

    def forward(self, x):
        with torch.set_grad_enabled(self.how != "no_grad"):
            x = self.net[: self.place](x)
        x = x.detach() if self.how == "detach" else x
        return self.net[self.place :](x.round().long().float() if self.how == "round" else x)


@pytest.mark.parametrize("how", ["detach", "no_grad", "round"])
def test_trainable_layers_that_no_gradient_reaches_are_cut_off(how):
    torch.manual_seed(0)
    net, batch, loss = patients.he_mlp(8, 32)
    found = gradflow.diagnose(Detached(net, 6, how), batch, loss)
    assert found.names[0] == "cut off"
    assert found.findings[0].layers == ("net.0", "net.2", "net.4")
    assert "no gradient reaches 3 layers" in found.findings[0].sentence
    assert "detach()" in found.findings[0].advice
    assert "cut off" in found.unmeasured["shattered"]
    net[:6].requires_grad_(False)
    frozen = gradflow.diagnose(Detached(net, 6, how), batch, loss)
    assert "cut off" not in frozen.names
    assert not frozen.remarks


class Unused(nn.Module):
    """Beside its body a map that nothing runs, one whose output is dropped, and an idle scalar."""

    def __init__(self, body):
        super().__init__()
        self.body, self.idle, self.late = body, nn.Linear(4, 4), nn.Linear(10, 4)
        self.scalar = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        y = self.body(x)
        self.late(y)
        return y


def test_what_is_unused_is_not_cut_off():
    torch.manual_seed(0)
    net, batch, loss = patients.he_mlp(8, 32)
    assert gradflow.diagnose(Unused(net), batch, loss).names == ("healthy",)


# --- healthy --------------------------------------------------------------------------------------

HEALTHY = [
    "he_mlp", "orthogonal_tanh", "residual_bn", "preln_transformer", "lstm", "unet", "vgg_bn",
    "mixer", "densenet", "selu", "vit", "autoencoder", "zero_init_residual", "rezero",
]  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(name, seed):
    found = examined(getattr(patients, name), seed=seed)
    assert found.names == ("healthy",)
    assert math.isfinite(found.findings[0].evidence["first_over_last"])
    assert found.findings[0].advice == ""
    assert "vanishing and exploding" not in found.unmeasured


class Cell(nn.Module):
    """A loop over a cell: its gradient vanishes through time."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNNCell(16, 32), nn.Linear(32, 10)

    def forward(self, x):
        state = None
        for step in x.unbind(dim=1):
            state = self.cell(step, state)
        return self.head(state)


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (patients.lstm, "lstm"),
        (lambda: (Cell(), (torch.randn(8, 50, 16), patients.labels(8)), patients.entropy), "cell"),
    ],
)
def test_recurrent_layers_are_healthy_as_layers_only(make, layer):
    found = examined(make)
    assert found.names == ("healthy",)
    assert "through time it was not measured" in found.lines()[0]
    why = f"layers are compared, steps of {layer} are not"
    assert f"not measured: vanishing through time ({why})" in str(found).splitlines()


@pytest.mark.parametrize(("name", "layers"), [("zero_init_residual", 10), ("rezero", 12)])
def test_what_an_initial_zero_holds_up_is_remarked(name, layers):
    found = examined(getattr(patients, name))
    assert found.remarks[0].startswith(f"{layers} layers have no gradient yet")


@pytest.mark.parametrize("seed", SEEDS)
def test_branches_that_were_dropped_are_not_dead(seed):
    torch.manual_seed(seed)
    net = gradflow.build_network("cifar", depth=56, skip="stochastic_depth", drop_rate=0.5)
    found = gradflow.diagnose(net, patients.images(8), patients.entropy)
    assert found.names == ("healthy",)
    assert "the rest goes around" in found.remarks[0]


@pytest.mark.slow
def test_trained_networks_are_healthy():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    for net in (patients.mlp(5, 64, patients.HE), patients.mlp(10, 64, patients.orthogonal())):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        for _ in range(200):
            chosen = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
        found = gradflow.diagnose(net, (x[:64], y[:64]), functional.cross_entropy)
        assert found.names == ("healthy",)


# --- one call -------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 10)
    )
    net[1].eval()
    x, y = patients.vectors(8)
    net(x).sum().backward()
    gradients = [p.grad for p in net.parameters()]
    copies = [g.clone() for g in gradients]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    gradflow.diagnose(net, (x, y), functional.cross_entropy)
    assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
    assert all(torch.equal(*pair) for pair in zip(gradients, copies, strict=True))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net] == [True, False, True, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_weights_that_a_pass_renormalises_are_put_back():
    net = nn.Sequential(nn.Embedding(9, 8, max_norm=1.0), nn.Linear(8, 8), nn.Linear(8, 4))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradflow.diagnose(net, torch.arange(9))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_lazy_modules_are_initialised():
    net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(4))
    assert gradflow.diagnose(net, patients.vectors(8)[0]).names == ("healthy",)
    assert net[0].weight.shape == (8, 8)
    assert net[0].weight.grad is None


def test_a_diagnosis_in_a_watched_loop_is_no_part_of_the_step():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10))
    x, y = patients.vectors(8)
    tables = []
    for diagnosed in (False, True):
        with gradflow.Recorder(net, schedule=lambda step: True) as recorder:
            for _ in range(2):
                net.zero_grad()
                loss = functional.cross_entropy(net(x), y)
                if diagnosed:
                    gradflow.diagnose(net[:2], x)  # a part of what is watched
                loss.backward()
                recorder.step(loss)
        tables.append([recorder.table(name) for name in ("modules", "weights", "outputs", "steps")])
    for one, other in zip(*tables, strict=True):
        assert one.equals(other)


def test_the_model_is_left_as_it_was_where_the_loss_fails():
    net = nn.Linear(8, 10)
    with pytest.raises(ValueError, match="batch_size"):
        gradflow.diagnose(net, (torch.randn(4, 8), torch.zeros(5).long()), patients.entropy)
    assert not net._forward_hooks
    assert net.weight.grad is None


def test_batches_of_other_forms():
    torch.manual_seed(0)
    net, (x, _), _ = patients.he_mlp(6, 32)
    assert gradflow.diagnose(net, x).names == ("healthy",)
    assert gradflow.diagnose(net, x, lambda output: output.square().mean()).names == ("healthy",)
    found = gradflow.diagnose(net, {"input": x})
    assert found.names == ("healthy",)
    assert "shattered" in found.unmeasured
    tokens, (indices, labels), loss = patients.preln_transformer(2, 16)
    found = gradflow.diagnose(tokens, [indices, labels], loss)
    assert "shattered" in found.unmeasured


class Added(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, a, b):
        return self.net(a + b)


def test_several_inputs_are_positional():
    torch.manual_seed(0)
    net, (x, y), loss = patients.he_mlp(6, 32)
    expected = gradflow.diagnose(net, (x, y), loss)
    for batch in (((x - 1, torch.ones(())), y), [[x - 1, torch.ones(())], y]):
        found = gradflow.diagnose(Added(net), batch, loss)
        assert found.names == ("healthy",)
        assert found.findings[0].evidence == pytest.approx(expected.findings[0].evidence, rel=1e-3)
    assert gradflow.diagnose(Added(net), ((x, x),)).names == ("healthy",)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"of shape \(32,\)"),
        (lambda output, _: (output.mean(), output), "a tuple"),
        (lambda output, _: output.mean().item(), "a float"),
    ],
)
def test_a_loss_that_is_not_one_number_is_an_error_of_ours(loss, what):
    words = f"the loss has to be a tensor of one element, and is {what}$"
    with pytest.raises(GradflowError, match=words):
        gradflow.diagnose(nn.Linear(8, 10), patients.vectors(8), loss)


def test_what_is_no_module_is_an_error_of_ours():
    with pytest.raises(GradflowError, match=r"model is function, wants a torch\.nn\.Module"):
        gradflow.diagnose(lambda x: x, torch.ones(2, 8))


def test_inference_mode_is_left_for_a_diagnosis():
    model = nn.Linear(8, 10)
    batch = patients.vectors(8)
    with torch.inference_mode():
        found = gradflow.diagnose(model, batch, functional.cross_entropy)
        assert torch.is_inference_mode_enabled()
    assert str(found) == str(gradflow.diagnose(model, batch, functional.cross_entropy))


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_outputs_of_another_step_say_nothing_of_one_that_is_not_finite(value):
    """They were zero at step 8; at step 9 the gradient is NaN, or as it was."""
    about = {"kind": "linear", "shape": "4x4", "stage": 1}
    names = {"layer": [f"layers.{i}" for i in range(6)], "position": np.arange(6.0)}
    weights = pd.DataFrame(names | about | {"step": 9, "weight_grad_norm": value})
    gradients = [0.0] * 5 + [1.0]
    outputs = pd.DataFrame(names | about | {"step": 8, "output_grad_norm": gradients})
    found = diagnose_tables(weights, outputs, step=9)
    assert found.names == (("not finite",) if value != value else ("dead units",))
    if value != value:
        (one,) = found.findings
        assert one.sentence == "NaN or Inf: gradients of weights in 6 modules"


@pytest.mark.parametrize("batch", [(torch.ones(0, 8), torch.ones(0).long()), torch.ones(0, 8), ()])
def test_an_empty_batch_is_an_error_of_ours(batch):
    with pytest.raises(GradflowError, match="the batch is empty"):
        gradflow.diagnose(nn.Linear(8, 10), batch)


class Gaussian(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return torch.distributions.Normal(self.net(x), 1.0)


def test_an_output_that_cannot_be_read_wants_a_loss():
    torch.manual_seed(0)
    net, (x, _), _ = patients.he_mlp(6, 32)
    with pytest.raises(GradflowError, match="output has no floating-point tensor"):
        gradflow.diagnose(Gaussian(net), x)
    found = gradflow.diagnose(
        Gaussian(net), x, lambda output: -output.log_prob(torch.ones(())).mean()
    )
    assert found.names == ("healthy",)
    assert found.unmeasured["shattered"] == "no probe of the gradient at neighbouring inputs"


def test_few_samples_cannot_tell_dead_units():
    torch.manual_seed(0)
    net, _, loss = patients.dead(8, 64)
    found = gradflow.diagnose(net, patients.vectors(64, 8), loss)
    assert found.unmeasured["dead units"]


def test_a_model_without_gradients_is_an_error_of_ours():
    with pytest.raises(GradflowError, match="no parameter"):
        gradflow.diagnose(nn.Linear(4, 2).requires_grad_(False), torch.randn(4, 4))


def test_it_prints_and_draws():
    found = examined(patients.exploding_bn, 56)
    lines = str(found).splitlines()
    assert lines[0].startswith("diagnosis: exploding")
    assert any(line.startswith("exploding: the norm of the weights' gradient") for line in lines)
    assert any(line.startswith("  layers: layer1.0.conv1, ") for line in lines)
    assert any(line.startswith("  usually helps: Add skip connections") for line in lines)
    assert any(line.startswith("not measured: saturated") for line in lines)
    assert "exploding" in found.plot().get_suptitle()


def test_every_diagnosis_says_what_helps():
    assert set(diagnosis.ADVICE) == set(diagnosis.NAMES)
    assert all(diagnosis.ADVICE[name] for name in diagnosis.NAMES if name != "healthy")


# --- from a store ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"norm": "none", "activation": "sigmoid", "init": "xavier"}, "vanishing"),
        ({"norm": "none"}, "healthy"),
    ],
)
def test_a_run_of_gradflows_own(tmp_path, keys, name):
    spec = RunSpec(network="mlp", depth=30, skip="none", max_steps=0, **keys)
    (found,) = diagnose_run(gradflow.run(spec, runs_dir=str(tmp_path)))
    assert found.names == (name,)
    assert found.step == 0
    assert set(found.unmeasured) == {
        "underflow", "dead units", "saturated", "collapsed inputs", "shattered"
    }  # fmt: skip


def test_a_users_run_is_told_at_its_first_and_at_its_last_step(tmp_path):
    torch.manual_seed(0)
    net, (x, _), _ = patients.he_mlp(12, 32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with gradflow.Recorder(net, save=tmp_path / "mine") as recorder:
        for step in range(4):
            optimizer.zero_grad()
            net(x).mean().backward()
            recorder.step()
            with torch.no_grad():
                for layer in net[2:-1:2] if step == 2 else ():
                    layer.weight *= 0.3
    first, last = (found for run in gradflow.load_runs(tmp_path) for found in diagnose_run(run))
    assert (first.step, first.names) == (0, ("healthy",))
    assert (last.step, last.names) == (3, ("vanishing",))
    assert str(last).startswith("after 3 updates: vanishing")
    assert first.unmeasured["dead units"] == "dead_units not recorded"


@pytest.mark.parametrize("how", ["detach", "no_grad"])
def test_a_run_cannot_tell_layers_that_are_cut_off_from_frozen_ones(tmp_path, how):
    torch.manual_seed(0)
    net, (x, _), _ = patients.he_mlp(8, 32)
    with gradflow.Recorder(Detached(net, 6, how), save=tmp_path / "mine") as recorder:
        for _ in range(8):  # the last of which measures gradients of weights alone
            recorder.model(x).mean().backward()
            recorder.step()
    ((first, last),) = map(diagnose_run, gradflow.load_runs(tmp_path))
    for found in (first, last):
        assert found.names == ("healthy",)
        assert "cut off" not in found.findings[0].sentence
        (remark,) = found.remarks
        assert remark.startswith("3 layers have no gradient (frozen, unused in this step, or cut")
        assert remark.endswith(": net.0, net.2, net.4")
        assert found.lines()[-1] == remark
        why = "layers that are frozen or unused have no gradient either"
        assert found.unmeasured["cut off"] == why


def profile_of(norms, **columns):
    layers = [f"layers.{i}" for i in range(len(norms))]
    return pd.DataFrame(
        {"step": 0, "layer": layers, "position": range(len(norms)), "kind": "linear"}
        | {"stage": 1, "shape": "32x32", "weight_grad_norm": norms}
        | columns
    )


@pytest.mark.parametrize(
    ("factor", "depth", "name"),
    [
        (1.2, 20, "healthy"),  # 1.2^19 = 32
        (1.2, 40, "exploding"),
        (0.8, 40, "vanishing"),
        (1.02, 100, "healthy"),  # 1.02^99 = 7
    ],
)
def test_thresholds_of_growth(factor, depth, name):
    norms = factor ** np.arange(depth, 0, -1.0)
    assert diagnose_tables(profile_of(norms)).names == (name,)


def test_a_change_without_a_law_counts_beyond_three_decades():
    rng = np.random.default_rng(0)
    noise = np.exp(rng.normal(size=20))

    def found(decades):
        steps = np.where(np.arange(20) < 10, 10.0**-decades, 1.0)
        return diagnose_tables(profile_of(noise * steps)).findings[0]

    assert found(2).name == "healthy"
    assert found(4).name == "vanishing"
    assert "(no exponential fits)" in found(4).sentence
    assert "rate" not in found(4).evidence


def test_a_law_of_some_layers_only_is_not_one_of_the_network():
    norms = np.r_[1.5 ** np.arange(11, 0, -1.0), np.ones(90)]
    stage = [1] * 11 + [2] * 90
    found = diagnose_tables(profile_of(norms * np.r_[np.full(11, 2.0), np.ones(90)], stage=stage))
    assert found.names == ("healthy",)


def test_zeros_beside_a_gradient_at_the_end_of_float32_are_underflow():
    norms = np.r_[np.zeros(5), 10.0 ** np.arange(-42, 0, 3.0)]
    found = diagnose_tables(profile_of(norms))
    assert found.names == ("underflow", "vanishing")
    assert "at most" in found.findings[1].sentence


def arrow(frame):
    return schema.to_pandas(pa.Table.from_pandas(frame, preserve_index=False))


def categories(frame):
    return frame.astype(dict.fromkeys(["layer", "kind", "shape"], "category"))


def shuffled(frame):
    return frame.sample(frac=1, random_state=0)


@pytest.mark.parametrize("other", [arrow, categories, shuffled])
@pytest.mark.parametrize("patient", [("exploding_bn", 44), ("dead", 8, 64), ("rezero",)])
def test_the_same_is_said_of_frames_of_other_types_and_orders(patient, other):
    """Of columns that are measured in each row: numpy has no null."""
    name, *sizes = patient
    frames = examined(getattr(patients, name), *sizes).tables
    texts = dict.fromkeys(["layer", "kind", "shape"], object)
    measured = [frames[table].dropna(axis=1) for table in ("weights", "outputs")]
    plain = [frame.astype({name: texts.get(name, float) for name in frame}) for frame in measured]
    expected, found = diagnose_tables(*plain), diagnose_tables(*map(other, plain))
    assert found.findings == expected.findings
    assert str(found) == str(expected)
    assert found.tables["outputs"].equals(other(plain[1]))


def test_a_null_was_not_measured_and_a_nan_was():
    norms = [1.0, None, math.nan, 1.0, 1.0, 1.0]
    frame = profile_of(norms)
    assert diagnose_tables(frame).findings[0].layers == ("layers.1", "layers.2")
    frame["weight_grad_norm"] = pd.Series(pa.array(norms), dtype=pd.ArrowDtype(pa.float64()))
    assert diagnose_tables(frame).findings[0].layers == ("layers.2",)


def test_without_stages_and_shapes_there_is_a_change_and_no_rate():
    frame = profile_of(0.5 ** np.arange(20, 0, -1.0)).drop(columns=["stage", "shape"])
    (found,) = diagnose_tables(frame).findings
    assert found.name == "vanishing"
    assert "fewer than 5 like layers" in found.sentence


def test_nothing_recorded_is_an_error_and_a_missing_step_too():
    with pytest.raises(GradflowError, match="nothing to diagnose"):
        diagnose_tables(pd.DataFrame())
    with pytest.raises(GradflowError, match="step=7"):
        diagnose_tables(profile_of(np.ones(6)), step=7)


def test_without_a_gradient_of_layers_it_is_not_called_healthy():
    frame = profile_of(np.ones(6)).drop(columns="weight_grad_norm").assign(weight_norm=1.0)
    found = diagnose_tables(frame)
    assert found.names == ()
    assert "no diagnosis: the gradient of the layers was not measured" in str(found)
    with pytest.raises(GradflowError):
        found.plot()


def zero_head():
    net, batch, loss = patients.he_mlp(6, 32)
    nn.init.zeros_(net[-1].weight)
    return net, batch, loss


def frozen_but_the_head():
    net, batch, loss = patients.he_mlp(6, 32)
    net[:-1].requires_grad_(False)
    return net, batch, loss


def embedded():
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4)), torch.arange(9)


def one_layer():
    return nn.Linear(8, 4), torch.randn(32, 8)


@pytest.mark.parametrize("make", [zero_head, frozen_but_the_head, embedded, one_layer])
def test_one_layer_with_a_gradient_is_too_few_to_compare(make):
    found = examined(make)
    assert found.names == ()
    told = "no diagnosis: fewer than two layers to compare have a finite gradient that is not zero"
    assert str(found).startswith(f"diagnosis: {told}")
    assert told in found.lines()[0]


def test_the_frame_of_a_run_says_so_too(tmp_path):
    with gradflow.Recorder(nn.Linear(8, 4), save=tmp_path / "mine") as recorder:
        recorder.model(torch.randn(4, 8)).mean().backward()
        recorder.step()
    (row,) = diagnosis.diagnoses(next(iter(gradflow.load_runs(tmp_path)))).itertuples()
    assert (row.moment, row.diagnosis) == ("first", "not measured")
    assert row.sentence.startswith("fewer than two layers to compare")


def test_the_records_shattering_is_read_at_lag_one():
    lags = pd.DataFrame(
        {"step": 0, "probe": "gradient_autocorrelation", "x_name": "lag"}
        | {"x": [1.0, 2.0], "value": [0.1, 0.9]}
    )
    assert diagnose_tables(profile_of(np.ones(6)), probes=lags).names == ("shattered",)


# --- quantities -----------------------------------------------------------------------------------


def test_spread_is_one_minus_the_mean_cosine_of_outputs_of_equal_norm():
    torch.manual_seed(0)
    y = functional.normalize(torch.randn(16, 5) + 2, dim=1)
    expected = 1 - float((y @ y.T).mean())
    assert elements.spread(y, 16).item() == pytest.approx(expected, rel=1e-5)
    assert elements.spread(1e-30 * y, 16).item() == pytest.approx(expected, rel=1e-5)
    assert elements.spread(y.expand(16, 16, 5)[0][:1].expand(16, 5), 16) == 0
    assert elements.spread(torch.zeros(16, 5), 16).isnan()
    assert elements.spread(y, 8) is None


def test_alive_units_by_channel_and_by_feature():
    gradient = torch.zeros(4, 3, 2, 2)
    gradient[1, 2, 0, 1] = 1e-40
    axis = elements.unit_axis(nn.Conv2d(3, 3, 1), gradient, 4)
    assert elements.reached_units(gradient, axis).tolist() == [False, False, True]
    tokens = torch.zeros(4, 5, 3)
    tokens[0, 0, 1] = 1.0
    axis = elements.unit_axis(nn.LayerNorm(3), tokens, 4)
    assert elements.reached_units(tokens, axis).tolist() == [False, True, False]


def test_subnormals():
    values = torch.tensor([0.0, 1e-40, -1e-40, 1e-37, 1.0])
    assert elements.subnormals(values).item() == 2
    assert elements.subnormals(torch.tensor([5e-5, 7e-5]).half()).item() == 1


@pytest.mark.parametrize(
    ("function", "x", "flat"),
    [
        (torch.tanh, [0.0, 2.1, 2.3, -9.0], 2),
        (nn.Tanh(), [0.0, 2.1, 2.3, -9.0], 2),
        (functional.sigmoid, [0.0, 4.3, 4.4, -9.0], 2),
        (functional.hardtanh, [0.0, 0.9, 1.1, -2.0], 2),
    ],
)
def test_flat_activations_however_they_are_written(function, x, flat):
    found = []
    with Slopes(lambda *numbers: found.append(numbers)):
        function(torch.tensor(x, requires_grad=True))
    assert found == [(flat, 4)]


def test_relu6_does_not_saturate():
    found = []
    with Slopes(lambda *numbers: found.append(numbers)):
        functional.relu6(torch.randn(4))
    assert found == []


def test_gradients_of_neighbours():
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    (same,) = probes.gradient_cosine(nn.Linear(16, 4), x)
    assert same.value == pytest.approx(1)
    waves = nn.Sequential(patients.Waves(16, 1e5), nn.Linear(16, 4))
    (other,) = probes.gradient_cosine(waves, x)
    assert abs(other.value) < 0.5
    (zero,) = probes.gradient_cosine(nn.Sequential(nn.Linear(16, 4), Step()), x)
    assert math.isnan(zero.value)


class Checkpointed(nn.Module):
    """The same function, whose backward pass refuses `torch.autograd.grad`."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=True)


def test_gradients_of_neighbours_through_reentrant_checkpointing():
    torch.manual_seed(0)
    net, (x, _), _ = patients.he_mlp(6, 32)
    (plain,) = probes.gradient_cosine(net, x)
    (same,) = probes.gradient_cosine(Checkpointed(net), x)
    assert same.value == plain.value
    assert 0.5 < same.value < 1
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("place", [1, 3])
def test_gradients_of_neighbours_where_the_way_to_the_input_is_cut(place):
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    (cut,) = probes.gradient_cosine(Detached(net, place), torch.ones(4, 8))
    assert math.isnan(cut.value)


def test_the_interval_of_a_rate_counts_layers_that_depend_on_each_other_once():
    rng = np.random.default_rng(0)
    line = -0.2 * np.arange(40)
    exact = tables.fit_rate(np.exp(line))
    assert exact.low == pytest.approx(exact.high, rel=1e-6)
    alone = tables.fit_rate(np.exp(line + 0.05 * rng.normal(size=40)))
    walk = tables.fit_rate(np.exp(line + 0.05 * rng.normal(size=40).cumsum()))
    assert alone.low < math.exp(0.2) < alone.high
    assert walk.high - walk.low > 3 * (alone.high - alone.low)


def test_the_interval_of_a_rate_holds_as_often_as_it_says():
    rng = np.random.default_rng(1)
    line, inside = -0.2 * np.arange(40), 0
    for _ in range(400):
        rate = tables.fit_rate(np.exp(line + 0.1 * rng.normal(size=40)))
        inside += rate.low <= math.exp(0.2) <= rate.high
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_torchscript_runs_is_no_hindrance():
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), scripted, nn.Linear(16, 4))
    batch = torch.randn(64, 16), torch.randint(4, (64,))
    with pytest.warns(UserWarning, match=r"TorchScript.*: 2\.0$"):
        found = gradflow.diagnose(model, batch, nn.functional.cross_entropy)
    assert found.names == ("healthy",)


@pytest.mark.parametrize("unknown", [None, np.nan])
def test_layers_of_unknown_kind_are_compared_all_together(unknown):
    """They are not known to be alike: two interleaved kinds, one with smaller gradients."""
    count = 12
    frame = pd.DataFrame(
        {
            "step": 0,
            "layer": [f"b{i}.{'xy'[i % 2]}" for i in range(count)],
            "kind": unknown,
            "position": np.arange(count, dtype=float),
            "stage": 1,
            "shape": "3x3",
            "weight_grad_norm": [
                (1e-5 if i < 6 else 1.0) * (1 if i % 2 else 1e-4) for i in range(count)
            ],
        }
    )
    (found,) = diagnosis.diagnose_tables(frame).findings
    assert found.evidence["first_over_last"] == pytest.approx(1e-9)
    assert found.evidence["layers"] == count
