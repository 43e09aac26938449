"""The smallest Triton kernel: proof that this machine can compile and launch one (it needs a host C compiler too)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import FUSED
from .capability import reason_of


@triton.jit
def _count(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, offsets)


def run() -> str | None:
    """Why a Triton kernel cannot run on the current device; None if one just did."""
    try:
        x = torch.full((32,), -1, dtype=torch.int32, device="cuda")
        _count[(1,)](x, BLOCK=32, **FUSED)
        if x.tolist() == list(range(32)):
            return None
        return "a Triton kernel ran here with a wrong result"
    except Exception as error:  # whatever the compiler, the driver or the C compiler behind them has to say
        return reason_of(error, "Triton")
