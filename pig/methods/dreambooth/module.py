"""DreamBooth (arXiv 2208.12242): tune a base model on the pictures of one subject, under a word that stands for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pig import diffusion
from pig.attention.maps import Maps, distance, recording
from pig.data.schema import Batch
from pig.errors import check_ranges
from pig.methods.dreambooth.network import DreamBoothNet
from pig.methods.dreambooth.pipeline import DreamBoothPipeline, DreamBoothSettings
from pig.models.backbone import sent
from pig.models.encoders import tokenize
from pig.models.identifier import identifier_token, is_common, with_identifier
from pig.models.lora import Lora
from pig.training.optimizers import OptimizerName, Schedule
from pig.training.triplets import noised_targets
from pig.training.tuned import TunedModule


class DreamBooth(TunedModule):
    """The denoising loss on the subject under "a photo of a sks dog", and on its class under "a photo of a dog".

    L = L_subject + prior_weight L_class (section 3.2). Nothing is dropped: the branch without text is the base model's
    in the beginning, and drifts with it, as in the authors' and diffusers' recipes.

    Args:
        base: see `PersonalisationModule`.
        identifier: one rare token of the vocabulary (section 3.1).
        lr: of the UNet, or of the LoRA in it.
        lr_text_encoder: at rate 0 it is frozen.
        prior_weight: lambda of the paper, where the data has class pictures (`data.prior`).
        lora: in the UNet; null: the whole UNet is tuned.
        attention_regularisation: weight of the squared distance between the word maps of the tuned and the base model,
            on the same noised picture of the subject. (DreamBlend, arXiv 2411.19390, leaves open which maps and words:
            here all of them.) It takes a second UNet in memory.
        schedule: of the learning rates: `constant`, or `cosine` to 0 at the end of the run.
        text_guidance: what the pipeline takes where none is named.
        gradient_checkpointing: less memory for about a third more time; same gradients.
        compile: the UNet's repeated blocks by `torch.compile`: minutes at the start, for GPUs.
        optimizer, micro_batch: see `PersonalisationModule`.
        save_at, save_half: see `TunedModule`.
    """

    method = "dreambooth"
    net: DreamBoothNet

    def __init__(
        self,
        base: str,
        *,
        identifier: str = DreamBoothSettings.identifier,
        lr: float = 5e-6,
        lr_text_encoder: float = 0.0,
        prior_weight: float = 1.0,
        lora: Lora | None = None,
        attention_regularisation: float = 0.0,
        schedule: Schedule = "constant",
        text_guidance: float = DreamBoothSettings.text_guidance,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        optimizer: OptimizerName = "adamw",
        micro_batch: int | None = None,
        save_at: Sequence[int] = (),
        save_half: bool = False,
    ) -> None:
        rates = {"lr": (lr, 0.0, 1.0), "lr_text_encoder": (lr_text_encoder, 0.0, 1.0)}
        check_ranges(**{f"model.{name}": limits for name, limits in rates.items()})
        weights = {"prior_weight": prior_weight, "attention_regularisation": attention_regularisation}
        check_ranges(**{f"model.{name}": (weight, 0, 1000) for name, weight in weights.items()})
        self.own_settings = {"identifier": identifier, "text_guidance": text_guidance}
        DreamBoothSettings.given(self.own_settings, {})
        super().__init__(base, optimizer, micro_batch, save_at=save_at, save_half=save_half)
        self.save_hyperparameters()
        if isinstance(lora, dict):  # as a checkpoint has it, which is read without running code
            lora = Lora(**lora)
        self.hparams.update(lora=lora and lora.as_json(), save_at=list(save_at))
        identifier_token(self.backbone.tokenizer, identifier)
        if is_common(self.backbone.tokenizer, identifier):
            warnings.warn(
                f"the identifier {identifier!r} is a common word, whose meaning will mix with the subject's: take a "
                "rare one, such as 'sks'",
                stacklevel=2,
            )
        self.identifier, self.prior_weight = identifier, prior_weight
        self.attention_regularisation = attention_regularisation
        self.base_unet = copy.deepcopy(self.backbone.unet) if attention_regularisation else None
        self.net = DreamBoothNet(self.backbone.unet, lora, self.text_encoder if lr_text_encoder else None)
        self.arrange(gradient_checkpointing=gradient_checkpointing, compile=compile)
        self.train_only({"unet": lr, "text_encoder": lr_text_encoder}, schedule)

    def losses(self, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        """Loss of each picture, (B,), whose mean is L, and its timestep, (B,)."""
        noised = noised_targets(self, batch, uniforms=0, z_0=self.latents_of(batch))
        of_class = batch.of_class or [False] * len(batch.keys)
        texts = [
            caption if prior else with_identifier(caption, noun, self.identifier)
            for caption, noun, prior in zip(batch.captions, batch.objects, of_class, strict=True)
        ]
        given = (noised.z_t.to(self.net.unet.dtype), noised.t, self._encode(texts))
        with recording(self.net.unet, len(texts), None if self.base_unet else ()) as maps:
            predicted = self.net(*given)
        loss = diffusion.loss_per_sample(predicted, noised.target)
        if self.base_unet is not None:
            loss = loss + self.attention_regularisation * self._from_base(self.base_unet, maps, given, of_class)
        if batch.of_class is not None:  # a step's mean runs over both halves
            loss = loss * loss.new_tensor([2 * self.prior_weight if prior else 2.0 for prior in of_class])
        return loss, noised.t

    def _from_base(
        self, base_unet: UNet2DConditionModel, maps: Maps, given: tuple[Tensor, ...], of_class: list[bool]
    ) -> Tensor:
        """The distance of the word maps from the base model's, (B,); 0 for class pictures."""
        latents, timesteps, text = given
        with torch.no_grad(), recording(base_unet, len(text)) as wanted:
            base_unet(latents, timesteps, text)
        words = ~torch.tensor(of_class, device=text.device)[:, None].expand(text.shape[:2])
        return distance(maps, wanted, words, mean=True)

    def _encode(self, texts: list[str]) -> Tensor:
        if self.net.text_encoder is None:
            return self.encode_once(texts)
        return self.net.text_encoder(sent(tokenize(self.backbone.tokenizer, texts), self.device))[0]

    def pipeline(self) -> DreamBoothPipeline:
        lora = self.net.lora
        return self.pipeline_of(
            DreamBoothPipeline,
            unet=self.net.unet,
            lora=lora and lora.as_json(),
            tuned_text_encoder=self.net.text_encoder is not None,
        )
