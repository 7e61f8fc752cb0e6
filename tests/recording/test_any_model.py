"""The recorder on models of every kind, against a slow computation by hand."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import pandas as pd
import pytest
import torch
from recorded import ALWAYS, TOLERANCE, column, norm, rms
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from gradflow import Recorder, Skip

Loss = Callable[[Any], Tensor]
Built = tuple[nn.Module, Loss]
Values = dict[str, float | None]
Tables = dict[str, dict[str, Values]]


# --- by hand --------------------------------------------------------------------------------------


def floats(output: Any) -> Iterator[Tensor]:
    """The tensors in an output that have an RMS."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping | tuple | list):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from floats(item)


def cloned(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return {key: cloned(item) for key, item in output.items()}
    if isinstance(output, PackedSequence):
        return output._replace(data=output.data.clone())
    if isinstance(output, tuple | list):
        return type(output)(cloned(item) for item in output)
    return output


def owned(model: nn.Module) -> dict[str, tuple[nn.Module, list[nn.Parameter]]]:
    """Layer -> its module and its own parameters; one that is shared belongs to the first."""
    layers: dict[str, tuple[nn.Module, list[nn.Parameter]]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = []
        for parameter in module._parameters.values():
            # An uninitialised parameter, of a lazy module that was not called, has no norm.
            if parameter is None or id(parameter) in seen or is_lazy(parameter):
                continue
            seen.add(id(parameter))
            if parameter.is_floating_point() and parameter.numel():
                own.append(parameter)
        if own:
            layers[name or type(model).__name__] = (module, own)
    return layers


def whole(tensors: list[Tensor | None]) -> float | None:
    """L2 norm over those that there are."""
    there = [norm(t.to_dense() if t.is_sparse else t) for t in tensors if t is not None]
    return math.hypot(*there) if there else None


def by_hand(model: nn.Module, run: Loss) -> tuple[Tables, list[str]]:
    """What one step should record, and the layers in the order in which they are entered."""
    outputs: dict[nn.Module, dict[int, Tensor]] = {}
    entered: Counter[nn.Module] = Counter()

    def enter(module: nn.Module, args: Any) -> None:
        entered[module] += 1

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        for tensor in floats(output):
            outputs.setdefault(module, {})[id(tensor)] = tensor
            if tensor.requires_grad:
                tensor.retain_grad()
        # What overwrites the output in place overwrites a copy: `retain_grad` would follow it.
        return cloned(output)

    handles: list[Any] = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(keep)]
    model.zero_grad()
    run(model).backward()
    for handle in handles:
        handle.remove()

    layers = owned(model)
    tables: Tables = {
        "weights": {"weight_grad_norm": {}, "weight_norm": {}},
        "outputs": {"output_rms": {}, "output_grad_norm": {}},
        "steps": {"grad_norm": {}},
        "modules": {"calls": {}},
    }
    for layer, (module, own) in layers.items():
        kept = list(outputs.get(module, {}).values())
        gradients = [tensor.grad for tensor in kept if tensor.requires_grad]
        tables["weights"]["weight_grad_norm"][layer] = whole([p.grad for p in own])
        tables["weights"]["weight_norm"][layer] = whole(list(own))
        tables["outputs"]["output_rms"][layer] = rms(*kept) if kept else None
        tables["outputs"]["output_grad_norm"][layer] = whole(gradients)
        tables["modules"]["calls"][layer] = entered[module]
    tables["steps"]["grad_norm"][""] = whole([p.grad for _, own in layers.values() for p in own])
    names = {module: layer for layer, (module, _) in layers.items()}
    return tables, [names[module] for module in entered if module in names]


def built(build: Callable[..., Built], *args: Any) -> Built:
    """The same each time."""
    torch.manual_seed(0)
    return build(*args)


def seeded(run: Loss) -> Loss:
    """The same dropout, and the same initialisation of lazy modules, each time."""

    def seeded_run(model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        return run(model)

    return seeded_run


def watched(model: nn.Module, run: Loss) -> Recorder:
    """One recorded step of a model that was never called before."""
    with Recorder(model, schedule=ALWAYS) as recorder:
        loss = seeded(run)(model)
        loss.backward()
        recorder.step(loss)
    return recorder


def found_in(recorder: Recorder, table: str, quantity: str, step: int) -> Values:
    if table == "modules":
        return recorder.table("modules").set_index("layer")[quantity].to_dict()
    if table == "steps":
        values = recorder.table("steps").set_index("step")
        value = values[quantity].get(step) if quantity in values else None
        return {"": None if value is None or pd.isna(value) else float(value)}
    return {} if recorder.table(table).empty else column(recorder, table, quantity, step)


def same(found: float | None, expected: float | None, tolerance: float) -> bool:
    """Zero is zero, and null is null."""
    if found is None or expected is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=tolerance, abs_tol=0)


def check(recorder: Recorder, expected: Tables, dtype: torch.dtype, step: int = 0) -> None:
    """No value is another than by hand, none is missing, and none is there that should not be."""
    wrong = {}
    for table, quantities in expected.items():
        for quantity, values in quantities.items():
            found = found_in(recorder, table, quantity, step)
            # A lazy module that was not called may have a row, if it is one without values.
            layers = values if table == "modules" else {**values, **found}
            for layer in layers:
                pair = found.get(layer), values.get(layer)
                if not same(*pair, TOLERANCE[dtype]):
                    wrong[quantity, layer] = pair
    assert not wrong, f"(found, by hand): {wrong}"


def executed(recorder: Recorder, layers: list[str]) -> list[str]:
    """These layers in order of their recorded positions."""
    return [layer for layer in recorder.table("modules")["layer"] if layer in layers]


# --- networks for images --------------------------------------------------------------------------


class Basic(nn.Module):
    """torchvision's BasicBlock."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != width:
            conv = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """torchvision's."""

    expansion = 2

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block: type[Basic] | type[Bottleneck]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        last = 8 * block.expansion
        self.layer1 = nn.Sequential(block(4, 4), block(4 * block.expansion, 4))
        self.layer2 = nn.Sequential(block(4 * block.expansion, 8, 2), block(last, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


def classify(model: nn.Module, size: int) -> Built:
    images, labels = torch.randn(6, 3, size, size), torch.arange(6) % 5
    return model, lambda model: F.cross_entropy(model(images), labels)


def vgg() -> Built:
    """Its second and third convolutions are large enough to be summed up in float32."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (16, "pool", 64, 32, "pool"):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = width
    head = [nn.Linear(32 * 4, 24), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(24, 5)]
    return classify(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head), 12)


def alexnet() -> Built:
    features = [
        nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 12, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 1, 1),
        nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(inplace=True),
    ]  # fmt: skip
    head = [
        nn.Dropout(0.5), nn.Linear(8 * 4, 16), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 5),
    ]  # fmt: skip
    model = nn.Sequential(*features, nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), *head)
    return classify(model, 47)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.double(1, 4), self.double(4, 8)])
        self.middle = self.double(8, 16)
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)])
        self.merge = nn.ModuleList([self.double(16, 8), self.double(8, 4)])
        self.last = nn.Conv2d(4, 2, 1)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Module:
        first, second = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        norms = nn.BatchNorm2d(outputs), nn.GroupNorm(2, outputs)
        return nn.Sequential(first, norms[0], nn.ReLU(True), second, norms[1], nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        passed = []
        for down in self.down:
            x = down(x)
            passed.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([passed.pop(), up(x)], dim=1))
        return self.last(x)


def unet() -> Built:
    x, mask = torch.randn(3, 1, 8, 8), torch.randint(2, (3, 8, 8))
    return UNet(), lambda model: F.cross_entropy(model(x), mask)


def inference() -> Built:
    model, run = classify(ResNet(Basic), 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval(), run


# --- sequences ------------------------------------------------------------------------------------


def transformer_encoder() -> Built:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False).train()
    x = torch.randn(3, 5, 8)
    return model, lambda model: (model(x) * x).pow(3).mean()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 2)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """The head has the embedding's weight, and no parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Parameter(0.1 * torch.randn(7, 8))
        self.blocks = nn.ModuleList([Decoder(8) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt() -> Built:
    text = torch.randint(11, (3, 7))

    def run(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return GPT(), run


class Recurrent(nn.Module):
    """Neither the last state nor the LSTM's cell is used."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.inner = kind(3, 4, num_layers=2, batch_first=True, **options)
        self.head = nn.Linear(4 * (1 + self.inner.bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0])


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Built:
    x = torch.randn(3, 6, 3)
    return Recurrent(kind, **options), lambda model: model(x).square().mean()


class Packed(nn.Module):
    """Its output is a PackedSequence, and the last state counts too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, state = self.inner(packed)
        return self.head(y.data).square().sum() + self.head(state).pow(3).sum()


def packed() -> Built:
    x, lengths = torch.randn(3, 6, 3), torch.tensor([2, 6, 4])
    return Packed(), lambda model: model(x, lengths)


class Cells(nn.Module):
    """One cell, called at every step of time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for now in x.unbind(1):
            state = self.cell(now, state)
        return self.head(state[0])


def cells_in_a_loop() -> Built:
    x = torch.randn(3, 5, 3)
    return Cells(), lambda model: model(x).square().mean()


# --- what is executed, and how often --------------------------------------------------------------


class Mixture(nn.Module):
    """Of four experts two get tokens; one gets none and is not called, one is called with none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 4)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(4)]
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        chosen = weights[:, :2].argmax(-1)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            (mine,) = torch.where(chosen == index)
            if index != 2 or len(mine):
                given = expert(x[mine]) * weights[mine, index, None]
                mixed = mixed.index_add(0, mine, given)
        return mixed


def mixture() -> Built:
    x = torch.randn(12, 4)
    return Mixture(), lambda model: model(x).square().mean()


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed, and a module with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 6)
        self.decoder.weight = nn.Parameter(torch.randn(6, 4) / 2)
        self.again, self.last = nn.Linear(4, 6), nn.Linear(6, 6)
        self.again.weight = self.decoder.weight
        self.alias = self.last

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.encoder(x))
        return self.alias(self.decoder(code)) + self.last(self.again(code.square()))


def tied() -> Built:
    x = torch.randn(5, 6)
    return Tied(), lambda model: (model(x) - x).square().mean()


class Twice(nn.Module):
    """On inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.shared(x))
        return self.last(torch.tanh(self.shared(y[:2]))).sum() + y.pow(3).sum()


def twice() -> Built:
    x = torch.randn(5, 4)
    return Twice(), lambda model: model(x)


def frozen() -> Built:
    """A frozen layer at the input, one in the middle, a bias; a normalisation that is trained."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    x = torch.randn(5, 4)
    return model, lambda model: model(x).square().mean()


def nothing_to_learn() -> Built:
    """All is frozen; only the input asks for a gradient."""
    x = torch.randn(5, 4, requires_grad=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)
    return model, lambda model: model(x).square().mean()


class Unused(nn.Module):
    """A head is not called, other output is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.auxiliary, self.head, self.trunk = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu_(self.trunk(x))
        return self.head(y), self.auxiliary(y)


def unused() -> Built:
    x = torch.randn(5, 4)
    return Unused(), lambda model: model(x)[0].square().mean()


class Functional(nn.Module):
    """The weights of `layer` and `table` are used, the modules are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table, self.last = nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 2)
        self.scales = nn.ParameterList([torch.ones(4), torch.full((4,), 0.5)])
        self.more = nn.ParameterDict({"shift": torch.randn(4)})

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.layer.weight) * self.scales[0] + F.embedding(
            torch.arange(5), self.table.weight
        )
        return self.last(torch.tanh(y) * self.scales[1] + self.more["shift"])


