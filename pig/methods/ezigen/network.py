"""The EZIGen model (arXiv 2409.08091, section 3.2): one frozen UNet that reads references, and draws with adapters."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from pig.attention.adapters import (
    AdaptersByBlock,
    ReferenceAdapter,
    ScaledReferences,
    adapter_arguments,
    install_adapters,
)
from pig.attention.install import transformer_blocks
from pig.attention.reading import install_reading, last_block, read_features
from pig.attention.reference import References
from pig.models.weights import like


class Adapters(ModelMixin, ConfigMixin):
    """The adapters of all transformer blocks, which are saved apart from the UNet.

    Args:
        widths, heads: of each block, by its name.
        double_residual: see `ReferenceAdapter`.
    """

    @register_to_config
    def __init__(self, widths: dict[str, int], heads: dict[str, int], double_residual: bool = False) -> None:
        super().__init__()
        layers = {name: ReferenceAdapter(name, width, heads[name], double_residual) for name, width in widths.items()}
        self.layers = AdaptersByBlock(layers)

    @classmethod
    def of(cls, unet: UNet2DConditionModel, double_residual: bool) -> Adapters:
        """For this UNet, each starting as its block's `attn1`."""
        blocks = transformer_blocks(unet)
        made = cls(
            {name: block.attn1.to_q.in_features for name, block in blocks.items()},
            {name: block.attn1.heads for name, block in blocks.items()},
            double_residual,
        )
        for name, layer in made.by_block().items():
            layer.start_as(blocks[name])
        return like(made, unet)

    def by_block(self) -> dict[str, ReferenceAdapter]:
        return self.layers.by_block()


class EZIGenNet(nn.Module):
    """One UNet serves as Main and as Reference UNet; only the adapters between `attn1` and `attn2` are trained.

    Args:
        unet: frozen.
        double_residual: see `ReferenceAdapter`.
        adapters: of this UNet, where there are some already.
    """

    def __init__(
        self, unet: UNet2DConditionModel, *, double_residual: bool = False, adapters: Adapters | None = None
    ) -> None:
        super().__init__()
        self.unet = unet
        self.adapters = Adapters.of(unet, double_residual) if adapters is None else adapters
        if list(self.adapters.by_block()) != list(transformer_blocks(unet)):
            raise ValueError("the adapters are of another UNet: their blocks differ")
        install_reading(unet)
        install_adapters(unet, self.adapters.by_block())

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """`{block}.norm.weight`, `.norm.bias`, `.to_q.weight`, `.to_k.weight`, `.to_v.weight`, `.to_out.0.weight`,
        `.to_out.0.bias` and `.scale` of each block."""
        return {
            f"{block}.{name}": parameter
            for block, layer in self.adapters.by_block().items()
            for name, parameter in layer.named_parameters()
        }

    def trainable_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """All adapters, one group, by their names in this module."""
        return {"adapters": {f"adapters.{name}": one for name, one in self.adapters.named_parameters()}}

    def encode_reference(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The outputs of all blocks' `norm1`, from a pass that ends at the last of them.

        Args:
            latents: (B, K, 4, h, w), noised references. timesteps: (B,). text: (B, K, L, D).

        Returns:
            block -> (B, K, N, C).
        """
        count = latents.shape[1]
        ts = timesteps.repeat_interleave(count)
        features = read_features(self.unet, latents.flatten(0, 1), ts, text.flatten(0, 1))
        return {name.removesuffix(".attn1"): f.unflatten(0, (-1, count)) for name, f in features.items()}

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        references: Mapping[str, Tensor] | ScaledReferences | None = None,
        *,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The prediction (B, 4, h, w); without references the adapters are off: the plain UNet, bit for bit.

        Args:
            latents: (B, 4, h, w). timesteps: (B,). text: (B, L, D).
            references: what `encode_reference` returned; in sampling, `ScaledReferences`.
            kept: (B',) long, the samples that `references` are of, where those of the others are left out.
        """
        context: References | ScaledReferences | None
        if references is None or isinstance(references, ScaledReferences):
            context = references
        else:
            context = References(references, kept)
        return self.unet(latents, timesteps, text, cross_attention_kwargs=adapter_arguments(context)).sample

    def interrupted_blocks(self) -> list[nn.Module]:
        """Those in which a pass ends: the reading's."""
        return [self.unet.get_submodule(last_block(self.unet))]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass. (The reading pass needs none: it has no gradient.)"""
        self.unet.enable_gradient_checkpointing()
