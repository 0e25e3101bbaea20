"""What the page does, without the page: one model in memory, one drawing at a time."""

from __future__ import annotations

import itertools
import shlex
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pig.commands.app.examples import Example
from pig.data.images import SEEDS
from pig.data.subjects import load_cutout
from pig.data.transforms import normalise
from pig.errors import InputError
from pig.methods import default_device, find_model, load_pipeline, pipeline_class
from pig.models.cutting_out import CuttingOut
from pig.models.foreground import make_segmenter
from pig.models.names import TOYWORLD, SegmenterName
from pig.sampling.pipeline import SubjectPipeline
from pig.sampling.references import ReferenceCache
from pig.sampling.settings import Control, controls

MAX_REFERENCES, MAX_IMAGES = 8, 8
TOY_STEPS = 20  # the toy world's models need no more
CACHE_BYTES = 2**29
Pictures = list[tuple[Image.Image, str]]  # with what is written below them


@dataclass(frozen=True)
class Order:
    """What the page asks for when its user presses Draw.

    files: the uploaded references. picture, painting: inpainting's picture, and the state of the editor over it.
    settings: the model's controls.
    """

    model: str
    prompt: str
    files: Sequence[str] = ()
    segmenter: SegmenterName = "none"
    noun: str = ""
    count: int = 4
    seed: int = 0
    picture: Image.Image | None = None
    painting: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        if not self.prompt or not self.prompt.strip():
            raise InputError("an empty prompt: say what shall be drawn")
        if not 1 <= self.count <= MAX_IMAGES:
            raise InputError(f"{self.count} images; from 1 to {MAX_IMAGES}")
        if self.seed is None or not 0 <= self.seed <= SEEDS - self.count:
            raise InputError("the seed must be a whole number from 0 on, below 2^32")