def functional() -> Built:
    x = torch.randn(5, 4)
    return Functional(), lambda model: model(x).square().mean()


class Around(nn.Module):
    """Parameters of its own, before and after those of the modules in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gain, self.inner = nn.Parameter(torch.full((4,), 0.7)), inner
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.inner(x) + self.shift


def nested_owners() -> Built:
    x = torch.randn(5, 4)
    model = Around(nn.Sequential(nn.Linear(4, 4), Around(nn.Linear(4, 4)), nn.Tanh()))
    return model, lambda model: model(x).square().mean()


# --- what a module returns ------------------------------------------------------------------------


class Parts(nn.Module):
    """Tensors in a dict, tuples and a list, with an index, a flag and nothing among them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = x * self.weight
        z = self.inner(y)
        return {
            "y": y, "more": (y + 1, [z * 2, (z.sum(),)]), "unused": y.exp(),
            "index": y.argmax(), "sign": y > 0, "empty": y[:0], "none": None, "text": "a",
        }  # fmt: skip


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.parts, self.last = nn.Linear(4, 4), Parts(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        parts = self.parts(self.first(x))
        plus, (twice, (total,)) = parts["more"]
        return self.last(plus * torch.sigmoid(twice)), {"others": [parts["y"], total]}


def nested_outputs() -> Built:
    x = torch.randn(5, 4)

    def run(model: nn.Module) -> Tensor:
        output, others = model(x)
        y, total = others["others"]
        return output.square().mean() + y.pow(3).mean() + total.sin()

    return Taken(), run


class Both(nn.Module):
    """Returns a tensor in two places, as `output, (h, c)` of a cell is often put together."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = x * self.weight, 3 + x.sin() * self.weight
        return h, (h, c)


class Unpacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = Both(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, (_, c) = self.both(x)
        return self.last(h * c)


def one_tensor_twice() -> Built:
    x = torch.randn(5, 4)
    return Unpacked(), lambda model: model(x).square().mean()


class Token(nn.Module):
    """Returns its parameter as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4))

    def forward(self) -> Tensor:
        return self.weight


