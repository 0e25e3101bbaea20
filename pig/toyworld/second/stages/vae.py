"""The autoencoder."""

from __future__ import annotations

from torch import Tensor

from pig.toyworld.second.captions import any_scene, render
from pig.toyworld.stages import vae as first


class VAEStage(first.VAEStage):
    """The first edition's loss, longer and a little wider: emblems and accessories are small."""

    steps, scenes, channels = 5000, 24_000, (32, 64, 96)

    @staticmethod
    def pictures(count: int, first_seed: int) -> Tensor:
        return render([any_scene(seed, partial=0.25) for seed in range(first_seed, first_seed + count)])
