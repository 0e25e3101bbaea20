"""What passes from a pipeline's call to its method: the call, checked, and what the method has read of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import SchedulerMixin
from PIL import Image
from torch import Generator, Tensor

from pig.sampling.inpainting import KnownRegion
from pig.sampling.loop import OnStep


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a pipeline, checked.

    prompts: P of them. references: the cut-outs (RGBA) of each prompt, equally many; none for a method that reads none.
    class_nouns: of each prompt, what its references show; "" where nobody says. scheduler: with the call's timesteps
    set. known: the part of a picture that stays (inpainting).
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
