"""Networks for the tests of diagnoses: some built to have one trouble alone, some healthy.

The healthy ones are what people train; no threshold was chosen with a look at them. Batches are
(inputs, targets); all randomness is torch's global generator, which the caller seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradflow

Patient = tuple[nn.Module, tuple[Tensor, Tensor], Callable[[Tensor, Tensor], Tensor]]
CLASSES, BATCH = 10, 32
entropy = functional.cross_entropy


def labels(batch: int = BATCH) -> Tensor:
    return torch.randint(CLASSES, (batch,))


def vectors(width: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, width), labels(batch)


def images(size: int = 16, channels: int = 3, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, channels, size, size), labels(batch)


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module):
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def mlp(
    depth: int,
    width: int,
    init: Callable[[Tensor], object],
    activation: type[nn.Module] = nn.ReLU,
    inputs: int | None = None,
) -> nn.Sequential:
    """`depth` weight layers without normalisation, biases zero."""
    layers: list[nn.Module] = []
    sizes = [inputs or width, *[width] * (depth - 1)]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    net = nn.Sequential(*layers, nn.Linear(width, CLASSES))
    for layer in net:
        if isinstance(layer, nn.Linear):
            init(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def gaussian(gain: float) -> Callable[[Tensor], object]:
    """N(0, gain²/fan_in)."""
    return lambda weight: nn.init.normal_(weight, std=gain / math.sqrt(weight.shape[1]))


HE = gaussian(math.sqrt(2))


def orthogonal(gain: float = 1.0) -> Callable[[Tensor], object]:
    return lambda weight: nn.init.orthogonal_(weight, gain)


# --- built to have one trouble alone --------------------------------------------------------------


def vanishing(depth: int, width: int) -> Patient:
    """Leaky units at He's initialisation, times 0.6: every map shrinks what passes, both ways.

    Nearly linear, so that inputs keep their angles, and no unit is off.
    """
    net = mlp(depth, width, orthogonal(0.6), _Leaky)
    return net, vectors(width), entropy


def exploding(depth: int, width: int) -> Patient:
    """The same times 1.7, with a loss that is linear: that of large logits would be flat."""
    return mlp(depth, width, orthogonal(1.7), _Leaky), vectors(width), linear_loss


def linear_loss(output: Tensor, _: Tensor) -> Tensor:
    return output.mean()


class _Leaky(nn.LeakyReLU):
    def __init__(self) -> None:
        super().__init__(0.8)


def dead(depth: int, width: int) -> Patient:
    """He's initialisation; then three in four units of each hidden layer are off for good.

    What the others put out is doubled in its square by four, so that sizes stay.
    """
    net = mlp(depth, width, HE)
    linears = [layer for layer in net if isinstance(layer, nn.Linear)]
    off = torch.arange(width) % 4 > 0
    with torch.no_grad():
        for layer, after in pairwise(linears):
            layer.weight[off], layer.bias[off] = 0.0, -1.0
            after.weight[:, ~off] *= 2
    return net, vectors(width), entropy


def saturated(depth: int, width: int, activation: type[nn.Module] = nn.Tanh) -> Patient:
    """Tanh after weights of gain 8: shallow enough that chaos has no depth to grow in."""
    gain = 8.0 if activation is nn.Tanh else 24.0
    return mlp(depth, width, gaussian(gain), activation), vectors(width), entropy


def underflow(depth: int, width: int, dtype: torch.dtype) -> Patient:
    """A healthy network whose loss is so small that its gradient leaves the number format."""
    net, (x, y), _ = he_mlp(depth, width)
    scale = {torch.float16: 3e-6, torch.float32: 1e-40, torch.bfloat16: 1e-37}[dtype]

    def tiny(output: Tensor, targets: Tensor) -> Tensor:
        return entropy(output.float() * 1.0, targets).to(dtype) * scale

    return net.to(dtype), (x.to(dtype), y), tiny


class Waves(nn.Module):
    """cos(ωx + shift) of random directions: Fourier features."""

    def __init__(self, width: int, frequency: float):
        super().__init__()
        self.register_buffer("maps", frequency * torch.randn(width, width) / math.sqrt(width))
        self.register_buffer("shifts", 2 * math.pi * torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(x @ self.maps + self.shifts)


def shattered(depth: int, width: int, frequency: float = 3000.0) -> Patient:
    """He's initialisation on Fourier features of far too high a frequency."""
    net = nn.Sequential(Waves(width, frequency), *mlp(depth, width, HE))
    return net, vectors(width), entropy


def collapsed(depth: int, width: int) -> Patient:
    """One random bias dwarfs the input in the first map; all after it is isometric."""
    net = mlp(depth, width, orthogonal(), _Leaky)
    with torch.no_grad():
        net[2].bias.normal_(std=100.0)
    return net, vectors(width), linear_loss


def exploding_bn(depth: int) -> Patient:
    net = gradflow.build_network("cifar", depth=depth, skip=False)
    return net, images(), entropy


# --- healthy --------------------------------------------------------------------------------------


def he_mlp(depth: int = 20, width: int = 128) -> Patient:
    return mlp(depth, width, HE), vectors(width), entropy


def orthogonal_tanh(depth: int = 30, width: int = 64) -> Patient:
    return mlp(depth, width, orthogonal(), nn.Tanh), vectors(width), entropy


