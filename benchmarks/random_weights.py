"""Stable Diffusion's architecture with random weights: for speed and memory, which weights do not change."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pig.costs import SD21_VAE
from pig.models.names import WEIGHTS

# Stable Diffusion 2.1-base's configuration (its unet/, vae/ and text_encoder/config.json), and the same in miniature.
SD21: dict[str, Any] = {
    "unet": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20)},
    "vae": {**SD21_VAE, "sample_size": 512},
    "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
}
TINY: dict[str, Any] = {
    # Groups of several channels: of one alone, at 1x1, GroupNorm would divide by nothing but its epsilon.
    "unet": {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": (1, 1, 2, 2), "norm_num_groups": 8},
    "vae": {"block_out_channels": (32,) * 4, "layers_per_block": 1, "sample_size": 64, "norm_num_groups": 8},
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def random_networks(config: dict[str, Any], words: int) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """UNet, VAE and text encoder."""
    unet = UNet2DConditionModel(
        sample_size=config["vae"]["sample_size"] // 8,
        cross_attention_dim=config["text"]["hidden_size"],
        use_linear_projection=True,
        **config["unet"],
    )
    four = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**{**four, **config["vae"]})
    tokens = {"vocab_size": words, "bos_token_id": None, "eos_token_id": words - 1}
    return unet, vae, CLIPTextModel(CLIPTextConfig(**config["text"], **tokens, hidden_act="gelu"))


def random_base(size: Literal["sd21", "tiny"]) -> StableDiffusionPipeline:
    """All parts, ready for `save_pretrained`. The words are the toy world's, padded to Stable Diffusion's 77."""
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "base/tokenizer", model_max_length=77)
    torch.manual_seed(0)
    unet, vae, text = random_networks(SD21 if size == "sd21" else TINY, len(tokenizer))
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = UniPCMultistepScheduler(prediction_type="epsilon")
    return StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, **parts)
