"""`export`: a checkpoint or a model -> a model folder, whole or as a delta."""

from __future__ import annotations

from pathlib import Path

from pig.errors import InputError
from pig.methods import load_module, load_pipeline, save_delta


def export(
    out: Path, checkpoint: Path | None = None, model: str | None = None, delta: bool = False, half: bool = False
) -> None:
    """Write a model as a folder that `generate --model` and `from_pretrained` load (safetensors only).

    Args:
        out: the folder.
        checkpoint: a `.ckpt` file of `fit`; its EMA weights are taken, if it has any.
        model: in place of a checkpoint: any model that `generate` takes.
        delta: write the trained weights alone, with the name and digest of the base model: both forms draw the same
            pictures.
        half: for --delta: float16 in place of float32, half the space; the pictures differ by rounding.
    """
    if (checkpoint is None) == (model is None):
        raise InputError("give either --checkpoint or --model")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, not a folder")
    pipeline = load_module(checkpoint).pipeline() if checkpoint is not None else load_pipeline(str(model), "cpu")
    if delta:
        save_delta(pipeline, out, half=half)
    else:
        pipeline.save_pretrained(out)
    print(f"{checkpoint or model} -> {out}")
