"""DreamBlend (arXiv 2411.19390): draws with two checkpoints of one DreamBooth tuning. Nothing of it is trained here."""

from pig.methods.dreamblend.pipeline import DreamBlendPipeline
from pig.methods.dreamblend.pipeline import DreamBlendPipeline as Pipeline

__all__ = ["DreamBlendPipeline", "Pipeline"]
