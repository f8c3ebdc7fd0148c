"""How alike two masks are."""

from __future__ import annotations

import numpy as np

from sam_infer.types import BoolArray


def dice(a: BoolArray, b: BoolArray) -> float:
    """Dice of two bool masks of one shape, 2D or 3D; 1 where both are empty."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / total if total else 1.0
