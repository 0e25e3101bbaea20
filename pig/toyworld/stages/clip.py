"""CLIP, in two stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pig.models.encoders import tokenize
from pig.toyworld import scene
from pig.toyworld.captions import (
    CATEGORIES,
    COLOURS,
    PLACES,
    SIZE,
    TOKENS,
    caption_of,
    facts_of,
    make_tokenizer,
    random_scenes,
    report_clip,
    standardised,
)
from pig.toyworld.stages.base import Stage


class CLIPStage(Stage):
    """CLIP (both towers) and its tokenizer.

    The contrastive loss of CLIP with one change: many pictures of a batch fit the same caption, so each caption's
    target is spread over all pictures that it is true of.
    """

    steps, batch_size, lr = 2000, 128, 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        special = {
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        tower = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 384, "projection_dim": 64}
        text = {**tower, **special, "num_hidden_layers": 2, "vocab_size": len(self.tokenizer)}
        vision = {**tower, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8}
        self.clip = CLIPModel(
            CLIPConfig(text_config={**text, "max_position_embeddings": TOKENS}, vision_config=vision, projection_dim=64)
        )
        self.clip.set_attn_implementation("eager")  # see UNetStage

    def dataset(self) -> Dataset[Any]:
        images, subjects, background = random_scenes(24_000, first_seed=0)
        facts = torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)])
        return TensorDataset(images, facts)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, facts = batch
        texts, claims = zip(*(caption_of(row) for row in facts.tolist()), strict=True)
        claim = torch.tensor(claims, device=self.device)  # (B, 3), -1 where the caption says nothing
        true = ((claim == facts[:, None]) | (claim < 0)).all(-1).float()  # [image, text]
        shift = torch.randint(-4, 5, (2,)).tolist()
        pixels = standardised(images.roll(shift, (2, 3)), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        out = self.clip(input_ids=tokenize(self.tokenizer, texts).to(self.device), pixel_values=pixels)
        logits = out.logits_per_image.float()
        self.log("right", true.gather(1, logits.argmax(1, keepdim=True)).mean(), prog_bar=True)
        return (
            F.cross_entropy(logits, true / true.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, (true / true.sum(0)).T)
        ) / 2

    @torch.no_grad()
    def save(self, out: Path) -> None:
        report_clip(self.clip, self.tokenizer)
        self.clip.half().save_pretrained(out / "clip")
        processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
        CLIPProcessor(processor, self.tokenizer).save_pretrained(out / "clip")
        text = CLIPTextModel.from_pretrained(out / "clip", dtype=torch.float16)
        text.save_pretrained(out / "base/text_encoder")
        self.tokenizer.save_pretrained(out / "base/tokenizer")


class VisionStage(Stage):
    """Bring CLIP's image tower, the slower learner, up to its text tower, which stays as `clip` left it.

    Every picture is held against all captions of its kind: 120 of category and background, 144 of colour and
    category (LiT, arXiv 2111.07991, with the whole vocabulary in place of the batch).
    """

    steps, batch_size, lr = 7000, 128, 1e-3

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.weights = weights
        self.tokenizer = CLIPTokenizer.from_pretrained(weights)
        self.clip = CLIPModel.from_pretrained(weights, dtype=torch.float32, attn_implementation="eager")
        self.clip.text_model.requires_grad_(False)
        self.clip.text_projection.requires_grad_(False)
        places = [scene.caption(category, place) for category in CATEGORIES for place in PLACES]
        colours = [f"a photo of a {colour} {category}" for category in CATEGORIES for colour in COLOURS]
        with torch.no_grad():
            embeds = self.clip.get_text_features(input_ids=tokenize(self.tokenizer, places + colours)).pooler_output
        self.register_buffer("captions", F.normalize(embeds, dim=-1), persistent=False)
        self.places = len(places)

    def dataset(self) -> Dataset[Any]:
        images, subjects, background = random_scenes(48_000, first_seed=0)
        return TensorDataset(images, torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)]))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, facts = batch
        shift = torch.randint(-5, 6, (2,)).tolist()
        pixels = standardised(images.roll(shift, (2, 3)), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(3)
        embeds = F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
        logits = self.clip.logit_scale.exp() * embeds @ self.captions.T
        category, place, colour = facts.unbind(1)
        place_logits, colour_logits = logits[:, : self.places], logits[:, self.places :]
        right = place_logits.argmax(1) // len(PLACES) == category
        self.log("category", right.float().mean(), prog_bar=True)
        return F.cross_entropy(place_logits, category * len(PLACES) + place) + F.cross_entropy(
            colour_logits, category * len(COLOURS) + colour
        )

    def save(self, out: Path) -> None:
        report_clip(self.clip, self.tokenizer)
        self.clip.half().save_pretrained(out / "clip")
