"""Sizes and strides in the units that Triton's compiler needs to see."""

from __future__ import annotations

import math


def unit_of(*counts: int) -> int:
    """The largest power of two up to 16 that divides all of `counts`.

    Triton asks of a size or a stride only whether it is a multiple of 16: where it is one of 4 or 8, as rows of 152 or
    344 channels are, loads would be of one number each. Kernels therefore take such sizes in units. Strides
    may fit 32 bits in units alone, so that kernels multiply them back in 64.
    """
    return math.gcd(16, *counts)


def blocks(total: int, size: int) -> int:
    """Blocks of `size` that hold `total`. `triton.cdiv`, which kernels may call too, takes microseconds on the host."""
    return -(-total // size)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
