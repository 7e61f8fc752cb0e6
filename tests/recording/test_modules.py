"""Modules of all kinds, against autograd by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from recorded import ALWAYS, cells, column, loop, near, norm, record, rms
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from gradflow import Recorder, build_network
from gradflow.recording.modules import all_tensors
from gradflow.store import Run


def test_a_module_used_twice_has_one_row() -> None:
    """Norms combine as √Σ², RMS over all elements, of calls of different sizes."""
    network = nn.Linear(4, 4)
    inputs = [torch.randn(3, 4), torch.randn(5, 4)]
    outputs: list[Tensor] = []

    def loss() -> Tensor:
        outputs[:] = [network(inputs[0]), network(inputs[1])]
        for output in outputs:
            output.retain_grad()
        return outputs[0].pow(3).sum() + 2 * outputs[1].pow(2).sum()

    recorder = record(network, loss)
    gradients = [norm(output.grad) for output in outputs if output.grad is not None]
    (row,) = recorder.table("outputs").to_dict("records")
    assert row["output_rms"] == near(rms(*outputs), rel=1e-6)
    assert row["output_grad_norm"] == near(math.hypot(*gradients), rel=1e-6)
    assert row["calls"] == 2
    assert len(gradients) == 2
    whole = [norm(p.grad) for p in network.parameters() if p.grad is not None]
    assert column(recorder, "weights", "weight_grad_norm")["Linear"] == near(
        math.hypot(*whole), rel=1e-6
    )


def test_accumulated_batches_are_one_step() -> None:
    """Gradients sum over the batches; outputs combine as those of a module called twice."""
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    batches = torch.randn(2, 6, 4)
    outputs: list[Tensor] = []
    with Recorder(network) as recorder:
        for batch in batches:
            output = network(batch)
            output.retain_grad()
            outputs.append(output)
            (output.square().mean() / 2).backward()
        recorder.step()
    gradients = [norm(p.grad) for p in network[2].parameters() if p.grad is not None]
    assert column(recorder, "weights", "weight_grad_norm")["2"] == near(
        math.hypot(*gradients), rel=1e-6
    )
    assert column(recorder, "outputs", "output_rms")["2"] == near(rms(*outputs), rel=1e-6)
    by_output = [norm(output.grad) for output in outputs if output.grad is not None]
    assert column(recorder, "outputs", "output_grad_norm")["2"] == near(
        math.hypot(*by_output), rel=1e-6
    )
    assert recorder.table("weights")["step"].tolist() == [0, 0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.norm(self.embedding(tokens)))


def test_tied_weights_count_once_for_the_first_module() -> None:
    network = Tied()
    recorder = record(network, lambda: network(torch.arange(5)).square().sum())
    modules = recorder.table("modules").set_index("layer")
    assert modules["parameters"].to_dict() == {"embedding": 28, "norm": 8, "decoder": 7}
    assert modules["kind"].to_dict() == {
        "embedding": "embedding", "norm": "norm", "decoder": "linear"
    }  # fmt: skip
    found = column(recorder, "weights", "weight_grad_norm")
    assert network.embedding.weight.grad is not None
    assert found["embedding"] == near(norm(network.embedding.weight.grad), rel=1e-6)
    assert network.decoder.bias.grad is not None
    assert found["decoder"] == near(norm(network.decoder.bias.grad), rel=1e-6)
    total = math.hypot(*(norm(p.grad) for p in network.parameters() if p.grad is not None))
    assert math.hypot(*found.values()) == near(total, rel=1e-6)


def test_frozen_parameters_have_a_norm_and_no_gradient() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    network[0].requires_grad_(False)
    network[1].bias.requires_grad_(False)
    recorder = record(network, lambda: network(torch.randn(2, 3)).sum())
    gradients = column(recorder, "weights", "weight_grad_norm")
    assert gradients["0"] is None
    assert gradients["1"] == near(norm(network[1].weight.grad), rel=1e-6)
    whole = torch.cat([network[0].weight.flatten(), network[0].bias])
    assert column(recorder, "weights", "weight_norm")["0"] == near(norm(whole), rel=1e-6)
    outputs = column(recorder, "outputs", "output_grad_norm")
    assert outputs["0"] is None  # nothing before it asks for a gradient
    assert outputs["1"] > 0
    assert column(recorder, "outputs", "output_rms")["0"] > 0


def test_a_parameter_without_gradient_in_some_steps_is_null_there() -> None:
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with Recorder(network) as recorder:
        for used in ("a", "b", "a"):
            network.zero_grad()
            network[used](torch.randn(3, 2)).square().sum().backward()
            recorder.step()
    found = cells(recorder.table("weights"), "weight_grad_norm")
    assert [place for place, value in found.items() if value is None] == [
        (0, "b"), (1, "a"), (2, "b")
    ]  # fmt: skip
    assert all(value is None or value > 0 for value in found.values())
    assert set(cells(recorder.table("outputs"), "output_rms")) == {(0, "a"), (1, "b"), (2, "a")}
    calls = recorder.table("modules").set_index("layer")["calls"].to_dict()
    assert calls == {"a": 1, "b": 1}


class Shuffled(nn.Module):
    """Executed in another order than declared, `spare` never."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.last, self.first = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def test_positions_are_those_of_execution_and_unused_modules_come_last() -> None:
    network = Shuffled()
    recorder = record(network, lambda: network(torch.randn(2, 3)).sum())
    modules = recorder.table("modules")
    assert modules["layer"].tolist() == ["first", "last", "spare"]
    assert modules["position"].tolist() == [0, 1, 2]
    assert modules["calls"].tolist() == [1, 1, 0]
    assert recorder.table("weights")["layer"].tolist() == ["first", "last", "spare"]
    assert recorder.table("weights").sort_values("layer")["position"].tolist() == [0, 1, 2]


