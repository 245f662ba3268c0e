"""Attention: PyTorch's fused kernels, and variable-length attention that stops at document ends."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

# The name under which transformers finds this attention. It is never written into a config file.
ATTENTION = "sdpa_or_varlen"


def pick(states: Tensor, positions: Tensor) -> Tensor:
    """States [rows, length, size] at positions [rows, picked], as [rows, picked, size]."""
    return states.gather(1, positions[:, :, None].expand(-1, -1, states.shape[2]))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout: float, scale: float
) -> Tensor:
    """Attention of queries to keys and values, where the mask is true.

    Args:
        query: [rows, heads, queries, head size].
        key: [rows, heads, length, head size], and ``value`` alike.
        mask: bool, broadcast to [rows, heads, queries, length]; None: all is seen.

    Returns:
        [rows, heads, queries, head size].
    """
    if query.is_cpu and query.dtype != torch.float32:
        # PyTorch's flash kernel on CPU takes two to five times as long as plain products there.
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
    """Attention as transformers calls it.

    Args:
        query: [rows, heads, length, head size]; ``key`` and ``value`` alike.
        document_starts: see :meth:`MaskedRoberta.forward`; None: the whole row is seen, where the
            mask is true.

    Returns:
        [rows, length, heads, head size], and no attention weights.
    """
    if document_starts is None:
        seen = attend(query, key, value, attention_mask, dropout=dropout, scale=scaling)
        return seen.transpose(1, 2), None
    rows, _, length, _ = query.shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    # The kernel wants the longest document's length, which only the device knows. A row's is safe.
    out: Any = varlen_attn(query, key, value, document_starts, document_starts, length, length)
    return out.unflatten(0, (rows, length)), None


AttentionInterface.register(ATTENTION, _sdpa_or_varlen)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
