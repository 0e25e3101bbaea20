"""One diffusers pipeline per method."""

from pig.pipelines.bootpig import BootPIGPipeline

__all__ = ["BootPIGPipeline"]
