"""IP-Adapter (arXiv 2308.06721). Read in this order: `network`, `module`, `pipeline`, `release`."""

from typing import Any

from pig.methods.ip_adapter.network import IPAdapterNet
from pig.methods.ip_adapter.pipeline import IPAdapterPipeline
from pig.methods.ip_adapter.pipeline import IPAdapterPipeline as Pipeline

__all__ = ["IPAdapterNet", "IPAdapterPipeline", "Pipeline"]


def __getattr__(name: str) -> Any:
    """`IPAdapter`, also as `Module`, when asked for: drawing needs no Lightning, which takes seconds to import."""
    if name in ("IPAdapter", "Module"):
        from pig.methods.ip_adapter.module import IPAdapter

        return IPAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
