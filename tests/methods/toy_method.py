"""A whole method, as CONTRIBUTING describes it: the mean colour of the references as one more word of the prompt.

The test registers it by one line; everything else (training, sampling, export, scores) is the house's.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from pig import diffusion
from pig.models.backbone import latent_shape, sent
from pig.sampling.call import Condition
from pig.sampling.guidance import classifier_free
from pig.sampling.pipeline import SubjectPipeline
from pig.training.module import PersonalisationModule


class ColourToken(ModelMixin, ConfigMixin):
    """Mean latents of the references, (B, K, 4, h, w) -> one token of text, (B, 1, D)."""

    @register_to_config
    def __init__(self, width: int):
        super().__init__()
        self.linear = torch.nn.Linear(4, width)

    def forward(self, latents):
        return self.linear(latents.mean((1, 3, 4)))[:, None]

    def trainable_parameters(self):
        return {"colour": dict(self.named_parameters())}


class Pipeline(SubjectPipeline):
    method = "toy_method"

    def __init__(self, vae, text_encoder, tokenizer, unet, scheduler, colour, base=None, settings=None):
        super().__init__()
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
        self.register(base=base, settings=settings, parts={**parts, "colour": colour})
        self.network = colour

    @classmethod
    def from_backbone(cls, backbone, *, base, settings):
        colour = ColourToken(backbone.unet.config.cross_attention_dim)
        return cls(**vars(backbone), colour=colour, base=base, settings=settings)

    def condition(self, call, settings):
        latents = [self.encode_references(one, self.native_size)[None] for one in call.references]
        tokens = torch.cat([self.colour(one) for one in latents]).repeat_interleave(call.images_per_prompt, 0)
        text = {name: torch.cat([one, tokens], 1) for name, one in self.encode_prompts(call, settings).items()}
        return Condition(text, classifier_free(settings.text_guidance), len(call.scheduler.timesteps))

    def branches(self, latents, t, step, names, condition, settings):
        return self.unet(*self.stacked(latents, t, names, condition)).sample


class Module(PersonalisationModule):
    method = "toy_method"

    def __init__(self, base: str, lr: float = 1e-3):
        super().__init__(base, "adamw", None)
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.unet, self.net = self.backbone.unet, ColourToken(self.backbone.unet.config.cross_attention_dim)
        self.train_only({"colour": lr}, "constant")

    def losses(self, batch, *, training):
        noise, u = diffusion.draw(batch.seeds, latent_shape(self.vae, batch.target), uniforms=1)
        noise, t = sent(noise, self.device), sent((u[:, 0] * self.train_timesteps).long(), self.device)
        z_0, z_ref = self.encode_pictures(batch.target, batch.references())
        text, _, _ = self.encode_captions(batch, batch.captions)
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, t)
        z_t = diffusion.add_noise(z_0, noise, alpha, sigma)
        predicted = self.unet(z_t, t, torch.cat([text, self.net(z_ref)], 1)).sample
        kind = self.backbone.scheduler.config.prediction_type
        return diffusion.loss_per_sample(predicted, diffusion.target(z_0, noise, alpha, sigma, kind)), t

    def pipeline(self):
        return Pipeline(**vars(self.backbone), colour=self.net, base=self.base, settings={"text_guidance": 2.0})
