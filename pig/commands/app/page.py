"""The page of `app` in Gradio: its layout, and what its buttons call."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import gradio as gr
import numpy as np
from PIL import Image

from pig.commands.app.studio import MAX_IMAGES, Pictures, Studio
from pig.data.transforms import reference_picture
from pig.errors import InputError
from pig.models.backbone import TOYWORLD
from pig.models.foreground import SegmenterName
from pig.sampling.settings import Control, controls


def share_painted(studio: Studio, picture: Image.Image | None, painting: dict[str, Any] | None) -> str:
    """How much of the picture will be drawn anew, in words."""
    given = studio.hole(picture, painting)
    if not given:
        return ""
    share = np.asarray(given["mask_image"]).mean() / 255
    width, height = given["image"].size
    return f"{width}x{height} pixels, " + (f"{share:.0%} to be drawn anew" if share else "nothing is painted over yet")


def widget(one: Control, value: Any) -> Any:
    """The input of a control: a list of its values, a slider over its range, or a line of text."""
    label, info = one.name.replace("_", " ").capitalize(), one.help
    if one.choices:
        choices = [("the model's own", None) if choice is None else (choice, choice) for choice in one.choices]
        return gr.Dropdown(choices, value=value, label=label, info=info)
    if one.kind is bool:
        return gr.Checkbox(value, label=label, info=info)
    if one.optional:
        return gr.Number(value, label=label, info=info, precision=0 if one.kind is int else None)
    if one.kind is tuple:
        return gr.Textbox(", ".join(map(str, value)), label=label, info=info)
    if one.kind is str:
        return gr.Textbox(value, label=label, info=info)
    low, high = one.slider
    return gr.Slider(low, high, value, step=1 if one.kind is int else 0.05, label=label, info=info)


def value_of(one: Control, given: Any) -> Any:
    """A control's value from what its input holds."""
    if given is None:
        return None
    return given.split(",") if one.kind is tuple else one.kind(given)


def build_page(studio: Studio) -> Any:
    """The Gradio page; what a user does wrong is shown on it."""
    toy = studio.model.partition("/")[0] == TOYWORLD
    own = {**studio.pipeline.settings().as_json(), **({"num_inference_steps": 20} if toy else {})}
    known = controls(studio.pipeline.Settings)
    reads = studio.pipeline.reads_references

    def cut_out(files: list[str] | None, segmenter: SegmenterName, noun: str) -> list[Image.Image]:
        if not files:
            return []
        try:
            cutouts = studio.cut_out(files, segmenter, noun)
        except InputError as error:
            raise gr.Error(str(error)) from error
        return [reference_picture(one, max(one.size)) for one in cutouts]

    def draw(
        files: list[str] | None,
        segmenter: SegmenterName,
        noun: str,
        prompt: str,
        count: int,
        seed: int,
        picture: Image.Image | None,
        painting: dict[str, Any] | None,
        request: gr.Request,
        progress: Any = gr.Progress(),  # noqa: B008  Gradio finds it by its default
        *values: Any,
    ) -> tuple[Pictures, Pictures]:
        cut = studio.pipeline.cut_off(prompt or "")
        if cut:
            gr.Warning(f"the prompt is too long, its end is not read: {cut!r}")
        settings = {one.name: value_of(one, value) for one, value in zip(known, values, strict=True)}
        try:
            return studio.draw(
                str(request.session_hash),
                progress,
                studio.cut_out(files, segmenter, noun) if studio.pipeline.reads_references else [],
                prompt,
                noun or "",
                count,
                seed,
                studio.hole(picture, painting),
                **settings,
            )
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="pig", analytics_enabled=False) as page:
        gr.Markdown(f"# Draw your subject\nModel: `{studio.model}`, {studio.native} pixels.")
        with gr.Row():
            with gr.Column():
                files = gr.File(
                    label="References: pictures of one subject",
                    file_count="multiple",
                    file_types=["image"],
                    visible=reads,
                )
                with gr.Row(visible=reads):
                    segmenter = gr.Dropdown(
                        list(get_args(SegmenterName)), value="sam" if toy else "none", label="Cut out by"
                    )
                    noun = gr.Textbox("", label="What they show", placeholder="mug")
                shown = gr.Gallery(label="Cut out", columns=4, object_fit="contain", elem_id="cutouts")
                prompt = gr.Textbox("", label="Prompt", placeholder="a photo of a mug, on a beach")
                with gr.Row():
                    start = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Cancel")
                with gr.Row():
                    count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
                    seed = gr.Number(0, precision=0, label="Seed of the first")
                with gr.Accordion("Controls", open=False):
                    widgets = [widget(one, own[one.name]) for one in known]
            with gr.Column():
                drawn = gr.Gallery(label="Images", columns=2, object_fit="contain", elem_id="images")
                with gr.Accordion("Loop by loop", open=False, visible=studio.pipeline.has_loops):
                    loops = gr.Gallery(show_label=False, columns=4, object_fit="contain", elem_id="loops")
                with gr.Accordion("Draw into a picture", open=False):
                    gr.Markdown("Give a picture, and paint over what shall be drawn anew.")
                    picture = gr.Image(type="pil", sources=["upload"], label="Picture", height=240, elem_id="picture")
                    painting = gr.ImageEditor(
                        type="pil",
                        label="Paint over it",
                        sources=[],
                        brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=40),
                        layers=False,
                        transforms=[],
                        elem_id="painting",
                    )
                    painted = gr.Markdown()
        # The editor alone forgets at times to send a picture that was dropped on it.
        picture.change(lambda given: given, picture, painting, show_progress="hidden")
        for change in (picture.change, painting.change):
            change(partial(share_painted, studio), [picture, painting], painted, show_progress="hidden")
        looks = [files, segmenter, noun]
        for change in (files.change, segmenter.change, noun.submit):
            change(cut_out, looks, shown, concurrency_limit=1, concurrency_id="model")
        inputs = [*looks, prompt, count, seed, picture, painting, *widgets]
        drawing = [
            event(draw, inputs, [drawn, loops], concurrency_limit=1, concurrency_id="model")
            for event in (start.click, prompt.submit)
        ]

        def cancel(request: gr.Request) -> None:
            studio.cancel(str(request.session_hash))
            gr.Info("cancelled")

        # Gradio takes what still waits from the queue; what runs is told to stop.
        stop.click(cancel, cancels=drawing)
    return page
