"""An HTTP service around a fitted model: images in, masks out, in micro-batches from a bounded queue.

`create_app` makes an ASGI application (Starlette) that any ASGI server runs; ``ttt4as serve`` runs it on uvicorn. One
thread owns the model; requests wait in a queue of fixed length, and what finds it full is turned away at once (503)
instead of waiting longer than a camera's cycle. A batch is whatever waits when the model is free, so an idle service
adds no delay, and the mask of an image does not depend on what it was batched with.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import __version__
from .images import ImageError, read_image
from .kernels.arrays import check_float, check_int
from .results import mask_image, mask_summary
from .runs import predict_batch

if TYPE_CHECKING:
    from .patchcore import PatchCore
    from .segmenter import TTT4AS

__all__ = ["Limits", "create_app"]

PROCESSORS = os.cpu_count() or 1
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
CONTENT_TYPES = (*(f"image/{name.lower()}" for name in FORMATS), "application/octet-stream")


@dataclass(frozen=True)
class Limits:
    """What the service accepts, and how long it waits.

    Parameters
    ----------
    max_bytes : int
        Of a request's body, default 32 MiB; more is refused (413), not kept, and read no further than twice that.
    max_pixels : int
        Of an image, default 50 million; more is refused (413) without being decoded. No more images than there are
        processors are whole in memory at a time; what waits is as small as what the model looks at.
    queue_size : int
        Images that may wait, to be decoded or for the model, default 64; what comes beyond is turned away (503).
    max_batch : int
        Images the model takes at once, default 8.
    body_timeout : float
        Seconds in which a body must have arrived, default 10; else 408.
    max_uploads : int
        Bodies that may be arriving, default 64, so that no more than `max_uploads` times `max_bytes` are held of them;
        what comes beyond is read, not kept, and turned away (503).
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    queue_size: int = 64
    max_batch: int = 8
    body_timeout: float = 10.0
    max_uploads: int = 64

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "queue_size", "max_batch", "max_uploads"):
            check_int(getattr(self, name), name, 1)
        check_float(self.body_timeout, "body_timeout", 0.0, open_low=True)


class _Refusal(Exception):
    """A request that gets an error instead of a mask."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


@dataclass
class _Job:
    """One image on its way through the queue, resized as the model has it."""

    image: Image.Image
    done: asyncio.Future[dict[str, Any]]
    arrived: float


class _Metrics:
    """What Prometheus reads. A registry of its own, so that several applications may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry, "namespace": "ttt4as"}
        self.requests = Counter("requests", "Requests for a mask, by the status of the answer.", ["code"], **options)
        self.images = Counter("images", "Images segmented, by their status.", ["status"], **options)
        self.waiting = Gauge("queue_length", "Images waiting.", **options)
        buckets = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
        self.seconds = Histogram("request_seconds", "From the decoded image to its mask.", buckets=buckets, **options)
        self.batch = Histogram("batch_size", "Images the model took at once.", buckets=(1, 2, 4, 8, 16, 32), **options)


