"""Files that somebody else may have made or damaged: values of other kinds are refused where they are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_gen.captions import read_captions
from pig.data.images import read_manifest
from pig.data.shards import BadSampleError, decode_metadata, find_shards, stats_path
from pig.errors import InputError, check_text, ending
from pig.methods import find_model, load_module, load_pipeline
from pig.models.names import WEIGHTS
from pig.models.weights import copy_weights


@pytest.mark.parametrize(
    ("name", "value"),
    [("base_digest", 5), ("base", None), ("settings", [1]), ("settings", "x"), ("options", None), ("method", {})],
)
def test_a_delta(tmp_path, name, value) -> None:
    told = json.loads((WEIGHTS / "bootpig/delta.json").read_text())
    (tmp_path / "delta.json").write_text(json.dumps({**told, name: value}))
    with pytest.raises(InputError, match=rf"delta.json is damaged: {name} is"):
        find_model(tmp_path)


def test_options_that_a_method_does_not_have(tmp_path) -> None:
    told = json.loads((WEIGHTS / "bootpig/delta.json").read_text())
    (tmp_path / "delta.json").write_text(json.dumps({**told, "options": {"foo": 1}}))
    with pytest.raises(InputError, match="names options that bootpig does not have"):
        load_pipeline(tmp_path, "cpu")


@pytest.mark.parametrize("state", [{}, {"hyper_parameters": []}, {"hyper_parameters": {"foo": 1}, "state_dict": {}}])
def test_a_checkpoint(tmp_path, state) -> None:
    torch.save({"pig_method": "bootpig", **state}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"a.ckpt (is damaged|holds other settings)"):
        load_module(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "change", [{"count": "6"}, {"count": 1.5}, {"count": -3}, {"count": True}, {"sha256": 1}, {"rejected": {"a": "b"}}]
)
def test_statistics_of_a_shard(toy_data, tmp_path, change) -> None:
    shutil.copytree(toy_data / "val", tmp_path / "val")
    (tar,) = (tmp_path / "val").glob("*.tar")
    stats = Path(stats_path(str(tar)))
    stats.write_text(json.dumps({**json.loads(stats.read_text()), **change}))
    with pytest.raises(InputError, match="unfinished"):
        find_shards(str(tmp_path / "val"))


@pytest.mark.parametrize("scores", [[], "a", None, {"a": "b"}, {"a": None}])
def test_scores_of_a_sample(scores) -> None:
    metadata = {"caption": "a mug", "object": "mug", "scores": scores}
    with pytest.raises(BadSampleError, match="the scores in json are no numbers"):
        decode_metadata({"__key__": "a", "json": json.dumps(metadata).encode()})


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_weights_of_another_kind_of_number(kind) -> None:
    own = {"a": torch.zeros(3)}
    with pytest.raises(InputError, match="a is torch.* wanted is torch.float32"):
        copy_weights({"a": torch.ones(3, dtype=kind)}, own, "x.safetensors", "")
    assert own["a"].eq(0).all()


def test_captions_of_another_kind(tmp_path) -> None:
    (tmp_path / "captions.jsonl").write_text('{"caption": 5, "object": "mug"}')
    with pytest.raises(InputError, match="not a caption"):
        read_captions(tmp_path / "captions.jsonl")


def test_a_manifest(tmp_path) -> None:
    lines = [{"file": "a/0/0.png", "settings": [1]}, {"file": "a/0/1.png", "settings": None}, {"file": "a/0/2.png"}]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert set(read_manifest(tmp_path)) == {"a/0/2.png"}


def test_text_that_is_none() -> None:
    with pytest.raises(InputError, match="no text in UTF-8"):
        check_text(b"a \xff mug".decode(errors="surrogateescape"))


def test_memory_that_is_not_there() -> None:
    for make in (lambda: torch.empty(2**50), lambda: np.empty((2**40, 2**10))):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            make()
        code, message = ending(error.value) or (None, "")
        assert code == 1
        assert message.startswith("error: not enough memory")
