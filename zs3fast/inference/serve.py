"""The service: an image's bytes and class names in, label maps out, over HTTP on Ray Serve.

    POST /segment?classes=... -> limits -> queue of the replica -> batch -> model -> PNG, RLE or JSON

Ray routes requests to replicas, each with a model of its own; a replica's requests for the same classes share the
model's batches. What is no good is a line of JSON, {"error": ...}, with a status of 4xx, and costs no other request.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from zs3fast.inference.limits import ImageTooLarge, Limits
from zs3fast.inference.options import SegmenterOptions
from zs3fast.inference.segmenter import Segmenter
from zs3fast.text.vocabulary import ClassEntry
from zs3fast.types import Segmentation
from zs3fast.utils.console import USER_ERRORS, first_line
from zs3fast.utils.options import one_of

try:
    import ray
    from ray import serve
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response

    from zs3fast.inference.bulk import actor_segmenter, ray_started
    from zs3fast.inference.bulk_files import encode_labels
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("ray", "pyarrow", "fsspec", "pycocotools", "starlette", "fastapi"):
        raise
    raise ImportError(f"serve needs {error.name}: pip install 'zs3fast[ray]'") from None

FORMATS = ("json", "png", "rle")
PARAMETERS = ("classes", "background", "min_score", "format")
_MOST_TEXT = 2**20  # bytes of a JSON request beside its image
APPLICATION = "zs3fast"


@dataclass(frozen=True)
class ServeOptions:
    """How a service runs.

    limits: of one request.
    batch_size: most requests of a batch.  wait: seconds that a batch waits for more requests.
    replicas: models at work at once.  num_gpus, num_cpus: of each, may be fractions.
    queued: requests that wait beyond those at work; more are answered 503.
    timeout: seconds after which a request is given up, with 408.
    drain: seconds that requests under way have when the service ends.
    dtype: what replicas run the model in, see `SegmenterOptions`.
    host, port: where it listens.  address: of a Ray cluster, or "auto"; None: Ray on this machine.
    """

    limits: Limits = field(default_factory=Limits)
    batch_size: int = 8
    wait: float = 0.005
    replicas: int = 1
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    queued: int = 64
    timeout: float = 60.0
    drain: float = 30.0
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "replicas", "queued"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("num_gpus", "num_cpus", "wait", "drain"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        SegmenterOptions(dtype=self.dtype)  # checks it
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout: expected a number of seconds above 0, got {self.timeout}")


class Refused(Exception):
    """A request that is no good: its status and a line."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


@dataclass(frozen=True)
class Ask:
    """A request, checked.  image: uint8 [H, W, 3].  entries: None: the model's own classes."""

    image: np.ndarray
    entries: tuple[ClassEntry, ...] | None
    background: str
    min_score: float | None
    format: str

    @property
    def together(self) -> tuple[Any, ...]:
        """Requests that are alike in this can share a batch."""
        return self.entries, self.background, self.min_score


