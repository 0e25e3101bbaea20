"""BootPIG (arXiv 2401.13974). Read in this order: `pig/attention/reference.py`, `network`, `module`, `pipeline`."""

from typing import Any

from pig.methods.bootpig.network import TwoUNet
from pig.methods.bootpig.pipeline import BootPIGPipeline
from pig.methods.bootpig.pipeline import BootPIGPipeline as Pipeline

__all__ = ["BootPIGPipeline", "Pipeline", "TwoUNet"]


def __getattr__(name: str) -> Any:
    """`BootPIG`, also as `Module`, when it is asked for: drawing needs no Lightning, which takes seconds to import."""
    if name in ("BootPIG", "Module"):
        from pig.methods.bootpig.module import BootPIG

        return BootPIG
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
