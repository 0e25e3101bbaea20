"""The base model alone, drawing by text: what a benchmark's scores are measured from."""

from __future__ import annotations

from typing import ClassVar

from pig.sampling.text import TextPipeline


class BasePipeline(TextPipeline):
    """Stable Diffusion as it is."""

    method = "base"
    without_references: ClassVar = {}
