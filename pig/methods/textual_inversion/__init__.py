"""Textual Inversion (arXiv 2208.01618). Read in this order: `pig/models/words.py`, `module`, `pipeline`."""

from typing import Any

from pig.methods.textual_inversion.pipeline import TextualInversionPipeline
from pig.methods.textual_inversion.pipeline import TextualInversionPipeline as Pipeline

__all__ = ["Pipeline", "TextualInversionPipeline"]


def __getattr__(name: str) -> Any:
    """`TextualInversion`, also as `Module`, when asked for: drawing needs no Lightning, which takes seconds to
    import."""
    if name in ("TextualInversion", "Module"):
        from pig.methods.textual_inversion.module import TextualInversion

        return TextualInversion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
