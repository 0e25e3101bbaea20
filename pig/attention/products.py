"""Attention in parts: projections to heads, softmax products, the output projection."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F


def self_attention(attn: Attention, f: Tensor) -> Tensor:
    """SA(f), Eq. 2 of BootPIG: (B, N, C) -> (B, N, C)."""
    return output(attn, attend(*(heads(attn, project(f)) for project in (attn.to_q, attn.to_k, attn.to_v))))


def heads(attn: Attention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, H, N, d)


def output(attn: Attention, x: Tensor) -> Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(x.transpose(1, 2).flatten(2)))  # (B, H, N, d) -> (B, N, C)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all (B, H, N, d)."""
    if slow_backward(q):
        # A few samples at a time: what fits into no cache costs twice the time.
        size = max(1, 2**22 // (q.shape[1] * q.shape[2] * k.shape[2]))
        parts = zip(q.split(size), k.split(size), v.split(size), strict=True)
        o = [((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v for q, k, v in parts]
        return torch.cat(o) if len(o) > 1 else o[0]
    return F.scaled_dot_product_attention(q, k, v)


def slow_backward(x: Tensor) -> bool:
    """On CPUs the bf16 backward pass of scaled_dot_product_attention takes twice as long as plain products."""
    half = torch.is_autocast_enabled("cpu") or (x.dtype is torch.bfloat16 and x.device.type == "cpu")
    return half and x.device.type in ("cpu", "meta") and torch.is_grad_enabled()


class TextAttnProcessor(AttnProcessor2_0):
    """`attn2`: cross-attention to the text. Accepts and ignores the context of `attn1`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        context: object | None = None,
    ) -> Tensor:
        if not slow_backward(hidden_states):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        q, text = attn.to_q(hidden_states), encoder_hidden_states
        return output(attn, attend(*(heads(attn, x) for x in (q, attn.to_k(text), attn.to_v(text)))))
