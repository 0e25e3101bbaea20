"""From a picture's latents back to the noise that a sampler would have drawn it from."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepInverseScheduler, SchedulerMixin
from torch import Tensor

from pig.errors import InputError
from pig.sampling.loop import Predict

# Whatever solver the sampler is set to: two steps back, no noise, its own sigmas.
PLAIN = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
}


def invert(predict: Predict, z_0: Tensor, scheduler: SchedulerMixin, timesteps: Tensor) -> dict[int, Tensor]:
    """Run DPM-Solver++ (arXiv 2211.01095) backwards in time, from a picture to each of a sampler's timesteps.

    A picture counts as being at the last timestep if that is 0 or 1, where the noise is below anything that can be
    seen; otherwise the way begins at 0.

    Args:
        predict: as of `denoise`; called once for each timestep but the first.
        z_0: (B, 4, h, w), scaled latents.
        scheduler: the sampler, whose noise schedule and prediction type are taken.
        timesteps: falling, those of the sampler that the way back shall pass.

    Returns:
        Timestep -> latents (B, 4, h, w) at its noise level.

    Raises:
        InputError: the sampler's latents are not alpha_t x_0 + sigma_t epsilon, as those of Euler's are not.
    """
    if float(scheduler.init_noise_sigma) != 1:
        raise InputError(f"inversion needs a sampler that keeps the latents' variance, not {type(scheduler).__name__}")
    rising = timesteps.flip(0).tolist()
    path = [*([0] if rising[0] > 1 else []), *rising]
    latents, found = z_0, {rising[0]: z_0} if path == rising else {}
    if len(path) == 1:
        return found
    inverse = DPMSolverMultistepInverseScheduler.from_config(scheduler.config, **PLAIN)
    inverse.set_timesteps(len(path) - 1)
    # Its own timesteps are not those of the sampler.
    inverse.timesteps = torch.tensor(path[:-1], device=z_0.device)
    alphas_cumprod = scheduler.alphas_cumprod[path]
    inverse.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    for step, t in enumerate(inverse.timesteps):
        latents = inverse.step(predict(latents, t, step), t, latents, return_dict=False)[0]
        found[path[step + 1]] = latents
    return found
