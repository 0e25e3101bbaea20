"""Inversion, where the answer is known: for Gaussian pictures both ideal prediction and way back have a closed form."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from pig.diffusion import alpha_sigma
from pig.errors import InputError
from pig.models.backbone import SCHEDULERS, make_scheduler
from pig.sampling.inversion import invert
from pig.sampling.loop import denoise

MEAN, DEVIATION = 0.4, 0.7
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ideal(prediction_type: str):
    """What a perfect network predicts of x_t where x_0 is normal with MEAN and DEVIATION."""
    alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod

    def predict(x: Tensor, t: Tensor, step: int) -> Tensor:
        alpha, sigma = alpha_sigma(alphas_cumprod, t.view(1))
        epsilon = sigma * (x - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
        x_0 = (x - sigma * epsilon) / alpha
        return epsilon if prediction_type == "epsilon" else alpha * epsilon - sigma * x_0

    return predict


def along(x_0: Tensor, t: int) -> Tensor:
    """Where the probability flow carries x_0: its standard score stays."""
    alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod
    (a_0, s_0), (a_t, s_t) = (alpha_sigma(alphas_cumprod, torch.tensor([one])) for one in (0, t))
    score = (x_0 - a_0 * MEAN) / (a_0**2 * DEVIATION**2 + s_0**2).sqrt()
    return a_t * MEAN + score * (a_t**2 * DEVIATION**2 + s_t**2).sqrt()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_way_back_is_the_probability_flow(name, prediction_type) -> None:
    x_0 = MEAN + DEVIATION * torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    errors = {}
    for steps in (20, 80):
        scheduler = make_scheduler(name, {**SCHEDULE, "prediction_type": prediction_type, "steps_offset": 1})
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[round(0.6 * steps) :]
        found = invert(ideal(prediction_type), x_0, scheduler, timesteps)
        assert set(found) == set(timesteps.tolist())
        errors[steps] = max(float((found[t] - along(x_0, t)).abs().max()) for t in found)
    assert errors[20] < 0.15
    assert errors[80] < errors[20] / 3


def test_there_and_back() -> None:
    """A deterministic sampler draws the picture again from where the inversion has come to."""
    x_0 = MEAN + DEVIATION * torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    scheduler = make_scheduler("dpm++", {**SCHEDULE, "prediction_type": "epsilon"})
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps[30:]
    found = invert(ideal("epsilon"), x_0, scheduler, timesteps)
    scheduler.set_begin_index(30)
    again = denoise(ideal("epsilon"), found[int(timesteps[0])], scheduler, timesteps)
    assert torch.allclose(again, x_0, atol=0.08)
    assert not torch.allclose(found[int(timesteps[0])], x_0, atol=0.2)


def test_one_step_back_is_no_step() -> None:
    scheduler = make_scheduler("ddpm", {**SCHEDULE, "steps_offset": 1})
    scheduler.set_timesteps(50)
    x_0 = torch.ones(1, 4, 2, 2)
    found = invert(ideal("epsilon"), x_0, scheduler, scheduler.timesteps[-1:])
    assert found[1] is x_0


def test_a_sampler_of_another_scale_is_refused() -> None:
    scheduler = EulerDiscreteScheduler(**SCHEDULE)
    scheduler.set_timesteps(10)
    with pytest.raises(InputError, match="EulerDiscreteScheduler"):
        invert(ideal("epsilon"), torch.ones(1, 4, 2, 2), scheduler, scheduler.timesteps[5:])
