"""LeNet-5, AlexNet and VGG-16: sizes, shapes, and how they begin."""

import math

import pytest
import torch
from torch import nn

from gradflow.errors import SpecError
from gradflow.networks import alexnet, lenet5, vgg16

COUNTS = {lenet5: 61_706, alexnet: 61_100_840, vgg16: 138_357_544}


def layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(("make", "count"), COUNTS.items())
def test_parameter_counts(make, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == count


@pytest.mark.parametrize(
    ("make", "channels", "classes", "side"),
    [(lenet5, 1, 10, 28), (alexnet, 3, 1000, 224), (alexnet, 3, 1000, 63),
     (vgg16, 3, 1000, 224), (vgg16, 3, 1000, 32)],
)  # fmt: skip
def test_images_become_logits(make, channels, classes, side):
    with torch.device("meta"):
        logits = make()(torch.empty(2, channels, side, side))
        assert logits.shape == (2, classes)
        other = make(in_channels=2, num_classes=7)(torch.empty(2, 2, side, side))
        assert other.shape == (2, 7)


def test_lenet5_is_that_of_a_padded_image():
    """The digits' 28×28 pixels in the middle of 32×32, as in 1998."""
    torch.manual_seed(0)
    network, images = lenet5(), torch.randn(3, 1, 28, 28)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    network_of_32 = lenet5()
    network_of_32.load_state_dict(network.state_dict())
    network_of_32[0].padding = (0, 0)
    torch.testing.assert_close(network(images), network_of_32(padded))
    tanh = network[1]
    torch.testing.assert_close(
        tanh(torch.tensor([1.0, -1.0])), torch.tensor([1.0, -1.0]), atol=1e-4, rtol=0
    )


def test_lenet5_begins_uniform_in_a_range_of_each_layers_inputs():
    torch.manual_seed(0)
    for layer in layers(lenet5()):
        bound = 2.4 / layer.weight[0].numel()
        assert layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_alexnet_begins_as_in_2012():
    torch.manual_seed(0)
    found = layers(alexnet(num_classes=10))
    assert [layer.bias[0].item() for layer in found] == [0, 1, 0, 1, 1, 1, 1, 0]
    for layer in found:
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.02)


def test_vgg16_begins_as_in_torchvision():
    torch.manual_seed(0)
    for layer in layers(vgg16(num_classes=10)):
        assert not layer.bias.any()
        fan_out = layer.out_channels * 9 if isinstance(layer, nn.Conv2d) else None
        expected = math.sqrt(2 / fan_out) if fan_out else 0.01
        assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.05)


def test_a_bad_size_is_one_line():
    with pytest.raises(SpecError, match="num_classes=0: allowed is a whole number from 1"):
        lenet5(num_classes=0)
