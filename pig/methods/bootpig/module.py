"""BootPIG (arXiv 2401.13974): train a Reference UNet and the RSA layers of a Base UNet on triplets."""

from __future__ import annotations

import copy

from torch import Tensor

from pig import diffusion
from pig.attention.reference import Pooling
from pig.data.schema import Batch
from pig.errors import InputError
from pig.methods.bootpig.network import TwoUNet
from pig.methods.bootpig.pipeline import BootPIGPipeline, BootPIGSettings, ReferenceCaption, reference_prompt
from pig.training.module import PersonalisationModule
from pig.training.optimizers import OptimizerName, Schedule
from pig.training.triplets import noised_triplets


class BootPIG(PersonalisationModule):
    """Algorithm 1 of the paper.

    Args:
        base: see `PersonalisationModule`.
        lr_reference, lr_rsa: learning rates of the Reference UNet and of the base's RSA layers (section 4.1); 0
            freezes the group (the ablations of Table 2).
        schedule: of the learning rates: `constant` (paper), or `cosine` (20 steps of warm-up, then down to 0).
        reference_dropout: probability that a sample's references are left out (section 3.3).
        caption_dropout: probability that a sample's caption is emptied, for the Base UNet only (section 3.3).
        reference_timestep: fixed t of the references; None takes the target's t (paper).
        reference_caption: see `reference_prompt`.
        pooling, reference_key_scale: see `TwoUNet`.
        image_guidance, text_guidance: what the pipeline takes where none is named (section 4.1).
        gradient_checkpointing: less memory for about a third more time; same gradients.
        compile: the UNets' repeated blocks by `torch.compile`: minutes at the start, for GPUs.
        optimizer, micro_batch: see `PersonalisationModule`.
    """

    method = "bootpig"
    net: TwoUNet

    def __init__(
        self,
        base: str,
        *,
        lr_reference: float = 5e-6,
        lr_rsa: float = 1e-6,
        schedule: Schedule = "constant",
        reference_dropout: float = 0.15,
        caption_dropout: float = 0.15,
        reference_timestep: int | None = None,
        reference_caption: ReferenceCaption = BootPIGSettings.reference_caption,
        pooling: Pooling = BootPIGSettings.pooling,
        reference_key_scale: float = 1.0,
        image_guidance: float = BootPIGSettings.image_guidance,
        text_guidance: float = BootPIGSettings.text_guidance,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        optimizer: OptimizerName = "adamw",
        micro_batch: int | None = None,
    ) -> None:
        for name, value in (("reference_dropout", reference_dropout), ("caption_dropout", caption_dropout)):
            if not 0 <= value <= 1:
                raise InputError(f"model.{name} is a probability, got {value}")
        self.own_settings = {
            "image_guidance": image_guidance,
            "text_guidance": text_guidance,
            "pooling": pooling,
            "reference_caption": reference_caption,
        }
        BootPIGSettings.given(self.own_settings, {})  # a mistake is said now, not at the first validation
        super().__init__(base, optimizer, micro_batch)
        if reference_timestep is not None and not 0 <= reference_timestep < self.train_timesteps:
            raise InputError(
                f"model.reference_timestep must be in [0, {self.train_timesteps}), got {reference_timestep}"
            )
        self.save_hyperparameters()
        self.net = TwoUNet(
            self.backbone.unet,
            copy.deepcopy(self.backbone.unet),
            pooling=pooling,
            reference_key_scale=reference_key_scale,
        )
        self.arrange(gradient_checkpointing=gradient_checkpointing, compile=compile)
        self.dropout = {"reference": reference_dropout, "caption": caption_dropout}
        self.reference_timestep, self.reference_caption = reference_timestep, reference_caption
        self.train_only({"reference_unet": lr_reference, "rsa": lr_rsa}, schedule)

    def losses(self, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        """Squared error of each sample, (B,), and its timestep, (B,)."""
        self.check_encoded(batch.encoded_by)
        drops = self.dropout if training else dict.fromkeys(self.dropout, 0.0)
        noised = noised_triplets(
            self,
            batch,
            [reference_prompt(caption, self.reference_caption) for caption in batch.captions],
            reference_dropout=drops["reference"],
            caption_dropout=drops["caption"],  # of the Base UNet only: U_phi is told the whole caption
            reference_timestep=self.reference_timestep,
            dtype=self.net.base_unet.dtype,
        )
        references = self.net.encode_reference(noised.z_ref_t, noised.t_ref, noised.text_ref)
        references = {name: f[: noised.count] for name, f in references.items()}
        predicted = self.net(noised.z_t, noised.t, noised.text, references, kept=noised.kept)
        return diffusion.loss_per_sample(predicted, noised.target), noised.t

    def pipeline(self) -> BootPIGPipeline:
        return self.pipeline_of(
            BootPIGPipeline,
            base_unet=self.net.base_unet,
            reference_unet=self.net.reference_unet,
            reference_key_scale=self.hparams["reference_key_scale"],
            reference_timestep=self.reference_timestep,
        )
