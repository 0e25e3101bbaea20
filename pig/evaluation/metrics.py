"""Subject and prompt fidelity (CLIP-T, CLIP-I, DINO; DreamBooth, arXiv 2208.12242, section 4.1) as metrics.

All scores are plain cosines in [-1, 1]. Metrics average within a subject first, then over subjects, unless told
otherwise; their sums reduce over processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from pig.models.encoders import Clip, ImageEncoder


def prompt_fidelity(images: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T: (N,) cosines of images (N, D) and the texts of their prompts (N, D), both of unit length."""
    return (images * texts).sum(-1)


def subject_fidelity(generated: Tensor, real: Tensor) -> Tensor:
    """CLIP-I or DINO: (N, M) cosines of every pair of generated (N, D) and real (M, D) images of unit length."""
    if not len(generated) or not len(real):
        return torch.zeros(len(generated), len(real))
    return generated @ real.T


class PerSubject(Metric):
    """Mean over subjects of the mean over a subject's values; subjects without values do not count.

    by_subject: False for the mean over all values at once.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, subjects: int, by_subject: bool = True) -> None:
        super().__init__()
        self.by_subject = by_subject
        self.add_state("total", torch.zeros(subjects, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(subjects, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Tensor, subject: int) -> None:
        """values: any shape, all of the subject with this index."""
        self.total[subject] += values.double().sum().to(self.total.device)
        self.count[subject] += values.numel()

    def compute(self) -> Tensor:
        """NaN where there is no value at all."""
        return self.per_subject().mean() if self.by_subject else self.total.sum() / self.count.sum()

    def per_subject(self) -> Tensor:
        """The means of the subjects that have values."""
        seen = self.count > 0
        return self.total[seen] / self.count[seen]


class SubjectMean(PerSubject):
    """Of values found elsewhere."""

    def update(self, values: Tensor, subject: int) -> None:
        self.add(values, subject)


class PromptFidelity(PerSubject):
    """CLIP-T, times `factor`."""

    def __init__(self, subjects: int, by_subject: bool = True, factor: float = 1.0) -> None:
        super().__init__(subjects, by_subject)
        self.factor = factor

    def update(self, images: Tensor, texts: Tensor, subject: int) -> None:
        """Features (N, D) of a subject's images, and (N, D) of the prompt of each."""
        self.add(prompt_fidelity(images, texts) * self.factor, subject)


class SubjectFidelity(PerSubject):
    """CLIP-I, or DINO: by whose features."""

    def update(self, generated: Tensor, real: Tensor, subject: int) -> None:
        """Features (N, D) of a subject's generated images and (M, D) of its real ones."""
        self.add(subject_fidelity(generated, real), subject)


class SubjectScores:
    """The three scores of pictures in memory, fed subject by subject; for validation while training."""

    def __init__(self, subjects: int, clip: Clip, dino: ImageEncoder) -> None:
        self.clip, self.dino = clip, dino
        self.clip_t, self.clip_i = PromptFidelity(subjects), SubjectFidelity(subjects)
        self.dino_similarity = SubjectFidelity(subjects)

    def update(
        self, subject: int, generated: Sequence[Image.Image], prompts: Sequence[str], real: Sequence[Image.Image]
    ) -> None:
        """Generated images of a subject, the prompt of each, and the subject's real images."""
        images = self.clip.images(generated)
        self.clip_t.update(images, self.clip.texts(prompts), subject)
        self.clip_i.update(images, self.clip.images(real), subject)
        self.dino_similarity.update(self.dino.images(generated), self.dino.images(real), subject)

    @property
    def metrics(self) -> dict[str, PerSubject]:
        return {"clip_t": self.clip_t, "clip_i": self.clip_i, "dino": self.dino_similarity}