class _Worker:
    """The one thread that owns the model, and the queue before it."""

    def __init__(
        self, model: PatchCore, segmenter: TTT4AS, label_threshold: float | None, limits: Limits, metrics: _Metrics
    ) -> None:
        self._model, self._segmenter, self._label_threshold = model, segmenter, label_threshold
        self._limits, self._metrics = limits, metrics
        # What is being decoded when the queue is full still comes; and one place for the end.
        self._queue: asyncio.Queue[_Job | None] = asyncio.Queue(limits.queue_size + PROCESSORS + 1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ttt4as")
        self._task: asyncio.Task[None] | None = None
        self.stopping = False
        self._decoding = 0  # images that a processor has, or that wait for one
        metrics.waiting.set_function(lambda: self._waiting)

    async def warm_up(self) -> None:
        """Load and compile what images need; on a GPU capture the CUDA graphs of the smallest and the largest batch."""
        model, most = self._model, self._limits.max_batch
        blank = Image.new("RGB", (model.image_size, model.image_size))
        for size in (1, 1, most, most) if model.device.type == "cuda" else (1,):
            await asyncio.get_running_loop().run_in_executor(self._thread, self._judge, [blank] * size)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._serve())

    @property
    def alive(self) -> bool:
        """Whether images put into the queue will be taken out of it."""
        return self._task is not None and not self._task.done() and not self.stopping

    @property
    def _waiting(self) -> int:
        return self._queue.qsize() + max(self._decoding - PROCESSORS, 0)

    async def stop(self) -> None:
        """Take nothing more, finish what waits."""
        self.stopping = True
        await self._queue.put(None)
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Around the decoding of an image, which is turned away before it where it would wait beyond the limit."""
        self._check_alive()
        if self._waiting >= self._limits.queue_size:
            raise _Refusal(503, f"{self._limits.queue_size} images are waiting already", **{"Retry-After": "1"})
        self._decoding += 1
        try:
            yield
        finally:
            self._decoding -= 1

    def _check_alive(self) -> None:
        if not self.alive:
            raise _Refusal(503, "the service is stopping")

    async def segment(self, image: Image.Image) -> dict[str, Any]:
        """The outcome for one image, when its turn comes."""
        self._check_alive()
        job = _Job(image, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._queue.put_nowait(job)
        return await job.done

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        ended = False
        while not ended:
            jobs = [await self._queue.get()]
            while len(jobs) < self._limits.max_batch and not self._queue.empty():
                jobs.append(self._queue.get_nowait())
            ended = None in jobs
            # Where a client went away, its future is cancelled: its image costs nothing more.
            batch = [job for job in jobs if job is not None and not job.done.done()]
            if batch:
                self._metrics.batch.observe(len(batch))
                outcomes = await loop.run_in_executor(self._thread, self._run, [job.image for job in batch])
                for job, outcome in zip(batch, outcomes, strict=True):
                    self._metrics.seconds.observe(time.perf_counter() - job.arrived)
                    if not job.done.done():
                        if isinstance(outcome, Exception):
                            job.done.set_exception(outcome)
                        else:
                            job.done.set_result(outcome)

    def _run(self, images: list[Image.Image]) -> list[dict[str, Any] | Exception]:
        """Outcomes of a batch. Where it fails, its images are tried alone, so that one cannot fail the others."""
        try:
            return self._judge(images)
        except Exception as error:
            if len(images) == 1:
                return [error]
            return [outcome for image in images for outcome in self._run([image])]

    def _judge(self, images: list[Image.Image]) -> list[dict[str, Any] | Exception]:
        return list(predict_batch(self._model, self._segmenter, images, self._label_threshold))


def create_app(
    model: PatchCore, segmenter: TTT4AS, limits: Limits | None = None, label_threshold: float | None = None
) -> Starlette:
    """An ASGI application that segments images with a fitted model, once it has tried it on a blank one.

    ======  =============  ==========================================================================================
    method  path           answer
    ======  =============  ==========================================================================================
    POST    ``/segment``   body: an image file. JSON: score, label, status, mask area, regions, milliseconds and the
                           mask as base64 PNG in the image's own size; with ``Accept: image/png`` the PNG alone
    GET     ``/health``    200 while images are taken, 503 once it stops
    GET     ``/model``     what the model is: backbone, sizes, thresholds, options of the method
    GET     ``/metrics``   Prometheus text
    ======  =============  ==========================================================================================

    Parameters
    ----------
    model : PatchCore
        Fitted.
    segmenter : TTT4AS
        The method; its ``image_threshold`` gates.
    limits : Limits, optional
    label_threshold : float, optional
        Image score from which an image is labelled ``"defective"``; the model's, where calibrated, unless given.

    Returns
    -------
    starlette.applications.Starlette
        Errors are JSON ``{"error": reason}``: 400 no readable image, 408 body too slow, 413 too large, 415 not an image
        type, 500 the model failed at the image (the server logs why), 503 too many uploads or queue full
        (``Retry-After``) or stopping.
    """
    limits = limits or Limits()
    metrics = _Metrics()
    threshold = model.image_threshold_ if label_threshold is None else label_threshold
    worker = _Worker(model, segmenter, threshold, limits, metrics)
    uploads = asyncio.Semaphore(limits.max_uploads)
    helpers = ThreadPoolExecutor(PROCESSORS, thread_name_prefix="ttt4as-image")
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, for the process: ours may be higher
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limits.max_pixels)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await worker.warm_up()
        worker.start()
        try:
            yield
        finally:
            await worker.stop()
            helpers.shutdown()

    async def aside(function: Callable[..., Any], *arguments: Any) -> Any:
        """What takes longer with every pixel, beside the loop that keeps all connections."""
        return await asyncio.get_running_loop().run_in_executor(helpers, function, *arguments)

    async def respond(data: bytes, accept: str) -> Response:
        with worker.decoding():
            square, size = await aside(_decode, data, limits, model)
        del data  # what waits is the square alone
        outcome = await worker.segment(square)
        metrics.images.labels(outcome["status"]).inc()
        return await aside(_answer, accept, size, outcome, model)

    async def segment(request: Request) -> Response:
        try:
            accept = request.headers.get("accept", "")
            response = await _unless_gone(request, respond(await _read_body(request, limits, uploads), accept))
        except _Refusal as refusal:
            response = JSONResponse({"error": refusal.reason}, refusal.status, headers=refusal.headers)
        except asyncio.CancelledError:  # the server's time for requests under way is over; it takes one more answer
            response = JSONResponse({"error": "the service is stopping"}, 503, headers={"Connection": "close"})
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; the count does
        except Exception:
            metrics.requests.labels("500").inc()
            raise
        metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok" if worker.alive else "stopping"}, 200 if worker.alive else 503)

    async def describe(request: Request) -> Response:
        return JSONResponse(
            {
                "version": __version__,
                "backbone": model.backbone,
                "image_size": model.image_size,
                "crop_size": model.crop_size,
                "memory_bank": list(model.memory_bank_.shape),
                "image_threshold": threshold,
                "method": segmenter.get_params(),
                "limits": vars(limits),
                "content_types": CONTENT_TYPES,
            }
        )

    async def scrape(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    routes = [
        Route("/segment", segment, methods=["POST"]),
        Route("/health", health),
        Route("/model", describe),
        Route("/metrics", scrape),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _refused, Exception: _failed})


def _refused(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the service failed at this request"}, 500)


async def _read_body(request: Request, limits: Limits, uploads: asyncio.Semaphore) -> bytes:
    """The body, if it is of a type and size that is taken, arrives in time and has one of the places of `uploads`."""
    kind = request.headers.get("content-type", "application/octet-stream").split(";")[0].strip().lower()
    if kind not in CONTENT_TYPES:
        raise _Refusal(415, f"content-type: expected one of {', '.join(CONTENT_TYPES)}, got {kind!r}")
    too_large = _Refusal(413, f"body: expected at most {limits.max_bytes} bytes", Connection="close")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > 2 * limits.max_bytes:
        raise too_large

    async def collect(most: int) -> bytes:
        # Up to twice the limit what is sent is taken, and dropped: most clients read their answer only after that.
        data, received = bytearray(), 0
        async for chunk in request.stream():
            received += len(chunk)
            if received <= most:
                data += chunk
            elif received > 2 * limits.max_bytes:
                break
        if received > limits.max_bytes:
            raise too_large
        return bytes(data)

    full = uploads.locked()
    try:
        async with contextlib.nullcontext() if full else uploads:
            data = await asyncio.wait_for(collect(0 if full else limits.max_bytes), limits.body_timeout)
    except asyncio.TimeoutError:
        reason = f"body: not complete within {limits.body_timeout:g} s"
        raise _Refusal(408, reason, Connection="close") from None
    if full:
        raise _Refusal(503, f"{limits.max_uploads} uploads are under way already", **{"Retry-After": "1"})
    if not data:
        raise _Refusal(400, "body: expected an image file, got nothing")
    return data


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What `work` returns, which is cancelled where the client goes away; after the body has been read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


def _decode(data: bytes, limits: Limits, model: PatchCore) -> tuple[Image.Image, tuple[int, int]]:
    """The image of a body, resized as the model has it, and its height and width, which are read before its pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        raise _Refusal(413, f"image: expected at most {limits.max_pixels} pixels") from None
    except Exception:
        raise _Refusal(400, f"image: expected a file of one of {', '.join(FORMATS)}, got something else") from None
    if width * height > limits.max_pixels:
        raise _Refusal(413, f"image: expected at most {limits.max_pixels} pixels, got {width} x {height}")
    try:
        image = read_image(io.BytesIO(data))
    except ImageError as error:
        raise _Refusal(400, f"image: {error.reason}") from None
    return model.preprocessing.square(image), (image.height, image.width)


