"""What is measured: each quantity's table, reduction, unit and meaning, in one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gradflow.errors import SpecError


@dataclass(frozen=True)
class Quantity:
    """One recorded column.

    Attributes:
        reduction: how what belongs together (a module's own parameters, several calls in one step)
            becomes one value: `norm` √Σ² over all elements; `rms` that over √(their number); `max`
            the largest; `sum`; `share` the sum over the number of elements; `dead` the share of
            units that nothing reaches; `mean` over calls, and `ratio` one of all parameters
            together, both null where not defined.
    """

    name: str
    table: str
    reduction: str
    unit: str
    meaning: str

    @property
    def is_gradient(self) -> bool:
        """Whether it scales as a gradient does, and so with what the loss was multiplied by."""
        return self.unit.startswith("loss /")

    @property
    def is_detail(self) -> bool:
        """Whether it is recorded where it is asked for only."""
        return self.name in DETAILS

    @property
    def is_norm(self) -> bool:
        """Whether it is the L2 norm or root mean square of something."""
        return self.reduction in ("norm", "rms")


_NORMS = (
    Quantity(
        "weight_grad_norm",
        "weights",
        "norm",
        "loss / parameter",
        "L2 norm of the loss's gradient with respect to all of the module's own parameters "
        "together",
    ),
    Quantity(
        "weight_norm",
        "weights",
        "norm",
        "parameter",
        "L2 norm of all of the module's own parameters together, before the update",
    ),
    Quantity(
        "update_norm",
        "weights",
        "norm",
        "parameter",
        "L2 norm of what the optimizer added to all of the module's own parameters",
    ),
    Quantity(
        "output_rms",
        "outputs",
        "rms",
        "output",
        "root mean square of the module's output (a conv or linear layer's pre-activation)",
    ),
    Quantity(
        "output_grad_norm",
        "outputs",
        "norm",
        "loss / output",
        "L2 norm of the loss's gradient with respect to the module's output",
    ),
    Quantity(
        "branch_rms",
        "blocks",
        "rms",
        "output",
        "root mean square of the branch's term of the sum, β·F(x)",
    ),
    Quantity(
        "skip_rms",
        "blocks",
        "rms",
        "output",
        "root mean square of the skip's term of the sum; 0 where there is no such term",
    ),
    Quantity(
        "branch_grad_norm",
        "blocks",
        "norm",
        "loss / output",
        "L2 norm of the loss's gradient with respect to the branch F(x)",
    ),
    Quantity(
        "skip_grad_norm",
        "blocks",
        "norm",
        "loss / output",
        "L2 norm of the part of the gradient with respect to x that comes through the skip",
    ),
)

_DETAILS = (
    Quantity(
        "update_ratio",
        "weights",
        "ratio",
        "1",
        "update_norm over weight_norm; null where that is 0",
    ),
    Quantity(
        "grad_max",
        "weights",
        "max",
        "loss / parameter",
        "largest absolute value in the gradient with respect to the module's own parameters",
    ),
    Quantity(
        "grad_nonfinite",
        "weights",
        "sum",
        "elements",
        "how many elements of that gradient are infinite or not a number",
    ),
    Quantity(
        "grad_zeros",
        "weights",
        "share",
        "share",
        "share of that gradient's elements that are exactly zero",
    ),
    Quantity(
        "grad_subnormals",
        "weights",
        "share",
        "share",
        "share of that gradient's elements that are not zero, and below the smallest normal number "
        "of their format, as they are in memory",
    ),
    Quantity(
        "grad_cosine",
        "weights",
        "ratio",
        "1",
        "cosine of that gradient and the one of the step before; null where either is 0",
    ),
    Quantity(
        "noise_scale",
        "weights",
        "ratio",
        "backward passes",
        "gradient noise scale tr(Σ) / |G|² of that gradient (McCandlish et al. 2018, appendix "
        "A.1), estimated from the n ≥ 2 backward passes of the step, in units of one pass's batch; "
        "null where noise hides the gradient in so few, where more than these is in it, and where "
        "forward passes of the model were not as many",
    ),
    Quantity(
        "grad_rank",
        "weights",
        "ratio",
        "1",
        "effective rank (Roy & Vetterli 2007) of the gradient with respect to the module's weight "
        "as a matrix (first axis, all others): e to the entropy of its singular values",
    ),
    Quantity(
        "output_max",
        "outputs",
        "max",
        "output",
        "largest absolute value in the module's output",
    ),
    Quantity(
        "output_nonfinite",
        "outputs",
        "sum",
        "elements",
        "how many elements of the module's output are infinite or not a number",
    ),
    Quantity(
        "output_spread",
        "outputs",
        "mean",
        "share",
        "share of the output's mean square that differs between the samples of a pass: Σ Var / Σ "
        "mean of squares, over one sample's elements, of the first tensor of several; null where "
        "its first axis is not as long as that of the model's first input, taken for the samples",
    ),
    Quantity(
        "output_grad_zeros",
        "outputs",
        "share",
        "share",
        "share of the elements of the gradient with respect to the output that are exactly zero",
    ),
    Quantity(
        "output_grad_subnormals",
        "outputs",
        "share",
        "share",
        "share of these elements that are not zero, and below the smallest normal number of their "
        "format, as they are in memory",
    ),
    Quantity(
        "dead_units",
        "outputs",
        "dead",
        "share",
        "share of the output's units (channels, or features) that no gradient comes through, from "
        "any sample or place, of the first tensor of several; null below 16 of these a unit in "
        "the step, and where it is not known which axis they are",
    ),
    Quantity(
        "branch_x_grad_norm",
        "blocks",
        "norm",
        "loss / output",
        "L2 norm of the part of the gradient with respect to x that does not come through the "
        "skip: through the branch, where nothing else uses x; a difference, to the rounding of "
        "the whole",
    ),
    Quantity(
        "x_grad_cosine",
        "blocks",
        "mean",
        "1",
        "cosine of the two parts of the gradient with respect to x, through the skip and not; null "
        "where either is 0, or lost in rounding",
    ),
)

QUANTITIES: dict[str, Quantity] = {q.name: q for q in (*_NORMS, *_DETAILS)}
ALL = tuple(q.name for q in _NORMS)
DEFAULT = tuple(name for name in ALL if name != "update_norm")
DETAILS = tuple(q.name for q in _DETAILS)
GROUPS = {"default": DEFAULT, "all": ALL, "details": DETAILS}
"""What may be named together: the norms that are recorded by default, all norms, and the rest."""
OF_WHOLE_BATCHES = {"dead_units", "noise_scale", "output_spread", "x_grad_cosine"}
"""What ranks that share a batch cannot put together from their parts."""
OF_WHOLE_PARAMETERS = {"grad_cosine", "grad_rank", "update_ratio"}
"""What ranks that share the parameters cannot."""
STEPS = {
    "loss": {"unit": "loss", "meaning": "training loss of the step's batches"},
    "accuracy": {
        "unit": "share",
        "meaning": "accuracy on the step's batches, in training mode (batch statistics)",
    },
    "lr": {"unit": "1", "meaning": "learning rate of the optimizer's first group"},
    "grad_norm": {
        "unit": "loss / parameter",
        "meaning": "L2 norm of the loss's gradient with respect to all floating-point parameters",
    },
}
"""Columns of the table `steps` that have a fixed meaning."""
_LOCAL = ("weight_norm", "update_norm", "update_ratio", "lr")  # the same on every rank


def select(names: str | Iterable[str]) -> dict[str, list[Quantity]]:
    """Quantities by table. `names` are one or more quantities' names, or those of groups of them.

    Raises:
        SpecError: a name that there is not.
    """
    listed = (names,) if isinstance(names, str) else tuple(names)
    for name in listed:
        if name not in QUANTITIES and name not in GROUPS:
            allowed = ", ".join((*GROUPS, *QUANTITIES))
            raise SpecError(f"quantities={name}: allowed is {allowed}")
    chosen = {one for name in listed for one in GROUPS.get(name, (name,))}
    tables: dict[str, list[Quantity]] = {}
    for quantity in QUANTITIES.values():
        if quantity.name in chosen:
            tables.setdefault(quantity.table, []).append(quantity)
    return tables


@dataclass(frozen=True)
class Conditions:
    """Under which values were measured.

    Attributes:
        ranks: over how many a value is reduced, where each had a share of the batch.
        passes: forward passes of the model in a step, the fewest and the most seen.
        scaled: whether the loss was scaled; its gradients are divided by that.
        compiled: whether torch.compile runs the model or a part of it.
    """

    ranks: int = 1
    passes: tuple[int, int] = (1, 1)
    scaled: bool = False
    compiled: bool = False

    def text(self, quantity: str) -> str:
        """Those that matter to a quantity, in words; empty where none does."""
        if quantity in _LOCAL:
            return ""
        fewest, most = self.passes
        known = QUANTITIES.get(quantity)
        scales = known.is_gradient if known else quantity == "grad_norm"
        gradient = scales or "grad" in quantity or quantity in ("noise_scale", "dead_units")
        words = [
            "after unscaling" if scales and self.scaled else "",
            "" if most <= 1 else f"accumulated over {_range(fewest, most)} forward passes",
            f"reduced over {self.ranks} ranks" if self.ranks > 1 else "",
            "before clipping" if gradient else "",
            "compiled" if self.compiled else "eager",
        ]
        return ", ".join(filter(None, words))


def _range(fewest: int, most: int) -> str:
    return str(most) if fewest == most else f"{fewest} to {most}"


def meanings(conditions: Conditions | None = None) -> dict[str, dict[str, str]]:
    """Quantity -> meaning and unit, for the metadata of the recorded files.

    The meaning ends with the conditions, where they are given: "…; before clipping, eager".
    """
    notes = {q.name: {"unit": q.unit, "meaning": q.meaning} for q in QUANTITIES.values()} | STEPS
    if conditions is None:
        return notes
    return {
        name: note | {"meaning": "; ".join(filter(None, (note["meaning"], conditions.text(name))))}
        for name, note in notes.items()
    }
