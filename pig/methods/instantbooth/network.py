"""The InstantBooth model (arXiv 2304.03411, section 3): a frozen UNet that sees references as one word and as patches.

f_c = 1/N sum_i E_c(x_s^i)              in place of the identifier's embedding (Eq. 2); alpha f_c in sampling (Eq. 6)
f_p = [E_p(x_s^1), ..., E_p(x_s^N)]     for the adapters of all blocks (Eq. 3, 4)
"""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from pig.attention.adapters import AdaptersByBlock, GatedAdapter, PatchTokens, adapter_arguments, install_adapters
from pig.attention.install import transformer_blocks
from pig.models.identifier import first_positions
from pig.models.vision import look
from pig.models.weights import like, random_but_the_same


class Concept(ModelMixin, ConfigMixin):
    """The heads of both image encoders, and the adapters of all blocks.

    The paper's E_p ends in one fully-connected layer, but blocks have several widths: here it has one for each width.

    Args:
        image_dim: E, of CLIP's global feature. patch_dim: V, of its tokens. text_dim: D.
        widths, heads: of each block, by its name.
        patch_feature: whether adapters see all of CLIP's tokens; else its global feature alone (Table 3).
    """

    @register_to_config
    def __init__(
        self,
        image_dim: int,
        patch_dim: int,
        text_dim: int,
        widths: dict[str, int],
        heads: dict[str, int],
        patch_feature: bool = True,
    ) -> None:
        super().__init__()
        self.patch_feature = patch_feature
        self.concept = nn.Linear(image_dim, text_dim)
        told = patch_dim if patch_feature else image_dim
        self.patch = nn.ModuleDict({str(width): nn.Linear(told, width) for width in sorted(set(widths.values()))})
        self.adapters = AdaptersByBlock({name: GatedAdapter(width, heads[name]) for name, width in widths.items()})

    @classmethod
    def of(
        cls, unet: UNet2DConditionModel, vision: CLIPVisionModelWithProjection, *, patch_feature: bool = True
    ) -> Concept:
        """For this UNet and this image encoder; the heads start at random, the adapters as no layer."""
        blocks = {name: block.attn1 for name, block in transformer_blocks(unet).items()}
        with random_but_the_same():
            made = cls(
                vision.config.projection_dim,
                vision.config.hidden_size,
                unet.config.cross_attention_dim,
                {name: attn1.to_q.in_features for name, attn1 in blocks.items()},
                {name: attn1.heads for name, attn1 in blocks.items()},
                patch_feature,
            )
        return like(made, unet)

    def by_block(self) -> dict[str, GatedAdapter]:
        return self.adapters.by_block()

    def forward(self, embeds: Tensor, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """f_c and f_p of N references.

        Args:
            embeds: CLIP's global features, (B, N, E). tokens: its last layer's, (B, N, M, V).

        Returns:
            (B, D); and width of a block -> (B, N M, C).
        """
        f_c = self.concept(embeds.to(self.dtype)).mean(1)
        seen = tokens if self.patch_feature else embeds[:, :, None]
        return f_c, {int(width): head(seen.to(self.dtype)).flatten(1, 2) for width, head in self.patch.items()}


class InstantBoothNet(nn.Module):
    """A UNet with the adapters in it, an image encoder, and its heads.

    Args:
        unet, vision: frozen, unless they are tuned.
        concept: of these two.
        tuned_vision_layers: so many of the image encoder's last layers are trained (Table 3: tuned CLIP encoder).
        tuned_unet: train the UNet's own weights, too (Table 3: tuned UNet).
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vision: CLIPVisionModelWithProjection,
        concept: Concept,
        *,
        tuned_vision_layers: int = 0,
        tuned_unet: bool = False,
    ) -> None:
        super().__init__()
        self.unet, self.vision, self.concept = unet, vision, concept
        self.tuned_vision_layers, self.tuned_unet = tuned_vision_layers, tuned_unet
        install_adapters(unet, concept.by_block())

    def trainable_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Groups `heads` and `adapters`; `vision` and `unet` where they are tuned; by the names in this module."""
        own = {f"concept.{name}": one for name, one in self.concept.named_parameters()}
        adapters = {name: one for name, one in own.items() if name.startswith("concept.adapters.")}
        groups = {"heads": {name: one for name, one in own.items() if name not in adapters}, "adapters": adapters}
        layers = self.vision.vision_model.encoder.layers
        if self.tuned_vision_layers:
            first = len(layers) - self.tuned_vision_layers
            groups["vision"] = {
                f"vision.vision_model.encoder.layers.{first + number}.{name}": one
                for number, layer in enumerate(layers[first:])
                for name, one in layer.named_parameters()
            }
        if self.tuned_unet:
            groups["unet"] = {f"unet.{name}": one for name, one in self.unet.named_parameters()}
        return groups

    def read(self, pictures: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """f_c (B, D) and f_p, width -> (B, N M, C), of pictures (B, N, 3, H, W) in [-1, 1], the object on black."""
        embeds, tokens = look(self.vision, pictures.flatten(0, 1))
        return self.concept(embeds.unflatten(0, pictures.shape[:2]), tokens.unflatten(0, pictures.shape[:2]))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        f_p: Mapping[int, Tensor] | PatchTokens | None = None,
    ) -> Tensor:
        """The prediction (B, 4, h, w); without f_p the adapters are off.

        Args:
            latents: (B, 4, h, w). timesteps: (B,). text: (B, L, D), the concept in it (`inject`).
        """
        context = f_p if f_p is None or isinstance(f_p, PatchTokens) else PatchTokens(f_p)
        return self.unet(latents, timesteps, text, cross_attention_kwargs=adapter_arguments(context)).sample

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()


def text_with_concept(
    text_encoder: CLIPTextModel, ids: Tensor, token: int, f_c: Tensor, *, before_text: bool
) -> Tensor:
    """The text encoder's output (B, L, D), in which f_c stands for the identifier.

    Args:
        ids: (B, L). token: the identifier's. f_c: (B, D).
        before_text: f_c stands among the encoder's inputs instead, before its positions are added (Table 3).
    """
    there = first_positions(ids, token)
    if not before_text:
        return inject(text_encoder(ids)[0], there, f_c)
    words = text_encoder.get_input_embeddings()
    hook = words.register_forward_hook(lambda module, given, found: inject(found, there, f_c))
    try:
        return text_encoder(ids)[0]
    finally:
        hook.remove()


def inject(text: Tensor, there: Tensor, f_c: Tensor) -> Tensor:
    """The embeddings with the concept in place of the identifier's; every other one is untouched.

    Args:
        text: (B, L, D). there: the identifier's place, (B, L) bool. f_c: (B, D).
    """
    return f_c[:, None].to(text.dtype).where(there[..., None], text)
