"""The HTTP service's rows of `integrations`: images one by one against images that were asked for together.

Two servers, each a process of its own with the threads that are pinned here: one takes an image at a time
(``--max-batch 1``), one what waits, up to eight. A client keeps its connection for a round; the answers are checked.
"""

from __future__ import annotations

import http.client
import io
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import gate, measure, peers, workloads

if TYPE_CHECKING:
    from .integrations import Plan

_IMAGES = 8  # different ones, sent in turn
_MAX_BATCH = 8
_SECONDS_TO_STOP = 60


@contextmanager
def server(model: Path, max_batch: int) -> Iterator[int]:
    """``ttt4as serve`` on a free port of this machine, which it yields."""
    command = [sys.executable, "-m", "ttt4as_fast", "serve", str(model), "--no-gate", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max-batch", str(max_batch)], stdout=subprocess.PIPE, text=True, cwd=model.parent
    )
    try:
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line.startswith("serving http://"):
            raise RuntimeError(f"serve: expected its address, got {line!r}")
        yield int(line.rsplit(":", 1)[1])
    finally:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()


class Clients:
    """Some clients of one server, each with a connection of its own."""

    def __init__(self, port: int, number: int) -> None:
        self._pool = ThreadPoolExecutor(number)
        self._connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=120) for _ in range(number)]

    def post(self, bodies: list[bytes]) -> list[bytes]:
        """The answers to `bodies`, which the clients share out; a client sends its next when it has its answer."""
        self._disconnect()  # the server may have ended one that was idle while others had their turn
        number = len(self._connections)
        shares = self._pool.map(self._share, range(number), (bodies[i::number] for i in range(number)))
        answers = [b""] * len(bodies)
        for i, share in enumerate(shares):
            answers[i::number] = share
        return answers

    def _share(self, i: int, bodies: list[bytes]) -> list[bytes]:
        return [_ask(self._connections[i], body) for body in bodies]

    def close(self) -> None:
        """End the connections."""
        self._disconnect()
        self._pool.shutdown()

    def _disconnect(self) -> None:
        """The next request opens a connection anew."""
        for connection in self._connections:
            connection.close()


def _ask(connection: http.client.HTTPConnection, body: bytes) -> bytes:
    connection.request("POST", "/segment", body, {"Content-Type": "image/png", "Accept": "image/png"})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"serve: expected status 200, got {answer.status}: {content[:200]!r}")
    return content


def rows(plan: Plan, folder: Path) -> Iterator[dict[str, Any]]:
    """Micro-batches against images one by one, for one client and for many."""
    from .integrations import row

    model, bodies, masks = _model(plan, folder)
    requests = [bodies[i % len(bodies)] for i in range(plan.requests)]
    with ExitStack() as stack:
        single = stack.enter_context(server(model, 1))
        batched = stack.enter_context(server(model, _MAX_BATCH))

        def clients(port: int, number: int) -> Clients:
            found = Clients(port, number)
            stack.callback(found.close)
            return found

        for number in (1, plan.clients):
            theirs, ours = clients(single, number), clients(batched, number)
            verdict = _check(ours.post(requests), masks)
            who = "one client" if number == 1 else f"{number} clients"
            turns = {"theirs": partial(theirs.post, requests), "ours": partial(ours.post, requests)}
            each = {name: _an_image(one, len(requests)) for name, one in measure.by_turns(turns, plan.seconds).items()}
            yield row(
                "HTTP",
                f"POST /segment, PNG of {plan.side} px: milliseconds an image",
                (f"{who}, batch size 1", f"{who}, micro-batches of up to {_MAX_BATCH}"),
                peers.versions("starlette", "uvicorn"),
                each,
                verdict,
                images_per_second={name: measure.significant(1e3 / one.quantile(50)) for name, one in each.items()},
            )


def _an_image(timing: measure.Timing, number: int) -> measure.Timing:
    return measure.Timing(tuple(tuple(ms / number for ms in one) for one in timing.rounds))


def _model(plan: Plan, folder: Path) -> tuple[Path, list[bytes], list[np.ndarray]]:
    """A fitted model's file, images as PNG, and the masks that this process finds for them."""
    from ttt4as_fast import TTT4AS, PatchCore

    nominal, _ = workloads.images("nominal", plan.training_images, plan.side, plan.seed, plan.data)
    defective, _ = workloads.images("defective", _IMAGES, plan.side, plan.seed, plan.data)
    model = PatchCore(image_size=plan.side, crop_size=plan.side, coreset_ratio=0.05, device="cpu").fit(nominal)
    prediction = model.predict(defective)
    masks = TTT4AS()(prediction.anomaly_map, prediction.features).pred_mask
    path = folder / "model.safetensors"
    model.save(path)
    bodies = []
    for image in defective:
        file = io.BytesIO()
        image.save(file, "PNG")
        bodies.append(file.getvalue())
    return path, bodies, list(masks)


def _check(answers: list[bytes], masks: list[np.ndarray]) -> gate.Verdict:
    """Every answer, against the mask that the package finds without the service."""
    from PIL import Image

    found = np.stack([np.asarray(Image.open(io.BytesIO(answer))) > 0 for answer in answers])
    return gate.check_equal(found, np.stack([masks[i % len(masks)] for i in range(len(answers))]))
