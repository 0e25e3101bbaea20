"""Make triplet shards, toy subjects, and masks of photographs.

python -m data_gen CONFIG [key=value ...] [--dry-run]        the whole chain: captions, images, masks, shards
python -m data_gen captions|images|masks|quality|shards CONFIG [FOLDER] [key=value ...]       one stage of it
python -m data_gen inspect DIR [--out DIR]                   look at shards: contact sheet and statistics
python -m data_gen encode SHARDS --base BASE --out DIR       run the frozen encoders over shards once
python -m data_gen triplets|subjects|photos --help           draw toy triplets or subjects; pack photographs
python -m data_gen cutouts --subjects DIR --segmenter NAME   find the objects of photographs, write their masks
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_gen.config import load_config
from data_gen.photos import pack_photos, write_masks
from data_gen.toyworld import PARTIAL_SHARE, draw_subjects, draw_triplets
from pig.arguments import Parser, parse
from pig.data.transforms import ReferenceAugmentation
from pig.errors import InputError, check_ranges, check_text, run_command
from pig.mistakes import refuse_empty
from pig.models.cutting_out import CuttingOut

COMMANDS = ("triplets", "subjects", "photos", "cutouts", "inspect")
SIZES = (8, 4096)  # sides of a picture, in pixels
STAGES = ("captions", "images", "masks", "quality", "shards")


def triplets(out: Path, count: int = 8000, size: int = 64, first_seed: int = 0, partial: float = PARTIAL_SHARE) -> None:
    """Draw triplets of the toy world.

    Args:
        out: folder for the shards.
        count: how many.
        size: side of a picture in pixels.
        first_seed: of the first subject; each has a seed of its own.
        partial: share of references that show a part of the object only.
    """
    check_ranges(**{"--count": (count, 1, 10**9), "--size": (size, *SIZES), "--first_seed": (first_seed, 0, 10**10)})
    check_ranges(**{"--partial": (partial, 0, 1)})
    draw_triplets(out, count, size, first_seed, partial=partial)


def subjects(out: Path, count: int = 24, size: int = 64, first: int = 0, partial: bool = False) -> None:
    """Draw held-out subjects of the toy world, with masks and prompts, in DreamBooth's layout.

    Args:
        out: folder for the subjects.
        count: how many.
        size: side of a picture in pixels.
        first: number of the first one; each has a seed of its own.
        partial: three pictures in four show a part of the subject, cut by the frame's edge or behind something.
    """
    check_ranges(**{"--count": (count, 1, 10**6), "--size": (size, *SIZES), "--first": (first, 0, 10**8)})
    draw_subjects(out, count, size, first=first, partial=partial)


def photos(photos: Path, out: Path, object: str, size: int = 512, cutting_out: CuttingOut | None = None) -> None:
    """Pack photographs into triplet shards.

    Args:
        photos: folder of pictures; of each one the object is what its own transparency leaves, else `NAME.mask.png`
            beside it, else what the segmenter finds. `NAME.txt` may hold its caption.
        out: folder for the shards.
        object: what the pictures show, such as "dog".
        size: shorter side of the packed pictures in pixels.
    """
    check_ranges(**{"--size": (size, *SIZES)})
    check_text(object)
    if not object.strip():
        raise InputError("--object is empty: say what the pictures show, such as dog")
    pack_photos(photos, out, object, size, segment=(cutting_out or CuttingOut()).make())


def cutouts(subjects: Path, cutting_out: CuttingOut | None = None) -> None:
    """Find the object in each picture of a subjects folder, and write its mask beside it, as `NAME.mask.png`.

    `generate`, and `evaluate --segmenter`, then use these masks, which you can look at and correct; `tune` trains on
    whole pictures. A picture with a mask or with transparency is left as it is.

    Args:
        subjects: a folder of subjects in DreamBooth's layout.
    """
    segment = (cutting_out or CuttingOut()).make()
    if segment is None:
        raise InputError("--segmenter none finds no object: name another, see --help")
    write_masks(subjects, segment)


def encode(
    shards: list[str],
    base: str,
    out: Path,
    resolution: int = 512,
    variants: int = 0,
    augmentation: ReferenceAugmentation | None = None,
    half: bool = False,
) -> None:
    """Encode triplet shards by a base model's VAE and text encoder, for `fit` to read in their place.

    Finished shards are kept; a stopped run goes on where it was.

    Args:
        shards: folders, globs or brace patterns.
        base: the base model that will be trained on: a folder, a hub id, or `toyworld`.
        out: folder for the encoded shards, of the same names.
        resolution: side of the pictures in pixels; that of the training.
        variants: augmented variants of each reference; 0 keeps the references, to be augmented afresh in training.
        augmentation: of the variants; the training's.
        half: float16 instead of float32: half the space.
    """
    from data_gen.encode import encode_shards

    encode_shards(shards, base, out, resolution, variants, augmentation or ReferenceAugmentation(), half)


def run_encode(arguments: list[str]) -> None:
    parser = Parser(prog="python -m data_gen encode", description=encode.__doc__)
    parser.add_argument("shards", nargs="+", type=str, help="folders, globs or brace patterns")
    parser.add_argument("--half", action="store_true", help="float16 instead of float32: half the space")
    parser.add_function_arguments(encode, as_positional=False, skip={"shards", "half"})
    refuse_empty(arguments, "--out")
    chosen = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    encode(**chosen)


def inspect(folder: list[Path], /, out: Path | None = None) -> None:
    """Look at shards before training on them: contact sheet and statistics, as PNG and HTML.

    Args:
        folder: of shards.
        out: folder for inspect.html and inspect.png; default: that of the shards.
    """
    from data_gen.inspect import inspect_shards

    if len(folder) > 1:
        raise InputError(f"inspect takes one folder of shards, got {len(folder)}")
    inspect_shards(folder[0], out or folder[0])


def run(arguments: list[str]) -> None:
    command = arguments[0] if arguments else ""
    if command == "encode":
        run_encode(arguments[1:])
        return
    if command in COMMANDS:
        function, values = parse(f"python -m data_gen {command}", f"data_gen.__main__:{command}", arguments[1:])
        function(**values)
        return
    parser = argparse.ArgumentParser(
        prog="python -m data_gen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage = arguments.pop(0) if command in STAGES else None
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/datagen/toyworld.yaml")
    parser.add_argument("words", nargs="*", metavar="key=value", help="over the config: captions.count=1000")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and how long it would take here")
    chosen = parser.parse_intermixed_args(arguments)
    overrides = [word for word in chosen.words if "=" in word]
    folders = [Path(word) for word in chosen.words if "=" not in word]
    if stage and chosen.dry_run:
        raise InputError("--dry-run is for the whole chain, not for one stage")
    if len(folders) > bool(stage):
        raise InputError(f"expected key=value, got {folders[-1]}")
    config = load_config(chosen.config, overrides)
    # Imported here: heavy, and neither drawing, nor packing, nor a mistake in the config needs them.
    from data_gen.run import dry_run, generate, stage_alone
    from pig.executors import quiet

    quiet()
    if stage:
        stage_alone(stage, config, *folders)
    elif chosen.dry_run:
        dry_run(config)
    else:
        generate(config)


def main() -> None:
    run_command(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
