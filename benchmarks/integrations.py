"""``ttt4as bench integrations``: code of each host library as it stands, against the same with one line switched.

One process run, equal threads, contestants by turns, and no ratio where the two disagree. anomalib's rows lie in
`anomalib_rows`, those of the HTTP service in `service`. A host that is not installed is named.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ttt4as_fast.progress import Progress, silent

from . import gate, machine, measure, peers, workloads
from .results_file import result

TITLE = "Drop-in: each host as it is, and with one line switched"

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much of everything: sizes that a test shrinks.

    Attributes
    ----------
    seconds : float
        For each comparison; three rounds are made in any case.
    seed : int
    data : path-like or None
        A data set to take images from.
    workload : str
        Shape of the torch module's input.
    samples : (int, int)
        Of scikit-learn's ``LinearSVC``: rows, channels.
    bank : (int, int)
        Of the searches: patches, channels.
    training_images, batch, side : int
        Of the detectors behind anomalib and the service: images, and their pixels a side.
    clients, requests : int
        Of the service: clients at once, images in a round.
    """

    seconds: float = 4.0
    seed: int = 0
    data: str | Path | None = None
    workload: str = "wrn50"
    samples: tuple[int, int] = (1500, 1024)
    bank: tuple[int, int] = (13_000, 344)
    training_images: int = 20
    batch: int = 4
    side: int = 224
    clients: int = 8
    requests: int = 64


@dataclass(frozen=True)
class Host:
    """A library whose users switch one line."""

    name: str
    modules: tuple[str, ...]
    extra: str
    rows: Callable[[Plan], Iterator[Row]]

    def why_not(self) -> str | None:
        """Why it cannot be measured here; None if it can."""
        missing = [module for module in self.modules if find_spec(module) is None]
        return f"{', '.join(missing)} not installed: pip install 'ttt4as_fast[{self.extra}]'" if missing else None


def run(plan: Plan | None = None, threads: int = 1, pattern: str = "", progress: Progress = silent) -> dict[str, Any]:
    """Measure the hosts whose name matches `pattern`; returns the content of ``integrations.json``.

    A row has ``host``, ``operation``, ``stock`` and ``switched`` (what is called), ``version``, ``theirs`` and ``ours``
    (milliseconds), ``speedup``, ``gate`` and, where a bank is prepared before, ``prepare``.

    Raises
    ------
    ValueError
        No host matches.
    """
    plan = plan or Plan()
    pinned = machine.pin(threads)
    watch = machine.Watch()
    hosts = [host for host in HOSTS if re.search(pattern, host.name, re.IGNORECASE)]
    if not hosts:
        names = ", ".join(host.name for host in HOSTS)
        raise ValueError(f"hosts: expected a pattern that matches one of {names}, got {pattern!r}")
    absent = {host.name: reason for host in hosts if (reason := host.why_not()) is not None}
    rows = []
    for i, host in enumerate(hosts):
        progress("integrations", i, len(hosts))
        if host.name not in absent:
            rows += list(host.rows(plan))
    progress("integrations", len(hosts), len(hosts))
    return result("integrations", TITLE, machine.describe(pinned, watch), rows, absent_peers=absent)


def row(
    host: str,
    operation: str,
    calls: tuple[str, str],
    version: str,
    timings: dict[str, measure.Timing],
    verdict: gate.Verdict,
    **more: Any,
) -> Row:
    """One comparison, of `timings` ``"theirs"`` and ``"ours"``: no ratio without agreement."""
    return {
        "host": host,
        "operation": operation,
        "stock": calls[0],
        "switched": calls[1],
        "version": version,
        "theirs": timings["theirs"].summary(),
        "ours": timings["ours"].summary(),
        "speedup": measure.ratio(timings["theirs"], timings["ours"]) if verdict else None,
        "gate": {"passed": verdict.passed, "detail": verdict.detail},
        **more,
    }


def check_masks(anomaly_map: Any, features: Any, masks: Any) -> gate.Verdict:
    """Masks of a batch against the operation's own, and the first against the method stated densely in float64."""
    from ttt4as_fast import TTT4AS

    maps, deep, found = (np.asarray(part) for part in (anomaly_map, features, masks))
    out = TTT4AS()(maps, deep)
    same = gate.check_equal(found.astype(bool), out.pred_mask)
    if not same:
        return same
    return gate.check_segment(maps[0], deep[0], out.pred_mask[0], out.decision_map[0], out.pseudo_labels[0])


