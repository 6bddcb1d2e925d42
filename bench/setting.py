"""One line of `run.py`: a method, its class list and the sizes of its network; seeded inputs of that size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ONE_STAGE = ("zegclip", "tagclip", "clip_rc")  # one text-conditioned pass of the encoder, masks for all classes
METHODS = (*ONE_STAGE, "maft", "clsclip")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PUBLISHED_REGIONS = 16  # M of CLIP-RC
IMAGE_SIZES = {"maft": 480, "clsclip": 352}  # published; the others: 512
COCO_UNSEEN = (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160)
LISTS = {20: "voc20", 59: "context59", 150: "ade150", 171: "coco171", 847: "ade847"}


@dataclass(frozen=True)
class Setting:
    """One line of the benchmark.

    Args:
        regions: M, of CLIP-RC.  proposals, mask_side, start_layer: of MAFT; its frame is 4 * mask_side square.
        image_size: of the encoder's input; 0: the method's published one.
        clip_size: of the CLIP that MAFT and ClsCLIP take their position table from.
    """

    method: str
    classes: int
    batch: int = 1
    regions: int = PUBLISHED_REGIONS
    image_size: int = 0
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    embed_dim: int = 512
    decoder_heads: int = 8
    dtype: str = "float32"
    proposals: int = 100
    mask_side: int = 160
    start_layer: int = 8
    clip_size: int = 224

    def __post_init__(self) -> None:
        if not self.image_size:
            object.__setattr__(self, "image_size", IMAGE_SIZES.get(self.method, 512))

    @property
    def prompts(self) -> int:
        """K: 10 a layer for VOC's 20 classes and fewer, 100 for longer lists, as published; MAFT and ClsCLIP: none."""
        if self.method not in ONE_STAGE:
            return 0
        return 10 if self.classes <= 20 else 100

    @property
    def seen(self) -> list[int]:
        """The published seen classes of VOC and COCO-Stuff; of another list the first three quarters."""
        if self.classes == 171:
            return [c for c in range(171) if c not in COCO_UNSEEN]
        return list(range(max(self.classes * 3 // 4, 1)))

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
        if self.method not in ONE_STAGE:
            return f"encoder {self.method}"
        return f"encoder M={self.regions}" if self.encoder_regions else "encoder"

    @property
    def shape(self) -> str:
        return f"{LISTS.get(self.classes, f'c{self.classes}')}-{self.image_size}-B{self.batch}"

    @property
    def label_size(self) -> tuple[int, int]:
        """(H, W) of the label maps: the images' own size, MAFT: the frame its masks lie on."""
        side = 4 * self.mask_side if self.method == "maft" else self.image_size
        return side, side

    @property
    def baseline(self) -> str:
        """What this setting is measured against: ClsCLIP has no official code."""
        return "plain" if self.method == "clsclip" else "official"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def quick(self) -> Setting:
        """The full network on images of 128 pixels: all methods together end in two minutes on two cores."""
        return replace(self, image_size=128, mask_side=32)

    def tiny(self) -> Setting:
        """The same structure at sizes that run in milliseconds."""
        sizes = dict(image_size=64, width=48, layers=3, heads=4, embed_dim=32, decoder_heads=4)
        if self.method == "clsclip":
            sizes["layers"] = 6  # text enters layers 2, 3 and 4
        sizes |= dict(proposals=5, mask_side=16, start_layer=1, clip_size=32)
        return replace(self, **sizes, regions=min(self.regions, 16))  # the grid has 16 patches


def make_inputs(setting: Setting, device: str | torch.device = "cpu") -> tuple[Any, ...]:
    """Seeded images [B, 3, H, W] and unit text embeddings [C, D], for MAFT mask proposals as well."""
    generator = torch.Generator().manual_seed(0)
    side = setting.image_size
    images = torch.randn(setting.batch, 3, side, side, generator=generator)
    text = torch.randn(setting.classes, setting.embed_dim, generator=generator)
    inputs = tuple(x.to(device, setting.torch_dtype) for x in (images, text / text.norm(dim=1, keepdim=True)))
    return (*inputs, make_proposals(setting, device)) if setting.method == "maft" else inputs


def make_proposals(setting: Setting, device: str | torch.device = "cpu") -> Any:
    """Seeded discs that cover about a tenth of the frame each, as mask logits at a quarter of its size."""
    from zs3fast.types import Proposals

    generator = torch.Generator().manual_seed(2)
    B, Nq, side = setting.batch, setting.proposals, setting.mask_side
    centre = torch.rand(B, Nq, 2, 1, 1, generator=generator) * side
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = ((y - centre[:, :, 0]) ** 2 + (x - centre[:, :, 1]) ** 2).sqrt()
    frame = (4 * side, 4 * side)
    return Proposals(
        mask_logits=((0.18 * side - distance) / (0.01 * side)).to(device),
        masks=None,
        valid=torch.ones(B, Nq, dtype=torch.bool, device=device),
        padded_size=frame,
        image_sizes=(frame,) * B,
        original_sizes=(frame,) * B,
        align_corners=True,
    )


def make_labels(setting: Setting) -> Tensor:
    """Seeded label maps [B, H, W] in dataset indices: 16 x 16 blocks of nine classes, seen and unseen, and ignore."""
    generator = torch.Generator().manual_seed(1)
    side = setting.image_size // 16
    present = torch.cat([torch.randperm(setting.classes, generator=generator)[:9], torch.tensor([255])])
    blocks = present[torch.randint(len(present), (setting.batch, side, side), generator=generator)]
    return blocks.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
