"""InstantBooth (arXiv 2304.03411). Read in this order: `pig/attention/adapters.py`, `network`, `module`, `pipeline`."""

from typing import Any

from pig.methods.instantbooth.network import InstantBoothNet
from pig.methods.instantbooth.pipeline import InstantBoothPipeline
from pig.methods.instantbooth.pipeline import InstantBoothPipeline as Pipeline

__all__ = ["InstantBoothNet", "InstantBoothPipeline", "Pipeline"]


def __getattr__(name: str) -> Any:
    """`InstantBooth`, also as `Module`, when asked for: drawing needs no Lightning, which takes seconds to import."""
    if name in ("InstantBooth", "Module"):
        from pig.methods.instantbooth.module import InstantBooth

        return InstantBooth
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