class Transformer(nn.Module):
    """A ViT's parts: parameters of its own that come first, attention, an unused head."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.head = nn.Linear(4, 2), nn.Linear(4, 2)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.patches = nn.Conv1d(3, 4, 1)
        self.pos = nn.Parameter(torch.zeros(5, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).permute(2, 0, 1) + self.pos).mean(0))


def test_positions_in_a_transformer() -> None:
    """A container comes before its parts, and what it uses without calling it behind it."""
    network = Transformer()
    recorder = record(network, lambda: network(torch.randn(2, 3, 5)).square().sum())
    layers = [
        "Transformer", "patches",
        *(f"layers.layers.{i}.{name}" for i in range(2) for name in (
            "self_attn", "self_attn.out_proj", "norm1", "linear1", "linear2", "norm2"
        )),
        "head", "spare",
    ]  # fmt: skip
    modules = recorder.table("modules")
    assert modules["layer"].tolist() == layers
    assert recorder.table("weights")["layer"].tolist() == layers
    assert modules["position"].tolist() == list(range(len(layers)))
    named = modules.set_index("layer")
    first = named.loc[[name for name in layers if ".0." in name]]
    assert first["kind"].tolist() == ["other", "linear", "norm", "linear", "linear", "norm"]
    assert first["calls"].tolist() == [1, 0, 1, 1, 1, 1]
    # In order of appearance: maps of 5, then widths of 8, 4 and 2.
    assert first["stage"].tolist() == [1, 1, 1, 2, 3, 3]
    assert named.loc["layers.layers.1.self_attn.out_proj", "stage"] == 3
    assert named.loc[["Transformer", "patches", "head"], "stage"].tolist() == [1, 1, 4]
    assert named.loc["spare", ["kind", "calls"]].tolist() == ["linear", 0]
    assert named["stage"].isna().tolist() == [name == "spare" for name in layers]


def test_what_is_executed_later_is_merged_into_the_order() -> None:
    network = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"})
    with Recorder(network) as recorder:
        for order in ("c", "ac", "ba"):
            for name in order:
                network[name](torch.randn(3, 2)).sum().backward()
            recorder.step()
    modules = recorder.table("modules")
    assert modules["layer"].tolist() == ["b", "a", "c"]
    assert modules["calls"].tolist() == [1, 1, 1]


class Chosen(nn.Module):
    """Executes some of its layers, and their widths tell stages apart."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)
        self.layers = nn.ModuleList([nn.Linear(4, width) for width in widths])
        self.stem = nn.Linear(4, 4)

    def forward(self, x: Tensor, chosen: Sequence[int]) -> Tensor:
        x = self.stem(x)
        for index in chosen:
            x = x + self.layers[index](x).mean()
        return self.head(x)


