"""The pipeline on a GPU: images resized and normalised there, copies beside kernels, CUDA graphs of whole models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.goldens_data import relative
from tests.gpu.device import DEVICE, ON_GPU, busy_stream, skip_without_gpu
from tests.inference.test_segmenter import SIZES, make_model, photo, text_rows
from tests.tiny import tiny_inputs, tiny_model
from zs3fast.inference.compiled import MAX_SHAPES, CompiledModel
from zs3fast.inference.predictors import Request, Windows, fitted_size
from zs3fast.inference.repeated import RepeatedModel
from zs3fast.inference.segmenter import Segmenter
from zs3fast.inference.streaming import Transfers
from zs3fast.utils.resizing import bilinear

skip_without_gpu()

PICTURES = [photo(*size, seed=index) for index, size in enumerate(SIZES)]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("old", [(375, 500), (31, 97), (512, 512), (130, 90), (1, 7)])
def test_a_picture_is_resized_to_the_bytes_of_a_cpu(old: tuple[int, int], antialias: bool) -> None:
    pixels = torch.randint(0, 256, (*old, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for side in (64, 224, 512):
        size = fitted_size(old, side)
        assert torch.equal(bilinear(pixels.to(DEVICE), size, antialias).cpu(), bilinear(pixels, size, antialias))


def test_a_picture_is_resized_where_the_model_is() -> None:
    image, large = photo(75, 100), photo(300, 300)
    recipe = Windows(make_model().to(DEVICE), 8)
    assert recipe.prepare(image).shape == ((75, 100, 3) if ON_GPU else (64, 85, 3))
    assert recipe.prepare(large).shape == (64, 64, 3), "more than 4 times its sides: on the host"


@pytest.mark.parametrize("image", [*PICTURES[:3], photo(300, 300)])
def test_a_picture_is_resized_and_normalised_as_on_a_cpu(image: np.ndarray) -> None:
    """Bit for bit: every step is in whole numbers or one correctly rounded operation. Also through a late stream."""
    recipes = [Windows(make_model().to(device), 8) for device in ("cpu", DEVICE)]
    requests = [Request(image, text_rows(5).to(device), [], None) for device in ("cpu", DEVICE)]
    canvases = [recipe._canvas(request) for recipe, request in zip(recipes, requests, strict=True)]
    assert torch.equal(canvases[0], canvases[1].cpu())
    transfers = Transfers(torch.device(DEVICE))
    arriving = transfers.upload(recipes[1].prepare(image))
    with busy_stream():
        (got,) = transfers.download(recipes[1]._canvas(replace(requests[1], prepared=arriving())))()
    np.testing.assert_array_equal(got, canvases[0].numpy())


def test_copies_wait_for_what_they_copy() -> None:
    """The stream that computes is late: what is copied out too early, or used before it is there, is something else."""
    transfers = Transfers(torch.device(DEVICE))
    tensors = [torch.randint(0, 256, (3, 512, 700), dtype=torch.uint8) for _ in range(4)]
    arriving = [transfers.upload(tensor) for tensor in tensors]
    with busy_stream():
        waiting = [transfers.download(arrived().float() + 1, arrived()[0].int()) for arrived in arriving]
        results = [wait() for wait in waiting]
    for tensor, (shifted, first) in zip(tensors, results, strict=True):
        np.testing.assert_array_equal(shifted, tensor.numpy().astype(np.float32) + 1)
        np.testing.assert_array_equal(first, tensor[0].numpy().astype(np.int32))


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("method", ["zegclip", "tagclip"])
def test_a_stream_equals_calls(method: str, workers: int, batch_size: int) -> None:
    seg = Segmenter(make_model(method), text_embeddings=text_rows(5), device=DEVICE)
    expected = [seg(image) for image in PICTURES]
    found = list(seg.stream(PICTURES, workers=workers, batch_size=batch_size))
    assert len(found) == len(PICTURES)
    for (_, got), one in zip(found, expected, strict=True):
        assert (got.labels == one.labels).mean() > 0.999
        np.testing.assert_allclose(got.scores, one.scores, atol=1e-5)


@pytest.mark.parametrize("method", ["tagclip", "clip_rc"])
@torch.no_grad()
def test_compiled_with_cuda_graphs(method: str) -> None:
    model = tiny_model(method).to(DEVICE)
    run = CompiledModel(model, backend="inductor" if ON_GPU else "aot_eager")
    problems = [[x.to(DEVICE) for x in tiny_inputs(2)], [x.to(DEVICE) for x in tiny_inputs(3, classes=4)]]
    problems.append([problems[0][0].flip(0).contiguous(), problems[0][1].flip(0).contiguous()])
    problems.append([problems[0][0][:1], problems[0][1]])
    for _ in range(3):  # warm-up, recording, replay
        results = [run(*problem) for problem in problems]
        for problem, got in zip(problems, results, strict=True):  # the last replay has not written over the others
            out = model(*problem)
            assert relative(got.mask_logits, out.mask_logits) < 1e-4
            assert (got.trusty_logits is None) == (out.trusty_logits is None)


@pytest.mark.parametrize("method", ["zegclip", "tagclip", "clip_rc", "maskclip"])
@torch.no_grad()
def test_recorded(method: str) -> None:
    """The plain model in CUDA graphs, small batches of two sizes in turn; weights are written to in between."""
    model = tiny_model(method).to(DEVICE)
    run = RepeatedModel(model)
    problems = [[x.to(DEVICE) for x in tiny_inputs(batch)] for batch in (1, 2)]
    for turn in range(6):
        if turn == 3:
            next(p for name, p in model.named_parameters() if "prompt" in name or "proj" in name).mul_(2)
        results = [run(*problem) for problem in problems]
        for problem, got in zip(problems, results, strict=True):
            assert relative(got.mask_logits, model(*problem).mask_logits) < 1e-4
    assert not run.repeated.broken and len(run.repeated) == (2 if ON_GPU else 0)


@torch.no_grad()
def test_graphs_are_bounded() -> None:
    model = tiny_model("zegclip").to(DEVICE)
    run = CompiledModel(model, backend="inductor" if ON_GPU else "aot_eager")
    run.shapes.update((number,) for number in range(MAX_SHAPES))
    images, text = (x.to(DEVICE) for x in tiny_inputs())
    assert torch.equal(run(images, text).mask_logits, model(images, text).mask_logits)
