"""Every switch of `create_model` changes what it says it does: the output, a loss, a label, or what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zs3fast
from tests.tiny import NUM_CLASSES, SEEN, tiny_inputs, tiny_labels
from tests.tiny_clip import CONFIG
from zs3fast.labels.proposal_targets import class_masks
from zs3fast.training.setup import model_defaults
from zs3fast.types import Proposals

CLIP = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "layers": 5}}
OTHER_CLIP = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "width": 60}}
ONE_STAGE = {
    "num_prompts": 5,
    "image_size": 80,
    "seen_offset": 0.4,
    "prompt_depth": 1,
    "quick_gelu": False,
    "double_class_embedding": False,
    "dropout": 0.5,
    "decoder_heads": 2,
    "decoder_width": 64,
}
SHARED = {"clip": OTHER_CLIP, "seen": [0, 1]}
# What a switch is set to, in place of the base's value; None of a base's own: the default.
SWITCHES: dict[str, dict[str, Any]] = {
    "zegclip": {**SHARED, **ONE_STAGE, "decoder_layers": 2, "loss_weights": {"dice": 7.0}},
    "tagclip": {
        **SHARED,
        **ONE_STAGE,
        "loss_weights": {"trusty": 70.0},
        "trusty_token": False,
        "trusty_weighting": "off",
        "trusty_init": "zeros",
        "trusty_loss": "dice",
        "trusty_polarity": "seen",
        "trusty_target": "not_seen",
        "unseen_labels": "merged",
        "layout": "n_n_n",
        "descriptor": "attn:q_s_s",
        "class_prediction": True,
    },
    "clip_rc": {
        **SHARED,
        **{name: value for name, value in ONE_STAGE.items() if name != "prompt_depth"},
        "decoder_layers": 2,
        "loss_weights": {"recovery_q": 30.0},
        "regions": 1,
        "update_regions": True,
        "alignment": "none",
        "query_regions": False,
        "recovery_layers": None,
        "recovery_loss": "kd",
        "init": "intent",
        "output_gain": 0.3,
    },
    "maft": {
        **SHARED,
        "image_size": 32,
        "quick_gelu": False,
        "start_layer": 3,
        "ensemble": 0.6,
        "ensemble_form": "paper",
        "ma_loss": "l1",
        "iou_range": "all",
        "freeze": ["cls"],
        "seen_offset": 0.4,
        "loss_weights": {"dis": 50.0},
    },
    "clsclip": {
        "clip": OTHER_CLIP,
        "image_size": 80,
        "quick_gelu": False,
        "nav_layers": (2, 3),
        "navigation": "channel",
        "num_prompts": 3,
        "text_token": "pre_projection",
        "decoder_width": 32,
        "decoder_layers": 1,
        "decoder_heads": 2,
        "decoder_ffn": 96,
        "head": "linear",
        "dropout": 0.5,
        "loss_weights": {"dice": 1.0},
    },
    "maskclip": {
        "clip": OTHER_CLIP,
        "quick_gelu": False,
        "attention": "vanilla",
        "residual": True,
        "logit_scale": 40.0,
    },
    "naclip": {"std": 1.0},
    "rcs": {"tau": 1.0, "lam": 0.9, "std": 1.0},
    "scclip": {"c": 1.0},
}
# What decides no number here, and where it is tested: of every method, and of some.
ELSEWHERE = {
    "pretrained": "tests/encoders: weights instead of random ones",
    "num_classes": "the vocabulary's size, with `seen`",
    "class_names": "names by which a Segmenter tells seen from unseen: tests/inference/test_segmenter.py",
}
FREE = {"maskclip", "sclip", "clearclip", "naclip", "rcs", "scclip"}
ELSEWHERE_OF = {
    "clip_rc": {
        "query_chunk": "memory alone: tests/models/test_clip_rc.py",
        "prompt_depth": "refused: tests/models/test_clip_rc.py",
    },
    "clsclip": {
        "memory_budget": "memory alone: tests/models/test_clsclip.py",
        "seen": "there is no calibration",
        "seen_offset": "refused, as there is none",
    },
    **dict.fromkeys(
        FREE,
        {
            "image_size": "the window a Segmenter cuts: tests/inference/test_averaged_windows.py",
            "seen": "there is no calibration",
            "seen_offset": "refused, as there is none",
            "loss_weights": "there is no loss",
        },
    ),
}


def build(method: str, **options: Any) -> nn.Module:
    base: dict[str, Any] = {"clip": CLIP, "image_size": 64, "num_classes": NUM_CLASSES, "seen": SEEN}
    if method in ("zegclip", "tagclip", "clip_rc"):
        base |= {"num_prompts": 3, "decoder_heads": 4} | ({"regions": 4} if method == "clip_rc" else {})
    elif method == "maft":
        base |= {"start_layer": 1}
    elif method == "clsclip":
        base |= {"nav_layers": (1, 2), "text_token": "projected", "decoder_ffn": 64}
        base |= {"text_token": options.get("text_token", "projected")}
    else:
        del base["seen"]
    if "clip" in options:
        options = {**options, "clip": OTHER_CLIP}
    torch.manual_seed(0)
    return zs3fast.create_model(method, **{**base, **options}).eval()


def alike(method: str, switch: str, value: Any) -> tuple[nn.Module, nn.Module]:
    """The model without and with the switch, the same in every weight that both have but for what the switch draws."""
    shared = {"ensemble": 0.6} if method == "maft" and switch in ("ensemble_form", "seen") else {}
    plain, changed = build(method, **shared), build(method, **shared, **{switch: value})
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)  # masks of fresh models hardly differ
    if switch not in ("init", "output_gain", "trusty_init"):
        state, own = plain.state_dict(), changed.state_dict()
        changed.load_state_dict({**own, **{k: v for k, v in state.items() if k in own and own[k].shape == v.shape}})
    return plain, changed


def observed(method: str, model: nn.Module) -> dict[str, Tensor]:
    """Scores, labels, losses in every setting, and which parameters train, of one seeded batch."""
    side = {"maft": model.image_size, "clsclip": model.image_size, "scclip": 96}.get(method, 64)  # SC-CLIP: 31 patches
    images, text = tiny_inputs(2, (side, side))
    labels, found = tiny_labels(), {}
    if method == "clsclip":
        text = torch.nn.functional.pad(text, (0, model.text_width - text.shape[1]))
    inputs: tuple[Any, ...] = (images, text)
    if method == "maft":
        masks = torch.rand(2, 4, 64, 64, generator=torch.Generator().manual_seed(3))
        scores = torch.rand(2, 4, NUM_CLASSES + 1, generator=torch.Generator().manual_seed(4)).softmax(-1)
        sizes = ((64, 64),) * 2
        valid = torch.ones(2, 4, dtype=torch.bool)
        inputs += (Proposals(None, masks, valid, (64, 64), sizes, sizes, scores),)
    with torch.no_grad():
        out = model(*inputs)
        found["masks"], found["scores"] = out.mask_logits, model.class_scores(out, (64, 64))
    if model.training_free:
        return found
    model.train()
    for setting in (
        ("inductive", "transductive", "supervised") if method in ("zegclip", "tagclip", "clip_rc") else ("",)
    ):
        torch.manual_seed(5)
        if method == "maft":
            terms = model.loss(model(*inputs), *class_masks(labels, NUM_CLASSES), model.image_embedding(images) + 1)
        elif method == "clsclip":
            pairs = torch.tensor([[0, 0], [1, 2]])
            terms = model.loss(model(images, text, pairs), labels, pairs=pairs)
        else:
            rows = text[model.seen] if setting == "inductive" else text
            terms = model.loss(model(images, rows), labels, setting)
        found[f"loss {setting}"] = terms["loss"].detach()
    found["trained"] = torch.tensor(sum(p.numel() for p in model.trainable().values()))
    return found


@pytest.mark.parametrize(
    ("method", "switch"), [(method, switch) for method, switches in SWITCHES.items() for switch in switches]
)
def test_a_switch_changes_what_comes_out(method: str, switch: str) -> None:
    before, after = (observed(method, model) for model in alike(method, switch, SWITCHES[method][switch]))
    same = [
        name
        for name in before.keys() & after.keys()
        if before[name].shape == after[name].shape and torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-7)
    ]
    assert set(same) != before.keys(), f"{method}: {switch} changes nothing"


def test_no_switch_is_left_out() -> None:
    """By the signatures of all methods, so that a new one fails here until it is named above."""
    tested = {method: set(switches) for method, switches in SWITCHES.items()}
    all_free = set().union(*(tested[method] for method in FREE & tested.keys()))
    for method in zs3fast.list_models():
        there, named = set(model_defaults(method)), all_free if method in FREE else tested[method]
        elsewhere = {*ELSEWHERE, *ELSEWHERE_OF.get(method, ())}
        assert there <= named | elsewhere, f"{method}: {sorted(there - named - elsewhere)} is tested nowhere"
        gone = (tested.get(method, set()) | set(ELSEWHERE_OF.get(method, ()))) - there
        assert not gone, f"{method}: {sorted(gone)} is no switch"
        assert not named & elsewhere, f"{method}: {sorted(named & elsewhere)} is both tested here and excused"
