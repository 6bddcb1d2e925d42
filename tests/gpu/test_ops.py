"""Every op on a GPU: every backend, fp32 (exact and tf32), bf16 and fp16, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import skip_unless_free, skip_without_gpu
from tests.gpu.problems import FAMILIES, Family, backends_of, passes_of, skip_if_refused
from zs3fast.ops import use_backend

skip_without_gpu()

PRECISIONS = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
}
PUBLISHED_BYTES = 24 * 2**30  # the float64 definition stores every score


def cases() -> list[object]:
    """Variants of an op leave the odd shapes to its first family, published sizes leave out the definition's own run.

    Two workers of pytest-xdist at most are at a published size at the same time: more would not fit.
    """
    found = []
    for number, (name, family) in enumerate(FAMILIES.items()):
        for label in family.shapes:
            published = label_is_published(label)
            if ":" in name and label != "tiny" and not published:
                continue
            for precision in PRECISIONS:
                if precision == "tf32" and not family.products:
                    continue
                for backend in backends_of(family.op):
                    if published and backend == "reference":
                        continue
                    for pass_ in passes_of(family, backend):
                        values = (family, label, precision, backend, pass_)
                        marks = pytest.mark.xdist_group(f"large{number % 2}") if published else ()
                        identity = "-".join((name, *values[1:]))
                        found.append(pytest.param(*values, id=identity, marks=marks))
    return found


def label_is_published(label: str) -> bool:
    return label.startswith(("coco", "ade", "maft", "M1"))


@pytest.mark.parametrize(("family", "label", "precision", "backend", "pass_"), cases())
def test_agrees_with_float64(family: Family, label: str, precision: str, backend: str, pass_: str) -> None:
    dtype, torch.backends.cuda.matmul.fp32_precision = PRECISIONS[precision]
    if label_is_published(label):
        skip_unless_free(PUBLISHED_BYTES)
    problem = family.make(family.shapes[label], dtype)
    with use_backend(backend):
        skip_if_refused(family.op, backend, problem)
        if pass_ == "forward":
            problem.check_forward()
        else:
            problem.check_backward()