@pytest.mark.parametrize("schedule", [None, {"outputs": lambda step: False}])
@pytest.mark.parametrize("accumulated", [False, True])
def test_layers_that_some_steps_leave_out_have_their_place(
    accumulated: bool, schedule: Any, tmp_path: Path
) -> None:
    """Behind the layer executed before it, and not behind the head: in what is saved too."""
    passes = [(1, 3), (0, 3), (2, 3), (0, 1, 4), (1, 2, 4), (1, 2, 3)]
    network = Chosen((3, 3, 5, 5, 7))
    with Recorder(network, schedule=schedule, save=tmp_path / "run") as recorder:
        for chosen in passes:
            network(torch.randn(2, 4), chosen).sum().backward()
            if not accumulated:
                recorder.step()
                recorder.flush()
        recorder.step()
    layers = ["stem", *(f"layers.{i}" for i in range(5)), "head"]
    stages = [1, 2, 2, 3, 3, 4, 5]
    for modules in (recorder.table("modules"), Run(tmp_path / "run").table("modules").to_pandas()):
        assert modules["layer"].tolist() == layers
        assert modules["position"].tolist() == list(range(7))
        assert modules["stage"].tolist() == stages
    weights = recorder.table("weights").drop_duplicates("layer").set_index("layer")
    assert weights["position"].to_dict() == {layer: i for i, layer in enumerate(layers)}


def test_a_layer_that_is_executed_once_stands_where_the_model_declares_it() -> None:
    network = Chosen((3, 3))
    with Recorder(network) as recorder:
        for chosen in ((0,), (1,), (0,)):
            network(torch.randn(2, 4), chosen).sum().backward()
            recorder.step()
    assert recorder.table("modules")["layer"].tolist() == ["stem", "layers.0", "layers.1", "head"]


def test_a_look_before_training_leaves_positions_alone() -> None:
    network = Shuffled()
    with Recorder(network) as recorder:
        with torch.no_grad():
            recorder.evaluate("test", loss=network(torch.randn(2, 3)).mean())
        assert recorder.table("modules")["layer"].tolist() == ["spare", "last", "first"]
        network(torch.randn(2, 3)).sum().backward()
        recorder.step()
    assert recorder.table("modules")["layer"].tolist() == ["first", "last", "spare"]


def test_sparse_gradients_are_those_of_the_dense_embedding() -> None:
    tokens, found = torch.tensor([1, 3, 3, 0, 3]), []
    for sparse in (True, False):
        torch.manual_seed(2)
        network = nn.Embedding(6, 4, sparse=sparse)
        loss = lambda network=network: network(tokens).pow(2).sum()  # noqa: E731
        recorder = record(network, loss)
        found.append(column(recorder, "weights", "weight_grad_norm")["Embedding"])
    assert found[0] == near(found[1], rel=1e-6)
    assert found[0] > 0


def test_empty_and_whole_numbered_parameters_are_passed_over() -> None:
    network = nn.Linear(3, 3)
    network.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
    network.register_parameter("count", nn.Parameter(torch.arange(4), requires_grad=False))
    network.add_module("empty", nn.ParameterList([torch.zeros(0, 2)]))
    recorder = record(network, lambda: network(torch.randn(2, 3)).sum())
    assert recorder.table("modules")["parameters"].tolist() == [12]
    own = torch.cat([network.weight.flatten(), network.bias])
    assert column(recorder, "weights", "weight_norm")["Linear"] == near(norm(own), rel=1e-6)


