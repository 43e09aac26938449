"""``make bench-compare BASE=COMMIT``: is HEAD slower than BASE? Both built and measured by turns in one run.

``python -m ttt4as_fast.benchmarks.compare BASE [HEAD]``, in a checkout, is what it runs.

Each round runs the base, the head and the base again, each in a fresh process on the same inputs. How far the two runs
of the base lie apart is the noise; the head fails where its median is slower by more than that band and five percent.
Exit code 1 then, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import machine, measure, workloads

_LEAST_BAND = 0.05

# Runs on any commit that has the public functions; one that it lacks is left out of the comparison.
_WORKER = """
import json, sys, time
import numpy as np
import ttt4as_fast
from ttt4as_fast import kernels
arrays = np.load(sys.argv[1])
anomaly_map, features = arrays["anomaly_map"], arrays["features"]
query, bank, X, y = (arrays[name] for name in ("query", "bank", "X", "y"))
index = kernels.KnnIndex(bank)
operations = {
    "segment": lambda: kernels.segment(anomaly_map, features),
    "knn": lambda: index.search(query),
    "linear_svm": lambda: kernels.fit_linear_svm(X, y),
    "peaks": lambda: kernels.dilate(kernels.local_maxima(anomaly_map), 5),
    "bilinear": lambda: kernels.bilinear_upsample(features[:64], anomaly_map.shape),
    "coreset": lambda: kernels.k_center_greedy(bank[:2000], 100),
}
found = {}
for name, call in operations.items():
    call()
    spent = []
    end = time.perf_counter() + float(sys.argv[2])
    while len(spent) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        spent.append(1e3 * (time.perf_counter() - begin))
    found[name] = sorted(spent)[len(spent) // 2]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Change:
    """One operation, before and after.

    Attributes
    ----------
    operation : str
    base_ms, head_ms : float
        Medians over the rounds.
    ratio : float
        Head over base: above 1 is slower.
    band : float
        The largest relative difference, 80th percentile, of two runs of the base in one round; at least 0.05.
    """

    operation: str
    base_ms: float
    head_ms: float
    ratio: float
    band: float

    @property
    def verdict(self) -> str:
        """``"slower"``, ``"faster"`` or ``"within noise"``."""
        if self.ratio > 1 + self.band:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.band) else "within noise"


def changes(rounds: Sequence[tuple[dict[str, float], dict[str, float], dict[str, float]]]) -> list[Change]:
    """What rounds of (base, head, base again), each operation -> milliseconds, say."""
    found = []
    for operation in rounds[0][0]:
        first, head, second = (np.array([one[i][operation] for one in rounds]) for i in range(3))
        base = np.sqrt(first * second)  # a drift over the round falls out
        noise = np.percentile(np.maximum(first / second, second / first) - 1, 80)
        found.append(
            Change(
                operation,
                measure.significant(float(np.median(base))),
                measure.significant(float(np.median(head))),
                measure.significant(float(np.median(head / base)), 3),
                max(measure.significant(float(noise), 3), _LEAST_BAND),
            )
        )
    return found


def build(root: Path, commit: str, folder: Path, isolated: bool) -> Path:
    """The package of a commit, installed without its dependencies below `folder`; returns what goes on the path."""
    source, target = folder / "source", folder / "site"
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(root), "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(command if isolated else [*command, "--no-build-isolation"], check=True, cwd=folder)
    return target


def compare(base: Path, head: Path, rounds: int, seconds: float, threads: int) -> list[Change]:
    """Measure two installations by turns.

    Parameters
    ----------
    base, head : pathlib.Path
        Folders for the path, as `build` returns them.
    rounds : int
    seconds : float
        For each operation in each process.
    threads : int
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        _write_inputs(inputs)

        def measured(site: Path) -> dict[str, float]:
            counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TTT4AS_NUM_THREADS"), str(threads))
            environment = {**os.environ, **counts, "PYTHONPATH": str(site)}
            command = [sys.executable, "-c", _WORKER, str(inputs), str(seconds)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder)
            return json.loads(done.stdout.splitlines()[-1])

        return changes([(measured(base), measured(head), measured(base)) for _ in range(rounds)])


def _write_inputs(path: Path) -> None:
    scene = workloads.scene(workloads.WORKLOADS["wrn50"], 1)
    X, y = workloads.svm_samples(1000, 1024)
    np.savez(
        path,
        anomaly_map=scene.anomaly_map[0],
        features=scene.features[0],
        query=workloads.query_patches(344),
        bank=workloads.nominal_patches(344, 8000),
        X=X,
        y=y,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 if an operation became slower than the noise allows."""
    parser = argparse.ArgumentParser(prog="python -m ttt4as_fast.benchmarks.compare", description=__doc__)
    parser.add_argument("base", help="commit to measure against")
    parser.add_argument("head", nargs="?", default="HEAD", help="commit to measure (default: HEAD)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each operation in each process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--no-build-isolation", action="store_true", help="build with what is installed, as pip's option of that name"
    )
    options = parser.parse_args(arguments)
    root = machine.checkout(Path.cwd())
    machine.pin(options.threads)
    busy = machine.load_of_others()
    if busy is not None and busy > machine.BUSY:
        print(f"warning: other programs use {busy:.0%} of this machine's processors", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        sites = [
            build(root, commit, Path(folder) / name, not options.no_build_isolation)
            for name, commit in (("base", options.base), ("head", options.head))
        ]
        found = compare(sites[0], sites[1], options.rounds, options.seconds, options.threads)
    print(f"{'operation':<12}{options.base[:12]:>14}{options.head[:12]:>14}  ms   head/base  noise")
    for change in found:
        print(
            f"{change.operation:<12}{change.base_ms:>14.4g}{change.head_ms:>14.4g}{change.ratio:>14.3f}"
            f"  +-{change.band:.1%}  {change.verdict}"
        )
    return int(any(change.verdict == "slower" for change in found))


if __name__ == "__main__":
    sys.exit(main())