# ---------------------------------------------------------------- scikit-learn


def _sklearn_rows(plan: Plan) -> Iterator[Row]:
    from sklearn.datasets import load_digits

    X, y = workloads.svm_samples(*plan.samples, plan.seed, plan.data)
    yield from _svc_rows(f"labelled pixels, {len(X)} x {X.shape[1]}", X, y, (1e-3, 1.0), plan)
    digits = load_digits()
    yield from _svc_rows("digits, 1797 x 64, ten classes", digits.data / 16.0, digits.target, (1.0,), plan)
    yield _transformer_row(plan)


def _svc_rows(what: str, X: np.ndarray, y: np.ndarray, costs: tuple[float, ...], plan: Plan) -> Iterator[Row]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC as Stock

    from ttt4as_fast import LinearSVC

    for C in costs:
        models = {"theirs": Stock(C=C, random_state=0), "ours": LinearSVC(C=C)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the stock one stops at its 1000 iterations
            timings = measure.by_turns({name: partial(one.fit, X, y) for name, one in models.items()}, plan.seconds)
        verdicts = _check_svc(X, y, models, C)
        yield row(
            "scikit-learn",
            f"fit {what}, C {C:g}",
            ("sklearn.svm.LinearSVC", "ttt.LinearSVC"),
            peers.versions("scikit-learn"),
            timings,
            verdicts["ours"],
            peer_gate={"passed": verdicts["theirs"].passed, "detail": verdicts["theirs"].detail},
        )


def _check_svc(X: np.ndarray, y: np.ndarray, models: dict[str, Any], C: float) -> dict[str, gate.Verdict]:
    """For each estimator the worst of the binary problems that it has solved."""
    classes = models["ours"].classes_
    worst: dict[str, gate.Verdict] = {}
    for i, positive in enumerate(classes[1:] if len(classes) == 2 else classes):
        signs = np.where(y == positive, 1, -1)
        optimum = gate.svm_optimum(X, signs, C)
        for name, model in models.items():
            found = gate.check_svm(X, signs, model.coef_[i], model.intercept_[i], C, optimum)
            if worst.get(name, True):
                worst[name] = found
    return worst


def _transformer_row(plan: Plan) -> Row:
    from sklearn.neighbors import KNeighborsTransformer

    from ttt4as_fast.integrations.sklearn import ExactKNeighborsTransformer

    bank, query = _bank_and_query(plan)
    k = 9
    stock = KNeighborsTransformer(n_neighbors=k, algorithm="brute")
    models = {"theirs": stock, "ours": ExactKNeighborsTransformer(n_neighbors=k)}
    prepare = _prepare({name: partial(one.fit, bank) for name, one in models.items()})
    graph = models["ours"].transform(query)
    # A graph of distances has one neighbour more: a training point is its own.
    found = graph.data.reshape(len(query), k + 1), graph.indices.reshape(len(query), k + 1)
    timings = measure.by_turns({name: partial(one.transform, query) for name, one in models.items()}, plan.seconds)
    return row(
        "scikit-learn",
        f"graph of {len(query)} patches among {len(bank)} x {bank.shape[1]}, {k} neighbours",
        ("KNeighborsTransformer(algorithm='brute')", "ExactKNeighborsTransformer"),
        peers.versions("scikit-learn"),
        timings,
        gate.check_knn(query, bank, *found),
        prepare=prepare,
    )


def _bank_and_query(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    n, channels = plan.bank
    bank = workloads.nominal_patches(channels, n, plan.seed, plan.data)
    return bank, workloads.query_patches(channels, plan.seed, plan.data)


def _prepare(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds to prepare a bank, which is paid once."""
    return {name: timing.summary()["p50"] for name, timing in measure.by_turns(functions, 0.0).items()}


# ---------------------------------------------------------------- FAISS, as PatchCore's code holds it


class StockFaissNN:
    """What ``patchcore.common.FaissNN`` does on a CPU: a flat index, made by `fit` and searched by `run`."""

    def __init__(self) -> None:
        self.search_index: Any = None

    def fit(self, features: np.ndarray) -> None:
        """Search `features`, (N, D), from now on."""
        import faiss

        self.search_index = faiss.IndexFlatL2(features.shape[-1])
        self.search_index.add(features)

    def run(self, n_nearest_neighbours: int, query_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances and indices, (Q, k)."""
        return self.search_index.search(query_features, n_nearest_neighbours)


def _faiss_rows(plan: Plan) -> Iterator[Row]:
    from ttt4as_fast.integrations.faiss import FaissNN

    bank, query = _bank_and_query(plan)
    holders: dict[str, Any] = {"theirs": StockFaissNN(), "ours": FaissNN()}
    prepare = _prepare({name: partial(holder.fit, bank) for name, holder in holders.items()})
    for k in (1, 9):
        squared, indices = holders["ours"].run(k, query)
        yield row(
            "FAISS",
            f"PatchCore's FaissNN.run: {len(query)} patches in {len(bank)} x {bank.shape[1]}, k {k}",
            ("faiss.IndexFlatL2", "integrations.faiss.IndexFlatL2"),
            peers.versions("faiss-cpu"),
            measure.by_turns({name: partial(one.run, k, query) for name, one in holders.items()}, plan.seconds),
            gate.check_knn(query, bank, np.sqrt(squared), indices),
            prepare=prepare,
        )


# ---------------------------------------------------------------- PyTorch


def _torch_rows(plan: Plan) -> Iterator[Row]:
    import torch

    from ttt4as_fast import nn

    workload = workloads.WORKLOADS[plan.workload]
    scene = workloads.scene(workload, 1, plan.seed, plan.data)
    maps, features = torch.from_numpy(scene.anomaly_map), torch.from_numpy(scene.features)
    recipe = partial(peers.peers("segment")[0].adapter(), scene.anomaly_map[0], scene.features[0])
    module = nn.TTT4AS()
    switched = {"nn.TTT4AS": module, "torch.compile(nn.TTT4AS, fullgraph=True)": torch.compile(module, fullgraph=True)}
    for name, ours in switched.items():
        operation = f"mask of {workload.shape}"
        try:
            masks = ours(maps, features)
        except RuntimeError as error:  # such as Inductor's, where there is no C++ compiler
            reason = " ".join(str(error).split())[:200]
            yield {"host": "PyTorch", "operation": f"{operation}, {name}", "skipped": reason}
            continue
        with torch.inference_mode():
            timings = measure.by_turns({"theirs": recipe, "ours": partial(ours, maps, features)}, plan.seconds)
        yield row(
            "PyTorch",
            operation,
            ("F.interpolate, LinearSVC on dense features", name),
            peers.versions("torch", "scikit-learn"),
            timings,
            check_masks(maps, features, masks),
        )


# ---------------------------------------------------------------- the rest


def _anomalib_rows(plan: Plan) -> Iterator[Row]:
    from . import anomalib_rows

    return anomalib_rows.rows(plan)


def _service_rows(plan: Plan) -> Iterator[Row]:
    from . import service

    with tempfile.TemporaryDirectory() as folder:
        yield from service.rows(plan, Path(folder))


HOSTS = (
    Host("anomalib", ("anomalib",), "anomalib", _anomalib_rows),
    Host("scikit-learn", ("sklearn",), "test", _sklearn_rows),
    Host("PyTorch", ("torch",), "test", _torch_rows),
    Host("FAISS", ("faiss",), "bench", _faiss_rows),
    Host("HTTP", ("starlette", "uvicorn", "prometheus_client"), "serve", _service_rows),
)


# ---------------------------------------------------------------- the table


def table(content: dict[str, Any]) -> Any:
    """The rows for the screen."""
    from rich.table import Table

    threads = next(iter(content["threads"].values()))
    shown = Table("host", "operation", "stock", "ms", "switched to", "ms", "speed-up", "gate", title=TITLE)
    shown.caption = f"medians, {threads} thread(s) on both sides; in brackets the band of single rounds (p20 to p80)"
    for column in (shown.columns[3], shown.columns[5], shown.columns[6]):
        column.justify = "right"
    for found in content["rows"]:
        if "skipped" in found:
            shown.add_row(found["host"], found["operation"], "-", "-", "-", "-", "-", found["skipped"])
            continue
        shown.add_row(
            found["host"],
            found["operation"],
            f"{found['stock']} ({found['version']})",
            f"{found['theirs']['p50']:.4g}",
            found["switched"],
            f"{found['ours']['p50']:.3g}",
            measure.with_band(found["speedup"]),
            described(found),
        )
    return shown


def described(found: Row) -> str:
    """What the gate says of a row, and of its peer where that misses what it is held to."""
    text = f"{'passed' if found['gate']['passed'] else 'FAILED'}: {found['gate']['detail']}"
    peer = found.get("peer_gate")
    return text if peer is None or peer["passed"] else f"{text}; the stock one missed it: {peer['detail']}"
