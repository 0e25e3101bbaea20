"""What all pipelines make of texts and references: a base class."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from pig.data.transforms import reference_picture, to_tensor
from pig.errors import check_text
from pig.models.backbone import encode_images, vae_scale
from pig.models.encoders import tokenize
from pig.sampling.call import Call, Condition
from pig.sampling.offload import OffloadingPipeline
from pig.sampling.settings import SamplingSettings

FEW_WORDS = 1000  # of a vocabulary that can be listed


class EncodingPipeline(OffloadingPipeline):
    """A pipeline on a base model's VAE, text encoder and tokenizer."""

    @property
    def _unet(self) -> UNet2DConditionModel:
        return getattr(self, self.denoiser)

    @property
    def native_size(self) -> int:
        """The side of the pictures that the base model was trained at, in pixels."""
        return self._unet.config.sample_size * vae_scale(self.vae)

    def cut_off(self, prompt: str) -> str:
        """What of a prompt is longer than the tokenizer takes, and is not read."""
        check_text(prompt)
        limit = self.tokenizer.model_max_length - 2  # the begin and the end
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[limit:])

    def doubts(self, prompts: Sequence[str], height: int | None, width: int | None) -> list[str]:
        """What to say before drawing: words that a small model has never seen, and a size far above its own."""
        found = []
        words = [word.removesuffix("</w>") for word in self.tokenizer.get_vocab() if re.fullmatch(r"\w+</w>", word)]
        if len(words) < FEW_WORDS:
            told = {word for prompt in prompts for word in re.findall(r"[a-z]+", prompt.lower())}
            if unknown := sorted(told - set(words)):
                # Without the ends of longer words, which a vocabulary holds as well.
                whole = [word for word in words if len(word) > 2 and sum(one.endswith(word) for one in words) == 1]
                known = ", ".join(sorted(whole))
                found.append(f"this model has never seen the word(s) {', '.join(unknown[:10])}; it knows: {known}")
        native = self.native_size
        height, width = height or native, width or native
        if (times := height * width / native**2) >= 4:
            found.append(
                f"{width}x{height} is {times:.0f} times the area that this model was trained at ({native}x{native}): a "
                "picture takes at least so many times as long, and may show the subject several times"
            )
        return found

    def encode_prompts(self, call: Call, settings: SamplingSettings) -> dict[str, Tensor]:
        """The text of each branch, (B, L, D): the prompt for `text_im`, the empty or negative prompt for the others."""
        return self.text_of_branches(self.encode_text(call.prompts), call, settings)

    def text_of_branches(self, text: Tensor, call: Call, settings: SamplingSettings) -> dict[str, Tensor]:
        """The same, from the prompts' embeddings, (P, L, D)."""
        text = text.repeat_interleave(call.images_per_prompt, dim=0)
        empty = self.encode_text([settings.negative_prompt]).expand_as(text)
        return {"uncond": empty, "im": empty, "text_im": text}

    @staticmethod
    def with_references(latents: Tensor, names: Sequence[str]) -> tuple[int, int]:
        """How many samples at the head of the stacked branches see no references, and how many branches do."""
        bare = "uncond" in names
        return len(latents) * bare, len(names) - bare

    @staticmethod
    def stacked(
        latents: Tensor, t: Tensor, names: Sequence[str], condition: Condition
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, t and text of some branches as one batch."""
        count = len(names) * len(latents)
        text = torch.cat([condition.text[name] for name in names])
        return latents.repeat(len(names), 1, 1, 1), t.expand(count), text

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(N, L, D)"""
        return self.text_encoder(tokenize(self.tokenizer, texts).to(self._execution_device))[0]

    def encode_references(self, cutouts: Sequence[Image.Image], side: int) -> Tensor:
        """(K, 4, h, h), scaled latents of the references on white squares, whatever shape is drawn."""
        tensors = [to_tensor(reference_picture(one, side)) for one in cutouts]
        return torch.cat([encode_images(self.vae, one[None].to(self._execution_device)) for one in tensors])
