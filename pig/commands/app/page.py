"""The page of `app` in Gradio: its layout, and what its buttons call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import gradio as gr
import numpy as np
from PIL import Image

from pig.commands.app.studio import MAX_IMAGES, Order, Pictures, Studio
from pig.data.transforms import reference_picture
from pig.errors import InputError
from pig.models.names import TOYWORLD, SegmenterName
from pig.sampling.settings import Control

MODEL = {"concurrency_limit": 1, "concurrency_id": "model"}  # one at a time uses it
NO_COMMAND = "# Once you have drawn: the command that draws the same pictures."


def shown_errors(call: Callable[..., Any], *args: Any) -> Any:
    """Call it; a mistake of the user is shown on the page."""
    try:
        return call(*args)
    except InputError as error:
        raise gr.Error(str(error), print_exception=False) from error


def widget(one: Control, value: Any) -> Any:
    """The input of a control: a list of its values, a slider over its range, or a line of text."""
    common = {"label": one.name.replace("_", " ").capitalize(), "info": one.help, "interactive": True}
    if one.choices:
        choices = [("the model's own", None) if choice is None else (choice, choice) for choice in one.choices]
        return gr.Dropdown(choices, value=value, **common)
    if one.kind is bool:
        return gr.Checkbox(value, **common)
    if one.optional:  # in a line of text, as an empty number would be 0
        return gr.Textbox("" if value is None else str(value), placeholder="the method's own", **common)
    if one.kind is tuple:
        return gr.Textbox(", ".join(map(str, value)), **common)
    if one.kind is str:
        return gr.Textbox(value, **common)
    low, high = one.slider
    return gr.Slider(low, high, value, step=1 if one.kind is int else 0.05, **common)


def value_of(one: Control, given: Any) -> Any:
    """A control's value from what its input holds."""
    if given is None or (one.optional and given == ""):
        return None
    try:
        return tuple(float(part) for part in given.split(",")) if one.kind is tuple else one.kind(given)
    except ValueError as error:
        wanted = "two numbers with a comma between them" if one.kind is tuple else "a number"
        raise InputError(f"{one.name}: {wanted}, got {given!r}") from error


def build_page(studio: Studio) -> Any:
    """The Gradio page. Inputs say that they are interactive, as Gradio does not see which ones `render` will use."""
    with gr.Blocks(title="pig", analytics_enabled=False) as page:
        gr.Markdown("# Draw your subject")
        model = gr.Dropdown(studio.models, value=studio.models[0], label="Model", interactive=True, elem_id="model")
        with gr.Accordion("Examples: click one", open=True):
            examples = gr.Gallery(
                [(str(one.pictures[0]), one.prompt.removeprefix("a photo of a ")) for one in studio.examples],
                show_label=False,
                columns=len(studio.examples),
                height=170,
                object_fit="contain",
                allow_preview=False,
                buttons=[],
                interactive=False,
                elem_id="examples",
            )
        with gr.Row():
            with gr.Column():
                parts = {"model": model, "examples": examples, **_inputs(studio)}
                _controls(studio, parts)
            with gr.Column():
                parts |= {**_outputs(studio), **_inpainting(studio, model)}
        _connect(studio, parts)
    return page


def _controls(studio: Studio, parts: dict[str, Any]) -> None:
    """The model's own controls, made anew for each model, and what the buttons do with them. parts: of the whole page,
    by name; filled when a model is shown."""

    @gr.render(inputs=parts["model"])
    def controls_of(name: str) -> None:
        with gr.Accordion("Controls", open=False):
            widgets = {one: widget(one, value) for one, value in studio.controls(name)}

        def draw(
            values: dict[Any, Any],
            request: gr.Request,
            progress: Any = gr.Progress(),  # noqa: B008  Gradio finds it by its default
        ) -> tuple[Pictures, Pictures, str, list[Image.Image]]:
            order = shown_errors(_order_of, values, parts, widgets)
            pipeline = studio.pipeline(order.model)
            if cut := pipeline.cut_off(order.prompt):
                gr.Warning(f"the prompt is too long, its end is not read: {cut!r}")
            for doubt in pipeline.doubts([order.prompt], None, None):
                gr.Warning(doubt)
            images, loops = shown_errors(studio.draw, str(request.session_hash), progress, order)
            used = studio.hole(order.model, order.picture, order.painting)
            return images, loops, studio.command(order), list(used.values())

        def cancel(request: gr.Request) -> None:
            studio.cancel(str(request.session_hash))
            gr.Info("cancelled")

        inputs = {parts[name] for name in NAMES} | set(widgets.values())
        outputs = [parts[name] for name in ("images", "loops", "command", "used")]
        drawing = [event(draw, inputs, outputs, **MODEL) for event in (parts["start"].click, parts["prompt"].submit)]
        # Gradio takes what still waits from the queue; what runs is told to stop.
        parts["stop"].click(cancel, cancels=drawing)


def _connect(studio: Studio, parts: dict[str, Any]) -> None:
    """What changes on the page when a model, an example or references are chosen."""

    def choose(name: str) -> list[Any]:
        kind = studio.kind(name)
        reads = gr.update(visible=kind.reads_references)
        return [reads, reads, reads, gr.update(visible=kind.has_loops)]

    def take(chosen: gr.SelectData) -> tuple[list[str], str, str]:
        example = studio.examples[chosen.index]
        return [str(path) for path in example.pictures], example.noun, example.prompt

    shown = [parts[name] for name in ("files", "cutting", "cutouts", "loop_by_loop")]
    parts["model"].change(choose, parts["model"], shown, show_progress="hidden")
    fields = [parts[name] for name in ("files", "noun", "prompt")]
    parts["examples"].select(take, None, fields, show_progress="hidden")
    looks = [parts[name] for name in ("files", "segmenter", "noun")]
    for change in (parts["files"].change, parts["segmenter"].change, parts["noun"].submit):
        change(partial(_cut_out, studio), looks, parts["cutouts"], **MODEL)


