"""The autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from pig.toyworld import scene
from pig.toyworld.captions import SIZE, any_scene, render
from pig.toyworld.stages.base import Stage


class VAEStage(Stage):
    """AutoencoderKL, 64 px -> 4 x 16 x 16.

    Reconstruction (L1 + 4 MSE) and two additions that small autoencoders need: an anchor that pulls the first three
    channels of the latents to the shrunken image, which settles the hues early, and a little noise on the latents,
    which makes the decoder forgive the UNet's small errors.
    """

    steps, batch_size, lr = 3200, 16, 2e-3
    anchor, noise = 0.2, 0.05
    channels, scenes = (32, 64, 64), 24_000

    def __init__(self) -> None:
        super().__init__()
        self.vae = AutoencoderKL(
            block_out_channels=self.channels,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=SIZE,
            mid_block_add_attention=False,
        )

    @staticmethod
    def pictures(count: int, first_seed: int) -> Tensor:
        """(count, 3, SIZE, SIZE) uint8."""
        return render([any_scene(seed, partial=0.25) for seed in range(first_seed, first_seed + count)])

    def dataset(self) -> Dataset[Any]:
        return TensorDataset(self.pictures(self.scenes, 0))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images = batch[0].float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        z = posterior.mean
        decoded = self.vae.decode(z + self.noise * torch.randn_like(z)).sample.float()
        error = decoded - images
        small = F.avg_pool2d(images, SIZE // z.shape[-1])
        loss = (
            error.abs().mean()
            + 4 * error.square().mean()
            + self.anchor * (z[:, :3].float() - 2 * small).abs().mean()
            + 1e-5 * posterior.kl().mean() / z[0].numel()
        )
        self.log("psnr", 10 * torch.log10(4 / error.detach().square().mean()), prog_bar=True)
        return loss

    @torch.no_grad()
    def save(self, out: Path) -> None:
        images = self.pictures(256, scene.HELD_OUT_SEED).float() / 127.5 - 1
        latents = self.vae.encode(images).latent_dist.mean
        self.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
        decoded = self.vae.decode(latents).sample.clamp(-1, 1)
        psnr = 10 * torch.log10(4 / (decoded - images).square().flatten(1).mean(1))
        print(f"vae: held-out PSNR {psnr.mean():.2f} dB, latent std {latents.std():.3f}")
        self.vae.half().save_pretrained(out / "base/vae")
