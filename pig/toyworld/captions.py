"""Pictures of the toy world with what is true of them, captions that say it, and what CLIP makes of both."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pig.models.encoders import tokenize
from pig.toyworld import scene

SIZE = 64  # pixels
TOKENS = 32  # length of a tokenized caption
CATEGORIES, PLACES, COLOURS = scene.CATEGORIES, tuple(scene.BACKGROUNDS), tuple(scene.PALETTE)
ACCESSORIES, WORN_COLOURS = tuple(scene.ACCESSORIES), scene.ACCESSORY_COLOURS
IDENTIFIER = "sks"  # one token, in no caption: what tuned methods call their subject


class Facts(NamedTuple):
    """Indices of what a picture shows. In what a caption says, -1 = not said; `worn` is 0 where nothing is worn, which
    a caption says by not speaking of it, else 1 + accessory x colour."""

    category: int
    place: int
    colour: int
    worn: int


@dataclass(frozen=True)
class Scene:
    """What `scene.draw` needs."""

    subject: scene.Subject
    background: str
    seed: int
    worn: scene.Worn | None = None
    view: scene.View = "whole"

    def facts(self) -> Facts:
        worn = (
            0
            if self.worn is None
            else 1 + len(WORN_COLOURS) * ACCESSORIES.index(self.worn.accessory) + WORN_COLOURS.index(self.worn.colour)
        )
        place, colour = PLACES.index(self.background), COLOURS.index(self.subject.colour)
        return Facts(CATEGORIES.index(self.subject.category), place, colour, worn)

    def draw(self) -> scene.Drawing:
        return scene.draw(self.subject, self.background, self.seed, SIZE, worn=self.worn, view=self.view)


def worn_of(fact: int) -> scene.Worn | None:
    """The inverse of the fact `worn`."""
    if fact == 0:
        return None
    accessory, colour = divmod(fact - 1, len(WORN_COLOURS))
    return scene.Worn(ACCESSORIES[accessory], WORN_COLOURS[colour])


def any_scene(seed: int, *, accessories: float = 0.5, partial: float = 0.0) -> Scene:
    """Over all backgrounds in turn and all accessories: what VAE, CLIP and the score networks must know.

    accessories, partial: shares of pictures with an accessory, and of partial ones.
    """
    subject = scene.make_subject(seed)
    rng = torch.Generator().manual_seed(seed)
    worn = None
    if float(torch.rand((), generator=rng)) < accessories:
        worn = worn_of(int(torch.randint(1, 1 + len(ACCESSORIES) * len(WORN_COLOURS), (), generator=rng)))
    return Scene(subject, PLACES[seed % len(PLACES)], seed, worn, scene.partial_view(seed, partial))


def training_scene(seed: int) -> Scene:
    """Without the combinations that are held out: what the base model and the methods are trained on."""
    subject, background, worn = scene.training_setting(seed)
    return Scene(subject, background, seed, worn)


def held_out_scene(number: int, *, worn: bool) -> Scene:
    """A held-out subject before its held-out background, or with its held-out accessory before any other."""
    seed = scene.HELD_OUT_SEED + number
    subject = scene.make_subject(seed)
    if not worn:
        return Scene(subject, scene.held_out_background(subject.category), seed)
    colour = WORN_COLOURS[number % len(WORN_COLOURS)]
    background = scene.training_background(subject.category, number)
    return Scene(subject, background, seed, scene.Worn(scene.held_out_accessory(subject.category), colour))


def held_out_scenes(count: int) -> list[Scene]:
    """By turns before their held-out background and with their held-out accessory."""
    return [held_out_scene(number, worn=bool(number % 2)) for number in range(count)]


def pictures_of(drawings: Iterable[scene.Drawing]) -> Tensor:
    """(N, 3, SIZE, SIZE) uint8."""
    return torch.stack([torch.tensor(one.image).permute(2, 0, 1) for one in drawings])


def render(scenes: Sequence[Scene]) -> Tensor:
    """Pictures (N, 3, SIZE, SIZE) uint8."""
    return pictures_of(one.draw() for one in tqdm(scenes, desc="drawing", mininterval=5))


def standardised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pictures (N, 3, H, W) as an image tower wants them."""
    shape = (1, 3, 1, 1)
    mean_, std_ = (torch.tensor(v, device=images.device).view(shape) for v in (mean, std))
    return (images.float() / 255 - mean_) / std_


def facts_of(scenes: Sequence[Scene]) -> Tensor:
    """(N, 4) long."""
    return torch.tensor([one.facts() for one in scenes])


