"""ClsCLIP: the plain structure, what is shared, chunks, pairs, variants, losses, settings, bad input."""

from __future__ import annotations

import copy
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

import zs3fast
from bench.baselines.clsclip import PlainClsCLIP
from tests.goldens_data import relative
from tests.tiny import CLIP, NUM_CLASSES, SEEN, tiny_labels
from zs3fast.models.clsclip import ClsCLIP
from zs3fast.text import TextEncoder
from zs3fast.weights import load, save

DEEP = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "layers": 6}}
TEXT_WIDTH, WIDTH = 64, 48
PAIRS = torch.tensor([[1, 6], [0, 2], [1, 0], [1, 0], [0, 4]])


def make(**options: object) -> ClsCLIP:
    torch.manual_seed(0)
    settings = {"clip": DEEP, "image_size": 64, "num_classes": NUM_CLASSES, "seen": SEEN, "decoder_ffn": 64}
    model = zs3fast.create_model("clsclip", **{**settings, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # nothing at a value where a mistake would not show
            parameter.add_((1.0 if name.startswith("navigation") else 0.1) * torch.randn_like(parameter))
    return model


def make_inputs(batch: int = 2, size: tuple[int, int] = (64, 64), classes: int = NUM_CLASSES):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=generator), torch.randn(classes, TEXT_WIDTH, generator=generator)


def plain(model: ClsCLIP, nav_layers: tuple[int, ...] = (2, 3, 4)) -> PlainClsCLIP:
    """The benchmark's plain structure with the same weights."""
    sizes = {"width": WIDTH, "layers": 6, "heads": 4, "grid": 4, "embed_dim": 32, "text_width": TEXT_WIDTH}
    twin = PlainClsCLIP(nav_layers=nav_layers, **sizes, decoder_ffn=64).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def test_output_contract() -> None:
    model = make()
    images, text = make_inputs(size=(64, 96))
    out = model(images, text)
    assert out.mask_logits.shape == (2, NUM_CLASSES, 64, 96)
    assert out.global_token.shape == (2, WIDTH) and out.patch_tokens.shape == (2, 24, WIDTH)
    assert out.trusty_logits is None and out.region_tokens is None
    assert model(images, text, PAIRS).mask_logits.shape == (5, 1, 64, 96)
    assert make(head="linear")(images, text).mask_logits.shape == (2, NUM_CLASSES, 4, 6)
    other = model(images, text.flip(0))
    assert torch.equal(other.patch_tokens, out.patch_tokens) and torch.equal(other.global_token, out.global_token)


def test_default_model_has_the_published_number_of_weights() -> None:
    """Spec sections 3 and 4: 1,181,952 in the L^i, 627,905 in the decoder; nothing else trains."""
    model = zs3fast.create_model("clsclip", num_classes=20)
    sizes = {name: p.numel() for name, p in model.trainable().items()}
    assert sum(n for name, n in sizes.items() if name.startswith("navigation.")) == 1_181_952
    assert sum(n for name, n in sizes.items() if name.startswith("decoder.")) == 627_905
    assert sum(sizes.values()) == 1_181_952 + 627_905
    assert model.image_size == 352 and model.embed_dim == 512
    with torch.no_grad():
        out = model.eval()(torch.randn(1, 3, 352, 352), torch.randn(1, 512))
    assert out.mask_logits.shape == (1, 1, 352, 352)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("nav_layers", [(2, 3, 4), (0, 1, 2), (1, 3, 5), (3, 4, 5)], ids=str)
def test_all_classes_at_once_equal_one_pass_a_pair(nav_layers: tuple[int, ...], grad: bool) -> None:
    model = make(nav_layers=nav_layers)
    images, text = make_inputs(size=(64, 96))
    with torch.set_grad_enabled(grad):
        assert relative(model(images, text).mask_logits, plain(model, nav_layers)(images, text)) < 1e-5


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 8, 14])
def test_chunks_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of pairs that divide neither images nor classes, both ways of asking."""
    model = make()
    images, text = make_inputs(batch=3)
    expected = plain(model)(images, text)
    model.memory_budget = at_once * 17 * 8 * WIDTH * 4
    assert model.pairs_at_once(images) == at_once
    suffix, chunks = model.encoder.suffix, []
    monkeypatch.setattr(
        model.encoder, "suffix", lambda *args, **options: chunks.append(suffix(*args, **options)) or chunks[-1]
    )
    with torch.no_grad():
        out = model(images, text)
        assert relative(out.mask_logits, expected) < 1e-5
        assert max(len(chunk) for chunk in chunks) <= at_once
        chunks.clear()
        pairs = model(images, text, PAIRS)
        assert relative(pairs.mask_logits[:, 0], expected[PAIRS[:, 0], PAIRS[:, 1]]) < 1e-5
        assert max(len(chunk) for chunk in chunks) <= at_once
    assert torch.equal(out.patch_tokens, pairs.patch_tokens) and len(out.patch_tokens) == 3


def test_the_prefix_runs_once_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(memory_budget=1)
    images, text = make_inputs()
    prefix, seen = model.encoder.prefix, []
    monkeypatch.setattr(model.encoder, "prefix", lambda images: seen.append(len(images)) or prefix(images))
    with torch.no_grad():
        model(images, text)
        assert seen == [1, 1]
        model(images, text, PAIRS)
        assert seen == [1, 1, 1, 1]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_pairs_are_entries_of_the_whole(grad: bool) -> None:
    model = make()
    images, text = make_inputs()
    with torch.set_grad_enabled(grad):
        whole, some = model(images, text).mask_logits, model(images, text, PAIRS).mask_logits
    assert relative(some[:, 0], whole[PAIRS[:, 0], PAIRS[:, 1]]) < 1e-5


@pytest.mark.parametrize("navigation", ["channel", "spatial"])
def test_gates_stand_on_plain_clip(navigation: str) -> None:
    model = make(navigation=navigation)
    images, text = make_inputs()
    assert not model.navigation and model.encoder.nav_layers == ()
    with torch.no_grad():
        out = model(images, text)
        patches = model.encoder.prefix(images).patches
        for b, c in ((0, 3), (1, 0)):
            gated = model.gate(patches[b : b + 1, None], text[None, c : c + 1])[:, 0]
            assert relative(out.mask_logits[b, c], model.decoder(gated, (4, 4))[0, 0]) < 1e-5
        some = model(images, text, PAIRS).mask_logits[:, 0]
        assert relative(some, out.mask_logits[PAIRS[:, 0], PAIRS[:, 1]]) < 1e-5
    assert torch.equal(out.patch_tokens, patches)
    assert {name.split(".")[0] for name in model.trainable()} == {"gate", "decoder"}


def test_prompt_tuning_trains_prompts_of_every_layer() -> None:
    model = make(num_prompts=5)
    images, text = make_inputs()
    assert "encoder.prompt_embeddings" in model.trainable()
    model.loss(model(images, text[SEEN]), tiny_labels())["loss"].backward()
    assert (model.encoder.prompt_embeddings.grad.abs().sum((1, 2)) > 0).all()
    with torch.no_grad():
        assert relative(model(images, text).mask_logits, plain_without_prompts(model)(images, text)) > 1e-2


def plain_without_prompts(model: ClsCLIP) -> PlainClsCLIP:
    bare = make()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k in bare.state_dict()})
    return plain(bare)


def test_cached_class_tokens_follow_text_and_weights() -> None:
    model = make()
    images, text = make_inputs()

    def check() -> None:
        with torch.no_grad():
            got = model(images, text).mask_logits
            again = model(images, text).mask_logits
        assert torch.equal(got, again) and relative(got, plain(model)(images, text)) < 1e-5

    check()
    text.mul_(-1)  # the same tensor, written to
    check()
    for name in ("navigation.2.weight", "navigation.4.bias"):
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        check()
    model.load_state_dict(make(memory_budget=1).state_dict())
    check()


def test_only_navigation_and_decoder_train() -> None:
    model = make().train()
    images, text = make_inputs()
    before = copy.deepcopy(model.encoder.state_dict())
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    model.loss(model(images, text, PAIRS), tiny_labels(), pairs=PAIRS)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.navigation.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())
    assert {name.split(".")[0] for name in model.trainable()} == {"navigation", "decoder"}
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())


def test_gradients_equal_those_of_one_pass_a_pair() -> None:
    model = make()
    twin = plain(model)
    images, text = make_inputs()
    model(images, text).mask_logits.square().mean().backward()
    twin(images, text).square().mean().backward()
    for name, parameter in model.trainable().items():
        assert relative(parameter.grad, twin.get_parameter(name).grad) < 1e-4, name


def test_navigation_starts_small() -> None:
    torch.manual_seed(0)
    model = zs3fast.create_model("clsclip", clip=DEEP, image_size=64)
    weight = torch.cat([linear.weight.flatten() for linear in model.navigation.values()])
    assert 0.019 < weight.std() < 0.021 and all((linear.bias == 0).all() for linear in model.navigation.values())


@pytest.mark.parametrize("head", ["conv", "linear"])
@pytest.mark.parametrize("size", [(64, 64), (100, 75)])
def test_scores_masks_and_labels(size: tuple[int, int], head: str) -> None:
    model = make(head=head)
    images, text = make_inputs()
    with torch.no_grad():
        out = model(images, text)
        scores = model.class_scores(out, size)
        labels = model.predict_labels(out, size)
        background = model.predict_labels(out, size, torch.int32, threshold=0.6)
        masks = model.predict_masks(out, size, 0.6)
    expected = F.interpolate(out.mask_logits, size=size, mode="bilinear", align_corners=False).sigmoid()
    torch.testing.assert_close(scores, expected)
    top = scores.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-6
    assert torch.equal(labels[clear], scores.argmax(1)[clear]) and clear.float().mean() > 0.9
    sure = clear & ((top[:, 0] - 0.6).abs() > 1e-6)
    assert torch.equal(background[sure], torch.where(top[:, 0] > 0.6, labels, -1)[sure].int())
    assert (background == -1).any() and (background >= 0).any()
    assert torch.equal(masks, scores > 0.6)


def test_labels_of_pairs_are_their_binary_masks() -> None:
    model = make()
    images, text = make_inputs()
    with torch.no_grad():
        out = model(images, text, PAIRS)
        labels = model.predict_labels(out, (80, 80), threshold=0.5)
        masks = model.predict_masks(out, (80, 80))
    assert labels.shape == (5, 80, 80) and set(labels.unique().tolist()) == {-1, 0}
    assert ((labels == 0) == masks[:, 0]).float().mean() > 0.999


@pytest.mark.parametrize("setting", ["inductive", "supervised"])
@pytest.mark.parametrize("size", [(64, 64), (80, 48)])
def test_loss_is_the_mean_over_valid_pixels(setting: str, size: tuple[int, int]) -> None:
    model = make(loss_weights={"dice": 0.5})
    images, text = make_inputs()
    labels, known = tiny_labels(size=size), SEEN if setting == "inductive" else list(range(NUM_CLASSES))
    out = model(images, text[known])
    losses = model.loss(out, labels, setting)
    z = F.interpolate(out.mask_logits, size=size, mode="bilinear", align_corners=False)
    bce, dice = [], []
    for b in range(2):
        for i, c in enumerate(known):
            valid = labels[b] != 255
            t, p = (labels[b] == c)[valid].float(), z[b, i][valid].sigmoid()
            bce.append(-(t * p.log() + (1 - t) * (1 - p).log()))
            dice.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    torch.testing.assert_close(losses["loss_mask"], torch.cat(bce).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss_dice"], 0.5 * torch.stack(dice).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"], losses["loss_mask"] + losses["loss_dice"])
    assert set(make().loss(out, labels, setting)) == {"loss_mask", "loss"}


def test_loss_of_pairs_is_that_of_their_masks() -> None:
    """Each pair against its own image's labels; unseen pixels are background, not ignored."""
    model = make()
    images, text = make_inputs()
    labels = tiny_labels()
    out = model(images, text, PAIRS)
    losses = model.loss(out, labels, pairs=PAIRS)
    valid = labels[PAIRS[:, 0]] != 255
    target = (labels[PAIRS[:, 0]] == PAIRS[:, 1, None, None]).float()
    expected = F.binary_cross_entropy_with_logits(out.mask_logits[:, 0][valid], target[valid])
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=1e-6)


