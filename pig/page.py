"""The page of `app` in Gradio: its layout, and what its buttons call."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import gradio as gr
import numpy as np
from PIL import Image

from pig.app import MAX_IMAGES, Studio
from pig.attention import Pooling
from pig.data.transforms import reference_picture
from pig.errors import InputError
from pig.models.backbone import TOYWORLD, SchedulerName
from pig.models.foreground import SegmenterName
from pig.pipelines.bootpig import ReferenceCaption, ReferenceNoise


def share_painted(studio: Studio, picture: Image.Image | None, painting: dict[str, Any] | None) -> str:
    """How much of the picture will be drawn anew, in words."""
    given = studio.hole(picture, painting)
    if not given:
        return ""
    share = np.asarray(given["mask_image"]).mean() / 255
    width, height = given["image"].size
    return f"{width}x{height} pixels, " + (f"{share:.0%} to be drawn anew" if share else "nothing is painted over yet")


def build_page(studio: Studio) -> Any:
    """The Gradio page; what a user does wrong is shown on it."""
    toy = studio.model == TOYWORLD
    usual = studio.pipeline.config

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
        negative: str,
        count: int,
        seed: int,
        scheduler: SchedulerName,
        steps: int,
        image_guidance: float,
        text_guidance: float,
        rescale: float,
        strength: float,
        noise: str,
        caption: str,
        pooling: str,
        picture: Image.Image | None,
        painting: dict[str, Any] | None,
        request: gr.Request,
        progress: Any = gr.Progress(),  # noqa: B008  Gradio finds it by its default
    ) -> list[tuple[Image.Image, str]]:
        cut = studio.pipeline.cut_off(prompt or "")
        if cut:
            gr.Warning(f"the prompt is too long, its end is not read: {cut!r}")
        try:
            return studio.draw(
                str(request.session_hash),
                progress,
                studio.cut_out(files, segmenter, noun),
                prompt,
                count,
                seed,
                scheduler,
                studio.hole(picture, painting),
                negative_prompt=negative or "",
                num_inference_steps=int(steps),
                image_guidance=image_guidance,
                text_guidance=text_guidance,
                guidance_rescale=rescale,
                strength=strength,
                reference_noise=noise,
                reference_caption=caption,
                pooling=pooling,
            )
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="pig", analytics_enabled=False) as page:
        gr.Markdown(f"# Draw your subject\nModel: `{studio.model}`, {studio.native} pixels.")
        with gr.Row():
            with gr.Column():
                files = gr.File(
                    label="References: pictures of one subject", file_count="multiple", file_types=["image"]
                )
                with gr.Row():
                    segmenter = gr.Dropdown(
                        list(get_args(SegmenterName)), value="sam" if toy else "none", label="Cut out by"
                    )
                    noun = gr.Textbox("", label="What they show", placeholder="mug (for grounded-sam)")
                shown = gr.Gallery(label="Cut out", columns=4, object_fit="contain", elem_id="cutouts")
                prompt = gr.Textbox("", label="Prompt", placeholder="a photo of a mug, on a beach")
                with gr.Row():
                    start = gr.Button("Draw", variant="primary")
                    stop = gr.Button("Cancel")
                with gr.Row():
                    count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
                    seed = gr.Number(0, precision=0, label="Seed of the first")
                with gr.Accordion("Controls", open=False):
                    negative = gr.Textbox("", label="Negative prompt: what to keep away from")
                    image_guidance = gr.Slider(0, 15, usual.image_guidance, label="Image guidance: of the references")
                    text_guidance = gr.Slider(0, 15, usual.text_guidance, label="Text guidance: of the prompt")
                    strength = gr.Slider(0, 1, 1, label="Strength of the references")
                    rescale = gr.Slider(0, 1, 0, label="Guidance rescale: against overdone contrast")
                    steps = gr.Slider(1, 100, 20 if toy else 50, step=1, label="Steps")
                    scheduler = gr.Dropdown(list(get_args(SchedulerName)), value="unipc", label="Scheduler")
                    noise = gr.Radio(list(get_args(ReferenceNoise)), value="fresh", label="Noise on the references")
                    caption = gr.Radio(
                        list(get_args(ReferenceCaption)),
                        value=usual.reference_caption,
                        label="What the Reference UNet is told",
                    )
                    pooling = gr.Dropdown(
                        list(get_args(Pooling)),
                        value=usual.pooling,
                        label="Several references are merged by",
                    )
            with gr.Column():
                drawn = gr.Gallery(label="Images", columns=2, object_fit="contain", elem_id="images")
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
        inputs = [*looks, prompt, negative, count, seed, scheduler, steps, image_guidance, text_guidance]
        inputs += [rescale, strength, noise, caption, pooling, picture, painting]
        drawing = [
            event(draw, inputs, drawn, concurrency_limit=1, concurrency_id="model")
            for event in (start.click, prompt.submit)
        ]

        def cancel(request: gr.Request) -> None:
            studio.cancel(str(request.session_hash))
            gr.Info("cancelled")

        # Gradio takes what still waits from the queue; what runs is told to stop.
        stop.click(cancel, cancels=drawing)
    return page
