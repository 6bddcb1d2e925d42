"""The clock refuses wrong results, interleaves, and leaves whole files."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_clock, harness
from bench.harness import Contender, OverBudget, Timing, measure, within_budget


def test_what_fails_its_check_is_not_timed():
    calls = []

    def wrong():
        calls.append(1)
        return torch.tensor([1.0, 2.001])

    check = lambda got: within_budget("wrong", got, torch.tensor([1.0, 2.0]))  # noqa: E731
    with pytest.raises(OverBudget, match="wrong: error 4.47e-04 over budget 1.00e-05"):
        measure([Contender("wrong", wrong, check)], rounds=3)
    assert len(calls) == 1


def test_budget_refuses_shapes_and_non_finite_values():
    good = torch.ones(3)
    within_budget("same", good, good)
    with pytest.raises(OverBudget, match="shape"):
        within_budget("wider", torch.ones(4), good)
    with pytest.raises(OverBudget, match="non-finite"):
        within_budget("nan", torch.tensor([1.0, 1.0, float("nan")]), good)


def test_rounds_are_interleaved():
    order = []
    contenders = [Contender(name, lambda name=name: (order.append(name), time.sleep(2e-3))) for name in "AB"]
    times = measure(contenders, rounds=3, min_sample_s=1e-4)
    assert order[-6:] == ["A", "B", "A", "B", "A", "B"]
    assert all(len(t.samples) == 3 and t.median >= 2e-3 for t in times.values())


def test_percentiles():
    timing = Timing([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (timing.percentile(20), timing.median, timing.percentile(80)) == (2.0, 3.5, 5.0)


def test_measure_names_bad_arguments():
    contender = Contender("a", lambda: None)
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        measure([contender], rounds=0)
    with pytest.raises(ValueError, match="names must differ"):
        measure([contender, contender], rounds=1)


def test_rows_say_what_was_measured_on_what(tmp_path):
    row = harness.row("op", "cpp", "voc20-512", Timing([1e-3, 2e-3, 3e-3]), peak_bytes=2**21, classes=20)
    wanted = {
        "name",
        "backend",
        "shape",
        "dtype",
        "pass",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "peak_mib",
        "device",
        "versions",
        "commit",
    }
    assert wanted <= set(row)
    assert (row["p50_ms"], row["peak_mib"], row["dtype"], row["classes"]) == (2.0, 2.0, "float32", 20)
    path = tmp_path / "device" / "op.json"
    harness.write_results(path, [row])
    assert harness.read_results(path) == [json.loads(json.dumps(row))]
    assert [p.name for p in path.parent.iterdir()] == ["op.json"]  # no temporary file left


@pytest.mark.parametrize("seconds", [3.0471234e-6, 3.0471234e-3, 30.471234])
def test_rows_keep_digits_of_any_time(seconds):
    row = harness.row("op", "cpp", "tiny", Timing([seconds]))
    assert row["p50_ms"] == pytest.approx(seconds * 1e3, rel=1e-5)


def test_device_slug_is_a_folder_name():
    slug = harness.device_slug()
    assert slug and slug == slug.lower() and all(c.isalnum() or c == "-" for c in slug)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory can be reset on Linux only")
def test_peak_memory_is_that_of_the_call_not_of_the_parent():
    # The parent holds 256 MiB; the child's ru_maxrss would start there.
    ballast = torch.ones(64 * 2**20)
    code = (
        f"import sys; sys.path.insert(0, {str(harness.ROOT)!r})\n"
        "from bench import harness\n"
        "x = bytearray(b'1' * 2**27); del x\n"
        "harness.reset_peak_resident(); before = harness.resident_bytes()\n"
        "x = bytearray(b'1' * 2**26); del x\n"
        "print((harness.peak_resident_bytes() - before) / 2**20)"
    )
    taken = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 64 <= taken < 192, taken  # bytes * 2**26 and bytearray's copy of it; not the 128 MiB freed, not the parent's
    assert ballast.numel()


class Card:
    """Stands for torch.cuda where no GPU is: what was asked of it, in order; a millisecond passes at every call."""

    def __init__(self, captures: bool) -> None:
        self.captures, self.now, self.seen = captures, 0.0, []
        self.Event = lambda enable_timing: _Event(self)
        self.Stream = self.current_stream = lambda device: SimpleNamespace(wait_stream=lambda other: None)
        self.stream = lambda stream: contextlib.nullcontext()
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.call("replay", 1.0))
        self.synchronize = lambda device: None
        self.get_device_properties = lambda device: SimpleNamespace(L2_cache_size=64)

    def call(self, name: str, ms: float) -> None:
        self.seen.append(name)
        self.now += ms

    @contextlib.contextmanager
    def graph(self, graph: object):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield


class _Event:
    def __init__(self, card: Card) -> None:
        self.card, self.at = card, 0.0

    def record(self) -> None:
        self.at = self.card.now

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


@pytest.mark.parametrize("captures", [True, False])
def test_a_gpus_own_time_of_a_call_and_of_its_graph(captures: bool) -> None:
    card = Card(captures)
    found = gpu_clock.gpu_times(lambda: card.call("run", 3.0), rounds=5, device="cpu", cuda=card)
    if captures:
        assert found == {"events_ms": 3.0, "graph_ms": 1.0}
        assert card.seen == ["run"] * 7 + ["replay"] * 5
    else:
        assert found["events_ms"] == 3.0 and "graph_ms" not in found
        assert found["graph_failed"] == "RuntimeError: operation not permitted when stream is capturing"


def test_floors_are_what_a_copy_and_a_product_reach() -> None:
    found = gpu_clock.floors("cpu", torch.float32, rounds=1, tiny=True)
    assert set(found) == {"copy_gb_s", "product_tflop_s"} and all(x > 0 for x in found.values())


def test_rows_carry_the_gpus_own_times() -> None:
    row = harness.row("op", "triton", "tiny", Timing([1e-3], gpu={"events_ms": 0.5, "graph_ms": 0.25}))
    assert (row["p50_ms"], row["events_ms"], row["graph_ms"]) == (1.0, 0.5, 0.25)
    assert "events_ms" not in harness.row("op", "cpp", "tiny", Timing([1e-3]))
