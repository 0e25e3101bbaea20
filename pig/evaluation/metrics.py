"""Subject and prompt fidelity (CLIP-T, CLIP-I, DINO; DreamBooth, arXiv 2208.12242, section 4.1): networks and metrics.

All scores are plain cosines in [-1, 1]. Metrics average within a subject first, then over subjects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchvision.transforms.v2 import functional as tv
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer, ViTModel

from pig.errors import InputError


class ClipEncoder:
    """CLIP in transformers' format: shorter side to S (bicubic), centre crop S, the checkpoint's mean and deviation."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.model = _load(CLIPModel, folder).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        self.mean, self.std = processor.image_mean, processor.image_std
        self.size = self.model.config.vision_config.image_size

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D), unit length."""
        pixels = preprocess(pictures, resize=self.size, crop=self.size, mean=self.mean, std=self.std)
        return F.normalize(self.model.get_image_features(pixels.to(self.model.device)).pooler_output, dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D), unit length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        return F.normalize(self.model.get_text_features(tokens.input_ids).pooler_output, dim=-1).cpu()


class DinoEncoder:
    """A DINO ViT in transformers' format: shorter side to 256/224 S (bicubic), centre crop S; the [CLS] token."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.model = _load(ViTModel, folder, add_pooling_layer=False).to(device).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        self.mean, self.std = processor.image_mean, processor.image_std
        self.size = self.model.config.image_size

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D), unit length."""
        resize = round(self.size * 256 / 224)
        pixels = preprocess(pictures, resize=resize, crop=self.size, mean=self.mean, std=self.std)
        return F.normalize(self.model(pixels.to(self.model.device)).last_hidden_state[:, 0], dim=-1).cpu()


def _load(kind: Any, folder: str | Path, **options: object) -> Any:
    try:
        return kind.from_pretrained(folder, dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load a {kind.__name__} from {str(folder)!r}: {str(error).splitlines()[0]}") from error


def preprocess(
    pictures: Sequence[Image.Image], *, resize: int, crop: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """(N, 3, crop, crop): shorter side to `resize` by PIL's bicubic filter, centre crop, standardised."""
    tensors = []
    for picture in pictures:
        resized = tv.resize(picture.convert("RGB"), [resize], interpolation=tv.InterpolationMode.BICUBIC)
        tensors.append(tv.to_dtype(tv.pil_to_tensor(tv.center_crop(resized, [crop, crop])), torch.float32, scale=True))
    return tv.normalize(torch.stack(tensors), list(mean), list(std))


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
        seen = self.count > 0
        return (self.total[seen] / self.count[seen]).mean()


class SubjectScores:
    """The scores of a set of generated images, fed subject by subject; each a `SubjectMean`.

    dino, clip_i: cosine of every (generated, real) pair. clip_t: cosine of image and prompt. background_accuracy:
    how often, of all the subject's prompts, CLIP finds an image's own one the most similar.
    """

    def __init__(self, subjects: int, clip: ClipEncoder, dino: DinoEncoder) -> None:
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
