"""IP-Adapter (arXiv 2308.06721): train the image prompt of a frozen UNet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pig import diffusion
from pig.data.schema import Batch
from pig.errors import InputError, check_ranges
from pig.methods.ip_adapter.network import ImagePrompt, IPAdapterNet
from pig.methods.ip_adapter.pipeline import VISION, IPAdapterPipeline, IPAdapterSettings
from pig.models.vision import load_vision, look, pictures_of, vision_for
from pig.models.weights import copy_weights, read_weights
from pig.training.module import PersonalisationModule
from pig.training.optimizers import OptimizerName, Schedule
from pig.training.triplets import noised_targets


class IPAdapter(PersonalisationModule):
    """The denoising loss; text, image, or both are dropped, for classifier-free guidance (section 4.1.2).

    Args:
        base: see `PersonalisationModule`.
        image_encoder: a CLIP's image tower: a folder, a hub id, or `toyworld`; by default laion's ViT-H/14.
        weights: an `ip-adapter.safetensors` to go on from, such as a released one.
        lr: learning rate.
        schedule: of the learning rate: `constant`, or `cosine` to 0 at the end of the run.
        text_dropout, image_dropout, both_dropout: probabilities that a sample's caption, references, or both are left
            out.
        text_guidance, scale: what the pipeline takes where none is named.
        gradient_checkpointing: less memory for about a third more time; same gradients.
        compile: the UNet's repeated blocks by `torch.compile`: minutes at the start, for GPUs.
        optimizer, micro_batch: see `PersonalisationModule`.
    """

    method = "ip_adapter"
    net: IPAdapterNet

    def __init__(
        self,
        base: str,
        *,
        image_encoder: str | None = None,
        weights: Path | None = None,
        lr: float = 1e-4,
        schedule: Schedule = "constant",
        text_dropout: float = 0.05,
        image_dropout: float = 0.05,
        both_dropout: float = 0.05,
        text_guidance: float = IPAdapterSettings.text_guidance,
        scale: float = IPAdapterSettings.scale,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        optimizer: OptimizerName = "adamw",
        micro_batch: int | None = None,
    ) -> None:
        self.dropouts = (text_dropout, image_dropout, both_dropout)
        for name, value in zip(("text_dropout", "image_dropout", "both_dropout"), self.dropouts, strict=True):
            check_ranges(**{f"model.{name}": (value, 0, 1)})
        if sum(self.dropouts) > 1:
            raise InputError(f"the three dropouts of the model add up to {sum(self.dropouts)}, more than 1")
        self.own_settings = {"text_guidance": text_guidance, "scale": scale}
        IPAdapterSettings.given(self.own_settings, {})  # a mistake is said now, not at the first validation
        super().__init__(base, optimizer, micro_batch)
        self.save_hyperparameters(ignore=["weights"])  # a checkpoint holds what has become of them
        self.image_encoder = vision_for(base, image_encoder, VISION)
        self.vision, self.vision_digest = load_vision(self.image_encoder)
        prompt = ImagePrompt.of(self.backbone.unet, self.vision.config.projection_dim)
        if weights is not None:
            own = dict(prompt.named_parameters())
            copy_weights(read_weights(weights), own, weights, "It is of another base model or image encoder")
        self.net = IPAdapterNet(self.backbone.unet, prompt)
        self.arrange(gradient_checkpointing=gradient_checkpointing, compile=compile)
        self.train_only({"prompt": lr}, schedule)

    def losses(self, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        """Squared error of each sample, (B,), and its timestep, (B,)."""
        self.check_encoded(batch.encoded_by)
        noised = noised_targets(self, batch, uniforms=1)
        pictures = pictures_of(batch)
        with torch.no_grad():
            embeds = look(self.vision, pictures.flatten(0, 1))[0].unflatten(0, pictures.shape[:2])
        text, empty = self.encode_captions(batch)
        u = noised.u[:, 0]
        if training:
            only_text, only_image, both = self.dropouts
            no_text = (u < only_text) | (u >= 1 - both)
            no_image = ((u >= only_text) & (u < only_text + only_image)) | (u >= 1 - both)
            text = torch.where(no_text.view(-1, 1, 1), empty, text)
            embeds = embeds.masked_fill(no_image.view(-1, 1, 1), 0.0)
        predicted = self.net(noised.z_t.to(self.net.unet.dtype), noised.t, text, embeds)
        return diffusion.loss_per_sample(predicted, noised.target), noised.t

    def pipeline(self) -> IPAdapterPipeline:
        return self.pipeline_of(
            IPAdapterPipeline,
            unet=self.net.unet,
            image_encoder=self.vision,
            prompt=self.net.prompt,
            vision=self.image_encoder,
            vision_digest=self.vision_digest,
        )
