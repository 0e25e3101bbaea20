"""The settings of data generation: a YAML file over these defaults, `key=value` on the command line over both."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_gen.folders import MADE_BY
from pig.errors import InputError
from pig.files import write_text
from pig.mistakes import flat, settings_from


@dataclass
class CaptionsConfig:
    """captioner: `grammar` (lists, offline), `chat` (an OpenAI-compatible server) or `local` (transformers)."""

    count: int = MISSING
    captioner: str = "grammar"
    # grammar: a YAML file with `objects` and `scenes`; none: the toy world's words
    lists: str | None = None
    # chat and local
    model: str | None = None
    per_call: int = 50  # of the authors' release
    temperature: float = 1.2  # of the authors' release
    max_object_share: float = 0.02  # of all captions may be about one object
    # chat
    base_url: str | None = None  # none: the client's own default
    api_key_env: str = "OPENAI_API_KEY"  # the variable that holds the key; keys stand in no config
    parallel_calls: int = 4
    timeout: float = 120.0  # seconds a call
    retries: int = 8  # of a call that was refused, failed or cut off; with backoff


@dataclass
class ImagesConfig:
    """model: any text-to-image pipeline of diffusers, a folder or hub id, or `toyworld`."""

    model: str = MISSING
    per_caption: int = 1
    size: int = 512
    steps: int = 25
    guidance: float = 7.5
    batch_size: int = 8
    compile: bool = False


@dataclass
class MasksConfig:
    """method: `automatic` (SAM's own masks ranked by CLIP), `grounded` (Grounding DINO, then SAM), or `sam3`."""

    method: str = "automatic"
    sam: str | None = None
    clip: str | None = None  # automatic
    detector: str | None = None  # grounded: Grounding DINO; sam3: SAM 3
    batch_size: int = 8
    points_per_side: int = 32  # automatic: of SAM's grid
    pred_iou_thresh: float = 0.88  # automatic
    stability_score_thresh: float = 0.95  # automatic
    threshold: float = 0.3  # grounded, sam3: least score of what was found
    compile: bool = False


@dataclass
class QualityConfig:
    """What a sample must satisfy. Areas are shares of the picture, scores plain cosines of CLIP."""

    clip: str = MISSING
    border: int = 25  # pixels at 512 that the mask must keep from the border (authors' release)
    min_area: float = 0.02
    max_area: float = 0.70
    min_largest_part: float = 0.9  # share of the mask's area in its largest connected part; the rest is dropped
    min_deviation: float = 8.0  # of grey values (0..255): below it the picture is near constant
    min_caption_score: float = 0.0  # caption against picture
    min_object_score: float = 0.0  # object phrase against the cut-out
    batch_size: int = 32


@dataclass
class ShardsConfig:
    size: int = 1000  # samples in a shard, before rejections
    attempts: int = 3  # pictures drawn for a sample until one passes; then it is dropped


@dataclass
class CardConfig:
    """Fields of the data card that only a person knows."""

    licence: str = "not stated"
    caption_terms: str = "not stated"
    image_terms: str = "not stated"


def captioner(config: CaptionsConfig) -> str:
    """Who writes the captions, for plan, card and metadata."""
    return config.captioner if config.captioner == "grammar" else f"{config.model} ({config.captioner})"


def masker(config: MasksConfig) -> str:
    """Who finds the masks: the method, and the models that it uses."""
    used = {
        "automatic": (config.sam, config.clip),
        "grounded": (config.detector, config.sam),
        "sam3": (config.detector,),
    }
    return " + ".join([config.method, *map(str, used[config.method])])


@dataclass
class DatagenConfig:
    output: str = MISSING
    seed: int = 0
    executor: str = "local"  # or `ray`: on this machine, or the cluster at RAY_ADDRESS
    workers: int = 1  # processes; with GPUs, one GPU each
    threads: int = 1  # CPU threads a worker: sums over several round differently, so it is part of the data
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    card: CardConfig = field(default_factory=CardConfig)


# Where and by whom the work is done changes no byte of the data.
PLACE = ("output", "executor", "workers", "card", "captions.parallel_calls", "captions.timeout", "captions.retries")

CHOICES = {
    "executor": ("local", "ray"),
    "captions.captioner": ("grammar", "chat", "local"),
    "masks.method": ("automatic", "grounded", "sam3"),
}
POSITIVE = (
    *("workers", "threads", "shards.size", "shards.attempts", "captions.count", "captions.per_call"),
    *("captions.parallel_calls", "images.per_caption", "images.size", "images.steps", "images.batch_size"),
    *("masks.batch_size", "masks.points_per_side", "quality.batch_size"),
)
AT_MOST = {
    **{"threads": 1024, "images.size": 8192, "images.batch_size": 4096},
    **{"masks.points_per_side": 256, "masks.batch_size": 4096},
}
SHARES = ("captions.max_object_share", "quality.min_area", "quality.max_area", "quality.min_largest_part")
AT_LEAST_0 = (
    *("seed", "captions.timeout", "captions.retries", "captions.temperature", "images.guidance"),
    *("quality.border", "masks.threshold"),
)
NEEDED = {  # by a choice made above
    ("captions.captioner", "chat"): ("captions.model",),
    ("captions.captioner", "local"): ("captions.model",),
    ("masks.method", "automatic"): ("masks.sam", "masks.clip"),
    ("masks.method", "grounded"): ("masks.sam", "masks.detector"),
    ("masks.method", "sam3"): ("masks.detector",),
}


def load_config(file: Path, overrides: list[str]) -> DatagenConfig:
    """Read, merge and check.

    Raises:
        InputError: no such file, an unknown key, a value of the wrong type or out of its range, or a missing one.
    """
    config = settings_from(DatagenConfig, file, overrides)
    _check(config)
    return config


def _check(config: DatagenConfig) -> None:
    values = flat(asdict(config))
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise InputError(f"{key} must be one of {', '.join(choices)}, got {values[key]!r}")
    if not config.output.strip():
        raise InputError("output is empty: name a folder")
    for key in POSITIVE:
        if values[key] < 1:
            raise InputError(f"{key} must be at least 1, got {values[key]}")
    for key, most in AT_MOST.items():
        if values[key] > most:
            raise InputError(f"{key} must be at most {most}, got {values[key]}")
    for key in SHARES:
        if not 0 < values[key] <= 1:
            raise InputError(f"{key} is a share, above 0 and at most 1; got {values[key]}")
    for key in AT_LEAST_0:
        if not values[key] >= 0:  # nan is not, either
            raise InputError(f"{key} must be at least 0, got {values[key]}")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} must be a finite number, got {value}")
    if config.quality.min_area >= config.quality.max_area:
        raise InputError(f"quality.min_area={config.quality.min_area} must be below quality.max_area")
    if "@" in (config.captions.base_url or ""):
        raise InputError(
            f"captions.base_url holds a name or password, which would be written beside the data; put a key into the "
            f"environment variable {config.captions.api_key_env} instead"
        )
    for (choice, value), keys in NEEDED.items():
        for key in keys:
            if values[choice] == value and values[key] is None:
                raise InputError(f"{choice}={value} needs {key}")
    if config.images.size % 8:
        raise InputError(f"images.size must be divisible by 8, got {config.images.size}")


