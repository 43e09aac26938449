"""What is measured on a GPU: one function a row, each with its peers, its floor, its goal, and a check of its answer.

A row whose answer misses the reference is reported as wrong, without a ratio. Peers are measured in the same run on the
same inputs and in the same way: called one by one, or captured in a graph where that is said; those that are not
installed are named as absent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .gpu_bench import Bench, Peers, Row, anomaly_maps, network_like
from .gpu_measure import Clock, Times, as_json, floor_ms

# --- segment ---


def paper_recipe(anomaly_map: torch.Tensor, features: torch.Tensor, cuml: bool = False) -> torch.Tensor:
    """Dense upsampling on the device, scikit-learn's (or cuML's) SVM on the labelled pixels, a dense decision."""
    from ttt4as_fast.kernels.segment import nominal_candidates
    from ttt4as_fast.kernels.segment.reference import pseudo_label

    height, width = anomaly_map.shape[1:]
    candidates, limit = nominal_candidates((height, width), 100)
    masks = []
    for one, grid in zip(anomaly_map, features, strict=True):
        labels, _ = pseudo_label(one.cpu().numpy(), 99.0, 5, candidates, limit)
        dense = F.interpolate(grid[None], (height, width), mode="bilinear", align_corners=False)[0].flatten(1)
        used = torch.from_numpy(np.flatnonzero(labels)).to(dense.device)
        y = labels.ravel()[labels.ravel() != 0]
        if cuml:
            from cuml.svm import LinearSVC

            model = LinearSVC(C=1e-3, penalized_intercept=True, output_type="numpy")
            model.fit(dense[:, used].T, (y > 0).astype(np.float32))  # column-major as it lies
        else:
            from sklearn.svm import LinearSVC

            model = LinearSVC(C=1e-3, dual=True, random_state=0).fit(dense[:, used].T.cpu().numpy(), y)
        coef = torch.from_numpy(np.asarray(model.coef_, np.float32).ravel()).to(dense.device)
        masks.append((coef @ dense + float(np.ravel(model.intercept_)[0]) > 0).reshape(height, width))
    return torch.stack(masks)


def segment(bench: Bench, batch: int) -> Row:
    """The whole method, 1024 x 28 x 28 -> 224 x 224: per image for a batch, a call for one."""
    from ttt4as_fast import kernels

    goal = "<= 0.25 ms p50, >= 1000x the paper's recipe" if batch == 1 else "<= 25 microseconds an image"
    row = Row(f"segment, batch {batch}, 1024 x 28 x 28 -> 224 x 224", goal)
    batch = bench.size(batch, min(batch, 2))
    channels, grid, size = bench.size(1024, 4), bench.size(28, 4), bench.size(224, 20)

    def make(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = network_like((batch, grid, grid, channels), i, bench.device).permute(0, 3, 1, 2).contiguous()
        return anomaly_maps(batch, size, i, bench.device), features

    moved = 4 * batch * (channels * grid * grid + size * size) + batch * size * size * 6
    inputs = bench.clock.rotation(make, moved)
    params = {"n_nominal": bench.size(100, 9), "neighbor_radius": bench.size(5, 2)}

    def ours(maps: torch.Tensor, features: torch.Tensor) -> Any:
        return kernels.segment(maps, features, backend=bench.backend, **params)

    got = ours(*inputs[0])
    want = kernels.segment(inputs[0][0][:1], inputs[0][1][:1], backend="reference", **(params | {"tol": 1e-8}))
    differ = got.pred_mask[:1] != want.pred_mask
    labels = torch.equal(got.pseudo_labels[:1], want.pseudo_labels)
    row.notes["pixels_that_differ"] = int(differ.sum())
    row.notes["largest_decision_among_them"] = float(want.decision_map[differ].abs().max()) if differ.any() else 0.0
    row.correct = labels and row.notes["largest_decision_among_them"] < 1e-2
    row.ours = bench.clock.time(ours, inputs)
    replayed = ours(*inputs[0])  # what was timed replays a graph: the same bits as the first call, which did not
    row.notes["replay_gives_the_same_bits"] = torch.equal(replayed.decision_map, got.decision_map)
    row.correct = row.correct and row.notes["replay_gives_the_same_bits"]
    row.floor = floor_ms(bench.limits, moved)
    if bench.device.type == "cuda":
        row.notes["graph_replay_alone"] = as_json(_replay_alone(bench, inputs[0]))
        bench.note_captured(row, {"in_a_graph_of_the_callers": (ours, inputs[:4])})
    few = [(maps[:1], features[:1]) for maps, features in inputs[:4]]
    bench.peers_time(row, {"torch + scikit-learn (the paper's recipe)": paper_recipe}, few)
    bench.peers_time(row, {"torch + cuML": lambda *x: paper_recipe(*x, cuml=True)}, few)
    if batch > 1:
        for name, times in row.peers.items():
            row.peers[name] = times.scaled(batch) if isinstance(times, Times) else times
        row.notes["microseconds_an_image"] = 1e3 * row.ours.p50 / batch
        row.notes["peers"] = "one image measured, times the batch"
        row.met = row.notes["microseconds_an_image"] <= 25
    else:
        row.notes["graph_replay_alone_by_threads_of_the_solver"] = _by_threads(bench, ours, inputs[0])
        recipe = row.ratios.get("torch + scikit-learn (the paper's recipe)", 0.0)
        row.met = row.ours.p50 <= 0.25 and recipe >= 1000
    return row


def _replay_alone(bench: Bench, inputs: tuple) -> Times | None:
    """The captured graph by itself: without copies in and out, without Python."""
    from ttt4as_fast.kernels.segment import gpu

    fitting = [graph for graph in gpu.GRAPHS.graphs if graph.inputs[0].shape == inputs[0].shape]
    return bench.clock.time(fitting[-1].graph.replay, [()]) if fitting else None


def _by_threads(bench: Bench, call: Callable[..., Any], inputs: tuple) -> dict[str, Any]:
    """The same with other blocks of the solver: which number of threads gpu_common/svm.py should name."""
    from ttt4as_fast.kernels.gpu_common import svm
    from ttt4as_fast.kernels.segment import gpu

    usual, found = svm.THREADS, {}
    try:
        for threads in (128, 256, 512):
            svm.THREADS = threads
            gpu.GRAPHS.clear()  # a graph keeps the blocks it was captured with
            call(*inputs)
            call(*inputs)
            found[str(threads)] = as_json(_replay_alone(bench, inputs) or bench.clock.time(call, [inputs]))
    finally:
        svm.THREADS = usual
        gpu.GRAPHS.clear()
    return found


# --- k-NN ---


def torch_brute_force(query: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The expansion |q|^2 - 2 q.b + |b|^2 in float32 and a selection, as anomalib's PatchCore searches."""
    squared = query.square().sum(1, keepdim=True) - 2 * query @ bank.T + bank.square().sum(1)
    distances = squared.clamp_min_(0).sqrt_()
    return distances.min(1) if k == 1 else distances.topk(k, largest=False, dim=1)


