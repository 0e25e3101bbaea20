"""The base model alone, without references."""

from pig.methods.base.pipeline import BasePipeline as Pipeline

__all__ = ["Pipeline"]
