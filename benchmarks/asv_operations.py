"""For asv: each operation by itself, over the suite's workloads."""

from __future__ import annotations

from . import workloads


class NearestNeighbours:
    """`KnnIndex`: search of one image's patches, and preparing the bank."""

    params = ([1000, 13_000], [1, 9])
    param_names = ("bank", "k")
    timeout = 300

    def setup(self, bank: int, k: int) -> None:
        from ttt4as_fast import kernels

        self.kernels = kernels
        self.bank = workloads.nominal_patches(344, bank)
        self.query = workloads.query_patches(344)
        self.index = kernels.KnnIndex(self.bank)

    def time_search(self, bank: int, k: int) -> None:
        self.index.search(self.query, k)

    def time_prepare(self, bank: int, k: int) -> None:
        self.kernels.KnnIndex(self.bank)


class LinearSVM:
    """`fit_linear_svm` on labelled pixels."""

    params = ([500, 5000], [384, 1536], [1e-3, 10.0])
    param_names = ("samples", "channels", "C")
    timeout = 300

    def setup(self, samples: int, channels: int, C: float) -> None:
        from ttt4as_fast import kernels

        self.fit = kernels.fit_linear_svm
        self.X, self.y = workloads.svm_samples(samples, channels)

    def time_fit(self, samples: int, channels: int, C: float) -> None:
        self.fit(self.X, self.y, C=C)


class Peaks:
    """`local_maxima` and `dilate` on an anomaly map."""

    params = ([224, 1024],)
    param_names = ("map_size",)
    timeout = 300

    def setup(self, map_size: int) -> None:
        from ttt4as_fast import kernels

        self.kernels = kernels
        self.anomaly_map = workloads.scene(workloads.Workload("peaks", 152, 28, map_size, ""), 1).anomaly_map[0]

    def time_peaks(self, map_size: int) -> None:
        self.kernels.dilate(self.kernels.local_maxima(self.anomaly_map), 5)


class Coreset:
    """`k_center_greedy`."""

    timeout = 300

    def setup(self) -> None:
        from ttt4as_fast import kernels

        self.pick = kernels.k_center_greedy
        self.points = workloads.nominal_patches(344, 10_000)

    def time_pick(self) -> None:
        self.pick(self.points, 500)