def nearest(bench: Bench, n_query: int, k: int, dim: int) -> Row:
    """k-NN of a 16,384-vector bank."""
    from ttt4as_fast import kernels

    goal = ">= 5x anomalib's brute force; within 1.3x of the bare bf16 product, both captured in a graph"
    row = Row(f"{k}-NN, {n_query} queries x 16384 x {dim}", goal)
    n_query, n_bank, dim = bench.size(n_query, 2), bench.size(16384, 70), bench.size(dim, 12)
    both = network_like((n_bank + 4 * n_query, dim), 7, bench.device)
    bank, pool = both[:n_bank].contiguous(), both[n_bank:]
    inputs = [(pool[i * n_query : (i + 1) * n_query].contiguous(),) for i in range(4)]
    index = kernels.KnnIndex(bank, backend=bench.backend)
    distances, indices = index.search(inputs[0][0], k)
    checked = slice(0, 64)
    want, order = kernels.nearest_neighbors(inputs[0][0][checked], bank, k, backend="reference")
    same = indices[checked] == order
    close = torch.allclose(distances[checked], want, rtol=1e-5, atol=0)
    row.notes["share_of_equal_indices"] = float(same.float().mean())
    row.correct = close and row.notes["share_of_equal_indices"] > 0.999
    row.ours = bench.clock.time(lambda q: index.search(q, k), inputs)
    again = index.search(inputs[0][0], k)  # what was timed replays a graph where the search is small
    row.notes["replay_gives_the_same_bits"] = torch.equal(again[0], distances) and torch.equal(again[1], indices)
    row.correct = row.correct and row.notes["replay_gives_the_same_bits"]
    bank_low = bank.bfloat16().T
    low = [(query.bfloat16(),) for (query,) in inputs]
    product = bench.clock.time(lambda q: q @ bank_low, low)
    graphs = {
        "in_a_graph": (lambda q: index.search(q, k), inputs),
        "bare_bf16_product_in_a_graph": (lambda q: q @ bank_low, low),
    }
    captured, bare = bench.note_captured(row, graphs)
    moved = 2 * dim * (n_query + n_bank) + 12 * n_query * k
    row.floor = floor_ms(bench.limits, moved, 2 * n_query * n_bank * dim)
    peers: Peers = {
        "anomalib's brute force in torch": lambda q: torch_brute_force(q, bank, k),
        "torch.cdist + topk": lambda q: torch.cdist(q, bank).topk(k, largest=False, dim=1),
    }
    bench.peers_time(row, peers, inputs)
    try:
        import faiss

        resources = faiss.StandardGpuResources()
        flat = faiss.GpuIndexFlatL2(resources, dim)
        flat.add(bank.cpu().numpy())
        import faiss.contrib.torch_utils  # search takes tensors

        bench.peers_time(row, {"FAISS GpuIndexFlatL2": lambda q: flat.search(q, k)}, inputs)
    except (ImportError, AttributeError) as error:
        row.peers["FAISS GpuIndexFlatL2"] = f"not measured: {error}"
    row.peers["bare bf16 product (torch)"] = product
    brute = row.ratios.get("anomalib's brute force in torch", 0.0)
    row.met = brute >= 5 and captured <= 1.3 * bare
    return row


