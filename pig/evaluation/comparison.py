"""What is compared with what: generated images, their prompts and the photographs of their subjects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pig.data.images import Generated
from pig.data.subjects import SubjectFolder, prompt_kind
from pig.evaluation.embeddings import Looked
from pig.evaluation.metrics import (
    PerSubject,
    PromptFidelity,
    SubjectFidelity,
    SubjectMean,
    prompt_fidelity,
    subject_fidelity,
)
from pig.evaluation.protocols import Protocol
from pig.evaluation.results import Score, summarise
from pig.models.encoders import Clip

PAIRED = ("clip_i", "dino", "clip_i_masked", "dino_masked")
FEATURE = {"clip_i": "clip", "dino": "dino", "clip_i_masked": "clip_masked", "dino_masked": "dino_masked"}
Metrics = Mapping[str, PerSubject]
SAME = 0.999  # DINO cosine of a picture and its copy


@dataclass(frozen=True)
class Row:
    """A generated image: what is told of it in the result, and what the networks saw."""

    told: dict[str, Any]
    image: Generated
    looked: Looked


class Comparison:
    """Subjects with what the networks saw of their photographs and prompts, by one protocol."""

    def __init__(
        self, subjects: Sequence[SubjectFolder], protocol: Protocol, clip: Clip, looked: Mapping[Path, Looked]
    ) -> None:
        self.protocol, self.looked = protocol, looked
        self.order = {subject.name: index for index, subject in enumerate(subjects)}
        self.photographs = {one.name: [path for path in one.images if path in looked] for one in subjects}
        prompts = {one.name: one.prompts_with(protocol.identifier) for one in subjects}
        distinct = list(dict.fromkeys(text for texts in prompts.values() for text in texts))
        features = torch.cat([clip.texts(distinct[at : at + 64]) for at in range(0, len(distinct), 64)])
        seen = dict(zip(distinct, features, strict=True))
        self.texts = {name: torch.stack([seen[text] for text in texts]) for name, texts in prompts.items()}

    def real(self, subject: str, score: str) -> Tensor:
        """(M, D): the photographs that the protocol compares with, those that have such a feature."""
        paths = self.photographs[subject] if self.protocol.all_references else self.photographs[subject][:1]
        return features_of([self.looked[path] for path in paths], score)

    def rows(self, found: Iterable[Generated]) -> list[Row]:
        """The images that the protocol counts, in their order, with every single score."""
        rows: list[Row] = []
        for subject, group in groupby(found, key=lambda one: one.subject):
            there = [one for one in group if one.path in self.looked]
            if not self.protocol.all_images:
                there = [next(some) for _, some in groupby(there, key=lambda one: one.prompt_index)]
            if there:
                photographs = features_of([self.looked[path] for path in self.photographs[subject.name]], "dino")
                real = {score: self.real(subject.name, score) for score in PAIRED}
                limit = copy_limit(photographs)
                rows += [self._row(one, real, photographs, limit) for one in there]
        for _, alike in groupby(rows, key=lambda row: (row.image.subject.name, row.image.prompt_index)):
            add_diversity(list(alike))
        return rows

    def _row(self, one: Generated, real: Mapping[str, Tensor], photographs: Tensor, limit: float) -> Row:
        """real: as `self.real`. photographs: DINO features of all; limit: what is closer to one is a copy."""
        subject, looked, index = one.subject, self.looked[one.path], one.prompt_index
        clip, texts = looked.features["clip"][None], self.texts[subject.name]
        closeness = subject_fidelity(looked.features["dino"][None], photographs)[0]
        nearest = int(closeness.argmax())
        highest = closeness[nearest].item()
        told: dict[str, Any] = {
            "subject": subject.name,
            "prompt_index": index,
            "seed": one.seed,
            "file": "/".join(one.path.parts[-3:]),
            "key": looked.key,
            "prompt": subject.prompts[index],
            "kind": prompt_kind(subject.templates[index]),
            "live": subject.live,
            "clip_t": prompt_fidelity(clip, texts[index]).item() * self.protocol.clip_t_factor,
            "prompt_accuracy": float(int((clip @ texts.T).argmax()) == index),
            "nearest": self.photographs[subject.name][nearest].name,
            "nearest_key": self.looked[self.photographs[subject.name][nearest]].key,
            "nearest_dino": highest,
            "copied": highest > limit,
        }
        for score in PAIRED:
            each = subject_fidelity(features_of([looked], score), real[score]).flatten().tolist()
            if each:
                told |= {score: fmean(each), f"{score}_each": each}
        return Row(told, one, looked)

    def metrics(self, rows: Sequence[Row]) -> dict[str, PerSubject]:
        """Each score as the metric that averages it; scores that none of the rows has are left out."""
        size, by_subject = len(self.order), self.protocol.by_subject
        clip_t = PromptFidelity(size, by_subject, self.protocol.clip_t_factor)
        plain = PromptFidelity(size, by_subject, self.protocol.clip_t_factor)
        paired = {score: SubjectFidelity(size, by_subject) for score in PAIRED}
        diversity, accuracy = SubjectMean(size, by_subject), SubjectMean(size, by_subject)
        for name, group in groupby(rows, key=lambda row: row.image.subject.name):
            of, subject = list(group), self.order[name]
            clip_t.update(features_of([row.looked for row in of], "clip_i"), self._own_texts(of), subject)
            if others := [row for row in of if row.told["kind"] != "property"]:
                plain.update(features_of([row.looked for row in others], "clip_i"), self._own_texts(others), subject)
            for score, metric in paired.items():
                metric.update(features_of([row.looked for row in of], score), self.real(name, score), subject)
            diversity.update(torch.tensor([row.told["diversity"] for row in of if "diversity" in row.told]), subject)
            accuracy.update(torch.tensor([row.told["prompt_accuracy"] for row in of]), subject)
        metrics = {"clip_t": clip_t, **paired, "diversity": diversity, "prompt_accuracy": accuracy}
        if 0 < plain.count.sum() < clip_t.count.sum():
            metrics["clip_t_without_property"] = plain
        return {name: metric for name, metric in metrics.items() if metric.count.any()}

    def _own_texts(self, rows: Sequence[Row]) -> Tensor:
        return torch.stack([self.texts[row.image.subject.name][row.image.prompt_index] for row in rows])

    def summary(self, rows: Sequence[Row]) -> dict[str, Score]:
        return summarise(self.metrics(rows))

    def bounds(self, subjects: Iterable[str]) -> dict[str, dict[str, PerSubject]]:
        """`real`: photographs against their subject's others; `copy`: the first one as the image of every prompt."""
        size, by_subject = len(self.order), self.protocol.by_subject
        real: dict[str, PerSubject] = {score: SubjectFidelity(size, by_subject) for score in PAIRED}
        copy: dict[str, PerSubject] = {score: SubjectFidelity(size, by_subject) for score in PAIRED}
        copy["clip_t"] = PromptFidelity(size, by_subject, self.protocol.clip_t_factor)
        for name in subjects:
            subject = self.order[name]
            photographs = [self.looked[path] for path in self.photographs[name]]
            for score in PAIRED:
                against, images = self.real(name, score), features_of(photographs, score)
                for index, image in enumerate(images):
                    others = against[torch.arange(len(against)) != index]
                    real[score].update(image[None], others, subject)
                copy[score].update(images[:1], against, subject)
            texts = self.texts[name]
            copy["clip_t"].update(features_of(photographs[:1], "clip_i").expand(len(texts), -1), texts, subject)
        found = {"real": real, "copy": copy}
        return {
            bound: {score: metric for score, metric in metrics.items() if metric.count.any()}
            for bound, metrics in found.items()
        }

    def by_subject(self, metrics: Metrics) -> dict[str, dict[str, float]]:
        """subject -> score -> mean; subjects without images are left out."""
        found = {
            name: {score: (one.total[i] / one.count[i]).item() for score, one in metrics.items() if one.count[i]}
            for name, i in self.order.items()
        }
        return {name: means for name, means in found.items() if means}


