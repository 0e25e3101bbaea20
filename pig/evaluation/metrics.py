"""Subject and prompt fidelity (CLIP-T, CLIP-I, DINO; DreamBooth, arXiv 2208.12242, section 4.1) as metrics.

All scores are plain cosines in [-1, 1]. Metrics average within a subject first, then over subjects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from pig.models.encoders import Clip, DinoEncoder


class SubjectMean(Metric):
    """Mean over subjects of the mean over a subject's values; subjects without values do not count."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, subjects: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(subjects, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(subjects, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, subject: int) -> None:
        """values: any shape, all of the subject with this index."""
        self.total[subject] += values.double().sum()
        self.count[subject] += values.numel()

    def compute(self) -> Tensor:
        return self.per_subject().mean()

    def per_subject(self) -> Tensor:
        """The means of the subjects that have values."""
        seen = self.count > 0
        return self.total[seen] / self.count[seen]


class SubjectScores:
    """The scores of a set of generated images, fed subject by subject; each a `SubjectMean`.

    dino, clip_i: cosine of every (generated, real) pair. clip_t: cosine of image and prompt. background_accuracy:
    how often, of all the subject's prompts, CLIP finds an image's own one the most similar.
    """

    def __init__(self, subjects: int, clip: Clip, dino: DinoEncoder) -> None:
        self.clip, self.dino = clip, dino
        names = ("dino", "clip_i", "clip_t", "background_accuracy")
        self.metrics = {name: SubjectMean(subjects) for name in names}

    def update(
        self,
        subject: int,
        generated: Sequence[Image.Image],
        prompt_indices: Sequence[int],
        real: Sequence[Image.Image],
        prompts: Sequence[str],
    ) -> None:
        """All generated images of a subject, the prompt of each by index, its real images and all its prompts."""
        image, text = self.clip.images(generated), self.clip.texts(prompts)
        similarity, own = image @ text.T, torch.tensor(prompt_indices)
        self.metrics["dino"].update(self.dino.images(generated) @ self.dino.images(real).T, subject)
        self.metrics["clip_i"].update(image @ self.clip.images(real).T, subject)
        self.metrics["clip_t"].update(similarity.gather(1, own[:, None]), subject)
        self.metrics["background_accuracy"].update((similarity.argmax(1) == own).float(), subject)

    def compute(self) -> dict[str, float]:
        return {name: metric.compute().item() for name, metric in self.metrics.items()}