def crossover(bench: Bench) -> Row:
    """The ways to propose candidates over a range of queries: where kernels/knn/gpu.py should change between them."""
    from ttt4as_fast import kernels
    from ttt4as_fast.kernels.knn import hopper

    row = Row("1-NN by way to propose, 98 to 25088 queries x 16384 x 1024", "a row of gemm_from.json; HOPPER_UNTIL")
    n_bank, dim = bench.size(16384, 70), bench.size(1024, 12)
    counts = [2, 3] if bench.small else [98 << i for i in range(9)]
    both = network_like((n_bank + counts[-1], dim), 7, bench.device)
    part = kernels.KnnIndex(both[:n_bank].contiguous(), backend=bench.backend)._parts[0]
    ways = {"Triton": part._propose, "cuBLAS and a minimum": part._propose_gemm}
    if hopper.usable(bench.device):
        ways["propose.cu"] = part._propose_hopper
    row.correct, times = True, []

    def search(query: torch.Tensor, way: str) -> tuple[torch.Tensor, torch.Tensor]:
        distances = torch.empty((len(query), 1), dtype=torch.float32, device=query.device)
        indices = torch.empty((len(query), 1), dtype=torch.int64, device=query.device)
        part._search(query, 1, distances, indices, ways[way])
        return distances, indices

    clock = bench.clock if bench.small else Clock(bench.device, budget_s=0.15)
    for count in counts:
        query = both[n_bank : n_bank + count].contiguous()
        want, *others = (search(query, way) for way in ways)
        row.correct = row.correct and all(
            torch.equal(a, b) for found in others for a, b in zip(want, found, strict=True)
        )
        times.append({way: clock.captured_time(search, [(query, way)]) for way in ways})
    row.ours, row.peers["cuBLAS and a minimum"] = times[-1]["Triton"], times[-1]["cuBLAS and a minimum"]
    row.floor = floor_ms(bench.limits, 2 * dim * (counts[-1] + n_bank), 2 * counts[-1] * n_bank * dim)
    row.notes["milliseconds"] = {
        str(n): {way: time.p50 for way, time in found.items()} for n, found in zip(counts, times, strict=True)
    }
    wins = [min(found, key=lambda way: found[way].p50) == "cuBLAS and a minimum" for found in times]
    least = next((i for i in range(len(wins)) if all(wins[i:])), None)
    row.notes["gemm_from"] = None if least is None else counts[least] * n_bank
    return row


