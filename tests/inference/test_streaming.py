"""Work ahead on threads: in order, bounded, no error lost, nothing left running."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing

import pytest
import torch

from zs3fast.inference.streaming import Transfers, ahead, current_item, default_workers, grouped, overlapped, working_on

CPU = torch.device("cpu")
LONG = 30  # seconds: what waits so long waits for something that does not come


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("zs3fast")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_in_order_and_no_further_ahead_than_the_workers(workers):
    drawn = []

    def items():
        for number in range(12):
            drawn.append(number)
            yield number

    def work(number):
        time.sleep(0.01 * (number % 3))  # the later are often through first
        return number * number

    handed_out = []
    for item, outcome in ahead(items(), work, workers):
        handed_out.append((item, outcome.result()))
        assert len(drawn) <= len(handed_out) + workers
    assert handed_out == [(number, number * number) for number in range(12)]
    assert our_threads() == []


def test_the_next_item_is_worked_on_while_this_one_is_used():
    begun = [threading.Event() for _ in range(3)]
    with closing(ahead(range(3), lambda number: begun[number].set(), 1)) as outcomes:
        next(outcomes)
        assert begun[1].wait(LONG), "a thread had nothing else to do"
        assert not begun[2].is_set(), "and one item ahead is what one worker may be"
    plain = threading.Event()
    with closing(ahead(range(2), lambda number: number and plain.set(), 0)) as outcomes:
        next(outcomes)
        assert not plain.is_set(), "without threads nothing happens ahead of time"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_its_item_s_alone(workers):
    def work(number):
        if number % 2:
            raise KeyError(number)
        return current_item()

    seen = []
    for item, outcome in ahead(range(5), work, workers):
        try:
            seen.append((item, outcome.result()))
        except KeyError as error:
            seen.append((item, error.args))
    assert seen == [(0, 0), (1, (1,)), (2, 2), (3, (3,)), (4, 4)], "and the item is known where the work is done"
    assert current_item() is None


def test_leaving_early_finishes_what_is_under_way_and_drops_the_rest():
    begun, finished, go = [], [], threading.Event()

    def work(number):
        begun.append(number)
        if number:
            go.wait(LONG)
        finished.append(number)

    outcomes = ahead(range(100), work, 3)
    next(outcomes)
    threading.Timer(0.05, go.set).start()
    outcomes.close()
    assert begun == finished or sorted(begun) == sorted(finished)
    assert len(begun) <= 4 and our_threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt_passes_through_and_ends_the_threads(workers):
    def items():
        yield from range(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _, outcome in ahead(items(), lambda number: number, workers):
            outcome.result()
    assert our_threads() == []

    def interrupted(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(ahead(range(2), interrupted, 0))


def test_grouped():
    assert list(grouped(range(5), 2)) == [[0, 1], [2, 3], [4]] and list(grouped([], 2)) == []


def test_few_cores_get_no_threads(monkeypatch):
    for cores, expected in ((1, (0, 0)), (2, (0, 2)), (3, (1, 3)), (64, (1, 8))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert (default_workers(CPU), default_workers(torch.device("cuda"))) == expected


def squares(numbers, batches, **options):
    """The pipeline on numbers: -1 cannot be prepared, 5 not computed, and batches are recorded."""

    def prepare(number):
        if number == -1:
            raise ValueError("no such image")
        return str(number), torch.tensor(number)

    def compute(group):
        batches.append([kept for kept, _ in group])
        if "5" in batches[-1]:
            raise RuntimeError("too large")
        return [(tensor * tensor, -tensor) for _, tensor in group]

    def finish(kept, square, negative):
        assert current_item() == int(kept)
        return kept, int(square), int(negative)

    return overlapped(numbers, prepare, compute, finish, device=CPU, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_item_costs_its_batch_nothing(workers):
    batches, failed = [], []
    found = squares(
        [1, -1, 2, 5, 3, 4], batches, workers=workers, batch_size=3, failed=lambda *what: failed.append(what)
    )
    assert list(found) == [(n, (str(n), n * n, -n)) for n in (1, 2, 3, 4)]
    assert [(item, str(error)) for item, error in failed] == [(-1, "no such image"), (5, "too large")]
    assert batches == [["1", "2", "5"], ["1"], ["2"], ["5"], ["3", "4"]]


@pytest.mark.parametrize(("numbers", "error"), [([1, -1, 2], ValueError), ([1, 5, 2], RuntimeError)])
def test_without_anyone_to_tell_the_error_is_raised_in_its_place(numbers, error):
    found = squares(numbers, [], workers=2)
    assert next(found)[0] == 1
    with pytest.raises(error):
        next(found)
    assert our_threads() == []


def test_a_mistake_is_no_bad_item():
    with pytest.raises(TypeError):
        list(squares(["x"], [], workers=1, failed=lambda *_: None))


def test_nothing_is_copied_on_a_cpu():
    transfers, tensor = Transfers(CPU), torch.arange(3)
    assert transfers.upload(tensor)() is tensor and transfers.upload(None)() is None
    assert transfers.download(tensor)()[0].tolist() == [0, 1, 2]


def test_working_on_is_put_back():
    with working_on("a"):
        with working_on("b"):
            assert current_item() == "b"
        assert current_item() == "a"
