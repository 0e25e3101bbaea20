"""What diffusers does with any pipeline: offloading, LoRAs, compiling, and its usual arguments."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from pig.errors import InputError
from pig.methods import load_pipeline
from pig.models.backbone import load_backbone
from pig.sampling.pipeline import SubjectPipeline
from pig.toyworld import scene

MODELS = ("toyworld", "toyworld/ezigen", "toyworld/instantbooth", "toyworld/ip_adapter", "base:toyworld")
CPU = torch.device("cpu")


def reference() -> list[Image.Image]:
    subject = scene.make_subject(scene.HELD_OUT_SEED, "mug")
    return [Image.fromarray(scene.draw(subject, "sea", 1, 64).reference())]


def draw(pipeline: SubjectPipeline, **told: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    references = reference() if pipeline.reads_references else None
    told = {"num_inference_steps": 2, "output_type": "latent", **told}
    generator = torch.Generator().manual_seed(0)
    return pipeline("a photo of a mug, on a beach", references, class_noun="mug", generator=generator, **told).images


@pytest.mark.parametrize("model", MODELS)
def test_offloading_changes_no_pixel(model, tmp_path) -> None:
    """Parts whose weights lie on the disk draw nonsense where a layer is called past its hooks."""
    expected = draw(load_pipeline(model, "cpu"))
    pipeline = load_pipeline(model, "cpu")
    pipeline.enable_model_cpu_offload(device="cpu")
    assert pipeline.is_offloaded
    assert torch.equal(draw(pipeline), expected)
    assert torch.equal(draw(pipeline), expected)
    pipeline = load_pipeline(model, "cpu")
    pipeline.enable_group_offload(CPU, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    assert pipeline.is_offloaded
    for _ in range(2):  # read from the disk, weights lie elsewhere in memory: sums round otherwise
        torch.testing.assert_close(draw(pipeline), expected, atol=1e-4, rtol=1e-4)


def test_deep_features_are_not_kept_while_offloaded() -> None:
    pipeline = load_pipeline("toyworld", "cpu")
    draw(pipeline, deep_every=2)
    pipeline.enable_model_cpu_offload(device="cpu")
    with pytest.raises(InputError, match="deep_every keeps features of layers that offloading moves away"):
        draw(pipeline, deep_every=2)


@pytest.fixture(scope="module")
def style(tmp_path_factory) -> Path:
    """A LoRA of the base model, in diffusers' format, as any training script writes it."""
    folder = tmp_path_factory.mktemp("style")
    unet = load_backbone("toyworld").unet
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_a_style_on_top_of_a_subject(model, style) -> None:
    pipeline = load_pipeline(model, "cpu")
    plain = draw(pipeline)
    pipeline.load_lora_weights(style, adapter_name="style")
    styled = draw(pipeline)
    assert (styled - plain).abs().max() > 0.05
    pipeline.set_adapters(["style"], [0.0])
    torch.testing.assert_close(draw(pipeline), plain, atol=1e-4, rtol=1e-4)
    pipeline.set_adapters(["style"], [1.0])
    pipeline.fuse_lora()
    torch.testing.assert_close(draw(pipeline), styled, atol=1e-3, rtol=1e-3)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), plain, atol=1e-3, rtol=1e-3)


def test_the_style_is_of_the_network_that_draws(style) -> None:
    """As if the base UNet itself had been trained so; the Reference UNet stays as it was."""
    pipeline, other = load_pipeline("toyworld", "cpu"), load_pipeline("toyworld", "cpu")
    pipeline.load_lora_weights(style)
    with torch.no_grad():
        other.base_unet.load_lora_adapter(load_file(style / "pytorch_lora_weights.safetensors"), prefix="unet")
        other.base_unet.fuse_lora()
    torch.testing.assert_close(draw(pipeline), draw(other), atol=1e-3, rtol=1e-3)
    assert not hasattr(pipeline.reference_unet, "peft_config")


def test_guidance_by_its_usual_name() -> None:
    pipeline = load_pipeline("base:toyworld", "cpu")
    assert torch.equal(draw(pipeline, guidance_scale=2.0), draw(pipeline, text_guidance=2.0))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toyworld", "toyworld/ezigen"])
def test_compiled_blocks_draw_the_same(model, monkeypatch) -> None:
    """By Dynamo alone, whose graphs are what may differ: Inductor's compiling takes many minutes on a CPU."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    expected, pipeline = draw(load_pipeline(model, "cpu")), load_pipeline(model, "cpu")
    pipeline.compile_repeated_blocks()
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-3, rtol=1e-3)
