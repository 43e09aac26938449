"""The C++ search and coreset by themselves: bounds that must never lose a neighbour, threads, memory, odd values."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt4as_fast import kernels
from ttt4as_fast.kernels.coreset import reference as coreset_reference
from ttt4as_fast.kernels.dispatch import native_core
from ttt4as_fast.kernels.knn import reference as knn_reference

CORE = native_core()
if isinstance(CORE, str):
    pytest.skip(CORE, allow_module_level=True)


@pytest.fixture
def core() -> ModuleType:
    assert isinstance(CORE, ModuleType)
    return CORE


def exact(query: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances from differences, in float64, and a stable sort."""
    q, b = query.astype(np.float64), bank.astype(np.float64)
    squared = np.stack([((b - row) ** 2).sum(axis=1) for row in q])
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.sqrt(np.take_along_axis(squared, order, 1)), order


def assert_same(query: np.ndarray, bank: np.ndarray, k: int, found: tuple[np.ndarray, np.ndarray]) -> None:
    """The same distances; the same rows, but for pairs whose distances differ by rounding alone."""
    distances, indices = exact(query, bank, k)
    np.testing.assert_allclose(found[0], distances, rtol=1e-6, atol=1e-37)
    for row, (mine, wanted) in enumerate(zip(found[1], indices, strict=True)):
        assert len(set(mine.tolist())) == k
        differ = mine != wanted
        if differ.any():
            at = bank[mine[differ]].astype(np.float64) - query[row].astype(np.float64)
            np.testing.assert_allclose(np.sqrt((at**2).sum(axis=1)), distances[row, differ], rtol=1e-13)


def low_rank(rng: np.random.Generator, n: int, dim: int, rank: int = 12, noise: float = 0.05) -> np.ndarray:
    """Points near a subspace whose directions fall off, as features do: what the coarse codes are made for."""
    basis = rng.standard_normal((rank, dim)) / np.arange(1, rank + 1)[:, None]
    return (rng.standard_normal((n, rank)) @ basis + noise * rng.standard_normal((n, dim))).astype(np.float32)


