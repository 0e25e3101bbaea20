"""What a tournament has found: scores over training seeds, differences, ranks, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pig.commands.tournament import plan
from pig.commands.tournament.config import Claim, Tournament
from pig.errors import check_kinds
from pig.evaluation.compare import Difference, corrected, difference
from pig.evaluation.results import Result
from pig.evaluation.statistics import expanded_level
from pig.files import read_json
from pig.training.tuned import TOLD

COMPARED = ("dino", "clip_t")
DRAWS = 10_000  # of the bootstrap
LEVEL = 0.05  # of p, below which a claim is told


@dataclass(frozen=True)
class Standing:
    """A method with a budget under a condition; `results`: one for each training seed. seeds: of training, none where
    nothing is trained."""

    method: str
    budget: str
    condition: str
    results: tuple[Result, ...]
    seeds: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return plan.name_of(self.method, self.budget)

    def per_subject(self, score: str, kind: str = "") -> dict[str, float]:
        """Subject -> its mean over images, then over training seeds. kind: of prompts; all by default."""
        return mean_of([per_subject(one, score, kind) for one in self.results])

    def spread(self, score: str) -> float:
        """How far the means of the training seeds lie apart."""
        means = [fmean(per_subject(one, score).values()) for one in self.results]
        return max(means) - min(means)

    def copied(self, kind: str = "") -> float:
        """The share of images that are as good as copies of a photograph."""
        return fmean(image["copied"] for one in self.results for image in one.images if kind in ("", image["kind"]))


def per_subject(result: Result, score: str, kind: str = "") -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for image in result.images:
        if score in image and kind in ("", image["kind"]):
            found.setdefault(image["subject"], []).append(image[score])
    return {name: fmean(values) for name, values in found.items()}


def mean_of(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of those that all have."""
    shared = [name for name in each[0] if all(name in one for one in each)]
    return {name: fmean(one[name] for one in each) for name in shared}


def selection(result: Result) -> float:
    """By which a method's settings are chosen, as its best checkpoint is: the geometric mean of DINO and CLIP-T."""
    dino, clip_t = (max(0.0, result.scores[name]["mean"]) for name in COMPARED)
    return (dino * clip_t) ** 0.5


def trials_of(config: Tournament, method: str) -> dict[str, Result]:
    """Each trial's words, and what it has scored on the validation subjects."""
    lines = enumerate(config.methods[method].trials)
    return {line: Result.read(plan.trial_folder(config, method, number) / "scores") for number, line in lines}


def read_standings(config: Tournament, guests: Sequence[Path]) -> list[Standing]:
    """In the order of the config, each method's conditions one after the other; guests last."""
    of: dict[tuple[str, str, str], dict[int, Result]] = {}
    for one in plan.entries(config):
        for condition in plan.conditions(config, one):
            result = Result.read(one.folder / "scores" / condition.slug)
            of.setdefault((one.method, one.budget, condition.name), {})[one.seed] = result
    found = [
        Standing(*key, tuple(results.values()), () if config.methods[key[0]].kind == "base" else tuple(results))
        for key, results in of.items()
    ]
    for folder in guests:
        result = Result.read(plan.guest_folder(config, folder))
        found.append(Standing(result.name, "", "", (result,)))
    return found


def of_shared_seeds(standings: Sequence[Standing]) -> list[Standing]:
    """The same with the training seeds alone that all of them have, of those that are trained; where no seed is shared,
    with all."""
    trained = [set(one.seeds) for one in standings if one.seeds]
    shared = set.intersection(*trained) if trained else set()
    found = []
    for one in standings:
        kept = {seed: result for seed, result in zip(one.seeds, one.results, strict=False) if seed in shared}
        found.append(replace(one, seeds=tuple(kept), results=tuple(kept.values())) if kept else one)
    return found


def main_standings(standings: Sequence[Standing]) -> list[Standing]:
    """Of each method and budget the first condition."""
    firsts: dict[tuple[str, str], Standing] = {}
    for one in standings:
        firsts.setdefault((one.method, one.budget), one)
    return list(firsts.values())


@dataclass(frozen=True)
class Tested:
    """A claim beside what was found: the difference of its two entries, of which `p_holm` is corrected for all claims;
    None where no image has the score."""

    claim: Claim
    gap: Difference | None

    @property
    def verdict(self) -> str:
        if self.gap is None:
            return "not scored"
        if self.gap.low == self.gap.high == 0:
            return "the same images"
        if self.gap.p_holm >= LEVEL:
            return "cannot be told"
        return "holds" if self.gap.mean > 0 else "does not hold"


def judge(config: Tournament, standings: Sequence[Standing]) -> list[Tested]:
    of = {name: one for one in reversed(standings) for name in (one.name, f"{one.name}, {one.condition}")}
    found = [
        _difference(f"{one.higher} - {one.lower}", of[one.higher], of[one.lower], one.score, one.prompts)
        for one in config.claims
    ]
    told = iter(corrected([gap for gap in found if gap is not None]))
    return [Tested(one, None if gap is None else next(told)) for one, gap in zip(config.claims, found, strict=True)]


