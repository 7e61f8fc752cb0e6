"""Residual networks for images and their plain twins: CIFAR-style and ImageNet-style."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.networks.layers import Layers
from gradflow.networks.skips import Skip

MakeSkip = Callable[[int, int, int], Skip]
"""(block from 1, number of blocks, channels) -> that block's skip."""

IMAGENET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks of each stage by depth; bottlenecks from 50. He et al. 2015, table 1."""
EXPANSION = 4
"""A bottleneck's output has so many times the channels of its 3×3 convolution."""


class SubsampleAndPad(nn.Module):
    """The shortcut without parameters: every `stride`-th pixel, and zeros for the new channels.

    Option A of He et al. 2015 (arXiv 1512.03385, §3.3, §4.2). (N, C, H, W) becomes
    (N, channels, ⌈H/stride⌉, ⌈W/stride⌉).
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.channels - x.shape[1]))


class Block(nn.Module):
    """A branch of two or three convolutions and the skip that joins it to the block's input.

    Order `post` (He et al. 2015): y = act(skip(shortcut(x), F(x))), F of convolutions each followed
    by its norm, with the activation between. Order `pre` (He et al. 2016, arXiv 1603.05027):
    y = skip(shortcut(x), F(x)), F of (norm, activation, convolution) and nothing after the sum.

    Args:
        channels: of the input and of each convolution's output.
        kernels, strides: of each convolution.
        shortcut: what brings x to the branch's shape; None where it has it already, or no skip
            uses x. Called `downsample`, as in torchvision.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        *,
        layers: Layers,
        order: str,
        skip: Skip,
        shortcut: nn.Module | None,
    ) -> None:
        super().__init__()
        self.pre = order == "pre"
        self.convolutions = len(kernels)
        for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            conv = layers.convolution(channels[i], channels[i + 1], kernel, stride)
            norm = layers.normalize_maps(channels[i] if self.pre else channels[i + 1])
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", norm)
        self.activation = layers.activate()
        self.downsample = shortcut
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y: Tensor = self.skip(shortcut, self.branch(x))
        return y if self.pre else self.activation(y)

    def branch(self, x: Tensor) -> Tensor:
        """F(x)."""
        for i in range(1, self.convolutions + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            if self.pre:
                x = conv(self.activation(norm(x)))
            else:
                x = norm(conv(x))
                x = self.activation(x) if i < self.convolutions else x
        return x


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pooling and a linear readout: (N, C, H, W) -> logits.

    The first block of every stage but the first halves H and W and doubles the channels. Modules
    are named as torchvision's ResNet names them (`conv1`, `bn1`, `layer1.0.conv1`, …,
    `layer1.0.downsample.0`, `fc`), also where the norm is not batch normalisation; a block's join
    is `layer1.0.skip`. Order `pre` has no norm and activation after the stem, but before pooling,
    where the norm is called `bn_final`; its projections have no norm.

    Args:
        blocks: number of blocks of each stage.
        width: channels of the stem and of the first stage.
        stem: `cifar`, a 3×3 convolution; or `imagenet`, 7×7 of stride 2 and max pooling.
        bottleneck: blocks of 1×1, 3×3 and 1×1 convolutions in place of two 3×3; the stride is on
            the 3×3 one, as in torchvision.
        shortcut: where shapes change, `A` subsample and pad, `B` a 1×1 convolution and a norm.
            Without a skip there is neither.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        width: int,
        stem: str,
        bottleneck: bool,
        order: str,
        shortcut: str,
        layers: Layers,
        make_skip: MakeSkip,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.pre = order == "pre"
        self.stages = len(blocks)
        if stem == "imagenet":
            self.conv1 = layers.convolution(in_channels, width, 7, stride=2)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = layers.convolution(in_channels, width, 3)
            self.maxpool = nn.Identity()
        if not self.pre:
            self.bn1 = layers.normalize_maps(width)
        self.activation = layers.activate()

        def shortcut_of(channels_in: int, channels_out: int, stride: int) -> nn.Module | None:
            if stride == 1 and channels_in == channels_out:
                return None
            if shortcut == "A":
                return SubsampleAndPad(channels_out, stride)
            projection = [layers.convolution(channels_in, channels_out, 1, stride)]
            norm = [] if self.pre else [layers.normalize_maps(channels_out)]
            return nn.Sequential(*projection, *norm)

        channels, made = width, 0
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            outer = inner * EXPANSION if bottleneck else inner
            members = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                made += 1
                skip = make_skip(made, sum(blocks), outer)
                members.append(
                    Block(
                        (channels, inner, inner, outer) if bottleneck else (channels, inner, outer),
                        (1, 3, 1) if bottleneck else (3, 3),
                        (1, stride, 1) if bottleneck else (stride, 1),
                        layers=layers,
                        order=order,
                        skip=skip,
                        shortcut=shortcut_of(channels, outer, stride) if skip.uses_skip else None,
                    )
                )
                channels = outer
            self.add_module(f"layer{stage + 1}", nn.Sequential(*members))
        if self.pre:
            self.bn_final = layers.normalize_maps(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.pre:
            x = self.activation(self.bn1(x))
        x = self.maxpool(x)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        if self.pre:
            x = self.activation(self.bn_final(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def cifar_blocks(depth: int) -> tuple[int, int, int]:
    """The blocks of each stage of a network of depth 6n+2: n. He et al. 2015, §4.2."""
    n = (depth - 2) // 6
    return n, n, n