class Many(nn.Module):
    """Outputs in a dict, a tuple and a list, an index among them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = x * self.weight
        return {"a": y, "b": (y + 1, [y * 2]), "index": y.argmax(), "none": None}


def test_all_tensors_of_an_output_count() -> None:
    network, x = Many(), torch.randn(4, 3)
    kept: list[Tensor] = []

    def loss() -> Tensor:
        output = network(x)
        kept[:] = [output["a"], output["b"][0], output["b"][1][0]]
        for tensor in kept[1:]:
            tensor.retain_grad()
        return kept[1].square().sum() + kept[2].pow(3).sum()

    recorder = record(network, loss)
    (row,) = recorder.table("outputs").to_dict("records")
    assert row["output_rms"] == near(rms(*kept), rel=1e-6)
    inner = kept[1].grad + 2 * kept[2].grad  # type: ignore[operator]  # `a` feeds both others
    gradients = [norm(inner), norm(kept[1].grad), norm(kept[2].grad)]  # type: ignore[arg-type]
    assert row["output_grad_norm"] == near(math.hypot(*gradients), rel=1e-6)


@dataclass
class Half:
    """Whose second field has no value yet."""

    first: Tensor
    second: Tensor = field(init=False)


def around_itself(y: Tensor) -> dict[str, Any]:
    output: dict[str, Any] = {"y": y}
    output["all"] = [output]
    return output


class Odd(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.make = nn.Parameter(torch.ones(3)), make

    def forward(self, x: Tensor) -> Any:
        return self.make(x * self.weight)


class Wrapped:
    """Of no kind that is looked into."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


@pytest.mark.parametrize("make", [Wrapped, lambda y: (y for _ in range(1))])
def test_outputs_in_which_no_tensor_is_found_are_named(make: Callable[[Tensor], Any]) -> None:
    network = nn.ModuleDict({"odd": Odd(make), "frozen": Odd(make), "last": nn.Linear(3, 1)})
    network["frozen"].requires_grad_(False)

    def run() -> None:
        network["frozen"](torch.ones(2, 3))
        output = network["odd"](torch.ones(2, 3))
        y = output.y if isinstance(output, Wrapped) else next(output)
        network["last"](y).sum().backward()
        recorder.step()

    with Recorder(network, schedule=ALWAYS) as recorder:
        with pytest.warns(UserWarning, match="return no tensor, nor .*: odd$"):
            run()
        run()  # and not again
    assert set(column(recorder, "outputs", "output_rms", 1)) == {"last"}


@pytest.mark.parametrize("make", [Half, around_itself])
def test_outputs_that_are_unfinished_or_contain_themselves(make: Callable[[Tensor], Any]) -> None:
    network = Odd(make)
    recorder = record(network, lambda: next(all_tensors(network(torch.full((2, 3), 2.0)))).sum())
    assert column(recorder, "outputs", "output_rms") == {"Odd": 2}
    assert column(recorder, "outputs", "output_grad_norm")["Odd"] == near(6**0.5, rel=1e-6)


def test_recurrent_and_attention_layers_are_recorded() -> None:
    network = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "attend": nn.MultiheadAttention(4, 2)})
    state: list[Tensor] = []

    def loss() -> Tensor:
        y, (h, c) = network["lstm"](torch.randn(5, 2, 3))
        state[:] = [y, h, c]
        return network["attend"](y, y, y)[0].square().sum()

    recorder = record(network, loss)
    outputs = column(recorder, "outputs", "output_rms")
    assert outputs["lstm"] == near(rms(*state), rel=1e-6)
    modules = recorder.table("modules").set_index("layer")
    # PyTorch's attention uses the weights of its `out_proj` without calling it.
    assert modules["calls"].to_dict() == {"lstm": 1, "attend": 1, "attend.out_proj": 0}
    assert all(value > 0 for value in column(recorder, "weights", "weight_grad_norm").values())


def test_activations_in_place_change_nothing_of_the_record() -> None:
    """Outputs are the pre-activations and their gradients, whatever overwrites them later."""
    found = []
    for inplace in (False, True):
        torch.manual_seed(3)
        network = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Conv2d(4, 4, 3),
            nn.ReLU(inplace), nn.Flatten(), nn.Linear(16, 3), nn.ReLU(inplace),
        )  # fmt: skip
        x = torch.randn(5, 2, 6, 6)
        recorder = record(network, lambda network=network, x=x: network(x).square().sum())
        found.append(recorder.table("outputs"))
    pd.testing.assert_frame_equal(*found)
    assert (found[0]["output_grad_norm"] > 0).all()


