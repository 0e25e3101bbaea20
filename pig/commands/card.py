"""The model card of an exported folder: README.md with the fields that the hub reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from pig.commands.generate import cut_out_all
from pig.commands.options import Subjects
from pig.errors import InputError
from pig.files import write_text
from pig.models.names import TOYWORLD
from pig.sampling.delta import DELTA
from pig.sampling.pipeline import SubjectPipeline

log = logging.getLogger(__name__)

CARD = "README.md"
OWN = {"base": "apache-2.0", "generator": "apache-2.0", "data": "apache-2.0"}  # of the toy world


@dataclass
class Licences:
    """The licences that the model card names. Those of the toy world are known."""

    base_licence: str = ""
    """For the model card: licence of the base model as the hub names it, such as openrail++."""
    generator_licence: str = ""
    """For the model card: licence of the text-to-image model that generated the training pictures, if there was one."""
    data_licence: str = ""
    """For the model card: licence of the training data."""

    def told(self, base: str) -> dict[str, str]:
        own = OWN if base == TOYWORLD else {}
        given = {"base": self.base_licence, "generator": self.generator_licence, "data": self.data_licence}
        return {name: value or own.get(name, "not stated") for name, value in given.items()}


@dataclass
class Example:
    """What the card shows."""

    references: list[Path] | None = None
    """For the examples on the model card: pictures of a subject, from which the model draws."""
    prompt: list[str] | None = None
    """For the examples on the model card: prompts; each is drawn with two seeds."""
    class_noun: str = ""
    """The class of the object in the references, such as mug."""


def examples(pipeline: SubjectPipeline, example: Example) -> list[tuple[str, int, Image.Image]]:
    """Prompt, seed and picture of what the card shows: none, where no prompt is given."""
    if not example.prompt:
        if example.references:
            raise InputError("--references are for the card's pictures, with --prompt")
        return []
    what = Subjects(references=example.references, prompt=example.prompt, class_noun=example.class_noun)
    (subject,) = what.read(pipeline.reads_references)
    for doubt in pipeline.doubts(subject.prompts, None, None):
        log.warning(doubt)
    cutouts = cut_out_all([subject], None)[subject.name] if pipeline.reads_references else None
    return [
        (prompt, seed, pipeline(prompt, cutouts, class_noun=subject.class_noun, generator=generator).images[0])
        for prompt in subject.prompts
        for seed in (0, 1)
        for generator in [torch.Generator().manual_seed(seed)]
    ]


def write_card(
    pipeline: SubjectPipeline, folder: Path, licences: Licences, drawn: Sequence[tuple[str, int, Image.Image]]
) -> None:
    """README.md and the example's pictures into a model's folder."""
    base = str(pipeline.config.base)
    told = licences.told(base)
    delta = (folder / DELTA).is_file()
    reads = ", [Image.open('my_subject.jpg')]" if pipeline.reads_references else ""
    settings = json.dumps(pipeline.settings().as_json())
    code = (
        'from pig.methods import load_pipeline\n\npipeline = load_pipeline("FOLDER")\n'
        if delta or pipeline.kept_apart
        else "from diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER", trust_remote_code=True)\n'
    )
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"base_model: {json.dumps(base)}",
        f"license: {told['base'] if told['base'] != 'not stated' else 'other'}",
        f"tags: [pig, {pipeline.method}, personalisation]",
        "---",
        "",
        f"# {pipeline.method} on {base}",
        "",
        f"Made by pig: method `{pipeline.method}`, base model `{base}`"
        + (", the trained weights alone." if delta else "."),
        "",
        "| licence of | |",
        "|---|---|",
        *(f"| {name} | {licence} |" for name, licence in told.items()),
        "",
        "```python",
        *code.splitlines(),
        f'image = pipeline("a photo of a mug, on a beach"{reads}, class_noun="mug").images[0]',
        "```",
        "",
        f"Its settings, where a call names no others: `{settings}`",
        "",
    ]
    for number, (prompt, seed, picture) in enumerate(drawn):
        file = f"example_{number}.png"
        picture.save(folder / file)
        lines += [f"![{prompt}, seed {seed}]({file})", "", f"`{prompt}`, seed {seed}, on the CPU", ""]
    write_text(folder / CARD, "\n".join(lines))


def check_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub {name!r} is no model's name on the hub, such as me/my-dog: {error}") from error


def push(folder: Path, name: str) -> str:
    """Upload a model's folder to the hub; returns its address there.

    Raises:
        InputError: no such account, no token, or no way to the hub.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except Exception as error:  # of whichever library speaks to the hub
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"--push_to_hub {name}: {told}. The model lies in {folder}: push it again when that is mended (without a "
            "token: `hf auth login`)"
        ) from error
