"""The one command line: `python -m pig.cli SUBCOMMAND`.

    fit | validate | test | predict   LightningCLI: --config FILE, and --model.X, --data.X, --trainer.X over it
    generate                          draw a subject with a trained model
    evaluate                          score a folder of generated images
    export                            a checkpoint -> a loadable model folder

`python -m pig.cli SUBCOMMAND --help` lists the arguments.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse
import torch
import transformers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors import SafetensorError

from pig.data.images import Job, save_generated
from pig.data.modules import TripletDataModule
from pig.data.subjects import SubjectFolder, load_cutout, read_subjects
from pig.errors import InputError
from pig.evaluation.benchmark import score_folder
from pig.methods.base import PersonalisationModule, load_checkpoint
from pig.methods.bootpig import BootPIG
from pig.models.backbone import TOYWORLD, Backbone, check_prediction_type
from pig.models.encoders import DinoEncoder, load_clip
from pig.pipelines import BootPIGPipeline

# `${run}` means the config's own top level, below whichever subcommand; `omegaconf+` resolves after all overrides.
jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class CLI(LightningCLI):
    """LightningCLI in subclass mode with the omegaconf parser, so that configs may interpolate."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            PersonalisationModule,
            TripletDataModule,
            subclass_mode_model=True,
            parser_kwargs={"parser_mode": "omegaconf+", "description": __doc__},
            save_config_kwargs={"overwrite": True},
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", default="runs/run", help="folder of this run, which configs refer to as ${run}")

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint before any work. Lightning would lay its settings over those of config and command."""
        path = (
            (self.config.get(self.config.subcommand) or {}).get("ckpt_path") if self.config.get("subcommand") else None
        )
        if path and path not in ("last", "best", "hpc") and "://" not in path:
            load_checkpoint(Path(path))


def export(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint of `fit` as a pipeline folder (safetensors only); its EMA weights, if it has any.

    Args:
        checkpoint: a `.ckpt` file of `fit`.
        out: folder for `BootPIGPipeline.from_pretrained`.
    """
    BootPIG.from_checkpoint(checkpoint).pipeline().save_pretrained(out)
    print(f"{checkpoint} -> {out}")


def load_pipeline(model: str | Path) -> BootPIGPipeline:
    """An exported model's folder, or `toyworld` for the embedded one."""
    if str(model) == TOYWORLD:
        pipeline = BootPIG.embedded().pipeline()
    elif not (Path(model) / "model_index.json").is_file():
        raise InputError(f"{model} is no exported model: it has no model_index.json (make one with `export`)")
    else:
        try:
            pipeline = BootPIGPipeline.from_pretrained(model)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{model} is no exported BootPIG, or a torn one: {str(error).splitlines()[0]}") from error
        parts = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.base_unet, pipeline.scheduler)
        check_prediction_type(Backbone(*parts))
    pipeline.set_progress_bar_config(disable=None)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def generate(
    references: list[Path],
    prompt: list[str],
    out: Path,
    model: str = "toyworld",
    images_per_prompt: int = 4,
    image_guidance: float = 5.0,
    text_guidance: float = 7.5,
    steps: int = 50,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
) -> None:
    """Draw the subject of the reference pictures.

    Args:
        references: pictures of one subject (RGBA cut-outs, or with a `NAME.mask.png` beside; else taken as they are).
        prompt: one or several, such as "a photo of a mug, on a beach".
        out: folder for the images, `references/PROMPT_INDEX/SEED.png`, and `manifest.jsonl`.
        model: an exported model's folder, or `toyworld`.
        images_per_prompt: with seeds `seed`, `seed + 1`, ...
        image_guidance: how closely to follow the references (eta_im of Eq. 4).
        text_guidance: how closely to follow the prompt (eta_text+im of Eq. 4).
        steps: of the UniPC sampler.
        height: in pixels, a multiple of 8; the model's own by default.
        width: likewise.
        seed: of the first image of each prompt.
    """
    if not all(text.strip() for text in prompt):
        raise InputError("--prompt: an empty prompt")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must lie between 0 and 2^63, got {seed}")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, not a folder")
    cutouts = [load_cutout(path) for path in references]
    pipeline = load_pipeline(model)
    subject = SubjectFolder("references", "", tuple(references), tuple(prompt))
    seeds = range(seed, seed + images_per_prompt)
    settings: dict[str, Any] = {
        "image_guidance": image_guidance,
        "text_guidance": text_guidance,
        "num_inference_steps": steps,
    }
    images = pipeline(
        prompt,
        cutouts,
        num_images_per_prompt=images_per_prompt,
        height=height,
        width=width,
        generator=[torch.Generator().manual_seed(s) for _ in prompt for s in seeds],
        **settings,
    ).images
    jobs = [Job(subject, index, s) for index in range(len(prompt)) for s in seeds]
    for job, image in zip(jobs, images, strict=True):
        line = save_generated(out, job, image, method="BootPIG", settings={**settings, "model": str(model)})
        print(out / line.file)