def read_parameters(query: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Fields of an `Ask` but the image.

    Args:
        query: classes (names with commas between them, or a list, also as JSON, whose items may hold synonyms),
            background (names, or auto), min_score, format.
    Raises:
        ValueError: one line that begins with the parameter's name.
    """
    unknown = sorted(set(query) - set(PARAMETERS))
    if unknown:
        raise ValueError(f"parameter: expected one of {', '.join(PARAMETERS)}, got {unknown[0][:40]!r}")
    given = query.get("classes")
    entries = None
    if given is not None:
        entries = tuple(limits.classes(_names(given)))
    background = query.get("background", "")
    if background not in ("", "auto"):
        limits.classes(background, "background")
        background = background if isinstance(background, str) else ", ".join(background)
    score = query.get("min_score")
    if score is not None:
        try:
            score = float(score)
        except (TypeError, ValueError):
            raise ValueError(f"min_score: expected a number, got {str(score)[:40]!r}") from None
        if not np.isfinite(score):
            raise ValueError(f"min_score: expected a finite number, got {score}")
    wanted = one_of("format", str(query.get("format", "json"))[:40], FORMATS)
    return {"entries": entries, "background": background, "min_score": score, "format": wanted}


def _names(given: Any) -> Any:
    if not isinstance(given, str) or not given.lstrip().startswith("["):
        return given
    try:
        return json.loads(given)
    except ValueError:
        raise ValueError(
            f"classes: expected names with commas between them or a JSON list, got {given[:40]!r}"
        ) from None


def segment_batch(segmenter: Segmenter, asks: list[Ask]) -> list[Segmentation | Exception]:
    """A result or an error for each, in order; those for the same classes go through the model together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for at, ask in enumerate(asks):
        groups.setdefault(ask.together, []).append(at)
    out: list[Segmentation | Exception] = [RuntimeError("no answer")] * len(asks)
    for (entries, background, min_score), places in groups.items():
        names = None if entries is None else list(entries)

        def failed(image: Any, error: Exception, places: list[int] = places) -> None:
            if isinstance(error, torch.AcceleratorError):  # no request's fault: the replica ends, Ray starts another
                raise error
            out[next(at for at in places if asks[at].image is image)] = error

        try:
            many = segmenter.stream(
                [asks[at].image for at in places],
                names,
                background=background,
                min_score=min_score,
                batch_size=len(places) if segmenter.together else 1,
                workers=0,
                failed=failed,
            )
            with closing(many):
                for image, result in many:
                    out[next(at for at in places if asks[at].image is image)] = result
        except torch.AcceleratorError:
            raise
        except USER_ERRORS as error:
            for at in places:
                out[at] = error
    return out


def response(result: Segmentation, kind: str) -> Response:
    """PNG: class indices, see `bulk_files.encode_labels`. JSON: a summary. RLE: the summary and COCO's run lengths."""
    if kind == "png":
        return Response(encode_labels(result.labels, "png", len(result.class_names)), media_type="image/png")
    content = result.to_dict()
    del content["source"]
    if kind == "rle":
        content["rle"] = [
            {"class": run["class"], "size": list(result.labels.shape), "counts": run["counts"].decode("ascii")}
            for run in encode_labels(result.labels, "rle", len(result.class_names))
        ]
    return JSONResponse(content)


class Service:
    """A replica: its model, and the batches it makes of requests.

    Args:
        parts: reference to (model, text tower), which Ray holds once a node.
        classes, how: of its Segmenter.  name: what /health calls the model.
    """

    def __init__(self, parts: Any, classes: Any, how: SegmenterOptions, name: str, options: ServeOptions):
        torch.set_num_threads(max(1, int(options.num_cpus)))
        model, tower = ray.get(parts[0])
        self.segmenter = actor_segmenter(model, tower, classes, how)
        self.name, self.options, self.limits = name, options, options.limits
        self._broken: str | None = None
        self._model = ThreadPoolExecutor(1, thread_name_prefix="zs3fast-model")
        self._files = ThreadPoolExecutor(2, thread_name_prefix="zs3fast-files")  # decoding, encoding
        batches: Any = self._batch  # what Ray's decorator adds is not in its types
        batches.set_max_batch_size(options.batch_size)
        batches.set_batch_wait_timeout_s(options.wait)

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except Refused as refused:
            return _error(refused.status, str(refused))
        except ImageTooLarge as error:
            return _error(413, first_line(error))
        except torch.AcceleratorError as error:
            self._broken = first_line(error)
            return _error(503, self._broken)
        except MemoryError as error:
            return _error(503, first_line(error))
        except (ValueError, TypeError) as error:
            return _error(400, first_line(error))
        except ClientDisconnect:
            return _error(400, "the client went away")

    def check_health(self) -> None:
        """What Ray asks now and then: a GPU that failed once is no good any more, Ray starts another replica."""
        if self._broken is not None:
            raise RuntimeError(self._broken)

    async def _answer(self, request: Request) -> Response:
        path, method = request.url.path, request.method
        if path not in ("/health", "/segment"):
            raise Refused(404, f"{path[:80]}: expected /segment or /health")
        if method != (expected := "GET" if path == "/health" else "POST"):
            raise Refused(405, f"{path}: expected {expected}, got {method}")
        if path == "/health":
            return JSONResponse({"status": "ok", "model": self.name, "limits": vars(self.limits)})
        given: dict[str, Any] = dict(request.query_params)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        wrapped = kind == "application/json"
        data = await self._body(request, self.limits.max_bytes * 4 // 3 + _MOST_TEXT if wrapped else None)
        if wrapped:
            data, given = _unwrapped(data, given)
        parameters = read_parameters(given, self.limits)
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(self._files, self.limits.image, data)
        del data
        ask = Ask(image, **parameters)
        result = await self._batch(ask)
        if isinstance(result[0], Exception):
            raise result[0]
        return await loop.run_in_executor(self._files, response, result[0], ask.format)

    async def _body(self, request: Request, most: int | None) -> bytes:
        """The body, not a byte more than may be; most: of a JSON text, None: of an image."""
        said = request.headers.get("content-length", "")
        if said.isdigit():
            self._check(int(said), most)
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            self._check(size, most)
            parts.append(part)
        return b"".join(parts)

    def _check(self, size: int, most: int | None) -> None:
        if most is None:
            self.limits.check_bytes(size)
        elif size > most:
            raise Refused(413, f"body: expected at most {most:,} bytes, got {size:,}")

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def _batch(self, asks: list[Ask]) -> list[list[Segmentation | Exception]]:
        """Each answer in a list of its own: errors are handed on, not raised for the whole batch."""
        loop = asyncio.get_running_loop()
        answers = await loop.run_in_executor(self._model, segment_batch, self.segmenter, asks)
        return [[answer] for answer in answers]


def _unwrapped(body: bytes, query: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The image and the parameters of a JSON request, {"image": base64, "classes": [...], ...}."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("body: expected JSON, as its content type says") from None
    if not isinstance(given, dict):
        raise ValueError(f"body: expected a JSON object, got {type(given).__name__}")
    if twice := sorted(set(given) & set(query)):
        raise ValueError(f"{twice[0][:40]}: given twice, in the address and in the body")
    image = given.pop("image", None)
    if not isinstance(image, str):
        raise ValueError("image: expected the file's bytes in base64")
    try:
        return base64.b64decode(image, validate=True), {**query, **given}
    except (binascii.Error, ValueError):
        raise ValueError("image: expected the file's bytes in base64") from None


def _error(status: int, line: str) -> Response:
    return JSONResponse({"error": line}, status)


def application(segmenter: Segmenter, name: str, options: ServeOptions) -> serve.Application:
    """What Ray Serve runs, for `serve.run` and Ray's own configuration; Ray is there already.

    Args:
        segmenter: the model, in float32 on the CPU, with the classes of requests that name none; replicas have copies
            of their own, on a GPU where `options` give them one.
    """
    parts = ray.put((segmenter.model, segmenter.text_encoder))
    how = segmenter.options.with_({"device": "cuda" if options.num_gpus else "cpu", "dtype": options.dtype})
    deployment: Any = serve.deployment(
        name="segment",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        max_ongoing_requests=2 * options.batch_size,  # one batch at work, the next one being read
        max_queued_requests=options.queued,
        graceful_shutdown_timeout_s=options.drain,
        graceful_shutdown_wait_loop_s=0.2,
    )(Service)
    bound: serve.Application = deployment.bind([parts], segmenter.classes, how, name, options)
    return bound


@contextmanager
def serving(segmenter: Segmenter, name: str, options: ServeOptions) -> Iterator[str]:
    """The service, within the block; its address. At the end requests under way are answered, `drain` seconds long.

    Raises:
        ValueError: a cluster that does not answer, GPUs that are not there, a port that is taken.
    """
    if options.address is None:
        _check_free(options.host, options.port)
    with ray_started(options.address, options.replicas, options.num_gpus, options.num_cpus):
        quiet = {"log_level": "ERROR", "enable_access_log": False}
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(
            http_options={"host": options.host, "port": options.port, "request_timeout_s": options.timeout},
            logging_config=quiet,
        )
        serve.run(application(segmenter, name, options), name=APPLICATION, route_prefix="/", logging_config=quiet)
        try:
            yield f"http://{options.host}:{options.port}"
        finally:
            serve.delete(APPLICATION)  # waits for requests under way; a cluster's other applications stay


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ValueError(f"port: {host}:{port} cannot be listened on ({os.strerror(error.errno or 0)})") from None
