"""The diffusion process as pure tensor functions, shared by training and sampling.

Notation (BootPIG, arXiv 2401.13974, section 3.1): x_t = alpha_t x_0 + sigma_t epsilon, with
alpha_t = sqrt(alphas_cumprod[t]), sigma_t = sqrt(1 - alphas_cumprod[t]) and t in [0, T). B = batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")


def alpha_sigma(alphas_cumprod: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_t, sigma_t), each (B, 1, 1, 1) float32, for `t`: (B,) long; `alphas_cumprod`: (T,)."""
    alpha_squared = alphas_cumprod.to(t.device)[t].float().view(-1, 1, 1, 1)
    return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


def add_noise(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t epsilon."""
    return alpha * x_0 + sigma * noise


def target(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """What the UNet learns to predict: epsilon (Eq. 1), or v = alpha_t epsilon - sigma_t x_0 (arXiv 2202.00512)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha * noise - sigma * x_0
    raise ValueError(f"prediction_type {prediction_type!r} is none of {PREDICTION_TYPES}")


def loss_per_sample(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,) float32. Algorithm 1 prints `noisedtar - predtar`: a misprint."""
    return (predicted.float() - wanted.float()).square().flatten(1).mean(1)


def derived_seed(purpose: str, number: int) -> int:
    """A seed for one purpose, independent of every other purpose's and of a user's own small numbers.

    torch's generators on CPUs read the low 32 bits of a seed only, and pictures are drawn from small seeds: noise for
    another purpose from the same number would be the very same noise.
    """
    return int.from_bytes(hashlib.sha256(f"{purpose} {number}".encode()).digest()[:4], "big")


def draw(seeds: Tensor, *shapes: Sequence[int], uniforms: int) -> tuple[Tensor, ...]:
    """All that a training step draws by chance, each sample's from its own seed alone.

    So neither the other samples of a batch, nor the split over processes, nor an interruption changes anything.

    Args:
        seeds: (B,) int64.
        shapes: of the noises, each (B, ...).
        uniforms: how many uniform numbers each sample needs.

    Returns:
        A standard normal tensor for each shape, and (B, uniforms) uniform in [0, 1): all float32 on the CPU.
    """
    rows = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(uniforms, generator=generator)
        rows.append([*(torch.randn(shape[1:], generator=generator) for shape in shapes), uniform])
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))
