"""That every operation of the C++ core keeps within the limits on threads that a process has set."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from ttt4as_fast.kernels import native
from ttt4as_fast.kernels.dispatch import BackendWarning

# Each operation in a child of its own, which begins without a pool: a pool's threads are started when they are first
# used, and stay. Under the limit there may be none; without it there must be one, or the input says nothing.
SCRIPT = """
import os, sys
import numpy as np, threadpoolctl, torch
from ttt4as_fast import kernels
from ttt4as_fast.kernels import native
from ttt4as_fast.kernels.dispatch import BackendWarning

core = native.core()
rng = np.random.default_rng(0)
maps, features = rng.random((4, 64, 64), np.float32), rng.random((4, 32, 16, 16), np.float32)
points = rng.random((30_000, 64), np.float32)
X, y = rng.standard_normal((3000, 200)).astype(np.float32), np.repeat([1, -1], 1500)
operations = {
    "segment": lambda: kernels.segment(maps, features, backend="cpu"),
    "peaks": lambda: kernels.local_maxima(maps, backend="cpu"),
    "bilinear": lambda: kernels.bilinear_upsample(features.reshape(128, 16, 16), (64, 64), backend="cpu"),
    "linear_svm": lambda: kernels.fit_linear_svm(X, y, backend="cpu"),
    "knn": lambda: kernels.KnnIndex(points[:4000], backend="cpu").search(points[:512]),
    "coreset": lambda: kernels.k_center_greedy(points, 20, backend="cpu"),
}

def threads_of(call):
    before = len(os.listdir("/proc/self/task"))
    call()
    return len(os.listdir("/proc/self/task")) - before

def limited_by_torch(call):
    torch.set_num_threads(1)
    try:
        return threads_of(call)
    finally:
        torch.set_num_threads(2)

def limited_by_threadpoolctl(call):
    with threadpoolctl.threadpool_limits(1):
        return threads_of(call)

core.set_num_threads(4)
torch.set_num_threads(2)
for name, call in operations.items():
    child = os.fork()
    if not child:
        sys.stdout.write(f"{name} {globals()['limited_by_' + sys.argv[1]](call)} {threads_of(call)}\\n")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("TTT4AS_NUM_THREADS", "abc", "TTT4AS_NUM_THREADS: expected an integer >= 1, got 'abc'"),
        ("TTT4AS_NUM_THREADS", "0", "TTT4AS_NUM_THREADS: expected an integer >= 1, got '0'"),
        ("TTT4AS_ISA", "avx9", "TTT4AS_ISA: expected one of 'generic', 'avx2', 'avx512', 'amx', got 'avx9'"),
    ],
)
def test_a_variable_that_is_passed_over_is_said(monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    with pytest.warns(BackendWarning, match=re.escape(says)):
        native.check_environment()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.skipif(native.why_not() is not None, reason="the C++ core is not built")
@pytest.mark.parametrize("limit", ["torch", "threadpoolctl"])
def test_operations_start_no_thread_beyond_the_limit(limit):
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, limit],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found = {name: (int(under), int(without)) for name, under, without in map(str.split, done.stdout.splitlines())}
    assert found == dict.fromkeys(("segment", "peaks", "bilinear", "linear_svm", "knn", "coreset"), (0, 1))
