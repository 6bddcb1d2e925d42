"""`zs3fast serve`."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer
from rich.markup import escape

from zs3fast.utils import cli_options as options
from zs3fast.utils.console import RUN_ERROR, USAGE_ERROR, one_line_errors, stdout

EPILOG = (
    "**Example**: `zs3fast serve --weights zs3fast-tiny`, then "
    "`curl --data-binary @photo.jpg 'http://127.0.0.1:8000/segment?classes=red+sand,star&format=png' -o labels.png`"
)


def serve(
    classes: options.Classes = None,
    classes_file: options.ClassesFile = None,
    dataset: options.ClassDataset = None,
    weights: options.Weights = None,
    method: options.TrainingFree = None,
    clip: options.Clip = None,
    pretrained: options.Pretrained = None,
    templates: options.Templates = None,
    refine: options.Refine = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets everyone in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Models at work at once.")] = 1,
    num_gpus: Annotated[float, typer.Option(help="GPUs of a replica, such as 1 or 0.5.")] = 0.0,
    num_cpus: Annotated[float, typer.Option(help="CPU cores of a replica.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Most requests whose images share the model's batches.")] = 8,
    wait: Annotated[float, typer.Option(help="Milliseconds that a batch waits for more requests.")] = 5.0,
    queued: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered 503.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up, with 408.")] = 60.0,
    drain: Annotated[float, typer.Option(help="Seconds that requests under way have when the service ends.")] = 30.0,
    max_upload: Annotated[float, typer.Option(help="Largest image file, in MiB.")] = 20.0,
    max_pixels: Annotated[float, typer.Option(help="Largest image, in millions of pixels.")] = 25.0,
    max_classes: Annotated[int, typer.Option(help="Most class names of a request.")] = 1000,
    dtype: options.Dtype = "auto",
    address: options.Address = None,
) -> None:
    """Answer images with label maps over HTTP, on Ray Serve: POST /segment, GET /health.

    Requests for the same classes share the model's batches. Needs `zs3fast[ray]`.
    """
    with one_line_errors(USAGE_ERROR):
        given: dict[str, float] = {"max_upload": max_upload, "max_pixels": max_pixels, "max_classes": max_classes}
        for name, value in given.items():
            if not 0 < value < 1e6:
                raise ValueError(f"{name}: expected a number above 0, got {value:g}")
        from zs3fast.inference import serve as work
        from zs3fast.inference.chosen import class_list, segmenter_of
        from zs3fast.inference.limits import Limits
        from zs3fast.inference.options import SegmenterOptions

        run = work.ServeOptions(
            limits=Limits(int(max_upload * 2**20), int(max_pixels * 1e6), max_classes),
            batch_size=batch_size,
            wait=wait / 1000,
            replicas=replicas,
            num_gpus=num_gpus,
            num_cpus=num_cpus,
            queued=queued,
            timeout=timeout,
            drain=drain,
            dtype=dtype,
            host=host,
            port=port,
            address=address,
        )
        entries = class_list(classes, classes_file, dataset)
        # replicas choose type and device
        settings = SegmenterOptions(templates=templates, dtype="float32", device="cpu", refine=refine)
        clips = {"method": method, "clip": clip, "pretrained": pretrained}
        segmenter, shown = segmenter_of(weights, entries, clips, settings)
        with one_line_errors(RUN_ERROR), work.serving(segmenter, shown, run) as where:
            ended = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):  # Ray has handlers of its own, which would end it at once
                signal.signal(number, lambda *_: ended.set())
            stdout.print(f"{escape(shown)} answers at {escape(where)}/segment (Ctrl+C ends it)")
            ended.wait()
            stdout.print("ending: requests under way are answered")
