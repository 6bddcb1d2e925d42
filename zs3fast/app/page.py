"""The page itself: what is on it, and what a change of it asks for."""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from zs3fast.app.desk import AS_PUBLISHED, REFINEMENTS, Desk, as_shown
from zs3fast.app.scenes import example_scenes
from zs3fast.app.view import view
from zs3fast.inference.results import write_result
from zs3fast.text.class_lists import class_names, datasets
from zs3fast.utils.console import USER_ERRORS, first_line

try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    raise ImportError("app needs gradio: pip install 'zs3fast[app]'") from None

NO_OTHER = "none"
DOWNLOADS = {"Save overlay": "_overlay.png", "Save labels": "_labels.png", "Save JSON": ".json"}
# The library reads the file as it was uploaded, so values come as the browser sent them, but for the check that a file
# is one of the page's own.
_ONE_QUEUE: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "api_visibility": "private",
    "preprocess": False,
}
_LOOK = "(threshold, blend) => { window.zs3fast.look(threshold, blend); }"
_HIDDEN = "(...inputs) => { inputs[inputs.length - 1] = window.zs3fast.hidden(); return inputs; }"


def build(desk: Desk, folder: Path) -> gr.Blocks:
    """The page.

    Args:
        desk: what answers it.  folder: where example scenes and downloads are put; the caller removes it.
    """
    scenes = example_scenes(folder)
    models = desk.models.names

    def segment(photo: Any, words: Any, background: Any, model: Any, refine: Any, other: Any) -> str:
        if not photo or not words:
            return ""
        data = _read(desk, photo)
        chosen = [model] if other in (NO_OTHER, model) else [model, other]
        return view([(name, desk.segment(data, _joined(words), bool(background), name, refine)) for name in chosen])

    def example(event: gr.SelectData) -> tuple[str, list[str]]:
        path, names = scenes[event.index]
        return str(path), names

    def download(
        end: str,
        photo: Any,
        words: Any,
        background: Any,
        model: Any,
        refine: Any,
        threshold: Any,
        blend: Any,
        hidden: Any,
    ) -> str:
        if not photo or not words:
            raise ValueError("expected an image and class names first")
        result = desk.segment(_read(desk, photo), _joined(words), bool(background), model, refine)
        shown = as_shown(result, float(threshold), json.loads(hidden or "[]"))
        target = Path(tempfile.mkdtemp(dir=folder)) / (Path(photo["path"]).stem[:80] or "image")
        write_result(shown, target, blend=float(blend))
        return str(target.with_name(target.name + end))

    page = gr.Blocks(title="zs3fast", analytics_enabled=False, delete_cache=(3600, 24 * 3600))
    with page:
        gr.Markdown("# zs3fast\nDrop a photo, type words, see which pixels are which.", elem_id="zs3-head")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(
                    value=str(scenes[0][0]),
                    label="Image",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    type="filepath",
                    height=240,
                    elem_id="zs3-image",
                )
                words = gr.Dropdown(
                    value=scenes[0][1],
                    label="Classes",
                    info="Type names, Enter after each, or several with commas.",
                    multiselect=True,
                    allow_custom_value=True,
                    elem_id="zs3-words",
                )
                with gr.Row():
                    model = gr.Dropdown(models, value=models[0], label="Model", elem_id="zs3-model")
                    other = gr.Dropdown([NO_OTHER, *models], value=NO_OTHER, label="Compare with", elem_id="zs3-other")
                with gr.Row():
                    refine = gr.Dropdown(
                        list(REFINEMENTS), value=AS_PUBLISHED, label="Refinement", elem_id="zs3-refine"
                    )
                    lists = gr.Dropdown(datasets(), value=None, label="Names of a dataset", elem_id="zs3-lists")
                background = gr.Checkbox(
                    label="Background: what else photos show stays unlabelled", elem_id="zs3-background"
                )
            with gr.Column(scale=3, min_width=320):
                viewer = gr.HTML(
                    "",
                    html_template=_file("viewer.html"),
                    css_template=_file("viewer.css"),
                    js_on_load=_file("viewer.js"),
                    apply_default_css=False,
                    elem_id="zs3-viewer",
                )
                with gr.Row():
                    threshold = gr.Slider(
                        0, 1, value=0, step=0.01, label="Threshold", buttons=[], elem_id="zs3-threshold"
                    )
                    blend = gr.Slider(0, 1, value=0.6, step=0.05, label="Blend", buttons=[], elem_id="zs3-blend")
                with gr.Row(elem_id="zs3-downloads"):
                    buttons = {
                        end: gr.Button(name, size="sm", elem_id=f"zs3-save-{at}")
                        for at, (name, end) in enumerate(DOWNLOADS.items())
                    }
                gallery = gr.Gallery(
                    [str(path) for path, _ in scenes],
                    label="Scenes the small models know",
                    columns=len(scenes),
                    height=120,
                    allow_preview=False,
                    object_fit="cover",
                    interactive=False,
                    buttons=[],
                    elem_id="zs3-scenes",
                )
                file = gr.DownloadButton(visible="hidden", elem_id="zs3-file")
                hidden = gr.Textbox(visible=False)
        asked: list[Any] = [image, words, background, model, refine, other]
        changes = [box.change for box in asked]
        gr.on(
            [page.load, *changes],
            _told(segment),
            asked,
            viewer,
            trigger_mode="always_last",
            show_progress="minimal",
            show_progress_on=viewer,
            **_ONE_QUEUE,
        )
        words.input(_told(_tidy(desk)), words, words, queue=False, show_progress="hidden", api_visibility="private")
        lists.input(_told(class_names), lists, words, queue=False, show_progress="hidden", api_visibility="private")
        gallery.select(
            example,
            None,
            [image, words],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        gr.on([threshold.change, blend.change], None, [threshold, blend], js=_LOOK, api_visibility="private")
        for end, button in buttons.items():
            button.click(
                _told(_with(download, end)),
                [image, words, background, model, refine, threshold, blend, hidden],
                file,
                js=_HIDDEN,
                show_progress="hidden",
                **_ONE_QUEUE,
            ).success(None, js="() => document.querySelector('#zs3-file').click()", api_visibility="private")
        page.queue(max_size=32)
    return page


def launch(page: gr.Blocks, host: str, port: int | None, max_bytes: int) -> str:
    """Serve the page from threads of its own; its address. Nothing but the browser is spoken to.

    Args:
        port: None: the first free one from 7860 on.  max_bytes: of an upload.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        show_error=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=max_bytes,
        theme=gr.themes.Default(
            primary_hue="teal",
            neutral_hue="slate",
            radius_size="lg",
            spacing_size="sm",
            font=["ui-sans-serif", "system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css=_file("page.css"),
    )
    return str(address)


def _told(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, whose errors a user can cause are a line on the page, where names are text as well."""

    def run(*inputs: Any) -> Any:
        try:
            return work(*inputs)
        except USER_ERRORS as error:
            raise gr.Error(html.escape(first_line(error)), duration=10, print_exception=False) from None

    return run


def _with(work: Callable[..., Any], end: str) -> Callable[..., Any]:
    return lambda *inputs: work(end, *inputs)


def _tidy(desk: Desk) -> Callable[[Any], list[str]]:
    """Chips with commas become several, and a name typed twice is said to be."""

    def tidy(words: Any) -> list[str]:
        return [name for (name,) in desk.limits.classes(_joined(words))] if words else []

    return tidy


def _joined(words: Any) -> str:
    """Chips as one list: commas are between classes here."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"classes: expected a list of names, got {type(words).__name__}")
    return ", ".join(words)


def _read(desk: Desk, photo: Any) -> bytes:
    """The bytes of an upload as the browser names it; gradio has refused files that are none of the page's."""
    path = photo.get("path") if isinstance(photo, dict) else None
    if not isinstance(path, str):
        raise ValueError("image: expected an uploaded file")
    desk.limits.check_bytes(Path(path).stat().st_size)
    return Path(path).read_bytes()


def _file(name: str) -> str:
    return resources.files("zs3fast.app").joinpath(name).read_text(encoding="utf-8")
