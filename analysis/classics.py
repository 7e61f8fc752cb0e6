"""How the gradient enters networks of three decades: one figure, each at its own initialisation.

`python -m analysis.classics [--out report/classics]` measures LeNet-5, AlexNet, VGG-16 and the 152
layers of He et al. 2015 without and with skips, on random images and labels, in one pass each, and
writes classics.svg, .pdf, .png and the numbers, classics.csv. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradflow
from analysis.compare import told
from gradflow import plots, tables
from gradflow.errors import GradflowError
from gradflow.networks import alexnet, build_network, lenet5, vgg16
from gradflow.options import Parser

QUANTITIES = ("weight_grad_norm", "output_grad_norm")


@dataclass(frozen=True)
class Subject:
    """A network to measure.

    Attributes:
        make: seed -> the network.
        shape: of an image: channels, height, width.
        arm: whose colour it has, as in other figures.
        initialisation: in words.
    """

    name: str
    make: Callable[[int], nn.Module]
    shape: tuple[int, int, int]
    classes: int
    initialisation: str
    arm: str = ""


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def _imagenet_152(skip: bool, seed: int) -> nn.Module:
    return build_network("imagenet", depth=152, skip=skip, num_classes=1000, seed=seed)


LARGE = (3, 224, 224)
SUBJECTS = (
    Subject("LeNet-5", partial(_seeded, lenet5), (1, 28, 28), 10, "U(±2.4/fan_in), 1998"),
    Subject("AlexNet", partial(_seeded, alexnet), LARGE, 1000, "N(0, .01²), biases 0 or 1, 2012"),
    Subject("VGG-16", partial(_seeded, vgg16), LARGE, 1000, "He, fan out; linear N(0, .01²)"),
    Subject("plain-152", partial(_imagenet_152, False), LARGE, 1000, "He, with BN", "plain"),
    Subject("ResNet-152", partial(_imagenet_152, True), LARGE, 1000, "He, with BN", "residual"),
)


def profile(subject: Subject, *, images: int, seed: int = 0) -> pd.DataFrame:
    """One row a convolution and linear layer, without those of shortcuts, in their order.

    Columns: network, arm, layer, place (0 the first, 1 the last), parameters of the network,
    weight_grad_norm and output_grad_norm of the mean cross-entropy, in training mode.
    """
    network = subject.make(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(images, *subject.shape, generator=generator)
    labels = torch.randint(subject.classes, (images,), generator=generator)
    torch.manual_seed(seed)  # of dropout
    with gradflow.Recorder(network, QUANTITIES) as recorder:
        loss = cross_entropy(network(batch), labels)
        loss.backward()
        recorder.step(loss)
    weights, outputs = (
        tables.profile(recorder.table(table), quantity).query("family == 'weights'")
        for table, quantity in zip(("weights", "outputs"), QUANTITIES, strict=True)
    )
    found = weights.merge(outputs[["layer", "output_grad_norm"]], on="layer", validate="1:1")
    found = found.sort_values("ordinal", ignore_index=True)
    return pd.DataFrame(
        {
            "network": subject.name,
            "arm": subject.arm,
            "layer": found["layer"],
            "place": found.index / (len(found) - 1),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            **{name: found[name] for name in QUANTITIES},
        }
    )


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a network: the norm at its first layer over that at its last, of both gradients."""
    rows = []
    for subject in SUBJECTS:
        part = frame[frame["network"] == subject.name]
        if part.empty:
            continue
        shares = {name: part[name].iloc[0] / part[name].iloc[-1] for name in QUANTITIES}
        rows.append(
            {
                "network": subject.name,
                "layers": len(part),
                "parameters": f"{part['parameters'].iloc[0]:,}",
                "weights, first/last": tables.short(shares["weight_grad_norm"]),
                "output, first/last": tables.short(shares["output_grad_norm"]),
                "initialisation": subject.initialisation,
            }
        )
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure, draw, and print the numbers."""
    parser = Parser(prog="python -m analysis.classics", description=__doc__)
    parser.add_argument("--out", default="report/classics", metavar="DIR", type=Path)
    parser.add_argument("--images", default=8, type=int, metavar="N", help="of the batch (8)")
    parser.add_argument("--seed", default=0, type=int, metavar="N", help="of all that is drawn (0)")
    return told(_draw, parser, arguments, name="classics")


def _draw(options: argparse.Namespace) -> None:
    if options.images < 2:
        raise GradflowError("--images: batch normalisation wants two or more")
    parts = []
    for subject in SUBJECTS:
        began = time.monotonic()
        parts.append(profile(subject, images=options.images, seed=options.seed))
        print(f"{subject.name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    frame = pd.concat(parts, ignore_index=True)
    print(summary(frame).to_string(index=False))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        frame.drop(columns="arm").to_csv(options.out / "classics.csv", index=False)
        written = plots.save(plots.across(frame), options.out / "classics")
    except OSError as error:
        raise GradflowError(f"--out {options.out}: {error.strerror}") from None
    print(f"drawn in {', '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(main())