def caption_of(facts: Sequence[int]) -> tuple[str, Facts]:
    """A caption that is true of the facts, in one of the forms that prompts take, and what it says of them."""
    category, place, colour, worn = facts
    if torch.rand(()) > 0.25:
        colour = -1
    noun = CATEGORIES[category] if colour < 0 else f"{COLOURS[colour]} {CATEGORIES[category]}"
    wearing = "" if worn == 0 else " " + worn_of(worn).phrase()  # type: ignore[union-attr]
    form = torch.rand(())
    if form < 0.7:  # the form of the triplets
        return scene.caption(noun, PLACES[place], worn_of(worn)), Facts(category, place, colour, worn)
    if form < 0.85:  # the form of the DreamBooth benchmark
        return f"a {noun}{wearing} {scene.BACKGROUNDS[PLACES[place]]}", Facts(category, place, colour, worn)
    return f"a photo of a {noun}{wearing}", Facts(category, -1, colour, worn)


def plain_caption(facts: Sequence[int]) -> str:
    """The triplets' caption, without the main colour."""
    category, place, _, worn = facts
    return scene.caption(CATEGORIES[category], PLACES[place], worn_of(worn))


def make_tokenizer() -> CLIPTokenizer:
    """Every word of the toy captions is one token, and so is the identifier."""
    phrases = [*scene.BACKGROUNDS.values(), *(one.format("") for one in scene.ACCESSORIES.values())]
    words = {*CATEGORIES, *COLOURS, *" ".join(phrases).split(), *["a", "photo", "of", ",", "."], IDENTIFIER}
    return tokenizer_of(words)


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


class Seen(NamedTuple):
    """What CLIP finds in pictures, each among all: indices (N,)."""

    category: Tensor
    place: Tensor
    colour: Tensor
    worn: Tensor

    def accessory(self) -> Tensor:
        """0 = none."""
        return accessory_of(self.worn)


def accessory_of(worn: Tensor) -> Tensor:
    return (worn + len(WORN_COLOURS) - 1) // len(WORN_COLOURS)


def all_captions() -> tuple[list[str], list[str], list[str]]:
    """Of category and place, category and colour, category and what is worn."""
    return (
        [scene.caption(category, place) for category in CATEGORIES for place in PLACES],
        [scene.caption(f"{colour} {category}") for category in CATEGORIES for colour in COLOURS],
        [
            scene.caption(one, worn=worn_of(w))
            for one in CATEGORIES
            for w in range(1 + len(ACCESSORIES) * len(WORN_COLOURS))
        ],
    )


@torch.no_grad()
def embed_captions(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """(N, D), of length 1."""
    device = clip.device
    chunks = [texts[at : at + 256] for at in range(0, len(texts), 256)]
    found = [clip.get_text_features(input_ids=tokenize(tokenizer, one).to(device)).pooler_output for one in chunks]
    return F.normalize(torch.cat(found).float(), dim=-1)


@torch.no_grad()
def classify(clip: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor) -> Seen:
    """What CLIP finds in uint8 pictures (N, 3, SIZE, SIZE)."""
    places, colours, worn = (embed_captions(clip, tokenizer, texts) for texts in all_captions())
    pixels = standardised(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    embeds = torch.cat([clip.get_image_features(pixel_values=one).pooler_output for one in pixels.split(128)])
    embeds = clip.logit_scale.exp() * F.normalize(embeds.float(), dim=-1)

    def scores(captions: Tensor) -> Tensor:
        return (embeds @ captions.T).unflatten(1, (len(CATEGORIES), -1))  # (N, categories, others)

    place = scores(places)
    return Seen(
        place.logsumexp(2).argmax(1),
        place.logsumexp(1).argmax(1),
        scores(colours).logsumexp(1).argmax(1),
        scores(worn).logsumexp(1).argmax(1),
    )


def agreement(seen: Seen, facts: Tensor) -> dict[str, float]:
    """Share of pictures of which each fact is found, by its name; the accessory's colour among those that have one."""
    category, place, colour, worn = facts.unbind(1)
    dressed = worn > 0
    found = {
        "category": seen.category == category,
        "background": seen.place == place,
        "main colour": seen.colour == colour,
        "accessory": seen.accessory() == accessory_of(worn),
        "accessory colour": (seen.worn == worn)[dressed & (seen.accessory() == accessory_of(worn))],
    }
    return {name: right.float().mean().item() for name, right in found.items()}


def report_clip(clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    scenes = [any_scene(scene.HELD_OUT_SEED + i) for i in range(1200)]
    found = agreement(classify(clip, tokenizer, render(scenes)), facts_of(scenes))
    print("clip: held-out scenes, " + ", ".join(f"{name} {share:.1%}" for name, share in found.items()))
