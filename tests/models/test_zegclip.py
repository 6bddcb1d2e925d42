"""ZegCLIP: contract, exact shortcuts, losses in every setting, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zs3fast
from tests.goldens_data import relative
from tests.tiny import CLIP, NUM_CLASSES, SEEN, tiny_inputs, tiny_labels, tiny_model


def test_output_contract() -> None:
    model = tiny_model("zegclip")
    images, text = tiny_inputs(size=(64, 96))
    out = model(images, text)
    assert out.mask_logits.shape == (2, NUM_CLASSES, 4, 6)
    assert out.global_token.shape == (2, 32) and out.patch_tokens.shape == (2, 24, 32)
    assert out.trusty_logits is None and out.region_tokens is None
    for tokens in (out.global_token, out.patch_tokens):
        torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(tokens.shape[:-1]))


def test_default_model_has_the_published_number_of_live_weights() -> None:
    """Spec section 7: 8,039,168 parameters receive a gradient on VOC; dead official weights are not built."""
    model = zs3fast.create_model("zegclip", clip="ViT-B-16", num_prompts=10, seen=list(range(15)), num_classes=20)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8_039_168
    images, text = torch.randn(1, 3, 512, 512), F.normalize(torch.randn(20, 512), dim=-1)
    with torch.no_grad():
        out = model.eval()(images, text)
    assert out.mask_logits.shape == (1, 20, 32, 32)
    assert model.predict_labels(out, (512, 512)).shape == (1, 512, 512)


def test_masks_are_the_mean_over_heads_of_the_last_layers_scores() -> None:
    """The folded full-width product of eval against the per-head definition."""
    model = tiny_model("zegclip")
    images, text = tiny_inputs()
    with torch.no_grad():
        out = model(images, text)
        last, heads = model.decoder.layers[-1].multihead_attn, 4
        queries = model.descriptor(text, out.global_token)
        for layer in model.decoder.layers[:-1]:
            queries = layer(queries, out.patch_tokens)
        q = last.q(queries).unflatten(-1, (heads, -1)).transpose(1, 2)
        k = last.k(out.patch_tokens).unflatten(-1, (heads, -1)).transpose(1, 2)
        masks = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).mean(1).unflatten(-1, (4, 4))
    assert relative(out.mask_logits, masks) < 1e-5


@pytest.mark.parametrize("classes", [1, 7, 16, 40])
def test_eval_shortcuts_change_nothing(classes: int) -> None:
    """No-grad eval folds projections and caches; with gradients the plain forms run. More classes than patches too."""
    model = tiny_model("zegclip")
    images, text = tiny_inputs(classes=classes)
    plain = model(images, text).mask_logits
    with torch.no_grad():
        for _ in range(2):
            assert relative(model(images, text).mask_logits, plain) < 1e-5


def test_cached_text_half_follows_text_and_weights() -> None:
    model = tiny_model("zegclip")
    images, text = tiny_inputs()
    _, other = tiny_inputs(classes=NUM_CLASSES + 1)
    other = other[1:].clone()

    def check(embeddings: torch.Tensor) -> None:
        with torch.no_grad():
            got = model(images, embeddings).mask_logits
        assert relative(got, model(images, embeddings).mask_logits) < 1e-5

    check(text)
    check(other)
    text.mul_(-1)  # the same tensor, written to
    check(text)
    with torch.no_grad():
        model.descriptor.q_proj.weight.mul_(2)
    check(text)
    model.load_state_dict(tiny_model("zegclip", num_classes=NUM_CLASSES).state_dict())
    check(text)


def test_decoder_layers_start_as_copies() -> None:
    first, second, last = (layer.state_dict() for layer in tiny_model("zegclip").decoder.layers)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], last[name]) for name in last)


@pytest.mark.parametrize("size", [(64, 64), (100, 75), (33, 200)])
@pytest.mark.parametrize("input_size", [(64, 64), (96, 96), (64, 96)])
def test_labels_equal_the_argmax_of_scores(size: tuple[int, int], input_size: tuple[int, int]) -> None:
    model = tiny_model("zegclip")
    images, text = tiny_inputs(size=input_size)
    with torch.no_grad():
        out = model(images, text)
        scores = model.class_scores(out, size)
        labels = model.predict_labels(out, size)
    assert scores.shape == (2, NUM_CLASSES, *size) and labels.shape == (2, *size) and labels.dtype == torch.int64
    top = scores.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-6
    assert torch.equal(labels[clear], scores.argmax(1)[clear]) and clear.float().mean() > 0.9


def test_scores_are_the_official_composition() -> None:
    """Logits go to image_size whatever the input, then sigmoid, then the offset, then the resize."""
    model = tiny_model("zegclip", seen_offset=0.1)
    images, text = tiny_inputs(size=(96, 96))
    out = model(images, text)
    scores = F.interpolate(out.mask_logits, size=(64, 64), mode="bilinear", align_corners=False).sigmoid()
    scores = scores.clone()
    scores[:, SEEN] -= 0.1
    scores = F.interpolate(scores, size=(96, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.class_scores(out, (96, 96)), scores, atol=1e-6, rtol=1e-5)


def test_another_class_list_has_no_seen_classes() -> None:
    model = tiny_model("zegclip")
    images, text = tiny_inputs(classes=3)
    out = model(images, text)
    expected = F.interpolate(out.mask_logits, size=(64, 64), mode="bilinear", align_corners=False).sigmoid()
    torch.testing.assert_close(model.class_scores(out, (64, 64)), expected)


def plain_loss(logits: torch.Tensor, labels: torch.Tensor, focal_weight: float) -> torch.Tensor:
    """Spec section 7, full-size and unfused."""
    z = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    target = (labels.unsqueeze(1) == torch.arange(logits.shape[1])[:, None, None]).to(z)
    p = z.sigmoid()
    focal = torch.where(target > 0, 0.25 * (1 - p) ** 2 * F.softplus(-z), 0.75 * p**2 * F.softplus(z))
    present = target.sum((2, 3)) > 0
    n = present.sum().clamp(min=1)
    dice = 1 - (2 * (p * target).sum((2, 3)) + 1) / (p.sum((2, 3)) + target.sum((2, 3)) + 1)
    return focal_weight * focal.mean((2, 3)).sum() / n + (dice * present).sum() / n


@pytest.mark.parametrize("setting", ["inductive", "transductive", "supervised"])
def test_losses_of_every_setting(setting: str) -> None:
    model = tiny_model("zegclip")
    images, text = tiny_inputs()
    labels = tiny_labels()
    out = model(images, text[SEEN] if setting == "inductive" else text)
    mapped = torch.full_like(labels, 255)
    if setting == "inductive":
        for index, c in enumerate(SEEN):
            mapped[labels == c] = index
    else:
        mapped = labels.clone()
    if setting == "transductive":
        scores = F.interpolate(out.mask_logits, size=(64, 64), mode="bilinear", align_corners=False).sigmoid()
        scores[:, SEEN] = -1
        unseen = (labels == 3) | (labels == 5)
        mapped[unseen] = scores.argmax(1)[unseen]
    losses = model.loss(out, labels, setting=setting)
    assert set(losses) == {"loss_mask", "loss_dice", "loss"}
    torch.testing.assert_close(losses["loss"], plain_loss(out.mask_logits, mapped, 100.0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["loss"], losses["loss_mask"] + losses["loss_dice"])


def test_all_ignored_batch_has_focal_and_no_dice() -> None:
    model = tiny_model("zegclip")
    images, text = tiny_inputs()
    losses = model.loss(model(images, text[SEEN]), torch.full((2, 64, 64), 255))
    assert losses["loss_dice"] == 0 and losses["loss_mask"] > 0


def test_a_few_steps_on_one_batch_lower_the_loss() -> None:
    model = tiny_model("zegclip").train()
    images, text = tiny_inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.loss(model(images, text[SEEN]), tiny_labels())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("labels", "setting", "error", "message"),
    [
        (torch.zeros(2, 64, 64), "inductive", TypeError, "labels: expected an integer type"),
        (torch.zeros(64, 64, dtype=torch.long), "inductive", ValueError, r"labels: expected \[B, H, W\]"),
        (
            torch.full((2, 64, 64), 9),
            "inductive",
            ValueError,
            r"labels: value 9 at \[b, y, x\] = \[0, 0, 0\], expected 0..6 or 255",
        ),
        (torch.zeros(2, 64, 64, dtype=torch.long), "open", ValueError, "setting: expected one of inductive"),
        (
            torch.zeros(2, 64, 64, dtype=torch.long),
            "supervised",
            ValueError,
            r"out: the supervised loss needs the output for all classes \(7\), got 5",
        ),
    ],
)
def test_bad_loss_input(labels: torch.Tensor, setting: str, error: type[Exception], message: str) -> None:
    model = tiny_model("zegclip")
    images, text = tiny_inputs()
    out = model(images, text[SEEN])
    with pytest.raises(error, match=message):
        model.loss(out, labels, setting=setting)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (torch.zeros(3, 31), ValueError, r"text_embeddings: expected \[C, 32\] with C >= 1, got \[3, 31\]"),
        (torch.zeros(0, 32), ValueError, r"text_embeddings: expected \[C, 32\] with C >= 1"),
        (torch.zeros(32), ValueError, "text_embeddings"),
        (torch.zeros(3, 32, dtype=torch.long), TypeError, "text_embeddings: expected a floating-point type"),
        (torch.zeros(3, 32, device="meta"), ValueError, "text_embeddings: expected the model's device cpu, got meta"),
        ([[0.0] * 32], TypeError, "text_embeddings: expected a tensor"),
    ],
)
def test_bad_text(text: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_model("zegclip")(tiny_inputs()[0], text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seen": [0, 0]}, "seen: expected different indices"),
        ({"seen": [7]}, r"seen: expected indices in 0..6, got \[7\]"),
        ({"image_size": 60}, "image_size: expected a multiple of the patch size 16, got 60"),
        ({"decoder_heads": 5}, "decoder_heads: expected a divisor of the joint width 32, got 5"),
        ({"loss_weights": {"focal": 1.0}}, "loss_weights: expected terms of"),
        ({"class_names": ["cat"]}, "class_names: expected num_classes = 7 names, got 1"),
        (
            {"clip": {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "head_width": 13}}},
            "clip: expected a multiple of head_width 13 .*, got 48",
        ),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model("zegclip", **options)


def test_unknown_method_is_named() -> None:
    known = "clearclip, clip_rc, clsclip, maft, maskclip, naclip, rcs, scclip, sclip, tagclip, zegclip"
    with pytest.raises(ValueError, match=f"method: expected one of {known}, got 'zegclipp'; did you mean zegclip"):
        zs3fast.create_model("zegclipp")


def test_half_precision_text_is_promoted_not_renormalised() -> None:
    model = tiny_model("zegclip")
    images, text = tiny_inputs()
    half = text.half()
    assert torch.equal(model(images, half).mask_logits, model(images, half.float()).mask_logits)
