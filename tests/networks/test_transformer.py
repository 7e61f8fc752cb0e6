"""Transformers against torch's own layer and what follows from their symmetries."""

import pytest
import torch
from torch import Tensor, nn

from gradflow import Recorder
from gradflow.errors import SpecError
from gradflow.networks import Skip, transformer
from gradflow.networks.transformer import Transformer

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def scrambled(network: Transformer) -> Transformer:
    """With norms and biases that differ, so that a wrong one is seen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def torch_layer(network: Transformer, index: int, *, pre: bool, width: int) -> nn.Module:
    """torch's encoder layer with the weights of one of ours."""
    theirs = nn.TransformerEncoderLayer(
        width, nhead=4, dim_feedforward=3 * width, dropout=0.0, norm_first=pre, batch_first=True
    )
    state = {
        name.removeprefix(f"layers.{index}."): values
        for name, values in network.state_dict().items()
    }
    projections = ("queries", "keys", "values")
    renamed = {
        "self_attn.out_proj": "attention.branch.output",
        "linear1": "feedforward.branch.linear1",
        "linear2": "feedforward.branch.linear2",
        "norm1": "attention.norm",
        "norm2": "feedforward.norm",
    }
    weights = {}
    for tensor in ("weight", "bias"):
        parts = [state[f"attention.branch.{name}.{tensor}"] for name in projections]
        weights[f"self_attn.in_proj_{tensor}"] = torch.cat(parts)
        weights |= {f"{new}.{tensor}": state[f"{old}.{tensor}"] for new, old in renamed.items()}
    theirs.to(parts[0].dtype).load_state_dict(weights)
    return theirs


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("order", ["pre", "post"])
def test_layers_are_those_of_torch(order: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of two layers; Pre-LN has a LayerNorm after them."""
    width, pre = 16, order == "pre"
    network = scrambled(transformer(2, width, order=order, ratio=3, seed=0)).to(dtype)
    theirs = [torch_layer(network, k, pre=pre, width=width) for k in range(2)]
    ours, others = (tokens(3, 5, width, dtype=dtype).requires_grad_() for _ in range(2))
    y, expected = network(ours), theirs[1](theirs[0](others))
    expected = network.norm(expected) if pre else expected
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 4 * TOLERANCE[dtype]}
    torch.testing.assert_close(y, expected, **tolerance)
    g = tokens(3, 5, width, dtype=dtype, seed=1)
    (through_ours,) = torch.autograd.grad(y, ours, g)
    (through_theirs,) = torch.autograd.grad(expected, others, g)
    torch.testing.assert_close(through_ours, through_theirs, **tolerance)


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("skip", ["identity", "highway", "backward_only"])
def test_permuted_tokens_give_permuted_outputs(order: str, skip: str) -> None:
    network = scrambled(transformer(3, 16, order=order, skip=skip, seed=0)).double()
    x = tokens(2, 6, 16)
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(network(x[:, permutation]), network(x)[:, permutation])


def test_uniform_attention_is_the_mean_of_the_tokens() -> None:
    """Alone, without skips and norm: x ↦ W_O·W_V·mean(x), the same for all tokens."""
    network = transformer(2, 12, norm="none", skip=False, feedforward=False,
                          uniform_attention=True, seed=0).double()  # fmt: skip
    x = tokens(3, 7, 12)
    expected = x.mean(1, keepdim=True).expand_as(x)
    for k in range(2):
        for name in ("values", "output"):
            expected = (
                expected @ network.get_parameter(f"layers.{k}.attention.branch.{name}.weight").T
            )
    torch.testing.assert_close(network(x), expected)


def test_attention_of_one_token_is_linear() -> None:
    """softmax of one score is 1: W_O·W_V·x + x, whatever queries and keys."""
    network = transformer(1, 8, norm="none", feedforward=False, branch_scale=0.5, seed=0).double()
    values, output = (
        network.get_parameter(f"layers.0.attention.branch.{name}.weight")
        for name in ("values", "output")
    )
    x = tokens(4, 1, 8)
    torch.testing.assert_close(network(x), x + 0.5 * x @ values.T @ output.T)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_skips_of_zero_branches_and_norms(order: str) -> None:
    """β = 0: Pre-LN normalises once, at the end; Post-LN after each of its four sublayers."""
    network = transformer(2, 16, order=order, branch_scale=0.0, seed=0).double()
    x = tokens(2, 3, 16)
    expected = x
    for _ in range(1 if order == "pre" else 4):
        expected = torch.nn.functional.layer_norm(expected, (16,))
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(network.norm, nn.LayerNorm if order == "pre" else nn.Identity)


def test_backward_only_is_no_skip_in_the_forward_pass() -> None:
    x = tokens(2, 3, 16, dtype=torch.float32)
    plain, other = (transformer(2, 16, skip=skip, seed=0) for skip in ("none", "backward_only"))
    assert torch.equal(plain(x), other(x))


def test_images_are_read_as_channels_of_pixels() -> None:
    network = transformer(1, 20, seed=0).double()
    x = tokens(2, 3, 20)
    assert torch.equal(network(x.reshape(2, 3, 4, 5)), network(x))


# torch's own use of torch.jit when it first differentiates forward.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_derivatives_agree_with_reverse_mode() -> None:
    network = transformer(2, 8, seed=0).double()
    x = tokens(1, 3, 8)
    forward = torch.func.jacfwd(network)(x)
    backward = torch.func.jacrev(network)(x)
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-12)


def test_initial_values_are_those_of_xiong() -> None:
    """Xavier by each matrix's own fans, 1e5 numbers or more: ±4 standard errors; the rest fixed."""
    network = transformer(2, 256, seed=0)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2:
            variance = parameter.square().mean().item() * sum(parameter.shape) / 2
            assert variance == pytest.approx(1, abs=4 * (2 / parameter.numel()) ** 0.5), name
        else:
            start = 1.0 if name.endswith("norm.weight") else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, start)), name
    zero = transformer(1, 16, uniform_attention=True, seed=0)
    assert not zero.get_parameter("layers.0.attention.branch.keys.weight").any()
    assert zero.get_parameter("layers.0.attention.branch.values.weight").std() > 0.1


