"""The service: right answers whoever else asks, a line for what is no good, an end that loses nobody."""

from __future__ import annotations

import base64
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import psutil
import pytest
from PIL import Image

from zs3fast.inference.segmenter import Segmenter

pytest.importorskip("ray.serve", reason="the extra [ray] is absent")
pytest.importorskip("pycocotools", reason="the extra [ray] is absent")

from zs3fast.inference.bulk_files import decode_labels  # noqa: E402
from zs3fast.inference.limits import Limits  # noqa: E402
from zs3fast.inference.serve import Ask, ServeOptions, read_parameters, segment_batch, serving  # noqa: E402

CLASSES = "red sand, star, grass"
LISTS = (None, "star, ring", "red bricks, yellow wood, blue sky, star")
LIMITS = Limits(max_bytes=200_000, max_pixels=60_000, max_classes=20, max_name=40)


def picture(seed: int, height: int = 40, width: int = 56) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def flat(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


FLAT = flat(400, 600)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as open_:
        return int(open_.getsockname()[1])


def ask(
    address: str, body: bytes, query: dict[str, Any] | None = None, path: str = "/segment", **headers: str
) -> tuple[int, bytes]:
    """Status and body of a POST; GET where there is no body."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    try:
        target = path + (f"?{urlencode(query)}" if query else "")
        connection.request("POST" if body else "GET", target, body or None, headers)
        got = connection.getresponse()
        return got.status, got.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained("zs3fast-tiny", class_names=CLASSES, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def service(segmenter: Segmenter) -> Iterator[str]:
    options = ServeOptions(limits=LIMITS, port=free_port(), dtype="float32", wait=0.02)
    with serving(segmenter, "tiny", options) as address:
        yield address


def test_parameters() -> None:
    assert read_parameters({}, LIMITS) == {
        "entries": None,
        "background": "",
        "min_score": None,
        "format": "json",
    }
    text = read_parameters({"classes": "sofa, cat", "min_score": "0.25", "background": "auto"}, LIMITS)
    assert text["entries"] == (("sofa",), ("cat",)) and text["min_score"] == 0.25 and text["background"] == "auto"
    assert read_parameters({"classes": '["sofa, couch", "cat"]'}, LIMITS)["entries"] == (("sofa", "couch"), ("cat",))
    assert read_parameters({"classes": ["sofa, couch"]}, LIMITS)["entries"] == (("sofa", "couch"),)


def test_a_batch_holds_what_is_alike_and_an_image_that_fails_fails_alone(segmenter: Segmenter) -> None:
    def one(seed: int, names: str | None, size: tuple[int, int] = (40, 56)) -> Ask:
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
        return Ask(image=pixels, **read_parameters({} if names is None else {"classes": names}, LIMITS))

    strip = one(7, LISTS[1], (1, 5000))  # more windows than a request may have
    asks = [one(seed, LISTS[seed % 3]) for seed in range(6)]
    answers = segment_batch(segmenter, [*asks, strip])
    assert isinstance(answers[6], ValueError)
    for given, answer in zip(asks, answers, strict=False):
        assert not isinstance(answer, Exception)
        names = None if given.entries is None else list(given.entries)
        expected = segmenter(given.image, names)
        assert answer.class_names == expected.class_names and (answer.labels == expected.labels).mean() > 0.999


@pytest.mark.parametrize("query", [{}, {"classes": "star, ring"}, {"classes": "star", "background": "auto"}])
def test_it_says_what_the_segmenter_says(service: str, segmenter: Segmenter, query: dict[str, str]) -> None:
    data = picture(1)
    expected = segmenter(data, query.get("classes"), background=query.get("background", ""))
    status, body = ask(service, data, query)
    assert status == 200
    summary, own = json.loads(body), expected.to_dict()
    assert [(c["name"], c["pixels"]) for c in summary["classes"]] == [(c["name"], c["pixels"]) for c in own["classes"]]
    status, body = ask(service, data, {**query, "format": "png"})
    assert status == 200 and (decode_labels(body, 40, 56) == expected.labels).all()
    status, body = ask(service, data, {**query, "format": "rle"})
    assert (decode_labels(json.loads(body)["rle"], 40, 56) == expected.labels).all()
    wrapped = json.dumps({"image": base64.b64encode(data).decode(), "format": "png", **query}).encode()
    status, body = ask(service, wrapped, **{"Content-Type": "application/json"})
    assert status == 200 and (decode_labels(body, 40, 56) == expected.labels).all()


def wrapped(**content: Any) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("status", "said", "body", "query"),
    [
        (400, "image: the data is not an image", b"no image at all", {}),
        (400, "image: the data cannot be read", picture(1)[:120], {}),
        (413, "image: expected at most 0.191 MiB, got 1.91 MiB", bytes(2_000_000), {}),
        (400, "image: expected at most 60,000 pixels, got 600 x 400 = 240,000", FLAT, {}),
        (400, "classes: expected at most 20 names, got 10,000", picture(1), {"classes": "a," * 9_999 + "a"}),
        (400, "classes: expected names with commas between them, got an empty name", picture(1), {"classes": "a,,b"}),
        (400, "classes: expected names with commas between them, got no class", picture(1), {"classes": ""}),
        (400, "classes: expected names of at most 40 characters", picture(1), {"classes": "x" * 41}),
        (400, "classes: 'A' is given twice", picture(1), {"classes": "a, A"}),
        (400, "classes: expected names with commas between them or a JSON list", picture(1), {"classes": "[1"}),
        (400, "classes: expected text, or a list of texts", picture(1), {"classes": "[1, 2]"}),
        (400, "min_score: expected a number, got 'high'", picture(1), {"min_score": "high"}),
        (400, "min_score: expected a finite number, got nan", picture(1), {"min_score": "nan"}),
        (400, "format: expected one of json, png, rle, got 'gif'", picture(1), {"format": "gif"}),
        (
            400,
            "parameter: expected one of classes, background, min_score, format, got 'model'",
            picture(1),
            {"model": "another"},
        ),
    ],
)
def test_what_is_no_good_is_a_line(service: str, status: int, said: str, body: bytes, query: dict[str, str]) -> None:
    got, answer = ask(service, body, query)
    line = json.loads(answer)["error"]
    assert got == status and line.startswith(said) and "\n" not in line and len(line) < 500
    got, answer = ask(service, b"", path="/health")  # it lives on
    assert got == 200 and json.loads(answer)["status"] == "ok"


@pytest.mark.parametrize(
    ("status", "said", "body"),
    [
        (400, "body: expected JSON", b"{"),
        (400, "body: expected a JSON object, got list", b"[]"),
        (400, "image: expected the file's bytes in base64", wrapped(classes="a")),
        (400, "image: expected the file's bytes in base64", wrapped(image="not base64!")),
        (400, "image: expected the bytes of an image file, got none", wrapped(image="")),
        (400, "classes: expected at most 20 names", wrapped(image="aaaa", classes=["n"] * 10_000)),
        (400, "classes: expected text", wrapped(image="aaaa", classes={"a": 1})),
        (400, "min_score: expected a number", wrapped(image="aaaa", min_score=[1])),
        (413, "body: expected at most", wrapped(image="a" * 3_000_000)),
    ],
)
def test_json_that_is_no_good_is_a_line(service: str, status: int, said: str, body: bytes) -> None:
    got, answer = ask(service, body, **{"Content-Type": "application/json"})
    assert got == status and json.loads(answer)["error"].startswith(said)


def test_elsewhere_is_nothing(service: str) -> None:
    assert ask(service, b"", path="/segment")[0] == 405 and ask(service, b"x", path="/health")[0] == 405
    status, answer = ask(service, b"x", path="/segments")
    assert status == 404 and json.loads(answer) == {"error": "/segments: expected /segment or /health"}


def mixed(address: str, segmenter: Segmenter, threads: int, each: int) -> Counter[int]:
    """Statuses of so many requests at once of several kinds, whose answers are held to the segmenter's."""
    files = [picture(seed, 40 + 8 * (seed % 4), 56 + 8 * (seed % 3)) for seed in range(12)]
    expected = {(at, names): segmenter(file, names).labels for at, file in enumerate(files) for names in LISTS}

    def client(number: int) -> Counter[int]:
        seen: Counter[int] = Counter()
        for turn in range(each):
            at, names = (number * 5 + turn) % len(files), LISTS[(number + turn) % len(LISTS)]
            if turn % 10 == 9:
                status, _ = ask(address, b"no image", {"format": "png"})
                assert status == 400
            else:
                query = {"format": "png", **({} if names is None else {"classes": names})}
                status, body = ask(address, files[at], query)
                assert status == 200, body
                labels = expected[at, names]
                assert (decode_labels(body, *labels.shape) == labels).mean() > 0.999  # ties up to rounding, by batches
            seen[status] += 1
        return seen

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(client, range(threads)), Counter())


