"""mmsegmentation's calls on our models, by its 1.x names and, as aliases, its 0.x ones; mmseg itself is not imported.

    segmentor = Segmentor(zs3fast.load_official("zegclip_voc.pth", seen=SEEN, num_classes=20), text_embeddings)
    scores = segmentor.encode_decode(inputs, metas)            # [B, C, H, W], what the official head returns
    samples = segmentor.predict(inputs, data_samples)          # pred_sem_seg.data [1, H, W] at ori_shape
    losses = segmentor.train().loss(inputs, data_samples)      # decode.loss_mask, decode.loss_dice, ...

Inputs are what mmseg's data_preprocessor hands on: normalised images. "Logits" of mmseg are our calibrated class
scores, as in the official code of these methods, whose heads end with the sigmoid and the offset.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.labels.windows import sliding_windows
from zs3fast.models.base import SETTINGS, FeatureModel
from zs3fast.types import ImageFeatures
from zs3fast.utils.options import count, one_of

Metas = Sequence[Mapping[str, Any]]
MODES = ("tensor", "loss", "predict")
_FLIPPED = {"horizontal": (-1,), "vertical": (-2,), "diagonal": (-2, -1)}  # flip_direction: axes
# Our terms under the names that the official heads log.
_OFFICIAL_TERMS = {
    "loss_trusty": "loss_disc",
    "loss_recovery_q": "recovery_loss_q",
    "loss_recovery_k": "recovery_loss_k",
}


class DecodeHead(nn.Module):
    """The head's part of a model: features to scores and losses."""

    def __init__(self, segmentor: Segmentor):
        super().__init__()
        self._owner = (segmentor,)  # in a tuple: no module of its own, no second set of parameters
        self.align_corners = False
        self.ignore_index = 255

    @property
    def num_classes(self) -> int:
        return len(self._owner[0].text_embeddings)

    def forward(self, features: ImageFeatures) -> Tensor:
        """Mask logits [B, C, h, w], before the sigmoid, on the patch grid."""
        owner = self._owner[0]
        return owner.model.decode(features, owner.text_embeddings).mask_logits

    def predict(
        self, features: ImageFeatures, batch_img_metas: Metas, test_cfg: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Scores [B, C, H, W] at `img_shape`, else at the model's own size."""
        owner = self._owner[0]
        out = owner.model.decode(features, owner.text_embeddings)
        height, width = tuple(batch_img_metas[0].get("img_shape", (owner.model.image_size,) * 2))[:2]
        return owner.model.class_scores(out, (height, width))

    def loss(
        self, features: ImageFeatures, batch_data_samples: Sequence[Any], train_cfg: object = None
    ) -> dict[str, Tensor]:
        """Weighted terms under the official names, from samples with `gt_sem_seg.data` [1, H, W]."""
        if len(batch_data_samples) != len(features.patch_tokens):
            raise ValueError(f"data_samples: expected {len(features.patch_tokens)}, got {len(batch_data_samples)}")
        labels = torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in batch_data_samples])
        return self.losses(features, labels.to(features.patch_tokens.device))  # a loader leaves them on the CPU

    def losses(self, features: ImageFeatures, labels: Tensor) -> dict[str, Tensor]:
        """The same from labels [B, H, W] in dataset indices."""
        owner = self._owner[0]
        rows = owner.model.seen if owner.setting == "inductive" else slice(None)
        out = owner.model.decode(features, owner.text_embeddings[rows])
        terms = owner.model.loss(out, labels, owner.setting, ignore_index=self.ignore_index)
        return {_OFFICIAL_TERMS.get(name, name): term for name, term in terms.items() if name != "loss"}


