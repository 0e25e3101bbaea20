"""Released IP-Adapters (github.com/tencent-ailab/IP-Adapter): those whose `image_proj` is one linear layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from pig.methods.ip_adapter.pipeline import IPAdapterPipeline
from pig.models.backbone import Backbone
from pig.models.weights import copy_weights


def is_release(names: Collection[str]) -> bool:
    return {"image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"} <= set(names)


def from_release(weights: Mapping[str, Tensor], backbone: Backbone, base: str) -> IPAdapterPipeline:
    """IP-Adapter on this base model, with these weights.

    Raises:
        InputError: they are of another base model or another image encoder.
    """
    pipeline = IPAdapterPipeline.from_backbone(backbone, base=base, settings={})
    remedy = "It is of another base model (name it by --base) or image encoder"
    copy_weights(weights, dict(pipeline.prompt.named_parameters()), "the release", remedy)
    return pipeline
