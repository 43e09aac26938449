"""Exact nearest neighbours on the device against the reference."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels

from . import emulator

CASES = [  # queries, bank, channels, neighbours, dtype
    (1, 1, 1, 1, "float32"),
    (5, 70, 3, 1, "float32"),
    (4, 70, 3, 4, "float64"),
    (3, 200, 65, 9, "float32"),
    (3, 129, 64, 16, "float16"),
    (2, 40, 10, 40, "float32"),  # all of the bank
    (2, 90, 130, 1, "bfloat16"),
]


def check(query: torch.Tensor, bank: torch.Tensor, k: int, device: torch.device) -> None:
    distances, indices = kernels.nearest_neighbors(query.to(device), bank.to(device), k, backend="gpu")
    assert distances.dtype == torch.float32 and indices.dtype == torch.int64
    compare(distances, indices, query, bank)


def compare(distances: torch.Tensor, indices: torch.Tensor, query: torch.Tensor, bank: torch.Tensor) -> None:
    """The neighbours that were found with the reference's."""
    want, order = kernels.nearest_neighbors(query.cpu(), bank.cpu(), indices.shape[1], backend="reference")
    assert torch.equal(indices.cpu(), order)
    assert torch.allclose(distances.cpu(), want, rtol=1e-6, atol=0)


