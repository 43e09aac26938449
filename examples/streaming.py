"""A camera at a steady rate: a producer thread, a bounded queue, masks, and the latency that came of it.

    python examples/streaming.py --rate 50 --frames 500

The producer never waits for the consumer: a frame that finds the queue full is dropped and counted, as on a line.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time

import numpy as np

import ttt4as_fast as ttt


def frame(rng: np.random.Generator, size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """What a detector would hand over: an anomaly map with one bump, and features that change under it."""
    rows, cols = np.mgrid[:size, :size] / size
    row, col = rng.uniform(0.2, 0.8, 2)
    anomaly_map = np.exp(-((rows - row) ** 2 + (cols - col) ** 2) / 0.004) + 0.05 * rng.random((size, size))
    features = 0.2 * rng.standard_normal((152, 28, 28)) + anomaly_map[4::8, 4::8] * rng.standard_normal((152, 1, 1))
    return anomaly_map.astype(np.float32), features.astype(np.float32)


def main() -> None:
    """Produce, consume, print p50, p95, p99 and the frames dropped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=50.0, help="frames a second")
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--queue", type=int, default=4, help="frames that may wait")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    frames = [frame(rng) for _ in range(8)]
    segment = ttt.TTT4AS()
    segment(*frames[0])  # the first call loads the backend
    waiting: queue.Queue[tuple[float, int] | None] = queue.Queue(options.queue)
    dropped = 0

    def camera() -> None:
        nonlocal dropped
        start = time.perf_counter()
        for i in range(options.frames):
            due = start + i / options.rate
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                waiting.put_nowait((due, i))
            except queue.Full:
                dropped += 1
        waiting.put(None)

    producer = threading.Thread(target=camera)
    producer.start()
    latencies, marked = [], 0
    while (item := waiting.get()) is not None:
        due, i = item
        marked += bool(segment(*frames[i % len(frames)]).pred_mask.any())
        latencies.append(1e3 * (time.perf_counter() - due))
    producer.join()
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    print(f"{len(latencies)} frames at {options.rate:g} a second, {marked} with a mask, {dropped} dropped")
    print(f"from due to mask: p50 {p50:.2f} ms, p95 {p95:.2f} ms, p99 {p99:.2f} ms, max {max(latencies):.2f} ms")


if __name__ == "__main__":
    main()
