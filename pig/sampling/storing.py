"""A base class of all pipelines: writes a model to disk, whole or as a delta."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from pig.files import write_text

METHOD_FILE = "pig.json"  # in a model folder, beside diffusers' model_index.json


class StoredPipeline(DiffusionPipeline):
    """A pipeline that knows which of its weights are trained, and how they are written.

    A method whose weights have a public format names its file (`delta_file`) and writes it (`write_delta`). Where the
    trained weights are part of no component that diffusers saves (a LoRA, a learned word), the pipeline is
    `kept_apart`: a whole folder then holds the base model's own parts, and the delta's file beside them.
    """

    method: ClassVar[str]  # its name in the registry
    delta_file: str = "delta.safetensors"
    kept_apart: bool = False
    network: nn.Module  # with `trainable_parameters()`, by which deltas are written

    def trained_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What a delta holds, by its name in the delta's file."""
        groups: Any = getattr(self.network, "trainable_parameters", dict)()
        for parameters in groups.values():
            for name, parameter in parameters.items():
                yield self.name_in_delta(name), parameter

    def name_in_delta(self, name: str) -> str:
        """The key in the delta's file of the network's parameter of this name; by default its key in a checkpoint."""
        return f"net.{name}"

    def write_delta(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """The trained weights, by their names in the delta's file, into the folder."""
        save_file(dict(tensors), folder / self.delta_file, metadata=self.modelspec())

    def modelspec(self) -> dict[str, str]:
        """What the file's header says (github.com/Stability-AI/ModelSpec); no date, so that equal weights are equal
        files."""
        told = {
            "sai_model_spec": "1.0.1",
            "title": f"{self.method} on {self.config.base}",
            "architecture": f"stable-diffusion/{self.method}",
            "implementation": "pig",
        }
        return {f"modelspec.{name}": value for name, value in told.items()}

    def save_weights(self, folder: Path, *, half: bool = False) -> None:
        """The trained weights alone, in the method's own format. half: in float16."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = ((name, one.half() if half else one) for name, one in self.trained_weights())
        self.write_delta(folder, {name: one.detach().cpu().contiguous() for name, one in weights})

    def base_parts(self) -> AbstractContextManager[None]:
        """For a pipeline that is `kept_apart`: inside, its components are the base model's own."""
        return nullcontext()

    def model_options(self) -> dict[str, Any]:
        """The options of `from_backbone` that this model was made with, as JSON."""
        return {}

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the diffusers folder, the method's name beside it and, if `kept_apart`, the trained weights."""
        with self.base_parts():
            super().save_pretrained(save_directory, *args, **kwargs)
        if self.kept_apart:
            self.save_weights(Path(save_directory))
        else:  # diffusers' own loader, which would leave such weights out, finds the class by this file:
            # custom_pipeline=FOLDER, trust_remote_code=True
            kind = type(self)
            write_text(Path(save_directory) / "pipeline.py", f"from {kind.__module__} import {kind.__name__}\n")
        write_text(Path(save_directory) / METHOD_FILE, json.dumps({"method": self.method}) + "\n")
