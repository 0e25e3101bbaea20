"""Algorithm 1 of BootPIG (arXiv 2401.13974) written plainly with diffusers: what ours is compared with.

It encodes the caption once for each UNet, runs the Reference UNet to its end, gives samples whose references are
dropped a Base pass of their own, and reads the loss at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from pig.data.schema import Batch
from pig.diffusion import draw
from pig.methods.bootpig import TwoUNet
from pig.models.backbone import load_backbone
from pig.models.encoders import tokenize

RATES = {"reference_unet": 5e-4, "rsa": 5e-4}  # of configs/bootpig/toyworld.yaml


class Naive(nn.Module):
    """Diffusers' own UNets and scheduler, by hooks; one reference for each sample."""

    def __init__(self, base: str) -> None:
        super().__init__()
        parts = load_backbone(base)
        self.vae, self.text_encoder, self.tokenizer = parts.vae, parts.text_encoder, parts.tokenizer
        self.scheduler = DDPMScheduler.from_config(parts.scheduler.config)
        self.base_unet, self.reference_unet = parts.unet.train(), copy.deepcopy(parts.unet).train()
        # What is trained is the same as ours; its names are those of a TwoUNet.
        with torch.device("meta"):
            blank = UNet2DConditionModel.from_config(parts.unet.config)
            names = TwoUNet(blank, copy.deepcopy(blank)).trainable_parameters()
        self.requires_grad_(False)
        own = dict(self.named_parameters())
        self.groups = {group: {name: own[name] for name in of} for group, of in names.items()}
        for parameters in self.groups.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self.features: dict[str, Tensor] | None = None
        self.collected: dict[str, Tensor] = {}
        for name, layer in self.reference_unet.named_modules():
            if name.endswith("attn1"):
                layer.register_forward_pre_hook(lambda _, args, name=name: self.collected.update({name: args[0]}))
        for name, layer in self.base_unet.named_modules():
            if name.endswith("attn1"):
                layer.register_forward_hook(self._rsa(name))

    def _rsa(self, name: str) -> Callable[..., Tensor | None]:
        """Eq. 2: keys and values of the image's and the reference's features together."""

        def hook(attn: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self.features is None:
                return None
            f, both = args[0], torch.cat([args[0], self.features[name]], 1)
            q, k, v = (
                x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for x in (attn.to_q(f), attn.to_k(both), attn.to_v(both))
            )
            return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        return hook

    @torch.no_grad()
    def _text(self, captions: list[str]) -> Tensor:
        return self.text_encoder(tokenize(self.tokenizer, captions).to(self.vae.device))[0]

    @torch.no_grad()
    def _latents(self, pictures: Tensor) -> Tensor:
        return self.vae.encode(pictures).latent_dist.mode() * self.vae.config.scaling_factor

    def loss(self, batch: Batch, reference_dropout: float, caption_dropout: float) -> Tensor:
        """The mean over the batch."""
        z, z_ref = self._latents(batch.target), self._latents(batch.references()[:, 0])
        noise, noise_ref, u = (
            drawn.to(z.device) for drawn in draw(batch.seeds, z.shape, z_ref[:, None].shape, uniforms=3)
        )
        t = (u[:, 0] * self.scheduler.config.num_train_timesteps).long()
        self.collected.clear()
        self.features = None
        self.reference_unet(self.scheduler.add_noise(z_ref, noise_ref[:, 0], t), t, self._text(batch.captions))
        captions = ["" if one < caption_dropout else text for one, text in zip(u[:, 2], batch.captions, strict=True)]
        text, z_t = self._text(captions), self.scheduler.add_noise(z, noise, t)
        dropped, predicted = u[:, 1] < reference_dropout, torch.zeros_like(noise)
        if dropped.any():
            self.features = None
            predicted[dropped] = self.base_unet(z_t[dropped], t[dropped], text[dropped]).sample.float()
        if not dropped.all():
            self.features = {name: f[~dropped] for name, f in self.collected.items()}
            predicted[~dropped] = self.base_unet(z_t[~dropped], t[~dropped], text[~dropped]).sample.float()
        if self.scheduler.config.prediction_type == "v_prediction":
            return F.mse_loss(predicted, self.scheduler.get_velocity(z, noise, t))
        return F.mse_loss(predicted, noise)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": list(of.values()), "lr": RATES[g]} for g, of in self.groups.items()])

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch, half: bool, dropout: float = 0.15) -> float:
        """half: forward pass in bf16."""
        optimizer.zero_grad()
        with torch.autocast(self.vae.device.type, torch.bfloat16, enabled=half):
            loss = self.loss(batch, dropout, dropout)
        loss.backward()
        nn.utils.clip_grad_norm_([p for of in self.groups.values() for p in of.values()], 1.0)
        optimizer.step()
        return loss.item()
