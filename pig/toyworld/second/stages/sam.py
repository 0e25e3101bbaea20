"""The segmenter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pig.models.segmenters import load_sam
from pig.toyworld.second.captions import any_scene
from pig.toyworld.stages import sam as first


class SAMStage(first.SAMStage):
    """The first edition's, longer: the visible part of an object, without what it wears."""

    steps, drawn = 2000, 24_000

    def begin_from(self, weights: Path) -> None:
        self.sam = load_sam(weights / "sam").train().requires_grad_(True)

    @staticmethod
    def scenes(count: int, first_seed: int) -> tuple[Tensor, Tensor]:
        seeds = tqdm(range(first_seed, first_seed + count), desc="drawing", mininterval=5)
        drawings = [any_scene(seed, accessories=0.3, partial=0.3).draw() for seed in seeds]
        images = torch.stack([torch.tensor(one.image).permute(2, 0, 1) for one in drawings])
        return images, torch.stack([torch.tensor(one.mask) for one in drawings])
