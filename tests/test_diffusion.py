"""Targets and noise against references written apart from the code: diffusers' schedulers, and plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from pig import diffusion


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_noise_and_targets_are_those_of_diffusers(scheduler) -> None:
    torch.manual_seed(0)
    x_0, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 250, 600, 999])
    alpha, sigma = diffusion.alpha_sigma(scheduler.alphas_cumprod, t)
    torch.testing.assert_close(diffusion.add_noise(x_0, noise, alpha, sigma), scheduler.add_noise(x_0, noise, t))
    v = diffusion.target(x_0, noise, alpha, sigma, "v_prediction")
    torch.testing.assert_close(v, scheduler.get_velocity(x_0, noise, t))
    assert torch.equal(diffusion.target(x_0, noise, alpha, sigma, "epsilon"), noise)


def test_x_0_comes_back_from_v(scheduler) -> None:
    """x_0 = alpha x_t - sigma v (arXiv 2202.00512, appendix D), value by value."""
    torch.manual_seed(0)
    x_0, noise, t = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([100, 900])
    alpha, sigma = diffusion.alpha_sigma(scheduler.alphas_cumprod, t)
    x_t = diffusion.add_noise(x_0, noise, alpha, sigma)
    v = diffusion.target(x_0, noise, alpha, sigma, "v_prediction")
    for b in range(2):
        a = scheduler.alphas_cumprod[t[b]].item()
        torch.testing.assert_close(a**0.5 * x_t[b] - (1 - a) ** 0.5 * v[b], x_0[b])


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="sample"):
        diffusion.target(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(1), "sample")


def test_each_sample_draws_from_its_own_seed() -> None:
    seeds = torch.tensor([5, 2**62, 7])
    noise, noise_ref, u = diffusion.draw(seeds, (3, 4, 8, 8), (3, 2, 4, 8, 8), uniforms=3)
    alone = diffusion.draw(seeds[1:2], (1, 4, 8, 8), (1, 2, 4, 8, 8), uniforms=3)
    for whole, one in zip((noise, noise_ref, u), alone, strict=True):
        assert torch.equal(whole[1:2], one)
    assert u.shape == (3, 3)
    assert ((u >= 0) & (u < 1)).all()
    assert not torch.equal(noise[0], noise[2])
