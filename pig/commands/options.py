"""The flags of `generate`, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pig.data.images import REFERENCES, SEEDS
from pig.data.subjects import SubjectFolder, plain_prompts, read_subjects
from pig.data.transforms import load_image
from pig.errors import InputError, check_ranges
from pig.executors import ExecutorName
from pig.sampling.inpainting import check_mask

MOST_IMAGES = 100_000  # of a prompt
MOST_PIXELS = 16_384  # of a side


@dataclass
class Subjects:
    """What is drawn: the subject of some pictures under some prompts, or a whole benchmark."""

    references: list[Path] | None = None
    """Pictures of one subject. The object is cut out by the picture's alpha channel; without one, by `NAME.mask.png`
    beside it; without either, by the segmenter."""
    prompt: list[str] | None = None
    """One or several prompts, such as "a photo of a mug, on a beach"."""
    subjects: Path | None = None
    """In place of references and prompt: a folder of subjects in DreamBooth's layout."""
    prompts: Path | None = None
    """A text file with one prompt per line. With --subjects also a file in the format of `prompts_and_classes.txt`;
    default: that file in the subjects folder."""
    only: list[str] | None = None
    """With --subjects: draw only these subjects, by their folders' names."""
    step: int | None = None
    """For a model made by `tune`: which of the kept steps; by default the last one."""
    early: int | None = None
    """For `dreamblend:FOLDER`: the early checkpoint; by default the first of the kept steps."""
    late: int | None = None
    """For `dreamblend:FOLDER`: the late checkpoint; by default the last of the kept steps."""
    class_noun: str = ""
    """The class of the object in the references, such as mug. With --subjects the prompts file names the classes."""
    references_per_subject: int | None = None
    """Use only the first N pictures of each subject; default: all."""
    image: Path | None = None
    """Inpainting: the picture to draw into."""
    mask: Path | None = None
    """Inpainting: a mask of the same size as --image, white where to draw."""

    def read(self, reads_references: bool) -> list[SubjectFolder]:
        """
        Raises:
            InputError: what is given does not fit together, or cannot be read.
        """
        if self.subjects is not None:
            if self.references or self.prompt or self.image is not None:
                raise InputError(
                    "--subjects has references and prompts of its own; leave --references, --prompt, --image"
                )
            return read_subjects(self.subjects, self.prompts, self.only)
        if self.only is not None:
            raise InputError("--only is for --subjects")
        if self.prompt and self.prompts:
            raise InputError("give --prompt or --prompts")
        if self.prompts is not None:
            self.prompt = plain_prompts(self.prompts)
        if not self.prompt or (reads_references and not self.references):
            raise InputError(
                "give --references and --prompt (or --prompts, a file); or --subjects, for a whole benchmark"
            )
        if not all(text.strip() for text in self.prompt):
            raise InputError("--prompt: an empty prompt")
        return [SubjectFolder(REFERENCES, self.class_noun, tuple(self.references or ()), tuple(self.prompt))]

    def pictures(self) -> dict[str, Image.Image]:
        """What inpainting gives the pipeline's call."""
        if (self.image is None) != (self.mask is None):
            raise InputError("inpainting needs both --image and --mask")
        if self.image is None or self.mask is None:
            return {}
        image, mask = load_image(self.image).convert("RGB"), load_image(self.mask)
        check_mask(image, mask)
        return {"image": image, "mask_image": mask}


@dataclass
class Output:
    """How many pictures, and how they are drawn."""

    images_per_prompt: int = 4
    """Number of images per prompt; they use the seeds `seed`, `seed + 1`, ..."""
    seed: int = 0
    """The seed of the first image of each prompt."""
    height: int | None = None
    """Height in pixels, a multiple of 8; default: the model's own."""
    width: int | None = None
    """Width in pixels, a multiple of 8; default: the model's own."""
    batch_size: int = 8
    """Number of images drawn in one batch."""
    shard: str = "0/1"
    """With --subjects, I/N: draw only part I of N equal parts (I counts from 0). Run each part on its own device or
    machine."""
    executor: ExecutorName = "local"
    """With --subjects and several workers: `local` starts processes on this machine, `ray` uses the cluster at
    RAY_ADDRESS."""
    workers: int = 1
    """With --subjects: number of processes that draw at the same time; with GPUs, each uses one GPU."""
    threads: int = 1
    """CPU threads per worker, if there are several workers."""
    reference_cache: float = 0.0
    """GiB of CPU memory in which the references' features are kept, so that they need not be computed again."""
    save_references: bool = False
    """Write the objects cut out of the references into `OUT/cutouts` as transparent PNGs (`data_gen photos` can pack
    them)."""
    save_loops: bool = False
    """For methods that draw in loops (EZIGen): write the picture of each loop into `OUT/loops`."""

    def check(self) -> None:
        for name in ("images_per_prompt", "batch_size", "workers", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        check_ranges(**{"--images_per_prompt": (self.images_per_prompt, 1, MOST_IMAGES)})
        if not 0 <= self.seed <= SEEDS - self.images_per_prompt:  # beyond, seeds would name the same pictures again
            raise InputError(f"--seed must lie between 0 and 2^32 - images_per_prompt, got {self.seed}")
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None:
                check_ranges(**{f"--{name}": (side, 8, MOST_PIXELS)})
        check_ranges(reference_cache=(self.reference_cache, 0, 4096))
