"""Stage 1: captions "A photo of a [object], [position] [scene]" (arXiv 2401.13974, section 3.4, appendix A)."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm
from yaml import YAMLError

from data_gen.config import CaptionsConfig
from data_gen.samples import write_lines
from pig.errors import InputError, check_kinds
from pig.toyworld import scene

FILE = "captions.jsonl"
STATS = "captions_stats.json"
IDLE_CALLS = 20  # calls in a row without one new caption, after which asking on is pointless
# Appendix A, word for word up to the number of captions.
PROMPT = """Generate a caption for an image where there is one main object and possibly other secondary objects. \
The object needs to be finite and solid. The main object should not be things like lakes, fields, sky, etc.

You should only respond in the following format: Caption: A photo of a [object], [describe object positioning in \
scene] [describe scene]

Generate {count} such captions about different objects, each on a line of its own."""
FORM = re.compile(r"^\s*(?:\d+[.)]\s*|[-*]\s+)?Caption: (A photo of an? ([^,\[\]]+), ([^\[\]]+?))\s*$")
FILLERS = frozenset(re.findall(r"\w+", "a an the of on in at by with and to its near under over into from is photo"))


@dataclass(frozen=True)
class Caption:
    caption: str
    object: str


class Captioner(Protocol):
    """Something that can be asked for captions again and again."""

    def ask(self, count: int, call: int) -> str:
        """The raw reply to call number `call` for `count` captions."""


# -- from a grammar ---------------------------------------------------------------------------------------------------


def grammar_captions(config: CaptionsConfig, seed: int) -> list[Caption]:
    """`count` different captions from lists: "a photo of a OBJECT, SCENE".

    Raises:
        InputError: the grammar has fewer.
    """
    rows = _toy_sentences() if config.lists is None else _listed_sentences(Path(config.lists))
    limit = max(1, round(config.max_object_share * config.count))
    random.Random(seed).shuffle(rows)
    rows.sort(key=lambda row: row[2])  # the plain ones first; stable, so still shuffled within
    taken: Counter[str] = Counter()
    captions: list[Caption] = []
    for object_, where, _ in rows:
        if len(captions) < config.count and taken[_noun(object_)] < limit:
            taken[_noun(object_)] += 1
            captions.append(Caption(f"a photo of {_article(object_)} {object_}, {where}", object_))
    if len(captions) < config.count:
        raise InputError(
            f"captions.count={config.count}, but the grammar has {len(rows)} captions, {len(captions)} of them within "
            f"captions.max_object_share={config.max_object_share}. Ask for fewer, raise the share, set "
            "images.per_caption for several pictures of each, or give longer lists (captions.lists)"
        )
    random.Random(seed).shuffle(captions)
    return captions


def _toy_sentences() -> list[tuple[str, str, bool]]:
    """Object, scene, and whether a colour is named; without the backgrounds that are held out for evaluation."""
    return [
        (f"{colour} {category}" if colour else category, phrase, bool(colour))
        for category in scene.CATEGORIES
        for background, phrase in scene.BACKGROUNDS.items()
        if background != scene.held_out_background(category)
        for colour in ("", *scene.PALETTE)
    ]


def _listed_sentences(file: Path) -> list[tuple[str, str, bool]]:
    try:
        lists: Any = OmegaConf.to_container(OmegaConf.load(file))
        objects, scenes = lists["objects"], lists["scenes"]
        for words in (objects, scenes):
            if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
                raise ValueError("each must be a list of words")
    except (OSError, KeyError, TypeError, ValueError, YAMLError) as error:
        raise InputError(f"captions.lists={file}: expected YAML with the lists `objects` and `scenes` ({error})") from (
            error
        )
    return [(object_, where, False) for object_ in dict.fromkeys(objects) for where in dict.fromkeys(scenes)]


def _article(noun: str) -> str:
    # The toy world's text encoder has only ever read "a".
    return "an" if noun[:1] in "aeiou" and noun.split()[-1] not in scene.CATEGORIES else "a"


# -- from a language model --------------------------------------------------------------------------------------------


class ChatCaptioner:
    """Any OpenAI-compatible server: the hosted ones, vLLM, Ollama. The client retries with backoff, as told to wait."""

    def __init__(self, config: CaptionsConfig) -> None:
        try:
            import openai
        except ImportError as error:
            raise InputError("captions.captioner=chat needs the openai client: pip install 'pig[llm]'") from error
        key = os.environ.get(config.api_key_env)
        if not key and config.base_url is None:
            raise InputError(f"captions.captioner=chat needs a key in the environment variable {config.api_key_env}")
        self.model, self.temperature, self.errors = config.model, config.temperature, openai.OpenAIError
        self.server = config.base_url or "the client's default server"
        self.key = key or "none"
        self.client = openai.OpenAI(
            api_key=self.key, base_url=config.base_url, timeout=config.timeout, max_retries=config.retries
        )

    def ask(self, count: int, call: int) -> str:
        try:
            reply = self.client.chat.completions.create(
                model=str(self.model),
                messages=[{"role": "user", "content": PROMPT.format(count=count)}],
                temperature=self.temperature,
            )
            return str(reply.choices[0].message.content or "")
        except self.errors as error:
            raise InputError(
                f"the caption server ({self.server}, model {self.model}) does not answer: {type(error).__name__}: "
                f"{str(error).replace(self.key, '...')}. The captions that came are kept; start again to go on"
            ) from None
        except (ValueError, AttributeError, TypeError, IndexError):  # a page, torn JSON, no message in it
            return ""


class LocalCaptioner:
    """A language model by transformers, from a folder or the hub; one seed a call."""

    def __init__(self, config: CaptionsConfig, seed: int) -> None:
        from transformers import pipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.generator = pipeline("text-generation", model=config.model, device=device, dtype="auto")
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot load captions.model={config.model!r}: {str(error).splitlines()[0]}") from error
        self.temperature, self.seed = config.temperature, seed

    def ask(self, count: int, call: int) -> str:
        prompt: Any = PROMPT.format(count=count)
        if self.generator.tokenizer.chat_template:
            prompt = [{"role": "user", "content": prompt}]
        torch.manual_seed(int(np.random.SeedSequence([self.seed, call]).generate_state(1)[0]))
        reply = self.generator(
            prompt, do_sample=True, temperature=self.temperature, max_new_tokens=50 * count, return_full_text=False
        )
        text = reply[0]["generated_text"]
        return text if isinstance(text, str) else text[-1]["content"]


def parse(line: str) -> Caption | None:
    """A caption in the form asked for, or None."""
    match = FORM.match(line)
    if match is None or len(match[2].split()) > 6:
        return None
    return Caption(match[1], match[2].strip())


class Collection:
    """What has been accepted: no duplicate or near-duplicate, no object over its share; the rest counted by reason.

    Near-duplicates have the same words up to order, articles, prepositions and a plural s.
    """

    def __init__(self, count: int, max_object_share: float, captions: list[Caption]) -> None:
        self.calls = 0  # made so far, by all starts
        self.count, self.limit = count, max(1, round(count * max_object_share))
        self.captions: list[Caption] = []
        self.seen: set[tuple[str, ...]] = set()
        self.objects: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        for caption in captions:
            self.add(caption)

    def add(self, caption: Caption) -> bool:
        words = tuple(sorted({w.rstrip("s") for w in re.findall(r"\w+", caption.caption.lower())} - FILLERS))
        noun = _noun(caption.object)
        if words in self.seen:
            self.rejected["duplicate"] += 1
        elif self.objects[noun] >= self.limit:
            self.rejected["object over its share"] += 1
        elif len(self.captions) < self.count:
            self.seen.add(words)
            self.objects[noun] += 1
            self.captions.append(caption)
            return True
        return False

    def add_reply(self, reply: str) -> list[Caption]:
        """The new ones among a reply's lines."""
        new = []
        if not reply.strip():
            self.rejected["empty reply"] += 1
        for line in filter(str.strip, reply.splitlines()):
            caption = parse(line)
            if caption is None:
                self.rejected["wrong form"] += 1
            elif self.add(caption):
                new.append(caption)
        return new

    @property
    def missing(self) -> int:
        return self.count - len(self.captions)


