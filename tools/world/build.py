"""`python -m tools.world.build`: small trained models of every method, from nothing.

    python -m tools.world.build                 # trains into runs/, packs into the package
    python -m tools.world.build --methods tagclip --output packed/

The CLIP of the procedural world, then every method on it, each as its setting `METHOD_world` says. What has been
trained stays trained, and a run that was killed goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
import typer
from rich.markup import escape

from tools.world.contrastive import load_contrastive_config, train_clip
from zs3fast import create_model, weights
from zs3fast.training.config import load_config
from zs3fast.training.loop import train
from zs3fast.utils.console import USAGE_ERROR, one_line_errors, stdout
from zs3fast.utils.files import replacing
from zs3fast.weights.files import METADATA_KEY
from zs3fast.weights.packing import BASE, bundled, pack_clip, packed_path, put_base, read_base, save_on_base

METHODS = ("zegclip", "tagclip", "clip_rc", "clsclip", "maft")
MASKCLIP = {"pretrained": None, "image_size": 96}  # nothing to train: the CLIP as it is


def build(
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    methods: Annotated[list[str] | None, typer.Option(help="Only these; the CLIP is always there.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the packed weights.")] = None,
) -> None:
    """Train the CLIP of the procedural world and the methods on it, and pack the weights into the package."""
    folder = bundled() if output is None else output
    with one_line_errors(USAGE_ERROR):
        unknown = sorted(set(methods or ()) - set(METHODS))
        if unknown:
            raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
        clip = trained_clip(runs)
        folder.mkdir(parents=True, exist_ok=True)
        pack_base(clip, folder / BASE)
        plain = create_model("maskclip", clip=load_contrastive_config().clip, **MASKCLIP)
        save_on_base(plain, packed_path(folder, "maskclip"), folder / BASE, (), METADATA_KEY)
        for method in methods or METHODS:
            path = packed_path(folder, method)
            pack_model(trained_model(method, runs, clip), path, folder / BASE)
            stdout.print(f"{escape(str(path))}: {path.stat().st_size / 2**20:.1f} MiB")


def trained_clip(runs: Path) -> Path:
    """open_clip weights of the world's CLIP, trained if they are not there yet."""
    folder = runs / "world_clip"
    path = folder / "weights.safetensors"
    if not path.is_file():
        from dataclasses import replace

        train_clip(replace(load_contrastive_config("world_clip"), output=str(folder)), resume=True)
    return path


def trained_model(
    method: str, runs: Path, clip: Path | str, *, name: str | None = None, overrides: tuple[str, ...] = ()
) -> Path:
    """Weights of a run of `METHOD_world`, trained if they are not there yet.

    Args:
        name: of the run's folder; None: METHOD_world.  overrides: KEY=VALUE lines of the configuration.
    """
    folder = runs / (name or f"{method}_world")
    path = folder / "weights.safetensors"
    if not path.is_file():
        lines = (f"model.pretrained='{clip}'", f"output='{folder}'", *overrides)
        train(load_config(f"{method}_world", list(lines)), resume=True)
    return path


def pack_base(clip: Path, path: Path) -> None:
    """The packed CLIP that the packed models build on."""
    with replacing(path) as temporary:
        safetensors.torch.save_file(pack_clip(safetensors.torch.load_file(clip)), temporary)


def pack_model(trained: Path, path: Path, base: Path) -> None:
    """What a trained model adds to the packed CLIP, in half precision."""
    model, _ = weights.load(trained)
    save_on_base(model, path, base, changed(model, base), METADATA_KEY)


def changed(model: torch.nn.Module, base: Path) -> list[str]:
    """Names of the weights that are not those of the packed CLIP, to half precision."""
    plain = create_model(**{**model.config, "pretrained": None})
    put_base(plain, read_base(base), str(base))
    other = plain.state_dict()
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor.half(), other[name].half())]


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    app.command()(build)
    app()
