"""Generate images with a word that Textual Inversion has learnt (arXiv 2208.01618)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from pig.methods.textual_inversion.network import OneWord
from pig.models.identifier import with_identifier
from pig.models.words import EMBEDS_FILE, install
from pig.sampling.settings import SamplingSettings
from pig.sampling.text import TextPipeline

TOKEN = "<subject>"


class TextualInversionPipeline(TextPipeline):
    """Prompts about one subject in, images of that subject out. The learnt word stands in place of the class noun.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: of the base model, frozen.
        token: the new word.
        base: the base model's name. settings: the model's own defaults, over those of `SamplingSettings`.
        network: the word, where text encoder and tokenizer have it already.
    """

    method = "textual_inversion"
    delta_file = EMBEDS_FILE
    kept_apart = True
    network: OneWord

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        token: str = TOKEN,
        base: str | None = None,
        settings: dict[str, Any] | None = None,
        network: OneWord | None = None,
    ) -> None:
        network = network or OneWord(tokenizer, text_encoder, token)
        super().__init__(vae, text_encoder, network.longer, unet, scheduler, base, settings, network)
        self.register_to_config(token=token)

    def model_options(self) -> dict[str, Any]:
        return {"token": self.config.token}

    @contextmanager
    def base_parts(self) -> Iterator[None]:
        word = self.network.word
        self.tokenizer = self.network.tokenizer
        install(self.text_encoder, word.words)
        try:
            yield
        finally:
            self.tokenizer = self.network.longer
            install(self.text_encoder, word)

    def name_in_delta(self, name: str) -> str:
        return self.config.token

    @classmethod
    def check_prompt(cls, prompt: str, noun: str, settings: SamplingSettings) -> None:
        if "<" not in prompt:  # which word the model has learnt is not known here
            with_identifier(prompt, noun, TOKEN, in_place=True)

    def text_of(self, prompt: str, noun: str, settings: SamplingSettings) -> str:
        return with_identifier(prompt, noun, self.config.token, in_place=True)
