"""The growing index and the FAISS-style objects: as if everything had been there from the start."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from ttt4as_fast import kernels
from ttt4as_fast.integrations.faiss import FaissNN, IndexFlatL2

BACKENDS = [name for name, reason in kernels.backends()["knn"].items() if reason is None]


@pytest.fixture
def vectors():
    rng = np.random.default_rng(5)
    return rng.standard_normal((500, 17)).astype(np.float32), rng.standard_normal((40, 17)).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(500,), (1, 499), (499, 1), (100,) * 5, (250, 3, 2, 245), (7,) * 71 + (3,)], ids=str)
def test_growing_changes_nothing(vectors, sizes, backend):
    bank, query = vectors
    want = kernels.nearest_neighbors(query, bank, 9, backend=backend)
    index = kernels.KnnIndex(dim=17, backend=backend)
    done = 0
    for size in sizes:
        index.add(bank[done : done + size])
        done += size
        assert index.ntotal == len(index) == done
    got = index.search(query, 9)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_array_equal(index.bank, bank)


def test_channels_that_contradict_the_bank():
    with pytest.raises(ValueError, match="dim: expected 2, the channels of the bank, got 3"):
        kernels.KnnIndex(np.ones((5, 2)), dim=3)


def test_few_parts_however_it_grows(vectors):
    bank, _ = vectors
    index = kernels.KnnIndex(dim=17)
    for row in bank:
        index.add(row[None])
    assert len(index._parts) <= 1 + np.log2(len(bank))


def test_ties_across_parts_take_the_lowest_index():
    index = kernels.KnnIndex(np.array([[5.0], [1.0], [5.0], [6.0], [7.0]]))
    index.add(np.array([[1.0], [5.0]]))
    assert index.search(np.zeros((1, 1)), 4)[1].tolist() == [[1, 5, 0, 2]]


def test_parts_are_merged_by_what_float32_cannot_tell():
    """Squares of 1 and of 1 + 1e-8 are one number in float32."""
    bank = np.array([[1, 1e-4], *[[9, 9]] * 11, [1, 0], [1, 0]], np.float32)
    for kind in (np.asarray, torch.from_numpy):
        index = kernels.KnnIndex(kind(bank[:12]))
        index.add(kind(bank[12:13]))
        assert np.asarray(index.search(kind(np.zeros((1, 2), np.float32)), 1)[1]).tolist() == [[12]]
        index.add(kind(bank[13:]))
        assert len(index._parts) > 1
        _, indices = index.search(kind(np.zeros((70, 2), np.float32)), 3)
        assert np.asarray(indices).tolist() == [[12, 13, 0]] * 70


def test_a_search_is_of_the_vectors_before_an_add(vectors, monkeypatch):
    """Another thread adds while the parts are searched, which merges them."""
    bank, query = vectors
    for kind in (np.asarray, torch.from_numpy):
        index = kernels.KnnIndex(kind(bank[:100]))
        index.add(kind(bank[90:102]))  # some twice: ties, for which the vectors are read again
        want = index.search(kind(query), 5)
        search = index._parts[0].search

        def meanwhile(*arguments, index=index, search=search, kind=kind):
            index.add(kind(bank[102:]))
            return search(*arguments)

        assert len(index._parts) == 2
        monkeypatch.setattr(index._parts[0], "search", meanwhile)
        for got, expected in zip(index.search(kind(query), 5), want, strict=True):
            np.testing.assert_array_equal(got, expected)
        assert len(index._parts) == 1 and index.ntotal == 510


def test_a_bad_add_leaves_the_index_as_it_was(vectors):
    bank, query = vectors
    index = kernels.KnnIndex(bank)
    want = index.search(query, 3)
    for bad, says in (
        (bank[:, :5], "points: expected 17 channels"),
        (np.full((1, 17), np.nan), "points: expected fin"),
    ):
        with pytest.raises(ValueError, match=says):
            index.add(bad)
    np.testing.assert_array_equal(index.search(query, 3)[1], want[1])


def test_empty_index():
    index = kernels.KnnIndex(dim=3)
    with pytest.raises(ValueError, match="index is empty"):
        index.search(np.ones((1, 3)))
    with pytest.raises(ValueError, match="index is empty"):
        _ = index.bank
    with pytest.raises(ValueError, match="bank: expected an array"):
        kernels.KnnIndex()
    assert len(pickle.loads(pickle.dumps(index))) == 0


@pytest.mark.parametrize("mmap", [False, True])
def test_write_and_read(vectors, tmp_path, mmap):
    bank, query = vectors
    index = kernels.KnnIndex(bank[:300])
    index.add(bank[300:])
    index.write(tmp_path / "bank")
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]
    got = kernels.KnnIndex.read(tmp_path / "bank", mmap=mmap)
    np.testing.assert_array_equal(got.search(query, 5)[1], index.search(query, 5)[1])


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:20], lambda b: b"", lambda b: b"junk" + b])
def test_damaged_files_are_refused(vectors, tmp_path, damage):
    path = tmp_path / "bank.npy"
    kernels.KnnIndex(vectors[0]).write(path)
    path.write_bytes(damage(path.read_bytes()))
    for mmap in (False, True):
        with pytest.raises(ValueError, match="path: expected an NPY file") as refused:
            kernels.KnnIndex.read(path, mmap=mmap)
        assert "pickle" not in str(refused.value)  # which NumPy takes any file for, and says how to load it unsafely


def wide(n=900, dim=400):
    """Bank and queries with structure and without, so that every kind of codes is made."""
    rng = np.random.default_rng(8)
    bank = (rng.standard_normal((n, 9)) @ rng.standard_normal((9, dim))).astype(np.float32)
    return bank, np.concatenate([bank[:20] + np.float32(0.1), rng.standard_normal((12, dim)).astype(np.float32)])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="only the C++ core prepares anything to keep")
class TestPreparedFiles:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("mmap", [False, True])
    def test_opened_as_it_was(self, tmp_path, dtype, mmap):
        bank, query = wide()
        index = kernels.KnnIndex(bank.astype(dtype), backend="cpu")
        want = index.search(query, 7)
        index.write(tmp_path / "bank.npy")
        opened = kernels.KnnIndex.read(tmp_path / "bank.npy", mmap=mmap, backend="cpu")
        for got, expected in zip(opened.search(query, 7), want, strict=True):
            np.testing.assert_array_equal(got, expected)
        assert opened._parts[0].nbytes == 0 < index._parts[0].nbytes  # nothing was prepared again
        np.testing.assert_array_equal(np.load(tmp_path / "bank.npy"), bank.astype(dtype))
        opened.add(bank[:3] + np.float32(9))
        assert opened.search(bank[:3] + np.float32(9))[1].ravel().tolist() == [900, 901, 902]

    def test_parts_become_one(self, tmp_path):
        bank, query = wide()
        index = kernels.KnnIndex(bank[:880], backend="cpu")
        index.add(bank[880:])
        assert len(index._parts) == 2
        index.write(tmp_path / "bank")
        opened = kernels.KnnIndex.read(tmp_path / "bank", mmap=True, backend="cpu")
        assert len(opened._parts) == 1
        np.testing.assert_array_equal(opened.search(query, 3)[1], index.search(query, 3)[1])

    def test_plain_files_and_other_backends_are_read(self, tmp_path):
        bank, query = wide()
        want = kernels.nearest_neighbors(query, bank, 3)[1]
        np.save(tmp_path / "old.npy", bank)
        kernels.KnnIndex(bank, backend="cpu").write(tmp_path / "new.npy")
        kernels.KnnIndex(bank, backend="reference").write(tmp_path / "plain.npy")
        assert (tmp_path / "plain.npy").read_bytes() == (tmp_path / "old.npy").read_bytes()
        for name in ("old", "new", "plain"):
            for backend in ("cpu", "reference"):
                opened = kernels.KnnIndex.read(tmp_path / f"{name}.npy", backend=backend)
                np.testing.assert_array_equal(opened.search(query, 3)[1], want)

    @pytest.mark.parametrize("mmap", [False, True])
    def test_what_does_not_fit_is_refused(self, tmp_path, mmap):
        bank, _ = wide()
        path = tmp_path / "bank.npy"
        kernels.KnnIndex(bank, backend="cpu").write(path)
        whole = path.read_bytes()
        begin = whole.index(b"TTT4ASKN")
        newer = whole[: begin + 8] + (3).to_bytes(4, "little") + whole[begin + 12 :]
        other = whole[:128] + (bank + np.float32(1)).tobytes() + whole[begin - 64 :]
        early = bytearray(whole)
        early[begin + 5000] ^= 1
        for bad, says in (
            (whole[:-64], "cut short or has grown"),
            (whole + bytes(64), "cut short or has grown"),
            (whole[: begin + 30], "at least 64 bytes"),
            (whole[:begin], "other bytes behind the vectors"),
            (whole[: begin - 30], "other bytes behind the vectors"),
            (whole[:begin] + b"x" * 200, "other bytes"),
            (newer, "version 2 of the format, got version 3"),
            (other, "another's" if mmap else "vectors have changed"),
            (whole[: begin - 64] + b"x" * 64 + whole[begin:], "other bytes behind the vectors"),
            (bytes(early), "its checksum differs"),
        ):
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=r"path: expected an NPY file.*" + says):
                kernels.KnnIndex.read(path, mmap=mmap, backend="cpu")
        turned = bytearray(whole)
        turned[128 + 7 * bank.itemsize] ^= 1  # one bit of one vector
        path.write_bytes(turned)
        with pytest.raises(ValueError, match="vectors have changed"):
            kernels.KnnIndex.read(path, backend="cpu")
        late = bytearray(whole)
        late[-100] ^= 1
        path.write_bytes(late)
        with pytest.raises(ValueError, match="its checksum differs"):
            kernels.KnnIndex.read(path, backend="cpu")


def test_pickle(vectors):
    bank, query = vectors
    index = pickle.loads(pickle.dumps(kernels.KnnIndex(torch.from_numpy(bank))))
    np.testing.assert_array_equal(
        index.search(torch.from_numpy(query), 4)[1], kernels.nearest_neighbors(query, bank, 4)[1]
    )


def test_flat_index_answers_as_faiss(vectors):
    faiss = pytest.importorskip("faiss", reason="faiss is not installed; its order of returns is checked below")
    bank, query = vectors
    theirs = faiss.IndexFlatL2(17)
    theirs.add(bank)
    ours = IndexFlatL2(17)
    ours.add(bank)
    for k in (1, 9, 600):
        got, want = ours.search(query, k), theirs.search(query, k)
        np.testing.assert_array_equal(got[1], want[1])
        found = want[1] >= 0
        np.testing.assert_allclose(got[0][found], want[0][found], rtol=1e-4)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_what_was_added_is_the_callers_no_more(kind):
    """A block read into the same memory again and again, as with FAISS."""
    index, buffer = IndexFlatL2(2), np.empty((4, 2), np.float32)
    for start in range(0, 12, 4):
        buffer[:] = np.arange(start, start + 4)[:, None]
        index.add(kind(buffer))
    buffer[:] = -1
    distances, indices = index.search(kind(np.repeat(np.arange(12, dtype=np.float32)[:, None], 2, 1)), 1)
    assert np.asarray(distances).max() == 0 and np.asarray(indices).ravel().tolist() == list(range(12))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
@pytest.mark.parametrize("whose", ["ours", "faiss"])
def test_a_copy_is_an_index_of_its_own(vectors, duplicate, whose):
    bank, query = vectors
    make = IndexFlatL2 if whose == "ours" else pytest.importorskip("faiss", reason="faiss is not installed").IndexFlatL2
    index = make(17)
    index.add(bank[:300])
    other = duplicate(index)
    other.add(bank[300:])
    index.add(bank[:5])
    assert (index.d, index.ntotal, other.d, other.ntotal) == (17, 305, 17, 500)
    np.testing.assert_array_equal(other.search(query, 3)[1], kernels.nearest_neighbors(query, bank, 3)[1])
    index.reset()
    assert other.ntotal == 500


def test_flat_index_calls(vectors, tmp_path):
    bank, query = vectors
    index = IndexFlatL2(17)
    assert (index.d, index.ntotal, index.is_trained) == (17, 0, True)
    distances, indices = index.search(query, 2)
    assert np.isinf(distances).all()
    assert (indices == -1).all()
    index.train(bank)
    index.add(bank[:3])
    distances, indices = index.search(query, 5)
    assert (indices[:, 3:] == -1).all()
    assert np.isinf(distances[:, 3:]).all()
    exact = ((query[:, None].astype(np.float64) - bank[:3]) ** 2).sum(2)
    np.testing.assert_allclose(distances[:, :3], np.sort(exact, 1), rtol=6.1e-8)  # half a unit of float32
    index.write(tmp_path / "i")
    np.testing.assert_array_equal(IndexFlatL2.read(tmp_path / "i").search(query, 3)[1], indices[:, :3])
    index.reset()
    assert index.ntotal == 0
    with pytest.raises(TypeError, match="k: expected"):
        index.search(query, 1.5)


@pytest.mark.parametrize("n", [0, 3, 9])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_a_bad_query_is_refused_however_many_vectors_there_are(n, kind):
    index = IndexFlatL2(4)
    if n:
        index.add(np.ones((n, 4), np.float32))
    for query, says in (
        (np.ones((1, 3), np.float32), r"expected 4 channels .*got shape \(1, 3\)"),
        (np.full((1, 4), np.nan, np.float32), "expected finite values, got nan"),
        (np.ones(4, np.float32), "expected 2 dimensions"),
        (np.ones((0, 4), np.float32), "expected no empty axis"),
    ):
        with pytest.raises(ValueError, match=says):
            index.search(kind(query), 5)


def test_errors_name_the_arguments_of_faiss(tmp_path):
    bank, narrow = np.ones((4, 3), np.float32), np.ones((1, 2), np.float32)
    index, nn = IndexFlatL2(3), FaissNN()
    index.add(bank)
    nn.fit(bank)
    (tmp_path / "junk").write_bytes(b"junk")
    for says, call in (
        ("d: expected an integer", lambda: IndexFlatL2(0)),
        ("x: expected 3 channels", lambda: index.add(narrow)),
        ("x: expected 3 channels", lambda: index.search(narrow, 1)),
        ("k: expected an integer", lambda: index.search(bank, 0)),
        ("path: expected an NPY file", lambda: IndexFlatL2.read(tmp_path / "junk")),
        ("features: expected finite values", lambda: nn.fit(bank * np.nan)),
        ("features: expected 2 dimensions", lambda: nn.fit(1.0)),
        ("features: expected 2 dimensions", lambda: nn.fit([1.0, 2.0])),
        ("query_features: expected 3 channels", lambda: nn.run(1, narrow)),
        ("n_nearest_neighbours: expected an integer", lambda: nn.run(0, bank)),
        ("index_features: expected finite values", lambda: nn.run(1, bank, bank * np.nan)),
        ("query_features: expected 2 channels", lambda: nn.run(1, bank, narrow)),
        ("filename: expected an NPY file", lambda: nn.load(tmp_path / "junk")),
    ):
        with pytest.raises(ValueError, match="^" + says):
            call()
    with pytest.raises(TypeError, match=r"^x: expected dtype"):
        index.add(bank.astype(complex))
    distances, indices = nn.run(4, bank)  # features that were refused have not replaced those before
    assert not distances.any() and sorted(indices[0]) == [0, 1, 2, 3]


def test_squares_beyond_float32_are_infinite(recwarn):
    index = IndexFlatL2(2)
    index.add(np.array([[0, 0], [3e25, 4e25]], np.float32))
    distances, indices = index.search(np.zeros((1, 2), np.float32), 2)
    assert distances.tolist() == [[0, np.inf]] and indices.tolist() == [[0, 1]]
    assert not recwarn.list


def test_patchcores_object(vectors, tmp_path):
    bank, query = vectors
    nn = FaissNN(on_gpu=False, num_workers=2)
    with pytest.raises(ValueError, match="nothing was fitted"):
        nn.run(1, query)
    with pytest.raises(ValueError, match=r"^filename: nothing was fitted"):
        nn.save(tmp_path / "nn.faiss")
    nn.fit(bank)
    distances, indices = nn.run(3, query)
    want = kernels.nearest_neighbors(query, bank, 3)
    np.testing.assert_array_equal(indices, want[1])
    np.testing.assert_allclose(distances, want[0] ** 2, rtol=1e-5)
    nn.save(tmp_path / "nn.faiss")
    other = FaissNN()
    other.load(tmp_path / "nn.faiss")
    np.testing.assert_array_equal(other.run(3, query)[1], indices)
    np.testing.assert_array_equal(other.run(1, query, bank[:50])[1], kernels.nearest_neighbors(query, bank[:50])[1])
    other.reset_index()
    with pytest.raises(ValueError, match="nothing was fitted"):
        other.run(1, query)
