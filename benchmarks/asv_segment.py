"""For asv: test-time training as a whole, time and peak memory, over the suite's workloads."""

from __future__ import annotations

from . import workloads


class Segment:
    """`TTT4AS()` on one image and on a batch."""

    params = (["lite0", "wrn50", "dinov2_vits14", "wrn50_512px"], [1, 8])
    param_names = ("workload", "batch")
    timeout = 300

    def setup(self, name: str, batch: int) -> None:
        from ttt4as_fast import TTT4AS

        scene = workloads.scene(workloads.WORKLOADS[name], batch)
        self.anomaly_map, self.features = scene.anomaly_map, scene.features
        self.segmenter = TTT4AS()
        self.segmenter(self.anomaly_map, self.features)

    def time_segment(self, name: str, batch: int) -> None:
        self.segmenter(self.anomaly_map, self.features)

    def peakmem_segment(self, name: str, batch: int) -> None:
        self.segmenter(self.anomaly_map, self.features)