def evaluate(images: Path, subjects: Path, out: Path, clip: str = "toyworld", dino: str = "toyworld") -> None:
    """Score a folder of generated images.

    Args:
        images: `SUBJECT/PROMPT_INDEX/SEED.png`, made by anything.
        subjects: a folder of subjects in DreamBooth's layout.
        out: where `scores.json` goes.
        clip: `toyworld`, a folder or hub id in transformers' format, or `open_clip:MODEL/WEIGHTS`.
        dino: a DINO ViT in transformers' format, or `toyworld`.
    """
    known = read_subjects(subjects)
    scores = score_folder(images, known, load_clip(clip), DinoEncoder(dino))
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(json.dumps(scores, indent=1))
    for name, value in scores.items():
        print(f"{name:22} {value:.4f}")


COMMANDS: dict[str, Callable[..., None]] = {"generate": generate, "evaluate": evaluate, "export": export}


def run(args: list[str]) -> Any:
    if not args or args[0] not in COMMANDS:
        return CLI()
    command = COMMANDS[args[0]]
    parser = jsonargparse.ArgumentParser(prog=f"python -m pig.cli {args[0]}", description=command.__doc__)
    # Lists as everyone types them, `--references a.jpg b.jpg`; jsonargparse's own form is `[a.jpg,b.jpg]`.
    lists = {name: hint for name, hint in get_type_hints(command).items() if get_origin(hint) is list}
    for parameter in docstring_parser.parse(command.__doc__ or "").params:
        if parameter.arg_name in lists:
            (kind,) = get_args(lists[parameter.arg_name])
            parser.add_argument(
                f"--{parameter.arg_name}", nargs="+", type=kind, required=True, help=parameter.description
            )
    parser.add_function_arguments(command, as_positional=False, skip=set(lists))
    return command(**parser.parse_args(args[1:]).as_dict())


def main() -> None:
    """Exit code 2 for bad input, with its message."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    transformers.utils.logging.disable_progress_bar()
    for noise in (
        "Your `IterableDataset` has `__len__` defined",  # and gives each worker its own share
        r"Found \d+ module\(s\) in eval mode",  # the frozen VAE and text encoder
        "Precision bf16-mixed is not supported by the model summary",
        r".*LeafSpec",  # Lightning with a newer torch
    ):
        warnings.filterwarnings("ignore", noise)
    try:
        run(sys.argv[1:])
    except SIGTERMException:  # a SystemExit of code 0, which a scheduler would take for success
        print("stopped by SIGTERM; go on with --ckpt_path and the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        mistake = find_input_error(error)
        if mistake is None:
            raise
        # A loader's worker process wraps the message in its traceback.
        message = re.sub(r"(?s)^Caught InputError in .*\n\S*InputError: ", "", str(mistake)).strip()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def find_input_error(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error: jsonargparse wraps what the classes it instantiates raise."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


if __name__ == "__main__":
    main()