class Prompted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.last = Token(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.token(), x]).tanh())


def its_parameter() -> Built:
    x = torch.randn(5, 4)
    return Prompted(), lambda model: model(x).square().mean()


class Silent(nn.Module):
    """Keeps its loss to itself. It has a parameter of its own, without a measurable output."""

    def __init__(self, returned: Any = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale, self.returned = nn.Parameter(torch.tensor(1.5)), returned

    def forward(self, x: Tensor) -> Any:
        self.loss = self.last(torch.tanh(self.first(x)) * self.scale).square().mean()
        return self.returned


def silent(returned: Any = None) -> Built:
    x = torch.randn(5, 4)

    def run(model: Any) -> Tensor:
        model(x)
        return model.loss

    return Silent(returned), run


def silent_in_an_except_clause() -> Built:
    """The exception that is being handled is not the model's."""
    model, plain = silent()

    def run(model: nn.Module) -> Tensor:
        try:
            raise KeyError
        except KeyError:
            return plain(model)

    return model, run


# --- what is overwritten --------------------------------------------------------------------------


def in_place() -> Built:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.BatchNorm1d(6),
        nn.LeakyReLU(0.1, inplace=True), nn.Linear(6, 6), nn.ELU(inplace=True),
        nn.Linear(6, 6), nn.SiLU(inplace=True), nn.Linear(6, 3), nn.Hardtanh(inplace=True),
        nn.Dropout(0.3, inplace=True),
    )  # fmt: skip
    x = torch.randn(8, 4)
    return model, lambda model: model(x).square().mean()