def _answer(accept: str, size: tuple[int, int], outcome: dict[str, Any], model: PatchCore) -> Response:
    """JSON, or the mask alone where PNG is the first that the client accepts."""
    mask = model.inverse_transform_mask(outcome["pred_mask"], size)
    anomaly_map = model.inverse_transform_map(outcome["anomaly_map"], size)
    file = io.BytesIO()
    mask_image(mask).save(file, format="PNG")
    png = file.getvalue()
    if accept.startswith("image/png"):
        return Response(png, media_type="image/png", headers={"X-Score": f"{outcome['score']:.9g}"})
    fields = ("score", "label", "status", "milliseconds")
    return JSONResponse(
        {
            "width": size[1],
            "height": size[0],
            **{name: outcome[name] for name in fields},
            **mask_summary(mask, anomaly_map),
            "mask": base64.b64encode(png).decode("ascii"),
        }
    )


def serve(
    model: PatchCore,
    segmenter: TTT4AS,
    label_threshold: float | None,
    host: str,
    port: int,
    limits: Limits,
    drain_seconds: int,
) -> None:
    """Run the application on uvicorn until SIGINT or SIGTERM, then finish the requests under way.

    Parameters
    ----------
    model, segmenter, label_threshold, limits
        As in `create_app`.
    host : str
        Address to listen on.
    port : int
        0 takes a free one; the address is printed on standard output as ``serving http://HOST:PORT``.
    drain_seconds : int
        How long requests under way may still take after the signal.

    Raises
    ------
    OSError
        The address cannot be listened on.
    RuntimeError
        The model fails at a blank image.
    """
    import signal
    import socket

    import uvicorn

    # Bound here, so that an address in use is an OSError and a free port is known before the first request.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's delay off only where it is, and connections inherit it.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(f"host, port: cannot listen on {host!r}, {port} ({error.strerror})") from error
        listener.listen(1024)  # who connects before the server runs waits for it
        config = uvicorn.Config(
            create_app(model, segmenter, limits, label_threshold),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=drain_seconds,
            http="h11",  # the one that knows the next limit
            h11_max_incomplete_event_size=2**16,
        )
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        print(f"serving http://{shown}:{listener.getsockname()[1]}", flush=True)
        # uvicorn raises the signal again once it has stopped; that it came is then no news, and no failure.
        signal.signal(signal.SIGTERM, lambda *_: None)
        server = uvicorn.Server(config)
        with contextlib.suppress(SystemExit):  # by which newer versions of uvicorn leave where the start fails
            server.run(sockets=[listener])
        if not server.started:  # uvicorn has logged why
            raise RuntimeError("the service did not start")