def kinds(rng: np.random.Generator, n: int, dim: int) -> dict[str, np.ndarray]:
    """Point sets that each stress another part of the bound."""
    structured = low_rank(rng, n, dim)
    outliers = structured.copy()
    outliers[:: max(1, n // 7)] *= 1e4
    heavy = structured.copy()
    heavy[:, : max(1, dim // 9)] *= (rng.random((n, max(1, dim // 9))) < 0.02) * 500
    return {
        "structured": structured,
        "noise": rng.standard_normal((n, dim)).astype(np.float32),
        "outliers": outliers,
        "heavy tails": heavy,
        "constant": np.full((n, dim), 3.7, np.float32),
        "far away": structured + np.float32(1e4),
        "duplicates": structured[rng.integers(0, max(1, n // 5), n)],
        "integers": rng.integers(-2, 3, (n, dim)).astype(np.float32),
        "one direction": np.outer(rng.standard_normal(n), np.ones(dim)).astype(np.float32),
        "tiny": structured * np.float32(1e-30),
        "huge": structured * np.float32(1e30),
    }


KINDS = list(kinds(np.random.default_rng(0), 2, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (63, 64), (65, 65), (700, 126), (900, 130), (300, 600)])
def test_every_kind_of_data_is_exact(core: ModuleType, kind: str, n: int, dim: int) -> None:
    points = kinds(np.random.default_rng(n * dim), n + 20, dim)[kind]
    bank, query = points[20:], np.concatenate([points[:20], points[20:25]])
    index = core.KnnIndex(bank)
    for k in {1, min(9, n), min(64, n)}:
        assert_same(query, bank, k, index.search(query, k))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["structured", "outliers", "huge"])
def test_queries_unlike_the_bank(core: ModuleType, rng: np.random.Generator, kind: str, other: str) -> None:
    bank, query = kinds(rng, 400, 96)[kind], kinds(rng, 30, 96)[other]
    assert_same(query, bank, 5, core.KnnIndex(bank).search(query, 5))


def test_more_than_one_segment(core: ModuleType, rng: np.random.Generator) -> None:
    bank, query = low_rank(rng, 40_000, 70), low_rank(rng, 12, 70)
    index = core.KnnIndex(bank)
    for k in (1, 9):
        assert_same(query, bank, k, index.search(query, k))


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1.0, 1e18])
@pytest.mark.parametrize("dim", [1, 40, 200])
def test_far_queries_are_searched_by_products(
    core: ModuleType, rng: np.random.Generator, dim: int, scale: float
) -> None:
    """Where products underflow or overflow, all is measured."""
    bank = rng.standard_normal((400, dim)).astype(np.float32) * np.float32(scale)
    query = bank[:30].copy()
    query[:, 0] += np.float32(3e3 * scale)
    index = core.KnnIndex(bank)
    assert_same(query, bank, 5, index.search(query, 5))
    assert index.counts["dense"] > 0


def test_clipped_codes_still_bound(core: ModuleType, rng: np.random.Generator) -> None:
    """A query off the bank's subspace has a rest beyond the codes' range, and loses no more than tightness by that."""
    data = low_rank(rng, 3048, 400)
    bank, query = data[:3000], (data[3000:] + 1.2 * rng.standard_normal((48, 400))).astype(np.float32)
    index = core.KnnIndex(bank)
    assert_same(query, bank, 3, index.search(query, 3))
    assert index.counts["unstructured"] < 40  # all of them where clipping counts as an error


def test_many_left_over_in_few_strips(core: ModuleType, rng: np.random.Generator) -> None:
    """Clusters whose directions go beyond the coarse ones: the second codes decide, strip by strip."""
    centres = 4 * rng.standard_normal((40, 400))
    make = partial(low_rank, rng, dim=400, rank=110, noise=0.02)
    bank = (make(6000) + centres[rng.integers(0, 40, 6000)]).astype(np.float32)
    query = (make(45) + centres[rng.integers(0, 40, 45)]).astype(np.float32)
    index = core.KnnIndex(bank)
    for k in (1, 9, 40):
        assert_same(query, bank, k, index.search(query, k))
    assert index.counts["unstructured"] == 0


def test_k_of_the_whole_bank(core: ModuleType, rng: np.random.Generator) -> None:
    bank, query = low_rank(rng, 20_000, 66), low_rank(rng, 3, 66)
    assert_same(query, bank, 20_000, core.KnnIndex(bank).search(query, 20_000))


def test_structure_is_used_and_its_absence_noticed(core: ModuleType, rng: np.random.Generator) -> None:
    bank = low_rank(rng, 6000, 344)
    index = core.KnnIndex(bank)
    index.search(low_rank(rng, 64, 344, noise=0.05) * 0 + bank[:64] + np.float32(0.01), 1)
    counts = index.counts
    assert counts["queries"] == 64
    assert counts["unstructured"] == 0
    assert counts["measured"] < 64 * 60
    noise = rng.standard_normal((6000, 344)).astype(np.float32)
    index = core.KnnIndex(noise)
    query = rng.standard_normal((64, 344)).astype(np.float32)
    assert_same(query, noise, 3, index.search(query, 3))
    assert index.counts["unstructured"] == 64
    assert index.counts["measured"] < 64 * 600


@pytest.mark.parametrize(("in_vain", "unstructured"), [(7, 28), (8, 8 + 48), (12, 12 + 48)])
def test_half_of_the_probes_spare_the_others_the_attempt(
    core: ModuleType, rng: np.random.Generator, in_vain: int, unstructured: int
) -> None:
    """Of 16 probes among 64 queries: every fourth, and like the three behind it here."""
    bank = low_rank(rng, 6000, 344)
    query = bank[:64] + np.float32(0.01)
    query[: 4 * in_vain] = 3 * rng.standard_normal((4 * in_vain, 344))
    index = core.KnnIndex(bank)
    assert_same(query, bank, 3, index.search(query, 3))
    assert index.counts["unstructured"] == unstructured


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_double_points_keep_their_digits(core: ModuleType, rng: np.random.Generator, dtype: type) -> None:
    bank = rng.standard_normal((500, 80)) + 1e6
    query = (bank[:40] + 1e-7 * rng.standard_normal((40, 80))).astype(dtype)
    assert_same(query, bank, 2, core.KnnIndex(bank).search(query, 2))


def test_squares_beyond_float64(core: ModuleType, rng: np.random.Generator) -> None:
    bank = rng.standard_normal((90, 70)) * 1e150
    query = bank[:8] + 1e140
    distances, indices = core.KnnIndex(bank).search(query, 1)
    np.testing.assert_array_equal(indices[:, 0], np.arange(8))
    assert np.isinf(distances).all()  # beyond float32, not beyond the order


def test_threads_change_no_bit(core: ModuleType, rng: np.random.Generator) -> None:
    before = core.max_threads() if hasattr(core, "max_threads") else None
    bank, query = low_rank(rng, 5000, 200), low_rank(rng, 150, 200)
    found = [core.KnnIndex(bank, threads=n).search(query, 9, threads=n) for n in (1, 2, 3)]
    picks = [core.GreedyCoreset(bank, 3, threads=n).pick(200, threads=n) for n in (1, 2, 3)]
    for other in found[1:]:
        np.testing.assert_array_equal(other[0], found[0][0])
        np.testing.assert_array_equal(other[1], found[0][1])
    for pick in picks[1:]:
        np.testing.assert_array_equal(pick, picks[0])
    if before is not None:
        assert core.max_threads() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the systems, Linux is asked for tiles")
def test_a_system_that_refuses_the_tiles_changes_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    bank = rng.standard_normal((1000, 90)).astype(np.float32)
    np.save(tmp_path / "bank.npy", bank)
    script = (
        "import ctypes, sys, numpy as np\n"
        "from ttt4as_fast import kernels\n"
        "class Stack(ctypes.Structure):\n"
        "    _fields_ = [('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]\n"
        "size = 6144\n"  # enough for a signal without tiles, too little for one with them
        "memory = ctypes.create_string_buffer(size)\n"
        "stack = Stack(ctypes.addressof(memory), 0, size)\n"
        "assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0\n"
        "bank = np.load(sys.argv[1])\n"
        "np.savez(sys.argv[2], *kernels.KnnIndex(bank, backend='cpu').search(bank[:50] + np.float32(0.5), 3))\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "bank.npy"), str(tmp_path / "out.npz")], check=True, timeout=120
    )
    expected = kernels.KnnIndex(bank, backend="cpu").search(bank[:50] + np.float32(0.5), 3)
    for got, right in zip(np.load(tmp_path / "out.npz").values(), expected, strict=True):
        np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_lesser_instruction_sets_agree(tmp_path: Path, rng: np.random.Generator, isa: str) -> None:
    bank, query = low_rank(rng, 3000, 130), low_rank(rng, 40, 130)
    noise = rng.standard_normal((600, 90)).astype(np.float32)
    np.savez(tmp_path / "in.npz", bank=bank, query=query, noise=noise)
    script = (
        "import sys, numpy as np\n"
        "from ttt4as_fast import kernels\n"
        "x = np.load(sys.argv[1])\n"
        "d, i = kernels.KnnIndex(x['bank'], backend='cpu').search(x['query'], 9)\n"
        "e, j = kernels.KnnIndex(x['noise'], backend='cpu').search(x['noise'][:50] + np.float32(0.5), 3)\n"
        "p = kernels.k_center_greedy(x['bank'], 150, 7, backend='cpu')\n"
        "np.savez(sys.argv[2], d=d, i=i, e=e, j=j, p=p)\n"
    )
    out = tmp_path / "out.npz"
    command = [sys.executable, "-c", script, str(tmp_path / "in.npz"), str(out)]
    subprocess.run(command, check=True, env={**os.environ, "TTT4AS_ISA": isa}, timeout=120)
    got = np.load(out)
    distances, indices = kernels.KnnIndex(bank, backend="cpu").search(query, 9)
    np.testing.assert_allclose(got["d"], distances, rtol=2e-7)
    np.testing.assert_array_equal(got["i"], indices)
    distances, indices = kernels.KnnIndex(noise, backend="cpu").search(noise[:50] + np.float32(0.5), 3)
    np.testing.assert_allclose(got["e"], distances, rtol=2e-7)
    np.testing.assert_array_equal(got["j"], indices)
    np.testing.assert_array_equal(got["p"], kernels.k_center_greedy(bank, 150, 7, backend="cpu"))


def test_a_mapped_bank_is_not_copied(core: ModuleType, tmp_path: Path, rng: np.random.Generator) -> None:
    bank = low_rank(rng, 4000, 300)
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    index = core.KnnIndex(mapped)
    assert index.nbytes < 4000 * (300 + 218) + 150_000
    query = low_rank(rng, 20, 300)
    for got, want in zip(index.search(query, 4), core.KnnIndex(bank).search(query, 4), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("k", [1, 200])
def test_scratch_of_a_search_does_not_grow_with_the_bank(core: ModuleType, rng: np.random.Generator, k: int) -> None:
    measure = pytest.importorskip("ttt4as_fast.benchmarks.measure")
    bank = low_rank(rng, 100_000, 64)
    query = bank[:200] + np.float32(0.01)
    # The first search of an index, which makes the scratch; Linux counts pages by processor, and may be half a MiB off.
    peaks = [measure.peak_mebibytes(partial(core.KnnIndex(bank).search, query, k)) for _ in range(5)]
    if None in peaks:
        pytest.skip("this kernel does not tell the high-water mark")
    peak = np.median(peaks)
    assert 0.5 < peak < core.max_threads() * (1.5 + (64 + k) / 1024) + 0.5  # and the result


def test_the_index_keeps_its_bank_alive(core: ModuleType, rng: np.random.Generator) -> None:
    bank = low_rank(rng, 2000, 100)
    index = core.KnnIndex(bank.copy())
    junk = [np.full((2000, 100), np.nan, np.float32) for _ in range(4)]
    assert_same(bank[:9], bank, 2, index.search(bank[:9], 2))
    del junk


def test_searches_at_once(core: ModuleType, rng: np.random.Generator) -> None:
    bank = rng.standard_normal((2000, 120)).astype(np.float32)  # without structure: the codes made on demand, too
    queries = [rng.standard_normal((9 + i, 120)).astype(np.float32) for i in range(8)]
    index = core.KnnIndex(bank)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda q: index.search(q, 3), queries))
    for query, found in zip(queries, results, strict=True):
        assert_same(query, bank, 3, found)


def test_the_gil_is_released(core: ModuleType, rng: np.random.Generator) -> None:
    bank = rng.standard_normal((20_000, 256)).astype(np.float32)
    index = core.KnnIndex(bank)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-3)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    index.search(bank[:2000] + np.float32(0.5), 5)
    end = time.perf_counter()
    stop.set()
    thread.join()
    during = sum(start < t < end for t in ticks)
    assert during >= 3, f"{during} ticks in {end - start:.3f} s"


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_search_is_the_references(data: st.DataObject) -> None:
    draw = data.draw
    n, dim = draw(st.integers(1, 300), label="n"), draw(st.integers(1, 180), label="dim")
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    points = kinds(rng, n, dim)[draw(st.sampled_from(KINDS), label="bank")]
    query = kinds(rng, draw(st.integers(1, 20), label="queries"), dim)[draw(st.sampled_from(KINDS), label="query")]
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    if dtype == np.float16:
        points, query = np.clip(points, -6e4, 6e4), np.clip(query, -6e4, 6e4)
    points, query = points.astype(dtype), query.astype(dtype)
    layout = draw(st.sampled_from(["C", "F", "reversed", "spread"]))
    if layout == "F":
        points, query = np.asfortranarray(points), np.asfortranarray(query)
    elif layout == "reversed":
        points, query = points[::-1, ::-1], query[::-1]
    elif layout == "spread":
        points = np.repeat(points, 2, axis=1)[:, ::2]
    k = draw(st.integers(1, n), label="k")
    found = kernels.KnnIndex(points, backend="cpu").search(query, k)
    assert_same(query, points, k, found)
    if points.dtype != np.float64 and abs(points).max() < 1e4:
        np.testing.assert_allclose(found[0], knn_reference.Index(points).search(query, k)[0], rtol=1e-5, atol=1e-30)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_coreset_is_the_references(data: st.DataObject) -> None:
    draw = data.draw
    n, dim = draw(st.integers(1, 250), label="n"), draw(st.integers(1, 150), label="dim")
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    points = kinds(rng, n, dim)[draw(st.sampled_from(KINDS), label="points")]
    points = points.astype(draw(st.sampled_from([np.float32, np.float64])))
    picks, start = draw(st.integers(1, n), label="picks"), draw(st.integers(0, n - 1), label="start")
    got = kernels.k_center_greedy(points, picks, start, backend="cpu")
    want = coreset_reference.greedy(points, picks, start)
    if not np.array_equal(got, want):  # only where two distances differ by rounding alone: check the choice itself
        assert_greedy(points, got)


def assert_greedy(points: np.ndarray, picks: np.ndarray) -> None:
    x = points.astype(np.float64)
    nearest = np.full(len(x), np.inf)
    assert len(set(picks.tolist())) == len(picks)
    for now, following in itertools.pairwise(picks):
        nearest = np.minimum(nearest, ((x - x[now]) ** 2).sum(axis=1))
        nearest[now] = -1
        assert nearest[following] >= nearest.max() * (1 - 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_coresets_of_every_kind(core: ModuleType, kind: str) -> None:
    points = kinds(np.random.default_rng(5), 1500, 90)[kind]
    assert_greedy(points, core.GreedyCoreset(points, 11).pick(300))


def test_coreset_in_steps_is_the_coreset(core: ModuleType, rng: np.random.Generator) -> None:
    points = low_rank(rng, 900, 80)
    whole = core.GreedyCoreset(points, 2).pick(400)
    steps = core.GreedyCoreset(points, 2)
    np.testing.assert_array_equal(np.concatenate([steps.pick(n) for n in (1, 0, 7, 392)]), whole)
    with pytest.raises(ValueError, match=r"count: expected an integer in \[0, 500\], got 501"):
        steps.pick(501)


def test_a_long_selection_hears_ctrl_c(core: ModuleType, rng: np.random.Generator) -> None:
    selection = core.GreedyCoreset(rng.standard_normal((20_000, 64)).astype(np.float32), threads=1)
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        selection.pick(20_000)
    timer.join()
    assert len(selection.pick(1)) == 1  # there is something left to pick


@pytest.mark.parametrize(("kind", "rows"), [("KnnIndex", 60_000), ("GreedyCoreset", 300_000)])  # 0.17 s and more
def test_long_preparations_hear_ctrl_c(core: ModuleType, rng: np.random.Generator, kind: str, rows: int) -> None:
    points, made = rng.random((rows, 320), dtype=np.float32), []
    prepare = partial(getattr(core, kind), threads=1)
    timer = threading.Timer(0.01, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        made.extend(map(prepare, [points]))  # no Python in between: what was made whole would be kept
    timer.join()
    assert not made


def test_coreset_keeps_no_copy_and_measures_little(core: ModuleType, rng: np.random.Generator) -> None:
    points = low_rank(rng, 30_000, 344)
    selection = core.GreedyCoreset(points, 0)
    selection.pick(600)
    assert selection.nbytes < 95 * len(points)
    assert selection.measured < 600 * len(points) / 8


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c: c.KnnIndex(np.ones(3, np.float32)), ValueError, "bank: expected 2 dimensions"),
        (lambda c: c.KnnIndex(np.ones((0, 3), np.float32)), ValueError, "bank: expected no empty axis"),
        (lambda c: c.KnnIndex(np.ones((4, 3), np.int32)), TypeError, "bank: expected dtype float32 or float64"),
        (lambda c: c.KnnIndex(np.ones((4, 3), ">f4")), TypeError, "bank: expected dtype"),
        (lambda c: c.KnnIndex(np.ones((3, 4), np.float32).T), ValueError, "bank: expected aligned rows"),
        (lambda c: good(c).search(np.ones((2, 4), np.float32), 1), ValueError, "query: expected 3 columns"),
        (lambda c: good(c).search(np.ones((2, 3), np.float32), 0), ValueError, "k: expected an integer in [1, 4]"),
        (lambda c: good(c).search(np.ones((2, 3), np.float32), 5), ValueError, "k: expected an integer in [1, 4]"),
        (lambda c: c.GreedyCoreset(np.ones((4, 3), np.float32), 4), ValueError, "start: expected an integer in [0, 3]"),
        (lambda c: c.GreedyCoreset(np.ones((4, 3), np.float32), -1), ValueError, "start: expected"),
        (lambda c: c.GreedyCoreset(np.ones((4, 3), np.float16)), TypeError, "points: expected dtype"),
        (lambda c: c.GreedyCoreset(np.ones((4, 3))).pick(5), ValueError, "count: expected an integer in [0, 4]"),
        (lambda c: c.GreedyCoreset(np.ones((4, 3))).pick(-1), ValueError, "count: expected"),
    ],
)
def test_errors_are_named(core: ModuleType, call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        call(core)
    assert says in str(caught.value)


def good(core: ModuleType) -> Any:
    return core.KnnIndex(np.arange(12, dtype=np.float32).reshape(4, 3))


def test_values_that_are_not_finite_neither_hang_nor_crash(core: ModuleType, rng: np.random.Generator) -> None:
    """The public functions refuse them; the core, called past these, only owes rows that exist."""
    for value in (np.nan, np.inf, -np.inf):
        bank, query = low_rank(rng, 300, 70), low_rank(rng, 20, 70)
        bank[7, 3] = query[5, 1] = value
        _, indices = core.KnnIndex(bank).search(query, 4)
        assert ((indices >= 0) & (indices < 300)).all()
        picks = core.GreedyCoreset(bank, 0).pick(100)
        assert ((picks >= 0) & (picks < 300)).all()
