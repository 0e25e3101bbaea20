"""What Textual Inversion trains: the embedding of one new word."""

from __future__ import annotations

from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from pig.models.words import add_word


class OneWord(nn.Module):
    """Gives the text encoder a new word.

    word: its embedding, behind the vocabulary's. tokenizer: the base model's own; longer: one that knows the word.
    """

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, token: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.longer, self.word = add_word(tokenizer, text_encoder, token)

    def trainable_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Group `word`: the embedding alone."""
        return {"word": {"word.embedding": self.word.embedding}}
