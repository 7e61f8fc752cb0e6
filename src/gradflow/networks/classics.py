"""Networks that came before residual ones, each with its usual initialisation.

They draw from torch's global generator, as other people's networks do: a run seeds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from gradflow.networks.layers import check_sizes


class ScaledTanh(nn.Module):
    """1.7159·tanh(2x/3), which is ±1 at ±1. LeCun et al. 1998, appendix A."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * (2 / 3 * x).tanh()


class Pyramid(nn.Module):
    """Convolutions, then linear layers: (N, C, H, W) -> logits.

    Modules are named as in torchvision's AlexNet and VGG, whose parameters it can take.

    Args:
        features: convolutions, activations and pooling.
        side: height and width to which the last maps are averaged.
        classifier: takes these, flattened.
    """

    def __init__(self, features: list[nn.Module], side: int, classifier: list[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


def lenet5(in_channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """LeNet-5: (N, in_channels, 28, 28) -> logits; 61,706 parameters by default.

    LeCun et al. 1998 (Proc. IEEE 86, §II.B), with its images padded to 32×32, its scaled tanh and
    its initialisation, weights and biases uniform in ±2.4/fan_in. As usual today, and unlike there,
    every map of the second convolution sees all of the first, pooling has no parameters, and the
    readout is linear.
    """
    check_sizes(in_channels=in_channels, num_classes=num_classes)
    network = nn.Sequential(
        nn.Conv2d(in_channels, 6, 5, padding=2), ScaledTanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), ScaledTanh(), nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5), ScaledTanh(), nn.Flatten(),
        nn.Linear(120, 84), ScaledTanh(),
        nn.Linear(84, num_classes),
    )  # fmt: skip
    for layer in _layers(network):
        bound = 2.4 / layer.weight[0].numel()
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound)
    return network


def alexnet(in_channels: int = 3, num_classes: int = 1000, dropout: float = 0.5) -> Pyramid:
    """AlexNet: (N, in_channels, H, W), from 63×63, -> logits; 61,100,840 parameters by default.

    Krizhevsky et al. 2012, in the form for one GPU (Krizhevsky 2014, arXiv 1404.5997) that
    torchvision has, without local response normalisation. Initialised as in 2012 (§5): weights
    N(0, .01²); biases 1 in the second, fourth and fifth convolution and the hidden linear layers,
    else 0.
    """
    check_sizes(in_channels=in_channels, num_classes=num_classes)
    features = [
        nn.Conv2d(in_channels, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=2),
    ]  # fmt: skip
    classifier = [
        nn.Dropout(dropout), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(),
        nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, num_classes),
    ]  # fmt: skip
    network = Pyramid(features, 6, classifier)
    biases = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    for layer, bias in zip(_layers(network), biases, strict=True):
        _draw(layer, 0.01, bias)
    return network


def vgg16(in_channels: int = 3, num_classes: int = 1000, dropout: float = 0.5) -> Pyramid:
    """VGG-16: (N, in_channels, H, W), from 32×32, -> logits; 138,357,544 parameters by default.

    Simonyan & Zisserman 2014 (arXiv 1409.1556, table 1, D), without batch normalisation. They
    initialised it from a trained network of 11 layers; here as usual since, and in torchvision:
    convolutions N(0, 2/fan_out) (He et al. 2015, arXiv 1502.01852), linear layers N(0, .01²),
    biases 0.
    """
    check_sizes(in_channels=in_channels, num_classes=num_classes)
    features: list[nn.Module] = []
    before = in_channels
    for channels, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            features += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        features.append(nn.MaxPool2d(2))
    classifier = [
        nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(4096, num_classes),
    ]  # fmt: skip
    network = Pyramid(features, 7, classifier)
    for layer in _layers(network):
        convolution = isinstance(layer, nn.Conv2d)
        _draw(layer, math.sqrt(2 / layer.weight[:, 0].numel()) if convolution else 0.01)
    return network


def _layers(network: nn.Module) -> Iterator[nn.Conv2d | nn.Linear]:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield module


def _draw(layer: nn.Conv2d | nn.Linear, deviation: float, bias: float = 0.0) -> None:
    nn.init.normal_(layer.weight, std=deviation)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
