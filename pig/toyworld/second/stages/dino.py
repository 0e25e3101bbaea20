"""The score network for identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTModel

from pig.toyworld.second import scene
from pig.toyworld.second.captions import ACCESSORIES, PLACES, WORN_COLOURS, Scene, any_scene, render
from pig.toyworld.stages import dino as first

PARTIAL, DRESSED = 0.5, 0.4  # shares of the views


class DINOStage(first.DINOStage):
    """The first edition's loss; its views of a subject may be partial, or wear something, which is no identity."""

    steps, lr = 3000, 1e-3
    subjects = 10_000

    def begin_from(self, weights: Path) -> None:
        earlier = ViTModel.from_pretrained(weights / "dino", dtype=torch.float32, add_pooling_layer=False)
        self.vit.load_state_dict(earlier.state_dict())

    @staticmethod
    def scenes(count: int, first_seed: int, views: int) -> Tensor:
        rows = []
        for i in range(count):
            subject = scene.make_subject(first_seed + i)
            for view in range(views):
                number = views * i + view
                place = PLACES[(3 * number + number // len(PLACES)) % len(PLACES)]
                drawn = any_scene(first_seed + number, accessories=DRESSED, partial=PARTIAL)
                rows.append(replace(drawn, subject=subject, background=place))
        return render(rows).unflatten(0, (count, views))

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

    def save(self, out: Path) -> None:
        self.report()
        super().save(out)