class Written(nn.Module):
    """Writes into a layer's output, through a view too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y[:, :2].mul_(3)
        y[0] = 0
        z = self.second(y)
        z.add_(y).clamp_(-1, 1)
        return self.last(z).mul_(2)


def written_into() -> Built:
    x = torch.randn(5, 4)
    return Written(), lambda model: model(x).square().mean()


# --- parameters of all kinds ----------------------------------------------------------------------


class Sparse(nn.Module):
    """Tokens repeat; the third table is asked for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, sparse=True)
        self.bag = nn.EmbeddingBag(9, 4, mode="sum", sparse=True)
        self.idle = nn.Embedding(9, 4, sparse=True)
        self.last = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.table(tokens).mean(1) + self.bag(tokens)
        return self.last(y).square().sum() + self.idle(tokens[:0]).sum()


def sparse() -> Built:
    tokens = torch.tensor([[1, 3, 3], [0, 3, 1]])
    return Sparse(), lambda model: model(tokens)


class Hollow(nn.Module):
    """Empty parameters beside others and alone, and a layer that is given no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.register_parameter("nothing", nn.Parameter(torch.zeros(0, 4)))
        self.register_parameter("absent", None)
        self.empty = nn.ParameterList([torch.zeros(0, 2), torch.zeros(3, 0)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.cat([y, self.idle(y[:0]), self.first.nothing])


def hollow() -> Built:
    x = torch.randn(5, 4)
    return Hollow(), lambda model: model(x).square().mean()


class Spectral(nn.Module):
    """Complex and whole-numbered parameters are passed over, and so are complex outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.complex(torch.randn(5), torch.randn(5)))
        self.scale = nn.Parameter(torch.rand(5) + 0.5)
        self.order = nn.Parameter(torch.tensor([2, 0, 1, 4, 3]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x)[:, self.order] * self.filter * self.scale


class Filtered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.spectral, self.last = nn.Linear(4, 8), Spectral(), nn.Linear(8, 2)
        self.phase = nn.ParameterList([torch.complex(torch.ones(5), torch.ones(5))])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.irfft(self.spectral(self.first(x)) * self.phase[0], n=8))