def test_many_at_once_get_their_own_answers(service: str, segmenter: Segmenter) -> None:
    assert mixed(service, segmenter, 4, 20) == {200: 72, 400: 8}


def resident() -> int:
    """Bytes of the service's processes: replicas and proxy."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with_name = process.name() + " ".join(process.cmdline()[:1])
        if "ServeReplica" in with_name or "ProxyActor" in with_name:
            total += process.memory_info().rss
    return total


@pytest.mark.slow
def test_two_thousand_requests_leave_memory_as_it_was(service: str, segmenter: Segmenter) -> None:
    mixed(service, segmenter, 4, 100)
    before = resident()
    assert before > 0
    assert mixed(service, segmenter, 4, 500) == {200: 1800, 400: 200}
    assert resident() - before < 40 * 2**20


@pytest.mark.slow
def test_full_it_says_so_and_told_to_end_it_answers_who_waits(segmenter: Segmenter) -> None:
    port = free_port()
    command = [sys.executable, "-m", "zs3fast", "serve", "--weights", "zs3fast-tiny", "--classes", CLASSES]
    command += ["--port", str(port), "--batch-size", "1", "--queued", "2", "--dtype", "float32"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert running.stdout is not None
    line = running.stdout.readline()
    assert line.startswith(f"tiny-clip_rc answers at http://127.0.0.1:{port}/segment"), line
    address, large = f"http://127.0.0.1:{port}", picture(3, 1600, 1600)
    with ThreadPoolExecutor(12) as pool:
        statuses = Counter(status for status, _ in pool.map(lambda _: ask(address, large), range(12)))
        assert statuses[200] >= 2 and statuses[503] >= 1 and set(statuses) == {200, 503}
        waiting = [pool.submit(ask, address, large, {"format": "png"}) for _ in range(2)]
        time.sleep(0.3)  # they have arrived
        running.send_signal(signal.SIGTERM)
        expected = segmenter(large).labels
        for future in waiting:
            status, body = future.result(timeout=120)
            assert status == 200 and (decode_labels(body, *expected.shape) == expected).all()
    assert running.wait(timeout=120) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"timeout": 0}, "timeout: expected a number of seconds above 0, got 0"),
        ({"wait": -1}, "wait: expected 0 or more, got -1"),
        ({"dtype": "int3"}, "dtype: expected one of"),
    ],
)
def test_options_that_are_no_good(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServeOptions(**arguments)


def test_a_port_that_is_taken_is_a_line() -> None:
    from typer.testing import CliRunner

    from zs3fast.cli import app

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "--weights", "zs3fast-tiny", "--port", port])
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1
    assert result.output.startswith(f"error --port: 127.0.0.1:{port} cannot be listened on (Address already in use)")
