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
from pig.toyworld.captions import (
    CATEGORIES,
    COLOURS,
    PLACES,
    SIZE,
    TOKENS,
    all_captions,
    any_scene,
    caption_of,
    facts_of,
    make_tokenizer,
    render,
    report_clip,
    standardised,
)
from pig.toyworld.stages.base import Stage


def pictures_with_facts(count: int) -> TensorDataset:
    scenes = [any_scene(seed) for seed in range(count)]
    return TensorDataset(render(scenes), facts_of(scenes))


class CLIPStage(Stage):
    """CLIP (both towers) and its tokenizer.

    The contrastive loss of CLIP with one change: many pictures of a batch fit the same caption, so each caption's
    target is spread over all pictures that it is true of.
    """

    steps, batch_size, lr = 2000, 128, 1e-3
    scenes = 24_000

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
        return pictures_with_facts(self.scenes)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, facts = batch
        texts, claims = zip(*(caption_of(row) for row in facts.tolist()), strict=True)
        claim = torch.tensor(claims, device=self.device)  # (B, 4), -1 where the caption says nothing
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

    Every picture is held against all captions of each kind: category with place, with colour, and with what is worn
    (LiT, arXiv 2111.07991, with the whole vocabulary in place of the batch). The projection of texts, of which the base
    model's text encoder has no part, learns, too.
    """

    steps, batch_size, lr = 7000, 128, 1e-3
    scenes = 48_000

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(weights)
        self.clip = CLIPModel.from_pretrained(weights, dtype=torch.float32, attn_implementation="eager")
        self.clip.text_model.requires_grad_(False)
        kinds = all_captions()
        self.counts = [len(texts) for texts in kinds]
        ids = tokenize(self.tokenizer, [text for texts in kinds for text in texts])
        with torch.no_grad():
            self.register_buffer("texts", self.clip.text_model(ids).pooler_output, persistent=False)

    def dataset(self) -> Dataset[Any]:
        return pictures_with_facts(self.scenes)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, facts = batch
        shift = torch.randint(-5, 6, (2,)).tolist()
        pixels = standardised(images.roll(shift, (2, 3)), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(3)
        embeds = F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
        captions = F.normalize(self.clip.text_projection(self.texts).float(), dim=-1)
        places, colours, worn = (self.clip.logit_scale.exp() * embeds @ captions.T).split(self.counts, dim=1)
        category, place, colour, wears = facts.unbind(1)
        of_worn = category * (worn.shape[1] // len(CATEGORIES)) + wears
        self.log("category", (places.argmax(1) // len(PLACES) == category).float().mean(), prog_bar=True)
        self.log("worn", (worn.argmax(1) == of_worn).float().mean(), prog_bar=True)
        return (
            F.cross_entropy(places, category * len(PLACES) + place)
            + F.cross_entropy(colours, category * len(COLOURS) + colour)
            + F.cross_entropy(worn, of_worn)
        )

    def save(self, out: Path) -> None:
        report_clip(self.clip, self.tokenizer)
        self.clip.half().save_pretrained(out / "clip")