def settle(config: DatagenConfig) -> None:
    """Claim the output folder for this config: its resolved form is written there, or agrees with what stands there.

    Raises:
        InputError: the folder holds shards, or captions, of another config; the message shows the difference.
    """
    out = Path(config.output)
    if (out / MADE_BY).exists():
        raise InputError(f"{out} holds what another command has made ({MADE_BY}); choose another output")
    kept, shards = out / "datagen.yaml", any(out.glob("*.tar"))
    now = asdict(config)
    if kept.exists():
        try:
            before, after = flat(OmegaConf.to_container(OmegaConf.load(kept))), flat(now)
        except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
            raise InputError(f"{kept} is damaged ({str(error).splitlines()[0]}): choose another output") from error
        changed = {
            key: f"\n  {key}: {before.get(key)} -> {after.get(key)}"
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key) and not key.startswith(PLACE)
        }
        of_captions = [key for key in changed if key.startswith(("captions.", "seed"))]
        if shards and changed:
            raise InputError(
                f"{out} holds shards of another config; choose another output, or remove it. The difference:"
                + "".join(changed.values())
            )
        if of_captions and any(out.glob("captions.jsonl*")):
            raise InputError(
                f"{out} holds captions of another config; choose another output, or remove them. The difference:"
                + "".join(changed[key] for key in of_captions)
            )
        if changed:
            shutil.rmtree(out / "work", ignore_errors=True)  # half-made, by the other config
    elif shards:
        raise InputError(f"{out} holds shards of another origin (there is no datagen.yaml); choose another output")
    write_text(kept, OmegaConf.to_yaml(OmegaConf.create(now)))