TILES = [
    *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3)),
    *((64, 256, 64, 4, 4), (64, 256, 64, 4, 3), (64, 256, 64, 8, 4)),  # 784 queries leave less of their last one empty
]
"""Queries, bank vectors and channels of a tile, warps, pipeline stages: those that are tried."""


def tiles(bench: Bench) -> Row:
    """Tiles of the fused proposals: which one kernels/knn/gpu.py should name for this architecture."""
    from ttt4as_fast import kernels
    from ttt4as_fast.kernels.knn.gpu import tile_of

    row = Row("1-NN proposals, fused, by tile, 25088 queries x 16384 x 1024", "the tile of this architecture")
    n_query, n_bank, dim = bench.size(25088, 3), bench.size(16384, 70), bench.size(1024, 12)
    both = network_like((n_bank + n_query, dim), 7, bench.device)
    part = kernels.KnnIndex(both[:n_bank].contiguous(), backend=bench.backend)._parts[0]
    low, facts = part._prepare(both[n_bank:].contiguous(), part.largest)
    found = [torch.empty((n_query, part.n_groups), dtype=torch.int32, device=bench.device) for _ in range(4)]

    def name(tile: tuple[int, ...]) -> str:
        return "{} x {} x {}, {} warps, {} stages".format(*tile)

    chosen, clock = tile_of(bench.device), bench.clock if bench.small else Clock(bench.device, budget_s=0.4)

    def timed(tile: tuple[int, ...], count: int, out: list[torch.Tensor]) -> Times:
        part_of = [x[:count] for x in (low, facts, *out)]
        return clock.captured_time(lambda: part._propose(*part_of, tile=tile), [()])

    row.ours, row.correct = timed(chosen, n_query, found[:2]), True
    row.notes["chosen"] = name(chosen)
    image = row.notes["milliseconds_for_784_queries"] = {name(chosen): timed(chosen, bench.size(784, 2), found[:2]).p50}
    for tile in TILES:
        if tile == chosen:
            continue
        try:
            row.peers[name(tile)] = timed(tile, n_query, found[2:])
        except Exception as error:  # it does not fit this architecture
            row.peers[name(tile)] = f"not measured: {type(error).__name__}: {error}"[:300]
            continue
        # The order of sums may differ, and with it a place among equals: almost all are the same.
        row.correct = row.correct and float((found[0] >> 8 == found[2] >> 8).float().mean()) > 0.99
        image[name(tile)] = timed(tile, bench.size(784, 2), found[2:]).p50
    row.floor = floor_ms(bench.limits, 2 * dim * (n_query + n_bank), 2 * n_query * n_bank * dim)
    return row


def refining(bench: Bench) -> Row:
    """To measure what proposals leave, in CUDA and in Triton: where kernels/knn/gpu.py should change between them."""
    from ttt4as_fast import kernels

    row = Row("k-NN refined, 784 queries x 16384 x 1024, k 9", "no slower than in Triton")
    n_bank, dim = bench.size(16384, 70), bench.size(1024, 12)
    few, many = bench.size(784, 2), bench.size(25088, 3)
    both = network_like((n_bank + many, dim), 7, bench.device)
    part = kernels.KnnIndex(both[:n_bank].contiguous(), backend=bench.backend)._parts[0]
    row.correct, row.notes["milliseconds"] = True, {}
    clock = bench.clock if bench.small else Clock(bench.device, budget_s=0.3)
    languages = {"CUDA": part._refine_cuda} if part._fits_cuda() else {}
    languages["Triton"] = part._refine_triton
    for count, k in ((few, 9), (few, 1), (many, 9), (many, 1)):
        query = both[n_bank : n_bank + count].contiguous()
        low, facts = part._prepare(query, part.largest)
        least, second = (torch.empty((count, part.n_groups), dtype=torch.int32, device=bench.device) for _ in range(2))
        part._propose(low, facts, least, second)
        distances = torch.empty((count, k), dtype=torch.float32, device=bench.device)
        indices = torch.empty((count, k), dtype=torch.int64, device=bench.device)
        expected: torch.Tensor | None = None
        for name, refine in languages.items():
            work = functools.partial(refine, query, k, (low, facts, least, second), distances, indices)
            indices.fill_(-1)  # what another launch found is no answer
            time = clock.captured_time(work, [()] * 4)  # of one launch, the most would be that of its graph
            row.notes["milliseconds"].setdefault(f"{count} queries, k {k}", {})[name] = time.p50
            if expected is None:  # the one in use for few queries comes first
                expected = indices.clone()
                row.ours = row.ours or time
            elif (count, k) == (few, 9):
                row.peers[name] = time
            # Sums in another order may swap what ties.
            row.correct = row.correct and float((indices == expected).float().mean()) > 0.999
    row.floor = floor_ms(bench.limits, few * (8 * part.n_groups + 10 * dim * both.element_size()), 0)
    return row


