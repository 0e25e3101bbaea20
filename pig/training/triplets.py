"""Noised triplets: what the steps of the methods that learn from (target, reference, caption) have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pig import diffusion
from pig.data.schema import Batch
from pig.models.backbone import encode_images, latent_shape, sent
from pig.training.module import PersonalisationModule


@dataclass(frozen=True)
class NoisedTriplets:
    """A batch as the networks see it.

    z_t: (B, 4, h, w) at t: (B,). z_ref_t: (R, K, 4, h, w) at t_ref: (R,), of the samples `read`: (R,) long; the first
    `count` of them are those whose references are kept: `kept`, (count,) long; None where nothing can be dropped.
    text, text_ref: (B, L, D) and (R, L, D); some captions are emptied in `text`. target: what shall be predicted.
    """

    z_t: Tensor
    t: Tensor
    z_ref_t: Tensor
    t_ref: Tensor
    text: Tensor
    text_ref: Tensor
    target: Tensor
    read: Tensor
    kept: Tensor | None
    count: int


@dataclass(frozen=True)
class NoisedTargets:
    """z_t: (B, 4, h, w) at t: (B,). target: what shall be predicted. u: (B, uniforms) in [0, 1)."""

    z_t: Tensor
    t: Tensor
    target: Tensor
    u: Tensor


def noised_targets(
    module: PersonalisationModule, batch: Batch, *, uniforms: int, z_0: Tensor | None = None
) -> NoisedTargets:
    """Encode and noise a batch's targets; every draw follows from the samples' seeds.

    uniforms: numbers that the method needs for its own choices. z_0: (B, 4, h, w), where they are encoded already.
    """
    noise, u = diffusion.draw(batch.seeds, latent_shape(module.vae, batch.target), uniforms=uniforms + 1)
    noise, u = sent(noise, module.device), sent(u, module.device)
    t = (u[:, 0] * module.train_timesteps).long()
    z_0 = encode_images(module.vae, batch.target).float() if z_0 is None else z_0
    alpha, sigma = diffusion.alpha_sigma(module.alphas_cumprod, t)
    kind = module.backbone.scheduler.config.prediction_type
    return NoisedTargets(
        z_t=diffusion.add_noise(z_0, noise, alpha, sigma),
        t=t,
        target=diffusion.target(z_0, noise, alpha, sigma, kind),
        u=u[:, 1:],
    )


def noised_triplets(
    module: PersonalisationModule,
    batch: Batch,
    told: Sequence[str],
    *,
    reference_dropout: float,
    caption_dropout: float,
    reference_timestep: int | None,
    dtype: torch.dtype,
) -> NoisedTriplets:
    """Encode and noise a batch; every draw follows from the samples' seeds.

    Args:
        told: what the network that reads the references is told, a text for each sample.
        reference_dropout, caption_dropout: probabilities that a sample's references, or its caption, are left out.
        reference_timestep: t of the references; None: the target's.
        dtype: of the noised latents.
    """
    reference = batch.references()
    noise, noise_ref, u = diffusion.draw(
        batch.seeds, latent_shape(module.vae, batch.target), latent_shape(module.vae, reference), uniforms=3
    )
    # Decided on the CPU, so that nothing waits for a GPU. References are read for the kept samples, their number
    # rounded up to eighths of the batch: few sizes, so that kernels are chosen seldom. At least 2: with 0 a process
    # would have no gradient, and for 1 compiled blocks would be compiled again.
    dropped, eighth = u[:, 1] < reference_dropout, max(1, len(u) // 8)
    order, count = dropped.long().argsort(stable=True), int((~dropped).sum())
    kept, read = order[:count], order[: max(2, eighth * -(-count // eighth))]
    noise, noise_ref, u, kept, read = (sent(x, module.device) for x in (noise, noise_ref[read], u, kept, read))
    t = (u[:, 0] * module.train_timesteps).long()
    t_ref = t[read] if reference_timestep is None else torch.full_like(read, reference_timestep)

    z_0, z_ref_0 = module.encode_pictures(batch.target, reference[read])
    alpha, sigma = diffusion.alpha_sigma(module.alphas_cumprod, t)
    alpha_ref, sigma_ref = (s.unsqueeze(1) for s in diffusion.alpha_sigma(module.alphas_cumprod, t_ref))
    z_t = diffusion.add_noise(z_0, noise, alpha, sigma)
    z_ref_t = diffusion.add_noise(z_ref_0, noise_ref, alpha_ref, sigma_ref)
    text, empty, text_ref = module.encode_captions(batch, told)
    kind = module.backbone.scheduler.config.prediction_type
    return NoisedTriplets(
        z_t=z_t.to(dtype),
        t=t,
        z_ref_t=z_ref_t.to(dtype),
        t_ref=t_ref,
        text=torch.where((u[:, 2] < caption_dropout).view(-1, 1, 1), empty, text),
        text_ref=text_ref[read],
        target=diffusion.target(z_0, noise, alpha, sigma, kind),
        read=read,
        kept=kept if reference_dropout else None,
        count=count,
    )
