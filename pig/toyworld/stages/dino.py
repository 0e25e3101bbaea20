"""The score network for identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pig.toyworld import scene
from pig.toyworld.captions import ACCESSORIES, PLACES, SIZE, WORN_COLOURS, Scene, any_scene, render, standardised
from pig.toyworld.stages.base import Stage

PARTIAL, DRESSED = 0.5, 0.4  # shares of the views


class DINOStage(Stage):
    """A ViT whose [CLS] token says which individual is seen: the score network for subject fidelity.

    Two scenes of one subject (other place, other pose; partial, or wearing something, which is no identity) attract,
    all other pictures repel (InfoNCE on the normalised [CLS] token itself, tau = 0.1). No colour jitter: colour is
    identity here. Blur, noise and crops, so that pictures that went through a VAE are judged by what they show.
    """

    steps, batch_size, lr = 5000, 96, 1e-3
    subjects, views, temperature = 10_000, 4, 0.1

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
        rows = []
        for i in range(count):
            subject = scene.make_subject(first_seed + i)
            for view in range(views):
                number = views * i + view
                place = PLACES[(3 * number + number // len(PLACES)) % len(PLACES)]
                drawn = any_scene(first_seed + number, accessories=DRESSED, partial=PARTIAL)
                rows.append(replace(drawn, subject=subject, background=place))
        return render(rows).unflatten(0, (count, views))

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
    def report(self) -> None:
        """Same subject among 200, by whole and partial pictures; what an accessory does to the cosine."""
        count, first_seed = 200, scene.HELD_OUT_SEED
        subjects = [scene.make_subject(first_seed + i) for i in range(count)]

        def embed(take: int, view: scene.View, dressed: bool = False) -> Tensor:
            scenes = []
            for i, subject in enumerate(subjects):
                worn = scene.Worn(ACCESSORIES[i % len(ACCESSORIES)], WORN_COLOURS[i % len(WORN_COLOURS)])
                place = PLACES[(i + 3 * take) % len(PLACES)]
                scenes.append(Scene(subject, place, first_seed + 10 * i + take, worn if dressed else None, view))
            return self.embed(self.pixels(render(scenes)))

        def top1(queries: Tensor, gallery: Tensor) -> float:
            return ((queries @ gallery.T).argmax(1) == torch.arange(count)).float().mean().item()

        whole, other = embed(0, "whole"), embed(1, "whole")
        partial = [embed(2, "cut"), embed(3, "behind"), embed(4, "cut"), embed(5, "behind")]
        among_partial = (top1(partial[0], partial[3]) + top1(partial[1], partial[2])) / 2
        print(
            f"dino: same subject among {count}, top-1 by whole pictures {top1(other, whole):.1%}, "
            f"by partial ones among whole ones {(top1(partial[0], whole) + top1(partial[1], whole)) / 2:.1%}, "
            f"among partial ones {among_partial:.1%}"
        )
        plain = (whole * other).sum(1)
        dressed = (whole * embed(1, "whole", dressed=True)).sum(1)
        print(f"dino: mean cosine of two pictures {plain.mean():.3f}, one with an accessory {dressed.mean():.3f}")

    @torch.no_grad()
    def save(self, out: Path) -> None:
        self.report()
        self.vit.half().save_pretrained(out / "dino")
        size = {"height": SIZE, "width": SIZE}
        ViTImageProcessor(size=size, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD).save_pretrained(
            out / "dino"
        )
