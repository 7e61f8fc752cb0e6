"""What is measured: each quantity's table, source, reduction, unit and meaning, in one place.

A quantity is the L2 norm (over all elements) or the root mean square of one kind of tensor. What
belongs together (a module's own parameters, several calls in one step) combines as √Σ² for a norm
and over all elements for an RMS.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gradflow.errors import SpecError


@dataclass(frozen=True)
class Quantity:
    """One recorded column."""

    name: str
    table: str
    source: str
    unit: str
    meaning: str

    @property
    def is_rms(self) -> bool:
        """Whether the norm is divided by √(number of elements)."""
        return self.name.endswith("_rms")

    @property
    def is_gradient(self) -> bool:
        """Whether it is of a gradient, and so of what the loss was multiplied by."""
        return "_grad_" in self.name


QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        Quantity(
            "weight_grad_norm",
            "weights",
            "parameter.grad",
            "loss / parameter",
            "L2 norm of the loss's gradient with respect to all of the module's own parameters "
            "together",
        ),
        Quantity(
            "weight_norm",
            "weights",
            "parameter",
            "parameter",
            "L2 norm of all of the module's own parameters together, before the update",
        ),
        Quantity(
            "update_norm",
            "weights",
            "parameter after − before",
            "parameter",
            "L2 norm of what the optimizer added to all of the module's own parameters",
        ),
        Quantity(
            "output_rms",
            "outputs",
            "output",
            "output",
            "root mean square of the module's output (a conv or linear layer's pre-activation)",
        ),
        Quantity(
            "output_grad_norm",
            "outputs",
            "output's gradient",
            "loss / output",
            "L2 norm of the loss's gradient with respect to the module's output",
        ),
        Quantity(
            "branch_rms",
            "blocks",
            "branch term",
            "output",
            "root mean square of the branch's term of the sum, β·F(x)",
        ),
        Quantity(
            "skip_rms",
            "blocks",
            "skip term",
            "output",
            "root mean square of the skip's term of the sum; 0 where there is no such term",
        ),
        Quantity(
            "branch_grad_norm",
            "blocks",
            "branch's gradient",
            "loss / output",
            "L2 norm of the loss's gradient with respect to the branch F(x)",
        ),
        Quantity(
            "skip_grad_norm",
            "blocks",
            "skip's gradient",
            "loss / output",
            "L2 norm of the part of the gradient with respect to x that comes through the skip",
        ),
    )
}

ALL = tuple(QUANTITIES)
DEFAULT = tuple(name for name in ALL if name != "update_norm")
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
_LOCAL = ("weight_norm", "update_norm", "lr")  # the same on every rank


def select(names: str | Iterable[str]) -> dict[str, list[Quantity]]:
    """Quantities by table. `names` is `default`, `all`, or one or more quantities' names.

    Raises:
        SpecError: a name that no quantity has.
    """
    named = {"default": DEFAULT, "all": ALL}
    chosen = named.get(names, (names,)) if isinstance(names, str) else tuple(names)
    unknown = [name for name in chosen if name not in QUANTITIES]
    if unknown:
        raise SpecError(f"quantities={unknown[0]}: allowed is default, all, or {', '.join(ALL)}")
    tables: dict[str, list[Quantity]] = {}
    for name in ALL:
        if name in chosen:
            tables.setdefault(QUANTITIES[name].table, []).append(QUANTITIES[name])
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
        gradient = "grad" in quantity
        words = [
            "after unscaling" if gradient and self.scaled else "",
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
