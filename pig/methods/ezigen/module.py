"""EZIGen (arXiv 2409.08091): train adapters that bring the features of a frozen UNet into itself."""

from __future__ import annotations

import torch
from torch import Tensor

from pig import diffusion
from pig.data.schema import Batch
from pig.errors import InputError
from pig.methods.ezigen.network import EZIGenNet
from pig.methods.ezigen.pipeline import EZIGenPipeline, EZIGenSettings, reference_prompt
from pig.training.module import PersonalisationModule
from pig.training.optimizers import OptimizerName, Schedule
from pig.training.triplets import noised_triplets


class EZIGen(PersonalisationModule):
    """The denoising loss with references read at a fixed, nearly noise-free timestep (section 3.2).

    Args:
        base: see `PersonalisationModule`.
        lr: of the adapters (section 4.1).
        schedule: of the learning rate: `constant`, or `cosine` to 0 at the end of the run.
        reference_dropout: probability that a sample has no reference tokens.
        caption_dropout: probability that a sample's caption is emptied, for classifier-free guidance.
        reference_timestep: t at which references are noised and read (section 3.2: 1).
        double_residual: the authors' release adds LayerNorm(h) a second time; see `ReferenceAdapter`.
        text_guidance, image_guidance, loops: what the pipeline takes where none is named.
        gradient_checkpointing: less memory for about a third more time; same gradients.
        compile: the UNet's repeated blocks by `torch.compile`: minutes at the start, for GPUs.
        optimizer, micro_batch: see `PersonalisationModule`.
    """

    method = "ezigen"
    net: EZIGenNet

    def __init__(
        self,
        base: str,
        *,
        lr: float = 1e-4,
        schedule: Schedule = "constant",
        reference_dropout: float = 0.0,
        caption_dropout: float = 0.1,
        reference_timestep: int = 1,
        double_residual: bool = False,
        text_guidance: float = EZIGenSettings.text_guidance,
        image_guidance: float = EZIGenSettings.image_guidance,
        loops: int | None = EZIGenSettings.loops,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        optimizer: OptimizerName = "adamw",
        micro_batch: int | None = None,
    ) -> None:
        for name, value in (("reference_dropout", reference_dropout), ("caption_dropout", caption_dropout)):
            if not 0 <= value <= 1:
                raise InputError(f"model.{name} is a probability, got {value}")
        self.own_settings = {"text_guidance": text_guidance, "image_guidance": image_guidance, "loops": loops}
        EZIGenSettings.given(self.own_settings, {})  # a mistake is said now, not at the first validation
        super().__init__(base, optimizer, micro_batch)
        if not 0 <= reference_timestep < self.train_timesteps:
            raise InputError(
                f"model.reference_timestep must be in [0, {self.train_timesteps}), got {reference_timestep}"
            )
        self.save_hyperparameters()
        self.net = EZIGenNet(self.backbone.unet, double_residual=double_residual)
        self.arrange(gradient_checkpointing=gradient_checkpointing, compile=compile)
        self.dropout = {"reference": reference_dropout, "caption": caption_dropout}
        self.reference_timestep = reference_timestep
        self.train_only({"adapters": lr}, schedule)

    def losses(self, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        """Squared error of each sample, (B,), and its timestep, (B,)."""
        self.check_encoded(batch.encoded_by)
        drops = self.dropout if training else dict.fromkeys(self.dropout, 0.0)
        noised = noised_triplets(
            self,
            batch,
            [reference_prompt(object_) for object_ in batch.objects],
            reference_dropout=drops["reference"],
            caption_dropout=drops["caption"],
            reference_timestep=self.reference_timestep,
            dtype=self.net.unet.dtype,
        )
        with torch.no_grad():  # the UNet is frozen
            each = noised.text_ref[:, None].expand(-1, noised.z_ref_t.shape[1], -1, -1)
            references = self.net.encode_reference(noised.z_ref_t, noised.t_ref, each)
        references = {name: f[: noised.count] for name, f in references.items()}
        predicted = self.net(noised.z_t, noised.t, noised.text, references, kept=noised.kept)
        return diffusion.loss_per_sample(predicted, noised.target), noised.t

    def pipeline(self) -> EZIGenPipeline:
        return self.pipeline_of(
            EZIGenPipeline,
            unet=self.net.unet,
            adapters=self.net.adapters,
            reference_timestep=self.reference_timestep,
        )