class Studio:
    """Draws with any of some models; the last one used stays in memory.

    Args:
        models: their names, as `load_pipeline` takes them; the first one is loaded now.
        cutting_out: weights of the segmenters.
        examples: what the page offers to click.
    """

    def __init__(self, models: Sequence[str], cutting_out: CuttingOut, examples: Sequence[Example]) -> None:
        self.models, self.cutting_out, self.examples = list(models), cutting_out, list(examples)
        self._segmenters: dict[str, Any] = {}
        self._cancelled: dict[str, threading.Event] = {}
        self._loaded: tuple[str, SubjectPipeline] | None = None
        self.pipeline(self.models[0])

    # -- models -------------------------------------------------------------------------------------------------------

    def kind(self, model: str) -> type[SubjectPipeline]:
        return pipeline_class(find_model(model).method)

    def controls(self, model: str) -> list[tuple[Control, Any]]:
        """A model's controls, each with the model's own value."""
        source, toy = find_model(model), model.removeprefix("base:").partition("/")[0] == TOYWORLD
        own = {"num_inference_steps": TOY_STEPS} if toy else {}
        return [
            (one, own.get(one.name, source.settings.get(one.name, one.default)))
            for one in controls(pipeline_class(source.method).Settings)
        ]

    def pipeline(self, model: str) -> SubjectPipeline:
        """The model's pipeline, loaded if another one is in memory."""
        if model not in self.models:
            raise InputError(f"this page does not serve the model {model!r}")
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # free its memory before the next one takes some
            pipeline = load_pipeline(model)
            pipeline.set_progress_bar_config(disable=True)
            pipeline.reference_cache = ReferenceCache(CACHE_BYTES)
            self._loaded = (model, pipeline)
        return self._loaded[1]

    # -- pictures that are given --------------------------------------------------------------------------------------

    def cut_out(self, files: Sequence[str], segmenter: SegmenterName, noun: str) -> list[Image.Image]:
        """RGBA cut-outs of the uploaded files."""
        if not files:
            raise InputError("no references: drop pictures of your subject first, or click an example")
        if len(files) > MAX_REFERENCES:
            raise InputError(f"{len(files)} references; {MAX_REFERENCES} at most")
        if segmenter not in self._segmenters:
            weights = self.cutting_out
            self._segmenters[segmenter] = make_segmenter(
                segmenter,
                sam=weights.sam,
                detector=weights.detector,
                rembg_model=weights.rembg_model,
                device=default_device(),
            )
        try:
            return [load_cutout(Path(file), self._segmenters[segmenter], noun) for file in files]
        except InputError as error:
            # Uploads lie in folders of their own; their names alone are the user's.
            message = str(error)
            for file in files:
                message = message.replace(f"{Path(file).parent}/", "")
            raise InputError(message) from error

    def hole(self, model: str, picture: Image.Image | None, painting: Mapping[str, Any] | None) -> dict[str, Any]:
        """What inpainting needs: a picture, and what an editor over it was painted with; nothing without a picture.
        Large ones are shrunk to the model's size."""
        if picture is None:
            return {}
        picture = normalise(picture).convert("RGB")
        mask = Image.new("L", picture.size)
        for layer in (painting or {}).get("layers") or []:
            mask.paste(255, mask=layer.convert("RGBA").getchannel("A").resize(picture.size))
        ratio = min(1.0, self.pipeline(model).native_size / max(picture.size))
        width, height = (max(8, round(side * ratio) // 8 * 8) for side in picture.size)
        return {
            "image": picture.resize((width, height), Image.Resampling.LANCZOS),
            "mask_image": mask.resize((width, height), Image.Resampling.LANCZOS),
        }

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(self, session: str, progress: Any, order: Order) -> tuple[Pictures, Pictures]:
        """Images with their seeds; and of a method that draws in loops, each loop's picture."""
        order.check()
        pipeline = self.pipeline(order.model)
        cutouts = self.cut_out(order.files, order.segmenter, order.noun) if pipeline.reads_references else []
        hole = self.hole(order.model, order.picture, order.painting)
        cancelled = self._cancelled[session] = threading.Event()
        total = pipeline.steps_of(pipeline.settings(**order.settings), edits=bool(hole))
        done = itertools.count(1)

        def after_step(pipeline: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            number = next(done)
            progress(number / total, desc=f"step {number} of {total}")
            pipeline._interrupt = cancelled.is_set()
            return given

        seeds = range(order.seed, order.seed + order.count)
        try:
            drawn = pipeline(
                order.prompt,
                cutouts,
                class_noun=order.noun,
                num_images_per_prompt=order.count,
                generator=[torch.Generator().manual_seed(one) for one in seeds],
                callback_on_step_end=after_step,
                keep_loops=pipeline.has_loops,
                **hole,
                **order.settings,
            )
        finally:
            self._cancelled.pop(session, None)
        if cancelled.is_set():
            raise InputError("cancelled")
        images = [(image, f"seed {one}") for image, one in zip(drawn.images, seeds, strict=True)]
        loops = [
            (version, f"seed {one}, " + (f"after loop {number}" if number else "before the loops"))
            for one, versions in zip(seeds, drawn.loops or [[]] * order.count, strict=True)
            for number, version in enumerate(versions)
        ]
        return images, loops

    def cancel(self, session: str) -> None:
        if session in self._cancelled:
            self._cancelled[session].set()

    def command(self, order: Order) -> str:
        """The command line that draws the same pictures. Uploaded files stand in it by their names alone."""
        kind = self.kind(order.model)
        words = ["--model", order.model]
        if kind.reads_references:
            words += ["--references", *(self._source(file) for file in order.files)]
            words += ["--segmenter", order.segmenter] if order.segmenter != "none" else []
            weights = {name: getattr(self.cutting_out, name) for name in ("sam", "detector", "rembg_model")}
            for name, value in weights.items():
                words += [f"--{name}", value] if value != getattr(CuttingOut, name) else []
        words += ["--class_noun", order.noun] if order.noun else []
        words += ["--prompt", order.prompt]
        if order.picture is not None:
            words += ["--image", "picture.png", "--mask", "mask.png"]
        words += ["--images_per_prompt", str(order.count), "--seed", str(order.seed)]
        own = find_model(order.model).settings
        for one in controls(kind.Settings):
            value = order.settings.get(one.name, own.get(one.name, one.default))
            if value == own.get(one.name, one.default):
                continue
            if one.kind is bool:
                words += [f"--{'' if value else 'no_'}{one.name}"]
            else:
                values = value if one.kind is tuple else [value]
                words += [f"--{one.name}", *("null" if part is None else str(part) for part in values)]
        lines: list[list[str]] = []
        for word in words:  # a flag with its values a line
            if word.startswith("--"):
                lines.append([])
            lines[-1].append(word)
        flags = [*map(shlex.join, lines), "--out runs/drawn"]
        return " \\\n    ".join(["python -m pig.cli generate", *flags])

    def _source(self, file: str) -> str:
        """Where a reference comes from: an example's own path, where it is one."""
        for example in self.examples:
            for picture in example.pictures:
                if picture.name == Path(file).name and picture.read_bytes() == Path(file).read_bytes():
                    return str(picture)
        return Path(file).name
