"""The identifier: a word that stands for a subject right before its class noun, as in "a photo of a sks dog"."""

from __future__ import annotations

import re

from torch import Tensor
from transformers import CLIPTokenizer

from pig.errors import InputError


def identifier_token(tokenizer: CLIPTokenizer, identifier: str) -> int:
    """The identifier's id in the vocabulary.

    Raises:
        InputError: it is several tokens long, or unknown; names what it falls into.
    """
    if not re.fullmatch(r"\w+", identifier):
        raise InputError(f"the identifier {identifier!r} must be a word of letters and digits, such as 'sks'")
    ids = tokenizer(identifier, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        parts = ", ".join(repr(part) for part in tokenizer.convert_ids_to_tokens(ids))
        raise InputError(
            f"the identifier {identifier!r} is {len(ids)} tokens for this tokenizer ({parts}): choose a rare word that "
            "is one token, such as 'sks' for Stable Diffusion"
        )
    return ids[0]


def is_common(tokenizer: CLIPTokenizer, identifier: str) -> bool:
    """Whether an identifier of one token is a word that texts often hold: its meaning would mix with the subject's.

    A BPE vocabulary lists its merges by how often they occur, behind 512 single bytes: of CLIP's 48,894, the last fifth
    holds rare ones such as `sks`. What has no vowel is no word.
    """
    rank = identifier_token(tokenizer, identifier) - 512
    return 0 <= rank < 40_000 and re.search("[aeiouy]", identifier, flags=re.IGNORECASE) is not None


def with_identifier(prompt: str, noun: str, identifier: str, *, in_place: bool = False) -> str:
    """The prompt with the identifier before the class noun; as it is, where it holds the identifier already.

    noun: a phrase; an article before it is passed over. in_place: the identifier takes the noun's place.

    Raises:
        InputError: no noun is given, or the prompt does not hold it.
    """
    if re.search(rf"(?<![\w-]){re.escape(identifier)}(?![\w-])", prompt, flags=re.IGNORECASE):  # CLIP reads no case
        return prompt
    noun = re.sub(r"^(an?|the)\s+", "", noun.strip(), flags=re.IGNORECASE)
    if not noun:
        raise InputError(
            f"where shall the identifier stand in {prompt!r}? Give the class noun (--class_noun), or write "
            f"{identifier!r} into the prompt"
        )
    found = re.search(rf"\b{re.escape(noun)}\b", prompt, flags=re.IGNORECASE)
    if found is None:
        raise InputError(f"the prompt {prompt!r} does not hold its class noun {noun!r}: correct one of them")
    rest = prompt[found.end() :] if in_place else f" {prompt[found.start() :]}"
    return f"{prompt[: found.start()]}{identifier}{rest}"


def first_positions(ids: Tensor, token: int) -> Tensor:
    """Where the identifier stands first in each text, (B, L) bool; nowhere in a text that does not hold it, or that is
    cut off before it."""
    there = ids == token
    return there & (there.long().cumsum(1) == 1)
