"""The IP-Adapter model (arXiv 2308.06721, section 3.2): a second cross-attention, for tokens made of an image.

    Z' = softmax(Q K^T / sqrt(d)) V + scale softmax(Q K'^T / sqrt(d)) V'

K', V': of the image tokens, by a pair of matrices of each `attn2`, which start as those of the text. The processors are
diffusers' own.
"""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from pig.attention.images import cross_attention_layers, install_image_attention
from pig.models.weights import like, random_but_the_same

TOKENS = 4


class ImagePrompt(ModelMixin, ConfigMixin):
    """All that is trained. Its parameters' names are those of the public format, `image_proj.*` and
    `ip_adapter.N.to_k_ip.weight` with N = 1, 3, 5, ... in the order of `unet.attn_processors`: down, up, mid.

    Args:
        image_dim: E, of the image embeddings. text_dim: D. widths: of all `attn2`, in that order.
    """

    @register_to_config
    def __init__(self, image_dim: int, text_dim: int, widths: list[int], tokens: int = TOKENS) -> None:
        super().__init__()
        self.tokens = tokens
        self.image_proj = nn.ModuleDict(
            {"proj": nn.Linear(image_dim, tokens * text_dim), "norm": nn.LayerNorm(text_dim)}
        )
        pairs = [
            nn.ModuleDict({name: nn.Linear(text_dim, width, bias=False) for name in ("to_k_ip", "to_v_ip")})
            for width in widths
        ]
        self.ip_adapter = nn.ModuleDict({str(2 * i + 1): pair for i, pair in enumerate(pairs)})

    @classmethod
    def of(cls, unet: UNet2DConditionModel, image_dim: int) -> ImagePrompt:
        """For this UNet; each pair starts as its layer's own to_k and to_v."""
        layers = [unet.get_submodule(name) for name in cross_attention_layers(unet)]
        with random_but_the_same():
            made = cls(image_dim, unet.config.cross_attention_dim, [layer.to_k.out_features for layer in layers])
        for pair, layer in zip(made.ip_adapter.values(), layers, strict=True):
            pair.load_state_dict({f"{name}_ip.weight": getattr(layer, name).weight for name in ("to_k", "to_v")})
        return like(made, unet)

    def pairs(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """to_k_ip and to_v_ip of each layer."""
        return [tuple(pair.values()) for pair in self.ip_adapter.values()]  # type: ignore[operator]

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, K, E) -> (B, K, tokens, D)."""
        projected = self.image_proj["proj"](embeds.to(self.dtype)).unflatten(-1, (self.tokens, -1))
        return self.image_proj["norm"](projected)


class IPAdapterNet(nn.Module):
    """A frozen UNet with an image prompt.

    Args:
        unet: frozen.
        prompt: of this UNet.
    """

    def __init__(self, unet: UNet2DConditionModel, prompt: ImagePrompt) -> None:
        super().__init__()
        self.unet, self.prompt = unet, prompt
        self.processors = install_image_attention(unet, prompt.pairs(), prompt.tokens)

    def trainable_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """One group, by the names in this module."""
        return {"prompt": {f"prompt.{name}": one for name, one in self.prompt.named_parameters()}}

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, embeds: Tensor | None, scale: float = 1.0
    ) -> Tensor:
        """The prediction (B, 4, h, w); without embeddings, or at scale 0, that of the plain UNet, bit for bit.

        Args:
            latents: (B, 4, h, w). timesteps: (B,). text: (B, L, D).
            embeds: of K images for each sample, (B, K, E); zeros where a sample has none.
        """
        for processor in self.processors:
            processor.scale = [scale]
        told = text if embeds is None or scale == 0 else (text, [self.prompt(embeds)])
        return self.unet(latents, timesteps, told).sample

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()
