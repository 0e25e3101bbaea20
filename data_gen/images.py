"""Stage 2: a picture for each caption, by any text-to-image pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError

from data_gen.config import ImagesConfig
from data_gen.samples import Report, Sample, batches, read_samples, save_png, write_lines
from pig.errors import InputError
from pig.models.backbone import half_on
from pig.models.names import resolve

DONE = "images.jsonl"


class Painter:
    """Draws samples in batches. Each sample's noise follows from its own seed, whatever batch it is in."""

    def __init__(self, config: ImagesConfig, device: str) -> None:
        self.config = config
        dtype = half_on(device)
        try:
            self.pipeline: DiffusionPipeline = AutoPipelineForText2Image.from_pretrained(
                resolve(config.model), dtype=dtype, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"cannot load images.model={config.model!r}: neither a folder nor a hub id that can be reached, or not "
                f"a text-to-image pipeline in safetensors. The cause: {str(error).splitlines()[0]}"
            ) from error
        self.pipeline.to(device).set_progress_bar_config(disable=True)
        if config.compile:
            core = getattr(self.pipeline, "unet", None) or self.pipeline.transformer
            core.compile_repeated_blocks(dynamic=False)

    def draw(self, samples: Sequence[Sample]) -> tuple[list[Image.Image], list[bool]]:
        """Pictures, and for each whether the checkpoint's safety checker, if it has one, blanked it."""
        count = len(samples)
        if self.config.compile:  # one shape for all batches: which kernels run must not depend on what ran before
            samples = [*samples, *[samples[-1]] * (self.config.batch_size - count)]
        out = self.pipeline(
            [sample.caption for sample in samples],
            height=self.config.size,
            width=self.config.size,
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            generator=[torch.Generator().manual_seed(sample.seed) for sample in samples],
        )
        unsafe = getattr(out, "nsfw_content_detected", None) or [False] * count
        return out.images[:count], unsafe[:count]


def draw_images(folder: Path, painter: Painter, config: ImagesConfig, report: Report) -> None:
    """`samples.jsonl` -> `images/KEY.png` and `images.jsonl`. A batch of which a picture is missing is drawn again."""
    flags = {}
    for batch in batches(read_samples(folder), config.batch_size):
        marks = [folder / "images" / f"{sample.key}.unsafe" for sample in batch]
        paths = [mark.with_suffix(".png") for mark in marks]
        if not all(path.exists() for path in paths):
            pictures, unsafe = painter.draw(batch)
            for picture, flagged, path, mark in zip(pictures, unsafe, paths, marks, strict=True):
                if flagged:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    mark.touch()
                save_png(picture, path)
        flags.update({sample.key: mark.exists() for sample, mark in zip(batch, marks, strict=True)})
        report(len(batch))
    write_lines(folder / DONE, ({"key": key, "unsafe": unsafe} for key, unsafe in flags.items()))
