"""The base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from tqdm import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from pig import diffusion
from pig.models.encoders import tokenize
from pig.toyworld import scene
from pig.toyworld.captions import caption_of, classify, facts_of, render
from pig.toyworld.stages.base import Stage, autocast


class UNetStage(Stage):
    """The base model: a UNet2DConditionModel on the VAE's latents, conditioned by CLIP's text tower.

    v-prediction: at this size it gives clean pictures long before epsilon-prediction does.
    """

    steps, cycles, batch_size, lr = 15_000, 2, 32, 1e-3
    ema = 0.999
    caption_dropout = 0.1  # trains the empty prompt, for classifier-free guidance

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 128, 160),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
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

    @torch.no_grad()
    def dataset(self) -> Dataset[Any]:
        subjects = [scene.make_subject(seed) for seed in range(24_000)]
        background = [scene.training_background(s.category, seed) for seed, s in enumerate(subjects)]
        images = render(range(24_000), background, subjects)
        facts = torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)])
        vae = self.frozen["vae"].to(self.device)
        latents = []
        for chunk in tqdm(images.split(64), desc="encoding", mininterval=5):
            with autocast(self.device):
                mean = vae.encode(chunk.to(self.device).float() / 127.5 - 1).latent_dist.mean
            latents.append(mean.float().cpu() * vae.config.scaling_factor)
        return TensorDataset(torch.cat(latents), facts)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        text_encoder = self.frozen["text_encoder"].to(self.device)
        return text_encoder(tokenize(self.tokenizer, texts).to(self.device))[0]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        z_0, facts = batch
        texts = ["" if torch.rand(()) < self.caption_dropout else caption_of(row)[0] for row in facts.tolist()]
        t = torch.randint(0, 1000, (len(z_0),), device=self.device)
        noise = torch.randn_like(z_0)
        alpha, sigma = diffusion.alpha_sigma(self.scheduler.alphas_cumprod, t)
        z_t = diffusion.add_noise(z_0, noise, alpha, sigma)
        predicted = self.unet(z_t, t, self.encode(texts)).sample
        loss = diffusion.loss_per_sample(predicted, diffusion.target(z_0, noise, alpha, sigma, "v_prediction")).mean()
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

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
        clip = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32)
        subjects = [scene.make_subject(scene.HELD_OUT_SEED + i) for i in range(500)]
        background = [scene.held_out_background(subject.category) for subject in subjects]
        facts = torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)])
        prompts = [
            scene.caption(scene.object_phrase(s, with_colour=i % 5 == 0), b)
            for i, (s, b) in enumerate(zip(subjects, background, strict=True))
        ]
        base.set_progress_bar_config(disable=True)
        images = []
        for start in tqdm(range(0, len(prompts), 20), desc="sampling", mininterval=5):
            drawn = base(
                prompts[start : start + 20],
                num_inference_steps=20,
                guidance_scale=3.0,
                generator=[torch.Generator().manual_seed(start + i) for i in range(20)],
                output_type="np",
            ).images
            images.append(torch.from_numpy(drawn * 255).round().byte().permute(0, 3, 1, 2))
        found = classify(clip, self.tokenizer, torch.cat(images))
        category, place = (found == facts[:, :2]).float().mean(0).tolist()
        print(f"unet: 500 held-out captions, CLIP finds the category in {category:.1%}, background in {place:.1%}")
        base.vae.register_to_config(_name_or_path="")  # else the path of this machine
        base.to(dtype=torch.float16).save_pretrained(out / "base")
