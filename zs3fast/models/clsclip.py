"""ClsCLIP (2023): the class asked for takes the class token's place in shallow layers of a frozen CLIP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.encoders.config import vision_config
from zs3fast.encoders.navigated import INIT_STD, ClassTokens, ImagePrefix, NavigatedClipViT
from zs3fast.encoders.open_clip_weights import load_clip_weights
from zs3fast.heads.binary import BinaryDecoder, ChannelGate, SpatialGate
from zs3fast.labels import targets
from zs3fast.models.base import ZeroShotModel, check_dropout
from zs3fast.models.registry import register_model
from zs3fast.ops.masks_to_labels import reference_scores
from zs3fast.types import SegmentationOutput
from zs3fast.utils.open_clip import clip_model_config
from zs3fast.utils.options import one_of
from zs3fast.utils.waiting import check, constant, deferred
from zs3fast.utils.weight_cache import WeightCache

NAVIGATIONS = {"replace": None, "channel": ChannelGate, "spatial": SpatialGate}
TEXT_TOKENS = ("pre_projection", "projected")
MEMORY_BUDGET = {"cpu": 32 << 20}  # bytes; on a CPU a pair alone is as fast as twenty together
MEMORY_BUDGET_ELSEWHERE = 2 << 30


@register_model("clsclip")
class ClsCLIP(ZeroShotModel):
    """One binary mask for every (image, class) pair; text leads the image tower, never the reverse.

    `text_embeddings` are text tokens, `TextEncoder.encode(..., text_token=model.text_token)`, of `model.templates`.
    With gradients off, pairs run in chunks that fit `memory_budget`, and what they share (the layers before the first
    navigated one, and that one's attention among the patches) runs once an image. With gradients on all pairs run at
    once: a graph keeps everything anyway.

    Args:
        nav_layers: layers whose class token the text token replaces (table 3).
        navigation: "replace"; or a gate on plain CLIP's last patch tokens (table 1): "channel", "spatial".
        num_prompts: learnable tokens in every layer on top, the paper's prompt tuning (table 2: 50); 0: frozen encoder.
        text_token: "pre_projection", the text tower's end token after its last norm; "projected", after the projection.
        decoder_width, decoder_layers, decoder_heads, decoder_ffn, head, dropout: see `BinaryDecoder`.
        memory_budget: bytes for a chunk of pairs, at least one pair; None: 32 MiB on a CPU, 2 GiB elsewhere. Prefixes
            of as many images at once as pairs fit; the result itself comes on top.
        loss_weights: "mask", and "dice", which is 0 (left out) by default.
        quick_gelu: see `vision_config`.
        options: see `ZeroShotModel`; there is no calibration, so `seen_offset` must be 0.
    """

    encoder: NavigatedClipViT
    default_loss_weights = {"mask": 1.0, "dice": 0.0}
    templates = ("a photo of a {}.",)
    protocol = "squash"
    pairwise = True
    min_score = 0.5  # its masks are binary

    def __init__(
        self,
        *,
        clip: str | dict[str, Any] = "ViT-B-16",
        pretrained: str | None = None,
        image_size: int = 352,
        nav_layers: Sequence[int] = (2, 3, 4),
        navigation: str = "replace",
        num_prompts: int = 0,
        text_token: str = "pre_projection",
        decoder_width: int = 64,
        decoder_layers: int = 2,
        decoder_heads: int = 4,
        decoder_ffn: int = 2048,
        head: str = "conv",
        dropout: float = 0.1,
        memory_budget: int | None = None,
        quick_gelu: bool | None = None,
        **options: Any,
    ):
        one_of("navigation", navigation, tuple(NAVIGATIONS))
        one_of("text_token", text_token, TEXT_TOKENS)
        if options.get("seen_offset"):
            raise ValueError(f"seen_offset: ClsCLIP has no calibration, expected 0, got {options['seen_offset']}")
        if memory_budget is not None and memory_budget < 1:
            raise ValueError(f"memory_budget: expected a positive number of bytes, got {memory_budget}")
        vision = vision_config(clip, pretrained, quick_gelu)
        if image_size < vision.patch_size or image_size % vision.patch_size:
            raise ValueError(f"image_size: expected a multiple of the patch size {vision.patch_size}, got {image_size}")
        super().__init__(clip=clip, pretrained=pretrained, image_size=image_size, **options)
        self.text_token = text_token
        self.text_width = _text_width(clip, text_token)
        self.memory_budget = memory_budget
        nav_layers = list(nav_layers) if navigation == "replace" else []
        if navigation == "replace" and not nav_layers:
            raise ValueError("nav_layers: expected at least one layer where navigation is 'replace', got none")
        self.encoder = NavigatedClipViT(vision, nav_layers=nav_layers, num_prompts=num_prompts)
        projections = {str(i): nn.Linear(self.text_width, vision.width) for i in nav_layers}
        self.navigation = nn.ModuleDict(projections)
        for linear in projections.values():
            nn.init.normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)
        gate = NAVIGATIONS[navigation]
        self.gate = None if gate is None else gate(self.text_width, vision.width)
        dropout = check_dropout(dropout)
        sizes = {"decoder_width": decoder_width, "layers": decoder_layers, "heads": decoder_heads}
        self.decoder = BinaryDecoder(
            vision.width, vision.patch_size, **sizes, ffn_width=decoder_ffn, head=head, dropout=dropout
        )
        self._class_cache = WeightCache()
        self._decoder_ffn = decoder_ffn
        self._architecture.update(
            nav_layers=nav_layers,
            navigation=navigation,
            num_prompts=num_prompts,
            text_token=text_token,
            decoder_width=decoder_width,
            decoder_layers=decoder_layers,
            decoder_heads=decoder_heads,
            decoder_ffn=decoder_ffn,
            head=head,
            dropout=dropout,
            quick_gelu=vision.quick_gelu,
        )
        if pretrained is not None:
            load_clip_weights(self.encoder, clip, pretrained)

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "memory_budget": self.memory_budget}

    @property
    def embed_dim(self) -> int:
        """D, here the width of the text tokens; of CLIP's joint space only where these are projected."""
        return self.text_width

    def forward(self, images: Tensor, text_embeddings: Tensor, pairs: Tensor | None = None) -> SegmentationOutput:
        """Mask logits of every image with every class, or of given pairs.

        Args:
            images: [B, 3, H, W], normalised with CLIP's statistics.
            text_embeddings: [C, D] text tokens.
            pairs: int64 [P, 2] of (image, row of `text_embeddings`), or None. Pairs of one image share its prefix.
        Returns:
            mask_logits [B, C, h', w'] (pairs: [P, 1, h', w']) in pixels of the input, on the patch grid for the linear
            head; `global_token` [B, width] and `patch_tokens` [B, N, width] are those at the first navigated layer,
            before any class, not normalised.
        """
        text = self.check_text(text_embeddings)
        if pairs is not None:
            pairs = _checked_pairs(pairs, len(images), text)
        classes = self._class_tokens(text) if self.gate is None else text
        if torch.compiler.is_exporting() and pairs is None:  # a graph of any B and C has no loop over chunks
            prefix = self.encoder.prefix(images)
            masks = self._masks(prefix, classes, pairwise=False).squeeze(1).unflatten(0, (-1, text.shape[0]))
            return SegmentationOutput(masks, prefix.class_token.squeeze(1), prefix.patches)
        shared: list[tuple[Tensor, Tensor]] = []
        chunks = self._chunks(images, classes, pairs, shared)
        masks = _assemble(chunks, (len(images), len(text)) if pairs is None else (len(pairs), 1))
        global_token, patch_tokens = (torch.cat(parts) for parts in zip(*shared))
        return SegmentationOutput(masks, global_token, patch_tokens)

    def encode(self, images: Tensor) -> ImagePrefix:
        """What of images [B, 3, H, W] no class touches; `decode` takes it with any number of class lists."""
        return self.encoder.prefix(images)

    def decode(self, prefix: ImagePrefix, text_embeddings: Tensor) -> SegmentationOutput:
        """As `forward`, of images that were encoded."""
        text = self.check_text(text_embeddings)
        classes = self._class_tokens(text) if self.gate is None else text
        count = len(prefix.patches)
        everything = torch.is_grad_enabled()
        limit = count * len(classes) if everything else self._pairs_within(prefix.grid_size, prefix.patches)
        masks = _assemble(self._class_chunks(prefix, classes, limit, 0), (count, len(text)))
        return SegmentationOutput(masks, prefix.class_token.squeeze(1), prefix.patches)

    @torch.no_grad()
    def class_attention(self, image: Tensor, text_embeddings: Tensor | None = None) -> Tensor:
        """Attention of the class token [layers, C, h, w] on the patches of an image [1, 3, H, W], mean over heads.

        Args:
            text_embeddings: [C, D], each class's token in its place in the navigated layers; None: CLIP's own, C = 1.
        """
        tokens = None
        if text_embeddings is not None and self.navigation:
            text = self.check_text(text_embeddings)
            tokens = {int(i): linear(text) for i, linear in self.navigation.items()}
        grid = self.encoder.check_images(image)
        maps: Tensor = self.encoder.class_attention(image, tokens)
        by_patch: Tensor = maps.unflatten(-1, grid)
        return by_patch

    def pairs_at_once(self, images: Tensor) -> int:
        """How many pairs `memory_budget` holds, going by the largest live tensors of a block and of the decoder."""
        return self._pairs_within(self.encoder.check_images(images), images)

    def _pairs_within(self, grid: tuple[int, int], like: Tensor) -> int:
        budget = self.memory_budget
        if budget is None:
            budget = MEMORY_BUDGET.get(like.device.type, MEMORY_BUDGET_ELSEWHERE)
        vision = self.encoder.config
        tokens = 1 + self.encoder.prompts + math.prod(grid)
        attention, mlp = 8 * vision.width, 3 * vision.width + vision.mlp_width
        decoder = vision.width + 2 * self._decoder_ffn
        return max(budget // (tokens * max(attention, mlp, decoder) * like.element_size()), 1)

    def _class_tokens(self, text: Tensor) -> ClassTokens:
        """What the tower takes of every class; kept per class list."""
        out: ClassTokens = self._class_cache.get(
            (text, *self.navigation.parameters(), *self.encoder.parameters()),
            lambda: self.encoder.class_tokens({int(i): linear(text) for i, linear in self.navigation.items()}),
        )
        return out

    def _chunks(
        self, images: Tensor, classes: ClassTokens | Tensor, pairs: Tensor | None, shared: list[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[Any, Tensor]]:
        """(index, mask logits) of chunks that fit the memory; every prefix leaves its tokens in `shared`."""
        everything = torch.is_grad_enabled()
        limit = len(images) * len(classes) if everything else self.pairs_at_once(images)
        for first in range(0, max(len(images), 1), max(limit, 1)):
            prefix = self.encoder.prefix(images[first : first + max(limit, 1)])
            count = len(prefix.patches)
            shared.append((prefix.class_token.squeeze(1), prefix.patches))
            if pairs is None:
                yield from self._class_chunks(prefix, classes, limit, first)
            elif everything or max(len(images), len(pairs)) <= limit:
                yield slice(None), self._masks(prefix[pairs[:, 0]], classes[pairs[:, 1]], pairwise=True)
            else:
                mine = ((pairs[:, 0] >= first) & (pairs[:, 0] < first + count)).nonzero().squeeze(1)
                for rows in mine.split(limit) if len(mine) else ():
                    image, c = pairs[rows].unbind(1)
                    yield rows, self._masks(prefix[image - first], classes[c], pairwise=True)

    def _class_chunks(
        self, prefix: ImagePrefix, classes: ClassTokens | Tensor, limit: int, first: int
    ) -> Iterator[tuple[Any, Tensor]]:
        """(index, mask logits) of every class with a prefix's images, whose first is the batch's image `first`."""
        count = len(prefix.patches)
        step = max(limit // max(count, 1), 1)
        for c in range(0, len(classes), step):
            some = classes[c : c + step]
            masks = self._masks(prefix, some, pairwise=False).squeeze(1).unflatten(0, (count, len(some)))
            yield (slice(first, first + count), slice(c, c + step)), masks

    def _masks(self, prefix: ImagePrefix, classes: ClassTokens | Tensor, *, pairwise: bool) -> Tensor:
        """Mask logits [P, 1, h', w']; pairs as in `NavigatedClipViT.suffix`."""
        if isinstance(classes, ClassTokens):
            patches = self.encoder.suffix(prefix, classes, pairwise=pairwise)
        else:
            assert self.gate is not None
            patches = self.gate(prefix.patches.unsqueeze(1), classes.unsqueeze(int(pairwise))).flatten(0, 1)
        out: Tensor = self.decoder(patches, prefix.grid_size)
        return out

    def class_scores(self, out: SegmentationOutput, size: tuple[int, int]) -> Tensor:
        """sigmoid(logits, upsampled bilinearly to `size` = (H, W)), a class alone: [B, C, H, W], pairs [P, 1, H, W]."""
        return reference_scores(out.mask_logits, size)

    def predict_masks(self, out: SegmentationOutput, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
        """The published answer: bool [B, C, H, W] (pairs: [P, 1, H, W]), `class_scores` > `threshold`."""
        return self.class_scores(out, size) > threshold

    def predict_labels(
        self,
        out: SegmentationOutput,
        size: tuple[int, int],
        dtype: torch.dtype = torch.int64,
        *,
        threshold: float | None = None,
    ) -> Tensor:
        """Labels [B, H, W], always equal to `class_scores(out, size).argmax(1)`, without the scores.

        Args:
            threshold: pixels whose best score is not above it are background, -1; None: no background.
        """
        if threshold is None:
            return ops.masks_to_labels(out.mask_logits, size, dtype=dtype)
        if dtype == torch.uint8:
            raise TypeError("dtype: background is -1, expected a signed type with a threshold, got torch.uint8")
        best = ops.masks_to_labels(out.mask_logits, size, dtype=dtype, return_details=True)
        return torch.where(best.scores > threshold, best.labels, -1)

    def loss(
        self,
        out: SegmentationOutput,
        labels: Tensor,
        setting: str = "inductive",
        *,
        pairs: Tensor | None = None,
        ignore_index: int = 255,
    ) -> dict[str, Tensor]:
        """Weighted loss terms; "loss" is their sum.

            mask = mean over pairs and valid pixels of BCE(z, t),   z: logits at the labels' size, t = [label is c]
            dice = mean over pairs of 1 - (2 sum p t + 1) / (sum p + sum t + 1), over valid pixels

        Pixels of any other class, unseen ones too, are background of the class asked for. No valid pixel: mask 0.

        Args:
            out: of the same `pairs`; without: made with `text_embeddings[seen]` where the setting is inductive.
            labels: [B, H, W] in dataset indices, `ignore_index` = ignore.
            setting: "inductive": only seen classes may be asked for; "supervised": any.
            pairs: int64 [P, 2] of (image, dataset index of a class).
        """
        one_of("setting", setting, ("inductive", "supervised"))
        classes = self.num_classes
        if classes is None and setting == "inductive":
            raise ValueError("num_classes: expected a number for the inductive loss, got None")
        targets.check_labels(labels, 1 << 31 if classes is None else classes, ignore_index)
        asked, of_pair = self._asked(out, labels, setting, pairs)
        logits = out.mask_logits.float() if out.mask_logits.dtype != torch.float64 else out.mask_logits
        z = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
        target = (of_pair == asked).to(z.dtype)
        valid = (of_pair != ignore_index).to(z.dtype).expand_as(z)
        bce = F.binary_cross_entropy_with_logits(z, target, weight=valid, reduction="sum")
        terms = {"mask": bce / valid.sum().clamp_min(1)}
        if self.loss_weights["dice"]:
            prob = z.sigmoid() * valid
            overlap, total = (prob * target).sum((2, 3)), (prob + target).sum((2, 3))
            terms["dice"] = (1 - (2 * overlap + 1) / (total + 1)).mean()
        weighted = {f"loss_{name}": term * self.loss_weights[name] for name, term in terms.items()}
        return {**weighted, "loss": torch.stack(list(weighted.values())).sum()}

    def _asked(
        self, out: SegmentationOutput, labels: Tensor, setting: str, pairs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The class of every mask, and the labels it is held against; both broadcast to the masks."""
        rows, channels = out.mask_logits.shape[:2]
        if pairs is not None:
            if (rows, channels) != (len(pairs), 1):
                raise ValueError(f"out: expected that of these {len(pairs)} pairs, got {rows} x {channels} masks")
            image, asked = pairs.unbind(1)
            if setting == "inductive":
                unseen = (asked.unsqueeze(1) != constant(self.seen, asked.device)).all(1)
                check(unseen, asked, _unseen_asked)
            if deferred(pairs.device):
                image = image.clamp(0, len(labels) - 1)
            return asked.view(-1, 1, 1, 1), labels[image].unsqueeze(1)
        known = self.seen if setting == "inductive" else range(self.num_classes or channels)
        if channels != len(known) or rows != len(labels):
            raise ValueError(
                f"out: expected {len(labels)} images with {len(known)} classes, as labels and setting ({setting}) "
                f"have them, got {rows} with {channels}"
            )
        return constant(list(known), labels.device).view(1, -1, 1, 1), labels.unsqueeze(1)


def _unseen_asked(place: list[int], value: int) -> ValueError:
    return ValueError(f"pairs: the inductive loss may ask for seen classes only, got [{value}] in row {place[0]}")


def _assemble(chunks: Iterator[tuple[Any, Tensor]], shape: tuple[int, int]) -> Tensor:
    """All chunks in one tensor [*shape, h', w'], made once: a list and its concatenation would hold it twice."""
    whole: Tensor | None = None
    for index, part in chunks:
        if whole is None and tuple(part.shape[:2]) == shape:
            whole = part
            continue
        if whole is None:
            whole = part.new_empty(*shape, *part.shape[2:])
        whole[index] = part
    assert whole is not None
    return whole


def _text_width(clip: str | dict[str, Any], text_token: str) -> int:
    if text_token == "projected":
        return int(clip_model_config(clip)["embed_dim"])
    return int(clip_model_config(clip, ("text_cfg",))["text_cfg"].get("width", 512))


def _checked_pairs(pairs: Tensor, images: int, text: Tensor) -> Tensor:
    """The pairs, such that they index both."""
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.int64:
        got = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
        raise TypeError(f"pairs: expected an int64 tensor [P, 2] of (image, class), got {got}")
    if pairs.dim() != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"pairs: expected [P, 2] of (image, class) with P >= 1, got {list(pairs.shape)}")
    if pairs.device != text.device:
        raise ValueError(f"pairs: expected the model's device {text.device}, got {pairs.device}")
    limits = constant([images, len(text)], pairs.device)

    def error(place: list[int], pair: list[int]) -> ValueError:
        expected = f"expected an image in 0..{images - 1} and a class in 0..{len(text) - 1}"
        return ValueError(f"pairs: row {place[0]} is {pair}, {expected}")

    bad = ((pairs < 0) | (pairs >= limits)).any(1)
    check(bad, lambda row: pairs.index_select(0, row)[0], error)
    return pairs.clamp(min=0).minimum(limits - 1) if deferred(pairs.device) else pairs
