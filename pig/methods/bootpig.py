"""BootPIG (arXiv 2401.13974): train a Reference UNet and the RSA layers of a Base UNet on triplets."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pig import diffusion
from pig.attention import Pooling
from pig.data.images import Job
from pig.data.schema import Batch
from pig.errors import InputError
from pig.methods.base import PersonalisationModule, Schedule, load_checkpoint
from pig.models.backbone import TOYWORLD, WEIGHTS, encode_images, encode_text, load_backbone
from pig.models.two_unet import TwoUNet
from pig.pipelines.bootpig import BootPIGPipeline, ReferenceCaption, reference_prompt

EMBEDDED = WEIGHTS / "bootpig/trainable.safetensors"


class BootPIG(PersonalisationModule):
    """Algorithm 1 of the paper.

    Args:
        base: the Stable Diffusion 1.x / 2.x checkpoint: a folder, a hub id, or `toyworld`.
        lr_reference, lr_rsa: learning rates of the Reference UNet and of the base's RSA layers (section 4.1); 0
            freezes the group (the ablations of Table 2).
        schedule: of the learning rates: `constant` (paper), or `cosine` to 0 at the end of the run.
        reference_dropout: probability that a sample's references are left out (section 3.3).
        caption_dropout: probability that a sample's caption is emptied, for the Base UNet only (section 3.3).
        reference_timestep: fixed t of the references; None takes the target's t (paper).
        reference_caption: see `reference_prompt`.
        pooling, reference_key_scale: see `TwoUNet`.
        image_guidance, text_guidance: what the pipeline takes where none is named (section 4.1).
        gradient_checkpointing: less memory for about a third more time; same gradients.
    """

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
        reference_caption: ReferenceCaption = "caption",
        pooling: Pooling = "softmax",
        reference_key_scale: float = 1.0,
        image_guidance: float = 5.0,
        text_guidance: float = 7.5,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("reference_dropout", reference_dropout), ("caption_dropout", caption_dropout)):
            if not 0 <= value <= 1:
                raise InputError(f"model.{name} is a probability, got {value}")
        if reference_timestep is not None and not 0 <= reference_timestep < 1000:
            raise InputError(f"model.reference_timestep must be in [0, 1000), got {reference_timestep}")
        self.save_hyperparameters()
        backbone = load_backbone(base)
        self.vae, self.text_encoder = backbone.vae, backbone.text_encoder
        self.backbone = backbone
        self.net = TwoUNet(
            backbone.unet, copy.deepcopy(backbone.unet), pooling=pooling, reference_key_scale=reference_key_scale
        )
        self.net.train()  # `from_pretrained` leaves modules in eval mode
        if gradient_checkpointing:
            self.net.enable_gradient_checkpointing()
        self.reference_dropout, self.caption_dropout = reference_dropout, caption_dropout
        self.reference_timestep, self.reference_caption = reference_timestep, reference_caption
        groups = {
            group: {f"net.{name}": parameter for name, parameter in parameters.items()}
            for group, parameters in self.net.trainable_parameters().items()
        }
        self.train_only(groups, {"reference_unet": lr_reference, "rsa": lr_rsa}, schedule)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.training_loss(batch, *self.loss(batch, self.reference_dropout, self.caption_dropout))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss on held-out triplets: same noise and timesteps at every validation, nothing dropped."""
        self.log_by_timestep("val", *self.loss(batch, 0.0, 0.0))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_by_timestep("test", *self.loss(batch, 0.0, 0.0))

    def predict_step(self, job: Job, batch_idx: int) -> Image.Image:
        """Draw a subject under a prompt, from all its pictures, with the paper's sampling (section 4.1)."""
        generator = torch.Generator().manual_seed(job.seed)
        return self.pipeline()(job.prompt, job.subject.references(), generator=generator).images[0]

    def loss(self, batch: Batch, reference_dropout: float, caption_dropout: float) -> tuple[Tensor, Tensor]:
        """Squared error of each sample, (B,), and its timestep, (B,)."""
        z_0 = encode_images(self.vae, batch.target).float()
        z_ref_0 = self._encode_references(batch.reference).float()
        noise, noise_ref, u = diffusion.draw(batch.seeds, z_0.shape, z_ref_0.shape)
        noise, noise_ref, u = (drawn.to(self.device) for drawn in (noise, noise_ref, u))
        alphas_cumprod = self.backbone.scheduler.alphas_cumprod
        t = (u[:, 0] * len(alphas_cumprod)).long()
        reference_dropped, caption_dropped = u[:, 1] < reference_dropout, u[:, 2] < caption_dropout

        alpha, sigma = diffusion.alpha_sigma(alphas_cumprod, t)
        z_t = diffusion.add_noise(z_0, noise, alpha, sigma)
        t_ref = t if self.reference_timestep is None else torch.full_like(t, self.reference_timestep)
        alpha_ref, sigma_ref = (s.unsqueeze(1) for s in diffusion.alpha_sigma(alphas_cumprod, t_ref))
        z_ref_t = diffusion.add_noise(z_ref_0, noise_ref, alpha_ref, sigma_ref)

        dtype = self.net.base_unet.dtype
        text = encode_text(self.backbone, batch.captions)
        told = [reference_prompt(caption, self.reference_caption) for caption in batch.captions]
        references = self.net.encode_reference(z_ref_t.to(dtype), t_ref, encode_text(self.backbone, told))
        # After U_phi has run: only the Base UNet's caption is emptied.
        text = torch.where(caption_dropped.view(-1, 1, 1), encode_text(self.backbone, [""]), text)
        predicted = self.net(z_t.to(dtype), t, text, references, dropped=reference_dropped)

        target = diffusion.target(z_0, noise, alpha, sigma, self.backbone.scheduler.config.prediction_type)
        return diffusion.loss_per_sample(predicted, target), t

    def _encode_references(self, references: Tensor) -> Tensor:
        """(B, K, 3, H, W) in [-1, 1] -> (B, K, 4, h, w)."""
        return encode_images(self.vae, references.flatten(0, 1)).unflatten(0, references.shape[:2])

    @classmethod
    def from_checkpoint(cls, checkpoint: Path) -> BootPIG:
        """The module of a checkpoint of `fit`, with its EMA weights if it has any."""
        state = load_checkpoint(checkpoint)
        method = state.get("pig_method")
        if method != cls.__name__:
            raise InputError(f"{checkpoint} is no checkpoint of {cls.__name__}: its method is {method}")
        # Names with an underscore are LightningCLI's own.
        module = cls(**{key: value for key, value in state["hyper_parameters"].items() if not key.startswith("_")})
        averages = [saved["average"] for saved in state.get("callbacks", {}).values() if "average" in saved]
        module.load_state_dict(averages[0] if averages else state["state_dict"])
        return module

    @classmethod
    def embedded(cls) -> BootPIG:
        """The model that ships with the package, trained on the toy world."""
        module = cls(TOYWORLD, text_guidance=1.5)
        module.load_state_dict(load_file(EMBEDDED))
        return module

    def pipeline(self) -> BootPIGPipeline:
        pipeline = BootPIGPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.backbone.tokenizer,
            base_unet=self.net.base_unet,
            reference_unet=self.net.reference_unet,
            scheduler=copy.deepcopy(self.backbone.scheduler),
            pooling=self.hparams["pooling"],
            reference_key_scale=self.hparams["reference_key_scale"],
            reference_timestep=self.reference_timestep,
            reference_caption=self.reference_caption,
            image_guidance=self.hparams["image_guidance"],
            text_guidance=self.hparams["text_guidance"],
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