def test_parameter_count_and_seed() -> None:
    """Attention 4w² + 4w, feed-forward 2rw² + (r + 1)w, LayerNorms 2w each and one at the end."""
    w, r, depth = 12, 5, 3
    network = transformer(depth, w, ratio=r, seed=0)
    sublayers = 4 * w**2 + 4 * w + 2 * r * w**2 + (r + 1) * w + 4 * w
    assert sum(p.numel() for p in network.parameters()) == depth * sublayers + 2 * w
    post = transformer(depth, w, ratio=r, order="post", skip=False, seed=0)
    for name, values in post.named_parameters():
        assert torch.equal(values, network.get_parameter(name))


def test_recorder_sees_both_sublayers_as_blocks() -> None:
    network = transformer(2, 8, seed=0)
    assert sum(isinstance(module, Skip) for module in network.modules()) == 4
    with Recorder(network) as recorder:
        network(tokens(2, 3, 8, dtype=torch.float32)).square().sum().backward()
        recorder.step()
        table = recorder.table("blocks")
    assert list(table["layer"]) == [
        f"layers.{k}.{name}.skip" for k in (0, 1) for name in ("attention", "feedforward")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads=3: does not divide width=8"),
        ({"norm": "batch"}, "norm=batch: allowed is layer, none"),
        ({"order": "mid"}, "order=mid: allowed is post, pre"),
        ({"depth": 0}, "depth=0: allowed is a whole number from 1"),
        ({"ratio": 0.5}, "ratio=0.5: allowed is a whole number from 1"),
        ({"activation": "crelu"}, "activation=crelu: only network=mlp"),
        ({"skip": "idenity"}, "skip=idenity: allowed is none"),
        ({"init": "glorot"}, "init=glorot: allowed is he"),
    ],
)
def test_bad_values_are_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        transformer(**{"depth": 2, "width": 8, "seed": 0, **options})  # type: ignore[arg-type]


def test_an_input_of_another_size_is_one_line() -> None:
    with pytest.raises(SpecError, match="width=8: the input has 64 features"):
        transformer(1, 8, seed=0)(torch.zeros(2, 1, 8, 8))