def complex_and_whole() -> Built:
    x = torch.randn(5, 4)
    return Filtered(), lambda model: model(x).square().mean()


def weight_norm() -> Built:
    layers = nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)
    for index in (0, 3):
        parametrizations.weight_norm(layers[index])
    x = torch.randn(4, 2, 5)
    return nn.Sequential(*layers), lambda model: model(x).square().mean()


def spectral_norm() -> Built:
    layers = parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 2)
    x = torch.randn(5, 4)
    return nn.Sequential(*layers), lambda model: model(x).square().mean()


def lazy() -> Built:
    model = nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3),
        nn.Flatten(), nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    x = torch.randn(4, 2, 7, 7)
    return model, lambda model: model(x).square().mean()


class Waiting(nn.Module):
    """A lazy module that is not called, and so never initialised, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.head, self.trunk = nn.LazyLinear(2), nn.LazyLinear(2), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        return self.head(y) + self.head(y.square())


def lazy_in_part() -> Built:
    x = torch.randn(5, 4)
    return Waiting(), lambda model: model(x).square().mean()


MODELS: dict[str, Callable[[], Built]] = {
    "ResNet of basic blocks": lambda: classify(ResNet(Basic), 32),
    "ResNet of bottlenecks": lambda: classify(ResNet(Bottleneck), 32),
    "VGG": vgg,
    "AlexNet": alexnet,
    "U-Net": unet,
    "evaluation mode": inference,
    "transformer encoder": transformer_encoder,
    "GPT": gpt,
    "RNN": lambda: recurrent(nn.RNN, nonlinearity="relu"),
    "LSTM": lambda: recurrent(nn.LSTM, bidirectional=True, dropout=0.4),
    "GRU": lambda: recurrent(nn.GRU),
    "packed sequences": packed,
    "cells in a loop": cells_in_a_loop,
    "mixture of experts": mixture,
    "tied weights": tied,
    "called twice": twice,
    "frozen": frozen,
    "nothing to learn": nothing_to_learn,
    "unused": unused,
    "used without being called": functional,
    "owners in owners": nested_owners,
    "nested outputs": nested_outputs,
    "one tensor twice in an output": one_tensor_twice,
    "returns its parameter": its_parameter,
    "returns nothing": silent,
    "returns no tensor": lambda: silent({"loss": 0.5, "names": ["a"]}),
    "returns nothing in an except clause": silent_in_an_except_clause,
    "in place": in_place,
    "written into": written_into,
    "sparse gradients": sparse,
    "empty": hollow,
    "complex and whole": complex_and_whole,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "lazy": lazy,
    "lazy in part": lazy_in_part,
}


UNREAD = {
    "used without being called": "used without being called: layer, table, scales, more$",
    "returns no tensor": "return no tensor, .*: Silent$",
}


def quiet(name: str) -> Any:
    """Two models of the list have layers whose outputs cannot be read, and it is said."""
    warns = name in UNREAD
    return pytest.warns(UserWarning, match=UNREAD[name]) if warns else contextlib.nullcontext()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_recorded_as_by_hand(name: str, dtype: torch.dtype) -> None:
    model, run = built(MODELS[name])
    expected, order = by_hand(model, seeded(run))
    with quiet(name):
        recorder = watched(*built(MODELS[name]))
    check(recorder, expected, dtype)
    assert executed(recorder, order) == order


# --- several steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zeros"])
def test_a_parameter_without_gradient_in_some_steps(to_none: bool, dtype: torch.dtype) -> None:
    """Null where there is none; zero where `zero_grad` left zeros."""
    pattern = ("ab", "a", "b", "", "a")
    batches = torch.randn(len(pattern), 3, 4)

    def run(model: Any, used: str, x: Tensor) -> Tensor:
        return sum((model[name](x).square().mean() for name in used), model["trunk"](x).sum())

    model, copy = (built(heads)[0] for _ in range(2))
    with Recorder(model, schedule=ALWAYS) as recorder:
        for used, x in zip(pattern, batches, strict=True):
            model.zero_grad(set_to_none=to_none)
            run(model, used, x).backward()
            recorder.step()
    for step, (used, x) in enumerate(zip(pattern, batches, strict=True)):
        expected, _ = by_hand(copy, lambda model, used=used, x=x: run(model, used, x))
        del expected["modules"]  # counts the first step's calls
        gradients = expected["weights"]["weight_grad_norm"]
        assert {name for name in "abc" if gradients[name] is not None} == set(used)
        if not to_none and step:
            gradients |= {name: 0.0 for name in "ab" if name not in used}
        check(recorder, expected, dtype, step)


def heads() -> Built:
    """`c` never gets a gradient."""
    model = nn.ModuleDict({name: nn.Linear(4, 2) for name in ("a", "trunk", "b", "c")})
    return model, lambda model: model["trunk"](torch.ones(4)).sum()


def test_lazy_modules_go_on_as_others(dtype: torch.dtype) -> None:
    """Their update too, at the step that initialises them and after it."""
    model, run = built(lazy)
    copy, run_copy = built(lazy)
    steps = []
    # An optimizer takes uninitialised parameters as they are, until its first step.
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, copy)]
    with Recorder(model, "all", ALWAYS, optimizers[0]) as recorder:
        for _ in range(3):
            optimizers[0].zero_grad()
            loss = seeded(run)(model)
            loss.backward()
            recorder.step(loss)
            optimizers[0].step()
    for _ in range(3):
        expected, _ = by_hand(copy, seeded(run_copy))
        before = {name: parameter.detach().clone() for name, parameter in copy.named_parameters()}
        optimizers[1].step()
        after = dict(copy.named_parameters())
        expected["weights"]["update_norm"] = {
            layer: whole(
                [after[f"{layer}.{n}"] - before[f"{layer}.{n}"] for n in ("weight", "bias")]
            )
            for layer in owned(copy)
        }
        steps.append(expected)
    for step, expected in enumerate(steps):
        check(recorder, expected, dtype, step)
    modules = recorder.table("modules").set_index("layer")
    assert modules["kind"].to_dict() == {
        "0": "conv", "1": "norm", "3": "conv", "5": "linear", "7": "linear"
    }  # fmt: skip
    assert modules["shape"].tolist() == ["4x2x3x3", "4", "6x4x3x3", "5x54", "3x5"]
    assert modules["parameters"].tolist() == [76, 8, 222, 275, 18]


def test_nothing_stays_on_a_parameter_that_is_returned(dtype: torch.dtype) -> None:
    """A hook on a tensor of the pass dies with it, one on a parameter would not."""
    model, run = built(its_parameter)
    with Recorder(model, schedule=ALWAYS) as recorder:
        for _ in range(3):
            model.zero_grad()
            run(model).backward()
            recorder.step()
            assert all(not parameter._backward_hooks for parameter in model.parameters())
        run(model)
    assert all(not parameter._backward_hooks for parameter in model.parameters())
    expected, _ = by_hand(*built(its_parameter))
    for step in range(3):
        check(recorder, expected, dtype, step)


def test_a_parameter_that_several_passes_return(dtype: torch.dtype) -> None:
    """Each pass back counts once, those of one `backward` together."""
    model, _ = built(its_parameter)
    batches = torch.randn(3, 5, 4)
    losses = [lambda i=i: model(batches[i]).square().mean() for i in range(3)]
    first, *both = (torch.autograd.grad(loss(), model.token.weight)[0] for loss in losses)
    with Recorder(model, schedule=ALWAYS) as recorder:
        losses[0]().backward()
        (losses[1]() + losses[2]()).backward()
        recorder.step()
    found = column(recorder, "outputs", "output_grad_norm")["token"]
    expected = math.hypot(norm(first), norm(sum(both)))
    assert same(found, expected, TOLERANCE[dtype])


# --- small and large ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**83], ids=["1e-30", "1e25"])
@pytest.mark.parametrize("name", ["VGG", "transformer encoder", "LSTM"])
def test_gradients_of_any_size(name: str, scale: float) -> None:
    """Their squares are beyond float32."""
    expected, order = by_hand(*scaled(MODELS[name], scale))
    recorder = watched(*scaled(MODELS[name], scale))
    check(recorder, expected, torch.float32)
    gradients = expected["outputs"]["output_grad_norm"]
    assert 1e-6 * scale < min(gradients[layer] or 0 for layer in order)
    assert max(gradients[layer] or 0 for layer in order) < 1e3 * scale


def scaled(build: Callable[[], Built], scale: float) -> Built:
    model, run = built(build)
    return model, lambda model: seeded(run)(model) * scale


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**83], ids=["1e-30", "1e25"])
def test_outputs_and_weight_gradients_of_any_size(scale: float) -> None:
    """A network without biases passes its input's size on; the large layer has 16,384 weights."""

    def homogeneous() -> Built:
        widths = [(8, 128), (128, 128), (128, 4)]
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(*width, bias=False), nn.ReLU(inplace=True)]
        x = torch.randn(70, 8) * scale
        return nn.Sequential(*layers), lambda model: model(x).sum()

    expected, _ = by_hand(*built(homogeneous))
    check(watched(*built(homogeneous)), expected, torch.float32)
    for table, quantity in (("outputs", "output_rms"), ("weights", "weight_grad_norm")):
        for value in expected[table][quantity].values():
            assert 1e-3 < (value or 0) / scale < 1e4


