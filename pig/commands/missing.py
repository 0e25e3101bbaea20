"""What an experiment's config names and is not there, all of it at once, before any network is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE

from pig.data.shards import find_shards
from pig.data.subjects import read_subjects
from pig.errors import InputError
from pig.models.names import TOYWORLD


def missing_inputs(told: Mapping[str, Any]) -> list[str]:
    """A line for each input of `fit` that is not there, with what to give or to leave out.

    Args:
        told: the config of the subcommand.
    """
    data = (told.get("data") or {}).get("init_args") or {}
    model = (told.get("model") or {}).get("init_args") or {}
    found = []
    for name, without in (("shards", ""), ("val_shards", "; without a validation loss: --data.val_shards null")):
        if data.get(name):
            found += _tried(f"data.{name}", without, find_shards, data[name])
    trainer = told.get("trainer") or {}
    for callback in (trainer.get("callbacks") or []) if trainer.get("limit_val_batches") != 0 else []:
        given = callback.get("init_args") or {}
        if callback["class_path"].endswith("SubjectSamples") and not Path(given["subjects"]).is_dir():
            without = "; without scores while training: --config configs/bootpig/own_photos.yaml behind the others"
            found += _tried("subjects of SubjectSamples", without, read_subjects, given["subjects"])
    base = str(model.get("base") or TOYWORLD)
    cached = base == TOYWORLD or Path(base).exists() or try_to_load_from_cache(base, "model_index.json")
    if not cached and HF_HUB_OFFLINE:
        found.append(f"model.base: {base} is no folder, not in the hub's cache, and HF_HUB_OFFLINE is set")
    return found


def _tried(name: str, without: str, read: Any, *given: Any) -> list[str]:
    try:
        read(*given)
    except InputError as error:
        return [f"{name}: {error}{without}"]
    return []
