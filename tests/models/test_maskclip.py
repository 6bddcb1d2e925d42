"""MaskCLIP against open_clip's own modules, its contract, the Segmenter and the command around it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import zs3fast
from tests.goldens_data import relative
from tests.inference.test_segmenter import photo
from tests.tiny import CLIP, NUM_CLASSES, tiny_inputs, tiny_labels, tiny_model
from tests.tiny_clip import text_state, tiny_clip
from zs3fast import ops, weights
from zs3fast.cli import app
from zs3fast.encoders.config import vision_config
from zs3fast.encoders.dense_clip import DenseClipViT
from zs3fast.encoders.open_clip_weights import load_tower_state
from zs3fast.inference.predictors import prepare
from zs3fast.inference.segmenter import Segmenter
from zs3fast.models.maskclip import MaskCLIP
from zs3fast.text import MULTI, TextEncoder, class_names
from zs3fast.utils.open_clip import uses_quick_gelu

NAMES = ["cat", "dog", "sofa", "sky", "grass"]


def from_open_clip(theirs: open_clip.CLIP, path: Path, clip: dict = CLIP, **options: object) -> MaskCLIP:
    """Ours, with the weights of theirs out of a file, as `pretrained` takes it."""
    torch.save(theirs.state_dict(), path)
    return zs3fast.create_model("maskclip", clip=clip, pretrained=str(path), **options).eval()


def plain_patches(visual: open_clip.transformer.VisionTransformer, images: Tensor, attention: str, residual: bool):
    """The definition, head by head, out of open_clip's modules."""
    x = visual.conv1(images)
    grid = x.shape[-2:]
    side = visual.grid_size[0]
    table = visual.positional_embedding[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if tuple(grid) != (side, side):
        scales = [(length + 0.1) / side for length in grid]
        table = F.interpolate(table, scale_factor=scales, mode="bicubic", recompute_scale_factor=False)
    patches = x.flatten(2).transpose(1, 2) + table.flatten(2).transpose(1, 2)
    token = (visual.class_embedding + visual.positional_embedding[0]).expand(len(images), 1, -1)
    x = visual.ln_pre(torch.cat([token, patches], 1))
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    width, heads = x.shape[-1], last.attn.num_heads
    q, k, v = F.linear(last.ln_1(x), last.attn.in_proj_weight, last.attn.in_proj_bias).split(width, -1)
    if attention == "value":
        mixed = v
    else:
        parts = []
        for part in (slice(i * width // heads, (i + 1) * width // heads) for i in range(heads)):
            scale = (width // heads) ** -0.5
            maps = [(scale * a[..., part] @ a[..., part].transpose(1, 2)).softmax(-1) for a in (q, k)]
            parts.append((maps[0] + maps[1]) @ v[..., part])
        mixed = torch.cat(parts, -1)
    out = last.attn.out_proj(mixed)
    if residual:
        out = x + out
        out = out + last.mlp(last.ln_2(out))
    return (visual.ln_post(out) @ visual.proj)[:, 1:], tuple(grid)


@pytest.mark.parametrize("residual", [False, True], ids=["bare", "residual"])
@pytest.mark.parametrize("attention", ["value", "self-self"])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (48, 112)], ids="{0[0]}x{0[1]}".format)
def test_equals_the_construction_from_open_clips_modules(tmp_path, size, attention, residual) -> None:
    theirs = tiny_clip()
    model = from_open_clip(theirs, tmp_path / "clip.pt", attention=attention, residual=residual)
    images, text = tiny_inputs(size=size)
    with torch.no_grad():
        out = model(images, 3 * text)
        patches, grid = plain_patches(theirs.visual, images, attention, residual)
        expected = 100 * torch.stack([F.cosine_similarity(patches, row, dim=-1) for row in text], 1)
        if size == (64, 64):
            assert relative(out.global_token, theirs.encode_image(images, normalize=True)) < 1e-5
    assert out.mask_logits.shape == (2, NUM_CLASSES, *grid)
    assert relative(out.mask_logits.flatten(2), expected) < 1e-5
    assert relative(out.patch_tokens, F.normalize(patches, dim=-1)) < 1e-5


@pytest.mark.parametrize("quick", [True, False], ids=["quick_gelu", "gelu"])
@pytest.mark.parametrize("patch", [8, 14, 32])
def test_any_patch_size_and_activation(tmp_path, patch, quick) -> None:
    vision = {**CLIP["vision_cfg"], "patch_size": patch, "image_size": 3 * patch}
    clip = {**CLIP, "vision_cfg": vision, "quick_gelu": quick}
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**clip).eval()
    model = from_open_clip(theirs, tmp_path / "clip.pt", clip)
    assert model.image_size == 6 * patch, "twice CLIP's own"
    images, text = tiny_inputs(size=(3 * patch, 4 * patch))
    with torch.no_grad():
        patches, grid = plain_patches(theirs.visual, images, "value", False)
        out = model(images, text)
    assert relative(out.mask_logits, 100 * (text @ F.normalize(patches, dim=-1).mT).unflatten(-1, grid)) < 1e-5


@pytest.mark.parametrize(
    ("name", "side"),
    [("ViT-B-16", 448), ("ViT-B-32", 448), ("ViT-L-14", 448), ("ViT-L-14-336", 672), ("ViT-H-14-quickgelu", 448)],
)
def test_open_clips_vits_fit(name: str, side: int) -> None:
    with torch.device("meta"):
        model = zs3fast.create_model("maskclip", clip=name)
        theirs = open_clip.create_model(name, load_weights=False, device="meta").visual
    own = {key: value.shape for key, value in model.encoder.state_dict().items()}
    assert own == {key: value.shape for key, value in theirs.state_dict().items()} and model.image_size == side


def test_the_activation_follows_the_tag_or_the_name() -> None:
    """For both towers alike; of a file see tests/utils/test_open_clip.py."""
    for name, pretrained, quick in (
        ("ViT-B-16", "openai", True),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
        ("ViT-B-16-quickgelu", "clip.pt", True),
    ):
        assert vision_config(name, pretrained).quick_gelu == uses_quick_gelu(name, pretrained) == quick


@pytest.mark.parametrize("attention", ["value", "self-self"])
def test_a_patch_sees_itself_alone_or_what_is_like_it(attention: str) -> None:
    """Of the tokens that enter the last block, one is changed: do other patches notice?"""
    model = tiny_model("maskclip", attention=attention)
    images, _ = tiny_inputs(batch=1)
    change = torch.zeros(1, 17, 48)
    before = model.encoder(images).patch_tokens
    change[0, 4] = torch.randn(48, generator=torch.Generator().manual_seed(5))  # the class token is the first
    hook = model.encoder.transformer.resblocks[-2].register_forward_hook(lambda _m, _i, out: out + change)
    after = model.encoder(images).patch_tokens
    hook.remove()
    moved = (before - after).norm(dim=-1)[0] > 1e-5
    assert moved[3]
    assert moved.sum() == (1 if attention == "value" else 16)


def test_scores_are_probabilities_and_labels_their_argmax() -> None:
    model = tiny_model("maskclip")
    images, text = tiny_inputs(size=(64, 96))
    out = model(images, text)
    scores = model.class_scores(out, (75, 101))
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 75, 101))
    best = scores.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-5
    for backend in ("reference", "auto"):
        with ops.use_backend(backend):
            labels = model.predict_labels(out, (75, 101))
            assert model.predict_labels(out, (75, 101), torch.uint8).dtype == torch.uint8
        assert labels.dtype == torch.int64 and torch.equal(labels[clear], scores.argmax(1)[clear])
    assert clear.float().mean() > 0.99 and len(labels.unique()) > 2


