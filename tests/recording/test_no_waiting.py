"""On a GPU no step waits for the device. What can be proved without one: on PyTorch's `meta` device
tensors have shapes and no values, and whatever looks at one (`item`, `bool`, `cpu`, `nonzero`, an
index by a mask) raises; there, steps go through, and only emptying the buffers fails."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded import ALWAYS
from torch import Tensor, nn

from gradflow import Recorder, build_network


def residual() -> tuple[nn.Module, Tensor]:
    return build_network("cifar", depth=8, width=2), torch.zeros(2, 3, 8, 8)


class Sparse(nn.Module):
    """Parameters without gradient, of several formats, and outputs of several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.lstm, self.small = nn.LSTM(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.first(x))
        return self.small(y.bfloat16())


def mixed() -> tuple[nn.Module, Tensor]:
    return Sparse(), torch.zeros(3, 2, 4)


@pytest.mark.parametrize("make", [residual, mixed])
@pytest.mark.parametrize("quantities", ["default", "all"])
def test_steps_look_at_no_value(
    make: Callable[[], tuple[nn.Module, Tensor]], quantities: str
) -> None:
    model, x = (each.to("meta") for each in make())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    recorder: Any = Recorder(model, quantities, ALWAYS, optimizer)
    recorder.__enter__()
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        assert recorder.step(loss, accuracy=loss)  # unknown until the next flush
        optimizer.step()
    optimizer.zero_grad()
    recorder.step()  # without any gradient
    assert recorder._buffers["weights"].steps == [0, 1, 2, 3]
    for value in (lambda: loss.item(), lambda: bool(loss), lambda: loss.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            value()
    with pytest.raises(NotImplementedError, match="no data"):
        recorder.flush()
