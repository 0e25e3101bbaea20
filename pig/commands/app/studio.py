"""What the page does, without the page: one model, one drawing at a time."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pig.data.images import SEEDS
from pig.data.subjects import load_cutout
from pig.data.transforms import normalise
from pig.errors import InputError
from pig.methods import default_device, load_pipeline
from pig.models.foreground import RembgModel, SegmenterName, make_segmenter
from pig.sampling.references import ReferenceCache

MAX_REFERENCES, MAX_IMAGES = 8, 8
CACHE_BYTES = 2**29
Pictures = list[tuple[Image.Image, str]]  # with what is written below them


class Studio:
    """What the page does, without the page: one model, one drawing at a time."""

    def __init__(self, model: str, sam: str, detector: str, rembg_model: RembgModel) -> None:
        self.pipeline = load_pipeline(model)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.reference_cache = ReferenceCache(CACHE_BYTES)
        self.model, self.sam, self.detector, self.rembg_model = model, sam, detector, rembg_model
        self.native: int = self.pipeline.native_size
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
                segmenter, sam=self.sam, detector=self.detector, rembg_model=self.rembg_model, device=default_device()
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
        noun: str,
        count: int,
        seed: int,
        hole: dict[str, Any],
        **settings: Any,
    ) -> tuple[Pictures, Pictures]:
        """Images with their seeds; and of a method that draws in loops, each loop's picture. `hole`: see there;
        `settings`: the model's controls."""
        if not prompt or not prompt.strip():
            raise InputError("an empty prompt: say what shall be drawn")
        if not 1 <= count <= MAX_IMAGES:
            raise InputError(f"{count} images; from 1 to {MAX_IMAGES}")
        if seed is None or not 0 <= seed <= SEEDS - count:
            raise InputError("the seed must be a whole number from 0 on, below 2^32")
        cancelled = self._cancelled[session] = threading.Event()
        total = self.pipeline.steps_of(self.pipeline.settings(**settings), edits=bool(hole))
        done = itertools.count(1)

        def after_step(pipeline: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            number = next(done)
            progress(number / total, desc=f"step {number} of {total}")
            pipeline._interrupt = cancelled.is_set()
            return given

        seeds = range(int(seed), int(seed) + int(count))
        try:
            drawn = self.pipeline(
                prompt,
                cutouts,
                class_noun=noun,
                num_images_per_prompt=int(count),
                generator=[torch.Generator().manual_seed(one) for one in seeds],
                callback_on_step_end=after_step,
                keep_loops=self.pipeline.has_loops,
                **hole,
                **settings,
            )
        finally:
            self._cancelled.pop(session, None)
        if cancelled.is_set():
            raise InputError("cancelled")
        images = [(image, f"seed {one}") for image, one in zip(drawn.images, seeds, strict=True)]
        loops = [
            (version, f"seed {one}, " + (f"after loop {number}" if number else "before the loops"))
            for one, versions in zip(seeds, drawn.loops or [[]] * count, strict=True)
            for number, version in enumerate(versions)
        ]
        return images, loops

    def cancel(self, session: str) -> None:
        if session in self._cancelled:
            self._cancelled[session].set()