def gaps(
    against: Sequence[Standing], others: Sequence[Standing], score: str, *, conditions: bool = False
) -> list[Difference]:
    """Of each of `others` to the one of `against` that was given the same, else to the first. conditions: whether they
    are called by what they were given, too."""
    found = []
    for other in others:
        base = next((one for one in against if one.condition == other.condition), against[0])
        name = f"{other.name}, {other.condition}" if conditions else other.name
        found.append(_difference(name, other, base, score))
    return corrected([gap for gap in found if gap is not None])


def _difference(name: str, one: Standing, other: Standing, score: str, kind: str = "") -> Difference | None:
    high, low = (standing.per_subject(score, kind) for standing in of_shared_seeds([one, other]))
    pairs = [high[subject] - low[subject] for subject in high if subject in low]
    return difference(name, score, pairs) if pairs else None


def ranks(standings: Sequence[Standing], score: str) -> dict[str, tuple[int, int, int]]:
    """Name -> rank by the mean over subjects (1 is the highest), and its 95 % interval, subjects drawn again."""
    each = [one.per_subject(score) for one in standings]
    shared = [name for name in each[0] if all(name in one for one in each)]
    values = np.array([[one[name] for name in shared] for one in each])  # (entries, subjects)
    rng, level = np.random.default_rng(0), expanded_level(max(2, len(shared)))
    ends = [50 * (1 - level), 50 * (1 + level)]
    draws = rng.integers(0, len(shared), (DRAWS, len(shared)))
    means = np.concatenate([values.mean(1)[:, None], values[:, draws].mean(2)], axis=1)  # (entries, 1 + DRAWS)
    places = 1 + (means[:, None] < means[None]).sum(1)  # equal ones share the higher rank
    found = {}
    for one, place in zip(standings, places, strict=True):
        low, high = np.percentile(place[1:], ends, method="nearest")
        found[one.name] = (int(place[0]), int(low), int(high))
    return found


def ledger(config: Tournament) -> list[dict[str, Any]]:
    """What each method has cost, trained on equal samples and for equal time; None where it does not apply.

    training_*: mean over seeds. tuning_*: of a subject, mean over subjects. class_*: of a class's pictures, which a
    tuning with prior preservation needs; mean over classes. machines: that trainings and tunings ran on.
    """
    rows = []
    for name, budget in dict.fromkeys((one.method, one.budget) for one in plan.entries(config)):
        made_by, source = config.weights_of(name)
        costs: list[dict[str, Any]] = []
        row = {
            **picture_of(config, name),
            "method": plan.name_of(name, budget),
            "trained_weights": picture_of(config, made_by)["trained_weights"],
        }
        if source.kind == "trained":
            runs = [plan.training_folder(config, made_by, budget, seed) for seed in config.seeds_of(name)]
            costs = [plan.cost_of(source, run) for run in runs]
            row |= training_costs(costs)
        elif source.kind == "tuned":
            folders = [plan.training_folder(config, made_by, plan.TUNED, seed) for seed in config.seeds_of(name)]
            steps = sorted(step for folder in folders for step in (folder / plan.MODELS).glob("*/step-*"))
            costs = [plan.cost_of(source, one) for one in dict.fromkeys(one.parent for one in steps)]
            found = training_costs(costs)
            last = max(int(step.name.partition("-")[2]) for step in steps)
            flag = "late" if config.methods[name].kind == "blended" else "step"  # where on the tuning it is drawn
            share = config.number(flag, last, plan.chosen(config, name)) / last
            found |= {key: found[key] * share for key in ("training_samples", "training_seconds", "training_flops")}
            row |= {f"tuning{key.removeprefix('training')}": value for key, value in found.items()}
            if prior := config.prior_of(source):
                row |= class_costs(Path(prior["folder"]))
        rows.append(row | {"machines": sorted({one["machine"] for one in costs})})
    return rows


def class_costs(folder: Path) -> dict[str, Any]:
    """What drawing the pictures of a class has cost; see `pig.training.tuned.draw_class_pictures`."""
    found = []
    for file in sorted(folder.glob(f"*/{TOLD}")):
        told = read_json(file, "")
        if "flops" in told:  # not where drawing was killed behind its last picture
            check_kinds(told, dict.fromkeys(("flops", "seconds"), (int, float)), str(file))
            found.append(told)
    return {f"class_{key}": fmean(one[key] for one in found) for key in ("flops", "seconds")} if found else {}


def picture_of(config: Tournament, method: str) -> dict[str, Any]:
    """What the command `cost` has measured of a method's picture."""
    file = config.folder() / method / "picture.json"
    picture = read_json(file, f"{file} is missing: start the tournament again")
    counts = ("trained_weights", "flops_per_picture", "peak_memory_bytes")
    check_kinds(picture, {**dict.fromkeys(counts, int), "seconds_per_picture": float}, str(file))
    return picture


def training_costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "training_samples": fmean(one["samples"] for one in runs),
        "training_seconds": fmean(one["seconds"] for one in runs),
        "training_flops": fmean(one["flops_per_sample"] * one["samples"] for one in runs),
        "training_memory_bytes": max(one["peak_memory_bytes"] for one in runs),
    }