@pytest.mark.parametrize("logit_scale", [1.0, 100.0, 5000.0])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_labels_hold_where_sigmoids_of_the_logits_would_tie(logit_scale: float, shift: float) -> None:
    """Real CLIP's logits are 15 to 35, where float32 has sigmoid(x) = 1; the worst case is cosines of 1 and -1."""
    model = tiny_model("maskclip", logit_scale=logit_scale)
    images, text = tiny_inputs(batch=1)
    generator = torch.Generator().manual_seed(3)
    near = shift + 0.02 * torch.randn(1, NUM_CLASSES, 8, 8, generator=generator)
    far = torch.randint(0, 2, (1, NUM_CLASSES, 8, 8), generator=generator) * 2.0 - 1 + 1e-3 * near
    out = model(images, text)
    for cosines in (near, far):
        given = type(out)(logit_scale * cosines, out.global_token, out.patch_tokens)
        z = F.interpolate(cosines.double(), (77, 90), mode="bilinear", align_corners=False)
        best = z.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] > 2e-6
        assert clear.float().mean() > 0.95
        for backend in ("reference", "auto"):
            with ops.use_backend(backend):
                labels = model.predict_labels(given, (77, 90))
            assert torch.equal(labels[clear], z.argmax(1)[clear])


def test_nothing_trains_and_loss_says_so() -> None:
    model = tiny_model("maskclip")
    images, text = tiny_inputs()
    assert model.trainable() == {} and model.seen == [0, 1, 2, 4, 6]
    assert zs3fast.create_model("maskclip", clip=CLIP, num_classes=7).seen == []
    with pytest.raises(TypeError, match="loss: MaskCLIP has nothing to train"):
        model.loss(model(images, text), tiny_labels(), setting="supervised")
    text.requires_grad_()
    model(images, text).mask_logits.sum().backward()
    assert text.grad.abs().sum() > 0, "what a user learns on top of it gets gradients"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "keys"}, "attention: expected one of value, sclip, .*, got 'keys'"),
        ({"image_size": 60}, "image_size: expected a multiple of the patch size 16, got 60"),
        ({"logit_scale": 0}, "logit_scale: expected a positive number, got 0"),
        ({"logit_scale": float("nan")}, "logit_scale: expected a positive number, got nan"),
        ({"seen_offset": 0.1}, "seen_offset: MaskCLIP has no calibration, expected 0, got 0.1"),
        ({"loss_weights": {"mask": 1.0}}, "loss_weights: expected terms of"),
        ({"clip": "RN50"}, "got RN50, whose image tower is no plain CLIP ViT"),
        ({"pretrained": "openai"}, "pretrained: expected a file or a tag of this model .*, got 'openai'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model("maskclip", **options)


def test_bad_input() -> None:
    model, (images, text) = tiny_model("maskclip"), tiny_inputs()
    with pytest.raises(ValueError, match=r"images: .* got 15 x 64"):
        model(images[:, :, :15], text)
    with pytest.raises(ValueError, match=r"text_embeddings: expected \[C, 32\]"):
        model(images, text[:, :31])


def test_settings_survive_a_round_trip(tmp_path) -> None:
    model = tiny_model("maskclip", attention="self-self", residual=True, logit_scale=50.0, image_size=128)
    weights.save(model, tmp_path / "m.safetensors")
    again, _ = weights.load(tmp_path / "m.safetensors")
    inputs = tiny_inputs()
    assert again.config == model.config and again.trainable() == {}
    assert torch.equal(again(*inputs).mask_logits, model(*inputs).mask_logits)


def test_half_precision_and_autocast() -> None:
    model, (images, text) = tiny_model("maskclip"), tiny_inputs()
    with torch.no_grad():
        expected = model(images, text).mask_logits
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(images, text).mask_logits
        half = tiny_model("maskclip").bfloat16()(images.bfloat16(), text.bfloat16()).mask_logits
    for logits in (cast, half):
        assert logits.dtype == torch.float32 and relative(logits, expected) < 0.05
        assert len(logits.unique()) > 0.9 * logits.numel(), "not rounded to bfloat16"


def test_compiles_and_exports() -> None:
    class ImageToLabels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_model("maskclip", attention="self-self")

        def forward(self, images: Tensor, text: Tensor) -> Tensor:
            return self.model.predict_labels(self.model(images, text), (70, 90))

    torch._dynamo.reset()
    pipeline, inputs = ImageToLabels(), tiny_inputs(size=(64, 96))
    with torch.no_grad():
        expected = pipeline(*inputs)
        compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager")  # one graph; what it becomes is torch's
        for other in (torch.export.export(pipeline, inputs).module(), compiled):
            assert (other(*inputs) == expected).float().mean() > 0.999


def slow_scores(model: MaskCLIP, picture: np.ndarray, text: Tensor) -> Tensor:
    """Short side to the window, half-overlapping windows, logits averaged at canvas size, resized, softmax."""
    side = model.image_size
    canvas = prepare(picture, side, model.pixel_mean, model.pixel_std, antialias=True)
    height, width = canvas.shape[-2:]
    starts = [[*range(0, length - side, side // 2), length - side] for length in (height, width)]
    total, cover = torch.zeros(1, len(text), height, width), torch.zeros(height, width)
    with torch.no_grad():
        for y in starts[0]:
            for x in starts[1]:
                logits = model(canvas[None, :, y : y + side, x : x + side], text).mask_logits
                total[..., y : y + side, x : x + side] += F.interpolate(logits, (side, side), mode="bilinear")
                cover[y : y + side, x : x + side] += 1
    return F.interpolate(total / cover, picture.shape[:2], mode="bilinear")[0].softmax(0)


@pytest.mark.parametrize("size", [(64, 64), (75, 100), (31, 97), (200, 130), (1, 1)], ids="{0[0]}x{0[1]}".format)
def test_segmenter_equals_the_slow_composition(size: tuple[int, int]) -> None:
    model, text, picture = tiny_model("maskclip", class_names=None), tiny_inputs(classes=5)[1], photo(*size)
    result = Segmenter(model, text_embeddings=text, class_names=NAMES, window_batch=2)(picture)
    scores = slow_scores(model, picture, text)
    np.testing.assert_allclose(result.scores, scores.amax(0).numpy(), atol=1e-4)
    best = scores.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-3).numpy()
    assert clear.mean() > 0.95 and np.array_equal(result.labels[clear], scores.argmax(0).numpy()[clear])
    assert result.scores.min() >= 1 / 5 - 1e-6 and result.scores.max() <= 1 + 1e-6


def test_large_pictures_are_averaged_not_sampled() -> None:
    """Stripes one pixel wide, shrunk: CLIP's own preprocessing gives grey; plain bilinear sampling gives stripes."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    even = prepare(stripes, 64, (0, 0, 0), (1, 1, 1), antialias=True)
    assert (even - 0.5).abs().max() < 0.02
    sampled = prepare(stripes, 60, (0, 0, 0), (1, 1, 1))
    assert (sampled - 0.5).abs().max() > 0.4, "the guard of this test"


def test_minimum_score_and_background_prompts(tmp_path) -> None:
    theirs = tiny_clip()
    seg = Segmenter(
        from_open_clip(theirs, tmp_path / "clip.pt"),
        text_encoder=TextEncoder.from_state_dict(text_state(theirs), cache=False),
        class_names=NAMES,
    )
    assert seg.templates == MULTI, "whatever the length of the list"
    picture = photo(75, 100)
    plain = seg(picture)
    assert plain.labels.min() >= 0, "by default every pixel has a class"
    names = np.array(NAMES)[plain.labels]
    winner = NAMES[int(np.bincount(plain.labels.ravel()).argmax())]
    others = [name for name in NAMES if name != winner]
    outside = seg(picture, others, background=[winner])
    assert ((outside.labels == -1) == (names == winner)).mean() > 0.99 and winner not in outside.class_names
    limit = float(np.median(plain.scores))
    cut = seg(picture, min_score=limit)
    assert np.array_equal(cut.labels, np.where(plain.scores >= limit, plain.labels, -1))


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to be in, with a photo and its own cache."""
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo(30, 40)).save("x.png")
    return tmp_path


def test_the_command_needs_pretrained_alone(place) -> None:
    """Weights for both towers out of one file, no --weights, and no word of untrained parts."""
    torch.manual_seed(0)
    clip = "ViT-S-32-alt"
    theirs = open_clip.create_model(clip, load_weights=False)
    torch.save(theirs.state_dict(), "clip.pt")
    common = ("segment", "x.png", "--method", "maskclip", "--clip", clip)
    output = run(*common, "--pretrained", "clip.pt", "-c", "cat, dog", "--background", "sky", "-o", "out")
    assert "untrained" not in output and "1 of 1 images segmented" in output
    model = zs3fast.create_model("maskclip", clip=clip, pretrained="clip.pt")
    expected = Segmenter(model)("x.png", ["cat", "dog"], background="sky").labels
    labels = np.array(Image.open("out/x_labels.png"))
    assert np.array_equal(labels, np.where(expected < 0, 255, expected))
    listed = run(*common, "--pretrained", "clip.pt", "--attention", "self-self", "--templates", "single", "-o", "all")
    assert "no class list given, so the 59 names of context59 compete" in listed
    summary = json.loads((place / "all" / "x.json").read_text())
    assert [entry["name"] for entry in summary["classes"]] == class_names("context59")
    assert "all weights are random" in run(*common, "--untrained", "-c", "cat, dog", "-o", "random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "maskclip", "--attention", "keys"), "attention: expected one of value, sclip, "),
        (("--attention", "value"), "--attention: expected with --method maskclip and no --weights, got 'value'"),
        (("--method", "maskclip", "--clip", "RN50"), "got RN50, whose image tower is no plain CLIP ViT"),
        (
            ("--method", "maskclip", "--pretrained", "opneai"),
            "pretrained: expected a file or a tag of this model",
        ),
    ],
)
def test_mistakes_are_one_line(place, options: tuple[str, ...], message: str) -> None:
    output = run("segment", "x.png", "-c", "cat", *options, code=2)
    assert message in output and output.startswith("error") and not (place / "zs3fast_out").exists()


def test_without_network_one_line_says_how_to_get_the_weights(place, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    output = run("segment", "x.png", "--method", "maskclip", "--pretrained", "openai", "-c", "cat", code=2)
    assert output.startswith("error --pretrained: the weights 'openai' of ViT-B-16 are not on this machine")
    assert "Run once with network access" in output and "Traceback" not in output


def test_weights_of_another_tower_are_refused() -> None:
    state = tiny_clip().visual.state_dict()
    state.pop("proj")
    with pytest.raises(ValueError, match=r"pretrained: the weights do not fit the model\n  missing \(1\): proj"):
        load_tower_state(DenseClipViT(tiny_model("maskclip").encoder.config), state)


def test_one_class_and_many(tmp_path) -> None:
    model = tiny_model("maskclip", num_classes=None, seen=None)
    picture = photo(70, 90)
    for classes in (1, 171):
        text = tiny_inputs(classes=classes)[1]
        result = Segmenter(model, text_embeddings=text, class_names=[f"class {i}" for i in range(classes)])(picture)
        scores = slow_scores(model, picture, text)
        if classes == 1:
            assert (result.labels == 0).all() and np.allclose(result.scores, 1)
        else:
            assert (result.labels == scores.argmax(0).numpy()).mean() > 0.99
