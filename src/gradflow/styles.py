"""What arms and quantities look like and are called, in figures for paper and on the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Style = tuple[str, Any, str]
"""Colour, line style and marker, as matplotlib takes them."""

# Okabe & Ito's colours; plain and residual are far apart in lightness too.
KNOWN: dict[str, Style] = {
    "": ("#00517F", "-", "o"),  # a single record, without arms
    "plain": ("#D55E00", (0, (4, 1.5)), "s"),
    "residual": ("#00517F", "-", "o"),
    "forward only": ("#009E73", (0, (1, 1)), "^"),
    "backward only": ("#CC79A7", (0, (5, 1, 1, 1)), "v"),
}
OTHERS: list[Style] = [
    ("#E69F00", (0, (6, 2, 1, 2, 1, 2)), "D"),
    ("#56B4E9", (0, (3, 1)), "P"),
    ("#000000", (0, (1, 2)), "*"),
    ("#8A8A00", (0, (8, 2)), "<"),
    ("#777777", (0, (2, 2, 6, 2)), ">"),
]
LABELS = {
    "weight_grad_norm": "L2 norm of the weight gradient (loss / parameter)",
    "weight_norm": "L2 norm of the weights",
    "update_norm": "L2 norm of the update",
    "output_rms": "RMS of the output",
    "output_grad_norm": "L2 norm of the output's gradient (loss / output)",
    "branch_rms": "RMS of the branch's term",
    "skip_rms": "RMS of the skip's term",
    "branch_grad_norm": "L2 norm of the branch's gradient (loss / output)",
    "skip_grad_norm": "L2 norm of the gradient through the skip (loss / output)",
    "update_ratio": "L2 norm of the update over that of the weights",
    "grad_max": "largest absolute weight gradient (loss / parameter)",
    "grad_nonfinite": "NaN or Inf in the weight gradient (elements)",
    "grad_zeros": "exact zeros in the weight gradient (share)",
    "grad_subnormals": "subnormal numbers in the weight gradient (share)",
    "grad_cosine": "cosine of the weight gradient and that of the step before",
    "noise_scale": "gradient noise scale (backward passes)",
    "grad_rank": "effective rank of the weight gradient",
    "output_max": "largest absolute output",
    "output_nonfinite": "NaN or Inf in the output (elements)",
    "output_spread": "what differs between samples, of the output's mean square (share)",
    "output_grad_zeros": "exact zeros in the output's gradient (share)",
    "output_grad_subnormals": "subnormal numbers in the output's gradient (share)",
    "dead_units": "units that no gradient comes through (share)",
    "branch_x_grad_norm": "L2 norm of the gradient not through the skip (loss / output)",
    "x_grad_cosine": "cosine of the gradients through the skip and not",
}
"""What figures and the page call the quantities: what is taken, of what, and its unit."""


def label(quantity: str) -> str:
    return LABELS.get(quantity, quantity.replace("_", " "))


def styles_of(arms: Iterable[str]) -> dict[str, Style]:
    found = {name: KNOWN[name] for name in arms if name in KNOWN}
    others = sorted(set(arms) - set(found))
    return found | {n: OTHERS[i % len(OTHERS)] for i, n in enumerate(others)}


def style(arm: str) -> Style:
    """Colour, line style and marker of an arm, the same in all figures."""
    return styles_of([arm])[arm]


_ON_DARK = {"#00517F": "#6DB9EE", "#D55E00": "#FF8A3D", "#009E73": "#2FCB9F", "#000000": "#DDDDDD",
            "#8A8A00": "#C9C94A", "#777777": "#A9A9A9"}  # fmt: skip
"""Colours that a dark page has in place of those that it would swallow."""


def on_screen(arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Each arm's colour on a light and on a dark page, and its dashes in pixels."""
    found = {}
    for arm, (color, line, _) in styles_of(arms).items():
        dash = [] if line == "-" else [2.5 * part for part in line[1]]
        found[arm] = {"light": color, "dark": _ON_DARK.get(color, color), "dash": dash}
    return found
