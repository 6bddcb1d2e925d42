"""`zs3fast serve` under load on loopback, beside calling the Segmenter in process with the same requests.

    python bench/serve.py --write                  # 4 clients x 500 mixed requests on the small model in the package
    python bench/serve.py --clients 8 --each 250   # others

Requests are PNG files of four sizes, three class lists, three formats of answers, and one in ten that is no good. Every
answer's status is checked. A time is one request's, as its client sees it; "alone" is one after the other without HTTP
or Ray: decoded, segmented, encoded. Memory is the resident size of the replica and the HTTP proxy, before and after.
Nothing is written without --write, which puts the run in the last one's place in bench/results.
"""

from __future__ import annotations

import argparse
import http.client
import io
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import psutil
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import harness  # noqa: E402
from bench.harness import Timing  # noqa: E402
from zs3fast.data.world import CLASS_NAMES  # noqa: E402
from zs3fast.inference.segmenter import Segmenter  # noqa: E402
from zs3fast.inference.serve import Ask, ServeOptions, read_parameters, response, serving  # noqa: E402

SIDES = (64, 96, 128, 192)
LISTS = ("red sand, star, grass", ", ".join(CLASS_NAMES[:5]), ", ".join(CLASS_NAMES[:20]))
FORMATS = ("json", "png", "rle")


@dataclass(frozen=True)
class Sent:
    """A request and the status that is its due."""

    body: bytes
    query: dict[str, str]
    status: int


def requests(count: int) -> list[Sent]:
    """So many, mixed by their number alone."""
    files = []
    for number, side in enumerate(SIDES * 2):
        noise = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
        files.append(buffer.getvalue())
    rng = np.random.default_rng(0)
    mixed = []
    for number in range(count):
        query = {"classes": LISTS[rng.integers(len(LISTS))], "format": FORMATS[rng.integers(len(FORMATS))]}
        good = number % 10 != 9
        mixed.append(Sent(files[rng.integers(len(files))] if good else b"no image", query, 200 if good else 400))
    return mixed


def client(address: str, sent: Sequence[Sent]) -> list[float]:
    """Seconds of each request, one after the other on one connection."""
    connection, seconds = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120), []
    for one in sent:
        begun = time.perf_counter()
        connection.request("POST", f"/segment?{urlencode(one.query)}", one.body)
        got = connection.getresponse()
        got.read()
        seconds.append(time.perf_counter() - begun)
        if got.status != one.status:
            raise RuntimeError(f"status: expected {one.status}, got {got.status}")
    connection.close()
    return seconds


def alone(segmenter: Segmenter, sent: Sequence[Sent], options: ServeOptions) -> list[float]:
    """Seconds of each request without HTTP and Ray."""
    seconds = []
    for one in sent:
        begun = time.perf_counter()
        try:
            ask = Ask(options.limits.image(one.body), **read_parameters(one.query, options.limits))
            response(segmenter(ask.image, None if ask.entries is None else list(ask.entries)), ask.format)
        except ValueError:
            assert one.status == 400
        seconds.append(time.perf_counter() - begun)
    return seconds


def resident() -> int:
    """Bytes of replicas and proxy."""
    called = [(one, one.name()) for one in psutil.Process().children(recursive=True)]
    return sum(one.memory_info().rss for one, name in called if "ServeReplica" in name or "ProxyActor" in name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--each", type=int, default=500, help="requests of a client")
    parser.add_argument("--alone", type=int, default=400, help="of these, requests in process as well")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--wait", type=float, default=5.0, help="milliseconds")
    parser.add_argument("--write", action="store_true", help="into bench/results/<device>/serve.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    segmenter = Segmenter.from_pretrained("zs3fast-tiny", class_names=LISTS[0], device="cpu", dtype="float32")
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    options = ServeOptions(port=port, batch_size=args.batch_size, wait=args.wait / 1000, dtype="float32")
    sent = requests(args.clients * args.each)
    parts = [sent[number :: args.clients] for number in range(args.clients)]
    alone(segmenter, sent[:40], options)  # names are encoded
    single = alone(segmenter, sent[: args.alone], options)
    with serving(segmenter, "tiny", options) as address, ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(lambda part: client(address, part[:25]), parts))
        before, begun = resident(), time.perf_counter()
        times = [one for part in pool.map(lambda part: client(address, part), parts) for one in part]
        whole = time.perf_counter() - begun
        after = resident()
    described, name = harness.environment(), "zs3fast-tiny"
    shape = f"{args.clients} x {args.each} mixed requests, sides of {SIDES[0]} to {SIDES[-1]} pixels"
    served: dict[str, Any] = {
        "images_per_second": round(len(times) / whole, 2),
        "of_alone": round(len(times) / whole * sum(single) / len(single), 3),
        "batch_size": args.batch_size,
        "wait_ms": args.wait,
        "resident_before_mib": round(before / 2**20, 1),
        "resident_after_mib": round(after / 2**20, 1),
    }
    rate = round(len(single) / sum(single), 2)
    rows = [
        harness.row(name, "serve", shape, Timing(times), pass_="serve", described=described, **served),
        harness.row(name, "alone", shape, Timing(single), pass_="serve", described=described, images_per_second=rate),
    ]
    for row in rows:
        print({key: value for key, value in row.items() if key not in ("versions", "isa", "device")})
    if args.write:
        harness.write_results(harness.results_path("serve"), rows)


if __name__ == "__main__":
    main()