def residual_bn(depth: int = 56) -> Patient:
    return gradflow.build_network("cifar", depth=depth, skip=True), images(), entropy


class Transformer(nn.Module):
    """A Pre-LN encoder of tokens."""

    def __init__(self, depth: int, width: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, width), nn.Embedding(20, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]).expand_as(x))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(dim=1))


def preln_transformer(depth: int = 8, width: int = 64) -> Patient:
    return Transformer(depth, width), (torch.randint(50, (BATCH, 20)), labels()), entropy


class Recurrent(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.lstm = nn.LSTM(8, width, layers, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm(width: int = 64, layers: int = 2) -> Patient:
    return Recurrent(width, layers), (torch.randn(BATCH, 12, 8), labels()), entropy


def conv_bn(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


class UNet(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.enter = conv_bn(3, width)
        self.down1, self.down2 = conv_bn(width, 2 * width), conv_bn(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = conv_bn(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join1 = conv_bn(2 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.down1(functional.max_pool2d(a, 2))
        c = self.down2(functional.max_pool2d(b, 2))
        b = self.join2(torch.cat([b, self.up2(c)], dim=1))
        a = self.join1(torch.cat([a, self.up1(b)], dim=1))
        return self.head(a)


def unet(width: int = 16) -> Patient:
    x = torch.randn(8, 3, 16, 16)
    return UNet(width), (x, torch.randint(CLASSES, (8, 16, 16))), entropy


def vgg_bn(width: int = 16) -> Patient:
    """VGG-16's thirteen convolutions, each with batch normalisation, a quarter as wide."""
    layers: list[nn.Module] = []
    before = 3
    for stage, count in zip((1, 2, 4, 8, 8), (2, 2, 3, 3, 3), strict=True):
        for _ in range(count):
            after = stage * width
            layers += [
                nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]  # fmt: skip
            before = after
        layers.append(nn.MaxPool2d(2))
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, CLASSES))
    return net, images(32), entropy


class Mixing(nn.Module):
    """x + W₂ φ(W₁ norm(x)) over one axis."""

    def __init__(self, size: int, width: int, across: bool):
        super().__init__()
        self.norm, self.across = nn.LayerNorm(width), across
        self.one, self.two = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = h.transpose(1, 2) if self.across else h
        h = self.two(functional.gelu(self.one(h)))
        return x + (h.transpose(1, 2) if self.across else h)


def mixer(depth: int = 6, width: int = 32) -> Patient:
    """MLP-Mixer on 16 patches."""
    blocks = [
        block
        for _ in range(depth)
        for block in (Mixing(16, width, True), Mixing(width, width, False))
    ]
    body = nn.Sequential(nn.Linear(48, width), *blocks, nn.LayerNorm(width), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(16 * width, CLASSES))
    return net, (torch.randn(BATCH, 16, 48), labels()), entropy


class Dense(nn.Module):
    """Layers that see all before them (DenseNet)."""

    def __init__(self, depth: int, growth: int):
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(growth * (k + 1)), nn.ReLU(),
                nn.Conv2d(growth * (k + 1), growth, 3, padding=1, bias=False),
            )
            for k in range(depth)
        )  # fmt: skip
        self.head = nn.Linear(growth * (depth + 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for layer in self.layers:
            h = torch.cat([h, layer(h)], dim=1)
        return self.head(h.mean(dim=(2, 3)))


def densenet(depth: int = 12, growth: int = 8) -> Patient:
    return Dense(depth, growth), images(), entropy


def zero_init_residual(depth: int = 10, width: int = 64) -> Patient:
    """Branches that end in a map of zeros (Fixup, SkipInit): no gradient inside them yet."""
    blocks = []
    for _ in range(depth):
        first, last = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        blocks.append(Residual(first, nn.ReLU(), last))
    net = nn.Sequential(nn.Linear(width, width), *blocks, nn.Linear(width, CLASSES))
    return net, vectors(width), entropy


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def rezero(depth: int = 12, width: int = 64) -> Patient:
    blocks = [Residual(nn.Linear(width, width), nn.ReLU(), Gate()) for _ in range(depth)]
    net = nn.Sequential(nn.Linear(width, width), *blocks, nn.Linear(width, CLASSES))
    return net, vectors(width), entropy


def selu(depth: int = 20, width: int = 128) -> Patient:
    """Self-normalising (Klambauer et al. 2017): LeCun's initialisation, SELU."""
    return mlp(depth, width, gaussian(1.0), nn.SELU), vectors(width), entropy


class Vision(nn.Module):
    """A vision transformer: a class token, learnt places, Pre-LN, GELU."""

    def __init__(self, depth: int, width: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(
            *[
                nn.TransformerEncoderLayer(
                    width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            ]
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], dim=1)
        h = self.norm(self.blocks(h + self.places))
        return self.head(h[:, 0])


def vit(depth: int = 6, width: int = 64) -> Patient:
    return Vision(depth, width), images(), entropy


class Autoencoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        sizes = [64, width, width // 2, 8, width // 2, width, 64]
        layers = [
            layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2))
        ]
        self.net = nn.Sequential(*layers[:-1], nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def autoencoder(width: int = 64) -> Patient:
    x = torch.rand(BATCH, 64)
    return Autoencoder(width), (x, x), functional.mse_loss
