"""What `run.py` times against each other: the official structure, zs3fast, and two floors under both.

All run the same weights on the same images and text embeddings, image in, label map out. The floors are the products
an encoder cannot do without, at the live shapes: prompt tokens are never queries, and their keys and values do not
depend on the image, so the rows are B * (1 + N) and the attention is (1 + N) x (1 + K + N). CLIP-RC's encoder has M
rows more, and attention between each region token and its window, both ways. Decoder and pixel stage are in no floor:
they come on top, and CLIP-RC's decoder of M * C queries is no small part. Both run on torch.mm and torch.bmm: a faster
library for the same products can get below them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bench.baselines import OFFICIAL
from bench.harness import OverBudget, within_budget

BUDGET = 1e-5  # relative error of logits and loss; of scores against 1 or the largest logit; official structure
PASSES = ("inference", "training")
METHODS = tuple(OFFICIAL)
PUBLISHED_REGIONS = 16  # M of CLIP-RC
PROMPTS = {20: 10, 171: 100}  # the published settings: VOC 10 prompts a layer, COCO-Stuff 100
SEEN = {
    20: list(range(15)),
    171: [c for c in range(171) if c not in (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160)],
}
SHAPES = {20: "voc20", 171: "coco171"}


@dataclass(frozen=True)
class Setting:
    """One line of the benchmark: a method, its class list and the sizes of its network. Regions: of CLIP-RC only."""

    method: str
    classes: int
    batch: int = 1
    regions: int = PUBLISHED_REGIONS
    image_size: int = 512
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    embed_dim: int = 512
    decoder_heads: int = 8

    @property
    def prompts(self) -> int:
        return PROMPTS[self.classes]

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def name(self) -> str:
        """The method, with its number of regions where that is not the published one."""
        other = self.method == "clip_rc" and self.regions != PUBLISHED_REGIONS
        return f"{self.method} M={self.regions}" if other else self.method

    @property
    def encoder_regions(self) -> int:
        """Region tokens in the encoder: 0 but for CLIP-RC."""
        return self.regions if self.method == "clip_rc" else 0

    @property
    def encoder_name(self) -> str:
        """What the floors under this setting are called: methods with the same encoder share them."""
        return f"encoder M={self.regions}" if self.encoder_regions else "encoder"

    @property
    def shape(self) -> str:
        return f"{SHAPES[self.classes]}-{self.image_size}-B{self.batch}"

    def tiny(self) -> Setting:
        """The same structure at sizes that run in milliseconds."""
        sizes = dict(image_size=64, width=48, layers=3, heads=4, embed_dim=32, decoder_heads=4)
        return replace(self, **sizes, regions=min(self.regions, 16))  # the grid has 16 patches


def make_inputs(setting: Setting, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Seeded images [B, 3, H, W] and unit text embeddings [C, D]."""
    generator = torch.Generator().manual_seed(0)
    side = setting.image_size
    images = torch.randn(setting.batch, 3, side, side, generator=generator)
    text = torch.randn(setting.classes, setting.embed_dim, generator=generator)
    return images.to(device), (text / text.norm(dim=1, keepdim=True)).to(device)


def make_baseline(setting: Setting, device: str | torch.device = "cpu") -> nn.Module:
    """The official structure with seeded random weights, in evaluation mode."""
    torch.manual_seed(0)
    model = OFFICIAL[setting.method](
        seen=SEEN[setting.classes],
        num_prompts=setting.prompts,
        image_size=setting.image_size,
        patch_size=setting.patch_size,
        width=setting.width,
        layers=setting.layers,
        heads=setting.heads,
        embed_dim=setting.embed_dim,
        decoder_heads=setting.decoder_heads,
        **({"regions": setting.regions} if setting.method == "clip_rc" else {}),
    )
    return model.eval().to(device)


def make_ours(setting: Setting, weights: object, device: str | torch.device = "cpu") -> nn.Module:
    """zs3fast's model with the same weights, given as an official state dict or the path of one."""
    import zs3fast

    model = zs3fast.load_official(
        weights,
        method=setting.method,
        seen=SEEN[setting.classes],
        num_classes=setting.classes,
        heads=setting.heads,
        decoder_heads=setting.decoder_heads,
        image_size=setting.image_size,
    )
    return model.eval().to(device)


def predict_ours(model: nn.Module, images: Tensor, text: Tensor) -> Tensor:
    """Images -> labels [B, H, W], as a user of zs3fast would."""
    return model.predict_labels(model(images, text), size=tuple(images.shape[-2:]))


def compile_baseline(baseline: nn.Module) -> nn.Module:
    """The official structure with its network and its scores compiled, weights shared."""
    compiled = copy.copy(baseline)
    compiled.forward = torch.compile(baseline.forward)
    compiled.class_scores = torch.compile(baseline.class_scores)
    return compiled


