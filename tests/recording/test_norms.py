"""Norms against `torch.linalg.vector_norm` in float64, one tensor after the other."""

import math
from collections.abc import Callable

import pytest
import torch
from recorded import near
from torch import Tensor

from gradflow.recording import norms as module
from gradflow.recording.norms import Norms, norm, norms

SIZES = (1, 7, 64, 127, 128, 131, 1000, 2**13 - 1, 2**13, 2**14, 2304, 36864, 2**16, 2**17)
MANY = 2**17 + 1


def exact(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()


def random(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def one_large(count: int) -> Tensor:
    """Every other square is lost beside the first one's, if added to it one after another."""
    tensor = torch.full((count,), 0.99 * 2**-12)
    tensor[0] = 1
    return tensor


FILLED: dict[str, Callable[[int], Tensor]] = {
    "normal": random,
    "1e-30": lambda count: torch.full((count,), 1e-30),
    "1e-21": lambda count: torch.full((count,), 1e-21),  # squares have few bits left in float32
    "1e25": lambda count: torch.full((count,), 1e25),
    "constant": lambda count: torch.full((count,), 0.1),
    "one large": one_large,
    "log-uniform": lambda count: 10 ** (random(count).remainder(1) * 50 - 27),
    "small and tiny": lambda count: torch.cat([torch.full((count,), 1e-23), torch.ones(1)]),
    "zeros": torch.zeros,
    "at the lower bound": lambda count: torch.full((count,), 1e-12 / count**0.5),
    "at the upper bound": lambda count: torch.full((count,), 1e15 / count**0.5),
}


@pytest.mark.parametrize("name", FILLED)
def test_float32_to_a_millionth(name: str) -> None:
    tensors = [FILLED[name](count) for count in SIZES]
    expected = near([exact(tensor) for tensor in tensors], rel=1e-6)
    assert norms(tensors).tolist() == expected
    assert [norm(tensor).item() for tensor in tensors] == expected


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("count", [MANY, 2**15 - 1, 2**15 + 127, 129])
def test_rows_that_are_not_full(name: str, count: int) -> None:
    tensor = FILLED[name](count)
    expected = near(exact(tensor), rel=1e-6)
    assert norms([tensor]).item() == expected
    assert norm(tensor).item() == expected


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("shape", [(64,), (4, 9), (8, 4, 3, 3), (64, 300)])
def test_tensors_of_one_shape_are_measured_together_as_each_alone(name: str, shape: tuple) -> None:
    """In any number and order, beside others, in any layout, and twice by one plan."""
    tensors = [
        FILLED[name](math.prod(shape))[: math.prod(shape)].reshape(shape) * factor
        for factor in (1, 0.5, 0, 3)
    ]
    if len(shape) == 4:
        tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    tensors[2:2] = [random(7), torch.tensor(2.0)]
    plan = Norms(tensors)
    for measured in (tensors, [2 * tensor for tensor in tensors], tensors):
        assert plan(measured).tolist() == near([exact(tensor) for tensor in measured], rel=1e-6)
    for others in (tensors[:3], [*tensors[:-1], random(9)]):
        with pytest.raises(RuntimeError, match="other sizes"):
            plan(others)


@pytest.mark.parametrize("count", [100, 2**13, 20_000, 2**16 + 7, 2**17])
def test_an_element_that_dwarfs_the_others(count: int) -> None:
    """Wherever it stands; one accumulator of float32 would be off by up to 2e-4."""
    for size in (2.0, 1.0, 0.5, 0.1):
        for place in {0, 1, 7, 8, 31, 32, count // 2, count - 1}:
            tensor = torch.full((count,), size * 2**-12)
            tensor[place] = 1
            assert norms([tensor]).item() == near(exact(tensor), rel=1e-6)


@pytest.mark.parametrize("exponent", range(-30, 26))
def test_the_whole_range_of_float32(exponent: int) -> None:
    tensors = [random(count) * 10.0**exponent for count in (5, 3000, 9000)]
    expected = [exact(tensor) for tensor in tensors]
    assert all(value > 0 and math.isfinite(value) for value in expected)
    assert norms(tensors).tolist() == near(expected, rel=1e-6)


@pytest.mark.parametrize("exponent", range(-30, 26, 5))
def test_float64_to_a_million_millionth(exponent: int) -> None:
    tensors = [random(count).double() * 10.0**exponent for count in (5, 9000, 2**17 + 1)]
    expected = [exact(tensor) for tensor in tensors]
    assert norms(tensors).tolist() == near(expected, rel=1e-12)


@pytest.mark.parametrize("exponent", [-173, 170])
def test_float64_beyond_its_squares(exponent: int) -> None:
    tensors = [random(count).double() * 10.0**exponent for count in (5, 9000)]
    expected = [exact(tensor * 10.0**-exponent) * 10.0**exponent for tensor in tensors]
    assert norms(tensors).tolist() == near(expected, rel=1e-12)
    assert [norm(tensor).item() for tensor in tensors] == near(expected, rel=1e-12)


def test_a_group_of_two_formats_has_one_norm() -> None:
    tensors = [random(9), random(20_000).double(), random(300)]
    together = exact(torch.cat([tensors[0], tensors[1]]))
    plan = Norms(tensors, groups=[2, 2, 0], count=3)
    assert plan(tensors).tolist() == near([exact(tensors[2]), 0, together], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    """Squares of fp16 overflow from 256 on, sums of bf16 stall at 256 times their first."""
    tensors = [(random(count) * 1000).to(dtype) for count in (5, 200, 9000)]
    tensors.append(torch.full((9000,), 1e-30 if dtype == torch.bfloat16 else 1e-7, dtype=dtype))
    expected = [exact(tensor) for tensor in tensors]
    assert norms(tensors).tolist() == near(expected, rel=1e-6)


@pytest.mark.parametrize("count", [3, 9000, MANY])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_and_infinity_stay_what_they_are(count: int, place: int) -> None:
    bad = {math.nan: math.isnan, math.inf: math.isinf, -math.inf: math.isinf}
    for value, check in bad.items():
        tensor = torch.ones(count)
        tensor[place] = value
        first, second = norms([tensor, torch.ones(4)]).tolist()
        assert check(first)
        assert second == 2
        assert check(norm(tensor).item())


def test_empty_tensors_and_empty_lists() -> None:
    assert norms([]).tolist() == []
    tensors = [torch.zeros(0), torch.tensor([3.0, 4.0]), torch.zeros(0, 5)]
    assert norms(tensors).tolist() == [0, 5, 0]


def test_layouts_and_shapes_do_not_matter() -> None:
    tensor = random(64 * 64 * 9).reshape(64, 64, 3, 3)
    views = [
        tensor.to(memory_format=torch.channels_last),
        tensor.permute(3, 1, 0, 2),
        tensor[:, ::2],
        tensor[0, 0, 0, 0],
        tensor.flip(0).requires_grad_(),
    ]
    expected = [exact(view.detach()) for view in views]
    assert norms([view.detach() for view in views]).tolist() == near(expected, rel=1e-6)


def test_formats_may_be_mixed() -> None:
    tensors = [random(9000), random(9000).double(), random(9000).bfloat16()]
    expected = [exact(tensor) for tensor in tensors]
    assert norms(tensors).tolist() == near(expected, rel=1e-6)
    assert norms(tensors)[1].item() == near(expected[1], rel=1e-14)


def test_what_is_measured_is_left_alone() -> None:
    tensors = [FILLED[name](9000) for name in FILLED]
    before = [tensor.clone() for tensor in tensors]
    norms(tensors)
    assert all(map(torch.equal, tensors, before))


def test_scaling_by_the_largest_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of devices without float64, tried on the CPU."""

    class Elsewhere:
        """A tensor that says it lies on another kind of device."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.device, self.dtype = tensor, torch.device("mps"), tensor.dtype

        def abs(self) -> Tensor:
            return self.tensor.abs()

        def float(self) -> Tensor:
            return self.tensor.float()

    for name in ("normal", "1e-30", "1e25", "zeros"):
        tensor = FILLED[name](200)
        value = module.norm(Elsewhere(tensor))  # type: ignore[arg-type]
        assert value.dtype == torch.float32
        assert value.item() == near(exact(tensor), rel=1e-6)
    broken = torch.tensor([1.0, math.nan])
    assert math.isnan(module.norm(Elsewhere(broken)).item())  # type: ignore[arg-type]
    infinite = torch.tensor([1.0, math.inf])
    assert not math.isfinite(module.norm(Elsewhere(infinite)).item())  # type: ignore[arg-type]
