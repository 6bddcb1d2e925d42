"""The training-free family against what the official code answered, and what it does beyond that code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zs3fast
from tests.goldens_data import Golden, golden_files, relative
from tests.tiny import CLIP, tiny_inputs
from zs3fast import weights
from zs3fast.encoders import self_calibrated
from zs3fast.encoders.clip_vit import resize_positions
from zs3fast.encoders.dense_clip import ATTENTIONS, omega
from zs3fast.inference.averaged_windows import AveragedWindows
from zs3fast.inference.predictors import Request
from zs3fast.inference.window_protocols import WindowProtocol
from zs3fast.labels.softmax import softmax_scores
from zs3fast.models.maskclip import MaskCLIP

GOLDENS = golden_files("training_free")
NAMES = {"maskclip": {"attention": "value"}, "resclip_rcs": {"attention": "rcs"}}
NAMES |= {"naclip_std1": {"attention": "naclip", "std": 1.0}, "scclip_nocls": {"attention": "scclip", "c": 0.0}}


@pytest.fixture(scope="module", params=GOLDENS, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def meta_of(golden: Golden) -> dict[str, object]:
    return json.loads(str(golden._arrays["meta"]))


def model_of(golden: Golden, **options: object) -> MaskCLIP:
    meta = meta_of(golden)
    side = meta["grid"] * meta["patch"]
    vision = {
        "width": meta["width"],
        "layers": meta["layers"],
        "head_width": meta["width"] // meta["heads"],
        "patch_size": meta["patch"],
        "image_size": side,
    }
    clip = {"embed_dim": meta["embed"], "vision_cfg": vision, "text_cfg": {}}
    model = zs3fast.create_model("maskclip", clip=clip, quick_gelu=True, image_size=meta["crop"], **options)
    model.encoder.load_state_dict(golden.group("weight"))
    return model.eval()


def patches_of(model: MaskCLIP, images: Tensor) -> Tensor:
    with torch.no_grad():
        features = model.encoder(images)
    return features.patch_tokens.mT.unflatten(-1, features.grid_size)


RUNS = (
    *("maskclip", "sclip", "sclip_reduced", "clearclip", "naclip", "naclip_std1", "kk", "nonly"),
    *("resclip_rcs", "vanilla", "scclip", "scclip_nocls"),
)


@pytest.mark.parametrize("run", RUNS)
def test_patches_equal_the_official_code(golden: Golden, run: str) -> None:
    model = model_of(golden, **NAMES.get(run, {"attention": run}))
    assert relative(patches_of(model, golden["input/windows"]), golden[f"eval/{run}/patches"]) < 1e-5
    if not run.startswith("scclip"):  # whose official code raises IndexError there
        assert relative(patches_of(model, golden["input/wide"]), golden[f"eval/{run}/patches_wide"]) < 1e-5


def test_parts_equal_the_official_code(golden: Golden) -> None:
    model, (h, w) = model_of(golden, attention="scclip"), golden["eval/sclip/patches_wide"].shape[-2:]
    side = meta_of(golden)["grid"]
    for grid, key in (((side, side), "omega"), ((h, w), "omega_wide")):
        expected = golden[f"eval/naclip/{key}"]
        got = omega(grid, 5.0, expected)
        assert relative(got, expected[1:]) < 1e-6 and not expected[0].any()
    encoder = model.encoder
    got = resize_positions(encoder.positional_embedding, (h, w), *encoder.position_resize)
    assert relative(got, golden["eval/sclip/positions_wide"]) < 1e-6
    entering: list[Tensor] = []
    encoder.transformer.resblocks[-1].ln_1.register_forward_hook(lambda _m, i, _o: entering.append(i[0]))
    patches_of(model, golden["input/windows"])
    x = entering[0][:, 1:]
    assert relative(self_calibrated.outlier_scores(x), golden["eval/scclip/lof"]) < 1e-5
    odd = torch.stack([row.nonzero()[:, 0] for row in self_calibrated.anomalies(x)])
    assert torch.equal(odd, golden["eval/scclip/outliers"].sort(1).values)


def plain_self_calibrated(model: MaskCLIP, images: Tensor, blocks: tuple[int, int, list[int]]) -> Tensor:
    """The definition, one image at a time, with every N x N matrix: [B, D, h, w]."""
    encoder, out = model.encoder, []
    last = encoder.transformer.resblocks[-1]
    width, heads = encoder.config.width, encoder.config.heads
    similar, after, fused = blocks
    for image in images:
        x, (h, w) = encoder.embed(image[None])
        states = []
        for block in encoder.transformer.resblocks[:-1]:
            x = block(x)
            states.append(x[0])
        token, patches = x[0, :1], x[0, 1:]
        distance = (patches[:, None].double() - patches[None]).square().sum(-1)
        near = distance.argsort(1)[:, 1:31]
        reach = distance.gather(1, near[:, -1:])[:, 0]
        scores = torch.stack([reach[i] * (1 / reach[near[i]]).mean() for i in range(h * w)])
        odd = (scores > scores.quantile(0.95)).tolist()

        def repair(z: Tensor, odd: list[bool] = odd, h: int = h, w: int = w) -> Tensor:
            z = z.clone()
            for i in [i for i in range(h * w) if odd[i]]:
                y, x = divmod(i, w)
                around = [(a, b) for a in (y - 1, y, y + 1) for b in (x - 1, x, x + 1) if 0 <= a < h and 0 <= b < w]
                sound = [a * w + b for a, b in around if not odd[a * w + b]]
                z[i] = z[sound].mean(0) if sound else z[i]
            return z

        def spread(z: Tensor, sim: Tensor) -> Tensor:
            kept = torch.where(sim >= 0.4, sim, 0.0)
            return kept @ z / (kept.sum(1, keepdim=True) + 1e-6)

        unit = F.normalize(repair(states[similar][1:]), dim=-1)
        sim = unit @ unit.T
        e = 3 * (sim - sim.mean())
        fixed = torch.where(e < 0, -torch.inf, e).softmax(-1)

        def attend(z: Tensor, fixed: Tensor = fixed) -> Tensor:
            _, k, v = F.linear(last.ln_1(z), last.attn.in_proj_weight, last.attn.in_proj_bias).split(width, -1)
            parts = []
            for k_head, v_head in zip(k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
                alike = (k_head @ k_head.T * (width // heads) ** -0.5).softmax(-1)
                parts.append((fixed + alike) / 2 @ v_head)
            return last.attn.out_proj(torch.cat(parts, -1))

        unit = F.normalize(states[after][1:], dim=-1)
        many = sum(states[i] for i in fused)
        y = spread(attend(spread(repair(patches), sim)) + model.encoder.c * token, unit @ unit.T)
        y = y + spread(attend(many[1:]) + model.encoder.c * many[:1], unit @ unit.T)
        out.append(encoder.project(y).T.unflatten(-1, (h, w)))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [(12, (8, 3, list(range(3, 10)))), (24, (16, 6, [6, 8, 10, 12, 14, 16, 18])), (4, (2, 1, [1, 1, 2, 2, 2, 2, 2]))],
    ids=["L12", "L24", "L4"],
)
@pytest.mark.parametrize("group_bytes", [1, 5000, 1 << 25])
def test_scclip_in_batches_of_any_shape_and_depth(monkeypatch, layers, blocks, group_bytes) -> None:
    monkeypatch.setattr(self_calibrated, "_GROUP_BYTES", group_bytes)
    torch.manual_seed(1)
    clip = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "layers": layers, "patch_size": 8, "image_size": 48}}
    model = zs3fast.create_model("scclip", clip=clip).eval()
    for size in ((40, 72), (56, 45), (48, 48)):
        images, _ = tiny_inputs(size=size)
        with torch.no_grad():
            expected = plain_self_calibrated(model, images, blocks)
        assert relative(patches_of(model, images), expected) < 1e-5


def test_scclip_of_a_blank_image_is_finite() -> None:
    """All patches alike: no anomaly, and rounding must not leave a patch without itself."""
    clip = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "patch_size": 8}}
    model = zs3fast.create_model("scclip", clip=clip).eval()
    model.encoder.positional_embedding.data.zero_()
    assert patches_of(model, torch.zeros(2, 3, 64, 96)).isfinite().all()


def test_scclip_needs_31_patches() -> None:
    model = zs3fast.create_model("scclip", clip=CLIP)
    with pytest.raises(ValueError, match=r"images: SC-CLIP compares a patch with 30 others, .* got 5 x 6 of 16 pixels"):
        model.encoder(torch.zeros(1, 3, 80, 100))
    assert model.encoder(torch.zeros(1, 3, 16, 16 * 31)).patch_tokens.shape == (1, 31, CLIP["embed_dim"])


@pytest.mark.parametrize("method", ["clearclip", "naclip", "rcs", "sclip", "scclip"])
def test_methods_by_name(method: str, tmp_path) -> None:
    assert method in zs3fast.list_models()
    model = zs3fast.create_model(method, clip=CLIP, logit_scale=40.0).eval()
    same = zs3fast.create_model("maskclip", clip=CLIP, attention=method).eval()
    same.load_state_dict(model.state_dict())
    images, text = tiny_inputs(size=(96, 112))
    assert torch.equal(patches_of(model, images), patches_of(same, images))
    weights.save(model, tmp_path / "m.safetensors")
    again, _ = weights.load(tmp_path / "m.safetensors")
    assert again.config == model.config and again.method == method
    assert torch.equal(again(images, text).mask_logits, model(images, text).mask_logits)
    with pytest.raises(ValueError, match=f"attention: expected '{method}' for {method}, got 'value'"):
        zs3fast.create_model(method, clip=CLIP, attention="value")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_pixels_past_the_last_whole_patch_are_left_out(attention: str) -> None:
    model = zs3fast.create_model("maskclip", clip=CLIP, attention=attention).eval()
    images, text = tiny_inputs(size=(16 * 6 + 15, 16 * 7 + 1))
    out = model(images, text)
    assert out.mask_logits.shape == (2, len(text), 6, 7)
    assert torch.equal(out.mask_logits, model(images[..., :96, :112], text).mask_logits)
    with pytest.raises(ValueError, match="images: .* got 15 x 64"):
        model(images[..., :15, :64], text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "scclip", "residual": True}, "residual: expected None or False, as SC-CLIP"),
        ({"std": 0.0}, "std: expected a positive number of patches, got 0.0"),
        ({"std": float("nan")}, "std: expected a positive number of patches, got nan"),
        ({"tau": -1.0}, "tau: expected a positive number, got -1.0"),
        ({"lam": 1.5}, "lam: expected a share in 0..1, got 1.5"),
        ({"c": float("inf")}, "c: expected a finite number, got inf"),
        ({"attention": "sclp"}, "attention: expected one of .*, got 'sclp'; did you mean sclip"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zs3fast.create_model("maskclip", clip=CLIP, **options)


WITH_BACKGROUND = {"prob_thd": 0.3, "area_thd": 0.1}
PROTOCOLS = {
    "sclip": ("sclip", {}),
    "naclip": ("naclip", {"over_classes": True}),
    "scclip": ("scclip", {}),
    "scclip_nocls": ("scclip_nocls", {}),
    "clearclip": ("clearclip", {"logit_scale": 50.0, "pad": True}),
    "maskclip": ("maskclip", {"logit_scale": 50.0, "pad": True}),
    "sclip_bg": ("sclip", WITH_BACKGROUND),
    "scclip_bg": ("scclip", {**WITH_BACKGROUND, "logit_scale": 50.0}),
    "sclip_pamr": ("sclip", {"refine": 10}),
    "naclip_pamr": ("naclip", {"over_classes": True, "refine": 10, "prob_thd": 0.1}),
    "naclip_whole": ("naclip", {"over_classes": True, "window": None}),
}


@pytest.mark.parametrize("run", PROTOCOLS)
def test_labels_and_probabilities_equal_the_official_code(golden: Golden, run: str) -> None:
    method, settings = PROTOCOLS[run]
    meta, model = meta_of(golden), model_of(golden, **NAMES.get(method, {"attention": method}))
    protocol = WindowProtocol(**{"window": meta["crop"], "stride": meta["stride"], **settings})
    predictor, size = AveragedWindows(model, 3, protocol), tuple(meta["ori"])
    canvas, of = golden["input/canvas"][0], golden["input/name_class"].tolist()
    names = [[f"name {i}" for i, c in enumerate(of) if c == wanted] for wanted in range(max(of) + 1)]
    request = Request(np.zeros((*size, 3), np.uint8), golden["input/text"], names, None)
    with torch.no_grad():
        (masks,), (frame,) = predictor.similarities([canvas], request.text)
        scores = softmax_scores(masks, size, frame, predictor.rule(names, len(of)), predictor.refinement(canvas))
        prediction = predictor.predict_from(masks, frame, canvas, request)
    assert relative(scores[:, ::3, ::3], golden[f"eval/{run}/probabilities_3"]) < 1e-5
    assert (prediction.labels != golden[f"eval/{run}/labels"]).float().mean() <= 0.001
    assert relative(prediction.scores, scores.amax(0)) < 1e-5
    if run not in ("scclip", "scclip_bg"):  # whose class token dominates in these weights
        assert len(prediction.labels.unique()) > 1


ARCHITECTURES = [
    *(
        "ViT-B-32",
        "ViT-B-32-quickgelu",
        "ViT-B-32-256",
        "ViT-B-16-plus-240",
        "ViT-L-14",
        "ViT-L-14-336-quickgelu",
        "ViT-L-16",
    ),
    *(
        "ViT-H-14-378",
        "ViT-g-14",
        "ViT-bigG-14",
        "ViT-S-32-alt",
        "ViT-M-16",
        "roberta-ViT-B-32",
        "xlm-roberta-large-ViT-H-14",
    ),
]


@pytest.mark.parametrize("method", ["scclip", "rcs", "sclip"])
@pytest.mark.parametrize("clip", ARCHITECTURES)
def test_any_plain_vit_of_open_clip_runs(clip: str, method: str) -> None:
    """Patch sizes 14 to 32, heads of 64 to 88, 8 to 48 blocks, both activations: on the meta device, shapes alone."""
    with torch.device("meta"), torch.no_grad():
        model = zs3fast.create_model(method, clip=clip).eval()
        config = model.encoder.config
        height, width = 6 * config.patch_size, 7 * config.patch_size + 5
        out = model(torch.empty(2, 3, height, width), torch.empty(4, config.embed_dim))
    assert out.mask_logits.shape == (2, 4, 6, 7) and out.global_token.shape == (2, config.embed_dim)


REFUSED = [
    "RN50",
    "convnext_base",
    "EVA02-B-16",
    "ViT-B-16-SigLIP",
    "ViT-L-16-SigLIP2-256",
    "ViTamin-S",
    "coca_ViT-B-32",
]


@pytest.mark.parametrize("clip", REFUSED)
def test_other_towers_are_refused_by_name(clip: str) -> None:
    with pytest.raises(ValueError, match=f"clip: expected one such as .*, got {clip}, whose image tower is no plain"):
        zs3fast.create_model("scclip", clip=clip)


@pytest.mark.parametrize("count", [1, 2, 21, 36, 1024])
def test_quantile_is_torch_s(count: int) -> None:
    x = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
    x[2, count // 2] = torch.nan
    for given in (x, x.double()):
        want = torch.quantile(given, 0.95, dim=1, keepdim=True)
        torch.testing.assert_close(self_calibrated.quantile(given, 0.95), want, rtol=1e-6, atol=1e-6, equal_nan=True)
