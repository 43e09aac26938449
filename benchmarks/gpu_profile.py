"""``python -m benchmarks.gpu_profile``: each measured operation once, marked for a profiler, at the rows' sizes.

Kernels are compiled and inputs made before the mark; `segment` and the searches launch their kernels one by one, not as
a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .gpu_bench import Bench, anomaly_maps, network_like


def calls(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Name -> the call that is profiled; its inputs exist already."""
    from ttt4as_fast import kernels

    def segment(batch: int) -> Callable[[], Any]:
        from ttt4as_fast.kernels.segment import gpu

        channels, grid, size = bench.size(1024, 4), bench.size(28, 4), bench.size(224, 20)
        features = network_like((batch, grid, grid, channels), 0, bench.device).permute(0, 3, 1, 2).contiguous()
        maps = anomaly_maps(batch, size, 0, bench.device)

        def call() -> Any:
            gpu.GRAPHS.clear()  # the first call of its shape launches, the second would replay
            return kernels.segment(maps, features, backend=bench.backend, n_nominal=bench.size(100, 9))

        return call

    def nearest(n_query: int, k: int) -> Callable[[], Any]:
        dim, n_bank = bench.size(1024, 12), bench.size(16384, 70)
        both = network_like((n_bank + n_query, dim), 7, bench.device)
        index = kernels.KnnIndex(both[:n_bank].contiguous(), backend=bench.backend)
        query = both[n_bank:].contiguous()

        def call() -> Any:
            index._parts[0]._graphs.clear()  # as above
            return index.search(query, k)

        return call

    points = network_like((bench.size(160_000, 60), bench.size(344, 5)), 3, bench.device)
    channels, grid, size = bench.size(1024, 3), bench.size(28, 4), bench.size(224, 9)
    features = network_like((1, channels, grid, grid), 0, bench.device)
    maps = anomaly_maps(bench.size(64, 2), bench.size(224, 20), 0, bench.device)
    return {
        "segment-1": segment(1),
        "segment-64": segment(bench.size(64, 2)),
        "knn-784-1": nearest(bench.size(784, 2), 1),
        "knn-25088-9": nearest(bench.size(25088, 3), 9),
        "coreset": lambda: kernels.k_center_greedy(points, 3, backend=bench.backend),
        "bilinear": lambda: kernels.bilinear_upsample(features, size, backend=bench.backend),
        "peaks": lambda: kernels.dilate(kernels.local_maxima(maps, backend=bench.backend), 5, backend=bench.backend),
    }


def main() -> None:
    """Warm up, then call each between the profiler's marks."""
    from .gpu_measure import Clock

    found = calls(Bench(Clock(torch.device("cuda", torch.cuda.current_device())), {}))
    for call in found.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for call in found.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
