"""Random towers, windows and rules against the plain definition beside the goldens, at sizes no golden has."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import zs3fast
from tests.goldens_data import relative
from zs3fast.inference.averaged_windows import AveragedWindows
from zs3fast.inference.predictors import Request
from zs3fast.inference.window_protocols import WindowProtocol
from zs3fast.labels import refinement
from zs3fast.labels.softmax import softmax_scores
from zs3fast.models.maskclip import MaskCLIP

FILE = Path(os.environ.get("ZS3FAST_GOLDENS", "")) / "training_free_reference.py"
pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason=f"{FILE.name} is looked for in ZS3FAST_GOLDENS, and not there"
)
METHODS = ("maskclip", "sclip", "clearclip", "naclip", "kk", "nonly", "vanilla", "resclip_rcs", "scclip")
NAMES = {"maskclip": {"attention": "value"}, "resclip_rcs": {"attention": "rcs"}}


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_free_reference", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tower(plain: ModuleType, method: str, draw: random.Random, seed: int, **numbers: float) -> tuple[MaskCLIP, object]:
    """A model of seeded weights and the definition's tower of the same."""
    heads, patch, grid = draw.choice([2, 3, 6]), draw.choice([4, 7, 8]), draw.choice([4, 6, 7])
    width = heads * draw.choice([8, 12, 16])
    vision = {
        "width": width,
        "layers": 12,
        "head_width": width // heads,
        "patch_size": patch,
        "image_size": grid * patch,
    }
    clip = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {}}
    how = NAMES.get(method, {"attention": method})
    model = zs3fast.create_model(
        "maskclip", clip=clip, quick_gelu=True, image_size=grid * patch, **how, **numbers
    ).eval()
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, value in model.encoder.state_dict().items():
        x = torch.randn(value.shape, generator=generator)
        norm = ".ln_" in f".{name}" and name.endswith("weight")
        matrix = value.dim() >= 2 and "positional" not in name
        weights[name] = 1 + 0.1 * x if norm else x * (1.3 * value.shape[-1] ** -0.5 if matrix else 0.3)
    model.encoder.load_state_dict(weights)
    return model, plain.Tower(weights, heads, patch)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", METHODS)
def test_patches(plain: ModuleType, method: str, seed: int) -> None:
    draw = random.Random(seed)
    std, tau = draw.choice([0.5, 1.0, 5.0, 9.0]), draw.choice([1.0, 2.0, 3.0])
    lam, c = draw.choice([0.0, 0.2, 0.6, 1.0]), draw.choice([0.0, 0.3, 0.7])
    model, reference = tower(plain, method, draw, seed, std=std, tau=tau, lam=lam, c=c)
    patch = model.encoder.config.patch_size
    h, w = draw.choice([(6, 7), (5, 9), (8, 11), (12, 4), (16, 5)])
    size = h * patch + draw.choice([0, patch - 1]), w * patch + draw.choice([0, 1])
    images = torch.randn(draw.choice([1, 2, 3]), 3, *size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        features = model.encoder(images)
    expected = plain.patches(reference, images, method, std=std, tau=tau, lam=lam, cls=c)
    assert relative(features.patch_tokens.mT.unflatten(-1, features.grid_size), expected) < 1e-5


@pytest.mark.parametrize("seed", range(24))
def test_probabilities_and_labels(plain: ModuleType, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(refinement, "TILE_PIXELS", 5000)
    draw = random.Random(100 + seed)
    method = METHODS[seed % len(METHODS)]
    model, reference = tower(plain, method, draw, seed)
    patch, generator = model.encoder.config.patch_size, torch.Generator().manual_seed(seed)
    window = draw.choice([None, 6 * patch, 7 * patch, 8 * patch + 3])
    stride = min(draw.choice([3 * patch, 4 * patch, 5 * patch + 1]), window or 5 * patch)
    canvas_size = draw.choice([(8, 11), (9, 7), (6, 12), (13, 8)])
    canvas_size = canvas_size[0] * patch + draw.choice([0, 3]), canvas_size[1] * patch + draw.choice([0, 5])
    coarse = torch.randn(1, 3, canvas_size[0] // 6, canvas_size[1] // 6, generator=generator)
    canvas = F.interpolate(coarse, canvas_size, mode="bicubic") + 0.1 * torch.randn(
        1, 3, *canvas_size, generator=generator
    )
    counts = [draw.choice([1, 1, 2, 3]) for _ in range(draw.choice([2, 4, 6]))]
    of = [c for c, count in enumerate(counts) for _ in range(count)]
    names = [[f"{c} {i}" for i in range(count)] for c, count in enumerate(counts)]
    text = F.normalize(torch.randn(len(of), 24, generator=generator), dim=-1)
    size, scale = draw.choice([(90, 140), (51, 77), (200, 133), canvas_size]), draw.choice([40.0, 50.0, 65.0])
    threshold, area, steps = draw.choice([0, 0, 0.2, 0.5]), draw.choice([None, 0.1, 0.3]), draw.choice([0, 3, 10])
    expected, labels = plain.segment(
        reference, canvas, text, of, size, method, window, stride, scale, threshold, area, steps
    )
    settings = {"window": window, "stride": stride, "logit_scale": scale, "refine": steps}
    protocol = WindowProtocol(**settings, prob_thd=threshold, area_thd=area)
    predictor = AveragedWindows(model, draw.choice([1, 3, 8]), protocol)
    request = Request(np.zeros((*size, 3), np.uint8), text, names, None)
    with torch.no_grad():
        (masks,), (frame,) = predictor.similarities([canvas[0]], text)
        scores = softmax_scores(masks, size, frame, predictor.rule(names, len(of)), predictor.refinement(canvas[0]))
        prediction = predictor.predict_from(masks, frame, canvas[0], request)
    assert relative(scores, expected) < 1e-5
    assert (prediction.labels.long() != labels).float().mean() <= 0.001