def collect(captioner: Captioner, collection: Collection, config: CaptionsConfig) -> Iterator[Caption]:
    """Ask, several calls at a time, until all captions are there.

    Raises:
        InputError: the server refuses, or many replies in a row hold nothing new.
    """
    idle = 0
    parallel = config.parallel_calls if config.captioner == "chat" else 1
    with ThreadPoolExecutor(parallel) as pool:
        pending: set[Future[str]] = set()
        try:
            while collection.missing:
                while len(pending) < min(parallel, -(-collection.missing // config.per_call)):
                    pending.add(pool.submit(captioner.ask, config.per_call, collection.calls))
                    collection.calls += 1
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                failed = [future for future in done if future.exception()]
                if failed:  # what other calls bring is kept
                    done, pending = done | wait(pending).done, set()
                for future in done:
                    if future.exception() is None:
                        new = collection.add_reply(future.result())
                        idle = 0 if new else idle + 1
                        yield from new
                if failed:
                    failed[0].result()
                if idle >= IDLE_CALLS and collection.missing:
                    raise InputError(
                        f"{idle} replies in a row held no new caption ({collection.missing} still missing; rejected: "
                        f"{dict(collection.rejected)}). Try another captions.model, a higher captions.temperature, or "
                        "a larger captions.max_object_share"
                    )
        finally:
            for future in pending:
                future.cancel()


def _noun(object_: str) -> str:
    return object_.lower().split()[-1].rstrip("s")


# -- the stage --------------------------------------------------------------------------------------------------------


def make_captions(out: Path, config: CaptionsConfig, seed: int) -> list[Caption]:
    """`captions.jsonl` in `out`: made, completed, or read if it stands there. Partial answers are kept."""
    file, part = out / FILE, out / (FILE + ".part")
    if file.exists():
        return read_captions(file)
    out.mkdir(parents=True, exist_ok=True)
    if config.captioner == "grammar":
        captions = grammar_captions(config, seed)
        write_lines(part, map(asdict, captions))
        _write_stats(out, 0, {})
    else:
        collection = Collection(config.count, config.max_object_share, read_captions(part) if part.exists() else [])
        if (out / STATS).exists():
            before = json.loads((out / STATS).read_text(encoding="utf-8"))
            collection.calls, collection.rejected = before["calls"], Counter(before["rejected"])
        captioner: Captioner = ChatCaptioner(config) if config.captioner == "chat" else LocalCaptioner(config, seed)
        write_lines(part, map(asdict, collection.captions))
        progress = tqdm(total=config.count, initial=len(collection.captions), desc="captions", unit="caption")
        try:
            with part.open("a", encoding="utf-8") as stream, progress:
                for caption in collect(captioner, collection, config):
                    stream.write(json.dumps(asdict(caption)) + "\n")
                    stream.flush()
                    progress.update()
                    _write_stats(out, collection.calls, collection.rejected)
        finally:  # calls that brought nothing are not made again either
            _write_stats(out, collection.calls, collection.rejected)
        captions = collection.captions
    part.rename(file)
    return captions


def _write_stats(out: Path, calls: int, rejected: Mapping[str, int]) -> None:
    write_lines(out / STATS, [{"calls": calls, "rejected": rejected}])


def read_captions(file: Path) -> list[Caption]:
    """The lines that are whole; a last one that a kill has torn is left out."""
    captions = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            one = Caption(**json.loads(line))
            check_kinds(asdict(one), {"caption": str, "object": str}, "a caption")
            captions.append(one)
        except (ValueError, TypeError):
            if file.suffix != ".part":
                raise InputError(f"{file}: not a caption: {line[:80]!r}") from None
    return captions
