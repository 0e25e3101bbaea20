"""Pictures of the toy world with what is true of them, captions that say it, and what CLIP makes of both."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPModel,
    CLIPTokenizer,
)
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from pig.models.encoders import tokenize
from pig.toyworld import scene

SIZE = 64  # pixels
TOKENS = 32  # length of a tokenized caption
CATEGORIES, PLACES, COLOURS = scene.CATEGORIES, tuple(scene.BACKGROUNDS), tuple(scene.PALETTE)


def render(seeds: Sequence[int], background: Sequence[str], subjects: Sequence[scene.Subject]) -> Tensor:
    """Pictures (N, 3, SIZE, SIZE) uint8, one for each (seed, background, subject)."""
    rows = tqdm(list(zip(subjects, background, seeds, strict=True)), desc="drawing", mininterval=5)
    return torch.stack([torch.tensor(scene.draw(s, b, i, SIZE).image).permute(2, 0, 1) for s, b, i in rows])


def random_scenes(count: int, *, first_seed: int) -> tuple[Tensor, list[scene.Subject], list[str]]:
    """`count` pictures, each of its own subject, over all backgrounds in turn."""
    seeds = range(first_seed, first_seed + count)
    subjects = [scene.make_subject(seed) for seed in seeds]
    background = [PLACES[seed % len(PLACES)] for seed in seeds]
    return render(seeds, background, subjects), subjects, background


def standardised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pictures (N, 3, H, W) as an image tower wants them."""
    shape = (1, 3, 1, 1)
    mean_, std_ = (torch.tensor(v, device=images.device).view(shape) for v in (mean, std))
    return (images.float() / 255 - mean_) / std_


Facts = tuple[int, int, int]  # indices of category, background, main colour; -1 = not said


def facts_of(subject: scene.Subject, background: str) -> Facts:
    return CATEGORIES.index(subject.category), PLACES.index(background), COLOURS.index(subject.colour)


def caption_of(facts: Sequence[int]) -> tuple[str, Facts]:
    """A caption that is true of the facts, in one of the forms that prompts take, and what it says of them."""
    category, place, colour = facts
    if torch.rand(()) > 0.2:
        colour = -1
    noun = CATEGORIES[category] if colour < 0 else f"{COLOURS[colour]} {CATEGORIES[category]}"
    form = torch.rand(())
    if form < 0.7:  # the form of the triplets
        return scene.caption(noun, PLACES[place]), (category, place, colour)
    if form < 0.85:  # the form of the DreamBooth benchmark
        return f"a {noun} {scene.BACKGROUNDS[PLACES[place]]}", (category, place, colour)
    return f"a photo of a {noun}", (category, -1, colour)


def make_tokenizer() -> CLIPTokenizer:
    """Every word of the toy captions is one token."""
    return tokenizer_of(
        {*CATEGORIES, *COLOURS, *" ".join(scene.BACKGROUNDS.values()).split(), "a", "photo", "of", ",", "."}
    )


def tokenizer_of(words: Collection[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges that make each of these words one token, any other word pieces.

    Not by the library's trainer: it breaks ties by the order of a hash map, which differs between processors. The end
    token has the largest id, as in CLIP: `CLIPTextModel` may pool there by `argmax`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        while len(pieces := _pieces(word, symbols, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    vocab = [*symbols, *dict.fromkeys(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=merges, model_max_length=TOKENS)


def _pieces(word: str, symbols: Sequence[str], merges: list[tuple[str, str]]) -> list[str]:
    """The word in tokens, as these merges leave it. A later merge never splits a word that earlier ones have made."""
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*symbols, *(a + b for a, b in merges)]))}
    bpe = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>")
    return [token.value for token in bpe.tokenize(word)]


@torch.no_grad()
def classify(clip: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor) -> Tensor:
    """Category and background that CLIP finds in uint8 pictures, each among all of them: indices (N, 2)."""
    texts = [scene.caption(category, place) for category in CATEGORIES for place in PLACES]
    pixels = standardised(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    logits = clip(input_ids=tokenize(tokenizer, texts), pixel_values=pixels).logits_per_image
    logits = logits.view(len(images), len(CATEGORIES), len(PLACES))
    return torch.stack([logits.logsumexp(2).argmax(1), logits.logsumexp(1).argmax(1)], dim=1)


def report_clip(clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    images, subjects, background = random_scenes(600, first_seed=scene.HELD_OUT_SEED)
    facts = torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)])
    category, place = (classify(clip, tokenizer, images) == facts[:, :2]).float().mean(0).tolist()
    print(f"clip: held-out scenes, category {category:.1%}, background {place:.1%}")
