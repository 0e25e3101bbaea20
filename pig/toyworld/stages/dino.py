"""The score network for identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pig.toyworld import scene
from pig.toyworld.captions import PLACES, SIZE, render, standardised
from pig.toyworld.stages.base import Stage


class DINOStage(Stage):
    """A ViT whose [CLS] token says which individual is seen: the score network for subject fidelity.

    Two scenes of one subject (other place, other pose) attract, all other pictures repel (InfoNCE on the normalised
    [CLS] token itself, tau = 0.1). No colour jitter: colour is identity here. Blur, noise and crops, so that
    pictures that went through a VAE are judged by what they show.
    """

    steps, batch_size, lr = 2000, 96, 1e-3
    subjects, views, temperature = 6000, 4, 0.1

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            image_size=SIZE,
            patch_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.vit.set_attn_implementation("eager")  # see UNetStage

    @staticmethod
    def scenes(count: int, first_seed: int, views: int) -> Tensor:
        """(count, views, 3, SIZE, SIZE): `views` scenes of each of `count` subjects."""
        subjects = [scene.make_subject(first_seed + i) for i in range(count) for _ in range(views)]
        background = [PLACES[(3 * i + i // len(PLACES)) % len(PLACES)] for i in range(len(subjects))]
        images = render(range(first_seed, first_seed + len(subjects)), background, subjects)
        return images.view(count, views, *images.shape[1:])

    def dataset(self) -> Dataset[Any]:
        return TensorDataset(self.scenes(self.subjects, 0, self.views))

    @staticmethod
    def pixels(images: Tensor) -> Tensor:
        return standardised(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def augment(self, images: Tensor) -> Tensor:
        x = self.pixels(images)
        if torch.rand(()) < 0.5:
            small = int(torch.randint(24, 49, ()))
            x = F.interpolate(F.interpolate(x, small, mode="area"), SIZE, mode="bicubic")
        if torch.rand(()) < 0.8:
            margin = int(torch.randint(0, 6, ()))
            x = F.interpolate(x[..., margin : SIZE - margin, margin : SIZE - margin], SIZE, mode="bicubic")
        return x + 0.1 * torch.rand(()) * torch.randn_like(x)

    def embed(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.vit(pixels).last_hidden_state[:, 0].float(), dim=-1)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images = batch[0]
        first, second = torch.randperm(self.views)[:2].tolist()
        a, b = self.embed(self.augment(images[:, first])), self.embed(self.augment(images[:, second]))
        logits = a @ b.T / self.temperature
        target = torch.arange(len(a), device=a.device)
        self.log("top1", (logits.argmax(1) == target).float().mean(), prog_bar=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    @torch.no_grad()
    def save(self, out: Path) -> None:
        images = self.scenes(200, scene.HELD_OUT_SEED, 2)
        a, b = (self.embed(self.pixels(images[:, i])) for i in (0, 1))
        top1 = ((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean().item()
        print(f"dino: same subject among 200, top-1 {top1:.1%}, mean cosine {(a * b).sum(1).mean():.3f}")
        self.vit.half().save_pretrained(out / "dino")
        size = {"height": SIZE, "width": SIZE}
        ViTImageProcessor(size=size, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD).save_pretrained(
            out / "dino"
        )