def features_of(looked: Sequence[Looked], score: str) -> Tensor:
    """(N, D) of those pictures that have what this score compares; (0, 1) if none has."""
    found = [one.features[FEATURE[score]] for one in looked if FEATURE[score] in one.features]
    return torch.stack(found) if found else torch.zeros(0, 1)


def add_diversity(rows: Sequence[Row]) -> None:
    """To each image of one prompt: 1 - its mean DINO cosine with the others, where there are others."""
    if len(rows) < 2:
        return
    features = features_of([row.looked for row in rows], "dino").double()
    cosines = features @ features.T
    for row, own, total in zip(rows, cosines.diagonal(), cosines.sum(1), strict=True):
        row.told["diversity"] = 1 - ((total - own) / (len(rows) - 1)).item()


def copy_limit(photographs: Tensor) -> float:
    """The highest DINO cosine of two photographs that are not the same one; at most that of a plain copy."""
    cosines = subject_fidelity(photographs, photographs)[~torch.eye(len(photographs), dtype=torch.bool)]
    apart = cosines[cosines < SAME]
    return apart.max().item() if len(apart) else SAME


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Live and object, each kind of prompt, each of up to 8 seeds; where there are at least two of a sort."""
    seeds = len({row.image.seed for row in rows})
    sorts = [
        ["live" if row.image.subject.live else "object" for row in rows],
        [row.told["kind"] for row in rows],
        [f"seed {row.image.seed}" for row in rows] if seeds <= 8 else [],
    ]
    return {
        name: [row for row, own in zip(rows, names, strict=True) if own == name]
        for names in sorts
        if len(set(names)) > 1
        for name in sorted(set(names))
    }


def copy_notes(
    rows: Sequence[Row], subjects: Mapping[str, Mapping[str, float]], real: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """subjects, real: subject -> score -> mean, of the images and of the photographs against each other."""
    notes = []
    if copied := [row.told["file"] for row in rows if row.told["copied"]]:
        notes.append(
            f"copy alarm: {len(copied)} images are closer to a photograph than any two photographs of their subject "
            f"are to each other: {', '.join(copied[:3])}{' ...' if len(copied) > 3 else ''}"
        )
    both = [name for name in subjects if "dino" in real.get(name, {})]
    if both:
        images, bound = (fmean(of[name]["dino"] for name in both) for of in (subjects, real))
        if images > bound:
            notes.append(f"copy alarm: DINO {images:.3f} lies above the bound of real pictures, {bound:.3f}")
    return notes


def size_notes(rows: Sequence[Row]) -> list[str]:
    counts = Counter(row.looked.size for row in rows)
    if len(counts) < 2:
        return []
    example = {row.looked.size: row.told["file"] for row in reversed(rows)}
    told = [f"{w}x{h} ({count}, such as {example[w, h]})" for (w, h), count in counts.most_common(5)]
    return [f"images of {len(counts)} sizes: {', '.join(told)}"]
