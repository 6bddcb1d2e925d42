"""Models as files that other runtimes run: torch.export, AOTInductor, ONNX, OpenVINO; each held to the model at once.

A graph takes images, uint8 [B, 3, H, W] in RGB, normalises them itself and gives labels int32 [B, H, W] and their
scores, or mask logits [B, C, h, w]; the class list is baked in, or a second input [C, D]. MAFT's takes proposal masks,
float [B, Nq, H, W] in 0..1, too and gives the proposals' logits [B, Nq, C]. Our ops are decomposed into torch's, so
that nothing of ours is needed to run a file.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from zs3fast.encoders.clip_vit import ClipViT
from zs3fast.models.base import ZeroShotModel
from zs3fast.ops import _dispatch
from zs3fast.ops.masks_to_labels import reference_scores
from zs3fast.utils.files import expect_folder, replacing
from zs3fast.utils.options import one_of

logger = logging.getLogger("zs3fast")

FORMATS = {".pt2": "pt2", ".aoti.pt2": "aoti", ".onnx": "onnx", ".xml": "openvino"}
OUTPUTS = ("labels", "mask_logits")
OPSET = 20
_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}  # packages of the extra [export]
_ONE_FILE = 2**31 - 2**24  # bytes of weights that fit into an ONNX file, which is a protobuf message
MOST_DIFFERENT, LEAST_AGREEING = 1e-4, 0.999


class ExportError(RuntimeError):
    """A file that does not say what the model says; it has been removed."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with the model.

    difference: the largest relative norm of a difference in scores or logits over what was tried.
    agreement:  share of labels that are the same, or None where there are no labels.
    """

    path: Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    difference: float
    agreement: float | None

    def __str__(self) -> str:
        agree = "" if self.agreement is None else f", {100 * self.agreement:.3f} % of labels agree"
        inputs, outputs = ", ".join(self.inputs), ", ".join(self.outputs)
        return f"{self.path} ({self.format}): {inputs} -> {outputs}; difference {self.difference:.1e}{agree}"


class _Graph(nn.Module):
    """What is traced: pixels in, labels and scores or logits out."""

    text: Tensor | None
    mean: Tensor
    std: Tensor

    def __init__(self, model: ZeroShotModel, text: Tensor | None, output: str):
        super().__init__()
        self.model, self.output = model, output
        self.register_buffer("text", text, persistent=True)
        for name, values in (("mean", model.pixel_mean), ("std", model.pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        model: Any = self.model
        text = self.text if self.text is not None else rest[-1]
        pixels = ((images.float() / 255 - self.mean) / self.std).to(next(model.encoder.parameters()).dtype)
        if model.protocol == "proposals":
            return (model.classify(pixels, text, rest[0]),)
        out = model(pixels, text)
        if self.output == "mask_logits":
            return (out.mask_logits,)
        size = (images.shape[2], images.shape[3])
        if self.text is None and model.protocol == "windows":  # a list of any length is not the model's vocabulary
            best = reference_scores(out.mask_logits, size).max(1)
        else:
            best = model.class_scores(out, size).max(1)
        return best.indices.to(torch.int32), best.values


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Our ops -> their references: plain torch, for runtimes that do not know zs3fast."""
    return {
        getattr(torch.ops.zs3fast, op).default: backends["reference"].run
        for op, backends in _dispatch._implementations.items()
    }


