"""The bindings of the C++ core: arrays of any strides, every error named, no GIL held, 16-bit floats to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ttt4as_fast
from ttt4as_fast.kernels.arrays import BFLOAT16
from ttt4as_fast.kernels.bilinear import reference
from ttt4as_fast.kernels.dispatch import native_core

CORE = native_core()
if isinstance(CORE, str):
    pytest.skip(CORE, allow_module_level=True)

FLOATS = (np.float16, np.float32, np.float64)
NATIVE = sys.byteorder == "little"
TOLERANCE = {np.float16: 1e-3, np.float32: 1e-6, np.float64: 1e-14}  # of one rounding, relative to values around 1


@pytest.fixture
def core() -> ModuleType:
    assert isinstance(CORE, ModuleType)
    return CORE


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays equal to `x` (C, h, w) whose elements lie differently."""
    raw = np.empty(x.nbytes + 1, np.uint8)
    misaligned = raw[1:].view(x.dtype).reshape(x.shape)
    misaligned[...] = x
    records = np.zeros(x.shape, np.dtype([("pad", np.uint8), ("value", x.dtype)]))  # strides of itemsize + 1
    records["value"] = x
    spread = np.zeros(tuple(2 * n for n in x.shape), x.dtype)[::2, ::2, ::2]
    spread[...] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    return {
        "channels last": np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(2, 0, 1),
        "Fortran": np.asfortranarray(x),
        "transposed": np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1),
        "negative strides": np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        "spread": spread,
        "misaligned": misaligned,
        "record field": records["value"],
        "read-only": read_only,
    }


def test_version_is_the_packages(core: ModuleType) -> None:
    assert core.__version__ == ttt4as_fast.__version__, "a core from another build; reinstall"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (16, 4, 4), (37, 7, 2)])
def test_layout_changes_no_bit(core: ModuleType, rng: np.random.Generator, dtype: type, shape: tuple[int, ...]) -> None:
    x = rng.standard_normal(shape).astype(dtype)
    rows, cols = rng.integers(0, 11, 23), rng.integers(0, 13, 23)
    upsampled, sampled = core.bilinear_upsample(x, 11, 13), core.bilinear_sample(x, rows, cols, 11, 13)
    for name, same in layouts(x).items():
        np.testing.assert_array_equal(same, x)
        np.testing.assert_array_equal(core.bilinear_upsample(same, 11, 13), upsampled, name)
        np.testing.assert_array_equal(core.bilinear_sample(same, rows, cols, 11, 13), sampled, name)


def test_zero_strides(core: ModuleType, rng: np.random.Generator) -> None:
    row = rng.standard_normal((1, 1, 6)).astype(np.float32)
    broadcast = np.broadcast_to(row, (5, 4, 6))
    np.testing.assert_array_equal(
        core.bilinear_upsample(broadcast, 9, 9), core.bilinear_upsample(broadcast.copy(), 9, 9)
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_is_its_images(core: ModuleType, rng: np.random.Generator, dtype: type) -> None:
    x = rng.standard_normal((3, 8, 5, 6)).astype(dtype)
    for batch in (x, x[::-1], np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)):
        result = core.bilinear_upsample(batch, 12, 7)
        for image, alone in zip(result, batch, strict=True):
            np.testing.assert_array_equal(image, core.bilinear_upsample(alone, 12, 7))


