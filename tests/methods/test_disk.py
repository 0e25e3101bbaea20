"""Models on disk: what `--model` takes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import embedded
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pig.cli import run
from pig.commands.export import export
from pig.data.transforms import is_whole
from pig.errors import InputError
from pig.methods import find_model, load_module, load_pipeline
from pig.methods.bootpig import BootPIGPipeline
from pig.models.backbone import make_scheduler
from pig.models.names import WEIGHTS
from pig.toyworld import scene


@pytest.fixture(scope="module")
def delta(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("delta") / "bootpig"
    shutil.copytree(WEIGHTS / "bootpig", folder)
    return folder


def test_names() -> None:
    embedded_ones = ("base", "bootpig", "ezigen", "instantbooth", "ip_adapter")
    for name, method in {"toyworld": "bootpig", **{f"toyworld/{one}": one for one in embedded_ones}}.items():
        assert find_model(name).method == method
    assert find_model("base:some/hub-id").base == "some/hub-id"
    assert find_model("toyworld").settings["text_guidance"] == 1.5
    assert load_pipeline("toyworld/base", "cpu").method == "base"
    with pytest.raises(InputError, match=r"no embedded model 'toyworld/nothing'; there are: toyworld, toyworld/ezigen"):
        find_model("toyworld/nothing")
    with pytest.raises(InputError, match="is no model: give a folder made by `export` or `tune`"):
        find_model("nowhere")


def test_the_embedded_model_is_a_delta_that_draws_as_before(delta) -> None:
    red = Image.new("RGB", (64, 64), (220, 20, 20))
    given = {"num_inference_steps": 2, "output_type": "pt"}
    drawn = [
        pipe("a mug", [red], generator=torch.Generator().manual_seed(0), **given).images
        for pipe in (embedded(), load_pipeline(delta, "cpu"))
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_digest": "0" * 64}, "was trained on another base model"),
        ({"method": "nothing"}, "method 'nothing' is none of"),
        ({"settings": {"strenght": 1}}, "'strenght' is no control"),
        ({"settings": {"text_guidance": -1}}, "text_guidance must be between 0"),
        ({"more": 1}, "is no description of a delta"),
    ],
)
def test_deltas_that_do_not_fit(delta, tmp_path, change, message) -> None:
    folder = tmp_path / "other"
    shutil.copytree(delta, folder)
    told = json.loads((folder / "delta.json").read_text())
    (folder / "delta.json").write_text(json.dumps({**told, **change}))
    with pytest.raises(InputError, match=message):
        load_pipeline(folder, "cpu")


def test_torn_deltas_and_foreign_folders(delta, tmp_path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(delta, folder)
    content = (folder / "delta.safetensors").read_bytes()
    (folder / "delta.safetensors").write_bytes(content[:5000])
    with pytest.raises(InputError, match="missing, torn, or no safetensors file"):
        load_pipeline(folder, "cpu")
    (folder / "delta.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        load_pipeline(folder, "cpu")
    (folder / "delta.json").unlink()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(InputError, match="is a FluxPipeline, of no method known here"):
        load_pipeline(folder, "cpu")


def test_exports_that_cannot_be(tmp_path) -> None:
    for given in ({}, {"checkpoint": tmp_path / "x", "model": "toyworld"}):
        with pytest.raises(InputError, match="give one of --checkpoint, --model and --from_release"):
            export(tmp_path / "out", **given)
    with pytest.raises(InputError, match="only a model that was trained here has a delta"):
        export(tmp_path / "out", model="base:toyworld", delta=True)
    with pytest.raises(InputError, match="--half is for --delta"):
        export(tmp_path / "out", model="toyworld", half=True)
    with pytest.raises(InputError, match="--base is for --from_release"):
        export(tmp_path / "out", model="toyworld", base="toyworld")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    with pytest.raises(InputError, match="holds something else than a model"):
        export(tmp_path / "photos", model="toyworld")
    torch.save({"pig_method": "other", "state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="no checkpoint of a method known here"):
        load_module(tmp_path / "other.ckpt")
    pipe = embedded()
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight += 0.1
    pipe.save_pretrained(tmp_path / "changed")
    with pytest.raises(InputError, match="is not that of the base model 'toyworld': a delta would lose it"):
        export(tmp_path / "out", model=str(tmp_path / "changed"), delta=True)


def test_half_a_delta(tmp_path) -> None:
    export(tmp_path / "half", model="toyworld", delta=True, half=True)
    again, shipped = (load_file(folder / "delta.safetensors") for folder in (tmp_path / "half", WEIGHTS / "bootpig"))
    assert again.keys() == shipped.keys()
    for name, value in shipped.items():
        assert again[name].dtype == torch.float16
        assert torch.equal(again[name], value)
    assert (tmp_path / "half/delta.json").read_text() == (WEIGHTS / "bootpig/delta.json").read_text()


def test_an_export_replaces_the_earlier_model_wholly(tmp_path) -> None:
    export(tmp_path / "model", model="toyworld", delta=True)
    export(tmp_path / "model", model="base:toyworld")
    assert find_model(tmp_path / "model").method == "base"
    assert not (tmp_path / "model/delta.safetensors").exists()
    export(tmp_path / "model", model="toyworld", delta=True)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "delta.json",
        "delta.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_delta_is_not_made_of_another_scheduler(tmp_path) -> None:
    pipe = embedded()
    pipe.register_modules(scheduler=make_scheduler("ddim", pipe.scheduler.config))
    pipe.save_pretrained(tmp_path / "ddim")
    with pytest.raises(InputError, match="its scheduler, VAE configuration or tokenizer is not that of the base model"):
        export(tmp_path / "out", model=str(tmp_path / "ddim"), delta=True)


def test_a_folder_by_diffusers_own_loader(tmp_path) -> None:
    embedded().save_pretrained(tmp_path)
    again = BootPIGPipeline.from_pretrained(tmp_path)
    assert again.settings().text_guidance == 1.5


@pytest.mark.slow
def test_an_exported_folder_tells_what_it_is(tmp_path, monkeypatch) -> None:
    """Card, header and the one line by which diffusers' own loader finds the class; and the call that uploads it."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **told: Any) -> None:
            calls.append((name, told))

        def upload_folder(self, **told: Any) -> str:
            calls.append(("upload", {**told, "files": sorted(path.name for path in told["folder_path"].iterdir())}))
            return "https://hub/me/mug"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    picture = tmp_path / "mug.png"
    Image.fromarray(scene.draw(scene.make_subject(scene.HELD_OUT_SEED, "mug"), "sea", 1, 64).reference()).save(picture)
    words = ["export", "--model=toyworld", "--references", str(picture), "--prompt", "a photo of a mug"]
    run([*words, f"--out={tmp_path / 'whole'}", "--push_to_hub=me/mug", "--data_licence=cc0-1.0"])
    card = (tmp_path / "whole/README.md").read_text()
    assert 'base_model: "toyworld"\nlicense: apache-2.0\ntags: [pig, bootpig, personalisation]' in card
    assert "| data | cc0-1.0 |" in card
    assert "`a photo of a mug`, seed 1, on the CPU" in card
    assert is_whole(tmp_path / "whole/example_1.png")
    (created, told), (_, uploaded) = calls
    assert (created, told) == ("me/mug", {"exist_ok": True})
    assert uploaded["repo_id"] == "me/mug"
    assert {"README.md", "pipeline.py", "model_index.json"} <= set(uploaded["files"])

    folder = str(tmp_path / "whole")
    found = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert type(found) is type(load_pipeline("toyworld", "cpu"))
    run(["export", "--model=toyworld/ezigen", "--delta", f"--out={tmp_path / 'delta'}"])
    with safe_open(tmp_path / "delta/delta.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "ezigen on toyworld"
    assert "the trained weights alone" in (tmp_path / "delta/README.md").read_text()

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(Hub, "create_repo", offline)
    with pytest.raises(InputError, match="--push_to_hub me/mug: offline"):
        run([*words[:2], f"--out={tmp_path / 'whole'}", "--push_to_hub=me/mug"])
    assert (tmp_path / "whole/model_index.json").is_file()
