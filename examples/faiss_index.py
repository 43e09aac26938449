"""Code written for FAISS with one line changed: an exact flat index that grows, is saved, and is read back mapped.

python examples/faiss_index.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from ttt4as_fast.integrations.faiss import IndexFlatL2  # instead of: from faiss import IndexFlatL2


def main() -> None:
    """Add in parts, search, save, read, compare with FAISS where it is installed."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((24, 96)).astype(np.float32)
    bank = rng.standard_normal((5000, 24)).astype(np.float32) @ mixing
    query = rng.standard_normal((200, 24)).astype(np.float32) @ mixing

    index = IndexFlatL2(96)
    for part in np.array_split(bank, 10):  # nominal images arrive one after another
        index.add(part)
    distances, indices = index.search(query, 5)
    print(f"{index.ntotal} vectors; first query: squared distances {np.round(distances[0], 1)}, rows {indices[0]}")

    with tempfile.TemporaryDirectory() as folder:
        index.write(Path(folder) / "bank.npy")
        mapped = IndexFlatL2.read(Path(folder) / "bank.npy", mmap=True)
        print("read back, the same neighbours:", bool((mapped.search(query, 5)[1] == indices).all()))
        del mapped

    try:
        import faiss
    except ModuleNotFoundError:
        print("faiss is not installed; nothing to compare with")
        return
    original = faiss.IndexFlatL2(96)
    original.add(bank)
    print("FAISS finds the same neighbours:", bool((original.search(query, 5)[1] == indices).all()))


if __name__ == "__main__":
    main()
