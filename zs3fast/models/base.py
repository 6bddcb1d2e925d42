"""What the methods share; for ZegCLIP, TagCLIP and CLIP-RC also the way from mask logits to scores and losses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.encoders.clip_vit import ClipViT
from zs3fast.encoders.config import ClipVisionConfig, vision_config
from zs3fast.encoders.open_clip_weights import load_clip_weights
from zs3fast.encoders.prompted import PromptContext, PromptedClipViT
from zs3fast.labels import targets
from zs3fast.ops.masks_to_labels import reference_scores
from zs3fast.types import ImageFeatures, SegmentationOutput
from zs3fast.utils.constants import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from zs3fast.utils.options import one_of, share

if TYPE_CHECKING:
    from zs3fast.encoders.proposal_clip import ProposalClipResNet

logger = logging.getLogger("zs3fast")

MOST_CLASSES = 1_000_000  # a weight file may ask for any number
SETTINGS = ("inductive", "transductive", "supervised")


def _note_loaded_weights(model: ZeroShotModel, _keys: object) -> None:
    model.weights_loaded = True


def check_dropout(dropout: float) -> float:
    """A share in 0..1, 1 excluded, or an error."""
    return share("dropout", dropout, whole=False)


class ZeroShotModel(nn.Module):
    """What every method shares: a CLIP image tower as `encoder`, a vocabulary with its seen part, settings, text.

    Args:
        clip: open_clip name or configuration dict.  pretrained: open_clip tag, path or None (random weights).
        image_size: side in pixels of the square image the model works on.
        seen: class indices with labels in training, in dataset indices; None: all of `num_classes`.
        num_classes: size of the training vocabulary; None if unknown.
        class_names: the training vocabulary, kept with the model; lets a Segmenter tell seen names from unseen.
        seen_offset: subtracted from the scores of seen classes.
        loss_weights: weight of every loss term, over the method's defaults.

    Attributes:
        weights_loaded: False while all weights are the random ones of the constructor.
    """

    encoder: ClipViT | ProposalClipResNet
    method: ClassVar[str]
    default_loss_weights: ClassVar[dict[str, float]] = {}
    pixel_mean = CLIP_MEAN
    pixel_std = CLIP_STD
    trusty_weighting = "off"
    templates: ClassVar[str | Sequence[str] | None] = None  # prompts it was trained with; None: by the vocabulary
    text_token = "projected"  # which token of the text tower: see TextEncoder.encode
    protocol: ClassVar[str] = "windows"  # or "averaged_windows", "squash", "proposals": see inference/predictors.py
    training_free: ClassVar[bool] = False  # whether CLIP's weights are all it needs
    self_training: ClassVar[bool] = False  # whether it can learn unseen classes from its own labels (transductive)
    clears_offset: ClassVar[bool] = False  # whether self-training leaves no `seen_offset`, and other training one
    pairwise: ClassVar[bool] = False  # whether it answers for (image, class) pairs, each with a mask of its own
    min_score: float | None = None  # pixels below stay unlabelled, where a Segmenter is not told otherwise

    def __init__(
        self,
        *,
        clip: str | dict[str, Any],
        pretrained: str | None,
        image_size: int,
        seen: Sequence[int] | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        seen_offset: float = 0.0,
        loss_weights: dict[str, float] | None = None,
    ):
        super().__init__()
        if num_classes is None and class_names is not None:
            num_classes = len(class_names)
        if num_classes is not None and num_classes > MOST_CLASSES:
            raise ValueError(f"num_classes: expected at most {MOST_CLASSES}, got {num_classes}")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names: expected num_classes = {num_classes} names, got {len(class_names)}")
        unknown = set(loss_weights or {}) - set(self.default_loss_weights)
        if unknown:
            raise ValueError(
                f"loss_weights: expected terms of {list(self.default_loss_weights)}, got {sorted(unknown)}"
            )
        self.image_size = image_size
        self.num_classes = num_classes
        self.class_names = None if class_names is None else list(class_names)
        self.seen = range(num_classes or 0) if seen is None else seen
        self.seen_offset = seen_offset
        self.loss_weights = {**self.default_loss_weights, **(loss_weights or {})}
        self._architecture: dict[str, Any] = {"clip": clip, "pretrained": pretrained}
        self._told_about_other_vocabulary = False
        self.weights_loaded = pretrained is not None
        self.register_load_state_dict_post_hook(_note_loaded_weights)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-safe arguments of `create_model` that build this model again, with its current settings."""
        return {
            "method": self.method,
            **self._architecture,
            "image_size": self.image_size,
            "seen": self.seen,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "seen_offset": self.seen_offset,
            "loss_weights": dict(self.loss_weights),
        }

    def note_origin(self, pretrained: str | None) -> None:
        """Say which CLIP weights the model grew from, whose text tower goes with it."""
        self._architecture["pretrained"] = pretrained

    @property
    def seen(self) -> list[int]:
        """Indices of the classes with labels in training, in dataset indices."""
        return self._seen

    @seen.setter
    def seen(self, seen: Sequence[int]) -> None:
        indices = [int(c) for c in seen]
        if len(set(indices)) != len(indices):
            raise ValueError(f"seen: expected different indices, got {indices}")
        limit = self.num_classes
        if any(c < 0 or (limit is not None and c >= limit) for c in indices):
            raise ValueError(f"seen: expected indices in 0..{'' if limit is None else limit - 1}, got {indices}")
        self._seen = indices

    @property
    def embed_dim(self) -> int:
        """D, the joint width of text and image."""
        return self.encoder.embed_dim

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the published recipe trains, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def check_text(self, text_embeddings: Tensor) -> Tensor:
        """Text embeddings [C, D] in the model's dtype; half-precision rows are promoted, never renormalised."""
        like = next(self.encoder.parameters())
        if not isinstance(text_embeddings, Tensor):
            raise TypeError(
                f"text_embeddings: expected a tensor [C, {self.embed_dim}], got {type(text_embeddings).__name__}"
            )
        if text_embeddings.dim() != 2 or text_embeddings.shape[1] != self.embed_dim or text_embeddings.shape[0] < 1:
            raise ValueError(
                f"text_embeddings: expected [C, {self.embed_dim}] with C >= 1, got {list(text_embeddings.shape)}"
            )
        if not text_embeddings.is_floating_point():
            raise TypeError(f"text_embeddings: expected a floating-point type, got {text_embeddings.dtype}")
        if text_embeddings.device != like.device:
            raise ValueError(
                f"text_embeddings: expected the model's device {like.device}, got {text_embeddings.device}"
            )
        return text_embeddings.to(like.dtype)

    def seen_among(self, classes: int) -> Sequence[int]:
        """`seen` for a list of `classes` names: empty where that is not the model's own vocabulary."""
        if self.num_classes is None or classes == self.num_classes:
            return self.seen
        if not self._told_about_other_vocabulary and not torch.compiler.is_compiling():
            self._told_about_other_vocabulary = True
            logger.info(
                "%d classes given, the model's vocabulary has %d: no class counts as seen here",
                classes,
                self.num_classes,
            )
        return ()


