"""What tuning on one subject reads: its pictures, and pictures of its class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from pig.data.loading import ResumableLoader
from pig.data.modules import PersonalisationData, seed_of_run
from pig.data.schema import Batch
from pig.data.subjects import SubjectFolder, read_subject
from pig.data.transforms import load_image, target_picture, to_bytes
from pig.errors import InputError, check_ranges
from pig.files import digest, digest_of

EPOCH = 1000  # steps of what Lightning calls an epoch: a pass over four pictures would end all the time


@dataclass
class ClassPictures:
    """Prior preservation (DreamBooth, arXiv 2208.12242, section 3.2): pictures of the class by the base model.

    They are drawn once, and kept for all subjects of the class.

    Attributes:
        folder: where the pictures are kept, as `CLASS/000.png`.
        count: pictures of each class.
        steps: sampling steps of each picture.
    """

    folder: str
    count: int = 200
    steps: int = 50

    def __post_init__(self) -> None:
        check_ranges(**{"data.prior.count": (self.count, 1, 10**6), "data.prior.steps": (self.steps, 1, 1000)})

    def of(self, noun: str) -> Path:
        return Path(self.folder) / noun.replace(" ", "_")

    def files(self, noun: str) -> list[Path]:
        return [self.of(noun) / f"{number:03d}.png" for number in range(self.count)]


def class_prompt(noun: str) -> str:
    return f"a photo of a {noun}"


class SubjectDataset(IterableDataset[Batch]):
    """1,000 batches an epoch. Subject pictures and class pictures are shuffled anew at each pass over them.

    Args:
        batch_size: pictures of the subject in a step; if there are class pictures, a step has as many of them besides.
        rank, world_size: of the process; each takes its share of a step.
    """

    encoded = None

    def __init__(
        self,
        subject: SubjectFolder,
        class_pictures: Sequence[Path],
        *,
        batch_size: int,
        resolution: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.noun, self.resolution, self.seed = subject.class_noun, resolution, seed
        self.files = {"subject": list(subject.images), "class": list(class_pictures)}
        self.kinds = [kind for kind, files in self.files.items() if files]
        self.each, self.batch_size = batch_size, batch_size * len(self.kinds)
        if self.batch_size < world_size:
            raise InputError(
                f"a step of {self.batch_size} pictures is less than one for each of {world_size} processes: raise "
                "data.batch_size, or lower trainer.devices"
            )
        self.rows = range(rank * self.batch_size // world_size, (rank + 1) * self.batch_size // world_size)
        self.first = 0

    def __len__(self) -> int:
        return EPOCH

    def start(self, *, epoch: int, first_batch: int) -> None:
        self.first = epoch * EPOCH + first_batch

    def fingerprint(self) -> str:
        names = [path.name for path in self.files["class"]]
        told = [digest_of(self.files["subject"]), names, self.batch_size, self.resolution, self.seed]
        return digest(told)

    @cached_property
    def pictures(self) -> dict[str, Tensor]:
        """Key -> (3, H, W) uint8."""
        return {
            f"{kind}/{path.name}": to_bytes(target_picture(load_image(path), self.resolution))
            for kind, files in self.files.items()
            for path in files
        }

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first, (self.first // EPOCH + 1) * EPOCH):
            yield self._batch(step)

    def _batch(self, step: int) -> Batch:
        chosen = []
        for row in self.rows:
            kind = self.kinds[row % len(self.kinds)]
            position = step * self.each + row // len(self.kinds)
            drawn = np.random.SeedSequence([self.seed, position, kind == "class"])
            chosen.append((kind, self._key(kind, position), int(drawn.generate_state(1, np.uint64)[0] >> 1)))
        kinds, keys, seeds = zip(*chosen, strict=True)
        return Batch(
            target=torch.stack([self.pictures[key].float() / 127.5 - 1 for key in keys]),
            reference=None,
            captions=[class_prompt(self.noun)] * len(keys),
            objects=[self.noun] * len(keys),
            seeds=torch.tensor(seeds, dtype=torch.int64),
            keys=list(keys),
            of_class=[kind == "class" for kind in kinds] if "class" in self.kinds else None,
        )

    def _key(self, kind: str, position: int) -> str:
        files = self.files[kind]
        passes, place = divmod(position, len(files))
        order = np.random.default_rng([self.seed, passes, kind == "class"]).permutation(len(files))
        return f"{kind}/{files[order[place]].name}"


class SubjectDataModule(PersonalisationData):
    """The pictures of one subject, to be tuned on; see `pig.training.tuned`.

    Args:
        subject: its folder, which holds the pictures.
        resolution: side of the pictures in pixels; they are cropped around their centre.
        class_noun: what they show, such as `dog`; by default what the `prompts_and_classes.txt` beside the folder says.
        batch_size: pictures of the subject in a step, over all processes; with `prior`, a step has as many class
            pictures besides.
        prior: pictures of the class, for prior preservation; null: none.
        seed: of order, noise and timesteps; by default `seed_everything`.
    """

    def __init__(
        self,
        subject: str | None = None,
        *,
        resolution: int,
        class_noun: str = "",
        batch_size: int = 1,
        prior: ClassPictures | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if resolution % 8 or resolution <= 0:
            raise InputError(f"data.resolution must be a multiple of 8, got {resolution}")
        check_ranges(**{"data.batch_size": (batch_size, 1, 10**6)})
        if subject is None:
            raise InputError("which subject? Give --data.subject DIR/NAME; for all: `tune --subjects DIR`")
        self.subject = read_subject(Path(subject), class_noun)
        if len(self.subject.images) < 2:
            raise InputError(
                f"{subject} holds one picture: a subject is tuned on several (3 to 5 in the papers), since a "
                "single one is learnt by heart. From one picture, draw by a method that is not tuned, such as BootPIG"
            )
        for path in self.subject.images:
            load_image(path)  # a damaged one is said now
        self.resolution, self.each, self.prior = resolution, batch_size, prior
        self.batch_size = batch_size * (1 if prior is None else 2)
        self.seed = seed_of_run(seed)

    def train_dataloader(self) -> ResumableLoader:
        dataset = SubjectDataset(
            self.subject,
            self.prior.files(self.subject.class_noun) if self.prior else [],
            batch_size=self.each,
            resolution=self.resolution,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        return ResumableLoader(dataset, num_workers=0, pin_memory=torch.cuda.is_available())