# --- checkpointing --------------------------------------------------------------------------------


class Block(nn.Module):
    """With a skip whose parts are recorded, and randomness that a second pass must repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.skip = Skip("rezero")
        nn.init.constant_(self.skip.beta, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)), inplace=True)
        return self.skip(x, self.last(F.dropout(y, 0.3)))


class Repeated(torch.autograd.Function):
    """Checkpointing as libraries other than PyTorch have it."""

    @staticmethod
    def forward(ctx: Any, module: Loss, x: Tensor) -> Tensor:
        ctx.module, ctx.state = module, torch.get_rng_state()
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            y = ctx.module(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


Kind = bool | Literal["other"] | None
"""Of checkpointing: whether it is reentrant, or a library's own; None where there is none."""


def again(module: Loss, x: Tensor, kind: Kind) -> Tensor:
    """Computed a second time in the backward pass, or not."""
    if kind is None:
        return module(x)
    if kind == "other":
        return Repeated.apply(module, x)
    return checkpoint(module, x, use_reentrant=kind)


class Chain(nn.Module):
    """Its second block is called plainly, the third is frozen."""

    def __init__(self, reentrant: Kind) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.blocks[2].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = again(block, x, None if index == 1 else self.reentrant)
        return self.head(x)


def chain(reentrant: Kind) -> Built:
    x = torch.randn(5, 4)
    return Chain(reentrant), lambda model: model(x).square().mean()