class FeatureModel(ZeroShotModel):
    """A method whose encoder knows no class: an image is encoded once and decoded for any number of class lists."""

    encoder: ClipViT

    def encode(self, images: Tensor) -> ImageFeatures:
        """Images [B, 3, H, W], normalised -> what the encoder knows of them."""
        features: ImageFeatures = self.encoder(images)
        return features

    def decode(self, features: ImageFeatures, text_embeddings: Tensor) -> SegmentationOutput:
        """Features of B images and text embeddings [C, D] -> mask logits [B, C, h, w] and the tokens."""
        raise NotImplementedError

    def class_scores(self, out: SegmentationOutput, size: tuple[int, int]) -> Tensor:
        """Scores [B, C, H, W] at `size` = (H, W)."""
        raise NotImplementedError

    def predict_labels(
        self, out: SegmentationOutput, size: tuple[int, int], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Labels [B, H, W], always equal to `class_scores(out, size).argmax(1)`, without the scores."""
        raise NotImplementedError

    def loss(
        self, out: SegmentationOutput, labels: Tensor, setting: str = "inductive", *, ignore_index: int = 255
    ) -> dict[str, Tensor]:
        """Weighted loss terms from labels [B, H, W]; "loss" is their sum. TypeError where nothing is trained."""
        raise NotImplementedError

    def forward(self, images: Tensor, text_embeddings: Tensor) -> SegmentationOutput:
        """Images [B, 3, H, W], normalised, and text embeddings [C, D] -> mask logits [B, C, h, w] and the tokens."""
        text = self.check_text(text_embeddings)
        return self.decode(self.encode(images), text)


class SegmentationModel(FeatureModel):
    """Base of the one-stage methods: a prompted CLIP encoder, a descriptor and a decoder.

    Args:
        clip: open_clip ViT name or configuration dict.
        num_prompts: K prompts a layer (published: 10 on VOC, 100 on COCO-Stuff).
        image_size: side in pixels of the training crop; the position table is stored for it and mask logits are
            upsampled to it.
        seen_offset: 0.1 for inductive models, 0 after self-training.
        loss_weights: defaults to the method's VOC inductive recipe.
        prompt_depth: see `PromptedClipViT`.  quick_gelu: see `vision_config`.
        double_class_embedding: ZegCLIP's doubled class token (True) or plain CLIP's.
        dropout: of prompts, attention and feed-forward parts in training. Every module that drops has it as its own
            attribute `dropout`, read at each call.
        options: see `ZeroShotModel`.
    """

    encoder: PromptedClipViT
    self_training = clears_offset = True
    pixel_mean = IMAGENET_MEAN  # these methods normalise with ImageNet's statistics, not CLIP's
    pixel_std = IMAGENET_STD

    def __init__(
        self,
        *,
        clip: str | dict[str, Any] = "ViT-B-16",
        pretrained: str | None = None,
        num_prompts: int = 10,
        image_size: int = 512,
        seen_offset: float = 0.1,
        prompt_depth: int | None = None,
        quick_gelu: bool | None = None,
        double_class_embedding: bool = True,
        dropout: float = 0.1,
        **options: Any,
    ):
        vision = vision_config(clip, pretrained, quick_gelu)
        super().__init__(clip=clip, pretrained=pretrained, image_size=image_size, seen_offset=seen_offset, **options)
        self.dropout = dropout = check_dropout(dropout)
        self._architecture.update(
            dropout=dropout,
            num_prompts=num_prompts,
            prompt_depth=prompt_depth,
            quick_gelu=vision.quick_gelu,
            double_class_embedding=double_class_embedding,
        )
        self.encoder = self._make_encoder(
            vision,
            image_size,
            {
                "num_prompts": num_prompts,
                "prompt_depth": prompt_depth,
                "double_class_embedding": double_class_embedding,
                "dropout": dropout,
            },
        )
        if pretrained is not None:
            load_clip_weights(self.encoder, clip, pretrained)

    def _make_encoder(self, vision: ClipVisionConfig, image_size: int, options: dict[str, Any]) -> PromptedClipViT:
        """The image tower; methods with another one override it."""
        return PromptedClipViT(vision, image_size, **options)

    @property
    def patch_size(self) -> int:
        return self.encoder.config.patch_size

    def encode(self, images: Tensor, contexts: PromptContext | None = None) -> ImageFeatures:
        """Images [B, 3, H, W], normalised -> what the encoder knows of them.

        Args:
            contexts: keys and values of the prompts, `encoder.kept_context()`; None: computed here.
        """
        features: ImageFeatures = self.encoder(images, contexts)
        return features

    def upsample_size(self, out: SegmentationOutput) -> tuple[int, int]:
        """The size mask logits are upsampled to before they become scores.

        image_size x image_size, whatever the size of the (square) input, as the official recipe has it; an input that
        is not square, which the official code cannot take, gets its own size.
        """
        h, w = out.mask_logits.shape[-2:]
        return (self.image_size, self.image_size) if h == w else (h * self.patch_size, w * self.patch_size)

    def calibration(
        self, mask_logits: Tensor, trusty_logits: Tensor | None, seen: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """How logits [B, C, h, w] become scores: the arguments of `ops.masks_to_labels` but for sizes.

        The trusty map weighs seen classes against unseen ones: where all C are of one kind it is left out.

        Args:
            seen: indices of the seen among the C classes. None: the model's, where the list is its own vocabulary.
        """
        classes = mask_logits.shape[1]
        seen = self.seen_among(classes) if seen is None else seen
        weighs = trusty_logits is not None and 0 < len(seen) < classes
        return {
            "seen": seen,
            "seen_offset": self.seen_offset,
            "trusty_logits": trusty_logits if weighs else None,
            "trusty_weighting": self.trusty_weighting if weighs else "off",
        }

    def _calibration(self, out: SegmentationOutput, size: tuple[int, int]) -> dict[str, Any]:
        crop = self.upsample_size(out)
        calibration = self.calibration(out.mask_logits, out.trusty_logits)
        return {**calibration, "crop_size": None if crop == tuple(size) else crop}

    def class_scores(self, out: SegmentationOutput, size: tuple[int, int]) -> Tensor:
        """Calibrated scores [B, C, H, W] at `size` = (H, W): exact, differentiable, slow.

        Logits are upsampled bilinearly (`upsample_size`), go through the sigmoid, seen classes lose `seen_offset`, the
        trusty map weighs them, and the result is resized to `size`. Where `out` has another number of classes than
        the model's vocabulary, no class counts as seen.
        """
        return reference_scores(out.mask_logits, size, **self._calibration(out, size))

    def predict_labels(
        self, out: SegmentationOutput, size: tuple[int, int], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """Labels [B, H, W], always equal to `class_scores(out, size).argmax(1)`, without the scores."""
        labels: Tensor = ops.masks_to_labels(out.mask_logits, size, dtype=dtype, **self._calibration(out, size))
        return labels

    def loss(
        self,
        out: SegmentationOutput,
        labels: Tensor,
        setting: str = "inductive",
        *,
        ignore_index: int = 255,
        num_masks: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Weighted loss terms; "loss" is their sum.

        Args:
            out: train-mode output; inductive: made with `text_embeddings[seen]`, else with all classes.
            labels: [B, H, W] in dataset indices, `ignore_index` = ignore (such pixels are negatives for every class).
            setting: "inductive": unseen pixels count as ignored; "transductive": they take the model's own best unseen
                class (self-training); "supervised": labels are used as they are.
            num_masks: what the mask losses are divided by; None: this batch's own number, see `ops.mask_loss`. Gradient
                accumulation gives all micro-batches of an iteration the same.
        """
        one_of("setting", setting, SETTINGS)
        channels = out.mask_logits.shape[1]
        classes = channels if self.num_classes is None and setting == "supervised" else self.num_classes
        if classes is None:
            raise ValueError(f"num_classes: expected a number for the {setting} loss, got None")
        expected = len(self.seen) if setting == "inductive" else classes
        if channels != expected:
            what = "the seen classes" if setting == "inductive" else "all classes"
            raise ValueError(
                f"out: the {setting} loss needs the output for {what} ({expected}), got {channels} classes"
            )
        targets.check_labels(labels, classes, ignore_index)
        mapped = self._training_labels(out, labels, setting, classes, ignore_index)
        terms = self._loss_terms(out, labels, mapped, classes, ignore_index, num_masks)
        weighted = {f"loss_{name}": term * self.loss_weights[name] for name, term in terms.items()}
        return {**weighted, "loss": torch.stack(list(weighted.values())).sum()}

    def _training_labels(
        self, out: SegmentationOutput, labels: Tensor, setting: str, classes: int, ignore_index: int
    ) -> Tensor:
        """Channel indices [B, H, W] of the setting."""
        if setting == "inductive":
            return targets.inductive_labels(labels, self.seen, classes, ignore_index)
        if setting == "transductive":
            return targets.pseudo_labels(labels, out.mask_logits, self.seen, classes, ignore_index)
        return labels.long()

    def _loss_terms(
        self,
        out: SegmentationOutput,
        labels: Tensor,
        mapped: Tensor,
        classes: int,
        ignore_index: int,
        num_masks: Tensor | float | None,
    ) -> dict[str, Tensor]:
        """Unweighted terms by name, from dataset labels and the channel indices `mapped` of the setting."""
        mask = ops.mask_loss(out.mask_logits, mapped, ignore_index=ignore_index, num_masks=num_masks, validate=False)
        return {"mask": mask.focal, "dice": mask.dice}
