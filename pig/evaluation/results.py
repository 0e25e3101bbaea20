"""What an evaluation found: `results.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pig.errors import InputError
from pig.evaluation.statistics import interval, rate_interval
from pig.files import parse_json, write_text

if TYPE_CHECKING:
    from pig.evaluation.metrics import PerSubject

RESULTS = "results.json"
PLANE = ("dino", "clip_t")  # what every result has
NUMBERS = (*PLANE, "clip_i", "dino_masked", "clip_i_masked", "diversity", "prompt_accuracy", "nearest_dino")
RATES = ("prompt_accuracy",)  # shares of images, of which each is a yes or a no
Score = dict[str, float]  # mean, low, high


@dataclass
class Result:
    """All of an evaluation; `results.json` holds it as it is.

    Attributes:
        scores: name -> mean and 95 % interval (cluster bootstrap over subjects). clip_t, clip_i, dino: see
            `pig.evaluation.metrics`; *_masked: of the object alone, on white; diversity: 1 - the DINO cosine between
            images of one prompt; prompt_accuracy: how often CLIP finds an image's own prompt the most similar of the
            subject's; clip_t_without_property: without prompts such as "a red dog".
        subjects: name -> score -> mean.
        groups: `live`, `object`, a kind of prompt, `seed N` -> score -> mean and interval.
        bounds: `real` (real pictures against each other), `copy` (the first one under every prompt) and, where
            given, `text_only`, scored by the same code.
        images: one entry per image; `clip_i_each` and `dino_each`: against each of the subject's photographs.
        moves: everything that moves the numbers; `hash` is its sha256.
    """

    protocol: str
    hash: str
    name: str
    scores: dict[str, Score]
    subjects: dict[str, dict[str, float]]
    groups: dict[str, dict[str, Score]]
    bounds: dict[str, dict[str, Score]]
    images: list[dict[str, Any]]
    photographs: dict[str, list[dict[str, str]]]
    missing: list[str]
    notes: list[str]
    images_folder: str
    moves: dict[str, Any]
    folder: Path = field(default=Path(), compare=False)  # where it was read from

    def per_subject(self) -> dict[str, list[float]]:
        """score -> the mean of each subject that has it."""
        return {name: [of[name] for of in self.subjects.values() if name in of] for name in self.scores}

    def write(self, out: Path) -> None:
        told = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_text(out / RESULTS, json.dumps(told, indent=1, allow_nan=False))

    @classmethod
    def read(cls, folder: Path) -> Result:
        """
        Raises:
            InputError: the folder holds no result of `evaluate`.
        """
        try:
            told = parse_json((folder / RESULTS).read_text(encoding="utf-8"))
            _check(told)
            return cls(**told, folder=folder)
        except OSError as error:
            raise InputError(f"{folder} holds no {RESULTS}: make it with `evaluate --out {folder}`") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / RESULTS} is no result of this version's `evaluate`: {error}") from error


KEY = re.compile(r"[\w-]{1,128}")


def _check(told: Any) -> None:
    """Somebody else may have made the file: its keys name files, its hash and protocol stand in pages.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(told, dict):
        raise ValueError("it is no object")
    json.dumps(told, ensure_ascii=False).encode()  # half a surrogate pair can be written nowhere
    kinds = {"protocol": str, "hash": str, "name": str, "images_folder": str, "images": list, "notes": list,
             "missing": list, "scores": dict, "subjects": dict, "groups": dict, "bounds": dict, "photographs": dict,
             "moves": dict}  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(told.get(name), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    for name in ("protocol", "hash"):
        _check_key(told[name], name)
    if not all(isinstance(note, str) for note in told["notes"]):
        raise ValueError("a note is no text")
    if absent := [name for name in PLANE if name not in told["scores"]]:
        raise ValueError(f"the score {absent[0]} is missing")
    if unknown := set(told["bounds"]) - {"real", "copy", "text_only"}:
        raise ValueError(f"an unknown bound {sorted(unknown)[0]!r}")
    for name in ("groups", "bounds", "subjects"):
        if not all(isinstance(of, dict) for of in told[name].values()):
            raise ValueError(f"{name} holds something else than scores")
    for scores in (told["scores"], *told["groups"].values(), *told["bounds"].values()):
        for score, of in scores.items():
            if not isinstance(of, dict) or not all(_is_number(of.get(name)) for name in ("mean", "low", "high")):
                raise ValueError(f"the score {score} has no mean, low and high")
    for means in told["subjects"].values():
        if not all(_is_number(mean) for mean in means.values()):
            raise ValueError("a subject's score is no number")
    for subject, photographs in told["photographs"].items():
        if not isinstance(photographs, list) or not photographs:
            raise ValueError(f"{subject} has no photographs")
        for one in photographs:
            if not isinstance(one, dict) or not isinstance(one.get("file"), str):
                raise ValueError(f"a photograph of {subject} has no file")
            _check_key(one.get("key"), "a photograph's key")
    for one in told["images"]:
        _check_image(one, told)


def _check_image(image: Any, told: dict[str, Any]) -> None:
    if not isinstance(image, dict):
        raise ValueError("an image is no object")
    for name in ("key", "nearest_key"):
        _check_key(image.get(name), f"an image's {name}")
    wanted = {"subject": str, "prompt": str, "prompt_index": int, "seed": str, "kind": str, "copied": bool, "file": str}
    for name, kind in wanted.items():
        if not isinstance(image.get(name), kind):
            raise ValueError(f"the {name} of an image is {str(image.get(name))[:80]!r}")
    for of in ("subjects", "photographs"):
        if image["subject"] not in told[of]:
            raise ValueError(f"{of} lacks the subject {image['subject'][:80]!r}")
    if odd := [score for score in NUMBERS if not _is_number(image.get(score, 0))]:
        raise ValueError(f"the {odd[0]} of an image is no number")
    file = PurePosixPath(image["file"])
    if file.is_absolute() or ".." in file.parts:
        raise ValueError(f"an image's file {str(file)!r} lies outside of the images folder")


def _check_key(key: Any, what: str) -> None:
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise ValueError(f"{what} {str(key)[:80]!r} is not made of letters, digits, _ and -")


def _is_number(value: Any) -> bool:
    """One that a score can be: no NaN, and nothing that overflows."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def notes_of(results: Sequence[Result]) -> list[str]:
    """All notes; those that not all results have with the name of whose they are."""
    shared = [note for note in results[0].notes if all(note in one.notes for one in results)]
    return [f"{one.name}: {note}" for one in results for note in one.notes if note not in shared] + shared


def summarise(metrics: Mapping[str, PerSubject]) -> dict[str, Score]:
    """Mean and 95 % interval of each score."""
    found = {}
    for name, metric in metrics.items():
        counts = None if metric.by_subject else metric.count[metric.count > 0].tolist()
        values = metric.per_subject().tolist()
        if name in RATES:
            low, high = rate_interval(values, metric.count[metric.count > 0].tolist())
        else:
            low, high = interval(values, counts)
            least, most = (0.0, 2.0) if name == "diversity" else (-1.0, 1.0)  # 1 - a cosine, or a cosine
            if all(least <= value <= most for value in values):  # not where a protocol multiplies it
                low, high = max(low, least), min(high, most)
        found[name] = {"mean": metric.compute().item(), "low": low, "high": high}
    return found
