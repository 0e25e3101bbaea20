"""A new word of a text encoder: one embedding more, behind its vocabulary (Textual Inversion, arXiv 2208.01618)."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from pig.errors import InputError

EMBEDS_FILE = "learned_embeds.safetensors"  # as `load_textual_inversion` looks for it


class LearnedWord(nn.Module):
    """The embeddings of a vocabulary of V words, and of one more, whose id is V.

    words: V x D, frozen. embedding: (D,), trained.
    """

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.words = words
        self.embedding = nn.Parameter(words.weight.detach().mean(0))

    def forward(self, ids: Tensor) -> Tensor:
        """(..., D) of ids (...)."""
        new = ids == self.words.num_embeddings
        return torch.where(new[..., None], self.embedding, self.words(ids.masked_fill(new, 0)))


def add_word(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, token: str) -> tuple[CLIPTokenizer, LearnedWord]:
    """Add a word to the text encoder, in place: a copy of the tokenizer that knows it, and the new embedding layer.

    Raises:
        InputError: the vocabulary has this token already, or it is no such word as `<my-mug>`.
    """
    if not re.fullmatch(r"<[\w-]+>", token):
        raise InputError(f"the token {token!r} must be a word in angle brackets, such as '<my-mug>'")
    if token in tokenizer.get_vocab():
        raise InputError(f"the token {token!r} is in the vocabulary already: choose another")
    words = text_encoder.get_input_embeddings()
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([token])
    if longer.convert_tokens_to_ids(token) != words.num_embeddings:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} words, the text encoder {words.num_embeddings}: no word can be added"
        )
    learned = LearnedWord(words)
    install(text_encoder, learned)
    return longer, learned


def install(text_encoder: CLIPTextModel, words: LearnedWord | nn.Embedding) -> None:
    """Give the text encoder these embeddings."""
    text_encoder.set_input_embeddings(words)
    count = words.words.num_embeddings + 1 if isinstance(words, LearnedWord) else words.num_embeddings
    text_encoder.config.vocab_size = count


@torch.no_grad()
def embedding_of(tokenizer: CLIPTokenizer, words: nn.Embedding, text: str) -> Tensor:
    """(D,), the mean over the text's tokens."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return words.weight[ids].mean(0)
