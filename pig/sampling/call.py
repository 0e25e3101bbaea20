"""What passes between a pipeline and its method: the call, checked; what the method has read of it; what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Generator, Tensor

from pig.sampling.inpainting import KnownRegion
from pig.sampling.loop import OnStep


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a pipeline, checked.

    prompts: P of them. references: the cut-outs (RGBA) of each prompt, equally many; none for a method that reads none.
    class_nouns: of each prompt, what its references show; "" where nobody says. scheduler: with the call's timesteps
    set. known: the part of a picture that stays (inpainting). on_loop: for a method that draws in loops: is to be
    called with the numbers of pictures and their latents as they are after the first run and after each loop.
    """

    prompts: list[str]
    references: list[list[Image.Image]]
    class_nouns: list[str]
    images_per_prompt: int
    height: int
    width: int
    scheduler: SchedulerMixin
    generator: Generator | list[Generator] | None
    on_step: OnStep
    on_loop: Callable[[Sequence[int], Tensor], None]
    known: KnownRegion | None = None

    @property
    def count(self) -> int:
        """Pictures, prompt by prompt."""
        return len(self.prompts) * self.images_per_prompt


@dataclass(eq=False)
class Condition:
    """What the steps of a call need; a method adds its own.

    text: branch -> (B, L, D). weights: of the branches, where guidance is used. steps: of the scheduler.
    """

    text: Mapping[str, Tensor]
    weights: Mapping[str, float]
    steps: int


@dataclass
class Drawn(BaseOutput):
    """images: as the call's `output_type` says. loops: where they are kept, of each picture its versions."""

    images: Any
    loops: list[list[Any]] | None = None
