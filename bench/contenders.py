"""What `run.py` times against each other: the official structure and zs3fast, on the same weights and inputs.

Image in, label map out; or one training step. The floors under both are in `bench/floors.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import OFFICIAL, OfficialMAFT, PlainClsCLIP
from bench.harness import OverBudget, relative_error, within_budget
from bench.setting import Setting, make_inputs, make_labels

BUDGET = 1e-5  # float32: relative error of logits and loss; of scores against 1 or the largest logit
HALF_FACTOR = 2.0  # half types: as many times the official structure's own error in that type, plus one rounding
COMPILED = {"clsclip": ("pair", "class_scores")}  # else the whole forward pass: a graph of C passes never compiles


def make_baseline(setting: Setting, device: str | torch.device = "cpu") -> nn.Module:
    """The official (for ClsCLIP the plain) structure with seeded random weights, in evaluation mode."""
    torch.manual_seed(0)
    s = setting
    sizes = {name: getattr(s, name) for name in ("patch_size", "width", "layers", "heads", "embed_dim")}
    if s.method == "maft":
        model = OfficialMAFT(grid=s.clip_size // s.patch_size, start_layer=s.start_layer, **sizes)
    elif s.method == "clsclip":
        model = PlainClsCLIP(grid=s.clip_size // s.patch_size, text_width=s.embed_dim, **sizes)
        for linear in model.navigation.values():
            nn.init.normal_(linear.weight, std=0.1)  # so that classes differ
    else:
        regions = {"regions": s.regions} if s.method == "clip_rc" else {}
        sizes |= {"image_size": s.image_size, "num_prompts": s.prompts, "decoder_heads": s.decoder_heads}
        model = OFFICIAL[s.method](seen=s.seen, **sizes, **regions)
    return model.eval().to(device, s.torch_dtype)


def make_ours(setting: Setting, weights: Any, device: str | torch.device = "cpu") -> nn.Module:
    """zs3fast's model with the same weights, given as the baseline's state dict or the path of one."""
    import zs3fast

    s = setting
    if s.method == "clsclip":
        clip = {
            "embed_dim": s.embed_dim,
            "quick_gelu": True,
            "vision_cfg": {"image_size": s.clip_size, "layers": s.layers, "width": s.width,
                           "patch_size": s.patch_size, "head_width": s.width // s.heads},
            "text_cfg": {"width": s.embed_dim},
        }  # fmt: skip
        model = zs3fast.create_model("clsclip", clip=clip, image_size=s.image_size, num_classes=s.classes)
        model.load_state_dict(weights if isinstance(weights, dict) else torch.load(weights)["state_dict"])
    else:
        sizes = {"decoder_heads": s.decoder_heads, "image_size": s.image_size, "start_layer": s.start_layer}
        model = zs3fast.load_official(
            weights, method=s.method, seen=s.seen, num_classes=s.classes, heads=s.heads, **sizes
        )
    return model.eval().to(device, s.torch_dtype)


def predict_ours(model: nn.Module, setting: Setting, inputs: tuple[Any, ...]) -> Tensor:
    """Images -> labels [B, H, W], as a user of zs3fast would."""
    return model.predict_labels(model(*inputs), size=setting.label_size)


def compile_baseline(baseline: nn.Module, setting: Setting) -> nn.Module:
    """The baseline with its network and its scores compiled, weights shared."""
    compiled = copy.copy(baseline)
    for name in COMPILED.get(setting.method, ("forward", "class_scores")):
        setattr(compiled, name, torch.compile(getattr(baseline, name)))
    return compiled


def training_loss(contender: str, model: nn.Module, images: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """The weighted inductive loss of one batch."""
    if contender == "official":
        return model.losses(images, text, labels)["total"]
    return model.loss(model(images, text[model.seen]), labels)["loss"]


def make_call(
    contender: str, pass_: str, setting: Setting, model: nn.Module, device: str | torch.device = "cpu"
) -> Callable[[], Tensor]:
    """The timed call of "official" or "zs3fast": images -> labels, or one training step without its optimiser."""
    inputs = make_inputs(setting, device)
    if pass_ == "inference":
        ours = partial(predict_ours, model, setting, inputs)
        predict = ours if contender == "zs3fast" else partial(model.predict_labels, *inputs)

        def infer() -> Tensor:
            with torch.no_grad():
                return predict()

        return infer
    labels = make_labels(setting).to(device)

    def step() -> Tensor:
        model.train()
        loss = training_loss(contender, model, *inputs, labels)
        loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()
        return loss.detach()

    return step


# Checks: what fails one is not timed ---------------------------------------------------------------------------------


def check_inference(
    contender: str, model: nn.Module, baseline: nn.Module, setting: Setting, device: str | torch.device = "cpu"
) -> None:
    """Raise OverBudget unless the same weights give the same logits, and the same label wherever it is clear.

    In half types the same weights and inputs in float32 are the truth, and the official structure's own error the unit.
    """
    inputs = make_inputs(setting, device)
    with torch.no_grad():
        got = model(*inputs)
        if contender == "zs3fast":
            labels, got = model.predict_labels(got, size=setting.label_size), raw_logits(got)
        else:
            labels = model.predict_labels(*inputs)
        if setting.dtype == "float32":
            expected = baseline(*inputs)
            within_budget("mask_logits", got, expected, BUDGET)
            lost = regret(baseline, expected, labels, inputs)
            budget = BUDGET * max(1.0, float(expected.abs().max()))  # CLIP-RC's logits are unscaled and reach tens
            if not (lost <= budget).all():  # NaN is not
                raise OverBudget(f"labels: {int((lost > budget).sum())} pixels lose up to {float(lost.max()):.2e}")
            return
        exact, wide = in_float32(baseline), widen(inputs)
        expected = exact(*wide)
        within_budget("mask_logits", got, expected, half_budget(baseline(*inputs), expected))
        official = regret(exact, expected, baseline.predict_labels(*inputs), wide).mean()
        lost = regret(exact, expected, labels, wide).mean()
        budget = HALF_FACTOR * official + torch.finfo(setting.torch_dtype).eps
        if not lost <= budget:
            raise OverBudget(f"labels: pixels lose {float(lost):.2e} of score on average, over {float(budget):.2e}")


def raw_logits(out: Any) -> Tensor:
    """What zs3fast's output and the baseline's have in common: mask logits, of MAFT the proposals'."""
    if hasattr(out, "proposal_logits"):
        return out.proposal_logits
    return out.mask_logits if out.trusty_logits is None else torch.cat([out.mask_logits, out.trusty_logits], dim=1)


