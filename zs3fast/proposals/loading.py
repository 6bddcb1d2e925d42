"""Proposers by name, as the command line takes them: "mask2former:facebook/...", "detr:FOLDER", "files:masks"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zs3fast.proposals import _library
from zs3fast.proposals.box_files import FileBoxProposer
from zs3fast.proposals.box_transformers import TransformersBoxProposer
from zs3fast.proposals.boxes import BoxProposer
from zs3fast.proposals.generator import generator_proposer
from zs3fast.proposals.mask_files import FileMaskProposer
from zs3fast.proposals.mask_transformers import TransformersMaskProposer
from zs3fast.proposals.masks import MaskProposer
from zs3fast.proposals.sam import SamProposer

# kind: (class of transformers, accepted model types, a checkpoint to name in messages)
MASK_KINDS = {
    "mask2former": (
        "Mask2FormerForUniversalSegmentation",
        ("mask2former",),
        "facebook/mask2former-swin-tiny-ade-semantic",
    ),
    "maskformer": ("MaskFormerForInstanceSegmentation", ("maskformer",), "facebook/maskformer-swin-base-ade"),
    "sam": ("SamModel", ("sam",), "facebook/sam-vit-huge"),
}
BOX_KINDS = {
    "detr": ("AutoModelForObjectDetection", ("detr",), "facebook/detr-resnet-50"),
    "rtdetr": ("AutoModelForObjectDetection", ("rt_detr", "rt_detr_v2"), "PekingU/rtdetr_r50vd"),
    "yolos": ("AutoModelForObjectDetection", ("yolos",), "hustvl/yolos-tiny"),
    "detector": ("AutoModelForObjectDetection", None, "any object detector of the transformers library"),
}


def load_mask_proposer(spec: str, device: str = "cpu", **options: Any) -> MaskProposer:
    """A mask proposer by name.

    Args:
        spec: "mask2former:NAME", "maskformer:NAME" or "sam:NAME", where NAME is a repository of huggingface.co or a
            local folder; "maskformer:FILE", a MaskFormer of detectron2 in a torch file, such as the generators of
            ZegFormer and ZSSeg, for its masks alone (see `maskformer_official`; no released file was at hand to try);
            "FILE.safetensors", a generator of `zs3fast train maft_proposals_...` (see `ProposalGenerator`);
            "freeseg:FILE", the generator inside an official MAFT checkpoint; or "files:PATH", masks on
            disk (see `FileMaskProposer`).
        device: where its model runs.
        options: arguments of TransformersMaskProposer, SamProposer or FileMaskProposer.
    Raises:
        ValueError: an unknown kind, or weights that are absent or do not fit; the message says how to get them.
        ImportError: transformers is not installed.
    """
    if is_generator(spec):
        return generator_proposer(spec, device, **options)
    kind, name = _split(spec, "proposer", MASK_KINDS, ("freeseg:maft.pth", "files:masks.npz"))
    if kind == "files":
        return FileMaskProposer(name, **options)
    if kind == "freeseg":
        from zs3fast.proposals.freeseg import FreeSegProposer

        found = FreeSegProposer.from_official(name, device=device, **options)
        return found  # type: ignore[return-value]  # it is given its class list first, see `for_classes`
    if kind == "maskformer" and Path(name).is_file():
        from zs3fast.proposals.maskformer_official import load_official_maskformer

        return TransformersMaskProposer(load_official_maskformer(name).to(device), classes=False, **options)
    model_class, model_types, _ = MASK_KINDS[kind]
    model = _library.load(model_class, name, model_types).to(device)
    if kind == "sam":
        return SamProposer(model, **options)
    return TransformersMaskProposer(model, **{**_library.normalisation(name), **options})


def is_generator(spec: str) -> bool:
    """Whether a mask proposer by that name is a generator that `zs3fast train` made."""
    return spec.endswith(".safetensors") and spec.partition(":")[0] not in (*MASK_KINDS, "freeseg", "files")


def load_box_proposer(spec: str, device: str = "cpu", **options: Any) -> BoxProposer:
    """A box proposer by name.

    Args:
        spec: "detr:NAME", "rtdetr:NAME", "yolos:NAME" or, for every other detector of the transformers library,
            "detector:NAME", where NAME is a repository of huggingface.co or a local folder; "detr", "rtdetr" or "yolos"
            alone stand for a usual one; or "files:PATH" or PATH.json, boxes in a JSON file (see `FileBoxProposer`).
        device: where its model runs.
        options: arguments of TransformersBoxProposer.
    Raises:
        As `load_mask_proposer`.
    """
    if spec in BOX_KINDS and " " not in BOX_KINDS[spec][2]:
        spec = f"{spec}:{BOX_KINDS[spec][2]}"
    elif spec.endswith(".json") and not spec.startswith("files:"):
        spec = f"files:{spec}"
    kind, name = _split(spec, "boxes", BOX_KINDS, ("files:boxes.json",))
    if kind == "files":
        return FileBoxProposer(name, **options)
    model_class, model_types, _ = BOX_KINDS[kind]
    model = _library.load(model_class, name, model_types).to(device)
    return TransformersBoxProposer(model, _library.load_processor(name), **options)


def _split(spec: str, argument: str, kinds: dict[str, Any], others: tuple[str, ...]) -> tuple[str, str]:
    """(kind, name) of a specification; `others` are examples of kinds that are no model of the library."""
    kind, _, name = spec.partition(":")
    known = (*kinds, *(other.partition(":")[0] for other in others))
    if kind not in known or not name:
        examples = [*(f"{key}:{value[2]}" for key, value in kinds.items() if " " not in value[2]), *others]
        raise ValueError(
            f"{argument}: expected KIND:NAME with KIND one of {', '.join(known)}, such as {', '.join(examples)}; "
            f"got {spec!r}"
        )
    return kind, name
