"""The base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from tqdm import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from pig import diffusion
from pig.files import replacing
from pig.models.backbone import encode_images
from pig.models.encoders import tokenize
from pig.toyworld import scene
from pig.toyworld.captions import (
    SIZE,
    Scene,
    accessory_of,
    agreement,
    caption_of,
    classify,
    facts_of,
    held_out_scenes,
    pictures_of,
    plain_caption,
    training_scene,
)
from pig.toyworld.stages.base import Stage, autocast


class UNetStage(Stage):
    """The base model: a UNet2DConditionModel on the VAE's latents, conditioned by CLIP's text tower.

    v-prediction: at this size it gives clean pictures long before epsilon-prediction does. The rate is constant until
    the last fifth, then falls to zero (arXiv 2405.18392): a run may be made longer as long as it has not begun to fall.

    Args:
        base: the folder of the base model's other parts.
        work: where the latents are kept, so that a resumed run need not draw and encode again.
    """

    steps, batch_size, lr = 16_000, 32, 6e-4
    decay_share = 0.2
    ema = 0.9995
    caption_dropout = 0.1  # trains the empty prompt, for classifier-free guidance
    scenes, held_out = 48_000, 512
    emphasis = 2.0, 8.0  # what errors on the object, and on what it wears, count for above those elsewhere
    dressed = 2.5  # how many times as often as others pictures with an accessory are drawn: they are learnt last

    def __init__(self, base: Path, work: Path) -> None:
        super().__init__()
        self.cache = work / "unet_latents.safetensors"
        self.unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 128, 160),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=128,
            attention_head_dim=4,  # diffusers' name for the number of heads
        )
        # Twice as fast as scaled_dot_product_attention in bf16 training on CPUs.
        self.unet.set_attn_processor(AttnProcessor())
        self.unet.compile()  # a fifth faster on CPUs, for two minutes at the start
        self.scheduler = UniPCMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
        )
        self.tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32)
        vae = AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32)
        self.frozen = {"text_encoder": text_encoder, "vae": vae}  # a dict: not part of the module

    def rate(self, step: int) -> float:
        left = (self.steps - step) / (self.decay_share * self.steps)
        return min(1.0, (step + 1) / 500, max(left, 0.0))

    @torch.no_grad()
    def encoded(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        """`latents` (N, 4, 16, 16), scaled; `weights` (N, 1, 16, 16), see `emphasis`; `facts` (N, 4), of which captions
        are made."""
        vae, latents, weights = self.frozen["vae"].to(self.device), [], []
        emphasis = torch.tensor(self.emphasis).view(2, 1, 1)
        for start in tqdm(range(0, len(scenes), 256), desc="drawing and encoding", mininterval=5):
            drawings = [one.draw() for one in scenes[start : start + 256]]
            images = pictures_of(drawings)
            with autocast(self.device):
                latents.append(encode_images(vae, images.to(self.device).float() / 127.5 - 1).float().cpu())
            masks = torch.stack([torch.tensor(np.stack([one.mask, one.worn])) for one in drawings]).float() / 255
            shares = F.avg_pool2d(masks, SIZE // latents[0].shape[-1])
            weights.append(1 + (emphasis * shares).sum(1, keepdim=True))
        return {"latents": torch.cat(latents), "weights": torch.cat(weights), "facts": facts_of(scenes)}

    def dataset(self) -> TensorDataset:
        if not self.cache.exists():
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            made = self.encoded([training_scene(seed) for seed in range(self.scenes)])
            with replacing(self.cache) as aside:
                save_file({**made, "latents": made["latents"].half(), "weights": made["weights"].half()}, aside)
        kept = load_file(self.cache)
        return TensorDataset(kept["latents"].float(), kept["weights"].float(), kept["facts"])

    def train_dataloader(self) -> DataLoader[Any]:
        data = self.dataset()
        often = torch.where(data.tensors[2][:, 3] > 0, self.dressed, 1.0)
        sampler = WeightedRandomSampler(often.tolist(), len(often))
        return DataLoader(data, self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        made = self.encoded(held_out_scenes(self.held_out))
        data = TensorDataset(made["latents"], made["facts"], torch.arange(self.held_out))
        return DataLoader(data, self.batch_size)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        text_encoder = self.frozen["text_encoder"].to(self.device)
        return text_encoder(tokenize(self.tokenizer, texts).to(self.device))[0]

    def losses(
        self, z_0: Tensor, noise: Tensor, t: Tensor, texts: Sequence[str], weights: Tensor | None = None
    ) -> Tensor:
        """(B,). `weights` (B, 1, H, W) count as far as z_t shows the picture: under noise, where nobody can tell where
        an object will be, they would make objects too large."""
        alpha, sigma = diffusion.alpha_sigma(self.scheduler.alphas_cumprod, t)
        z_t = diffusion.add_noise(z_0, noise, alpha, sigma)
        predicted = self.unet(z_t, t, self.encode(texts)).sample
        wanted = diffusion.target(z_0, noise, alpha, sigma, "v_prediction")
        if weights is not None:
            root = ((1 + alpha**2 * (weights - 1)) / weights.mean()).sqrt()
            predicted, wanted = root * predicted.float(), root * wanted
        return diffusion.loss_per_sample(predicted, wanted)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        z_0, weights, facts = batch
        texts = ["" if torch.rand(()) < self.caption_dropout else caption_of(row)[0] for row in facts.tolist()]
        t = torch.randint(0, 1000, (len(z_0),), device=self.device)
        loss = self.losses(z_0, torch.randn_like(z_0), t, texts, weights).mean()
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_start(self) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        torch.compiler.set_stance("default")

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """The error of v on held-out combinations, every timestep counting the same; the same noise each time."""
        z_0, facts, numbers = batch
        texts = [plain_caption(row) for row in facts.tolist()]
        noise, u = diffusion.draw(numbers, z_0.shape, uniforms=1)
        t = (u[:, 0] * 1000).long()
        losses = self.losses(z_0, noise.to(z_0), t.to(z_0.device), texts)
        self.log("val_loss", losses.mean(), prog_bar=True, batch_size=len(z_0))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            error = float(self.trainer.callback_metrics["val_loss"])
            print(f"step {self.global_step}: held-out error {error:.4f}", flush=True)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # other shapes than in training: compiling again would not pay
    def save(self, out: Path) -> None:
        self.unet.set_default_attn_processor()
        base = StableDiffusionPipeline(
            vae=self.frozen["vae"].cpu(),
            text_encoder=self.frozen["text_encoder"].cpu(),
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        report_base(base, CLIPModel.from_pretrained(out / "clip", dtype=torch.float32))
        base.vae.register_to_config(_name_or_path="")  # else the path of this machine
        base.to(dtype=torch.float16).save_pretrained(out / "base")


def report_base(base: StableDiffusionPipeline, clip: CLIPModel, count: int = 500) -> Tensor:
    """What CLIP finds in `count` pictures for held-out captions, every other one with its held-out accessory.

    Returns:
        The pictures, (count, 3, SIZE, SIZE) uint8.
    """
    scenes = held_out_scenes(count)
    prompts = [
        scene.caption(scene.object_phrase(one.subject, with_colour=i % 5 == 0), one.background, one.worn)
        for i, one in enumerate(scenes)
    ]
    base.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, count, 20), desc="sampling", mininterval=5):
        drawn = base(
            prompts[start : start + 20],
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(prompts[start : start + 20]))],
            output_type="np",
        ).images
        images.append(torch.from_numpy(drawn * 255).round().byte().permute(0, 3, 1, 2))
    pictures, facts = torch.cat(images), facts_of(scenes)
    seen = classify(clip, base.tokenizer, pictures)
    found, dressed = agreement(seen, facts), facts[:, 3] > 0
    accessory = (seen.accessory() == accessory_of(facts[:, 3]))[dressed].float().mean().item()
    print(
        f"unet: {count} held-out captions, CLIP finds the category in {found['category']:.1%}, the background in "
        f"{found['background']:.1%}, the accessory in {accessory:.1%} of {int(dressed.sum())} (its colour in "
        f"{found['accessory colour']:.1%})"
    )
    return pictures
