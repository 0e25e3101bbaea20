"""The sampling loop of all methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from diffusers import SchedulerMixin
from torch import Generator, Tensor

from pig import diffusion

Predict = Callable[[Tensor, Tensor, int], Tensor]
OnStep = Callable[[int, Tensor, Tensor], tuple[Tensor, bool]]


class Known(Protocol):
    """What of a picture stays as it is; see `pig.sampling.inpainting.KnownRegion`."""

    def blend(self, latents: Tensor, scheduler: SchedulerMixin, t: Tensor | None) -> Tensor: ...


def noised(latents: Tensor, noise: Tensor, scheduler: SchedulerMixin, t: Tensor) -> Tensor:
    """Latents (B, 4, h, w), free of noise, brought to the noise level of t, as this scheduler scales them.

    (Schedulers' own `add_noise` goes by their steps, not by t, and some are wrong before `set_timesteps`.)
    """
    if float(scheduler.init_noise_sigma) != 1:  # x_0 + sigma epsilon, as in Euler's
        return scheduler.add_noise(latents, noise, t.view(1))
    alpha, sigma = diffusion.alpha_sigma(scheduler.alphas_cumprod, t.view(1).long())
    return diffusion.add_noise(latents, noise, alpha.to(latents), sigma.to(latents))


def denoise(
    predict: Predict,
    latents: Tensor,
    scheduler: SchedulerMixin,
    timesteps: Tensor,
    *,
    generator: Generator | list[Generator] | None = None,
    known: Known | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """From noise to a picture's latents.

    Args:
        predict: called with the latents as the scheduler scales them for a network, t, and the step's number; returns
            the guided prediction (B, 4, h, w), epsilon or v.
        latents: (B, 4, h, w), at the noise level of the first timestep.
        timesteps: of the scheduler's, in their order; all of them, or the part that is left to do.
        generator: what ancestral schedulers draw their noise from.
        known: blended in after each step, at the noise level that it has reached.
        on_step: called after each step with its number, t and the latents; returns those to go on with, and whether
            to go on.

    Returns:
        Latents (B, 4, h, w), as they were where `on_step` ended the loop.
    """
    extra: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = generator
    for step, t in enumerate(timesteps):
        guided = predict(scheduler.scale_model_input(latents, t), t, step)
        latents = scheduler.step(guided, t, latents, return_dict=False, **extra)[0]
        if known is not None:
            latents = known.blend(latents, scheduler, timesteps[step + 1] if step + 1 < len(timesteps) else None)
        if on_step is not None:
            latents, go_on = on_step(step, t, latents)
            if not go_on:
                break
    return latents
