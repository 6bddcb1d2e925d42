"""Ops under random requests: valid ones in every layout against float64, NaN, extremes, and invalid ones.

`pytest -m fuzz` makes 20,000 calls by a new seed, which it prints; ZS3FAST_FUZZ_SEED repeats one and
ZS3FAST_FUZZ_CALLS says how many. A short share by a fixed seed runs with every suite.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import cases
from tests.ops.cases import CASES, Draw, Request
from zs3fast.ops import use_backend

FAILURES = (ValueError, TypeError, RuntimeError)
BACKENDS = ("reference", "cpp", "auto")  # Triton's interpreter is too slow for thousands of calls
SHARE = 240


def seed_of_this_run() -> int:
    return int(os.environ.get("ZS3FAST_FUZZ_SEED") or time.time_ns() % 2**31)


@pytest.mark.fuzz
def test_many_calls(capsys: pytest.CaptureFixture[str]) -> None:
    seed, calls = seed_of_this_run(), int(os.environ.get("ZS3FAST_FUZZ_CALLS", "20000"))
    with capsys.disabled():
        print(f"\nZS3FAST_FUZZ_SEED={seed} ZS3FAST_FUZZ_CALLS={calls}")
        print(dict(run_calls(seed, calls)))


def test_a_share_of_them() -> None:
    kinds = run_calls(7, SHARE)
    assert min(kinds.values()) > SHARE // 20, kinds


def run_calls(seed: int, calls: int) -> Counter[str]:
    """`calls` requests; an AssertionError names the one that went wrong, which `one_call(its seed)` repeats."""
    kinds: Counter[str] = Counter()
    for i in range(calls):
        own = seed * 1_000_003 + i
        try:
            kinds[one_call(own)] += 1
        except Exception as error:
            raise AssertionError(f"one_call({own}): {type(error).__name__}: {error}") from error
    return kinds


def one_call(seed: int) -> str:
    """One request by its seed; gives its kind: "valid", "nan", "wild" or "invalid"."""
    rng = random.Random(seed)
    op, backend = rng.choice(sorted(CASES)), rng.choice(BACKENDS)
    kind = rng.choices(("valid", "nan", "wild", "invalid"), (5, 2, 2, 3))[0]
    draw = Draw(seed, None, rng.choice((0.1, 1.0, 5.0)))
    request = CASES[op].draw(draw)
    try:
        if kind == "valid":
            CASES[op].judge(request, cases.run(op, request, backend), cases.want_of(op, request))
        elif kind == "nan":
            poison(request, rng, [float("nan")], 1)
            CASES[op].judge(request, cases.run(op, request, backend), cases.want_of(op, request))
        elif kind == "wild":
            poison(request, rng, [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-40, 0.0], 5)
            check_labels(request, cases.run(op, request, backend))
        else:
            call_invalid(op, request, backend, rng)
    except RuntimeError as error:
        if not cases.refused(error):
            raise
    return kind


def poison(request: Request, rng: random.Random, values: list[float], count: int) -> None:
    """Some elements of some float tensors, made contiguous where elements share memory."""
    labels = [k for k, x in request.items() if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    for _ in range(count if labels else 0):
        label = rng.choice(labels)
        x = request[label].clone() if 0 in request[label].stride() else request[label]
        place = tuple(rng.randrange(n) for n in x.shape)
        x[place] = rng.choice(values)
        request[label] = x


def check_labels(request: Request, got: Any) -> None:
    for x in cases.tensors_of(got):
        if "class_weights" in request and not x.is_floating_point() and x.numel():
            assert 0 <= x.long().min() and x.long().max() < request["class_weights"].shape[2]


def mutated(value: Any, rng: random.Random) -> Any:
    """Something else in the place of an argument: often invalid, sometimes not."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return rng.choice((None, 3, value.unsqueeze(0), value.double(), value.to("meta")))
    if isinstance(value, Tensor):
        return rng.choice(
            [
                lambda: value.to(rng.choice((torch.float64, torch.int64, torch.complex64, torch.bool, torch.float16))),
                lambda: value.unsqueeze(0),
                lambda: value[..., :0],
                lambda: value[:0],
                lambda: value[0] if value.ndim and len(value) else value.unsqueeze(-1),
                lambda: torch.cat([value, value], dim=rng.randrange(value.ndim)) if value.ndim else value,
                lambda: value.to("meta"),
                lambda: value.float().to_sparse(),
                lambda: value.tolist(),
                lambda: None,
            ]
        )()
    if isinstance(value, bool):
        return rng.choice((None, 2, "yes", not value))
    if isinstance(value, (int, float)):
        return rng.choice((-1, 0, 2**31, 2**62, -(2**62), float("nan"), float("inf"), "1", None, 1.5, True))
    if isinstance(value, (tuple, list)):
        number = rng.choice((0, -1, 2**31, 2**31 - 1, 2**62, 10**6, 1.5, "a", None))
        return rng.choice(((), (number,), (number, number), (1, number), [3, 4, 5], "ab", None, 7))
    return rng.choice((None, 0, "nonsense", 2**62, object()))


def call_invalid(op: str, request: Request, backend: str, rng: random.Random) -> None:
    """One to two arguments replaced: the call is answered, or refused in one line; the raw op too, and nothing dies."""
    for label in rng.sample(sorted(request), rng.randint(1, 2)):
        request[label] = mutated(request[label], rng)
    try:
        cases.run(op, request, backend)
    except FAILURES as error:
        if not cases.refused(error):
            assert str(error).count("\n") == 0 and str(error), f"more than a line: {error}"


def test_raw_ops_survive() -> None:
    """Below the public functions: whatever reaches torch.ops is answered or refused."""
    with use_backend("cpp"):
        for seed in range(400):
            survives(seed)


def survives(seed: int) -> None:
    rng = random.Random(seed)
    op = rng.choice(sorted(CASES))
    request = CASES[op].draw(Draw(seed))
    for name, args in raw_calls(op, request):
        given = list(args)
        for at in rng.sample(range(len(given)), rng.randint(1, 2)):
            given[at] = mutated(given[at], rng)
        try:
            getattr(torch.ops.zs3fast, name)(*given)
        except Exception:  # of any kind, those of fake kernels included: the process lives
            pass


def raw_calls(op: str, request: Request) -> list[tuple[str, tuple[Any, ...]]]:
    from tests.ops.test_contract import raw_calls as calls

    try:
        return calls(op, request, "cpp")
    except RuntimeError as error:
        if cases.refused(error):
            return []
        raise
    except pytest.skip.Exception:
        return []
