"""Measurements with passes of their own, on any `nn.Module`.

Each function returns readings, one row of probes.parquet each, and leaves the model as it was:
mode, parameters, buffers (with batch norm's running statistics), `.grad`, hooks, and torch's random
generators. It runs the model in the mode in which it finds it, so that batch norm takes the batch's
statistics in training mode. What is not finite is read as it is. A `Recorder` that is watching the
model sees these passes like any other, unless they are in its `paused()`.
"""

from gradflow.recording.probes.derivatives import (
    gradient_cosine,
    jacobian_moments,
    jacobian_spectrum,
    shattering,
    spectrum_variance,
)
from gradflow.recording.probes.displacements import displacement
from gradflow.recording.probes.formats import underflow_depth
from gradflow.recording.probes.lesions import deleted, lesion, swapped
from gradflow.recording.probes.passes import Reading, propagate
from gradflow.recording.probes.paths import path_length, scaled_branch_gradient
from gradflow.recording.probes.signals import (
    batch_variance,
    cosine_map,
    layer_std,
    pairs_at,
    token_cosine,
)

__all__ = [
    "Reading",
    "batch_variance",
    "cosine_map",
    "deleted",
    "displacement",
    "gradient_cosine",
    "jacobian_moments",
    "jacobian_spectrum",
    "layer_std",
    "lesion",
    "pairs_at",
    "path_length",
    "propagate",
    "scaled_branch_gradient",
    "shattering",
    "spectrum_variance",
    "swapped",
    "token_cosine",
    "underflow_depth",
]