def rows_of(group: int | torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """The bank's rows at the places of a group, as `_column` of gpu_kernels."""
    return group // 4 * 128 + place // 2 * 8 + group % 4 * 2 + place % 2


@pytest.fixture(params=["cuda", "triton"])
def refined_by(request, device, monkeypatch) -> str:
    """The language of the kernel that measures what the proposals cannot exclude."""
    from ttt4as_fast.kernels.knn import gpu

    if request.param == "cuda":
        request.getfixturevalue("cuda_source")
    else:
        monkeypatch.setattr(gpu.Index, "_fits_cuda", lambda self: False)
    return request.param


@pytest.fixture
def refined_by_triton(monkeypatch) -> None:
    """Where sums in another order could tell copies of a row apart, which those of the kernel in CUDA cannot."""
    gpu = pytest.importorskip("ttt4as_fast.kernels.knn.gpu", reason="Triton is not installed")
    monkeypatch.setattr(gpu.Index, "_fits_cuda", lambda self: False)


@pytest.mark.usefixtures("refined_by")
@pytest.mark.parametrize(("n_query", "n_bank", "dim", "k", "dtype"), CASES)
def test_search(device, rng, n_query, n_bank, dim, k, dtype):
    kind = getattr(torch, dtype)
    query = torch.from_numpy(rng.standard_normal((n_query, dim)) + 3).to(kind)
    bank = torch.from_numpy(rng.standard_normal((n_bank, dim)) + 3).to(kind)
    check(query, bank, k, device)


@pytest.mark.usefixtures("refined_by_triton")
@pytest.mark.parametrize("k", [1, 5])
def test_ties_go_to_the_lowest_index(device, rng, k):
    query = torch.from_numpy(rng.integers(0, 2, (4, 2)).astype(np.float32))
    bank = torch.from_numpy(rng.integers(0, 2, (75, 2)).astype(np.float32))
    check(query, bank, k, device)


@pytest.mark.usefixtures("refined_by_triton")
@pytest.mark.parametrize("k", [1, 6])
def test_copies_of_a_row_go_to_the_lowest_index_however_each_is_measured(device, rng, k):
    """Seeds, single rows and whole groups are summed in other orders: rounding must not tell copies apart."""
    rows = rng.standard_normal((40, 333)).astype(np.float32)
    bank = torch.from_numpy(rows[rng.integers(0, 40, 300)])
    near = rows[:3] + 0.3 * rng.standard_normal((3, 333)).astype(np.float32)
    check(torch.cat((torch.from_numpy(near), bank[100:102])), bank, k, device)


@pytest.mark.usefixtures("refined_by_triton")
def test_copies_of_a_long_row_are_a_tie_though_sums_lose_what_their_order_makes_them_lose(device):
    """Squares below half the last place of the first: a thread's sum drops them one by one, a sum of them counts."""
    row = np.full((1, 8192), np.sqrt(0.99 * 2.0**-53), np.float32)
    row[0, 0] = 1
    check(torch.zeros(1, 8192), torch.from_numpy(row.repeat(40, axis=0)), 40, device)


def test_strided_query_and_bank(device, rng):
    query = torch.from_numpy(rng.standard_normal((6, 24)).astype(np.float32))[::2, ::3]
    bank = torch.from_numpy(rng.standard_normal((8, 90)).astype(np.float32)).T
    check(query, bank, 2, device)


def test_rows_that_lie_far_apart(device, far_apart):
    """A row's place in memory is counted in 64 bits, though its stride in units fits 32."""
    near = far_apart.contiguous()
    for bank, query in ((far_apart, near), (near, far_apart)):
        distances, indices = kernels.KnnIndex(bank, backend="gpu").search(query, 2)
        assert indices.tolist() == [[0, 1], [1, 0], [2, 1]] and distances.tolist() == [[0, 4], [0, 4], [0, 16]]


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_and_offset_cost_no_exactness(device, rng, scale):
    """Distances far below the norms: where a float32 or float16 product alone would be lost."""
    offset = 1e4 * rng.standard_normal(20)
    query = torch.from_numpy(scale * (offset + rng.standard_normal((3, 20))))
    bank = torch.from_numpy(scale * (offset + rng.standard_normal((64, 20))))
    check(query, bank, 3, device)


def test_many_neighbours_and_values_beyond_float32_search_exhaustively(device, rng):
    from ttt4as_fast.kernels.knn import gpu

    bank = torch.from_numpy(rng.standard_normal((gpu.MAX_K + 20, 5)))
    check(bank[:3] + 0.1, bank, gpu.MAX_K + 1, device)
    check(bank[:3] * 1e30 + 1, bank * 1e30, 2, device)
    assert gpu.Index(bank.to(device) * 1e30).exhaustive


@pytest.fixture
def differences(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the differences that exhaustive searches square: queries, rows, channels."""
    shapes: list[tuple[int, ...]] = []
    square = torch.Tensor.square_
    monkeypatch.setattr(torch.Tensor, "square_", lambda self: shapes.append(tuple(self.shape)) or square(self))
    return shapes


def test_copies_of_a_row_tie_in_any_part_of_an_exhaustive_search(device, rng, differences):
    """The order of a sum may depend on how many rows are summed at once: as many always are."""
    from ttt4as_fast.kernels.knn import gpu

    row = rng.standard_normal((1, 37)).astype(np.float32)
    bank = torch.from_numpy(row.repeat(9, axis=0)).to(device)
    index = gpu.Index(bank, scratch_bytes=8 * (9 + 37 + 4 * (37 + 37 + 1)))
    index.exhaustive = True
    distances, indices = index.search(bank[:1] + 0.3, 9)
    assert indices[0].tolist() == list(range(9)) and (distances == distances[0, 0]).all()
    assert differences == [(1, 4, 37)] * 3


def test_an_exhaustive_search_of_long_vectors_keeps_to_the_scratch(device, rng, differences):
    """Queries in float64 and their differences from a row of the bank were not counted beside few rows."""
    from ttt4as_fast.kernels.knn import gpu

    bank, query = (torch.from_numpy(rng.standard_normal((n, 256)).astype(np.float32)).to(device) for n in (80, 301))
    index = gpu.Index(bank, scratch_bytes=1 << 18)
    compare(*index.search(query, gpu.MAX_K + 1), query, bank)
    assert {n for n, *_ in differences} == {30, 1}
    assert all(8 * (n * (80 + 256) + rows * 256 + n * rows * (256 + 1)) <= 1 << 18 for n, rows, _ in differences)


def test_an_exhaustive_search_without_scratch_for_a_query_takes_what_one_needs(device, rng, differences):
    """And not a row of the bank at a time, of which there may be millions."""
    from ttt4as_fast.kernels.knn import gpu

    bank, query = (torch.from_numpy(rng.standard_normal((n, 3)).astype(np.float32)).to(device) for n in (400, 2))
    index = gpu.Index(bank, scratch_bytes=1 << 10)
    compare(*index.search(query, gpu.MAX_K + 1), query, bank)
    assert len(differences) == 6 and {(n, rows) for n, rows, _ in differences} == {(1, 172)}


def test_numbers_that_float16_has_none_for_at_any_scale(device, rng):
    """Near float32's largest, in the bank, and in the queries of one that is not so."""
    bank = torch.from_numpy(rng.standard_normal((70, 5)).astype(np.float32))
    check(bank[:3] * 1e37 * 1.001, bank * 1e37, 2, device)
    check(torch.cat((bank[:2] * 1e37, bank[2:4])), bank, 3, device)
    check(torch.tensor([[3e38, 0.0]]), torch.tensor([[1.0, 2.0]] * 5), 3, device)  # all of it its own centre: no norms


def test_memory_is_bounded_by_an_argument(device, rng):
    """Blocks of queries, with the same result; out of memory halves them and warns."""
    from ttt4as_fast.kernels.dispatch import BackendWarning
    from ttt4as_fast.kernels.knn import gpu

    bank = torch.from_numpy(rng.standard_normal((33, 4)).astype(np.float32)).to(device)
    query = torch.from_numpy(rng.standard_normal((131, 4)).astype(np.float32)).to(device)
    index = gpu.Index(bank, scratch_bytes=1)
    sizes = []

    def step(part, k, distances, indices, squared):
        sizes.append(len(part))
        if len(part) > 40:
            raise torch.OutOfMemoryError("too much")
        every = torch.cdist(part.double(), bank.double())
        distances.copy_(every.amin(1, keepdim=True))
        indices.copy_(every.argmin(1, keepdim=True))

    index._search = step
    with pytest.warns(BackendWarning, match="going on with 64 queries or fewer at a time") as warned:
        distances, indices = index.search(query, 1)
    assert len(warned) == 1
    assert sizes[:3] == [128, 64, 32] and sum(sizes[2:]) == 131
    assert torch.equal(indices[:, 0], torch.cdist(query.double(), bank.double()).argmin(1))
    assert index._part == 32
    assert distances.shape == (131, 1)


def test_parts_of_a_large_search_keep_to_the_scratch_though_fewer_queries_take_more(device, rng, monkeypatch):
    """On compute capability 9.0 a search of many queries has two rows of a group named, each of its parts three."""
    from ttt4as_fast.kernels.knn import gpu

    index = gpu.Index(torch.from_numpy(rng.standard_normal((300, 4)).astype(np.float32)).to(device))
    index._hopper = True
    index.scratch_bytes = 1000 * (8 * index.n_groups + 2 * index.padded + 32)
    sizes = []
    monkeypatch.setattr(index, "_search", lambda part, k, distances, indices, squared: sizes.append(len(part)))
    index._launch(torch.zeros((gpu.HOPPER_UNTIL, 4), device=device), 2)
    named = 4 * 3 * index.n_groups
    assert sum(sizes) == gpu.HOPPER_UNTIL
    assert max(sizes) * (named + 2 * index.padded + 32) <= index.scratch_bytes


@pytest.mark.usefixtures("cuda_source")
def test_three_rows_of_a_group_are_named_where_several_neighbours_are_asked_for(device, rng, monkeypatch):
    from ttt4as_fast.kernels.knn import hopper

    if device.type == "cuda" and not hopper.usable(device):
        pytest.skip("not of compute capability 9.0")
    bank = torch.from_numpy(rng.standard_normal((130, 5)).astype(np.float32)).to(device)
    index = kernels.KnnIndex(bank, backend="gpu")
    index._parts[0]._hopper = True
    monkeypatch.setattr(hopper, "processors", lambda device: 1)
    named, propose = [], hopper.propose
    monkeypatch.setattr(hopper, "propose", lambda *x: named.append(3 - (x[6] is None)) or propose(*x))
    for k in (1, 2):
        compare(*index.search(bank[:2] + 0.1, k), bank[:2] + 0.1, bank)
    assert named == [2, 3]


def test_squares_are_of_no_rounded_root(device, refined_by):
    from ttt4as_fast.kernels.knn import gpu

    bank = torch.tensor([[1, 1], [3, 4], [2, 1], [3e20, 4e20]], device=device).repeat(17, 1)
    index = gpu.Index(bank, scratch_bytes=1 << 20)
    want = torch.tensor([2.0, 5, 25, torch.inf], device=device).repeat_interleave(17)
    for k in (1, 64, len(bank)):  # of more than MAX_K, exhaustively
        distances, _ = index.search(torch.zeros((2, 2), device=device), k, squared=True)
        assert torch.equal(distances, want[:k].expand(2, k))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200], ids=str)  # whose square float64 does not hold
