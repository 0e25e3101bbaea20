"""`cost`: what a picture of a model costs, measured on this machine."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pig.commands.drawing import Drawer, Order, load_for
from pig.commands.generate import cut_out_all, deltas_of_subjects
from pig.commands.options import Subjects
from pig.costs import flops_of, machine, peak_memory
from pig.data.images import Job
from pig.errors import InputError, check_ranges
from pig.files import make_folder, write_text
from pig.methods import Source, default_device, find_model, pipeline_class
from pig.models.names import TOYWORLD

console = Console(soft_wrap=True)


def cost(
    model: str = TOYWORLD,
    what: Subjects | None = None,
    repeats: int = 3,
    out: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Measure a picture's cost: seconds, FLOPs, memory, and the model's size.

    The first subject is drawn under the first prompt, a picture at a time; reading its references is part of it.

    Args:
        model: MODEL_FORMS. `--model X --help` lists that model's own controls.
        repeats: pictures that are timed, of which the median counts; one before them warms up.
        out: a JSON file for the numbers.
        settings: the model's controls.
    """
    what = what or Subjects()
    check_ranges(**{"--repeats": (repeats, 1, 1000)})
    if out is not None:
        if out.is_dir():
            raise InputError(f"--out: {out} is a folder: give a file such as cost.json")
        make_folder(out.parent)
    for flag in ("image", "mask"):
        if getattr(what, flag) is not None:
            raise InputError(f"--{flag}: cost measures pictures without inpainting")
    if what.prompt is not None and len(what.prompt) > 1:
        raise InputError("cost draws one --prompt")
    source = find_model(model)
    kind = pipeline_class(source.method)
    chosen = kind.Settings.given(source.settings, settings or {})
    subject = what.read(kind.reads_references)[0]
    cutouts = cut_out_all([subject], what.references_per_subject) if kind.reads_references else {subject.name: []}
    order = Order(Path(), model, cutouts, chosen.as_json(), deltas_of_subjects(source, [subject], what))
    pipeline = load_for(order, default_device())
    pipeline.set_progress_bar_config(disable=True)
    drawer = Drawer(order, pipeline)

    def draw() -> None:
        drawer.call([Job(subject, 0, 0)], generator=torch.Generator().manual_seed(0))

    flops = flops_of(draw)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - began)
    trained = list(pipeline.trained_weights())
    told = {
        "trained_weights": sum(weight.numel() for _, weight in trained),
        "weights": sum(part.numel() for part in _weights(pipeline)),
        "disk_bytes": _bytes_of(order, source),
        "references": len(cutouts[subject.name]),
        "flops_per_picture": flops,
        "seconds_per_picture": statistics.median(seconds),
        "peak_memory_bytes": peak_memory(),
        "machine": machine(),
    }
    for name, value in told.items():
        console.print(f"{name:<20} {value}", highlight=False)
    if out is not None:
        write_text(out, json.dumps(told, indent=1) + "\n")


def _weights(pipeline: Any) -> list[torch.Tensor]:
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return list({id(one): one for module in modules for one in module.parameters()}.values())


def _bytes_of(order: Order, source: Source) -> int | None:
    """Of the model's folder, or of one subject's in a tuned one; None for a base model, which lies at the hub."""
    folders = next(iter(order.deltas.values()), () if source.folder is None else (source.folder,))
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) if folders else None
