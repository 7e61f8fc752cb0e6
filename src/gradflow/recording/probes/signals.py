"""How inputs and their differences pass forward: variances, and cosines of pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradflow.errors import GradflowError, SpecError
from gradflow.recording.modules import is_block
from gradflow.recording.probes.passes import Reading, observe, watched, wide


def batch_variance(model: nn.Module, inputs: Tensor) -> list[Reading]:
    """`batch_variance`: how much the outputs of each module differ over the batch.

    The variance over the N inputs (population, divided by N) of every single element of the output
    (N, …), each place of a feature map for itself; then the mean over the elements. In units of
    the output, squared.
    """
    return observe("batch_variance", model, inputs, _variance)


def layer_std(model: nn.Module, inputs: Tensor) -> list[Reading]:
    """`response_std`: standard deviation of each module's output over all its elements.

    Of a batch norm after a convolution it is the response of He et al. 2015 (arXiv 1512.03385,
    Fig. 7): before nonlinearity and addition.
    """
    return observe("response_std", model, inputs, lambda y: wide(y).std(correction=0))


def cosine_map(model: nn.Module, first: Tensor, second: Tensor) -> list[Reading]:
    """`cosine`: of the outputs for pairs of inputs, at each module, the mean over the pairs.

    ⟨y, y'⟩ / (‖y‖·‖y'‖) over all elements of an output; nan where one is zero. Both halves of the
    pairs go through as one batch, with whose statistics batch norm normalises in training mode.
    Poole et al. 2016 (arXiv 1606.05340, eq. 5).

    Args:
        first, second: (n, …) each, such as `pairs_at` makes.
    """
    return observe("cosine", model, torch.cat([first, second]), _cosine_of_halves)


def pairs_at(inputs: Tensor, cosine: float) -> tuple[Tensor, Tensor]:
    """Pairs of inputs with that cosine and equal norms, to rounding.

    The first half of the batch is taken as it is. Each gets a partner in the plane that it spans
    with its counterpart in the second half (Gram–Schmidt), at the angle on that side.

    Args:
        inputs: (2n, …), no two that make a pair parallel; of an odd number the last is left out.

    Returns:
        first and second, (n, …) each.

    Raises:
        SpecError: no cosine, or fewer than two inputs.
    """
    if not -1 <= cosine <= 1:
        raise SpecError(f"cosine={cosine}: allowed is -1 to 1")
    count = len(inputs) // 2
    if not count:
        raise SpecError(f"inputs: {len(inputs)} make no pair")
    first = inputs[:count]
    along, other = wide(first).flatten(1), wide(inputs[count : 2 * count]).flatten(1)
    lengths = along.norm(dim=1, keepdim=True)
    along = along / lengths
    across = other - (other * along).sum(dim=1, keepdim=True) * along
    across = across / across.norm(dim=1, keepdim=True)
    second = lengths * (cosine * along + (1 - cosine**2) ** 0.5 * across)
    return first, second.to(inputs.dtype).view_as(first)


def token_cosine(model: nn.Module, inputs: Tensor) -> list[Reading]:
    """`token_cosine`: at each block's output (N, T, width), the mean cosine of different tokens.

    Over the T(T − 1) pairs of different tokens of one input, and over the inputs. 1 is rank
    collapse: Dong et al. 2021 (arXiv 2103.03404), Noci et al. 2022 (arXiv 2206.03126).

    Raises:
        GradflowError: no block has outputs of that shape.
    """
    blocks = {name: module for name, module in watched(model).items() if is_block(module)}
    readings = observe("token_cosine", model, inputs, _cosine_of_tokens, blocks)
    if not readings:
        raise GradflowError("token_cosine: no block has an output of shape (N, tokens, width)")
    return readings


def _variance(output: Tensor) -> Tensor:
    return wide(output).var(dim=0, correction=0).mean()


def _cosine_of_halves(output: Tensor) -> Tensor:
    first, second = wide(output).reshape(2, len(output) // 2, -1)
    products = (first * second).sum(dim=1)
    return (products / (first.norm(dim=1) * second.norm(dim=1))).mean()


def _cosine_of_tokens(output: Tensor) -> Tensor | None:
    if output.dim() != 3:
        return None
    tokens = wide(output)
    count = tokens.shape[1]
    units = tokens / tokens.norm(dim=2, keepdim=True)
    # ‖Σu‖² is the sum over all pairs of tokens, of which `count` are of a token with itself.
    return ((units.sum(dim=1).square().sum(dim=1) - count) / (count * (count - 1))).mean()
