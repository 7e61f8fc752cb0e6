"""Seeds that depend on what they are for and on nothing else."""

from __future__ import annotations

import hashlib
import json


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed for what `parts` name, such as (seed, parameter name) or (seed, epoch).

    The same parts give the same seed on every machine; `1` and `"1"` are different parts. (torch's
    CPU generator uses the low 32 bits.)
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