def regret(baseline: nn.Module, logits: Tensor, labels: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """How far the score of each pixel's label is below the best, [B, H, W]."""
    scores = baseline.class_scores(logits, *inputs[2:])
    return scores.amax(dim=1) - scores.gather(1, labels.long().unsqueeze(1)).squeeze(1)


def in_float32(baseline: nn.Module) -> nn.Module:
    """A copy with the same, already rounded, weights."""
    return copy.deepcopy(baseline).float()


def widen(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) else x for x in inputs)


def half_budget(official: Tensor, expected: Tensor) -> float:
    """Relative error that a half type may have."""
    return HALF_FACTOR * relative_error(official, expected) + torch.finfo(official.dtype).eps


@contextmanager
def all_losses(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode inside, dropout off, that still compute the losses of training (CLIP-RC's recovery)."""
    for model in models:
        model.training = True  # of the model itself, of no module below it
    try:
        yield
    finally:
        for model in models:
            model.training = False


def check_training(
    contender: str, model: nn.Module, baseline: nn.Module, setting: Setting, device: str | torch.device = "cpu"
) -> None:
    """Raise OverBudget unless the same weights give the same loss; without dropout, since its draws differ."""
    inputs = make_inputs(setting, device)
    labels = make_labels(setting).to(device)
    half = setting.dtype != "float32"
    exact = in_float32(baseline) if half else baseline
    with all_losses(model, baseline, exact):
        expected = training_loss("official", exact, *widen(inputs), labels).detach()
        got = training_loss(contender, model, *inputs, labels).detach()
        budget = half_budget(training_loss("official", baseline, *inputs, labels), expected) if half else BUDGET
    within_budget("loss", got, expected, budget)
