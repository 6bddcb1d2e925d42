"""Ops at shapes of real uses, with pytest-benchmark: every contender of the scripts in this folder.

    pytest bench/ops                                            # all named shapes that a CPU can take
    pytest bench/ops --shapes maft-100prop -k "forward and not compiled"
    pytest bench/ops --device cuda --dtype bfloat16             # a GPU takes all of them
    pytest bench/ops --benchmark-save before                    # ... change something ...
    pytest bench/ops --benchmark-compare 0001 --benchmark-compare-fail median:5%

A contender meets its error budget before it is timed; one that does not run here is skipped with its own message. The
scripts (`python bench/ops/<op>.py`) time contenders in turns, which is fairer between them on a busy machine, measure
memory, and write bench/results; this is for following one contender over time.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from bench.op_script import Unsupported
from bench.op_shapes import NAMED, script


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = []
    for name in metafunc.config.getoption("--shapes"):
        for op, shape in NAMED[name].items():
            ours = script(op)
            for pass_ in ours.default_passes or ours.passes:
                cases += [
                    pytest.param(op, name, shape, pass_, contender, id=f"{op}-{name}-{pass_}-{contender}")
                    for contender in ours.contenders
                ]
    metafunc.parametrize("op, name, shape, pass_, contender", cases)


def test_op(
    op: str, name: str, shape: str, pass_: str, contender: str, options: argparse.Namespace, benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    ours = script(op)
    if options.dtype not in ours.dtypes:
        pytest.skip(f"{op} is measured in {', '.join(ours.dtypes)}")
    if shape in ours.large and options.device == "cpu" and not request.config.getoption("--all"):
        pytest.skip("takes gigabytes or minutes on a CPU: --all runs it, or --device cuda")
    try:
        made = ours.make(contender, shape, pass_, options)
    except Unsupported as error:
        pytest.skip(f"does not run here: {str(error)[:200]}")
    result = made.run()
    if made.check is not None:
        made.check(result)
    del result
    benchmark.group = f"{op} {name} {pass_}"
    benchmark.extra_info.update(shape=shape, dtype=options.dtype, backend=options.backend)
    cuda = torch.device(options.device).type == "cuda"

    def call() -> None:
        made.run()
        if cuda:
            torch.cuda.synchronize()

    benchmark(call)
