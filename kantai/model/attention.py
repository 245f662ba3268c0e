"""Attention: PyTorch's fused kernels, and variable-length attention that stops at document ends."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_or_varlen"  # in memory only: transformers writes no attention into a config file


def pick(states: Tensor, positions: Tensor) -> Tensor:
    """[rows, length, size] at [rows, picked], as [rows, picked, size]."""
    return states.gather(1, positions[:, :, None].expand(-1, -1, states.shape[2]))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout: float, scale: float) -> Tensor:
    """Attention of [rows, heads, looking, head size] on [rows, heads, length, head size], where the mask is true."""
    if query.is_cpu and query.dtype != torch.float32:  # PyTorch's flash kernel takes twice to five times as long there as plain products
        scores = query @ key.mT * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return nn.functional.dropout(scores.softmax(-1), dropout) @ value
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)


def _sdpa_or_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    document_starts: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [rows, heads, length, head size] in, [rows, length, heads, head size] out.

    Args:
        document_starts: see :meth:`MaskedRoberta.forward`; None: all of a row is seen where the mask is true.
    """
    if document_starts is None:
        return attend(query, key, value, attention_mask, dropout=dropout, scale=scaling).transpose(1, 2), None
    rows, _, length, _ = query.shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    # A row's length for the longest document's, which only the device knows.
    out: Any = varlen_attn(query, key, value, document_starts, document_starts, length, length)
    return out.unflatten(0, (rows, length)), None


AttentionInterface.register(ATTENTION, _sdpa_or_varlen)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
