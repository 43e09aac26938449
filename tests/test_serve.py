"""The HTTP service, over a real socket: a fitted model in a process of its own, real clients, real signals."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import ttt4as_fast as ttt
from ttt4as_fast.cli import app
from ttt4as_fast.demo import texture_crops

pytest.importorskip("starlette", reason="the service needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="the service needs the extra 'serve'")
pytest.importorskip("prometheus_client", reason="the service needs the extra 'serve'")

SIDE = 64


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    crops = texture_crops("brick", "train", 8, SIDE, 0)
    model = ttt.PatchCore(image_size=SIDE, crop_size=SIDE, coreset_ratio=0.05)
    model.fit([Image.fromarray(crop).convert("RGB") for crop in crops[:6]])
    model.calibrate([Image.fromarray(crop).convert("RGB") for crop in crops[6:]])
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    model.save(path)
    return path


def start(model_file, *options: str) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-m", "ttt4as_fast", "serve", str(model_file), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=model_file.parent)
    line = process.stdout.readline()
    assert line.startswith("serving http://127.0.0.1:"), line
    return process, int(line.rsplit(":", 1)[1])


def stop(process: subprocess.Popen) -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(30)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def port(model_file):
    limits = ("--max-bytes", "300000", "--max-pixels", "200000", "--body-timeout", "2")
    process, number = start(model_file, "--no-gate", *limits)
    yield number
    stop(process)


def request(port: int, method: str, path: str, body: bytes | None = None, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def test_answers_do_not_wait_for_an_acknowledgement(monkeypatch):
    """An answer is two packets; held back by Nagle's algorithm, the second took 40 ms."""
    import asyncio

    import uvicorn

    from ttt4as_fast import serve as module

    delayed = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        async def accept_one() -> None:
            with socket.create_connection(sockets[0].getsockname()):
                accepted, _ = sockets[0].accept()
                transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, accepted)
                with_socket = transport.get_extra_info("socket")
                delayed.append(not with_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        asyncio.run(accept_one())
        server.started = True

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr(module, "create_app", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        module.serve(None, None, None, "127.0.0.1", 0, None, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert delayed == [False]


def png(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB") -> bytes:
    crop = texture_crops("brick", "test", 1, SIDE, seed)[0]
    crop = crop.copy()
    crop[20:36, 24:40] = np.random.default_rng(seed).integers(0, 255, (16, 16, *crop.shape[2:]))
    file = io.BytesIO()
    Image.fromarray(crop).convert(mode).resize(size).save(file, "PNG")
    return file.getvalue()


def expected(model_file, data: bytes) -> np.ndarray:
    model = ttt.PatchCore.load(model_file)
    prediction = model.predict([Image.open(io.BytesIO(data)).convert("RGB")])
    return ttt.TTT4AS()(prediction.anomaly_map, prediction.features).pred_mask[0]


def test_a_mask_comes_back(port, model_file):
    data = png()
    status, body, headers = request(port, "POST", "/segment", data, Content_Type="image/png")
    answer = json.loads(body)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert (answer["width"], answer["height"], answer["status"]) == (SIDE, SIDE, "ok")
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask"]))))
    np.testing.assert_array_equal(mask > 0, expected(model_file, data))
    assert answer["mask_area"] == np.count_nonzero(mask)
    assert sum(region["area"] for region in answer["regions"]) == answer["mask_area"]
    assert set(answer["milliseconds"]) >= {"ttt4as"}


def test_the_threshold_that_is_given_gates_and_labels(model_file):
    process, port = start(model_file, "--image-threshold", "1e9")
    try:
        answer = json.loads(request(port, "POST", "/segment", png(), Content_Type="image/png")[1])
        about = json.loads(request(port, "GET", "/model")[1])
    finally:
        assert stop(process) == 0
    assert (answer["label"], answer["status"], answer["mask_area"]) == ("nominal", "nominal", 0)
    assert about["image_threshold"] == about["method"]["image_threshold"] == 1e9


def test_png_alone_and_other_sizes_and_modes(port):
    for size, mode in (((90, 70), "L"), ((50, 111), "RGBA")):
        status, body, headers = request(port, "POST", "/segment", png(size=size, mode=mode), Accept="image/png")
        assert (status, headers["content-type"]) == (200, "image/png")
        assert Image.open(io.BytesIO(body)).size == size
        assert float(headers["x-score"]) > 0


def test_the_example_client(port, tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    client = Path(__file__).resolve().parents[1] / "examples" / "serve_client.py"
    command = [sys.executable, str(client), "x.png", "--url", f"http://127.0.0.1:{port}", "--mask", "m.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "status ok" in done.stdout
    assert Image.open(tmp_path / "m.png").size == (SIDE, SIDE)


def test_concurrent_clients_get_their_own_masks(port, model_file):
    images = [png(seed) for seed in range(4)]
    want = [request(port, "POST", "/segment", data, Accept="image/png")[1] for data in images]
    with ThreadPoolExecutor(8) as pool:
        got = pool.map(
            lambda i: (i % 4, request(port, "POST", "/segment", images[i % 4], Accept="image/png")), range(32)
        )
        for i, (status, body, _) in got:
            assert status == 200
            assert body == want[i]


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (b"", {}, 400, "got nothing"),
        (b"not an image", {"Content_Type": "image/png"}, 400, "image: expected a file of one of PNG"),
        (png()[:900], {"Content_Type": "image/png"}, 400, "image: cannot be read"),
        (png(), {"Content_Type": "text/html"}, 415, "content-type: expected one of image/png"),
        (b"x" * 300_001, {}, 413, "body: expected at most 300000 bytes"),
        (png(size=(500, 500)), {}, 413, "image: expected at most 200000 pixels, got 500 x 500"),
        (b"GIF89a" + bytes(50), {}, 400, "image: expected a file of one of"),
    ],
    ids=["empty", "text", "truncated", "type", "bytes", "pixels", "gif"],
)
def test_what_is_wrong_is_said(port, body, headers, status, says):
    got, answer, _ = request(port, "POST", "/segment", body, **headers)
    assert got == status
    assert says in json.loads(answer)["error"]
    assert request(port, "GET", "/health")[0] == 200


def test_wrong_paths_and_methods(port):
    for path, status in (("/segment", 405), ("/nothing", 404)):
        got, answer, _ = request(port, "GET", path)
        assert got == status and json.loads(answer)["error"]


def test_chunked_body_beyond_the_limit(port):
    """No Content-Length to refuse by: the limit is met while reading."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/segment", (b"y" * 50_000 for _ in range(8)), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_announced_far_beyond_the_limit_is_not_read(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert b" 413 " in client.recv(4096)


def test_headers_without_an_end_are_refused(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        with contextlib.suppress(ConnectionError):  # it may be refused before all is sent
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000)
        assert b" 400 " in client.recv(4096)


def test_a_slow_body_is_not_waited_for(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        assert b" 408 " in client.recv(4096)


def test_a_client_that_goes_away_harms_nobody(port):
    data = png()
    head = f"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    for part in (data, data[: len(data) // 2]):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(head + part)
    assert request(port, "POST", "/segment", data)[0] == 200


def test_model_and_metrics(port):
    request(port, "POST", "/segment", png())
    status, body, _ = request(port, "GET", "/model")
    model = json.loads(body)
    assert (status, model["backbone"], model["crop_size"]) == (200, "efficientnet_lite0", SIDE)
    assert model["limits"]["max_bytes"] == 300_000
    status, body, headers = request(port, "GET", "/metrics")
    assert headers["content-type"].startswith("text/plain")
    text = body.decode()
    for name in ('ttt4as_requests_total{code="200"}', 'ttt4as_images_total{status="ok"}', "ttt4as_queue_length"):
        assert name in text


def test_a_full_queue_turns_away_at_once(model_file):
    process, port = start(model_file, "--no-gate", "--queue-size", "1", "--max-batch", "1")
    try:
        data = png()
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda _: request(port, "POST", "/segment", data), range(24)))
        codes = [status for status, _, _ in answers]
        assert set(codes) == {200, 503}
        refusal = next(answer for answer in answers if answer[0] == 503)
        assert "waiting already" in json.loads(refusal[1])["error"]
        assert refusal[2]["retry-after"] == "1"
    finally:
        stop(process)


def test_uploads_beyond_the_limit_are_turned_away(model_file):
    process, port = start(model_file, "--no-gate", "--max-uploads", "2")
    data = png()
    head = f"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    try:
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(3)]
            for client in slow[:2]:
                client.sendall(head + data[:100])
            deadline = time.monotonic() + 8  # until both are under way, within the time for a body
            refusal = request(port, "POST", "/segment", data)
            while refusal[0] == 200 and time.monotonic() < deadline:
                refusal = request(port, "POST", "/segment", data)
            assert (refusal[0], refusal[2]["retry-after"]) == (503, "1")
            assert json.loads(refusal[1]) == {"error": "2 uploads are under way already"}
            assert request(port, "GET", "/health")[0] == 200
            slow[0].sendall(data[100:])
            assert slow[0].recv(4096).startswith(b"HTTP/1.1 200 ")
            assert request(port, "POST", "/segment", data)[0] == 200  # a place is free again
            slow[2].sendall(head + data[:100])
        for _ in range(50):  # and those of clients that went away
            if request(port, "POST", "/segment", data)[0] == 200:
                break
        else:
            pytest.fail("places of uploads that were given up are not free")
    finally:
        stop(process)


def test_stopping_finishes_what_is_under_way(model_file):
    process, port = start(model_file, "--no-gate")
    data = png()
    request(port, "POST", "/segment", data)
    codes: list[int] = []

    def client() -> None:
        codes.append(request(port, "POST", "/segment", data)[0])

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while b"ttt4as_requests_total" not in request(port, "GET", "/metrics")[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stop(process) == 0
    for thread in threads:
        thread.join(30)
    assert len(codes) == 6
    assert set(codes) <= {200, 503}
    with pytest.raises(ConnectionRefusedError):
        request(port, "GET", "/health")


def test_what_does_not_end_in_time_is_told_so(model_file):
    process, port = start(model_file, "--drain-seconds", "0")
    try:
        request(port, "GET", "/health")
        with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
            slow.sendall(b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
            time.sleep(0.3)  # until it is under way
            process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: slow.recv(4096), b""))
    finally:
        assert stop(process) == 0
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert answer.endswith(b'{"error":"the service is stopping"}')


def test_an_address_in_use_is_said(model_file, port):
    with warnings.catch_warnings():  # the command replaces warnings.showwarning
        done = CliRunner().invoke(app, ["serve", str(model_file), "--port", str(port)], prog_name="ttt4as")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: host, port: cannot listen on '127.0.0.1', {port} (")
    assert "in use" in done.stderr


def worker(monkeypatch, predict):
    from ttt4as_fast import serve

    monkeypatch.setattr(serve, "predict_batch", predict)
    return serve._Worker(None, None, None, serve.Limits(), serve._Metrics())


def test_a_bad_image_fails_alone(monkeypatch):
    def predict(model, segmenter, images, threshold):
        if "bad" in images:
            raise ValueError("bad")
        return [{"image": image} for image in images]

    first, second, third = worker(monkeypatch, predict)._run(["a", "bad", "c"])
    assert (first, third) == ({"image": "a"}, {"image": "c"}) and isinstance(second, ValueError)


def test_a_model_that_cannot_judge_an_image_serves_none(model_file, monkeypatch, capfd):
    from ttt4as_fast import serve

    def predict(model, segmenter, images, threshold):
        assert images[0].size == (SIDE, SIDE)
        raise RuntimeError("no room on the device")

    monkeypatch.setattr(serve, "predict_batch", predict)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match="the service did not start"):
            serve.serve(ttt.PatchCore.load(model_file), None, 1.0, "127.0.0.1", 0, serve.Limits(), 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "no room on the device" in capfd.readouterr().err


def test_who_has_gone_costs_nothing_and_the_end_is_quiet(monkeypatch):
    seen = []

    def predict(model, segmenter, images, threshold):
        seen.append(list(images))
        return [{} for _ in images]

    async def run():
        one = worker(monkeypatch, predict)
        one.start()
        gone, stays = (asyncio.ensure_future(one.segment(image)) for image in ("gone", "stays"))
        await asyncio.sleep(0)
        gone.cancel()
        await stays
        await one.stop()

    asyncio.run(run())
    assert seen == [["stays"]]


class Client:
    """A client of an application in this process, that can go away at a chosen moment."""

    def __init__(self, app, data: bytes) -> None:
        self.gone, self.status, self.body = asyncio.Event(), 0, b""
        self._data: bytes | None = data
        headers = [(b"content-type", b"image/png")]
        scope = {"type": "http", "method": "POST", "path": "/segment", "headers": headers, "query_string": b""}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict:
        if self._data is None:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        data, self._data = self._data, None
        return {"type": "http.request", "body": data, "more_body": False}

    async def _send(self, message: dict) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")


async def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_images_of_clients_that_went_away_are_not_judged(monkeypatch, model_file):
    from ttt4as_fast import serve

    judge, sizes, free = serve.predict_batch, [], threading.Event()

    def predict(model, segmenter, images, threshold):
        sizes.append(len(images))
        if len(sizes) > 1:  # the first is the blank image
            assert free.wait(30)
        return judge(model, segmenter, images, threshold)

    class Body(bytes):
        def __del__(self) -> None:
            dropped.append(len(self))

    async def read(*arguments) -> Body:
        return Body(await read_body(*arguments))

    read_body, dropped = serve._read_body, []
    monkeypatch.setattr(serve, "predict_batch", predict)
    monkeypatch.setattr(serve, "_read_body", read)
    service = serve.create_app(ttt.PatchCore.load(model_file), ttt.TTT4AS())

    async def run() -> list[int]:
        async with service.router.lifespan_context(service):
            clients = [Client(service, png())]
            try:
                await until(lambda: len(sizes) == 2)
                clients += [Client(service, png()) for _ in range(3)]
                await until(lambda: len(dropped) == 4)  # all wait, with what the model looks at and no file
                for client in clients[1:3]:
                    client.gone.set()
                    await until(client.task.done)
            finally:
                free.set()
            await asyncio.gather(clients[0].task, clients[3].task)
        return [client.status for client in clients]

    assert asyncio.run(run()) == [200, 499, 499, 200]
    assert sizes == [1, 1, 1]


def test_images_that_wait_to_be_decoded_are_in_the_queue(monkeypatch, model_file):
    from ttt4as_fast import serve

    decode, begun, free = serve._decode, [], threading.Event()

    def slow(*arguments):
        begun.append(arguments)
        assert free.wait(30)
        return decode(*arguments)

    monkeypatch.setattr(serve, "PROCESSORS", 1)
    monkeypatch.setattr(serve, "_decode", slow)
    service = serve.create_app(ttt.PatchCore.load(model_file), ttt.TTT4AS(), serve.Limits(queue_size=2))

    async def run() -> list[int]:
        async with service.router.lifespan_context(service):
            clients = [Client(service, png()) for _ in range(5)]
            await until(lambda: begun and sum(client.task.done() for client in clients) == 2)
            free.set()
            await asyncio.gather(*(client.task for client in clients))
        return [client.status for client in clients]

    assert asyncio.run(run()) == [200, 200, 200, 503, 503]


def test_a_failure_is_said_in_json(monkeypatch, model_file):
    from ttt4as_fast import serve

    def predict(model, segmenter, images, threshold):
        raise RuntimeError("no room on the device")

    service = serve.create_app(ttt.PatchCore.load(model_file), ttt.TTT4AS())

    async def run() -> Client:
        async with service.router.lifespan_context(service):
            monkeypatch.setattr(serve, "predict_batch", predict)
            client = Client(service, png())
            with pytest.raises(RuntimeError, match="no room"):  # for the server to log
                await client.task
        return client

    client = asyncio.run(run())
    assert client.status == 500
    assert json.loads(client.body) == {"error": "the service failed at this request"}


@pytest.mark.parametrize(("most", "limit"), [(10, 1000), (5000, 5000)])
def test_pillow_s_own_limit_is_raised_and_never_lowered(monkeypatch, most, limit):
    from ttt4as_fast.serve import Limits, create_app

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    create_app(SimpleNamespace(image_threshold_=None), None, Limits(max_pixels=most))
    assert Image.MAX_IMAGE_PIXELS == limit
