"""Runs the GPU backends on host tensors that end (or begin) where memory does: an access past one ends the process.

``python guard.py before|after OPERATION...``: every tensor that an operation is given or makes by `torch.empty` has a
page that nobody may touch directly before or after it. Prints each operation that got to its end.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is imported

import numpy as np
import torch

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_ALLOCATE = torch.empty


class Guard:
    """Allocates tensors beside a page without access.

    Parameters
    ----------
    side : str
        ``"before"`` a tensor's first byte or ``"after"`` its last.
    """

    def __init__(self, side: str) -> None:
        self.side = side
        self.kept: list[mmap.mmap] = []

    def empty(self, *shape, dtype=None, device=None, memory_format=torch.contiguous_format, **rest) -> torch.Tensor:
        """As `torch.empty`; anything but a plain host tensor is left to it."""
        size = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = torch.get_default_dtype() if dtype is None else dtype
        plain = torch.device("cpu" if device is None else device).type == "cpu" and not rest
        length = int(np.prod(size, dtype=np.int64)) * dtype.itemsize
        if not plain or not length:
            return _ALLOCATE(size, dtype=dtype, device=device, memory_format=memory_format, **rest)
        pages = -(-length // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self.kept.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (0, pages + 1):
            assert _LIBC.mprotect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
        first = start + PAGE + (0 if self.side == "before" else pages * PAGE - length)
        ctypes.memset(first, 0xFF, length)  # NaN, or -1
        flat = torch.frombuffer((ctypes.c_char * length).from_address(first), dtype=dtype)
        if memory_format == torch.channels_last:
            batch, channels, height, width = size
            return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(size)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor`, in its memory format."""
        last = tensor.ndim == 4 and not tensor.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        return self.empty(tensor.shape, dtype=tensor.dtype, memory_format=layout).copy_(tensor)


def knn(guard: Guard) -> None:
    """By each way to propose; refined in CUDA where that is built, and in Triton."""
    from ttt4as_fast.kernels.gpu_common import cuda
    from ttt4as_fast.kernels.knn import gpu, hopper

    rng = np.random.default_rng(0)
    for n_query, n_bank, dim, k, dtype in ((5, 129, 65, 3, torch.float32), (3, 70, 8, 1, torch.float16)):
        bank = guard.like(torch.from_numpy(rng.standard_normal((n_bank, dim))).to(dtype))
        query = guard.like(torch.from_numpy(rng.standard_normal((n_query, dim))).to(dtype))
        want = torch.cdist(query.double(), bank.double()).topk(k, largest=False).indices
        index, refined_by_triton = gpu.Index(bank), gpu.Index(bank)
        refined_by_triton._fits_cuda = lambda: False
        ways, built = [index._propose, index._propose_gemm, refined_by_triton._propose], "cpu" in cuda.LAUNCHERS
        if built:
            hopper.processors = lambda device: 1
            ways.append(index._propose_hopper)
        searches = [functools.partial(propose.__self__._search, propose=propose) for propose in ways]
        for search in searches:
            found = guard.empty(n_query, k), guard.empty(n_query, k, dtype=torch.int64)
            search(query, k, *found)
            assert torch.equal(found[1], want)


def coreset(guard: Guard) -> None:
    from ttt4as_fast.kernels.coreset import gpu

    points = guard.like(torch.from_numpy(np.random.default_rng(0).standard_normal((77, 13)).astype(np.float32)))
    for least in (gpu._SKETCH_FROM, (1, 1)):  # without sketches, and with
        gpu._SKETCH_FROM = least
        assert len(set(gpu.greedy(points, 9, 2).tolist())) == 9


def bilinear(guard: Guard) -> None:
    from ttt4as_fast.kernels.bilinear import gpu

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32))
    for features in (x, x.contiguous(memory_format=torch.channels_last)):
        assert torch.isfinite(gpu.upsample(guard.like(features), 23, 31)).all()
    rows, cols = (guard.like(torch.tensor(places)) for places in ([0, 22, 5], [30, 0, 7]))
    assert torch.isfinite(gpu.sample(guard.like(x[0]), rows, cols, 23, 31)).all()


def peaks(guard: Guard) -> None:
    from ttt4as_fast.kernels.peaks import gpu

    maps = guard.like(torch.from_numpy(np.random.default_rng(0).standard_normal((2, 23, 41)).astype(np.float32)))
    assert gpu.dilate(gpu.local_maxima(maps, 95.0), 3).any()


def segment(guard: Guard) -> None:
    from ttt4as_fast.kernels.segment import gpu, nominal_candidates

    rng = np.random.default_rng(0)
    for size, shape, limit in (((26, 30), (6, 5, 7), 12), ((17, 13), (5, 30, 29), 20)):
        maps = torch.from_numpy(rng.standard_normal((2, *size)).astype(np.float32))
        features = torch.from_numpy(rng.standard_normal((2, *shape)).astype(np.float32))
        candidates, most = nominal_candidates(size, limit)
        options = {"percentile": 98.0, "neighbor_radius": 2, "C": 0.1, "loss": "squared_hinge", "tol": 1e-3}
        found = gpu.segment(
            guard.like(maps), guard.like(features), skip=None, candidates=candidates, limit=most, max_iter=20, **options
        )
        assert torch.isfinite(found[1]).all() and (found[2] == 1).any()


def linear_svm(guard: Guard) -> None:
    from ttt4as_fast.kernels.linear_svm import gpu

    X = torch.from_numpy(np.random.default_rng(0).standard_normal((70, 34)).astype(np.float32))
    fitted = gpu.fit(guard.like(X), np.sign(X[:, 0].double().numpy()), C=0.1, loss="squared_hinge", tol=0.1, max_iter=9)
    assert torch.isfinite(fitted.coef).all()


def outside(guard: Guard) -> None:
    """A kernel that reads eight numbers behind or before its tensor: this process ends by a signal."""
    import triton
    import triton.language as tl

    @triton.jit
    def read_shifted(x_ptr, y_ptr, shift, BLOCK: tl.constexpr):
        place = tl.arange(0, BLOCK)
        tl.store(y_ptr + place, tl.load(x_ptr + place + shift))

    x, y = guard.empty(8), guard.empty(8)
    read_shifted[(1,)](x, y, 8 if guard.side == "after" else -8, BLOCK=8)


OPERATIONS = {f.__name__: f for f in (knn, coreset, bilinear, peaks, segment, linear_svm, outside)}


def main() -> None:
    """Run the operations that are named."""
    from emulator import Emulator, compiler, tensor_map  # beside this script

    from ttt4as_fast.kernels.gpu_common import cuda, driver

    guard = Guard(sys.argv[1])
    torch.empty = guard.empty
    torch.empty_like = lambda x, **_: guard.empty(x.shape, dtype=x.dtype)
    if compiler():
        cuda.LAUNCHERS["cpu"] = Emulator()
        driver.tensor_map = tensor_map
    for name in sys.argv[2:]:
        OPERATIONS[name](guard)
        print(name, flush=True)
    os._exit(0)  # nobody need take the tensors down, page by page


if __name__ == "__main__":
    main()
