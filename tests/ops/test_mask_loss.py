"""mask_loss: every backend against the definition, the definition against autograd and the official structure."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.baselines import official
from bench.harness import peak_resident_bytes, reset_peak_resident, resident_bytes
from tests.ops.budget import assert_within_budget
from zs3fast.ops import _extension, mask_loss, use_backend
from zs3fast.ops.mask_loss import reference, reference_backward

op = torch.ops.zs3fast.mask_loss

needs_cpp = pytest.mark.skipif(bool(_extension.objections()), reason="; ".join(_extension.objections()))
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp), "triton"]
IGNORE = 255
ANY = (2, 3, 1, 2, 5, 7)  # B, C, h, w, H, W
SMALL = [
    (2, 3, 2, 3, 9, 14),
    (1, 1, 1, 1, 40, 33),
    (2, 2, 3, 2, 3, 2),
    (1, 5, 4, 3, 3, 2),
    (1, 171, 1, 1, 3, 5),
    (0, 3, 2, 2, 5, 5),
]
LARGE = [
    (1, 847, 2, 3, 17, 31),
    (2, 171, 5, 7, 37, 50),
    (1, 6, 32, 32, 512, 512),
    (1, 2, 3, 5, 130, 64),
    (1, 4, 1, 9, 300, 200),
    (3, 2, 40, 33, 16, 100),
]
CASES = [(b, s) for b in ("reference", "triton") for s in SMALL]
CASES = [*CASES, *(pytest.param("cpp", s, marks=needs_cpp) for s in SMALL + LARGE)]


def ids(value):
    return "B{}-C{}-h{}-w{}-H{}-W{}".format(*value) if isinstance(value, tuple) else None


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make(shape, dtype=torch.float32, device="cpu", seed=0):
    """Logits, labels with every class, ignored pixels and long runs, and weights of the three differentiable sums."""
    B, C, h, w, H, W = shape
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(B, C, h, w, generator=generator)).to(dtype)
    labels = torch.randint(-1, C, (B, H, W), generator=generator)
    labels[:, H // 2 :] = labels[:, H // 2 :, :1]
    labels[labels == -1] = IGNORE if C <= IGNORE else -1
    weights = [torch.randn(B, C, generator=generator) for _ in range(3)]
    return logits.to(device), labels.to(device), [x.to(device) for x in weights]


def weighted(sums, weights):
    return sum((s * w.to(s.dtype)).sum() for s, w in zip(sums[:3], weights, strict=True))


def gradient_of(function):
    """(mask_logits, labels, alpha, gamma, *weights) -> gradient of the weighted sums by autograd through `function`."""

    def gradient(mask_logits, labels, alpha, gamma, *weights):
        mask_logits = mask_logits.detach().requires_grad_()
        weighted(function(mask_logits, labels, alpha, gamma), weights).backward()
        return mask_logits.grad

    return gradient


# The op against the definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "shape"), CASES, ids=ids)
def test_sums_and_gradient(backend, shape):
    logits, labels, weights = make(shape, device=device_of(backend))
    with use_backend(backend):
        assert_within_budget("sums", op(logits, labels, 0.25, 2.0), reference, logits, labels, 0.25, 2.0)
        grad = gradient_of(op)(logits, labels, 0.25, 2.0, *weights)
    assert_within_budget("dmask_logits", grad, gradient_of(reference), logits, labels, 0.25, 2.0, *weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types(backend, dtype):
    logits, labels, weights = make(ANY, dtype, device_of(backend))
    with use_backend(backend):
        sums = op(logits, labels, 0.25, 2.0)
        grad = gradient_of(op)(logits, labels, 0.25, 2.0, *weights)
    assert all(s.dtype == torch.float32 for s in sums) and grad.dtype == dtype
    assert_within_budget("sums", sums, reference, logits, labels, 0.25, 2.0)
    assert_within_budget("dmask_logits", grad, gradient_of(reference), logits, labels, 0.25, 2.0, *weights)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 0.0), (0.0, 0.5), (1.0, 1.0), (0.4, 3.0), (1.0, 2.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_gamma_and_alpha(backend, alpha, gamma):
    logits, labels, weights = make(ANY, device=device_of(backend))
    with use_backend(backend):
        sums = op(logits, labels, alpha, gamma)
        grad = gradient_of(op)(logits, labels, alpha, gamma, *weights)
    assert_within_budget("sums", sums, reference, logits, labels, alpha, gamma)
    assert_within_budget("dmask_logits", grad, gradient_of(reference), logits, labels, alpha, gamma, *weights)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_label_types(backend, dtype):
    """255 is -1 in int8: a negative of every class either way."""
    logits, labels, weights = make(ANY, device=device_of(backend))
    narrow = labels.to(dtype)
    with use_backend(backend):
        assert_within_budget("sums", op(logits, narrow, 0.25, 2.0), reference, logits, labels, 0.25, 2.0)
        grad = gradient_of(op)(logits, narrow, 0.25, 2.0, *weights)
    assert_within_budget("dmask_logits", grad, gradient_of(reference), logits, labels, 0.25, 2.0, *weights)


@pytest.mark.parametrize("stray", [-1, -(2**31), 3, 255, 2**31, 2**32, 2**32 + 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_outside_the_classes_is_a_negative_of_every_class(backend, stray):
    """2^32 + 1 is class 1 to a kernel that narrows before it compares."""
    logits, labels, _ = make((1, 3, 2, 2, 6, 6), device=device_of(backend))
    labels[:, 1:5, 2:] = stray
    with use_backend(backend):
        sums = op(logits, labels, 0.25, 2.0)
    assert_within_budget("sums", sums, reference, logits, labels, 0.25, 2.0)
    assert sums[3].sum() == ((labels >= 0) & (labels < 3)).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend):
    base, _, weights = make((3, 8, 2, 1, 5, 5), device=device_of(backend))
    logits = base.transpose(2, 3)[::2, 1:7:2]  # [2, 3, 1, 2]
    labels = torch.randint(0, 3, (6, 14, 2), device=logits.device).permute(2, 0, 1)[:, :, ::2]  # [2, 6, 7]
    weights = [x[::2, :6:2] for x in weights]
    assert not logits.is_contiguous() and not labels.is_contiguous()
    with use_backend(backend):
        assert_within_budget("sums", op(logits, labels, 0.25, 2.0), reference, logits, labels, 0.25, 2.0)
        grad = gradient_of(op)(logits, labels, 0.25, 2.0, *weights)
    assert_within_budget("dmask_logits", grad, gradient_of(reference), logits, labels, 0.25, 2.0, *weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broadcast_inputs(backend):
    logits, labels, weights = make((1, 1, 1, 2, 5, 7), device=device_of(backend))
    logits, labels = logits.expand(2, 3, 1, 2), labels.expand(2, 5, 7)
    weights = [x.expand(2, 3) for x in weights]
    with use_backend(backend):
        assert_within_budget("sums", op(logits, labels, 0.25, 2.0), reference, logits, labels, 0.25, 2.0)
        grad = gradient_of(op)(logits, labels, 0.25, 2.0, *weights)
    assert_within_budget("dmask_logits", grad, gradient_of(reference), logits, labels, 0.25, 2.0, *weights)


@pytest.mark.parametrize("value", [-200.0, -60.0, -12.0, -1e-3, 0.0, 1e-3, 12.0, 60.0, 200.0, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_small_logits(backend, value):
    """All pixels alike, so that nothing larger hides an error: log(1 + 6e-6) needs more than the log of a sum."""
    logits = torch.full((1, 2, 1, 1), value, device=device_of(backend))
    labels = torch.zeros(1, 4, 4, dtype=torch.int64, device=logits.device)
    with use_backend(backend):
        sums = op(logits, labels, 0.25, 2.0)
    expected = reference(logits.double(), labels, 0.25, 2.0)
    for name, got, wide in zip(("focal", "intersection", "prob", "count"), sums, expected, strict=True):
        torch.testing.assert_close(got.double(), wide, rtol=1e-5, atol=1e-30, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of inf - inf in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_plane_and_its_support(backend, poison):
    logits, labels, weights = make((2, 3, 3, 4, 9, 12), device=device_of(backend))
    clean = logits.clone()
    logits[1, 2, 0, 1] = poison
    with use_backend(backend):
        sums = op(logits, labels, 0.25, 2.0)
        grad = gradient_of(op)(logits, labels, 0.25, 2.0, *weights)
    others = torch.ones(2, 3, dtype=torch.bool, device=logits.device)
    others[1, 2] = False
    expected = reference(logits, labels, 0.25, 2.0)
    for got, wide, fine in zip(sums, expected, reference(clean, labels, 0.25, 2.0), strict=True):
        assert torch.equal(got[1, 2].isnan(), wide[1, 2].isnan())
        assert torch.equal(got[1, 2].isinf(), wide[1, 2].isinf())
        torch.testing.assert_close(got[others], fine[others], rtol=1e-5, atol=1e-6)
    assert torch.isfinite(grad[others]).all()
    assert torch.isfinite(grad[1, 2, 2:]).all() and torch.isfinite(grad[1, 2, :, 3:]).all()  # beyond its neighbours
    if poison != poison:
        assert grad[1, 2, :2, :3].isnan().all()


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_older_processors(capability):
    """The extension follows torch's choice of instruction set, which is made once a process."""
    script = """
import torch
from tests.ops.test_mask_loss import LARGE, assert_within_budget, gradient_of, make, op, reference
from zs3fast.ops import _extension, use_backend
for shape in LARGE[:2]:
    logits, labels, weights = make(shape)
    for gamma in (2.0, 1.5):
        with use_backend("cpp"):
            sums = op(logits, labels, 0.25, gamma)
            grad = gradient_of(op)(logits, labels, 0.25, gamma, *weights)
        assert_within_budget("sums", sums, reference, logits, labels, 0.25, gamma)
        assert_within_budget("dmask_logits", grad, gradient_of(reference), logits, labels, 0.25, gamma, *weights)
print(_extension.info()["cpu_capability"])
"""
    child = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [capability]