class Floor:
    """The encoder's products alone, into buffers that exist already, every layer with weights of its own.

    Args:
        attention: with (True) or without (False) the two products of the attention.
    """

    def __init__(self, setting: Setting, attention: bool, device: str | torch.device = "cpu"):
        torch.manual_seed(0)
        s = setting
        live, width = s.batch * (1 + s.patches + s.encoder_regions), s.width
        patch_width = 3 * s.patch_size**2

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device) * shape[-1] ** -0.5

        self.pixels, self.tokens = random(s.batch * s.patches, patch_width), random(live, width)
        self.hidden = random(live, 4 * width)
        self.stem = random(width, patch_width)
        self.layers = [
            (random(3 * width, width), random(width, width), random(4 * width, width), random(width, 4 * width))
            for _ in range(s.layers)
        ]
        self.projection = random(width, s.embed_dim)
        self.patch_out = self.pixels.new_empty(s.batch * s.patches, width)
        self.qkv = self.pixels.new_empty(live, 3 * width)
        self.out = self.pixels.new_empty(live, width)
        self.hidden_out = self.pixels.new_empty(live, 4 * width)
        self.joint = self.pixels.new_empty(live, s.embed_dim)
        self.attention = attention
        if attention:
            rows, head_width = s.batch * s.heads, width // s.heads
            queries, keys = 1 + s.patches, 1 + s.prompts + s.patches
            self.q, self.k, self.v = (random(rows, n, head_width) for n in (queries, keys, keys))
            self.scores = self.pixels.new_empty(rows, queries, keys)
            self.attended = self.pixels.new_empty(rows, queries, head_width)
            self.probabilities = random(rows, queries, keys)
            self.products = [
                (self.q, self.k.transpose(1, 2), self.scores),
                (self.probabilities, self.v, self.attended),
                *self._region_products(s, random),
            ]

    @staticmethod
    def _region_products(s: Setting, random: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(a, b, a @ b) of patches with the one key of their region, and of region tokens with window and itself."""
        if not s.encoder_regions:
            return []
        window = (s.image_size // s.patch_size // math.isqrt(s.regions)) ** 2
        rows, head_width = s.batch * s.heads * s.regions, s.width // s.heads
        pairs = []
        for queries, keys in ((window, 1), (1, window + 1)):
            q, k, v = (random(rows, n, head_width) for n in (queries, keys, keys))
            p = random(rows, queries, keys)
            pairs += [(q, k.transpose(1, 2), torch.empty_like(p)), (p, v, torch.empty_like(q))]
        return pairs

    def __call__(self) -> None:
        torch.mm(self.pixels, self.stem.t(), out=self.patch_out)
        for qkv, out, up, down in self.layers:
            torch.mm(self.tokens, qkv.t(), out=self.qkv)
            if self.attention:
                for a, b, out_buffer in self.products:
                    torch.bmm(a, b, out=out_buffer)
            torch.mm(self.tokens, out.t(), out=self.out)
            torch.mm(self.tokens, up.t(), out=self.hidden_out)
            torch.mm(self.hidden, down.t(), out=self.out)
        torch.mm(self.tokens, self.projection, out=self.joint)

    def flops(self) -> int:
        """Floating-point operations of one call, 2 a multiply-add."""
        total = self.pixels.shape[0] * self.stem.numel() + self.tokens.shape[0] * self.projection.numel()
        for weights in self.layers:
            total += self.tokens.shape[0] * sum(w.numel() for w in weights)
        if self.attention:
            total += len(self.layers) * sum(a.numel() * b.shape[-1] for a, b, _ in self.products)
        return 2 * total


def make_labels(setting: Setting) -> Tensor:
    """Seeded label maps [B, H, W] in dataset indices: 16 x 16 blocks of nine classes, seen and unseen, and ignore."""
    generator = torch.Generator().manual_seed(1)
    side = setting.image_size // 16
    present = torch.cat([torch.randperm(setting.classes, generator=generator)[:9], torch.tensor([255])])
    blocks = present[torch.randint(len(present), (setting.batch, side, side), generator=generator)]
    return blocks.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)


def training_loss(contender: str, model: nn.Module, images: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """The weighted inductive loss of one batch."""
    if contender == "official":
        return model.losses(images, text, labels)["total"]
    return model.loss(model(images, text[model.seen]), labels)["loss"]


def make_call(
    contender: str, pass_: str, setting: Setting, model: nn.Module, device: str | torch.device = "cpu"
) -> Callable[[], Tensor]:
    """The timed call of "official" or "zs3fast": images -> labels, or one training step without its optimiser."""
    images, text = make_inputs(setting, device)
    if pass_ == "inference":
        predict = model.predict_labels if contender == "official" else partial(predict_ours, model)

        def infer() -> Tensor:
            with torch.no_grad():
                return predict(images, text)

        return infer
    labels = make_labels(setting).to(device)

    def step() -> Tensor:
        model.train()
        loss = training_loss(contender, model, images, text, labels)
        loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()
        return loss.detach()

    return step


def check_inference(
    contender: str, model: nn.Module, baseline: nn.Module, setting: Setting, device: str | torch.device = "cpu"
) -> None:
    """Raise OverBudget unless the same weights give the same logits, and the same label wherever it is clear."""
    images, text = make_inputs(setting, device)
    with torch.no_grad():
        expected, got = baseline(images, text), model(images, text)
        if contender == "zs3fast":
            labels = model.predict_labels(got, size=tuple(images.shape[-2:]))
            parts = (got.mask_logits, got.trusty_logits)
            got = torch.cat([part for part in parts if part is not None], dim=1)
        else:
            labels = model.predict_labels(images, text)
        within_budget("mask_logits", got, expected, BUDGET)
        scores = baseline.class_scores(expected)
    lost = scores.amax(dim=1) - scores.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    budget = BUDGET * max(1.0, float(expected.abs().max()))  # CLIP-RC's logits are unscaled and reach tens
    if not (lost <= budget).all():  # NaN is not
        raise OverBudget(f"labels: {int((lost > budget).sum())} pixels lose up to {float(lost.max()):.2e} of score")


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
    images, text = make_inputs(setting, device)
    labels = make_labels(setting).to(device)
    with all_losses(model, baseline):
        expected = training_loss("official", baseline, images, text, labels).detach()
        got = training_loss(contender, model, images, text, labels).detach()
    within_budget("loss", got, expected, BUDGET)
