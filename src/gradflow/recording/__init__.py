"""Records gradient flow through any module in any loop."""

from gradflow.recording.recorder import Divergence, Recorder

__all__ = ["Divergence", "Recorder"]