# --- coreset ---


def torch_greedy(points: torch.Tensor, n_samples: int) -> torch.Tensor:
    """A pass of tensor operations a pick, the pick read by the host, as anomalib's KCenterGreedy does."""
    nearest = torch.full((len(points),), float("inf"), device=points.device)
    picks, pick = [], 0
    for _ in range(n_samples):
        picks.append(pick)
        nearest = torch.minimum(nearest, torch.linalg.norm(points - points[pick], dim=1))
        nearest[pick] = 0
        pick = int(nearest.argmax())
    return torch.tensor(picks)


def coreset(bench: Bench) -> Row:
    """Greedy k-center over 160,000 x 344, per pick."""
    from ttt4as_fast import kernels

    row = Row("k-center, 160000 x 344 -> 16000", ">= 10x anomalib's KCenterGreedy; >= 70 % of copy bandwidth")
    n, dim, picks = bench.size(160_000, 60), bench.size(344, 5), bench.size(16_000, 6)
    part = bench.size(500, 6)
    points = network_like((n, dim), 3, bench.device)
    got = kernels.k_center_greedy(points, part, backend=bench.backend)
    row.correct = _covers_alike(points, got, torch_greedy(points, part))
    slow = bench.clock if bench.small else Clock(bench.device, calls=3, warmup=1)
    row.ours = slow.time(lambda: kernels.k_center_greedy(points, picks, backend=bench.backend), [()])
    try:
        peer = slow.time(lambda: torch_greedy(points, part), [()])
        row.peers["anomalib's KCenterGreedy in torch"] = peer.scaled(picks / part)
        row.notes["peers"] = (
            f"{part} picks measured, scaled to {picks}: each costs the same. Without the random projection that "
            "anomalib puts before: both sides see the points as they are"
        )
    except torch.OutOfMemoryError as error:
        row.peers["anomalib's KCenterGreedy in torch"] = f"not measured: {error}"[:300]
    row.floor = floor_ms(bench.limits, picks * (4.0 * n * dim + 8 * n))
    row.notes["floor"] = "of a full pass over the points a pick, which sketches spare for the most part"
    row.notes["share_of_copy_bandwidth"] = row.floor / row.ours.p50
    ratio = row.ratios.get("anomalib's KCenterGreedy in torch", 0.0)
    row.met = ratio >= 10 and row.notes["share_of_copy_bandwidth"] >= 0.7
    return row


def _covers_alike(points: torch.Tensor, got: torch.Tensor, want: torch.Tensor) -> bool:
    def radius(picks: torch.Tensor) -> float:
        chosen = points[picks.to(points.device)]
        return float(torch.cdist(points, chosen).amin(1).max())

    return len(set(got.tolist())) == len(got) and radius(got) <= 1.001 * radius(want)


# --- bilinear, peaks ---


def bilinear(bench: Bench) -> Row:
    """Dense upsampling 1024 x 28 x 28 -> 224 x 224."""
    from ttt4as_fast import kernels

    row = Row(
        "bilinear upsample, 1024 x 28 x 28 -> 224 x 224", ">= 0.9 of copy bandwidth, no slower than F.interpolate"
    )
    channels, grid, size = bench.size(1024, 3), bench.size(28, 4), bench.size(224, 9)
    moved = 4 * channels * (grid * grid + size * size)
    inputs = bench.clock.rotation(lambda i: (network_like((1, channels, grid, grid), i, bench.device),), moved)
    got = kernels.bilinear_upsample(inputs[0][0], size, backend=bench.backend)
    want = kernels.bilinear_upsample(inputs[0][0].double(), size, backend="reference")
    row.correct = bool((got.double() - want).abs().max() <= 1e-5 * want.abs().max())
    row.ours = bench.clock.captured_time(lambda x: kernels.bilinear_upsample(x, size, backend=bench.backend), inputs)

    def interpolate(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)

    row.peers["F.interpolate"] = bench.clock.captured_time(interpolate, inputs)
    row.floor = floor_ms(bench.limits, moved)
    row.notes["share_of_copy_bandwidth"] = row.floor / row.ours.p50
    row.met = row.notes["share_of_copy_bandwidth"] >= 0.9 and row.ratios["F.interpolate"] >= 1
    return row


