"""The BootPIG model (arXiv 2401.13974, section 3.2): a Reference UNet and a Base UNet with Reference Self-Attention."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pig.attention.install import self_attention_layers
from pig.attention.merged import MergedReferences
from pig.attention.reading import checkpoint_reading, install_reading, last_block, read_features, read_parameters
from pig.attention.reference import Pooling, References, install_reference_attention
from pig.models.deep_cache import full_pass, shallow_pass


class TwoUNet(nn.Module):
    """Reference UNet U_phi reads the references; Base UNet U_theta attends to what it found.

    Both come from the same checkpoint (phi = theta at the start) and keep diffusers' own modules and names.

    Args:
        base_unet: U_theta; its `attn1` become RSA layers.
        reference_unet: U_phi; another instance of the same architecture.
        pooling: how K > 1 references are merged: `softmax` (Eq. 5-8), `argmax` (the authors' release), `mean`,
            `concat` (the baselines of Fig. 6).
        reference_key_scale: factor on the reference features that enter the keys (the release: 1.1).
    """

    def __init__(
        self,
        base_unet: UNet2DConditionModel,
        reference_unet: UNet2DConditionModel,
        *,
        pooling: Pooling = "softmax",
        reference_key_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if base_unet is reference_unet:
            raise ValueError("base_unet and reference_unet must be two instances")
        self.layers = self_attention_layers(base_unet)
        if self_attention_layers(reference_unet) != self.layers:
            raise ValueError("base_unet and reference_unet differ in their self-attention layers")
        install_reference_attention(base_unet, pooling=pooling, key_scale=reference_key_scale)
        install_reading(reference_unet)
        self.base_unet, self.reference_unet = base_unet, reference_unet

    def encode_reference(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Inputs of all `attn1` of the Reference UNet.

        Args:
            latents: (B, K, 4, h, w), noised references, scaled by `vae.config.scaling_factor`.
            timesteps: (B,) long.
            text: (B, L, D), embedding of the caption that the Reference UNet gets.

        Returns:
            layer name -> (B, K, N, C), N the number of positions at that layer.
        """
        if latents.ndim != 5:
            raise ValueError(f"reference latents must be (B, K, 4, h, w), got {tuple(latents.shape)}")
        count = latents.shape[1]
        features = read_features(
            self.reference_unet,
            latents.flatten(0, 1),
            timesteps.repeat_interleave(count),
            text.repeat_interleave(count, dim=0),
        )
        return {name: f_ref.unflatten(0, (-1, count)) for name, f_ref in features.items()}

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        references: Mapping[str, Tensor] | None = None,
        *,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The Base UNet's prediction, (B, 4, h, w); without references exactly the plain UNet's.

        Args:
            latents: (B, 4, h, w), noised.
            timesteps: (B,) long.
            text: (B, L, D).
            references: what `encode_reference` returned (features with B = 1 serve all samples).
            kept: (B',) long, the samples that `references` are of, where those of the others are left out.
        """
        arguments = None if references is None else {"context": References(references, kept)}
        return self.base_unet(latents, timesteps, text, cross_attention_kwargs=arguments).sample

    def sample(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        references: MergedReferences | None,
        deep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same in sampling, where the samples are branches of the same latents at the same t. Not for training.

        deep: an earlier step's deep features of the same batch, to be used again in place of a full pass (DeepCache).

        Returns:
            The prediction (B, 4, h, w), and the deep features.
        """
        arguments = None if references is None else {"context": references}
        if deep is None:
            return full_pass(self.base_unet, latents, timesteps, text, arguments)
        return shallow_pass(self.base_unet, latents, timesteps, text, arguments, deep), deep

    def trainable_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters that the paper trains, by group and by their names in this module.

        `reference_unet`: all of U_phi but what lies behind its last `attn1` input, which can never get a gradient.
        `rsa`: W_q, W_k, W_v, W_o of the base's `attn1`.
        """
        rsa = tuple(f"{name}." for name in self.layers)
        return {
            "reference_unet": {
                f"reference_unet.{name}": parameter for name, parameter in read_parameters(self.reference_unet).items()
            },
            "rsa": {
                f"base_unet.{name}": parameter
                for name, parameter in self.base_unet.named_parameters()
                if name.startswith(rsa)
            },
        }

    def interrupted_blocks(self) -> list[nn.Module]:
        """Those in which a pass ends."""
        return [self.reference_unet.get_submodule(last_block(self.reference_unet))]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: same loss and gradients, less memory, more time."""
        self.base_unet.enable_gradient_checkpointing()
        checkpoint_reading(self.reference_unet)
