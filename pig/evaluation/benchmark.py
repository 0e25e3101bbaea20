"""Score a folder of generated images against a folder of subjects. Reads image files only, whatever made them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from pig.data.images import read_generated
from pig.data.subjects import SubjectFolder
from pig.data.transforms import load_image
from pig.evaluation.metrics import SubjectScores
from pig.models.encoders import Clip, DinoEncoder


def score_folder(images: Path, subjects: list[SubjectFolder], clip: Clip, dino: DinoEncoder) -> dict[str, float]:
    """DINO, CLIP-I, CLIP-T and background accuracy of the images, as `SubjectScores` defines them."""
    return score_subjects(images, subjects, clip, dino).compute()


def score_subjects(images: Path, subjects: list[SubjectFolder], clip: Clip, dino: DinoEncoder) -> SubjectScores:
    scores = SubjectScores(len(subjects), clip, dino)
    order = {subject.name: index for index, subject in enumerate(subjects)}
    for name, group in groupby(read_generated(images, subjects), key=lambda found: found[0].subject.name):
        found = list(group)
        subject = subjects[order[name]]
        scores.update(
            order[name],
            [load_image(path) for _, path in found],
            [job.prompt_index for job, _ in found],
            [load_image(path) for path in subject.images],
            subject.prompts,
        )
    return scores
