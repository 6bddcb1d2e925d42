"""`zs3fast app`."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from zs3fast.utils import cli_options as options
from zs3fast.utils.console import RUN_ERROR, USAGE_ERROR, one_line_errors, stdout

EPILOG = "**Example**: `zs3fast app --weights zegclip_voc.safetensors`"


def app(
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            help="Weights to offer beside those in the package and the cache; may be given several times.",
        ),
    ] = None,
    clip: options.Clip = None,
    pretrained: options.Pretrained = None,
    proposer: options.Proposer = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets everyone in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; left out: the first free one from 7860 on.")
    ] = None,
    max_upload: Annotated[float, typer.Option(help="Largest upload, in MiB.")] = 20.0,
    max_pixels: Annotated[float, typer.Option(help="Largest image, in millions of pixels.")] = 25.0,
    max_classes: Annotated[int, typer.Option(help="Most class names at once.")] = 1000,
) -> None:
    """Show a page for one photo at a time: drop it, type words, see which pixels are which.

    Runs on this machine alone and works offline with the models in the package. Needs `zs3fast[app]`.
    """
    with tempfile.TemporaryDirectory(prefix="zs3fast_app_") as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(folder) / "uploads"))  # gone with the page
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        with one_line_errors(USAGE_ERROR):
            given: dict[str, Any] = {"max_upload": max_upload, "max_pixels": max_pixels, "max_classes": max_classes}
            for name, value in given.items():
                if not 0 < value < 1e6:
                    raise ValueError(f"{name}: expected a number above 0, got {value:g}")
            from zs3fast.app import page
            from zs3fast.app.desk import Desk
            from zs3fast.app.models import offered
            from zs3fast.inference.limits import Limits
            from zs3fast.inference.options import SegmenterOptions
            from zs3fast.proposals import load_mask_proposer
            from zs3fast.utils.distributed import usable_device

            limits = Limits(int(max_upload * 2**20), int(max_pixels * 1e6), max_classes)
            device = usable_device(device)
            found = None if proposer is None else load_mask_proposer(proposer, device)
            models = offered(
                weights or (), clip, pretrained, SegmenterOptions(device=device, dtype=dtype, proposer=found)
            )
        with one_line_errors(RUN_ERROR):
            shown = page.build(Desk(models, limits), Path(folder))
            address = page.launch(shown, host, port, limits.max_bytes)
            ended = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: ended.set())
            stdout.print(f"zs3fast is at {escape(address)} (Ctrl+C ends it)")
            ended.wait()
            shown.close(verbose=False)
