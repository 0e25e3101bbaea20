"""IP-Adapter (arXiv 2308.06721) against diffusers' own, which reads what is exported here."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from pig import cli
from pig.attention.images import cross_attention_layers
from pig.commands.export import export
from pig.data.modules import TripletDataModule
from pig.data.schema import Batch
from pig.data.subjects import read_subjects
from pig.data.transforms import reference_picture
from pig.errors import InputError
from pig.methods import load_pipeline, load_release
from pig.methods.ip_adapter import IPAdapterPipeline
from pig.methods.ip_adapter.module import IPAdapter
from pig.models.backbone import align, load_backbone
from pig.models.names import WEIGHTS
from pig.models.vision import look
from pig.sampling.delta import save_delta

PROMPTS = ["a photo of a mug, on a beach", "a photo of a mug, in space"]


def changed(module: IPAdapter) -> IPAdapter:
    """As after training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.trainable().values():
            parameter += 0.05 * torch.randn_like(parameter)
    return module


@pytest.fixture(scope="module")
def module() -> IPAdapter:
    return changed(IPAdapter("toyworld"))


@pytest.fixture(scope="module")
def pipe(module) -> IPAdapterPipeline:
    return module.pipeline()


@pytest.fixture(scope="module")
def cutouts(toy_data) -> list[Image.Image]:
    return read_subjects(toy_data / "subjects")[6].references(3)


@pytest.fixture(scope="module")
def batch(toy_data) -> Batch:
    data = TripletDataModule(str(toy_data / "triplets"), batch_size=4, resolution=64, num_workers=0)
    return next(iter(data.train_dataloader()))


def draw(pipe: IPAdapterPipeline, references: Any, **given: Any) -> Tensor:
    told = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(1), **given}
    return pipe(PROMPTS[0], references, class_noun="mug", **told).images


def test_diffusers_reads_the_export_and_draws_the_same_pixels(pipe, cutouts, tmp_path) -> None:
    save_delta(pipe, tmp_path / "delta")
    names = set(load_file(tmp_path / "delta/ip-adapter.safetensors"))
    assert {name.partition(".")[0] for name in names} == {"image_proj", "ip_adapter"}
    plain = StableDiffusionPipeline.from_pretrained(WEIGHTS / "base", safety_checker=None, dtype=torch.float32)
    plain.load_ip_adapter(str(tmp_path / "delta"), subfolder="", weight_name="ip-adapter.safetensors")
    for part in plain.components.values():
        if isinstance(part, torch.nn.Module):
            align(part)
    plain.set_progress_bar_config(disable=True)
    side = plain.image_encoder.config.image_size
    for scale, count in ((1.0, 1), (0.6, 1), (1.0, 2)):
        plain.set_ip_adapter_scale(scale)
        pictures = [reference_picture(one, side) for one in cutouts[:count]]
        expected = plain(
            PROMPTS[0],
            ip_adapter_image=[pictures],
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
        ).images
        found = draw(pipe, cutouts[:count], text_guidance=3.0, scale=scale)
        assert torch.allclose(found, expected, atol=2e-3), (scale, count, (found - expected).abs().max())
        assert not torch.allclose(found, draw(pipe, cutouts[2:], text_guidance=3.0, scale=scale), atol=2e-3)


def test_one_step_against_diffusers_processors(module) -> None:
    theirs = load_backbone("toyworld").unet
    prompt = module.net.prompt.state_dict()
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in prompt.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    theirs._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    generator = torch.Generator().manual_seed(2)
    latents, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 16, 16), (16, 128)))
    text = text[..., : theirs.config.cross_attention_dim]
    embeds, t = torch.randn(2, 3, 64, generator=generator), torch.tensor([7, 700])
    with torch.no_grad():
        found = module.net(latents, t, text, embeds)
        expected = theirs(latents, t, text, added_cond_kwargs={"image_embeds": [embeds]}).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = load_backbone("toyworld").unet
    for layer in (module.net.unet, plain):
        align(layer)
    with torch.no_grad():
        bare = plain(latents, t, text).sample
        assert torch.equal(module.net(latents, t, text, None), bare)
        assert torch.equal(module.net(latents, t, text, embeds, 0.0), bare)
        assert not torch.allclose(module.net(latents, t, text, embeds, 0.5), found, atol=1e-3)
    assert module.net.unet.state_dict().keys() == plain.state_dict().keys()