@needs_cpp
def test_threads_do_not_change_a_bit():
    logits, labels, weights = make((2, 7, 6, 5, 97, 60))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("cpp"):
                sums = op(logits, labels, 0.25, 2.0)
                results.append((*sums, gradient_of(op)(logits, labels, 0.25, 2.0, *weights)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be read on Linux only")
@needs_cpp
def test_no_full_size_tensor():
    B, C, H, W = 1, 64, 512, 512
    logits, labels, weights = make((B, C, 32, 32, H, W))
    with use_backend("cpp"):
        gradient_of(op)(logits, labels, 0.25, 2.0, *weights)
        reset_peak_resident()
        before = resident_bytes()
        gradient_of(op)(logits, labels, 0.25, 2.0, *weights)
    assert peak_resident_bytes() - before < B * C * H * W * 4 / 8


# The definition ------------------------------------------------------------------------------------------------------


def test_gradcheck_of_the_definition():
    logits, labels, _ = make(ANY, torch.float64)
    logits.requires_grad_()
    for gamma in (2.0, 0.5):
        assert torch.autograd.gradcheck(lambda x, g=gamma: reference(x, labels, 0.25, g)[:3], logits)
        assert torch.autograd.gradcheck(lambda x, g=gamma: op(x, labels, 0.25, g)[:3], logits)


@pytest.mark.parametrize("shape", SMALL, ids=ids)
def test_backward_formula_is_autograds(shape):
    logits, labels, weights = make(shape, torch.float64)
    weights = [x.double() for x in weights]
    for gamma in (2.0, 1.5):
        expected = gradient_of(reference)(logits, labels, 0.25, gamma, *weights)
        got = reference_backward(*weights, logits, labels, 0.25, gamma)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_the_official_one(backend):
    """Value and gradient of both terms, by the structure the official code has."""
    logits, labels, _ = make((2, 5, 2, 3, 11, 12), device=device_of(backend))
    labels[labels == 3] = IGNORE  # an absent class
    labels[1, :, :5] = 4
    expected = []
    for term in range(2):
        wide = logits.double().requires_grad_()
        value = official.mask_losses(wide, labels, IGNORE)[term]
        expected.append((value, torch.autograd.grad(value, wide)[0]))
    with use_backend(backend):
        for term, name in enumerate(("focal", "dice")):
            x = logits.clone().requires_grad_()
            value = mask_loss(x, labels)[term]
            grad = torch.autograd.grad(value, x)[0]
            torch.testing.assert_close(
                value.double(), expected[term][0], rtol=1e-5, atol=0, msg=lambda m, n=name: n + m
            )
            assert_within_budget(f"d{name}/dmask_logits", grad, lambda g: g, expected[term][1])
    assert mask_loss(logits, labels).num_masks == official.mask_losses(logits, labels, IGNORE)[2]


def test_float64_stays_float64():
    logits, labels, _ = make(ANY, torch.float64)
    terms = mask_loss(logits, labels)
    assert {t.dtype for t in terms} == {torch.float64}


# Labels without much to them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_batch_has_focal_and_no_dice(backend):
    """Ignored pixels are negatives of every class; with z = 0 focal is 0.75 * 0.25 * log 2 a pixel of every plane."""
    logits = torch.zeros(2, 3, 2, 2, device=device_of(backend), requires_grad=True)
    labels = torch.full((2, 8, 8), IGNORE, device=logits.device)
    with use_backend(backend):
        focal, dice, num_masks = mask_loss(logits, labels)
        focal_grad, dice_grad = (torch.autograd.grad(t, logits, retain_graph=True)[0] for t in (focal, dice))
    assert dice == 0 and num_masks == 1
    assert focal.item() == pytest.approx(6 * 0.75 * 0.25 * 0.6931472, rel=1e-5)
    assert (focal_grad > 0).all() and (dice_grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_image_adds_to_focal_alone(backend):
    logits, labels, _ = make(ANY, device=device_of(backend))
    labels[1] = IGNORE
    with use_backend(backend):
        both, first, second = (
            mask_loss(logits[part], labels[part]) for part in (slice(0, 2), slice(0, 1), slice(1, 2))
        )
    assert both.num_masks == first.num_masks
    torch.testing.assert_close(both.dice, first.dice, rtol=1e-5, atol=0)
    torch.testing.assert_close(both.focal, first.focal + second.focal / both.num_masks, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_class_everywhere(backend):
    logits, _, _ = make((1, 2, 1, 2, 5, 7), device=device_of(backend))
    labels = torch.ones(1, 5, 7, dtype=torch.int64, device=logits.device)
    with use_backend(backend):
        sums = op(logits, labels, 0.25, 2.0)
    assert sums[3].tolist() == [[0, 35]] and sums[1][0, 0] == 0
    torch.testing.assert_close(sums[1][0, 1], sums[2][0, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend):
    logits = torch.zeros(0, 3, 2, 2, device=device_of(backend), requires_grad=True)
    labels = torch.zeros(0, 8, 8, dtype=torch.int64, device=logits.device)
    with use_backend(backend):
        focal, dice, num_masks = mask_loss(logits, labels)
        (focal + dice).backward()
    assert (focal, dice, num_masks) == (0, 0, 1)
    assert logits.grad.shape == (0, 3, 2, 2)


# The normaliser ------------------------------------------------------------------------------------------------------


def test_num_masks_counts_pairs_or_is_given():
    logits, labels, _ = make((2, 4, 2, 2, 8, 8))
    labels[:] = IGNORE
    labels[0, 0, :3] = torch.tensor([0, 1, 3])
    labels[1, 5] = 1
    own = mask_loss(logits, labels)
    assert own.num_masks == 4
    for given in (8, 8.0, torch.tensor(8.0), torch.tensor([8])):
        terms = mask_loss(logits, labels, num_masks=given)
        assert terms.num_masks == 8
        torch.testing.assert_close(torch.stack([2 * t for t in terms[:2]]), torch.stack(own[:2]))


def _worker(rank, port, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    logits, labels, _ = make((2, 4, 2, 2, 8, 8), seed=rank)
    labels[:] = IGNORE
    if rank == 0:  # three masks here, none there
        labels[0, 0, :3] = torch.tensor([0, 1, 3])
    logits.requires_grad_()
    terms = mask_loss(logits, labels)
    (terms.focal + terms.dice).backward()
    alone = mask_loss(logits.detach(), labels, num_masks=1.0)
    queue.put((rank, [t.item() for t in terms], [t.item() for t in alone], logits.grad.norm().item()))
    dist.barrier()
    dist.destroy_process_group()


def test_num_masks_is_averaged_over_workers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_worker, (port, queue), nprocs=2)
    results = dict((rank, rest) for rank, *rest in (queue.get() for _ in range(2)))
    for terms, alone, norm in results.values():
        assert terms[2] == 1.5
        assert terms[0] == pytest.approx(alone[0] / 1.5) and terms[1] == pytest.approx(alone[1] / 1.5)
        assert norm > 0
    assert results[0][0][1] > 0 and results[1][0][1] == 0


# Registration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(backend, layout):
    logits, labels, weights = make((2, 3, 2, 2, 5, 7))
    logits = logits.to(memory_format=layout)
    with use_backend(backend):
        torch.library.opcheck(op, (logits.requires_grad_(), labels, 0.25, 2.0))
        torch.library.opcheck(
            torch.ops.zs3fast.mask_loss_backward,
            (*weights, logits.detach(), labels, 0.25, 2.0),
            # its gradient is not defined; the three inputs that could ask for one do not
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_compile_full_graph(backend):
    logits, labels, _ = make(ANY)

    def step(x):
        terms = mask_loss(x, labels)
        return terms.focal * 100 + terms.dice

    def grad(function):
        x = logits.clone().requires_grad_()
        value = function(x)
        return value.detach(), torch.autograd.grad(value, x)[0]

    with use_backend(backend):
        expected, got = grad(step), grad(torch.compile(step, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, expected)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, mask_logits, labels):
            return mask_loss(mask_logits, labels)

    logits, labels, _ = make(ANY)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(Loss(), (logits, labels), dynamic_shapes=({0: batch}, {0: batch}))
    assert "zs3fast.mask_loss" in str(program.graph)
    more, more_labels, _ = make((5, 3, 1, 2, 5, 7))
    for got, expected in zip(program.module()(more, more_labels), mask_loss(more, more_labels), strict=True):
        torch.testing.assert_close(got, expected)


# Mistakes ------------------------------------------------------------------------------------------------------------


def zeros(*shape, dtype=torch.int64, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


MISTAKES = [
    ({"mask_logits": zeros(2, 3, 2, 2)}, TypeError, "mask_logits: expected a floating-point tensor, got torch.int64"),
    (
        {"labels": torch.zeros(2, 8, 8)},
        TypeError,
        "labels: expected integers (uint8, int8, int16, int32, int64), got torch.f",
    ),
    ({"labels": zeros(2, 8, 8, dtype=torch.bool)}, TypeError, "got torch.bool"),
    ({"mask_logits": torch.zeros(2, 3, 4)}, ValueError, "expected [B, C, h, w] with C, h, w >= 1, got [2, 3, 4]"),
    ({"mask_logits": torch.zeros(2, 0, 2, 2)}, ValueError, "got [2, 0, 2, 2]"),
    ({"mask_logits": torch.zeros(2, 3, 2, 0)}, ValueError, "got [2, 3, 2, 0]"),
    ({"labels": zeros(2, 1, 8, 8)}, ValueError, "labels: expected [B, H, W] with H, W >= 1, got [2, 1, 8, 8]"),
    ({"labels": zeros(2, 8, 0)}, ValueError, "got [2, 8, 0]"),
    ({"labels": zeros(3, 8, 8)}, ValueError, "labels: expected as many images as mask_logits, B = 2, got 3"),
    ({"labels": zeros(2, 8, 8, device="meta")}, ValueError, "labels: expected the device of mask_logits cpu, got meta"),
    ({"ignore_index": 2}, ValueError, "ignore_index: expected a value outside the classes 0..2, got 2"),
    ({"alpha": 1.5}, ValueError, "alpha: expected a number in 0..1, got 1.5"),
    ({"alpha": float("nan")}, ValueError, "alpha: expected a number in 0..1, got nan"),
    ({"gamma": -1.0}, ValueError, "gamma: expected a finite number >= 0, got -1.0"),
    ({"gamma": float("inf")}, ValueError, "gamma: expected a finite number >= 0, got inf"),
    ({"num_masks": 0}, ValueError, "num_masks: expected a positive number, got 0"),
    ({"num_masks": torch.ones(2)}, ValueError, "num_masks: expected a number or one element, got [2]"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISTAKES)
def test_mistakes_are_named(change, error, message):
    good = {"mask_logits": torch.zeros(2, 3, 2, 2), "labels": zeros(2, 8, 8)}
    mask_loss(**good)
    with pytest.raises(error, match=re.escape(message)) as caught:
        mask_loss(**{**good, **change})
    assert str(caught.value).startswith("mask_loss: ")


@pytest.mark.parametrize(
    ("dtype", "value", "ignore_index"),
    [
        (torch.int64, 3, 255),
        (torch.int64, -1, 255),
        (torch.int64, 2**40, 255),
        (torch.uint8, 255, -1),
        (torch.uint8, 3, 300),
    ],
    ids=str,
)
def test_a_wrong_label_is_named_with_its_place(dtype, value, ignore_index):
    logits = torch.zeros(2, 3, 2, 2)
    labels = torch.zeros(2, 8, 8, dtype=dtype)
    labels[1, 2, 5] = value
    message = f"labels: expected channels 0..2 or ignore_index = {ignore_index}, got {value} at (b, y, x) = (1, 2, 5)"
    with pytest.raises(ValueError, match=re.escape(message)):
        mask_loss(logits, labels, ignore_index=ignore_index)
    mask_loss(logits, labels, ignore_index=ignore_index, validate=False)  # then it is a negative


def test_backends_state_their_objections():
    logits, labels, _ = make((1, 3, 2, 2, 8, 8), torch.float64)
    for backend in ("cpp", "triton"):
        with (
            use_backend(backend),
            pytest.raises(RuntimeError, match=rf"mask_loss: backend '{backend}' cannot.*(?s:.*)float64"),
        ):
            mask_loss(logits, labels)
