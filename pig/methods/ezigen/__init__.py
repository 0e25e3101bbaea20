"""EZIGen (arXiv 2409.08091). Read in this order: `pig/attention/adapters.py`, `network`, `module`, `pipeline`."""

from typing import Any

from pig.methods.ezigen.network import EZIGenNet
from pig.methods.ezigen.pipeline import EZIGenPipeline
from pig.methods.ezigen.pipeline import EZIGenPipeline as Pipeline

__all__ = ["EZIGenNet", "EZIGenPipeline", "Pipeline"]


def __getattr__(name: str) -> Any:
    """`EZIGen`, also as `Module`, when it is asked for: drawing needs no Lightning, which takes seconds to import."""
    if name in ("EZIGen", "Module"):
        from pig.methods.ezigen.module import EZIGen

        return EZIGen
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
