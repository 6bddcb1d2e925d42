"""The one-stage methods against its official implementation: outputs, labels, losses, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zs3fast
from tests.goldens_data import HEADS, SEEN, Golden, golden_files, relative
from tests.tiny import ONE_STAGE
from zs3fast.weights import official_keys

FILES = [(method, path) for method in ONE_STAGE for path in golden_files(method)]
pytestmark = pytest.mark.parametrize(("method", "path"), FILES, ids=[path.stem for _, path in FILES])
TOLERANCE = 1e-5


def load(golden: Golden) -> torch.nn.Module:
    classes = len(golden["input/text_embeddings"])
    return zs3fast.load_official(
        golden.group("weight"), seen=SEEN, num_classes=classes, heads=HEADS, decoder_heads=HEADS
    )


def test_the_method_is_read_off_the_keys(method: str, path: Path) -> None:
    assert load(Golden(path)).method == method


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_eval_outputs(method: str, path: Path, grad: bool) -> None:
    """Twice in a row, so that what eval caches is compared too; with gradients the shortcuts are off."""
    golden = Golden(path)
    model = load(golden)
    size = tuple(golden["input/image"].shape[-2:])
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            out = model(golden["input/image"], golden["input/text_embeddings"])
        masks = out.mask_logits if out.trusty_logits is None else torch.cat([out.mask_logits, out.trusty_logits], 1)
        patch_map = out.patch_tokens.transpose(1, 2).unflatten(-1, masks.shape[-2:])
        assert relative(out.global_token, golden["eval/global_token"]) < TOLERANCE
        assert relative(patch_map, golden["eval/patch_map"]) < TOLERANCE
        assert relative(masks, golden["eval/mask_logits"]) < TOLERANCE
        if method == "clip_rc":
            region_map = out.region_tokens.transpose(1, 2).unflatten(-1, model.encoder.regions)
            assert relative(region_map, golden["eval/region_map"]) < TOLERANCE
    model.trusty_weighting = "off"
    assert relative(model.class_scores(out, size), golden["eval/scores"]) < TOLERANCE
    labels = model.predict_labels(out, size)
    top = golden["eval/scores"].topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-6
    assert torch.equal(labels[clear], golden["eval/labels"][clear])
    assert (~clear).float().mean() < 0.01
    if method == "tagclip":
        model.trusty_weighting = "both"
        assert relative(model.class_scores(out, size), golden["eval/scores_trusty"]) < TOLERANCE


def test_losses_and_gradients(method: str, path: Path) -> None:
    golden = Golden(path)
    model = load(golden).train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    out = model(golden["input/image"], golden["input/text_embeddings"][SEEN])
    losses = model.loss(out, golden["input/label"], setting="inductive")
    names = {
        "loss_mask": "loss_mask",
        "loss_dice": "loss_dice",
        "loss_trusty": "loss_disc",
        "loss_recovery_q": "recovery_loss_q",
        "loss_recovery_k": "recovery_loss_k",
        "loss": "total",
    }
    for name, loss in losses.items():
        assert relative(loss, golden[f"train/{names[name]}"]) < TOLERANCE, name
    losses["loss"].backward()
    expected = golden.group("grad")
    official = official_keys(model)
    got = {official[name]: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == expected.keys(), "other parameters train than the official recipe's"
    scale = max(grad.norm() for grad in expected.values())
    for key, grad in expected.items():
        if grad.norm() < 1e-6 * scale:  # key biases: their true gradient is 0
            assert got[key].norm() < 1e-5 * scale, key
        else:
            assert relative(got[key], grad) < 1e-4, key
