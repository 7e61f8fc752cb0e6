"""Transformers without embedding and readout: Pre-LN, Post-LN, and attention alone."""

from __future__ import annotations

from torch import Tensor, nn

from gradflow.errors import SpecError
from gradflow.networks.chains import check_features
from gradflow.networks.initialization import initialized
from gradflow.networks.layers import Layers, check_sizes
from gradflow.networks.skips import Skip
from gradflow.spec import RunSpec

NORMS = ("layer", "none")


class Attention(nn.Module):
    """Multi-head self-attention of all tokens to all: (N, tokens, width) -> the same shape.

    Each head has width/heads of the features: softmax(QKᵀ/√(width/heads))·V, and a linear map of
    all heads side by side. Vaswani et al. 2017 (arXiv 1706.03762, §3.2).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Linear(width, width)
        self.keys = nn.Linear(width, width)
        self.values = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.queries, self.keys, self.values)
        )
        scores = queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5
        heads = scores.softmax(-1) @ values
        y: Tensor = self.output(heads.transpose(1, 2).flatten(2))
        return y


class FeedForward(nn.Module):
    """W₂φ(W₁x) of each token, with ratio·width features between: (N, tokens, width)."""

    def __init__(self, width: int, ratio: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, ratio * width)
        self.activation = activation
        self.linear2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear2(self.activation(self.linear1(x)))
        return y


class Sublayer(nn.Module):
    """Order `pre`: y = skip(x, F(norm(x))). Order `post`: y = norm(skip(x, F(x)))."""

    def __init__(self, branch: nn.Module, norm: nn.Module, skip: Skip, *, pre: bool) -> None:
        super().__init__()
        self.pre = pre
        self.norm = norm
        self.branch = branch
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            y: Tensor = self.skip(x, self.branch(self.norm(x)))
        else:
            y = self.norm(self.skip(x, self.branch(x)))
        return y


class Transformer(nn.Module):
    """Layers of an `attention` and a `feedforward` sublayer, and with order `pre` a last `norm`.

    (N, tokens, width), or images (N, C, H, W) read as C tokens of H·W = width features, become
    (N, tokens, width). There are no positions: permuted tokens give permuted outputs.
    """

    def __init__(self, layers: list[nn.Module], norm: nn.Module, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(*layers)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        check_features(self.width, x)
        y: Tensor = self.norm(self.layers(x))
        return y


def transformer(
    depth: int,
    width: int,
    *,
    heads: int = 4,
    order: str = "pre",
    skip: str | bool = "identity",
    skip_forward: float | None = None,
    skip_backward: float | None = None,
    branch_scale: float = 1.0,
    norm: str = "layer",
    feedforward: bool = True,
    ratio: int = 4,
    activation: str = "relu",
    init: str = "xavier",
    uniform_attention: bool = False,
    seed: int | None = None,
) -> Transformer:
    """A transformer encoder of `depth` layers, every sublayer of which is a block with a skip.

    Modules are `layers.0.attention.branch.queries`, `keys`, `values` and `output`,
    `layers.0.feedforward.branch.linear1` and `linear2`, and `norm` and `skip` of either sublayer.
    By default weights and biases start as in Xiong et al. 2020 (arXiv 2002.04745, §3.3): Xavier,
    each matrix by its own fans, and zero.

    Args:
        heads: has to divide width.
        order: `pre`, LayerNorm before each sublayer and at the end; `post`, after each addition.
        skip, skip_forward, skip_backward, branch_scale: see `Skip`.
        norm: `layer` or `none`.
        feedforward: False leaves attention alone, as for the collapse of tokens without skips:
            Dong et al. 2021 (arXiv 2103.03404).
        ratio: features between the two maps of the feed-forward sublayer, over width.
        uniform_attention: queries and keys start at zero, and every token attends to all alike: the
            setting of Xiong et al.'s theory, with heads=1 and ratio=1.
        seed: of the parameters; None draws it from torch's global generator.

    Raises:
        SpecError: one line with the key, the value and what is allowed.
    """
    check_sizes(depth=depth, width=width, heads=heads, ratio=ratio)
    if width % heads:
        raise SpecError(f"heads={heads}: does not divide width={width}")
    if norm not in NORMS:
        raise SpecError(f"norm={norm}: allowed is {', '.join(NORMS)}")
    spec = RunSpec(
        skip=skip,  # type: ignore[arg-type]  # a bool becomes its name there
        skip_forward=skip_forward,
        skip_backward=skip_backward,
        branch_scale=branch_scale,
        order=order,
        norm=norm,
        activation=activation,
        init=init,
    )
    style = Layers.of(spec)

    def sublayer(branch: nn.Module) -> Sublayer:
        join = Skip(
            skip,
            skip_forward=skip_forward,
            skip_backward=skip_backward,
            branch_scale=branch_scale,
            channels=width,
            channel_dim=-1,
        )
        return Sublayer(branch, style.normalize_vectors(width), join, pre=spec.order == "pre")

    def layer() -> nn.Module:
        made = nn.Sequential()
        made.add_module("attention", sublayer(Attention(width, heads)))
        if feedforward:
            between = FeedForward(width, ratio, style.activate())
            made.add_module("feedforward", sublayer(between))
        return made

    def make() -> Transformer:
        last = style.normalize_vectors(width) if spec.order == "pre" else nn.Identity()
        return Transformer([layer() for _ in range(depth)], last, width)

    network = initialized(
        make,
        spec,
        seed=seed,
    )
    if uniform_attention:
        _attend_to_all_alike(network)
    return network


def _attend_to_all_alike(network: Transformer) -> None:
    for module in network.modules():
        if isinstance(module, Attention):
            for linear in (module.queries, module.keys):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
