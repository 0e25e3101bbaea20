"""`app`: a page to try a model on: references in, images out. Needs the optional group `app` (Gradio)."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pig.data.subjects import load_cutout
from pig.data.transforms import normalise
from pig.errors import InputError
from pig.generate import default_device, load_pipeline
from pig.models.backbone import TOYWORLD, SchedulerName, vae_scale
from pig.models.foreground import DETECTOR, SegmenterName, make_segmenter
from pig.pipelines.references import ReferenceCache

PASSWORD = "PIG_APP_PASSWORD"  # the environment variable: a command line can be read by others on the machine
LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_REFERENCES, MAX_IMAGES, MAX_UPLOAD, MAX_WAITING = 8, 8, "20mb", 16
CACHE_BYTES = 2**29


def app(
    model: str = TOYWORLD, host: str = "127.0.0.1", port: int = 7860, sam: str = TOYWORLD, detector: str = DETECTOR
) -> None:
    """Serve a page to draw with a model.

    Args:
        model: an exported model's folder, or `toyworld`.
        host: the address to serve at. Any but the local one asks for a password, which PIG_APP_PASSWORD holds; the
            user's name is `pig`.
        port: of the page.
        sam: weights of the segmenter `sam`; see `generate`.
        detector: of the segmenter `grounded-sam`; see `generate`.
    """
    if not 0 < port < 65536:
        raise InputError(f"--port {port}: from 1 to 65535")
    password = os.environ.get(PASSWORD)
    if host not in LOCAL and not password:
        raise InputError(f"--host {host}: others could use this machine. Set {PASSWORD} to a password of your choice")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio

        from pig.page import build_page
    except ImportError as error:
        raise InputError("the page needs Gradio: make app, or pip install 'pig[app]'") from error
    page = build_page(Studio(model, sam, detector))
    page.queue(max_size=MAX_WAITING)
    page.launch(
        server_name=host,
        server_port=port,
        auth=("pig", password) if password else None,
        max_file_size=MAX_UPLOAD,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
    )


class Studio:
    """What the page does, without the page: one model, one drawing at a time."""

    def __init__(self, model: str, sam: str, detector: str) -> None:
        self.pipeline = load_pipeline(model)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.reference_cache = ReferenceCache(CACHE_BYTES)
        self.model, self.sam, self.detector = model, sam, detector
        self.native: int = self.pipeline.base_unet.config.sample_size * vae_scale(self.pipeline.vae)
        self._segmenters: dict[str, Any] = {}
        self._cancelled: dict[str, threading.Event] = {}

    def cut_out(self, files: Sequence[str] | None, segmenter: SegmenterName, noun: str) -> list[Image.Image]:
        """RGBA cut-outs of the uploaded files."""
        if not files:
            raise InputError("no references: drop pictures of your subject first")
        if len(files) > MAX_REFERENCES:
            raise InputError(f"{len(files)} references; {MAX_REFERENCES} at most")
        if segmenter not in self._segmenters:
            self._segmenters[segmenter] = make_segmenter(
                segmenter, sam=self.sam, detector=self.detector, device=default_device()
            )
        try:
            return [load_cutout(Path(file), self._segmenters[segmenter], noun) for file in files]
        except InputError as error:
            # Uploads lie in folders of their own; their names alone are the user's.
            message = str(error)
            for file in files:
                message = message.replace(f"{Path(file).parent}/", "")
            raise InputError(message) from error

    def hole(self, picture: Image.Image | None, painting: dict[str, Any] | None) -> dict[str, Any]:
        """What inpainting needs: a picture, and what an editor over it was painted with; nothing without a picture.
        Large ones are shrunk."""
        if picture is None:
            return {}
        picture = normalise(picture).convert("RGB")
        mask = Image.new("L", picture.size)
        for layer in (painting or {}).get("layers") or []:
            mask.paste(255, mask=layer.convert("RGBA").getchannel("A").resize(picture.size))
        ratio = min(1.0, self.native / max(picture.size))
        width, height = (max(8, round(side * ratio) // 8 * 8) for side in picture.size)
        return {
            "image": picture.resize((width, height), Image.Resampling.LANCZOS),
            "mask_image": mask.resize((width, height), Image.Resampling.LANCZOS),
        }

    def draw(
        self,
        session: str,
        progress: Any,
        cutouts: Sequence[Image.Image],
        prompt: str,
        count: int,
        seed: int,
        scheduler: SchedulerName,
        hole: dict[str, Any],
        **settings: Any,
    ) -> list[tuple[Image.Image, str]]:
        """Images with their seeds. `hole`: see there; `settings`: of the pipeline's call."""
        if not prompt or not prompt.strip():
            raise InputError("an empty prompt: say what shall be drawn")
        if not 1 <= count <= MAX_IMAGES:
            raise InputError(f"{count} images; from 1 to {MAX_IMAGES}")
        if seed is None or not 0 <= seed < 2**53:
            raise InputError("the seed must be a whole number from 0 on")
        cancelled = self._cancelled[session] = threading.Event()
        self.pipeline.use_scheduler(scheduler)
        total = settings["num_inference_steps"]

        def after_step(pipeline: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            progress((step + 1) / total, desc=f"step {step + 1} of {total}")
            pipeline._interrupt = cancelled.is_set()
            return given

        seeds = range(int(seed), int(seed) + int(count))
        try:
            images = self.pipeline(
                prompt,
                cutouts,
                num_images_per_prompt=int(count),
                generator=[torch.Generator().manual_seed(one) for one in seeds],
                callback_on_step_end=after_step,
                **hole,
                **settings,
            ).images
        finally:
            self._cancelled.pop(session, None)
        if cancelled.is_set():
            raise InputError("cancelled")
        return [(image, f"seed {one}") for image, one in zip(images, seeds, strict=True)]

    def cancel(self, session: str) -> None:
        if session in self._cancelled:
            self._cancelled[session].set()
