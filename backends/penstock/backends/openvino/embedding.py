"""Token embeddings, looked up outside the graph."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["embed"]

_HALF_OF_FLOAT32 = 16


def embed(table: NDArray[Any], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows of the checkpoint's own table, float32 [ids, hidden]: only pages that are looked at are ever read.

    In the graph, a plug-in for a processor without bfloat16 would hold the whole table in float32.
    """
    if table.dtype == ml_dtypes.bfloat16:  # the upper half of a float32
        rows = table.view(np.uint16)[ids].astype(np.uint32)
        return np.left_shift(rows, _HALF_OF_FLOAT32, out=rows).view(np.float32)
    return table[ids].astype(np.float32, copy=False)
