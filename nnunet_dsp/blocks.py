"""Cutting large tensors into blocks of rows, for custom gradients that would otherwise make large temporaries."""

from __future__ import annotations

from torch import Tensor

_BLOCK = 2**20
"""Entries of a block on a CPU (4 MiB): its temporaries stay small and in memory that is mapped already."""


def row_blocks(tensor: Tensor) -> list[slice]:
    """Cut the rows of (B, C, R, W) into blocks; by shape alone, so nothing here grows with the annotations.

    On a CPU, what is made anew of a whole batch's logits costs as much to map as to compute. Elsewhere launching
    kernels costs more: one block.
    """
    items, channels, rows, width = tensor.shape
    step = max(1, _BLOCK // max(1, items * channels * width)) if tensor.device.type == "cpu" else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]
