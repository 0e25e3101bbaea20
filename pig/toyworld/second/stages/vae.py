"""The autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pig.toyworld.second.captions import any_scene, render
from pig.toyworld.stages import vae as first


class VAEStage(first.VAEStage):
    """The first edition's VAE, trained on: emblems and accessories are small."""

    steps, scenes, lr = 3200, 24_000, 1e-3

    def begin_from(self, weights: Path) -> None:
        self.vae = AutoencoderKL.from_pretrained(weights / "base/vae", dtype=torch.float32)
        self.vae.register_to_config(_name_or_path="")  # else the path of this machine

    @staticmethod
    def pictures(count: int, first_seed: int) -> Tensor:
        return render([any_scene(seed, partial=0.25) for seed in range(first_seed, first_seed + count)])
