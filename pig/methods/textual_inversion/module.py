"""Textual Inversion (arXiv 2208.01618): learn one new word for a subject; the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from pig import diffusion
from pig.data.schema import Batch
from pig.data.subject_training import SubjectDataModule
from pig.errors import InputError, check_ranges
from pig.methods.textual_inversion.network import OneWord
from pig.methods.textual_inversion.pipeline import TOKEN, TextualInversionPipeline
from pig.models.backbone import sent
from pig.models.encoders import tokenize
from pig.models.words import embedding_of
from pig.sampling.settings import SamplingSettings
from pig.training.optimizers import OptimizerName, Schedule
from pig.training.triplets import noised_targets
from pig.training.tuned import TunedModule

# The neutral texts of CLIP's evaluation on ImageNet (section 4.1).
TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the nice {}",
    "a photo of a small {}",
    "a photo of a large {}",
)


class TextualInversion(TunedModule):
    """The denoising loss on the subject's pictures under neutral texts that hold the new word.

    Args:
        base: see `PersonalisationModule`.
        token: the new word. It starts as the class noun.
        templates: the texts, `{}` for the word; one is drawn for each picture.
        lr: of the embedding.
        schedule: of the learning rate: `constant`, or `cosine` to 0 at the end of the run.
        text_guidance: what the pipeline takes where none is named.
        gradient_checkpointing: less memory for about a third more time; same gradients.
        optimizer, micro_batch: see `PersonalisationModule`.
        save_at, save_half: see `TunedModule`.
    """

    method = "textual_inversion"
    net: OneWord

    def __init__(
        self,
        base: str,
        *,
        token: str = TOKEN,
        templates: Sequence[str] = TEMPLATES,
        lr: float = 5e-4,
        schedule: Schedule = "constant",
        text_guidance: float = SamplingSettings.text_guidance,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerName = "adamw",
        micro_batch: int | None = None,
        save_at: Sequence[int] = (),
        save_half: bool = False,
    ) -> None:
        check_ranges(**{"model.lr": (lr, 0, 1)})
        if not templates or any(one.count("{}") != 1 for one in templates):
            raise InputError("model.templates: each text needs one {} for the word")
        self.own_settings = {"text_guidance": text_guidance}
        SamplingSettings.given(self.own_settings, {})
        super().__init__(base, optimizer, micro_batch, save_at=save_at, save_half=save_half)
        self.save_hyperparameters()
        self.templates = tuple(templates)
        self.hparams.update(templates=list(templates), save_at=list(save_at))
        self.unet, self.token = self.backbone.unet, token
        self.net = OneWord(self.backbone.tokenizer, self.text_encoder, token)
        if gradient_checkpointing:
            self.unet.train()
            self.unet.enable_gradient_checkpointing()
        self.train_only({"word": lr}, schedule)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        if stage == "fit" and isinstance(data, SubjectDataModule):
            start = embedding_of(self.net.tokenizer, self.net.word.words, data.subject.class_noun)
            with torch.no_grad():
                self.net.word.embedding.copy_(start)  # a checkpoint's comes later

    def check(self, trainer: Trainer, data: Any) -> None:
        super().check(trainer, data)
        if data.prior is not None:
            raise InputError("Textual Inversion has no class pictures: leave data.prior out")

    def losses(self, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        """Squared error of each picture, (B,), and its timestep, (B,)."""
        noised = noised_targets(self, batch, uniforms=0, z_0=self.latents_of(batch))
        texts = [self.templates[seed % len(self.templates)].format(self.token) for seed in batch.seeds.tolist()]
        ids = sent(tokenize(self.net.longer, texts), self.device)
        text = self.text_encoder(ids)[0]
        predicted = self.unet(noised.z_t.to(self.unet.dtype), noised.t, text).sample
        return diffusion.loss_per_sample(predicted, noised.target), noised.t

    def pipeline(self) -> TextualInversionPipeline:
        return self.pipeline_of(TextualInversionPipeline, unet=self.unet, token=self.token)