def test_kinds_shapes_and_stages() -> None:
    """Stages are the sizes of feature maps in order of appearance."""
    network = build_network("imagenet", depth=50, width=8)
    recorder = record(network, lambda: network(torch.randn(2, 3, 32, 32)).sum())
    modules = recorder.table("modules").set_index("layer")
    assert modules.loc["conv1", ["kind", "shape", "stage"]].tolist() == ["conv", "8x3x7x7", 1]
    assert modules.loc["bn1", ["kind", "shape", "stage"]].tolist() == ["norm", "8", 1]
    assert modules.loc["fc", ["kind", "shape", "stage"]].tolist() == ["linear", "10x256", 6]
    by_stage = modules[modules["kind"] == "conv"].groupby("stage").size().to_dict()
    # Of each stage's first block, the first 1×1 convolution still has the previous size.
    assert by_stage == {1: 1, 2: 3 * 3 + 2, 3: 4 * 3 + 1, 4: 6 * 3 + 1, 5: 3 * 3}
    assert modules.loc["layer1.0.skip", "kind"] == "block"
    assert modules["position"].is_monotonic_increasing


def test_first_to_last() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(2, 2, 1), nn.Tanh(), nn.Conv1d(2, 2, 1))
    with Recorder(network) as recorder:
        assert recorder.first_to_last() is None
        network(torch.randn(4, 2, 3)).square().sum().backward()
        recorder.step()
        ratio = recorder.first_to_last()
    found = column(recorder, "weights", "weight_grad_norm")
    assert ratio == near(found["1"] / found["3"], rel=1e-6)
    with Recorder(Shuffled(), ()) as recorder:
        assert recorder.first_to_last() is None
    network = Shuffled()
    with Recorder(network) as recorder:
        network(torch.randn(2, 3)).square().sum().backward()
        recorder.step()
        ratio = recorder.first_to_last()
    found = column(recorder, "weights", "weight_grad_norm")
    assert ratio == near(found["first"] / found["last"], rel=1e-6)


def scripted(module: nn.Module) -> nn.Module:
    return torch.jit.script(module)


def traced(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module, torch.ones(1, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("compiled", [scripted, traced])
def test_what_torchscript_runs_has_weights_alone(
    compiled: Callable[[nn.Module], nn.Module],
) -> None:
    inner = compiled(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    network = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 1))
    with (
        Recorder(network, schedule=ALWAYS) as recorder,
        pytest.warns(UserWarning, match=r"not recorded of .*, or TorchScript, .*: 1\.0$"),
    ):
        loop(recorder, 2)
    gradients = {
        name: math.hypot(*(norm(p.grad) for p in network.get_submodule(name).parameters()))
        for name in ("0", "1.0", "2")
    }
    assert column(recorder, "weights", "weight_grad_norm", 1) == near(gradients, rel=1e-6)
    assert set(column(recorder, "outputs", "output_rms", 1)) == {"0", "2"}
    assert recorder.table("modules")["layer"].tolist() == ["0", "1.0", "2"]
    assert recorder.locate_forward(lambda: network(torch.full((2, 4), torch.nan))) == "0"
    assert record(inner, lambda: inner(torch.ones(2, 4)).sum(), quantities="weight_norm")


def test_a_parameter_put_in_another_s_place_is_read() -> None:
    """By assignment, pruning, an adapter: the record follows the model, not what it once was."""
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1))
    with Recorder(network) as recorder:
        for factor in (1.0, 100.0):
            network[0].weight = nn.Parameter(torch.full((4, 4), factor))
            network(torch.ones(2, 4)).sum().backward()
            recorder.step()
    norms = cells(recorder.table("weights"), "weight_norm")
    assert [norms[0, "0"], norms[1, "0"]] == [4, 400]
    assert network[0].weight.grad is not None
    gradients = cells(recorder.table("weights"), "weight_grad_norm")
    assert gradients[1, "0"] == near(norm(network[0].weight.grad), rel=1e-6)


