"""DreamBooth (arXiv 2208.12242). Read in this order: `network`, `module`, `pipeline`."""

from typing import Any

from pig.methods.dreambooth.network import DreamBoothNet
from pig.methods.dreambooth.pipeline import DreamBoothPipeline
from pig.methods.dreambooth.pipeline import DreamBoothPipeline as Pipeline

__all__ = ["DreamBoothNet", "DreamBoothPipeline", "Pipeline"]


def __getattr__(name: str) -> Any:
    """`DreamBooth`, also as `Module`, when asked for: drawing needs no Lightning, which takes seconds to import."""
    if name in ("DreamBooth", "Module"):
        from pig.methods.dreambooth.module import DreamBooth

        return DreamBooth
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
