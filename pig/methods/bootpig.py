"""BootPIG (arXiv 2401.13974): train a Reference UNet and the RSA layers of a Base UNet on triplets."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pig import diffusion
from pig.attention import Pooling
from pig.data.images import Job
from pig.data.schema import Batch
from pig.errors import InputError
from pig.methods.base import OptimizerName, PersonalisationModule, Schedule, load_checkpoint
from pig.models.backbone import (
    TOYWORLD,
    WEIGHTS,
    encode_images,
    encode_text,
    encoders_digest,
    inputs_told,
    latent_shape,
    load_backbone,
    sent,
)
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
        compile: the UNets' repeated blocks by `torch.compile`: minutes at the start, for GPUs.
        optimizer, micro_batch: see `PersonalisationModule`.
    """

    alphas_cumprod: Tensor

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
        compile: bool = False,
        optimizer: OptimizerName = "adamw",
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(optimizer, micro_batch)
        for name, value in (("reference_dropout", reference_dropout), ("caption_dropout", caption_dropout)):
            if not 0 <= value <= 1:
                raise InputError(f"model.{name} is a probability, got {value}")
        if reference_timestep is not None and not 0 <= reference_timestep < 1000:
            raise InputError(f"model.reference_timestep must be in [0, 1000), got {reference_timestep}")
        self.save_hyperparameters()
        self.base, backbone = base, load_backbone(base)
        self.vae, self.text_encoder = backbone.vae, backbone.text_encoder
        self.backbone = backbone
        self.register_buffer("alphas_cumprod", backbone.scheduler.alphas_cumprod, persistent=False)
        self._empty_text: Tensor | None = None
        self.net = TwoUNet(
            backbone.unet, copy.deepcopy(backbone.unet), pooling=pooling, reference_key_scale=reference_key_scale
        )
        self.net.train()  # `from_pretrained` leaves modules in eval mode
        if gradient_checkpointing:
            self.net.enable_gradient_checkpointing()
        if compile:
            self.net.compile_blocks()
        self.reference_dropout, self.caption_dropout = reference_dropout, caption_dropout
        self.reference_timestep, self.reference_caption = reference_timestep, reference_caption
        groups = {
            group: {f"net.{name}": parameter for name, parameter in parameters.items()}
            for group, parameters in self.net.trainable_parameters().items()
        }
        self.train_only(groups, {"reference_unet": lr_reference, "rsa": lr_rsa}, schedule)

    @cached_property
    def encoders_digest(self) -> str:
        return encoders_digest(self.backbone)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            _ = self.encoders_digest  # of the weights as loaded, before any is rounded
            data = self.trainer.datamodule
            for encoded in data.encoded() if data else ():
                self._check_encoded(encoded and encoded["base"])
        super().setup(stage)

    def _check_encoded(self, by: str | None) -> None:
        if by not in (None, self.encoders_digest):
            raise InputError(
                f"these shards were encoded by another base model ({by[:12]}) than {self.base!r} "
                f"({self.encoders_digest[:12]}): train on that one, or encode the triplets again"
            )

    def on_train_start(self) -> None:
        super().on_train_start()
        data = self.trainer.train_dataloader.dataset
        rank_zero_info(inputs_told(self.backbone, data.resolution, data.encoded))

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.loss(batch, self.reference_dropout, self.caption_dropout)

    def on_validation_start(self) -> None:
        """Compiled blocks are for training steps: other graphs, other sizes would be compiled for a few passes."""
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        torch.compiler.set_stance("default")

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss on held-out triplets: same noise and timesteps at every validation, nothing dropped."""
        self.log_by_timestep("val", *self._whole_loss(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_by_timestep("test", *self._whole_loss(batch))

    def _whole_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = [self.loss(part, 0.0, 0.0) for part in self.micro_batches(batch)]
        loss, t = (torch.cat(column) for column in zip(*found, strict=True))
        return loss, t

    def predict_step(self, job: Job, batch_idx: int) -> Image.Image:
        """Draw a subject under a prompt, from all its pictures, with the paper's sampling (section 4.1)."""
        generator = torch.Generator().manual_seed(job.seed)
        return self.pipeline()(job.prompt, job.subject.references(), generator=generator).images[0]

    def loss(self, batch: Batch, reference_dropout: float, caption_dropout: float) -> tuple[Tensor, Tensor]:
        """Squared error of each sample, (B,), and its timestep, (B,)."""
        self._check_encoded(batch.encoded_by)
        noise, noise_ref, u = diffusion.draw(
            batch.seeds, latent_shape(self.vae, batch.target), latent_shape(self.vae, batch.reference)
        )
        # Decided on the CPU, so that nothing waits for a GPU. U_phi runs for the kept references, their number rounded
        # up to eighths of the batch: few sizes, so that kernels are chosen seldom. Not 0, so that every process has its
        # gradient, nor 1, for which compiled blocks are compiled again.
        dropped, eighth = u[:, 1] < reference_dropout, max(1, len(u) // 8)
        order, count = dropped.long().argsort(stable=True), int((~dropped).sum())
        kept, read = order[:count], order[: max(2, eighth * -(-count // eighth))]
        noise, noise_ref, u, kept, read = (sent(x, self.device) for x in (noise, noise_ref[read], u, kept, read))
        t = (u[:, 0] * len(self.alphas_cumprod)).long()
        t_ref = t[read] if self.reference_timestep is None else torch.full_like(read, self.reference_timestep)

        z_0, z_ref_0 = self._latents(batch.target, batch.reference[read])
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, t)
        alpha_ref, sigma_ref = (s.unsqueeze(1) for s in diffusion.alpha_sigma(self.alphas_cumprod, t_ref))
        z_t = diffusion.add_noise(z_0, noise, alpha, sigma)
        z_ref_t = diffusion.add_noise(z_ref_0, noise_ref, alpha_ref, sigma_ref)

        dtype = self.net.base_unet.dtype
        text, text_ref, empty = self._text(batch)
        references = self.net.encode_reference(z_ref_t.to(dtype), t_ref, text_ref[read])
        # After U_phi has run: only the Base UNet's caption is emptied.
        text = torch.where((u[:, 2] < caption_dropout).view(-1, 1, 1), empty, text)
        references = {name: f[:count] for name, f in references.items()}
        predicted = self.net(z_t.to(dtype), t, text, references, kept=kept if reference_dropout else None)

        target = diffusion.target(z_0, noise, alpha, sigma, self.backbone.scheduler.config.prediction_type)
        return diffusion.loss_per_sample(predicted, target), t

    def _latents(self, target: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """z_0 and z_ref_0, (B, 4, h, w) and (B', K, 4, h, w), by one pass of the VAE where both come as pixels."""
        pictures = (target, reference.flatten(0, 1))
        if target.shape[1:] == reference.shape[2:]:
            z_0, z_ref_0 = encode_images(self.vae, torch.cat(pictures)).float().split([len(one) for one in pictures])
        else:
            z_0, z_ref_0 = (encode_images(self.vae, one).float() for one in pictures)
        return z_0, z_ref_0.unflatten(0, reference.shape[:2])

    def _text(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of the captions, of what U_phi is told, and of the empty caption; each text is encoded once."""
        told = [reference_prompt(caption, self.reference_caption) for caption in batch.captions]
        if self._empty_text is None or self._empty_text.device != self.device:
            self._empty_text = encode_text(self.backbone, [""])
        known = {} if batch.text is None else dict(zip(batch.captions, batch.text, strict=True))
        if missing := [text for text in dict.fromkeys([*batch.captions, *told]) if text not in known]:
            known.update(zip(missing, encode_text(self.backbone, missing), strict=True))
        text, text_ref = (torch.stack([known[text] for text in texts]) for texts in (batch.captions, told))
        return text, text_ref, self._empty_text

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