def test_nothing_valid_costs_nothing() -> None:
    model = make()
    images, text = make_inputs()
    loss = model.loss(model(images, text[SEEN]), torch.full((2, 64, 64), 255))["loss"]
    loss.backward()
    assert loss == 0 and all(p.grad.abs().sum() == 0 for p in model.navigation.parameters())


def test_a_few_steps_on_one_batch_lower_the_loss() -> None:
    model = make().train()
    images, text = make_inputs()
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.loss(model(images, text, PAIRS), tiny_labels(), pairs=PAIRS)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_clip_weights_and_text_tokens_from_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pretrained` fills the tower; the text tower's tokens have the width the model wants."""
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**DEEP).eval()
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    model = zs3fast.create_model("clsclip", clip=DEEP, pretrained=str(tmp_path / "clip.pt"), image_size=96).eval()
    assert torch.equal(model.encoder.positional_embedding, theirs.visual.positional_embedding)
    assert model.weights_loaded
    encoder = TextEncoder.from_open_clip(DEEP, tmp_path / "clip.pt", cache=False)
    text = encoder.encode(["cat", "potted plant"], model.templates, text_token=model.text_token)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 96), text).mask_logits.shape == (1, 2, 96, 96)
    projected = zs3fast.create_model("clsclip", clip=DEEP, image_size=64, text_token="projected")
    assert projected.embed_dim == encoder.encode(["cat"], text_token=projected.text_token).shape[1] == 32


@pytest.mark.parametrize("options", [{}, {"navigation": "spatial"}, {"num_prompts": 2, "head": "linear"}], ids=str)
def test_saved_models_come_back(options: dict[str, object], tmp_path: Path) -> None:
    model = make(**options, class_names=list("abcdefg"), memory_budget=1 << 20)
    save(model, tmp_path / "model.safetensors")
    again, extra = load(tmp_path / "model.safetensors")
    inputs = make_inputs()
    assert again.config == model.config and again.weights_loaded and not extra
    with torch.no_grad():
        assert torch.equal(again(*inputs).mask_logits, model(*inputs).mask_logits)


def test_modes_agree() -> None:
    """Inference mode, copies, half precision, autocast."""
    model, inputs = make(), make_inputs()
    expected = model(*inputs).mask_logits.detach()
    with torch.inference_mode():
        assert relative(model(*inputs).mask_logits, expected) < 1e-5
    with torch.no_grad():
        assert relative(copy.deepcopy(model)(*inputs).mask_logits, expected) < 1e-5
        assert relative(model.double()(*(t.double() for t in inputs)).mask_logits, expected.double()) < 1e-5
        half = model.bfloat16()(*(t.bfloat16() for t in inputs)).mask_logits
    assert half.dtype == torch.bfloat16 and relative(half.float(), expected) < 0.05
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(model(inputs[0], inputs[1], PAIRS), tiny_labels(), pairs=PAIRS)["loss"]
    loss.backward()
    plain_loss = model.loss(model(inputs[0], inputs[1], PAIRS), tiny_labels(), pairs=PAIRS)["loss"]
    torch.testing.assert_close(loss, plain_loss, rtol=0.02, atol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.trainable().values())


def test_compile_and_export() -> None:
    torch._dynamo.reset()
    model, inputs = make(), make_inputs()
    with torch.no_grad():
        expected = model(*inputs).mask_logits
        assert relative(torch.compile(model, fullgraph=True)(*inputs).mask_logits, expected) < 1e-5
        assert relative(torch.export.export(model, inputs).module()(*inputs).mask_logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nav_layers": ()}, "nav_layers: expected at least one layer"),
        ({"nav_layers": (2, 9)}, r"nav_layers: expected different layers in 0..5, got \[2, 9\]"),
        ({"navigation": "cross"}, "navigation: expected one of replace, channel, spatial, got 'cross'"),
        ({"text_token": "raw"}, "text_token: expected one of pre_projection, projected, got 'raw'"),
        ({"seen_offset": 0.1}, "seen_offset: ClsCLIP has no calibration, expected 0, got 0.1"),
        ({"image_size": 60}, "image_size: expected a multiple of the patch size 16, got 60"),
        ({"memory_budget": 0}, "memory_budget: expected a positive number of bytes, got 0"),
        ({"loss_weights": {"focal": 1.0}}, "loss_weights: expected terms of"),
        ({"head": "mlp"}, "head: expected one of conv, linear, got 'mlp'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([[0, 0]], TypeError, r"pairs: expected an int64 tensor \[P, 2\] of \(image, class\), got list"),
        (torch.zeros(2, 2), TypeError, "pairs: expected an int64 tensor .* got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.long), ValueError, r"pairs: expected \[P, 2\] .* got \[2, 3\]"),
        (torch.zeros(0, 2, dtype=torch.long), ValueError, "with P >= 1"),
        (
            torch.tensor([[0, 1], [2, 0]]),
            ValueError,
            r"pairs: row 1 is \[2, 0\], expected an image in 0..1 and a class",
        ),
        (torch.tensor([[0, 7]]), ValueError, r"pairs: row 0 is \[0, 7\], .* a class in 0..6"),
        (torch.tensor([[-1, 0]]), ValueError, r"pairs: row 0 is \[-1, 0\]"),
    ],
)
def test_bad_pairs_are_named(pairs: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(*make_inputs(), pairs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.zeros(3, 32), r"text_embeddings: expected \[C, 64\] with C >= 1, got \[3, 32\]"),
        (torch.zeros(0, 64), r"text_embeddings: expected \[C, 64\] with C >= 1"),
    ],
)
def test_bad_text_is_named(text: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(make_inputs()[0], text)


def test_bad_loss_input_is_named() -> None:
    model, (images, text), labels = make(), make_inputs(), tiny_labels()
    out, some = model(images, text[SEEN]), model(images, text, PAIRS)
    unseen = torch.tensor([[0, 3]])
    for args, options, message in [
        ((out, labels, "transductive"), {}, "setting: expected one of inductive, supervised"),
        (
            (out, labels, "supervised"),
            {},
            r"out: expected 2 images with 7 classes, as labels and setting \(supervised\)",
        ),
        ((out, labels[:1]), {}, "out: expected 1 images with 5 classes"),
        ((out, labels), {"pairs": PAIRS}, "out: expected that of these 5 pairs, got 2 x 5 masks"),
        ((some, labels), {}, "out: expected 2 images with 5 classes"),
        ((model(images, text, unseen), labels), {"pairs": unseen}, r"pairs: .* seen classes only, got \[3\] in row 0"),
        ((out, torch.full((2, 64, 64), 9)), {}, r"labels: value 9 at \[b, y, x\] = \[0, 0, 0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.loss(*args, **options)
    with pytest.raises(TypeError, match="dtype: background is -1, expected a signed type"):
        model.predict_labels(out, (64, 64), torch.uint8, threshold=0.5)
    nameless = make(num_classes=None, seen=None)
    with pytest.raises(ValueError, match="num_classes: expected a number for the inductive loss"):
        nameless.loss(some, labels, pairs=PAIRS)
    assert nameless.loss(some, labels, "supervised", pairs=PAIRS)["loss"] > 0


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_empty_batch(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        out = make()(torch.zeros(0, 3, 64, 64), torch.randn(5, 64))
    assert out.mask_logits.shape == (0, 5, 64, 64)
