"""anomalib's PatchCore, and the same object accelerated, in one process: coreset, search, and a batch from end to end.

``python -m benchmarks.anomalib_rows [--threads N]`` prints the rows as JSON. The images are crops of a photograph of
bricks, at 224 pixels; EfficientNet-Lite0 makes 28 x 28 patches of 152 channels of each.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np

from .measure import by_turns, ratio

SIDE = 224


def rows(threads: int, n_train: int = 20, batch: int = 4, seconds: float = 5.0) -> list[dict[str, Any]]:
    """One row an operation: milliseconds of both, how many times faster, and by how much the results differ.

    Parameters
    ----------
    threads : int
        Of torch and of the C++ core.
    n_train, batch : int
        Images in the training set, and in the batch that is predicted.
    seconds : float
        Time to spend on each row, more if three rounds take more.

    Returns
    -------
    list of dict
        ``operation``, ``threads``, ``stock`` and ``fast`` (`Timing.summary`), ``speedup`` (`ratio`), ``difference``,
        ``peer``.
    """
    import torch
    from anomalib.models import Patchcore

    from ttt4as_fast import demo, kernels
    from ttt4as_fast.integrations.anomalib import TTT4ASPostProcessor, accelerate, load_installed_weights

    torch.set_num_threads(threads)
    _limit_core(threads)
    network = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2", "blocks.4"], "pre_trained": False}
    stock = load_installed_weights(Patchcore(**network))

    def crops(area: str, n: int) -> Any:
        grey = torch.from_numpy(demo.texture_crops("brick", area, n, 192, 0)).float()
        resized = torch.nn.functional.interpolate(grey[:, None], (SIDE, SIDE), mode="bilinear")
        return ((resized - 127) / 128).expand(-1, 3, -1, -1)

    with torch.no_grad():
        store = [stock.train().model(image[None]) for image in crops("train", n_train)]
        query = torch.cat([stock.model(image[None]) for image in crops("test", batch)])
    stock.eval().model.embedding_store = []
    stock.model.memory_bank = torch.cat(store)[::10].clone()
    models = {"stock": stock.model, "fast": accelerate(copy.deepcopy(stock)).model}
    images = crops("test", batch)
    n, channels = sum(map(len, store)), store[0].shape[1]

    def coreset(model: Any) -> Any:
        model = copy.copy(model)  # keeps the memory bank of the other rows
        model._buffers = dict(model._buffers)
        model.embedding_store = list(store)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - which anomalib's projection draws from
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.subsample_embedding(0.02)
        return model.memory_bank

    operations = {
        f"coreset: 2 % of {n} x {channels}": coreset,
        f"search: {len(query)} queries in {len(stock.model.memory_bank)}": lambda m: m.nearest_neighbors(query, 1)[0],
        f"predict: {batch} images of {SIDE} px": lambda m: m(images).anomaly_map,
    }
    found = []
    for name, function in operations.items():
        with torch.no_grad():
            difference = float((function(models["fast"]) - function(models["stock"])).abs().max())
            times = by_turns({key: lambda m=m, f=function: f(m) for key, m in models.items()}, seconds)
        found.append(
            {
                "operation": name,
                "threads": threads,
                "stock": times["stock"].summary(),
                "fast": times["fast"].summary(),
                "speedup": ratio(times["stock"], times["fast"]),
                "difference": difference,
                "peer": f"anomalib {version('anomalib')}, torch {version('torch')}",
                "backends": {
                    operation: next(key for key, why in usable.items() if why is None)
                    for operation, usable in kernels.backends().items()
                    if operation in ("knn", "coreset")
                },
            }
        )
    plain, masked = (copy.deepcopy(stock) for _ in range(2))
    accelerate(plain), accelerate(masked)
    masked.post_processor = TTT4ASPostProcessor(gate=False)
    masked.post_processor.attach(masked).eval()
    with torch.no_grad():
        times = by_turns({"threshold": lambda: plain(images), "TTT4AS": lambda: masked(images)}, seconds)
    found.append(
        {
            "operation": f"predict with masks: {batch} images, accelerated, by threshold and by TTT4AS",
            "threads": threads,
            **{name: one.summary() for name, one in times.items()},
            "peer": f"anomalib {version('anomalib')}",
        }
    )
    return found


def _limit_core(threads: int) -> None:
    from ttt4as_fast.kernels import _core

    _core.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="to spend on each row")
    options = parser.parse_args()
    try:
        version("anomalib")
    except ImportError:
        print("anomalib is not installed: pip install 'ttt4as_fast[anomalib]'", file=sys.stderr)
        return 2
    json.dump(rows(options.threads, seconds=options.seconds), sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