@pytest.mark.parametrize("dtype", FLOATS)
def test_results_are_new_c_contiguous_arrays(core: ModuleType, rng: np.random.Generator, dtype: type) -> None:
    x = rng.standard_normal((2, 3, 3)).astype(dtype)
    upsampled = core.bilinear_upsample(x, 3, 3)
    assert upsampled.flags.c_contiguous and upsampled.flags.writeable and not np.shares_memory(upsampled, x)
    assert upsampled.dtype == dtype
    pixels = np.arange(3)
    sampled = core.bilinear_sample(x, pixels, pixels, 3, 3)
    assert sampled.flags.c_contiguous and sampled.shape == (3, 2)
    assert sampled.dtype == np.result_type(dtype, np.float32)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shape_is_the_references(data: st.DataObject) -> None:
    draw = data.draw
    shape = tuple(draw(st.integers(1, 20), label=axis) for axis in ("channels", "height", "width"))
    height, width = draw(st.integers(1, 40), label="out height"), draw(st.integers(1, 40), label="out width")
    dtype = draw(st.sampled_from(FLOATS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.uniform(-1, 1, shape).astype(dtype)
    x = draw(st.sampled_from([x, *layouts(x).values()]))
    count = draw(st.integers(0, 5))
    rows, cols = rng.integers(0, height, count), rng.integers(0, width, count)
    close: dict[str, Any] = {"rtol": 0, "atol": TOLERANCE[dtype]}
    assert isinstance(CORE, ModuleType)
    expected = reference.upsample(x, height, width)
    np.testing.assert_allclose(CORE.bilinear_upsample(x, height, width), expected, **close)
    sampled = CORE.bilinear_sample(x, rows, cols, height, width)
    np.testing.assert_allclose(sampled, reference.sample(x, rows, cols, height, width), **{**close, "atol": 1e-6})


def test_float16_survives_to_the_bit(core: ModuleType) -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(-1, 1, 1)
    np.testing.assert_array_equal(core.bilinear_upsample(finite, 1, 1).view(np.uint16), finite.view(np.uint16))
    assert np.isnan(core.bilinear_upsample(every[np.isnan(every)].reshape(-1, 1, 1), 1, 1)).all()


def test_float16_rounds_to_nearest_even(core: ModuleType, rng: np.random.Generator) -> None:
    # Means of neighbours are ties; means of any two reach every binade, the subnormal ones included.
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    neighbours = np.stack([every[:-1], every[1:]], axis=1)
    anywhere = rng.choice(np.concatenate([every, -every]), (200_000, 2))
    pairs = np.concatenate([neighbours, -neighbours, anywhere])
    result = core.bilinear_upsample(np.ascontiguousarray(pairs[:, None, :]), 1, 1).reshape(-1)
    wide = pairs.astype(np.float32)
    expected = (wide[:, 0] * np.float32(0.5) + wide[:, 1] * np.float32(0.5)).astype(np.float16)
    # Zeros may differ in sign: -x/2 + x/2.
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(result[result != 0].view(np.uint16), expected[expected != 0].view(np.uint16))


def bfloat16(x: np.ndarray) -> np.ndarray:
    """`x` rounded to bfloat16, as the core takes it."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(BFLOAT16)


def from_bfloat16(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def test_bfloat16_is_float32_rounded_at_the_end(core: ModuleType, rng: np.random.Generator) -> None:
    x = bfloat16(rng.standard_normal((37, 5, 6)))
    rows, cols = rng.integers(0, 11, 23), rng.integers(0, 13, 23)
    wide = from_bfloat16(x)
    for name, same in layouts(x).items():
        result = core.bilinear_upsample(same, 11, 13)
        assert result.dtype == BFLOAT16
        expected = bfloat16(core.bilinear_upsample(wide, 11, 13))
        np.testing.assert_array_equal(result.view(np.uint16), expected.view(np.uint16), name)
        sampled = core.bilinear_sample(same, rows, cols, 11, 13)
        assert sampled.dtype == np.float32
        np.testing.assert_array_equal(sampled, core.bilinear_sample(wide, rows, cols, 11, 13), name)


def test_bfloat16_of_another_package(core: ModuleType, rng: np.random.Generator) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = rng.standard_normal((3, 5, 6)).astype(ml_dtypes.bfloat16)
    result = core.bilinear_upsample(x, 9, 8)
    assert result.dtype == x.dtype
    expected = core.bilinear_upsample(x.astype(np.float32), 9, 8).astype(x.dtype)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    "dtype", [np.dtype([("float16", np.uint16)]), np.dtype("V2"), np.dtype([("bfloat16", ">u2" if NATIVE else "<u2")])]
)
def test_other_records_are_no_bfloat16(core: ModuleType, dtype: np.dtype) -> None:
    with pytest.raises(TypeError, match="features: expected dtype float16, bfloat16"):
        core.bilinear_upsample(np.zeros((1, 2, 2), dtype), 3, 3)


@pytest.mark.parametrize("dtype", [*FLOATS, BFLOAT16])
def test_channels_last_stays_so(core: ModuleType, rng: np.random.Generator, dtype: type) -> None:
    x = rng.standard_normal((2, 70, 5, 6))
    x = bfloat16(x) if dtype == BFLOAT16 else x.astype(dtype)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    result = core.bilinear_upsample(last, 12, 7)
    assert result.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_array_equal(result, core.bilinear_upsample(x, 12, 7))


def test_instruction_sets_agree_to_the_bit(core: ModuleType) -> None:
    program = (
        "import hashlib, numpy as np\n"
        "from ttt4as_fast.kernels.dispatch import native_core\n"
        "core, rng, sums = native_core(), np.random.default_rng(0), hashlib.sha256()\n"
        "for dtype in (np.float16, np.float32, np.float64):\n"
        "    x = rng.standard_normal((19, 9, 33)).astype(dtype)\n"
        "    rows = rng.integers(0, 50, 40)\n"
        "    for y in (x, np.ascontiguousarray(x.transpose(1, 2, 0)).transpose(2, 0, 1)):\n"
        "        sums.update(core.bilinear_upsample(y, 50, 61).tobytes())\n"
        "        sums.update(core.bilinear_sample(y, rows, rows, 50, 61).tobytes())\n"
        "print(core.isa(), sums.hexdigest())\n"
    )
    found = {}
    for isa in ("generic", "avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "TTT4AS_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        name, digest = done.stdout.split()
        found[name] = digest
    assert len(set(found.values())) == 1, found


def test_extreme_values_do_not_overflow(core: ModuleType) -> None:
    for dtype in FLOATS:
        largest = np.full((1, 2, 2), np.finfo(dtype).max, dtype)
        np.testing.assert_array_equal(core.bilinear_upsample(largest, 1, 1), largest[:, :1, :1])


GOOD = np.ones((2, 3, 4), np.float32)
PIXELS = np.zeros(3, np.int64)


@pytest.mark.parametrize(
    ("features", "height", "width", "error", "message"),
    [
        (np.ones((3, 4), np.float32), 2, 2, ValueError, r"features: expected 3 or 4 dimensions, got shape \(3, 4\)"),
        (np.ones((1, 1, 1, 3, 4), np.float32), 2, 2, ValueError, "features: expected 3 or 4 dimensions"),
        (np.array(1, np.float32), 2, 2, ValueError, r"features: expected 3 or 4 dimensions, got shape \(\)"),
        (np.ones((0, 3, 4), np.float32), 2, 2, ValueError, "features: expected no empty axis"),
        (np.ones((2, 3, 0), np.float32), 2, 2, ValueError, "features: expected no empty axis"),
        (np.ones((2, 3, 4), np.int32), 2, 2, TypeError, "features: expected dtype float16.*got int32"),
        (np.ones((2, 3, 4), np.complex64), 2, 2, TypeError, "features: expected dtype"),
        (np.ones((2, 3, 4), ">f4"), 2, 2, TypeError, "native byte order"),
        (np.full((2, 3, 4), "x"), 2, 2, TypeError, "features: expected dtype"),
        (np.full((2, 3, 4), None), 2, 2, TypeError, "features: expected dtype"),
        (GOOD, 0, 2, ValueError, r"size: expected height and width in \[1, 2147483647\], got \(0, 2\)"),
        (GOOD, 2, -1, ValueError, "size: expected"),
        (GOOD, 2**31, 1, ValueError, "size: expected"),
        (GOOD, 2**63, 1, TypeError, "incompatible"),
        (GOOD, 2.5, 1, TypeError, "incompatible"),
        (GOOD, None, 1, TypeError, "incompatible"),
        (GOOD, 2**31 - 1, 2**31 - 1, (MemoryError, ValueError), "big|allocate|memory"),
    ],
)
def test_upsample_errors(core: ModuleType, features: Any, height: Any, width: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        core.bilinear_upsample(features, height, width)


@pytest.mark.parametrize(
    ("features", "rows", "cols", "error", "message"),
    [
        (np.ones((1, 2, 3, 4), np.float32), PIXELS, PIXELS, ValueError, "features: expected 3 dimensions"),
        (GOOD.astype(np.int64), PIXELS, PIXELS, TypeError, "features: expected dtype"),
        (GOOD, PIXELS.astype(np.int32), PIXELS, TypeError, "rows: expected dtype int64, got int32"),
        (GOOD, PIXELS, PIXELS.astype(np.uint64), TypeError, "cols: expected dtype int64, got uint64"),
        (GOOD, PIXELS.astype(">i8"), PIXELS, TypeError, "rows: expected dtype int64"),
        (GOOD, PIXELS[None], PIXELS, ValueError, r"rows: expected 1 dimension, got shape \(1, 3\)"),
        (GOOD, PIXELS, PIXELS[:2], ValueError, r"cols: expected as many as rows \(3\), got 2"),
        (GOOD, PIXELS + 5, PIXELS, ValueError, r"rows: expected pixels in \[0, 5\), got 5 at 0"),
        (GOOD, PIXELS, np.array([0, 6, 7]), ValueError, r"cols: expected pixels in \[0, 7\), got 7 at 2"),
        (GOOD, PIXELS - 1, PIXELS, ValueError, "rows: expected pixels"),
        (GOOD, np.array([np.iinfo(np.int64).min]), PIXELS[:1], ValueError, "rows: expected pixels"),
    ],
)
def test_sample_errors(core: ModuleType, features: Any, rows: Any, cols: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        core.bilinear_sample(features, rows, cols, 5, 7)


def test_sample_takes_strided_coordinates(core: ModuleType, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    pixels = rng.integers(0, 9, (10, 2))
    expected = core.bilinear_sample(x, pixels[:, 0].copy(), pixels[:, 1].copy(), 9, 9)
    np.testing.assert_array_equal(core.bilinear_sample(x, pixels[:, 0], pixels[:, 1], 9, 9), expected)
    np.testing.assert_array_equal(core.bilinear_sample(x, pixels[::-1, 0], pixels[::-1, 1], 9, 9), expected[::-1])


def test_threads_do_not_disturb_each_other(core: ModuleType, rng: np.random.Generator) -> None:
    inputs = [rng.standard_normal((9, 5 + i, 7)).astype(FLOATS[i % 3]) for i in range(8)]
    expected = [core.bilinear_upsample(x, 31, 29) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: core.bilinear_upsample(inputs[i % 8], 31, 29), range(200)))
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result, expected[i % 8])


def test_gil_is_released(core: ModuleType) -> None:
    # While the core computes in one thread, this one must run. With the GIL held it could not, on any machine.
    x = np.ones((256, 28, 28), np.float32)
    for _ in range(5):
        span: list[float] = []

        def work(span: list[float] = span) -> None:
            span.append(time.perf_counter())
            core.bilinear_upsample(x, 448, 448)
            span.append(time.perf_counter())

        thread = threading.Thread(target=work)
        thread.start()
        ticks = []
        while thread.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)
        begin, end = span
        # The ends are left out: the GIL is held there for the checks and for the result.
        if any(begin + 0.25 * (end - begin) < tick < end - 0.25 * (end - begin) for tick in ticks):
            return
    pytest.fail("no other thread ran while the core computed, in five calls")