def test_names_and_start(batch) -> None:
    module = IPAdapter("toyworld")
    unet = module.net.unet
    layers = cross_attention_layers(unet)
    assert layers[-1].startswith("mid_block")  # the format counts it last
    wanted = {
        f"net.prompt.ip_adapter.{2 * i + 1}.{one}.weight" for i in range(len(layers)) for one in ("to_k_ip", "to_v_ip")
    }
    wanted |= {f"net.prompt.image_proj.{part}.{one}" for part in ("proj", "norm") for one in ("weight", "bias")}
    assert set(module.trainable()) == wanted
    for i, name in enumerate(layers):
        start = module.trainable()[f"net.prompt.ip_adapter.{2 * i + 1}.to_v_ip.weight"]
        assert torch.equal(start, unet.get_submodule(name).to_v.weight)


def test_what_is_dropped(batch, monkeypatch) -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def run(**dropout: float) -> tuple[Tensor, Tensor]:
        module = IPAdapter("toyworld", **{"text_dropout": 0.0, "image_dropout": 0.0, "both_dropout": 0.0, **dropout})
        forward = module.net.forward
        monkeypatch.setattr(module.net, "forward", lambda z, t, *rest: asked.append(rest) or forward(z, t, *rest))
        module.losses(batch, training=True)
        return asked[-1]

    text, embeds = run()
    module = IPAdapter("toyworld")
    assert batch.reference is not None
    with torch.no_grad():
        assert torch.allclose(embeds[:, 0], look(module.vision, batch.reference[:, 0])[0])
    _, empty = module.encode_captions(batch)
    no_text, with_image = run(text_dropout=1.0)
    assert torch.equal(no_text, empty.expand_as(text))
    assert torch.equal(with_image, embeds)
    with_text, no_image = run(image_dropout=1.0)
    assert torch.equal(with_text, text)
    assert not no_image.any()
    neither = run(both_dropout=1.0)
    assert torch.equal(neither[0], empty.expand_as(text))
    assert not neither[1].any()
    with pytest.raises(InputError, match="text_dropout"):
        IPAdapter("toyworld", text_dropout=1.5)
    with pytest.raises(InputError, match="add up to 1.1"):
        IPAdapter("toyworld", text_dropout=0.5, image_dropout=0.4, both_dropout=0.2)


def test_references_in_any_order(pipe, cutouts) -> None:
    torch.testing.assert_close(draw(pipe, cutouts), draw(pipe, cutouts[::-1]), atol=1e-4, rtol=1e-4)


def test_released_weights_are_drawn_with_and_trained_on(pipe, cutouts, tmp_path, monkeypatch) -> None:
    file = tmp_path / "ip-adapter_sd15.safetensors"
    weights = {name: one.detach().clone() for name, one in pipe.prompt.state_dict().items()}
    save_file(weights, file)
    cli.run(["export", "--from_release", str(file), "--base", "toyworld", "--delta", "--out", str(tmp_path / "model")])
    assert torch.equal(draw(load_pipeline(tmp_path / "model", "cpu"), cutouts), draw(pipe, cutouts))
    CLIPVisionModelWithProjection.from_pretrained(tmp_path / "model/image_encoder")
    module = IPAdapter("toyworld", weights=file)
    assert all(torch.equal(one, weights[name]) for name, one in module.net.prompt.state_dict().items())
    save_file({**weights, "image_proj.proj.weight": torch.ones(3, 3)}, file)
    for load in (lambda: load_release(file, "toyworld"), lambda: IPAdapter("toyworld", weights=file)):
        with pytest.raises(InputError, match=r"image_proj.proj.weight has shape \(3, 3\)"):
            load()
    told = json.loads((tmp_path / "model/delta.json").read_text())
    told["options"]["vision_digest"] = "0" * 64
    (tmp_path / "again").mkdir()
    (tmp_path / "again/delta.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="is not the one that the model was trained on"):
        load_pipeline(tmp_path / "again", "cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot load a CLIPVisionModelWithProjection from 'nowhere/none'"):
        IPAdapter("toyworld", image_encoder="nowhere/none")
    export(tmp_path / "again", model=str(tmp_path / "model"), delta=True)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "README.md",
        "delta.json",
        "image_encoder",
        "ip-adapter.safetensors",
    ]