def export_model(
    model: ZeroShotModel,
    text_embeddings: Tensor,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    output: str = "labels",
    classes: str = "baked",
    dynamic_batch: bool = True,
    size: tuple[int, int] | None = None,
    any_size: bool = False,
    images: Sequence[Tensor] = (),
) -> ExportReport:
    """Write a model as a graph and run the file against the model.

    Args:
        model: in eval mode, float32, on the CPU.
        text_embeddings: [C, D] of the class list.
        path: .onnx, .xml (OpenVINO IR; its weights lie beside it as .bin), .aoti.pt2 (AOTInductor, for this machine's
            kind of CPU) or .pt2 (torch.export).  format: where the ending does not say it.
        output: "labels" (with scores) or "mask_logits"; MAFT gives its proposals' logits whatever is asked for.
        classes: "baked" into the graph, or "input": a second input `text_embeddings`, of any C; no class counts as seen
            then, so nothing is offset.
        dynamic_batch: any B; else one image.
        size: (H, W) of the images, multiples of the patch size; None: the model's own.
        any_size: images of any size in multiples of the patch size, at least two a side; for ONNX and OpenVINO. Logits
            are upsampled to the image's own size then, also those of square images that are not of the model's size.
        images: uint8 [3, H, W] to compare on; noise is compared on as well.
    Raises:
        ValueError: options that do not fit, or a model that cannot be traced.
        ImportError: the format's package is absent.
        ExportError: logits differ by more than 1e-4 (relative norm) or labels agree in less than 99.9 %.
    """
    target = Path(path)
    kind = _format_of(target, format)
    _check_free(target, kind)
    one_of("output", output, OUTPUTS)
    one_of("classes", classes, ("baked", "input"))
    for package in _NEEDS.get(kind, ()):
        _package(package)
    if any_size and kind not in _NEEDS:
        raise ValueError(f"any_size: expected ONNX or OpenVINO, torch ties a {kind} graph to how its sizes compare")
    weigh = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if kind == "onnx" and weigh > _ONE_FILE:
        raise ValueError(
            f"path: an ONNX file holds weights below 2 GiB, got {weigh / 2**30:.1f} GiB; take .xml or .pt2"
        )
    example = _example(model, size, images)
    text = model.check_text(text_embeddings).detach()
    rest = {}
    if model.protocol == "proposals":
        rest["proposal_masks"] = _blobs(example)
    if classes == "input":
        rest["text_embeddings"] = text
    graph = _Graph(model, None if classes == "input" else text, output).eval()
    program = _traced(graph, example, rest, dynamic_batch, any_size)
    target.parent.mkdir(parents=True, exist_ok=True)
    names = ("images", *rest)
    outputs = ("proposal_logits",) if model.protocol == "proposals" else ("labels", "scores")
    outputs = ("mask_logits",) if len(outputs) == 2 and output == "mask_logits" else outputs
    with replacing(target) as temporary:
        try:
            run = _WRITERS[kind](program, temporary, names, outputs)
            difference, agreement = _compare(graph, run, example, rest, dynamic_batch, any_size)
            if difference > MOST_DIFFERENT or (agreement is not None and agreement < LEAST_AGREEING):
                agree = "" if agreement is None else f", {100 * agreement:.2f} % of labels agree"
                raise ExportError(
                    f"{target}: expected a difference below {MOST_DIFFERENT:g} and {100 * LEAST_AGREEING:g} % of "
                    f"labels, got {difference:.1e}{agree}"
                )
        except BaseException:
            _bin_of(temporary).unlink(missing_ok=True)
            raise
    if kind == "openvino":
        _bin_of(temporary).replace(_bin_of(target))
    return ExportReport(target, kind, names, outputs, difference, agreement)


def _format_of(path: Path, format: str | None) -> str:
    if format is not None:
        return one_of("format", format, tuple(FORMATS.values()))
    for ending in sorted(FORMATS, key=len, reverse=True):
        if path.name.endswith(ending):
            return FORMATS[ending]
    raise ValueError(f"path: expected a name that ends in {', '.join(FORMATS)}, got {path.name}")


def _check_free(path: Path, kind: str) -> None:
    """Raise for a path that no file can be written to, or where the weights beside it would replace another's file."""
    if path.is_dir():
        raise ValueError(f"path: expected a file, got the folder {path}")
    expect_folder(path.parent, "path")
    if kind == "openvino" and _bin_of(path).exists() and not path.exists():
        raise ValueError(f"path: expected no {_bin_of(path)}, where the weights of {path.name} go; take another name")


def _example(model: ZeroShotModel, size: tuple[int, int] | None, images: Sequence[Tensor]) -> Tensor:
    """uint8 [B >= 2, 3, H, W]: noise of two textures, and the images given."""
    patch = _patch_of(model)
    height, width = (model.image_size,) * 2 if size is None else size
    if min(height, width) < patch or height % patch or width % patch:
        raise ValueError(f"size: expected multiples of the patch size {patch}, got {height} x {width}")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 5, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noise = torch.rand(2, 3, height, width, generator=generator)
    made = ((0.7 * smooth + 0.3 * noise) * 255).to(torch.uint8)
    for image in images:
        if image.dtype != torch.uint8 or tuple(image.shape) != (3, height, width):
            raise ValueError(f"images: expected uint8 [3, {height}, {width}], got {image.dtype} {list(image.shape)}")
    return torch.cat([made, *(image[None] for image in images)])


def _patch_of(model: ZeroShotModel) -> int:
    return model.encoder.config.patch_size if isinstance(model.encoder, ClipViT) else 32


def _blobs(images: Tensor, count: int = 5) -> Tensor:
    coarse = torch.rand(len(images), count, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, tuple(images.shape[-2:]), mode="bilinear")


def _traced(
    graph: _Graph, example: Tensor, rest: dict[str, Tensor], dynamic_batch: bool, any_size: bool
) -> ExportedProgram:
    """The graph for images of the example's size, or of any; of proposals and of classes as an input: any number."""
    batch = {0: Dim("B", min=1)} if dynamic_batch else {}
    sides: dict[int, Any] = {}
    if any_size:
        patch = _patch_of(graph.model)
        sides = {2: patch * Dim("h", min=2), 3: patch * Dim("w", min=2)}
        example, rest = _resized(example, rest, (patch, 2 * patch))  # no square, which is a case apart
    rows = slice(None) if dynamic_batch else slice(1)
    given, shapes = [example[rows]], [{**batch, **sides}]
    if "proposal_masks" in rest:
        given.append(rest["proposal_masks"][rows])
        shapes.append({**batch, 1: Dim("Nq", min=1), **sides})
    if "text_embeddings" in rest:
        text = rest["text_embeddings"]
        given.append(torch.cat([text, text[:1]]))  # not one, which torch takes for a constant
        shapes.append({0: Dim("C", min=1)})
    try:
        with torch.no_grad(), _dispatch.use_backend("reference"):
            varied = (shapes[0], tuple(shapes[1:]))[: len(given)]
            program = torch.export.export(graph, tuple(given), dynamic_shapes=varied)
            out: ExportedProgram = program.run_decompositions(decompositions())
            return out
    except (torch._dynamo.exc.UserError, torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode) as error:
        free = " for images of any size" if any_size else ""
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model: {graph.model.method} cannot be traced{free}: {reason}") from None


