"""What DreamBooth tunes of a base model: the whole UNet or a LoRA in it, and the text encoder if that is wanted."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from pig.errors import InputError
from pig.models.lora import Lora, add_lora, lora_parameters


class DreamBoothNet(nn.Module):
    """
    Args:
        unet: gets the LoRA, if there is to be one.
        lora: None: the whole UNet is tuned.
        text_encoder: to be tuned, too; None: it stays frozen.
    """

    def __init__(self, unet: UNet2DConditionModel, lora: Lora | None, text_encoder: CLIPTextModel | None) -> None:
        super().__init__()
        if lora is not None and text_encoder is not None:
            raise InputError("lr_text_encoder: with a LoRA in the UNet the text encoder stays frozen (set it to 0)")
        self.unet, self.lora = unet, lora
        if lora is not None:
            add_lora(unet, lora)
        self.text_encoder = text_encoder

    def trainable_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Group `unet`, and `text_encoder` where that is tuned, by the names in this module."""
        tuned = lora_parameters(self.unet) if self.lora else dict(self.unet.named_parameters())
        groups = {"unet": {f"unet.{name}": one for name, one in tuned.items()}}
        if self.text_encoder is not None:
            groups["text_encoder"] = {f"text_encoder.{name}": one for name, one in self.text_encoder.named_parameters()}
        return groups

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The prediction, (B, 4, h, w), for latents of this shape, timesteps (B,) and text (B, L, D)."""
        return self.unet(latents, timesteps, text).sample