def test_a_query_that_is_not_finite_gets_nothing_and_spares_the_others(device, rng, value):
    from ttt4as_fast.kernels.knn import gpu

    bank = torch.from_numpy(rng.standard_normal((70, 4))).to(device)
    query = bank[:3].clone()
    query[1, 2] = value
    for k in (1, 2, gpu.MAX_K + 1):
        distances, indices = gpu.Index(bank).search(query, k)
        assert indices[:, 0].tolist() == [0, -1, 2]
        assert torch.isnan(distances[1]).all() and not torch.isnan(distances[[0, 2]]).any()
    with pytest.raises(ValueError, match="bank: expected finite"):
        gpu.Index(query)
    index = kernels.KnnIndex(bank[:3], backend="gpu")
    index.add(bank[:1])  # a part of its own
    distances, indices = index.search(query, 4)
    assert len(index._parts) == 2 and indices[0, :2].tolist() == [0, 3]
    assert indices[1].tolist() == [-1] * 4 and torch.isnan(distances[1]).all()


class TestRefining:
    """The kernel that measures, on proposals made here: whatever a bound of any width leaves, and no more than that."""

    @staticmethod
    def proposals(query: torch.Tensor, bank: torch.Tensor, bound: float, slack: float) -> tuple[torch.Tensor, ...]:
        """Facts of queries, the three least of each group: off by up to the bound; the low bits hold the place."""
        squared = torch.cdist(query.double(), bank.double()).square()
        noise = torch.rand(squared.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        place = torch.arange(32)
        row = rows_of(torch.arange(-(-len(bank) // 128) * 4)[:, None], place)
        off = (squared + bound * (1.98 * noise - 0.99)).float()
        padded = torch.nn.functional.pad(off, (0, row.numel() - len(bank)), value=float("inf"))
        packed = (padded[:, row].view(torch.int32) & ~31) | place.int()
        least = packed.sort(2).values[..., :3].unbind(2)
        facts = torch.tensor([1.0, 0.0, bound, 1.0], dtype=torch.float64).repeat(len(query), 1)
        facts[:, 2] += slack * squared.amax(1)  # for the low bits; NaN where the query has one
        return facts, *(x.contiguous() for x in least)

    def refine(self, query, bank, k, by, device, bound=0.0, slack=1e-5, kept=2, norm=0.0) -> tuple[torch.Tensor, ...]:
        from ttt4as_fast.kernels.knn import gpu

        index = gpu.Index.__new__(gpu.Index)
        facts, *least = (x.to(device) for x in self.proposals(query.cpu(), bank.cpu(), bound, slack))
        index.bank, (index.size, index.dim), index.n_groups = bank, bank.shape, least[0].shape[1]
        # By what is known of the rows of a group but the two least, none is too far.
        index.padded, index.norm = 64, torch.zeros(len(bank), device=device) + norm
        low, index.low = (torch.zeros((len(x), 64), dtype=torch.float16, device=device) for x in (query, bank))
        distances = torch.full((len(query), k), -7.0, device=device)
        indices = torch.full((len(query), k), -7, device=device)
        getattr(index, f"_refine_{by}")(query, k, (low, facts, *least[:kept]), distances, indices)
        return distances.cpu(), indices.cpu()

    def check(self, query, bank, k, by, device, **options) -> None:
        compare(*self.refine(query, bank, k, by, device, **options), query, bank)
        if by == "cuda" and k > 1:
            compare(*self.refine(query, bank, k, by, device, kept=3, **options), query, bank)

    @pytest.mark.usefixtures("cuda_source")
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize(
        ("n_bank", "dim", "k"), [(1, 1, 1), (70, 64, 9), (131, 37, 3), (300, 2056, 5), (90, 520, 64), (40, 3, 40)]
    )
    def test_types_and_shapes(self, device, rng, dtype, n_bank, dim, k):
        """Rows of multiples of 16 bytes are read so, others number by number; the query has a type of its own."""
        kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
        kind = getattr(torch, dtype)
        other = kinds[(kinds.index(kind) + n_bank) % 4]
        bank = torch.from_numpy(rng.standard_normal((n_bank, dim)) + 3).to(device, kind)
        query = torch.from_numpy(rng.standard_normal((2, dim)) + 3).to(device, other)
        self.check(query, bank, k, "cuda", device)

    @pytest.mark.usefixtures("cuda_source")
    @pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
    def test_layouts(self, device, rng, kind):
        x = torch.from_numpy(rng.standard_normal((180, 48))).to(device, kind)
        y = torch.from_numpy(rng.standard_normal((8, 180))).to(device, kind)
        for bank in (x[:, 16:32], x[::2, 8:], x[1:, 1:17], x[:, ::3], y.T, x[:1].expand(50, 48)):
            query = torch.from_numpy(rng.standard_normal((bank.shape[1], 2))).to(device, kind).T
            self.check(query, bank, min(3, len(bank)), "cuda", device)

    @pytest.mark.parametrize("k", [1, 7, 64])
    @pytest.mark.parametrize("bound", [0.0, 2.0, 1e6])
    def test_ties(self, device, rng, refined_by, k, bound):
        """Rows of few values, of which a bound leaves some, whole groups, or all."""
        if refined_by == "triton" and (k, bound) != (7, 2.0):
            pytest.skip("one of them is enough of Triton's")
        query = torch.from_numpy(rng.integers(0, 3, (2, 4)).astype(np.float32)).to(device)
        bank = torch.from_numpy(rng.integers(0, 3, (400, 4)).astype(np.float32)).to(device)
        for rows in (bank, bank[:1].repeat(130, 1)):  # whose distances are whole numbers: no bound but the given one
            self.check(query, rows, k, refined_by, device, bound=bound, slack=0.0)

    @pytest.mark.usefixtures("cuda_source")
    def test_more_groups_than_are_looked_at_at_once(self, device, rng):
        """The nearest fill several groups at the start and at the end of the bank."""
        bank = torch.from_numpy(rng.standard_normal((140_000 if device.type == "cuda" else 35_000, 2))).to(device)
        bank[40:100] /= 1e3
        bank[-60:] /= 1e3
        self.check(torch.zeros_like(bank[:2]), bank, 64, "cuda", device, bound=1e-6)

    @pytest.mark.usefixtures("cuda_source")
    def test_two_rows_of_every_group(self, device, rng):
        """More rows are up at once than groups are looked at."""
        n_bank = 512 * 32
        bank = torch.from_numpy(rng.standard_normal((n_bank, 2)) + 100).to(device)
        near = rows_of(torch.arange(512)[:, None], torch.tensor([3, 30])).flatten().to(device)
        bank[near] = torch.from_numpy(rng.standard_normal((len(near), 2))).to(device) / 1e3
        compare(
            *self.refine(torch.zeros_like(bank[:1]), bank, 64, "cuda", device, 1.0, kept=3),
            torch.zeros_like(bank[:1]), bank,
        )  # fmt: skip

    @pytest.mark.usefixtures("cuda_source")
    def test_what_three_of_a_group_exclude_is_each_querys_own(self, device, rng):
        """Two groups with a row each bound the distance; of a third one, far from other queries, three are nearer."""
        bank = torch.from_numpy(rng.standard_normal((640, 2)) / 9).to(device)
        query = torch.tensor([[1e3, 0.0], [0.0, 1e3], [-1e3, 0.0]], dtype=torch.float64, device=device)
        for i, point in enumerate(query):
            near = rows_of(6 * i, torch.arange(5) * 7).to(device)
            bounding = rows_of(6 * i + torch.tensor([2, 4]), torch.tensor(9)).to(device)
            bank[near] += point
            bank[bounding] += point + 5
        self.check(query, bank, 3, "cuda", device, slack=1e-6)

    @pytest.mark.usefixtures("cuda_source")
    def test_subnormal_numbers_and_distances(self, device):
        """float32's least numbers are numbers, though CuPy has arithmetic of float32 take them for 0."""
        bank = (torch.arange(1, 41, dtype=torch.float64) * 3e-44)[:, None].float().to(device)
        query = torch.zeros((1, 1), device=device)
        distances, indices = self.refine(query, bank, 4, "cuda", device, bound=1.0)
        assert indices.tolist() == [[0, 1, 2, 3]] and torch.equal(distances[0], bank[:4, 0].cpu())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_query_that_is_not_finite(self, device, rng, refined_by, bad):
        bank = torch.from_numpy(rng.standard_normal((70, 5)).astype(np.float32)).to(device)
        query = bank[:3].clone()
        query[1, 2] = bad
        distances, indices = self.refine(query, bank, 3, refined_by, device)
        assert indices[:, 0].tolist() == [0, -1, 2] and (indices[1] == -1).all()
        assert torch.isnan(distances[1]).all() and not torch.isnan(distances[[0, 2]]).any()

    @pytest.mark.usefixtures("cuda_source")
    @pytest.mark.parametrize("kept", [2, 3])
    def test_what_is_not_known_of_a_group_is_asked_of_its_float16_copies(self, device, kept):
        """By norms that are told too large no row of a group is near but those that the proposals name: group 0 has
        more near rows than that, and group 1, of rows 2 and 3, has the two that three of a group name.
        """
        bank = torch.arange(64.0, device=device)[:, None].repeat(1, 4)
        bank[rows_of(0, torch.arange(6))] /= 1e3
        query = torch.zeros((1, 4), device=device)
        for norm, second in ((0.0, 1), (1e9, 4 if kept == 2 else 2)):
            norms = torch.full((64,), norm, device=device)
            _, indices = self.refine(query, bank, 2, "cuda", device, kept=kept, norm=norms)
            assert indices.tolist() == [[0, second]]

    @pytest.mark.interpret
    @pytest.mark.parametrize(("threads", "backwards"), [(64, True), (128, False), (128, True)])
    def test_no_result_depends_on_the_order_of_threads(self, rng, monkeypatch, threads, backwards):
        pytest.importorskip("triton", reason="Triton is not installed")
        if emulator.compiler() is None:
            pytest.skip("no C++ compiler to build CUDA sources for the host with")
        from ttt4as_fast.kernels.gpu_common import cuda

        monkeypatch.setitem(cuda.LAUNCHERS, "cpu", emulator.Emulator(threads, backwards))
        query = torch.from_numpy(rng.integers(0, 4, (2, 16)).astype(np.float32))
        bank = torch.from_numpy(rng.integers(0, 4, (300, 16)).astype(np.float32))
        for rows, k, bound in ((bank, 9, 1.0), (bank, 9, 1e6), (bank[:130], 64, 1e6)):
            self.check(query, rows, k, "cuda", torch.device("cpu"), bound=bound)
        if threads == 64:
            many = torch.from_numpy(rng.integers(0, 4, (257, 4)).astype(np.float32))  # whose warps change places
            compare(*self.refine(many, bank[:40, :4], 3, "cuda", torch.device("cpu")), many, bank[:40, :4])


def test_where_cupy_is_not_there_triton_refines(device, rng, monkeypatch):
    from ttt4as_fast.kernels.gpu_common import cuda

    monkeypatch.setattr(cuda, "unavailable", lambda device: "CuPy is not installed")
    monkeypatch.setattr(cuda, "launch", None)
    bank = torch.from_numpy(rng.standard_normal((30, 4)).astype(np.float32))
    check(bank[:2] + 0.1, bank, 2, device)


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize(("dim", "k"), [(64, 9), (1200, 5)])
def test_rows_of_a_group_that_are_near_are_found_by_their_float16_copies(device, rng, dim, k):
    """Each query has its nearest in one group: all but the two least of it are known by their copies alone."""
    bank = 4 * torch.from_numpy(rng.standard_normal((256, dim)).astype(np.float32))
    query = torch.from_numpy(rng.standard_normal((3, dim)).astype(np.float32))
    for i, group in enumerate((0, 3, 6)):
        rows = rows_of(group, torch.from_numpy(rng.permutation(32)[:12]))
        bank[rows] = query[i] + 0.1 * torch.from_numpy(rng.standard_normal((12, dim)).astype(np.float32))
    check(query, bank, k, device)


@pytest.mark.usefixtures("cuda_source")
@pytest.mark.parametrize(("dim", "blocks"), [(64, (0, 1)), (1200, (0, 18, 19, 37))])
def test_float16_copies_are_multiplied_over_all_channels(device, rng, dim, blocks):
    """Each query and its nearest are large in 32 channels alone: without these they would be far from each other."""
    bank = torch.from_numpy(rng.standard_normal((256, dim)).astype(np.float32))
    query = torch.zeros(len(blocks), dim)
    for i, block in enumerate(blocks):
        query[i, 32 * block : 32 * block + 32] = 9
        bank[rows_of(i, torch.arange(6) * 5)] = query[i] + 0.1 * bank[rows_of(i, torch.arange(6) * 5)]
    check(query, bank, 4, device)


@pytest.mark.usefixtures("cuda_source")
def test_a_query_beyond_shared_memory_is_refined_by_triton(device, monkeypatch):
    from ttt4as_fast.kernels.knn import gpu

    bank = torch.eye(3, 1025, device=device)
    index = gpu.Index(bank)
    assert index._fits_cuda()
    monkeypatch.setattr(gpu.cuda, "shared_memory_limit", lambda device: gpu.REFINE_SHARED + 12 * 1535)
    assert not index._fits_cuda()


class TestStreams:
    """Memory that is dropped goes to others at once, but for streams that are known to read it."""

    @pytest.fixture
    def stream(self, monkeypatch):
        """What torch says of the current stream."""
        pytest.importorskip("triton", reason="Triton is not installed")
        found = SimpleNamespace(cuda_stream=0, capturing=False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
        return found

    def test_each_stream_that_reads_an_index_is_recorded_once(self, stream):
        from ttt4as_fast.kernels.knn import gpu

        recorded = []
        kept = SimpleNamespace(is_cuda=True, device=None, record_stream=lambda by: recorded.append(by.cuda_stream))
        index = gpu.Index.__new__(gpu.Index)
        index.bank = index.low = index.norm = index.centre = index.largest = kept
        index.in_graphs, index._streams = False, set()
        for stream.cuda_stream in (0, 7, 0, 7):
            index.record_stream()
        assert recorded == [0] * 5 + [7] * 5 and not index.in_graphs
        stream.cuda_stream, stream.capturing = 9, True  # replays read on any stream, long after
        index.record_stream()
        assert len(recorded) == 10 and index.in_graphs

    def test_whatever_reads_an_index_says_so(self, device, rng, monkeypatch):
        from ttt4as_fast.kernels.knn import gpu

        said = []
        monkeypatch.setattr(gpu.Index, "record_stream", lambda self: said.append(self.size))
        bank = torch.from_numpy(rng.standard_normal((9, 2)).astype(np.float32)).to(device)
        index = kernels.KnnIndex(bank[:4], backend="gpu")
        index.add(bank[4:6])
        index.search(bank[:1])
        assert index.bank.shape == (6, 2)
        index.add(bank[6:])  # joins both parts
        assert said == [4, 2, 4, 2, 4, 2, 2, 4, 9]


def test_the_bound_holds_and_excludes_nearly_all(device, rng):
    """No approximate distance is off by more than the bound, and the bound is small beside the distances."""
    from ttt4as_fast.kernels.knn import gpu

    bank = torch.from_numpy(rng.standard_normal((64, 96)).astype(np.float32) * 5 + 40).to(device)
    query = torch.from_numpy(rng.standard_normal((7, 96)).astype(np.float32) * 5 + 40).to(device)
    index = gpu.Index(bank)
    low, facts = index._prepare(query, index.largest)
    ratio, own, bound, unit = facts.T[:, :, None]
    approximate = index.norm.double() * ratio + own - low.double() @ index.low.double().T
    true = torch.cdist(query.double(), bank.double()) ** 2
    error = (approximate / unit - true).abs()
    assert (error <= bound).all() and error.max() > 0
    # What the kernel proposes: the sums of the tensor cores, and the bits that give way to the place.
    least = torch.empty((7, index.n_groups), dtype=torch.int32, device=device)
    second = torch.empty_like(least)
    index._propose(low, facts, least, second)
    group = torch.arange(index.n_groups, device=device)
    for packed in (least, second):
        place = packed & 31
        row = group // 4 * 128 + place // 2 * 8 + group % 4 * 2 + place % 2
        exists = row < len(bank)
        proposed = (packed & ~31).view(torch.float32).double() / unit
        wrong = (proposed - true.gather(1, row.clamp(max=len(bank) - 1))).abs()
        assert exists.any(1).all() and (wrong <= bound)[exists].all()
    assert (bound < 0.02 * true.amin(1, keepdim=True)).all()