class Sharing(nn.Module):
    """A module that is called once in a checkpoint and once outside, on other values."""

    def __init__(self, reentrant: Kind) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.last, self.shared, self.stem = nn.Linear(4, 2), Block(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = again(self.shared, self.stem(x), self.reentrant)
        return self.last(self.shared(3 * y[:2]))


def sharing(reentrant: Kind) -> Built:
    x = torch.randn(5, 4)
    return Sharing(reentrant), lambda model: model(x).square().mean()


class Nested(nn.Module):
    """A checkpoint in a checkpoint."""

    def __init__(self, reentrant: Kind) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.inner, self.outer = nn.Linear(4, 4), Block(), Block()

    def both(self, x: Tensor) -> Tensor:
        return self.outer(again(self.inner, x, self.reentrant))

    def forward(self, x: Tensor) -> Tensor:
        return again(self.both, self.stem(x), self.reentrant)


def nested(reentrant: Kind) -> Built:
    x = torch.randn(5, 4)
    return Nested(reentrant), lambda model: model(x).square().mean()


def all_of_it(reentrant: Kind) -> Built:
    """The model itself; the second pass stops early, by raising, where it is not reentrant."""
    x = torch.randn(5, 4, requires_grad=True)
    model = nn.Sequential(nn.Linear(4, 4), Block(), nn.Tanh(), nn.Linear(4, 2))
    return model, lambda model: again(model, x, reentrant).square().mean()


def accumulated(reentrant: Kind) -> Built:
    """Two passes before one backward; only the checkpointed model is evaluated before them."""
    x = torch.randn(6, 4)

    def run(model: Any) -> Tensor:
        if reentrant is not None:
            with torch.no_grad():
                for block in reversed(model.blocks):
                    block(3 * x)
            torch.manual_seed(1)
        return model(x[:4]).square().mean() + model(2 * x[4:]).square().mean()

    return Chain(reentrant), run


CHECKPOINTED: dict[str, Callable[[Kind], Built]] = {
    "chain": chain,
    "shared": sharing,
    "nested": nested,
    "the whole model": all_of_it,
    "accumulated": accumulated,
}


@pytest.mark.parametrize("kind", [False, True, "other"], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_leaves_no_trace(name: str, kind: Kind, dtype: torch.dtype) -> None:
    """Each value once, calls, places and blocks as without it."""
    build = CHECKPOINTED[name]
    plain = watched(*built(build, None))
    recorder = watched(*built(build, kind))
    expected, order = by_hand(*hand(build))
    check(recorder, expected, dtype)
    check_blocks(recorder, plain, dtype)
    assert executed(recorder, order) == order
    pd.testing.assert_frame_equal(recorder.table("modules"), plain.table("modules"))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("kind", [True, "other"])
def test_an_evaluation_of_checkpoints_before_training_tells_no_order(kind: Kind) -> None:
    model, run = built(chain, kind)
    with Recorder(model) as recorder:
        with torch.no_grad():
            model(torch.randn(5, 4))
        run(model).backward()
        recorder.step()
    assert recorder.table("modules")["layer"].tolist()[0] == "stem"


def hand(build: Callable[[Kind], Built]) -> Built:
    model, run = built(build, None)
    return model, seeded(run)


def check_blocks(recorder: Recorder, plain: Recorder, dtype: torch.dtype) -> None:
    quantities = ("branch_rms", "skip_rms", "branch_grad_norm", "skip_grad_norm")
    expected = {name: column(plain, "blocks", name) for name in quantities}
    assert len(expected["branch_rms"]) > 0
    check(recorder, {"blocks": expected}, dtype)
