"""MAFT (NeurIPS 2023): mask proposals classified in one pass of a CLIP that was made aware of masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast import ops
from zs3fast.encoders.config import vision_config
from zs3fast.encoders.open_clip_weights import load_clip_weights
from zs3fast.encoders.proposal_clip import FREEZABLE, ProposalClipResNet, ProposalClipViT
from zs3fast.labels import targets
from zs3fast.labels.ensemble import FORMS, ensemble_class_weights
from zs3fast.labels.proposal_targets import soft_iou
from zs3fast.models.base import ZeroShotModel
from zs3fast.models.registry import register_model
from zs3fast.ops.proposals_to_labels import reference_scores
from zs3fast.proposals.masks import check_proposals, soft_masks
from zs3fast.types import ProposalOutput, Proposals
from zs3fast.utils.open_clip import clip_model_config
from zs3fast.utils.options import one_of, share
from zs3fast.utils.precision import without_autocast
from zs3fast.utils.waiting import check, deferred

TEMPERATURE = 100.0


def _ma_divergence(predicted: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted | predicted) of every row as a distribution over the proposals, the mean over rows; our reading."""
    wanted, predicted = (rows / rows.sum(-1, keepdim=True).clamp_min(1e-8) for rows in (wanted, predicted))
    return F.kl_div(predicted.clamp_min(1e-8).log(), wanted, reduction="batchmean")


MA_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": F.smooth_l1_loss,
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "kl": _ma_divergence,
}


