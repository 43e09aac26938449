"""The memory layout that kernels read tensors in, so that equal values give equal bits in any layout."""

from __future__ import annotations

import torch


def layout(x: torch.Tensor) -> torch.memory_format:
    """The layout in which kernels read `x`: channels last where those of (B, C, h, w) are adjacent, else contiguous."""
    last = x.ndim == 4 and x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if last else torch.contiguous_format


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x` in its `layout` from an aligned address; a copy only where it is not.

    The compiler orders a sum by what it knows of strides and addresses.
    """
    found = x.contiguous(memory_format=layout(x))
    return found.clone(memory_format=torch.preserve_format) if found.data_ptr() % 16 else found