class Segmentor(nn.Module):
    """A ZegCLIP, TagCLIP, CLIP-RC or CLIP-alone model behind mmsegmentation's `EncoderDecoder` calls.

    Args:
        model: from `create_model` or `load_official`.
        text_embeddings: [C, D] of the classes, in the order of the dataset.
        class_names: their names, for `dataset_meta`.
        test_cfg: {"mode": "whole"} or {"mode": "slide", "crop_size": (512, 512), "stride": (426, 426)}; None: slide, by
            the published recipe at the model's size.
        setting: of the loss: "inductive", "transductive" or "supervised".
    Raises:
        TypeError: a model that needs proposals or (image, class) pairs.
    """

    def __init__(
        self,
        model: nn.Module,
        text_embeddings: Tensor,
        *,
        class_names: Sequence[str] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        setting: str = "inductive",
    ):
        super().__init__()
        if not isinstance(model, FeatureModel):
            method = getattr(model, "method", type(model).__name__)
            raise TypeError(f"model: expected one that decodes an encoded image (ZegCLIP, TagCLIP, ...), got {method}")
        if class_names is not None and len(class_names) != len(text_embeddings):
            raise ValueError(f"class_names: expected {len(text_embeddings)}, a name a row, got {len(class_names)}")
        self.model: FeatureModel = model
        self.register_buffer("text_embeddings", model.check_text(text_embeddings), persistent=False)
        self.text_embeddings: Tensor
        side = model.image_size
        published = {"mode": "slide", "crop_size": (side, side), "stride": (max(426 * side // 512, 1),) * 2}
        self.test_cfg = dict(published if test_cfg is None else test_cfg)
        mode = one_of("test_cfg['mode']", str(self.test_cfg.get("mode", "whole")), ("whole", "slide"))
        for key in ("crop_size", "stride") if mode == "slide" else ():
            self.test_cfg[key] = _pair(f"test_cfg['{key}']", self.test_cfg.get(key))
        self.setting = one_of("setting", setting, SETTINGS)
        self.dataset_meta = {"classes": None if class_names is None else tuple(class_names)}
        self.decode_head = DecodeHead(self)

    @property
    def backbone(self) -> nn.Module:
        """The image tower."""
        return self.model.encoder

    @property
    def num_classes(self) -> int:
        return len(self.text_embeddings)

    def data_preprocessor(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """`data`, its "inputs" (RGB, uint8 [3, H, W] in a list, or [B, 3, H, W]) normalised to float [B, 3, H, W]."""
        given = data["inputs"]
        if not isinstance(given, Tensor) and len({tuple(image.shape) for image in given}) != 1:
            sizes = ", ".join(str(list(image.shape)) for image in given)
            raise ValueError(f"inputs: expected images of one size [3, H, W], got {sizes or 'none'}")
        images = (torch.stack(list(given)) if not isinstance(given, Tensor) else given).to(self.text_embeddings) / 255
        mean, std = (
            images.new_tensor(values).view(3, 1, 1) for values in (self.model.pixel_mean, self.model.pixel_std)
        )
        return {**data, "inputs": (images - mean) / std}

    def forward(
        self, inputs: Any = None, data_samples: Sequence[Any] | None = None, mode: str = "tensor", **old: Any
    ) -> Any:
        """mode "tensor": mask logits; "loss": `loss`; "predict": `predict`.

        0.x: (img, img_metas, return_loss=..., gt_semantic_seg or rescale), by these names or in this order.
        """
        inputs, data_samples = old.pop("img", inputs), old.pop("img_metas", data_samples)
        if inputs is None:
            raise TypeError("inputs: expected images [B, 3, H, W] (0.x: img), got None")
        if "return_loss" in old or "gt_semantic_seg" in old:
            train = old.pop("return_loss", True)
            return (self.forward_train if train else self.forward_test)(inputs, data_samples or (), **old)
        if old:
            raise TypeError(f"forward: expected inputs, data_samples and mode, got {', '.join(old)} too")
        one_of("mode", mode, MODES)
        if mode == "loss":
            return self.loss(inputs, data_samples or ())
        return self.predict(inputs, data_samples) if mode == "predict" else self._forward(inputs)

    def extract_feat(self, inputs: Tensor) -> ImageFeatures:
        """What the backbone knows of normalised images [B, 3, H, W]."""
        return self.model.encode(inputs)

    def _forward(self, inputs: Tensor, data_samples: object = None) -> Tensor:
        logits: Tensor = self.decode_head(self.extract_feat(inputs))
        return logits

    def encode_decode(self, inputs: Tensor, batch_img_metas: Metas | None = None) -> Tensor:
        """Scores [B, C, H, W] of normalised images [B, 3, H, W], at their size."""
        out = self.model(inputs, self.text_embeddings)
        height, width = inputs.shape[-2:]
        return self.model.class_scores(out, (height, width))

    def slide_inference(self, inputs: Tensor, batch_img_metas: Metas, rescale: bool = False) -> Tensor:
        """Scores [B, C, H, W], the mean over sliding windows; `rescale` (0.x): at `ori_shape`."""
        height, width = inputs.shape[-2:]
        crop = tuple(min(a, b) for a, b in zip(self.test_cfg["crop_size"], (height, width), strict=True))
        total = inputs.new_zeros(len(inputs), self.num_classes, height, width)
        counts = inputs.new_zeros(1, 1, height, width)
        for y, x in sliding_windows((height, width), crop, tuple(self.test_cfg["stride"])):
            window = (..., slice(y, y + crop[0]), slice(x, x + crop[1]))
            total[window] += self.encode_decode(inputs[window], batch_img_metas)
            counts[window] += 1
        return self._rescaled(total / counts, batch_img_metas, rescale)

    def whole_inference(self, inputs: Tensor, batch_img_metas: Metas, rescale: bool = False) -> Tensor:
        """Scores [B, C, H, W] of whole images."""
        return self._rescaled(self.encode_decode(inputs, batch_img_metas), batch_img_metas, rescale)

    def inference(self, inputs: Tensor, batch_img_metas: Metas, rescale: bool | None = None) -> Tensor:
        """Scores by `test_cfg["mode"]`; with `rescale` given (0.x) their softmax over classes."""
        run = self.slide_inference if self.test_cfg.get("mode") == "slide" else self.whole_inference
        scores = run(inputs, batch_img_metas, bool(rescale))
        return scores if rescale is None else _turned_back(scores.softmax(1), batch_img_metas[0])

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: Sequence[Any] | None = None) -> list[Any]:
        """Samples with `seg_logits.data` [C, H, W] and `pred_sem_seg.data` [1, H, W] at their `ori_shape`."""
        size = tuple(inputs.shape[-2:])
        if data_samples is None:
            data_samples = [SimpleNamespace(metainfo={"ori_shape": size, "img_shape": size}) for _ in inputs]
        if len(data_samples) != len(inputs):
            raise ValueError(f"data_samples: expected {len(inputs)}, got {len(data_samples)}")
        metas = [sample.metainfo for sample in data_samples]
        return self.postprocess_result(self.inference(inputs, metas), list(data_samples))

    def postprocess_result(self, seg_logits: Tensor, data_samples: list[Any] | None = None) -> list[Any]:
        """Scores [B, C, H, W] cut of padding, turned back, resized to `ori_shape`, and their best class."""
        samples = [SimpleNamespace(metainfo={}) for _ in seg_logits] if data_samples is None else data_samples
        for scores, sample in zip(seg_logits, samples, strict=True):
            meta = sample.metainfo
            if "img_padding_size" in meta or "padding_size" in meta:
                left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size"))
                scores = scores[:, top : scores.shape[1] - bottom, left : scores.shape[2] - right]
            scores = _turned_back(scores, meta)
            scores = self._rescaled(scores[None], [meta], "ori_shape" in meta)[0]
            sample.seg_logits = _pixel_data(scores)
            sample.pred_sem_seg = _pixel_data(scores.argmax(0, keepdim=True))
        return samples

    def loss(self, inputs: Tensor, data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Weighted terms, each "decode." and the official name; mmseg's runner adds up those with "loss" in them."""
        return _prefixed(self.decode_head.loss(self.extract_feat(inputs), data_samples))

    # What a runner calls

    def train_step(self, data: Mapping[str, Any], optim_wrapper: Any = None) -> dict[str, Any]:
        """Loss of a batch. 1.x: the optimiser's step is made, values to log are returned; 0.x (`img`): neither stepped
        nor logged, but {"loss", "log_vars", "num_samples"}, for a hook to step upon."""
        if "img" in data:
            total, values = self.parse_losses(self(**data))
            logged = {name: float(value.detach()) for name, value in values.items()}
            return {"loss": total, "log_vars": logged, "num_samples": len(data["img_metas"])}
        context = getattr(optim_wrapper, "optim_context", None)  # half precision and gradient accumulation, there
        with nullcontext() if context is None else context(self):
            losses = self(**self.data_preprocessor(data, True), mode="loss")
        total, values = self.parse_losses(losses)
        optim_wrapper.update_params(total)
        return values

    def val_step(self, data: Mapping[str, Any], optimizer: object = None) -> Any:
        """1.x: `test_step`; 0.x: `train_step`, which steps nothing there."""
        return self.train_step(data) if "img" in data else self.test_step(data)

    def test_step(self, data: Mapping[str, Any]) -> list[Any]:
        """`predict` of images as they come from a loader."""
        samples: list[Any] = self(**self.data_preprocessor(data, False), mode="predict")
        return samples

    def parse_losses(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all terms with "loss" in their name, and every term with that sum, to log."""
        values = {name: value.mean() for name, value in losses.items()}
        total = torch.stack([value for name, value in values.items() if "loss" in name]).sum()
        return total, {**values, "loss": total}

    _parse_losses = parse_losses

    # 0.x

    @property
    def CLASSES(self) -> tuple[str, ...] | None:  # noqa: N802  # the name mmseg reads
        return self.dataset_meta["classes"]

    def forward_dummy(self, img: Tensor) -> Tensor:
        return self._forward(img)

    def forward_test(self, imgs: Any, img_metas: Any, **options: Any) -> list[np.ndarray]:
        """`simple_test`; lists of images and of their metas, as 0.x's loaders give them, are views of the same."""
        if isinstance(imgs, Tensor):
            return self.simple_test(imgs, img_metas, **options)
        if len(imgs) != len(img_metas):
            raise ValueError(f"img_metas: expected {len(imgs)}, a list for each of img, got {len(img_metas)}")
        if len(imgs) == 1:
            return self.simple_test(imgs[0], img_metas[0], **options)
        return self.aug_test(imgs, img_metas, **options)

    @torch.no_grad()
    def aug_test(self, imgs: Sequence[Tensor], img_metas: Sequence[Metas], rescale: bool = True) -> list[np.ndarray]:
        """Label maps [H, W] at `ori_shape` of the mean over several views, flipped ones turned back."""
        if not rescale:
            raise ValueError("rescale: expected True, several views agree at ori_shape alone")
        scores = [self.inference(img, metas, True) for img, metas in zip(imgs, img_metas, strict=True)]
        return list(torch.stack(scores).mean(0).argmax(1).cpu().numpy())

    def forward_train(self, img: Tensor, img_metas: Any, gt_semantic_seg: Tensor) -> dict[str, Tensor]:
        """`loss` from labels [B, 1, H, W] or [B, H, W]."""
        labels = gt_semantic_seg.squeeze(1) if gt_semantic_seg.dim() == 4 else gt_semantic_seg
        return _prefixed(self.decode_head.losses(self.extract_feat(img), labels))

    @torch.no_grad()
    def simple_test(self, img: Tensor, img_meta: Any, rescale: bool = True) -> list[np.ndarray]:
        """Label maps [H, W], one an image, at `ori_shape`."""
        return list(self.inference(img, img_meta, rescale).argmax(1).cpu().numpy())

    @staticmethod
    def _rescaled(scores: Tensor, metas: Metas, rescale: bool) -> Tensor:
        if rescale and not all("ori_shape" in meta for meta in metas):
            raise ValueError("img_metas: expected ori_shape in each, to rescale to, got one without it")
        sizes = {tuple(meta["ori_shape"])[:2] for meta in metas} if rescale else {tuple(scores.shape[-2:])}
        if len(sizes) > 1:
            raise ValueError(f"img_metas: expected one ori_shape in a batch, got {sorted(sizes)}")
        (size,) = sizes
        if size == tuple(scores.shape[-2:]):
            return scores
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def _turned_back(scores: Tensor, meta: Mapping[str, Any]) -> Tensor:
    """Scores [..., H, W] of an image that was flipped, as it was before."""
    if not meta.get("flip"):
        return scores
    direction = one_of("flip_direction", meta.get("flip_direction") or "horizontal", tuple(_FLIPPED))
    return scores.flip(_FLIPPED[direction])


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"{name}: expected (height, width), got {value!r}")
    return count(name, value[0], 1), count(name, value[1], 1)


def _pixel_data(data: Tensor) -> Any:
    """What a sample holds of an image: mmengine's `PixelData` where it is in use, as its samples ask for."""
    structures = sys.modules.get("mmengine.structures")
    return SimpleNamespace(data=data) if structures is None else structures.PixelData(data=data)


def _prefixed(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"decode.{name}": term for name, term in terms.items()}