@pytest.mark.parametrize("size", [8, 200])  # of those that are copied, and of those that are not
def test_parameters_that_exchange_their_sizes_are_read(size: int) -> None:
    network = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size + 50))
    with Recorder(network, ("weight_norm", "weight_grad_norm"), ALWAYS) as recorder:
        for step in range(2):
            if step:
                network[0].weight, network[1].weight = (
                    nn.Parameter(torch.randn(rows, size)) for rows in (size + 50, size)
                )
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape)
            recorder.step()
    for name, of in (("weight_norm", "data"), ("weight_grad_norm", "grad")):
        found = cells(recorder.table("weights"), name)
        for layer in (0, 1):
            own = [getattr(p, of).flatten() for p in network[layer].parameters()]
            assert found[1, str(layer)] == near(norm(torch.cat(own)), rel=1e-6)


def test_outputs_are_those_in_front_of_all_hooks() -> None:
    """Whether a hook was there before the recorder, and whenever the recorder's is put on again."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    made: list[Tensor] = []

    def enlarge(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output.retain_grad()
        made.append(output)
        return 10 * output

    network[0].register_forward_hook(enlarge)
    measured = (0, 2, 3)
    with Recorder(network, schedule={"outputs": lambda step: step in measured}) as recorder:
        network[1].register_forward_hook(enlarge)
        loop(recorder, 4)
    for name, index in (("0", 0), ("1", 1)):
        outputs = [made[2 * step + index] for step in measured]
        for quantity, expected in (
            ("output_rms", [rms(output) for output in outputs]),
            ("output_grad_norm", [norm(output.grad) for output in outputs]),
        ):
            found = [column(recorder, "outputs", quantity, step)[name] for step in measured]
            assert found == near(expected, rel=1e-6)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


CHANGES: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "pruned": (lambda m: prune.l1_unstructured(m[0], "weight", 0.5), "0"),
    "parametrised": (
        lambda m: parametrize.register_parametrization(m[0], "weight", Doubled()),
        "0, 0.parametrizations.weight",
    ),
    "without bias": (lambda m: m[0].register_parameter("bias", None), "0"),
    "with one more": (lambda m: m[0].register_parameter("scale", nn.Parameter(torch.ones(3))), "0"),
    "with another layer": (lambda m: m.append(nn.Linear(1, 1)), "2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_come_and_go_are_named_and_null(change: str) -> None:
    """The value of what is left of a module's parameters would be nothing that anyone asked for."""
    alter, named = CHANGES[change]
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with Recorder(network, ("weight_grad_norm", "weight_norm"), ALWAYS) as recorder:
        loop(recorder, 1)
        alter(network)
        with pytest.warns(UserWarning, match=f"other parameters than .*: {named}$"):
            recorder.flush()
        loop(recorder, 1)  # and not again
        recorder.flush()
    left = {"1": near(norm(torch.cat([p.flatten() for p in network[1].parameters()])), rel=1e-6)}
    if named == "2":
        left["0"] = near(norm(torch.cat([p.flatten() for p in network[0].parameters()])), rel=1e-6)
    assert column(recorder, "weights", "weight_norm", 0).keys() == {"0", "1"}
    assert column(recorder, "weights", "weight_norm", 1) == left
    assert column(recorder, "weights", "weight_grad_norm", 1).keys() == left.keys()


@pytest.mark.parametrize("change", ["pruned", "parametrised"])
def test_a_parameter_that_has_gone_is_missed_at_once(change: str) -> None:
    """And not when it is looked for the next time."""
    alter, named = CHANGES[change]
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with Recorder(network, "weight_grad_norm", ALWAYS) as recorder:
        alter(network)
        with pytest.warns(UserWarning, match=f": {named}$"):
            loop(recorder, 1)
    assert column(recorder, "weights", "weight_grad_norm").keys() == {"1"}


def test_a_replaced_module_is_named_and_null() -> None:
    """Another head in mid-training: its predecessor's numbers would be those of nothing."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with Recorder(network, schedule=ALWAYS) as recorder:
        loop(recorder, 2)
        network[1] = nn.Linear(4, 2)
        with pytest.warns(UserWarning, match=r"modules were replaced .*another Recorder.*: 1$"):
            recorder.flush()
        loop(recorder, 1)
        recorder.flush()
    frame = recorder.table("weights")
    assert list(zip(frame["step"], frame["layer"], strict=True)) == [
        (0, "0"), (0, "1"), (1, "0"), (1, "1"), (2, "0")
    ]  # fmt: skip