def peaks(bench: Bench) -> Row:
    """Percentile, peaks and dilation, 64 x 224 x 224."""
    from ttt4as_fast import kernels

    row = Row("peaks + dilation + percentile, 64 x 224 x 224", ">= 3x cupyx and torch")
    batch, size, radius = bench.size(64, 2), bench.size(224, 20), bench.size(5, 2)
    moved = 4 * batch * size * size
    inputs = bench.clock.rotation(lambda i: (anomaly_maps(batch, size, i, bench.device),), moved)

    def ours(maps: torch.Tensor) -> torch.Tensor:
        found = kernels.local_maxima(maps, 99.0, backend=bench.backend)
        return kernels.dilate(found, radius, backend=bench.backend)

    def torch_peer(maps: torch.Tensor) -> torch.Tensor:
        tau = torch.quantile(maps.flatten(1), 0.99, dim=1)[:, None, None]
        highest = F.max_pool2d(maps[:, None], 3, 1, 1)[:, 0]
        found = ((maps == highest) & (maps >= tau)).float()
        return F.max_pool2d(found[:, None], 2 * radius + 1, 1, radius)[:, 0] > 0

    def cupy_peer(maps: torch.Tensor) -> Any:
        import cupy
        from cupyx.scipy import ndimage

        x = cupy.from_dlpack(maps)
        tau = cupy.percentile(x.reshape(len(x), -1), 99, axis=1)[:, None, None]
        found = (x == ndimage.maximum_filter(x, size=(1, 3, 3))) & (x >= tau)
        return ndimage.maximum_filter(found.astype(cupy.uint8), size=(1, 2 * radius + 1, 2 * radius + 1))

    want = kernels.dilate(kernels.local_maxima(inputs[0][0], 99.0, backend="reference"), radius, backend="reference")
    row.correct = torch.equal(ours(*inputs[0]), want)
    row.ours = bench.clock.time(ours, inputs)
    bench.note_captured(row, {"in_a_graph": (ours, inputs)})
    bench.peers_time(row, {"torch.quantile + max_pool2d": torch_peer, "cupyx.scipy.ndimage": cupy_peer}, inputs)
    row.floor = floor_ms(bench.limits, moved + 2 * batch * size * size)
    row.met = bool(row.ratios) and min(row.ratios.values()) >= 3
    return row


@dataclass(frozen=True)
class Case:
    """A row and the seconds that it is planned to take: inputs, reference, peers, and a second a timing at most."""

    measure: Callable[[Bench], Row]
    seconds: float


def _knn_case(n_query: int, k: int, dim: int) -> Case:
    return Case(lambda bench: nearest(bench, n_query, k, dim), 7 if n_query > 784 else 3)


# By weight, so that a run that is cut short has what matters most.
ROWS: dict[str, Case] = {
    "segment-1": Case(lambda bench: segment(bench, 1), 6),
    "segment-64": Case(lambda bench: segment(bench, 64), 5),
    **{f"knn-{q}-{k}-1024": _knn_case(q, k, 1024) for q in (784, 784 * 32) for k in (1, 9)},
    "coreset": Case(coreset, 4),
    "peaks": Case(peaks, 4),
    "bilinear": Case(bilinear, 3),
    "knn-crossover": Case(crossover, 9),
    **{f"knn-{q}-{k}-1536": _knn_case(q, k, 1536) for q in (784, 784 * 32) for k in (1, 9)},
    "knn-tiles": Case(tiles, 7),
    "knn-refining": Case(refining, 8),
}
"""What `python -m benchmarks.gpu` measures, in this order."""
