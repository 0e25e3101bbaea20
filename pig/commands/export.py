"""`export`: a checkpoint or a model -> a model folder, whole or as a delta."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pig.data.images import make_folder
from pig.errors import InputError
from pig.methods import DELTA, WHOLE, load_module, load_pipeline, save_delta


def export(
    out: Path, checkpoint: Path | None = None, model: str | None = None, delta: bool = False, half: bool = False
) -> None:
    """Write a model as a folder that `generate --model` and `from_pretrained` load (safetensors only).

    Args:
        out: the folder; an earlier model in it is replaced.
        checkpoint: a `.ckpt` file of `fit`; its EMA weights are taken, if it has any.
        model: in place of a checkpoint: any model that `generate` takes.
        delta: write the trained weights alone, with the name and digest of the base model: both forms draw the same
            pictures.
        half: for --delta: float16 in place of float32, half the space; the pictures differ by rounding.
    """
    if (checkpoint is None) == (model is None):
        raise InputError("give either --checkpoint or --model")
    if half and not delta:
        raise InputError("--half is for --delta")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, not a folder")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in (WHOLE, DELTA)):
        raise InputError(f"--out: {out} holds something else than a model: give another")
    pipeline = load_module(checkpoint).pipeline() if checkpoint is not None else load_pipeline(str(model), "cpu")
    make_folder(out.parent)
    # Written aside: a model is whole or not there, and nothing of an earlier one stays beside it.
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        if delta:
            save_delta(pipeline, aside / "new", half=half)
        else:
            pipeline.save_pretrained(aside / "new")
        if out.exists():
            out.rename(aside / "old")
        (aside / "new").rename(out)
    finally:
        shutil.rmtree(aside)
    print(f"{checkpoint or model} -> {out}")