def _resized(example: Tensor, rest: dict[str, Tensor], more: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and proposals some pixels higher and wider."""
    size = (example.shape[2] + more[0], example.shape[3] + more[1])
    images = nn.functional.interpolate(example.float(), size, mode="bilinear").to(torch.uint8)
    return images, {**rest, **({"proposal_masks": _blobs(images)} if "proposal_masks" in rest else {})}


Run = Callable[..., tuple[Tensor, ...]]


def _write_pt2(program: ExportedProgram, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Run:
    torch.export.save(program, path)
    with _silent("torch._export.serde.serialize"):  # it warns of symbols that no longer matter
        module = torch.export.load(path).module()
    return lambda *given: tuple(module(*given))


def _write_aoti(program: ExportedProgram, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Run:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    aoti_compile_and_package(program, package_path=str(path))
    compiled = aoti_load_package(str(path))
    return lambda *given: tuple(compiled(*given))


def _write_onnx(program: ExportedProgram, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Run:
    onnxruntime = _package("onnxruntime")
    # They warn of each layer norm that is left as it is, and of an empty list of axes.
    with _silent("onnxscript"), _silent("onnx_ir"):
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=True,
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
        )
    assert written is not None
    written.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        feed = {name: value.numpy() for name, value in zip(inputs, given, strict=True)}
        return tuple(map(torch.from_numpy, session.run(None, feed)))

    return run


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Within the block another package's logger says errors alone."""
    its = logging.getLogger(name)
    before = its.level
    its.setLevel(logging.ERROR)
    try:
        yield
    finally:
        its.setLevel(before)


def _write_openvino(program: ExportedProgram, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Run:
    openvino = _package("openvino")
    # its frontend for torch lacks an op here and there that the one for ONNX has
    ways = (openvino.convert_model, lambda given: _converted_over_onnx(openvino, given, path, inputs, outputs))
    problem = None
    for way in ways:
        try:
            converted = way(program)
            for kind, names in (("inputs", inputs), ("outputs", outputs)):
                for port, name in zip(getattr(converted, kind), names, strict=True):
                    port.get_tensor().set_names({name})
            openvino.save_model(converted, str(path), compress_to_fp16=False)
            # float32 asked for: on some CPUs OpenVINO takes bfloat16 by itself
            compiled = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            break
        except (RuntimeError, openvino.frontend.OpConversionFailure) as error:
            problem = " ".join(str(error).split())[-200:]
    else:
        raise ExportError(f"openvino: it cannot take this graph: {problem}")

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        answer = compiled([value.numpy() for value in given])
        return tuple(torch.from_numpy(answer[i]) for i in range(len(outputs)))

    return run


def _converted_over_onnx(
    openvino: Any, program: ExportedProgram, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Any:
    beside = path.with_suffix(".onnx")
    try:
        _write_onnx(program, beside, inputs, outputs)
        return openvino.convert_model(str(beside))
    finally:
        beside.unlink(missing_ok=True)


_WRITERS: dict[str, Callable[[ExportedProgram, Path, tuple[str, ...], tuple[str, ...]], Run]] = {
    "pt2": _write_pt2,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
    "openvino": _write_openvino,
}


def _bin_of(path: Path) -> Path:
    return path.with_suffix(".bin")


def _package(name: str) -> Any:
    """A package of the extra [export]."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f'{name} is not installed; pip install "zs3fast[export]"') from None


@torch.no_grad()
def _compare(
    graph: _Graph, run: Run, example: Tensor, rest: dict[str, Tensor], dynamic_batch: bool, any_size: bool
) -> tuple[float, float | None]:
    """The largest relative difference over all images, one by one and together, and the share of equal labels."""
    patch = _patch_of(graph.model)
    tried = [(example, rest)]
    if any_size:  # its own size, which it was not traced with, and others, none of them square
        tried += [_resized(example, rest, (down * patch, right * patch)) for down, right in ((1, 2), (3, 0), (0, 1))]
    difference, same, pixels = 0.0, 0, 0
    for images, further in tried:
        rows = [slice(i, i + 1) for i in range(len(images))] + ([slice(None)] if dynamic_batch else [])
        for part in rows:
            given = [images[part]]
            given += [value if name == "text_embeddings" else value[part] for name, value in further.items()]
            expected, got = graph(*given), run(*given)
            wide, values = expected[-1].double(), got[-1].double()
            difference = max(difference, float((values - wide).norm() / wide.norm().clamp_min(1e-30)))
            if len(expected) == 2:
                same += int((got[0] == expected[0]).sum())
                pixels += expected[0].numel()
    return difference, same / pixels if pixels else None
