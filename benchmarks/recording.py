"""What recording costs: a training step with the default recorder over one without.

`python -m benchmarks.recording [DEPTH …]`. Both are measured in one process on one thread, in turn,
step by step, on residual networks fed with batches of 64 images of 8×8; the ratio of each pair is
what counts, absolute times are for orientation.
"""

from __future__ import annotations

import contextlib
import sys
import time

import numpy as np
import torch
from torch.nn import functional

from gradflow import Recorder, build_network
from gradflow.run import set_up_process

PAIRS, WARM_UP = 200, 10


def ratios(depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each bare step and of each recorded one, [PAIRS] each."""
    arms = []
    for recorded in (False, True):
        network = build_network("cifar", depth=depth, in_channels=1)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        recorder = Recorder(network, optimizer=optimizer) if recorded else None
        arms.append((network, optimizer, recorder))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)
    seconds = np.zeros((2, WARM_UP + PAIRS))
    with contextlib.ExitStack() as stack:
        for _, _, recorder in arms:
            if recorder is not None:
                stack.enter_context(recorder)
        for pair in range(WARM_UP + PAIRS):
            for arm, (network, optimizer, recorder) in enumerate(arms):
                began = time.perf_counter()
                optimizer.zero_grad()
                loss = functional.cross_entropy(network(images), labels)
                loss.backward()
                if recorder is not None:
                    recorder.step(loss)
                optimizer.step()
                seconds[arm, pair] = time.perf_counter() - began
    return seconds[0, WARM_UP:], seconds[1, WARM_UP:]


def main(depths: list[int]) -> None:
    """Print a line a depth."""
    set_up_process(threads=1)
    for depth in depths:
        bare, recorded = ratios(depth)
        ratio = recorded / bare
        print(
            f"depth {depth}: bare step {np.median(bare) * 1e3:.1f} ms; recorded over bare: "
            f"median {np.median(ratio):.3f}, mean {recorded.sum() / bare.sum():.3f}"
        )


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [20, 56, 152])
