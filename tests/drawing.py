"""Pictures drawn by a BootPIG whose two UNets differ, for the tests of sampling."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from pig.data.subjects import read_subjects
from pig.methods.bootpig import BootPIG, BootPIGPipeline

PROMPTS = ["a photo of a mug, on a beach", "a photo of a car, in space"]


@pytest.fixture(scope="module")
def pipe() -> BootPIGPipeline:
    """Base and Reference UNet that differ, as after training."""
    module = BootPIG("toyworld")
    torch.manual_seed(0)
    for parameter in module.trainable().values():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return module.pipeline()


@pytest.fixture(scope="module")
def cutouts(toy_data) -> list[Image.Image]:
    return read_subjects(toy_data / "subjects")[6].references(3)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipe: BootPIGPipeline, prompt, references, **options) -> torch.Tensor:
    return pipe(prompt, references, output_type="pt", **{"num_inference_steps": 3, **options}).images


def count_passes(pipe: BootPIGPipeline, monkeypatch) -> list[tuple[torch.Tensor, ...]]:
    """What the Reference UNet is asked from now on: (z, t, text) of each pass."""
    calls: list[tuple[torch.Tensor, ...]] = []
    encode = pipe.network.encode_reference
    monkeypatch.setattr(pipe.network, "encode_reference", lambda *asked: calls.append(asked) or encode(*asked))
    return calls