NAMES = ("model", "files", "segmenter", "noun", "prompt", "count", "seed", "picture", "painting")  # of an order


def _order_of(values: dict[Any, Any], parts: dict[str, Any], widgets: dict[Control, Any]) -> Order:
    told = {name: values[parts[name]] for name in NAMES}
    settings = {one.name: value_of(one, values[field]) for one, field in widgets.items()}
    whole = {name: int(told[name]) if told[name] is not None else None for name in ("count", "seed")}
    files = {"files": told["files"] or (), "noun": told["noun"] or ""}
    return Order(**{**told, **whole, **files, "settings": settings})


def _inputs(studio: Studio) -> dict[str, Any]:
    """The left column: references, prompt, buttons; by their names in an order."""
    kind, toy = studio.kind(studio.models[0]), studio.models[0].partition("/")[0] == TOYWORLD
    files = gr.File(
        label="References: pictures of one subject",
        file_count="multiple",
        file_types=["image"],
        interactive=True,
        visible=kind.reads_references,
    )
    with gr.Row(visible=kind.reads_references) as cutting:
        segmenter = gr.Dropdown(
            list(get_args(SegmenterName)),
            value="sam" if toy else "none",
            label="Cut out by",
            interactive=True,
            min_width=120,
        )
        noun = gr.Textbox("", label="What they show", placeholder="mug", interactive=True, min_width=120)
    cutouts = gr.Gallery(
        label="Cut out",
        columns=4,
        height=190,
        fit_columns=False,
        object_fit="contain",
        interactive=False,
        visible=kind.reads_references,
        elem_id="cutouts",
    )
    prompt = gr.Textbox("", label="Prompt", placeholder="a photo of a mug, on a beach", interactive=True)
    with gr.Row():
        start = gr.Button("Draw", variant="primary", min_width=120)
        stop = gr.Button("Cancel", min_width=120)
    with gr.Row():
        count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images", interactive=True)
        seed = gr.Number(0, precision=0, label="Seed of the first", interactive=True)
    return {
        "files": files,
        "cutting": cutting,
        "segmenter": segmenter,
        "noun": noun,
        "cutouts": cutouts,
        "prompt": prompt,
        "start": start,
        "stop": stop,
        "count": count,
        "seed": seed,
    }


def _outputs(studio: Studio) -> dict[str, Any]:
    """The right column: pictures, command line, loops."""
    shape = {"object_fit": "contain", "height": "auto", "interactive": False}
    images = gr.Gallery(label="Images", columns=2, format="png", elem_id="images", **shape)
    command = gr.Code(
        NO_COMMAND,
        language="shell",
        label="The same by command line",
        lines=2,
        wrap_lines=True,
        show_line_numbers=False,
        interactive=False,
        elem_id="command",
    )
    has_loops = studio.kind(studio.models[0]).has_loops
    with gr.Accordion("Loop by loop", open=False, visible=has_loops) as loop_by_loop:
        loops = gr.Gallery(show_label=False, columns=4, fit_columns=False, elem_id="loops", **shape)
    return {"images": images, "command": command, "loops": loops, "loop_by_loop": loop_by_loop}


def _inpainting(studio: Studio, model: Any) -> dict[str, Any]:
    """The editor to draw into a picture."""
    with gr.Accordion("Draw into a picture", open=False):
        gr.Markdown("Give a picture, and paint over what shall be drawn anew.")
        picture = gr.Image(
            type="pil", sources=["upload"], label="Picture", height=240, interactive=True, elem_id="picture"
        )
        painting = gr.ImageEditor(
            type="pil",
            label="Paint over it",
            interactive=True,
            sources=[],
            brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=40),
            layers=False,
            transforms=[],
            elem_id="painting",
        )
        painted = gr.Markdown()
        used = gr.Gallery(
            label="picture.png and mask.png of the command line",
            columns=2,
            object_fit="contain",
            format="png",
            interactive=False,
            elem_id="used",
        )
    # The editor alone forgets at times to send a picture that was dropped on it.
    picture.change(lambda given: given, picture, painting, show_progress="hidden")
    for change in (picture.change, painting.change):
        change(partial(_share_painted, studio), [model, picture, painting], painted, show_progress="hidden")
    return {"picture": picture, "painting": painting, "used": used}


def _share_painted(studio: Studio, model: str, picture: Image.Image | None, painting: dict[str, Any] | None) -> str:
    """How much of the picture will be drawn anew, in words."""
    given = studio.hole(model, picture, painting)
    if not given:
        return ""
    share = np.asarray(given["mask_image"]).mean() / 255
    width, height = given["image"].size
    return f"{width}x{height} pixels, " + (f"{share:.0%} to be drawn anew" if share else "nothing is painted over yet")


def _cut_out(studio: Studio, files: list[str] | None, segmenter: SegmenterName, noun: str) -> list[Image.Image]:
    if not files:
        return []
    cutouts = shown_errors(studio.cut_out, files, segmenter, noun)
    return [reference_picture(one, max(one.size)) for one in cutouts]