@register_model("maft")
class MAFT(ZeroShotModel):
    """Every proposal is a class token of its own that sees the patches under its mask; text tells its class.

    Args:
        clip: open_clip ViT or ResNet name, or configuration dict ("ViT-B-16", "ViT-L-14", "RN50" are published).
        pretrained: open_clip tag, path or None.
        start_layer: L, the first masked layer of a ViT; the official code has 8 for any tower.
        image_size: side in pixels that images are squashed to (published: 480).
        ensemble: lambda, the share of the proposer's own class scores; published with seen and unseen classes: 0.8 on
            COCO, 0.7 on VOC, 2/3 on ADE20K; 0 (default): CLIP's opinion alone, the open-vocabulary setting.
        ensemble_form: "freeseg" (ZSSeg's too), "zegformer" or "paper", see `ensemble_class_weights`.
        ma_loss: "smooth_l1" (published), "l1", "l2" or "kl": rows of table 4b.
        iou_range: what a class's IoU with the proposals is stretched to 0..1 over: "class", its own row (the official
            code), or "all" classes of the image (eq. 5 as printed).
        freeze: units of a ViT that do not train, of "cls", "pos", "mlp", "conv", "proj" (table 4d); None: all, as in
            the official code. The paper's best row leaves "proj" out.
        seen_offset: taken off the scores of seen classes at the end; ZegFormer: 0.1.
        quick_gelu: see `vision_config`.
        options: see `ZeroShotModel`.
    """

    encoder: ProposalClipViT | ProposalClipResNet
    default_loss_weights = {"ma": 1.0, "dis": 0.1}
    templates = "maft"
    protocol = "proposals"
    self_training = True

    def __init__(
        self,
        *,
        clip: str | dict[str, Any] = "ViT-B-16",
        pretrained: str | None = None,
        start_layer: int = 8,
        image_size: int = 480,
        ensemble: float = 0.0,
        ensemble_form: str = "freeseg",
        ma_loss: str = "smooth_l1",
        iou_range: str = "class",
        freeze: Sequence[str] | None = None,
        quick_gelu: bool | None = None,
        **options: Any,
    ):
        super().__init__(clip=clip, pretrained=pretrained, image_size=image_size, **options)
        self.ensemble = share("ensemble", ensemble)
        self.ensemble_form = one_of("ensemble_form", ensemble_form, FORMS)
        self.ma_loss = one_of("ma_loss", ma_loss, tuple(MA_LOSSES))
        self.iou_range = one_of("iou_range", iou_range, ("class", "all"))
        if freeze is not None and (isinstance(freeze, str) or not isinstance(freeze, Sequence)):
            raise ValueError(f"freeze: expected a list of {', '.join(FREEZABLE)}, got {freeze!r}")
        units = list(FREEZABLE) if freeze is None else [one_of("freeze", unit, tuple(FREEZABLE)) for unit in freeze]
        config = clip_model_config(clip)
        if isinstance(config["vision_cfg"].get("layers"), int):
            vision = vision_config(clip, pretrained, quick_gelu)
            self.encoder = ProposalClipViT(vision, start_layer=start_layer, freeze=units)
            quick_gelu = vision.quick_gelu
        else:
            if freeze is not None:
                raise ValueError(
                    f"freeze: expected None for a ResNet, since these are units of a ViT, got {list(freeze)}"
                )
            self.encoder = ProposalClipResNet(config["vision_cfg"], config["embed_dim"])
        self._architecture.update(
            start_layer=start_layer, quick_gelu=quick_gelu, freeze=None if freeze is None else units
        )
        if pretrained is not None:
            load_clip_weights(self.encoder, clip, pretrained)

    @property
    def config(self) -> dict[str, Any]:
        names = ("ensemble", "ensemble_form", "ma_loss", "iou_range")
        return {**super().config, **{name: getattr(self, name) for name in names}}

    def proposal_embeddings(self, images: Tensor, proposal_masks: Proposals | Tensor) -> Tensor:
        """Embeddings [B, Nq, D], not normalised, of what lies under soft masks [B, Nq, H, W] in 0..1.

        The masks cover the same frame as the images, at any resolution. A mask that reaches 0.5 on no patch is allowed:
        its token sees itself alone.
        """
        proposals = as_proposals(proposal_masks, len(images))
        tokens, grid = self.encoder.trunk(images)
        return self.encoder.proposal_head(tokens, mask_bits(proposals, grid))

    def classify(self, images: Tensor, text_embeddings: Tensor, masks: Tensor) -> Tensor:
        """Logits [B, Nq, C] of soft masks [B, Nq, H, W] in 0..1 against text [C, D]: tensors alone, nothing checked."""
        tokens, grid = self.encoder.trunk(images)
        return _similarity(self.encoder.proposal_head(tokens, ops.masks_to_bits(masks, grid)), text_embeddings)

    def image_embedding(self, images: Tensor) -> Tensor:
        """Embedding [B, D], not normalised, of whole images [B, 3, H, W]: CLIP's own."""
        return self.encoder.image_head(self.encoder.trunk(images)[0])

    def forward(
        self,
        images: Tensor,
        text_embeddings: Tensor,
        proposals: Proposals | Tensor,
        *,
        non_object: bool | None = None,
    ) -> ProposalOutput:
        """Classify proposals.

        Args:
            images: [B, 3, H, W] normalised with CLIP's statistics: the padded frame, squashed to image_size.
            text_embeddings: [C, D].
            proposals: soft masks on the same padded frame, as `Proposals` or [B, Nq, Hp, Wp] in 0..1.
            non_object: whether the last row is the "no object" embedding of official checkpoints, which only proposers
                use and which is left out here. None: it is where there is one row more than `num_classes`.
        """
        text = self._class_rows(text_embeddings, non_object)
        proposals = as_proposals(proposals, len(images))
        tokens, grid = self.encoder.trunk(images)
        embeddings = self.encoder.proposal_head(tokens, mask_bits(proposals, grid))
        image_embedding = self.encoder.image_head(tokens) if self.training else None
        return self._output(embeddings, text, proposals, grid, image_embedding)

    def classify_crops(
        self,
        sub_images: Tensor,
        rows: Tensor,
        text_embeddings: Tensor,
        proposals: Proposals,
        batch_size: int = 32,
        *,
        non_object: bool | None = None,
    ) -> ProposalOutput:
        """The baseline that MAFT replaced: plain CLIP on every proposal cut out as an image of its own.

        Args:
            sub_images, rows: [P, 3, side, side] and [P, 2], (image, proposal) of each, of
                `zs3fast.proposals.sub_images`. Proposals without an image keep a zero embedding: all classes alike.
            non_object: as for `forward`.
        """
        embeddings, grid = self.crop_embeddings(sub_images, rows, proposals, batch_size)
        return self.decode(embeddings, text_embeddings, proposals, grid, non_object=non_object)

    def crop_embeddings(
        self, sub_images: Tensor, rows: Tensor, proposals: Proposals, batch_size: int = 32
    ) -> tuple[Tensor, tuple[int, int]]:
        """Embeddings [B, Nq, D] of proposals cut out, see `classify_crops`, and a patch grid to show their masks on."""
        like = next(self.encoder.parameters())
        embeddings = like.new_zeros(*proposals.valid.shape, self.embed_dim)
        for images, places in zip(sub_images.split(batch_size), rows.split(batch_size)):
            embeddings[places[:, 0], places[:, 1]] = self.image_embedding(images)
        height, width = (max(side // 16, 1) for side in proposals.padded_size)
        return embeddings, (height, width)

    def decode(
        self,
        embeddings: Tensor,
        text_embeddings: Tensor,
        proposals: Proposals,
        grid: tuple[int, int],
        *,
        non_object: bool | None = None,
    ) -> ProposalOutput:
        """Classes of proposals from their embeddings [B, Nq, D], which no class list changes; see `forward`."""
        return self._output(embeddings, self._class_rows(text_embeddings, non_object), proposals, grid, None)

    def _class_rows(self, text_embeddings: Tensor, non_object: bool | None) -> Tensor:
        text = self.check_text(text_embeddings)
        if non_object is None:
            non_object = self.num_classes is not None and len(text) == self.num_classes + 1
        return text[:-1] if non_object else text

    def _output(
        self,
        embeddings: Tensor,
        text: Tensor,
        proposals: Proposals,
        grid: tuple[int, int],
        image_embedding: Tensor | None,
    ) -> ProposalOutput:
        logits = _similarity(embeddings, text)
        masks = proposals.masks
        if masks is None:
            assert proposals.mask_logits is not None  # one of both is there
            masks = proposals.mask_logits.sigmoid()
        masks = F.interpolate(masks.float(), grid, mode="bilinear", align_corners=False)
        weights = self.class_weights(logits, proposals)
        on_grid = torch.einsum("bqc,bqhw->bchw", weights.float(), masks)
        return ProposalOutput((on_grid + 1e-6).log(), embeddings, logits, proposals, text, image_embedding)

    def class_weights(self, proposal_logits: Tensor, proposals: Proposals, seen: Sequence[int] | None = None) -> Tensor:
        """Class weights A [B, Nq, C]: CLIP's softmax, in an ensemble with the proposer's where `ensemble` > 0.

        seen: which classes count as seen; None: the model's, where the list is its own vocabulary.
        """
        self._check_columns(proposals, proposal_logits.shape[-1])
        usable = None
        if self.ensemble > 0 and proposals.class_scores is not None:
            usable = usable_proposals(proposals)
        weights = ensemble_class_weights(
            proposal_logits.softmax(-1),
            proposals.class_scores,
            seen=self.seen_among(proposal_logits.shape[-1]) if seen is None else seen,
            weight=self.ensemble,
            usable=usable,
            form=self.ensemble_form,
        )
        return weights * proposals.valid.unsqueeze(-1)

    def class_scores(self, out: ProposalOutput, size: tuple[int, int], seen: Sequence[int] | None = None) -> Tensor:
        """Scores [B, C, H, W] = sum over proposals of class weight times mask: exact, differentiable, large.

        Masks are cropped to the image inside the padded frame and resized bilinearly to `size`; values may exceed 1.
        `seen` as for `class_weights`.
        """
        return torch.cat([reference_scores(*args, size, **frame) for args, frame in self._fusion(out, seen)])

    def frame_scores(
        self, out: ProposalOutput, classes: slice, seen: Sequence[int] | None = None, chunk: int = 8
    ) -> Tensor:
        """`class_scores` [q, h, w] of some classes of the first image, on its frame: before they are resized.

        Args:
            chunk: proposals whose masks exist at the frame's size at once.
        """
        (weights, masks), frame = self._fusion(out, seen)[0]
        total: Tensor | None = None
        for part, weight in zip(masks.split(chunk, 1), weights[..., classes].split(chunk, 1), strict=True):
            scores = reference_scores(weight, part, frame["image_size"], **frame)[0]
            total = scores if total is None else total.add_(scores)
        assert total is not None  # there is a proposal at least
        return total

    def predict_labels(self, out: ProposalOutput, size: tuple[int, int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Labels [B, H, W], always equal to `class_scores(out, size).argmax(1)`, without the scores."""
        labels = [ops.proposals_to_labels(*args, size, dtype=dtype, **frame) for args, frame in self._fusion(out)]
        return torch.cat(labels)

    def label_details(
        self, out: ProposalOutput, size: tuple[int, int], seen: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Labels int32 [B, H, W] and the score [B, H, W] of each pixel's class; `seen` as for `class_weights`."""
        parts = [
            ops.proposals_to_labels(*args, size, dtype=torch.int32, return_scores=True, **frame)
            for args, frame in self._fusion(out, seen)
        ]
        return torch.cat([labels for labels, _ in parts]), torch.cat([scores for _, scores in parts])

    def _fusion(
        self, out: ProposalOutput, seen: Sequence[int] | None = None
    ) -> list[tuple[tuple[Tensor, Tensor], dict[str, Any]]]:
        """Arguments of `proposals_to_labels`, image by image, since each has its own frame."""
        proposals, classes = out.proposals, out.proposal_logits.shape[-1]
        seen = self.seen_among(classes) if seen is None else seen
        weights = self.class_weights(out.proposal_logits, proposals, seen)
        logits = proposals.masks is None
        masks = proposals.mask_logits if logits else proposals.masks
        assert masks is not None
        if self.seen_offset and len(seen):
            # The offset as one more proposal, which covers everything and speaks against the seen classes.
            against = weights.new_zeros(len(weights), 1, classes)
            against[..., list(seen)] = -self.seen_offset
            everywhere = masks.new_full((len(masks), 1, *masks.shape[2:]), 100.0 if logits else 1.0)
            weights, masks = torch.cat([weights, against], 1), torch.cat([masks, everywhere], 1)
        return _by_image(proposals, weights, masks, logits)

    @torch.no_grad()
    def pseudo_labels(self, out: ProposalOutput, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
        """Self-training labels (table 8): every unseen pixel takes the best unseen class of the proposals over it.

        The choice is CLIP's alone, A^c of the unseen classes times mask, as it is now; all other pixels stay, and one
        that no proposal covers becomes `ignore_index`. The paper does not say how its labels were made: our reading is
        ZegCLIP's way, which is told where unseen pixels are and guesses what they show.

        Args:
            out: of all classes, the model's own vocabulary.
            labels: [B, H, W] in dataset indices, on the image inside the proposals' frame.
        """
        classes = out.proposal_logits.shape[-1]
        unseen = sorted(set(range(classes)) - set(self.seen_among(classes)))
        if not unseen:
            return labels
        index, proposals = torch.tensor(unseen, device=labels.device), out.proposals
        weights = (out.proposal_logits.softmax(-1) * proposals.valid.unsqueeze(-1))[..., index]
        logits = proposals.masks is None
        masks = proposals.mask_logits if logits else proposals.masks
        assert masks is not None
        size = (labels.shape[-2], labels.shape[-1])
        found = [
            ops.proposals_to_labels(*args, size, dtype=torch.int64, return_scores=True, **frame)
            for args, frame in _by_image(proposals, weights.contiguous(), masks, logits)
        ]
        best, scores = (torch.cat(parts) for parts in zip(*found))
        guessed = torch.where(scores > 0, index[best], ignore_index)
        hidden = targets.unseen_pixels(labels, self.seen, classes, ignore_index)
        return torch.where(hidden, guessed, labels.long())

    def loss(
        self,
        out: ProposalOutput,
        gt_masks: Tensor,
        gt_labels: Tensor,
        teacher_embedding: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted loss terms; "loss" is their sum (section 3.3, eq. 6 to 8).

        loss_ma: `ma_loss` between every present class's column of the proposals' softmax and their soft IoU with its
        mask, stretched to 0..1; loss_dis: smooth L1 between the softmax of student and teacher on the whole image.

        Args:
            out: train-mode output.
            gt_masks: [B, G, Hp, Wp], one binary mask a class, on the padded frame; ignored pixels are in none.
            gt_labels: [B, G] class indices; -1: no such mask. Without any mask loss_ma is 0.
            teacher_embedding: [B, D] of the untouched CLIP for the same images; None leaves loss_dis out.
        """
        self._check_targets(out, gt_masks, gt_labels)
        if deferred(gt_labels.device):
            gt_labels = gt_labels.clamp(-1, out.proposal_logits.shape[-1] - 1)
        probabilities = _wide(out.proposal_logits).softmax(-1)
        masks = soft_masks(out.proposals)
        columns, ranges = [], []
        for image in range(len(masks)):
            rows = gt_labels[image] >= 0
            iou = soft_iou(masks[image], gt_masks[image, rows])
            if self.iou_range == "class" or not len(iou):
                low, high = iou.aminmax(dim=1, keepdim=True)
            else:
                low, high = iou.aminmax()
            ranges.append((iou - low) / (high - low + 1e-8))
            columns.append(probabilities[image, :, gt_labels[image, rows]].t())
        predicted, wanted = torch.cat(columns), torch.cat(ranges)
        terms = {"ma": MA_LOSSES[self.ma_loss](predicted, wanted) if len(wanted) else predicted.sum()}
        if teacher_embedding is not None:
            if out.image_embedding is None:
                raise ValueError("out: expected an output of train mode for distillation, got one of eval mode")
            student, teacher = (
                _similarity(part, out.text_embeddings).softmax(-1) for part in (out.image_embedding, teacher_embedding)
            )
            terms["dis"] = F.smooth_l1_loss(student, teacher.detach())
        weighted = {f"loss_{name}": term * self.loss_weights[name] for name, term in terms.items()}
        return {**weighted, "loss": torch.stack(list(weighted.values())).sum()}

    @staticmethod
    def _check_columns(proposals: Proposals, classes: int) -> None:
        scores = proposals.class_scores
        if scores is not None and proposals.class_names is None and scores.shape[-1] != classes + 1:
            raise ValueError(
                f"proposals: expected class_scores of {classes + 1} columns, got {scores.shape[-1]}: one for each of "
                f"the "
                f"{classes} classes asked for and one for no object"
            )

    @staticmethod
    def _check_targets(out: ProposalOutput, gt_masks: Tensor, gt_labels: Tensor) -> None:
        batch, _, classes = out.proposal_logits.shape
        frame = out.proposals.padded_size
        if gt_masks.dim() != 4 or gt_masks.shape[0] != batch or gt_masks.shape[-2:] != frame:
            raise ValueError(
                f"gt_masks: expected [B, G, Hp, Wp] with B = {batch} on the proposals' frame {tuple(frame)}, "
                f"got {list(gt_masks.shape)}"
            )
        if gt_labels.shape != gt_masks.shape[:2] or gt_labels.is_floating_point():
            raise ValueError(
                f"gt_labels: expected integers [B, G] = {list(gt_masks.shape[:2])}, got {gt_labels.dtype} "
                f"{list(gt_labels.shape)}"
            )

        def error(place: list[int], found: list[int]) -> ValueError:
            value, low, high = found
            expected = f"expected classes 0..{classes - 1} or -1 (none), got {low}..{high}"
            return ValueError(f"gt_labels: {expected}; first {value} at [b, g] = {place}")

        def named(first: Tensor) -> Tensor:
            return torch.cat([gt_labels.flatten()[first], torch.stack(gt_labels.aminmax())])

        check((gt_labels < -1) | (gt_labels >= classes), named, error)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _similarity(embeddings: Tensor, text: Tensor) -> Tensor:
    """100 * cosine [..., C] of embeddings [..., D] and text [C, D], in float32 at least: half types would round it."""
    with without_autocast(embeddings.device):
        return TEMPERATURE * F.normalize(_wide(embeddings), dim=-1) @ F.normalize(_wide(text), dim=-1).t()


def _by_image(
    proposals: Proposals, weights: Tensor, masks: Tensor, logits: bool
) -> list[tuple[tuple[Tensor, Tensor], dict[str, Any]]]:
    """Arguments of `proposals_to_labels`, image by image."""
    frame = {"logits": logits, "padded_size": proposals.padded_size, "align_corners": proposals.align_corners}
    return [
        ((weights[i : i + 1], masks[i : i + 1]), {**frame, "image_size": size})
        for i, size in enumerate(proposals.image_sizes)
    ]


def mask_bits(proposals: Proposals, grid: tuple[int, int]) -> Tensor:
    """Which patches each proposal keeps: bits [B, Nq, ceil(N / 32)] of soft mask >= 0.5 on the patch grid."""
    if proposals.masks is not None:
        return ops.masks_to_bits(proposals.masks, grid)
    assert proposals.mask_logits is not None  # one of both is there
    return ops.masks_to_bits(
        proposals.mask_logits,
        grid,
        logits=True,
        padded_size=proposals.padded_size,
        align_corners=proposals.align_corners,
    )


@torch.no_grad()
def usable_proposals(proposals: Proposals, chunk: int = 8) -> Tensor:
    """[B, Nq] bool: real proposals whose mask exceeds 0.5 somewhere on the image, padding apart."""
    batch, count = proposals.valid.shape
    inside = torch.zeros(batch, 1, *proposals.padded_size, dtype=torch.bool, device=proposals.valid.device)
    for index, (height, width) in enumerate(proposals.image_sizes):
        inside[index, :, :height, :width] = True
    parts = []
    for start in range(0, count, chunk):  # all masks of a batch at full size would not fit
        rows = slice(start, start + chunk)
        masks, logits = (None if m is None else m[:, rows] for m in (proposals.masks, proposals.mask_logits))
        part = replace(proposals, masks=masks, mask_logits=logits)
        parts.append(((soft_masks(part) > 0.5) & inside).flatten(2).any(-1))
    return torch.cat(parts, dim=1) & proposals.valid


def _check_mask_values(given: Tensor, soft: bool) -> None:
    def hold_nan(place: list[int], value: float) -> ValueError:
        return ValueError(f"proposals: the masks hold NaN, first at [b, n, y, x] = {place}")

    def outside(place: list[int], found: list[float]) -> ValueError:
        got = f"got {found[0]:.4g}..{found[1]:.4g}; logits go in mask_logits"
        return ValueError(f"proposals: soft masks are in 0..1, {got}; the first outside is at [b, n, y, x] = {place}")

    check(given.isnan(), given, hold_nan)
    if soft:
        check((given < 0) | (given > 1), lambda first: torch.stack(given.float().aminmax()), outside)


def as_proposals(proposals: Proposals | Tensor, batch: int) -> Proposals:
    """Proposals from themselves or from soft masks [B, Nq, Hp, Wp] that cover the image; checked.

    Raises:
        TypeError, ValueError: masks of another batch or rank, none at all, NaN, or values outside 0..1.
    """
    if not isinstance(proposals, (Proposals, Tensor)):
        raise TypeError(f"proposals: expected Proposals or a tensor [B, Nq, H, W], got {type(proposals).__name__}")
    masks = proposals if isinstance(proposals, Tensor) else proposals.masks
    logits = None if isinstance(proposals, Tensor) else proposals.mask_logits
    given = logits if masks is None else masks
    if given is None:
        raise ValueError("proposals: expected masks or mask_logits, got neither")
    if given.dim() != 4 or given.shape[0] != batch:
        raise ValueError(f"proposals: expected masks [B, Nq, H, W] with B = {batch}, got {list(given.shape)}")
    if not given.shape[1]:
        raise ValueError("proposals: expected at least one, got none")
    _check_mask_values(given, soft=masks is not None)
    if masks is not None and not masks.is_floating_point():
        masks = masks.float()
    if isinstance(proposals, Proposals):
        if not torch.compiler.is_compiling():
            check_proposals(proposals)
        return replace(proposals, masks=masks)
    assert masks is not None
    frame = (masks.shape[-2], masks.shape[-1])
    sizes = (frame,) * batch
    return Proposals(
        mask_logits=None,
        masks=masks,
        valid=torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device),
        padded_size=frame,
        image_sizes=sizes,
        original_sizes=sizes,
    )
