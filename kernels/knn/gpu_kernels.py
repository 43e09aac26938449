"""The Triton kernels of the exact nearest-neighbour search; `gpu` says how they make one."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 32
"""Bank vectors that share a minimum; their place fits the 5 low bits of a packed distance."""
BLOCK = 4 * GROUP
"""Consecutive bank vectors that four groups share: see `_place`. Tiles of the bank are multiples of it."""

_NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _centred(x_ptr, centre_ptr, d, dim, x_d):
    """The channels `d` of a vector less the bank's centre, in float32, of float64 in float64; 0 beyond `dim`."""
    kind: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    x = tl.load(x_ptr + d.to(tl.int64) * x_d, mask=d < dim, other=0).to(kind)
    return x - tl.load(centre_ptr + d, mask=d < dim, other=0).to(kind)


@triton.jit(do_not_specialize=["exponent"])
def prepare_kernel(
    x_ptr, centre_ptr, low_ptr, facts_ptr, largest_ptr, exponent, dim, padded, x_n, x_d,
    UNIT: tl.constexpr, QUERY: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One vector: centred, scaled to [-1, 1], rounded to float16; writes 2 bytes a channel and 4 facts.

    The bank has one scale, 2**exponent, and a vector's facts are its squared norm, a bound on the norm of what was
    rounded, one on that of the rounding error, and the scale. A query has a scale of its own, and its facts are those
    that distances in units of 2 * its scale * the bank's need: the ratio of the bank's scale to twice its own, its
    squared norm in units, the bound on the error, and how many units a squared distance of 1 is.

    Reads a vector once where a block holds it (WHOLE), a query else twice. All but the facts is in float32, of float64
    in float64: float64 arithmetic would take longer than the memory does.
    """
    dim *= UNIT  # see `unit_of`
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_n * UNIT
    channel = tl.arange(0, BLOCK_D)
    x = _centred(x_ptr, centre_ptr, channel, dim, x_d)
    if QUERY:
        bank_norm = tl.sqrt(tl.load(largest_ptr))  # here, where nothing waits for them
        bank_rounded = tl.load(largest_ptr + 1)
        bank_lost = tl.load(largest_ptr + 2)
        bank_scale = tl.load(largest_ptr + 3)
        largest = tl.abs(x).to(tl.float32)
        for first in range(BLOCK_D, dim, BLOCK_D):
            rest = _centred(x_ptr, centre_ptr, first + channel, dim, x_d)
            largest = tl.maximum(largest, tl.abs(rest).to(tl.float32))
        # The power of two above the largest magnitude, from the exponent of its float32; where it is far below the
        # bank's, what is lost with the bits that go is nothing beside the bank.
        exponent = tl.maximum((tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23) - 126, exponent - 60)
        exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    kind: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True).to(tl.float64)
    shrink = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = shrink.to(tl.float64)
    whole = tl.zeros((BLOCK_D,), kind)
    lost = tl.zeros((BLOCK_D,), kind)
    for first in range(0, padded, BLOCK_D):
        d = first + channel
        if not WHOLE:
            x = _centred(x_ptr, centre_ptr, d, dim, x_d)
        scaled = x * shrink.to(kind)
        low = scaled.to(tl.float32).to(tl.float16)
        tl.store(low_ptr + row * padded + d, low, mask=d < padded)
        error = scaled - low.to(kind)  # exact, for `low` has the leading bits of `scaled`
        whole += scaled * scaled
        lost += error * error
    squared = tl.sum(whole, axis=0).to(tl.float64) * scale * scale
    norm = tl.sqrt(squared)
    lost_norm = tl.sqrt(tl.sum(lost, axis=0).to(tl.float64)) * scale
    # What rounding the difference from the centre to float32 took belongs to the error.
    lost_norm += 2.0**-22 * norm
    rounded_norm = norm + lost_norm
    facts = facts_ptr + row * 4
    if QUERY:
        unit = 0.5 * inverse / bank_scale
        # By Cauchy and Schwarz what rounding does to a product; then float32 sums of the tensor cores, which truncate;
        # then norms summed in float32 by 32 threads (for 1,024 channels 36 additions, of 2**-24 each), the arithmetic
        # after them and the bits that carry the place (2**-18).
        channels = padded.to(tl.float64)
        bound = 2 * (lost_norm * bank_rounded + norm * bank_lost)
        bound += channels * 2.0**-21 * rounded_norm * bank_rounded
        bound += (2.0**-17 + channels * 2.0**-31) * (norm + bank_norm) * (norm + bank_norm)
        bound *= 1 + 2.0**-10  # for the norms in it are sums in float32 too
        bound = tl.where(bound == bound, bound, float("inf"))  # float16 has no such query, and the bank's norm is 0
        tl.store(facts, 0.5 * inverse * bank_scale)
        tl.store(facts + 1, squared * unit)
        tl.store(facts + 2, tl.where(squared < float("inf"), bound, float("nan")))
        tl.store(facts + 3, unit)
    else:
        tl.store(facts, squared)
        tl.store(facts + 1, rounded_norm)
        tl.store(facts + 2, lost_norm)
        tl.store(facts + 3, scale)


@triton.jit
def _place(column):
    """The place of a column in its group.

    Of BLOCK columns, group g has those whose place in their eight is 2 g or 2 g + 1: what one thread holds of a row of
    a product on tensor cores, so that a minimum needs no other thread.
    """
    return (column >> 3 & 15) * 2 + (column & 1)


@triton.jit
def _column(group, place):
    """The column that is in a place of a group."""
    return (group >> 2) * 128 + (place >> 1) * 8 + (group & 3) * 2 + (place & 1)


@triton.jit
def _two_least(product, facts_ptr, norm_ptr, row, col, n_query, n_bank, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of each group, the least and the second least |q - b|^2, in units, from q.b: packed, the place in the low bits.

    Distances are positive up to their error, and positive floats are in the order of their bits. A negative one is
    below all of them, which is all that it needs to be.
    """
    ratio = tl.load(facts_ptr + row * 4, mask=row < n_query, other=1).to(tl.float32)
    own = tl.load(facts_ptr + row * 4 + 1, mask=row < n_query, other=0).to(tl.float32)
    norm = tl.load(norm_ptr + col, mask=col < n_bank, other=float("inf"))
    distance = (norm[None, :] * ratio[:, None] + own[:, None]) - product
    without_place = tl.where(n_bank > 0, -32, 0)  # in a register: an instruction takes one constant, which the place is
    packed = (distance.to(tl.int32, bitcast=True) & without_place) | _place(col)[None, :]
    even, odd = tl.split(tl.reshape(packed, (ROWS, COLS // 128, 16, 4, 2)))
    near, far = tl.minimum(even, odd), tl.maximum(even, odd)
    least = tl.min(near, axis=2)
    second = tl.min(tl.where(near == least[:, :, None, :], far, near), axis=2)
    return tl.reshape(least, (ROWS, COLS // 32)), tl.reshape(second, (ROWS, COLS // 32))


@triton.jit
def _store_groups(least_ptr, second_ptr, least, second, row, tile_n, n_query, n_groups, COLS: tl.constexpr):
    """The groups of tile `tile_n` of the bank, to their places in (Q, n_groups)."""
    group = tile_n * (COLS // 32) + tl.arange(0, COLS // 32)
    out = row[:, None] * n_groups + group[None, :]
    mask = (row < n_query)[:, None] & (group < n_groups)[None, :]
    tl.store(least_ptr + out, least, mask=mask)
    tl.store(second_ptr + out, second, mask=mask)


@triton.jit
def _tile(tile, tiles_q, tiles_n, SWIZZLE: tl.constexpr):
    """Its place among tiles of queries and of the bank: SWIZZLE tiles of queries by all of the bank at a time.

    So neighbouring programs share rows of the bank.
    """
    first_q = tile // (SWIZZLE * tiles_n) * SWIZZLE
    height = tl.minimum(tiles_q - first_q, SWIZZLE)
    within = tile % (SWIZZLE * tiles_n)
    return first_q + within % height, within // height


@triton.jit
def propose_kernel(
    q_ptr, b_ptr, facts_ptr, norm_ptr, least_ptr, second_ptr, n_query, n_bank, padded, n_groups,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """The product of a tile on tensor cores, reduced to the two least of each group before it leaves registers.

    2 Q N D operations; reads Q and N rows of 2 D bytes a tile row and column, writes 8 / GROUP bytes a pair.
    """
    tile_q, tile_n = _tile(tl.program_id(0), tl.cdiv(n_query, BLOCK_Q), tl.cdiv(n_bank, BLOCK_N), SWIZZLE)
    row = (tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    # A row beyond the last repeats it: loads need no mask, what they give is not stored.
    q = q_ptr + tl.minimum(row, n_query - 1)[:, None] * padded + channel[None, :]
    b = b_ptr + tl.minimum(col, n_bank - 1).to(tl.int64)[None, :] * padded + channel[:, None]
    product = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for _ in range(0, padded, BLOCK_D):
        product = tl.dot(tl.load(q), tl.load(b), product)
        q += BLOCK_D
        b += BLOCK_D
    least, second = _two_least(product, facts_ptr, norm_ptr, row, col, n_query, n_bank, BLOCK_Q, BLOCK_N)
    _store_groups(least_ptr, second_ptr, least, second, row, tile_n, n_query, n_groups, BLOCK_N)


@triton.jit
def propose_persistent_kernel(
    q, b, facts_ptr, norm_ptr, least_ptr, second_ptr, n_query, n_bank, padded, n_groups,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SWIZZLE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The same where tensors are copied by descriptors (`q` and `b`), PROGRAMS programs taking tiles by turns.

    One loop over tiles and channels: a tile's first copies are under way while the one before is reduced.
    """
    tiles_q, tiles_n = tl.cdiv(n_query, BLOCK_Q), tl.cdiv(n_bank, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_q * tiles_n, PROGRAMS, flatten=True):
        tile_q, tile_n = _tile(tile, tiles_q, tiles_n, SWIZZLE)
        product = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        for d in range(0, padded, BLOCK_D):
            product = tl.dot(q.load([tile_q * BLOCK_Q, d]), b.load([tile_n * BLOCK_N, d]).T, product)
        row = (tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        least, second = _two_least(product, facts_ptr, norm_ptr, row, col, n_query, n_bank, BLOCK_Q, BLOCK_N)
        _store_groups(least_ptr, second_ptr, least, second, row, tile_n, n_query, n_groups, BLOCK_N)


@triton.jit
def reduce_product_kernel(
    product_ptr, facts_ptr, norm_ptr, least_ptr, second_ptr, n_query, n_bank, n_groups,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same two least of each group from a product that cuBLAS left in memory: reads 4 bytes a pair."""
    # One axis for all tiles: the others end at 65,535 blocks, and neither queries nor bank need be fewer.
    tiles_n = tl.cdiv(n_bank, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    row = (tl.program_id(0) // tiles_n * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < n_query)[:, None] & (col < n_bank)[None, :]
    product = tl.load(product_ptr + row[:, None] * n_bank + col[None, :], mask=mask, other=0)
    least, second = _two_least(product, facts_ptr, norm_ptr, row, col, n_query, n_bank, BLOCK_Q, BLOCK_N)
    _store_groups(least_ptr, second_ptr, least, second, row, tile_n, n_query, n_groups, BLOCK_N)


@triton.jit
def _measure(
    q_ptr, b_ptr, rows, valid, dim, q_d, b_n, b_d,
    UNIT: tl.constexpr, COUNT: tl.constexpr, BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Squared distances of one query to COUNT bank rows, in float64; infinite where not valid."""
    channel = tl.arange(0, BLOCK_D)
    total = tl.zeros((COUNT, BLOCK_D), tl.float64)
    for first in tl.range(0, dim, BLOCK_D, loop_unroll_factor=AT_ONCE):  # so that more loads are in flight
        d = first + channel
        q = tl.load(q_ptr + (d.to(tl.int64) * q_d)[None, :], mask=(d < dim)[None, :], other=0).to(tl.float64)
        b = tl.load(
            b_ptr + rows.to(tl.int64)[:, None] * b_n * UNIT + (d.to(tl.int64) * b_d)[None, :],
            mask=valid[:, None] & (d < dim)[None, :], other=0,
        ).to(tl.float64)  # fmt: skip
        total += (q - b) * (q - b)
    return tl.where(valid, tl.sum(total, axis=1), float("inf"))


@triton.jit
def _measure_one(q_ptr, b_ptr, row, dim, q_d, b_n, b_d, UNIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Squared distance of one query to one bank row, in float64."""
    channel = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float64)
    for first in range(0, dim, BLOCK_D):
        d = first + channel
        q = tl.load(q_ptr + d.to(tl.int64) * q_d, mask=d < dim, other=0).to(tl.float64)
        b = tl.load(b_ptr + row.to(tl.int64) * b_n * UNIT + d.to(tl.int64) * b_d, mask=d < dim, other=0).to(tl.float64)
        total += (q - b) * (q - b)
    return tl.sum(total, axis=0)


@triton.jit
def _limit(worst, bound, unit):
    """The packed distance above which nothing can be nearer than `worst`; the highest if that is unknown."""
    limit = ((worst + bound) * unit).to(tl.float32)
    # Next float up, so that rounding to float32 excludes nothing; then all places of its group.
    bits = (limit.to(tl.int32, bitcast=True) + 1) | 31
    bits = tl.where(limit < float("inf"), bits, _NONE - 1)
    return tl.where(bound == bound, bits, -_NONE)  # a query that is not a number: no row is worth a look


@triton.jit
def _worst(found, rows, tie):
    """The largest distance of a list, and of those that have it the highest row; places without a row come first."""
    worst = tl.max(found, axis=0)
    return worst, tl.max(tl.where(found >= worst * (1 - tie), tl.where(rows < 0, _NONE, rows), -1), axis=0)


@triton.jit
def _nearer(distance, row, worst, worst_row, tie):
    wins = (distance <= worst * (1 + tie)) & (row < worst_row) & (distance < float("inf"))
    return (distance < worst * (1 - tie)) | wins


@triton.jit
def _replace(found, rows, worst, worst_row, tie, distance, row, place, LIST: tl.constexpr):
    """A list with `row` in the place of its worst."""
    is_worst = (found >= worst * (1 - tie)) & ((rows == worst_row) | (rows < 0))
    out = tl.min(tl.where(is_worst, place, LIST), axis=0)
    return tl.where(place == out, distance, found), tl.where(place == out, row, rows)


@triton.jit
def _following(value, second, seen, limit, lane, after):
    """The next lane past `after` whose group is worth a look: 64 * lane + 2 * place + (all of the group is).

    Where the least of a group was `seen`, only a second one is a reason.
    """
    whole = second <= limit
    word = lane * 64 + (value & 31) * 2 + tl.where(whole, 1, 0)
    return tl.min(tl.where((lane > after) & (whole | ((value <= limit) & ~seen)), word, _NONE), axis=0)


@triton.jit
def refine_kernel(
    q_ptr, b_ptr, least_ptr, second_ptr, facts_ptr, distance_ptr, index_ptr, n_bank, dim, n_groups, k,
    q_n, q_d, b_n, b_d,
    UNIT: tl.constexpr, LIST: tl.constexpr, LANES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_1: tl.constexpr, AT_ONCE: tl.constexpr,
    SQUARED: tl.constexpr,
):  # fmt: skip
    """The exact neighbours of one query: what the bound cannot exclude is measured, ties go to the lower index.

    Reads 4 bytes a group, then 8, D values for each of the k seeds and for each row that qualifies beside them: 0.1
    of them at k 1 and one at k 9 on vectors with a network's statistics (the benchmark's, 16,384 x 1,024; simulated).
    """
    dim *= UNIT  # see `unit_of`
    query = tl.program_id(0).to(tl.int64)
    q_ptr += query * q_n * UNIT
    least_ptr += query * n_groups
    second_ptr += query * n_groups
    bound = tl.load(facts_ptr + query * 4 + 2)
    unit = tl.load(facts_ptr + query * 4 + 3)
    # Distances that differ by less are a tie, which the lower index wins. Sums in another order do: a square passes at
    # most dim / 4 additions of its thread (`refine_blocks`) and a few dozen across threads, each of which rounds by
    # 2**-53, in both sums.
    tie = 2.0**-46 + dim.to(tl.float64) * 2.0**-54
    lane = tl.arange(0, LANES)
    place = tl.arange(0, LIST)

    # Seeds: the k least of LANES strided minima. Any k rows bound the k-th distance from above.
    best = tl.full((LANES,), _NONE, tl.int64) << 32
    for first in range(0, n_groups, LANES):
        value = tl.load(least_ptr + first + lane, mask=first + lane < n_groups, other=0x7FFFFFFF)
        best = tl.minimum(best, (value.to(tl.int64) << 32) | (first + lane))
    rows = tl.full((LIST,), -1, tl.int32)
    seeded = tl.full((LANES,), -1, tl.int32)  # a lane gives one seed at most
    for j in range(k):
        seed = tl.min(best, axis=0)
        group = (seed & 0x7FFFFFFF).to(tl.int32)
        least = (seed >> 32).to(tl.int32)
        rows = tl.where((place == j) & (least < _NONE), _column(group, least & 31), rows)
        best = tl.where(lane == group % LANES, tl.full((LANES,), _NONE, tl.int64) << 32, best)
        seeded = tl.where(lane == group % LANES, group, seeded)
    rows = tl.where(rows < n_bank, rows, -1)
    found = _measure(q_ptr, b_ptr, rows, rows >= 0, dim, q_d, b_n, b_d, UNIT, LIST, BLOCK_L, AT_ONCE)
    # Places past k never count as the worst.
    found = tl.where(place < k, found, -1.0)
    worst, worst_row = _worst(found, rows, tie)
    limit = _limit(worst, bound, unit)

    member = tl.arange(0, 32)
    for first in range(0, n_groups, LANES):
        value = tl.load(least_ptr + first + lane, mask=first + lane < n_groups, other=0x7FFFFFFF)
        second = tl.load(second_ptr + first + lane, mask=first + lane < n_groups, other=0x7FFFFFFF)
        seen = seeded == first + lane
        following = _following(value, second, seen, limit, lane, -1)
        while following < _NONE:
            group = first + (following >> 6)
            if following & 1:
                candidates = _column(group, member)
                known = tl.max(tl.where(candidates[:, None] == rows[None, :], 1, 0), axis=1) > 0
                valid = (candidates < n_bank) & ~known
                distances = _measure(q_ptr, b_ptr, candidates, valid, dim, q_d, b_n, b_d, UNIT, 32, BLOCK_G, AT_ONCE)
                # Each candidate that beats the worst of the list takes its place.
                near = tl.min(distances, axis=0)
                near_row = tl.min(tl.where(distances <= near * (1 + tie), candidates, _NONE), axis=0)
                while _nearer(near, near_row, worst, worst_row, tie):
                    near = tl.min(tl.where(candidates == near_row, distances, float("inf")), axis=0)
                    found, rows = _replace(found, rows, worst, worst_row, tie, near, near_row, place, LIST)
                    worst, worst_row = _worst(found, rows, tie)
                    distances = tl.where(candidates == near_row, float("inf"), distances)
                    near = tl.min(distances, axis=0)
                    near_row = tl.min(tl.where(distances <= near * (1 + tie), candidates, _NONE), axis=0)
            else:
                row = _column(group, (following >> 1) & 31)
                in_list = tl.max(tl.where(rows == row, 1, 0), axis=0)
                if (in_list == 0) & (row < n_bank):
                    distance = _measure_one(q_ptr, b_ptr, row, dim, q_d, b_n, b_d, UNIT, BLOCK_1)
                    if _nearer(distance, row, worst, worst_row, tie):
                        found, rows = _replace(found, rows, worst, worst_row, tie, distance, row, place, LIST)
                        worst, worst_row = _worst(found, rows, tie)
            limit = _limit(worst, bound, unit)
            following = _following(value, second, seen, limit, lane, following >> 6)

    # NaN is not below infinity: a query that is not a number gets distance NaN and no neighbour.
    number = (place < k) & (found < float("inf"))
    found = tl.where(number, found, float("inf"))
    rows = tl.where(number, rows, place)
    # Every distance is the least of those that it ties with, so that (distance, row) orders the list.
    ties = found[None, :] >= found[:, None] * (1 - tie)
    found = tl.min(tl.where(ties, found[None, :], float("inf")), axis=1)
    same = found[None, :] == found[:, None]
    before = (found[None, :] < found[:, None]) | (same & (rows[None, :] < rows[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    if not SQUARED:
        found = tl.sqrt(found)
    distance = tl.where(number, found, float("nan")).to(tl.float32)
    tl.store(distance_ptr + query * k + rank, distance, mask=place < k)
    tl.store(index_ptr + query * k + rank, tl.where(number, rows, -1).to(tl.int64), mask=place < k)
