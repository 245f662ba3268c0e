"""RoBERTa: the stock model, with the language-model head and the loss on masked positions alone."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaLMHead

from kantai.config.schema import ModelConfig
from kantai.data.masking import IGNORED_LABEL
from kantai.data.tokenizer import Vocabulary
from kantai.model.attention import ATTENTION, attend, pick

_VOCAB_MULTIPLE = 64  # matrix products like round sizes


class _LastLayer(RobertaLayer):
    """A last layer that is computed at masked positions alone: its other outputs are not used.

    All tokens are still attended to. For 15 % masked it costs a third of a layer.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *rest: Any,
        masked_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map [rows, length, hidden] to [rows, most masked, hidden], or to all positions.

        Args:
            masked_positions: [rows, most masked]; None computes all positions.
        """
        if masked_positions is None:
            states: Tensor = super().forward(hidden_states, attention_mask, *rest, **kwargs)
            return states
        attention = self.attention.self
        picked = pick(hidden_states, masked_positions)
        query, key, value = (
            projection(states).unflatten(2, (-1, attention.attention_head_size)).transpose(1, 2)
            for projection, states in (
                (attention.query, picked),
                (attention.key, hidden_states),
                (attention.value, hidden_states),
            )
        )
        if attention_mask is not None and attention_mask.shape[2] > 1:
            # [rows, 1, length, length]
            attention_mask = pick(attention_mask[:, 0], masked_positions)[:, None]
        dropout = attention.dropout.p if self.training else 0.0
        scale = attention.scaling
        seen = attend(query, key, value, attention_mask, dropout=dropout, scale=scale)
        attended = self.attention.output(seen.transpose(1, 2).flatten(2), picked)
        output: Tensor = self.feed_forward_chunk(attended)
        return output


class _Head(RobertaLMHead):
    """A language-model head followed by the loss: compiled as one, it keeps no fp32 logits."""

    def forward(self, states: Tensor, labels: Tensor | None = None) -> Any:
        """Logits [..., vocabulary]; or, with labels [...], their loss sum and right predictions."""
        logits = super().forward(states)
        if labels is None:
            return logits
        # bf16 steps of a loss of 5 are 1/32.
        logits = logits.flatten(0, -2).float()
        labels = labels.flatten()
        loss_sum = nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED_LABEL, reduction="sum"
        )
        return loss_sum, (logits.detach().argmax(1) == labels).sum().float()


class _Norm(nn.LayerNorm):
    """A layer norm that returns the autocast type, which matrix products take without a cast.

    It moves half the bytes that fp32 would.
    """

    def forward(self, states: Tensor) -> Tensor:
        """[..., hidden] in and out."""
        device = states.device.type
        # In bf16, PyTorch on CPU adds up gradients in bf16: a tenth off over 1,000 tokens.
        normed = super().forward(states.float())
        if torch.is_autocast_enabled(device):
            return normed.to(torch.get_autocast_dtype(device))
        return normed


class MaskedRoberta(RobertaForMaskedLM):
    """``RobertaForMaskedLM`` that computes last layer and logits at masked positions alone.

    Parameters, state dict and config are the stock ones. Of roberta-base's forward FLOPs at 512
    tokens and 15 % masked, the head on all positions is a third.

    Attributes:
        compute_dtype: of matrix products and what moves between them, by autocast in the forward
            pass. Parameters stay as they are.
    """

    compute_dtype = torch.float32

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        # These classes add no state. Modules made anew would draw other initial weights.
        self.roberta.encoder.layer[-1].__class__ = _LastLayer
        self.lm_head.__class__ = _Head
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = _Norm

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        masked_positions: Tensor | None = None,
        labels: Tensor | None = None,
        document_starts: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Sum of the masked tokens' losses, and how many of them are predicted right.

        Args:
            input_ids: [rows, length].
            attention_mask: [rows, length], or None where there is no padding.
            masked_positions: [rows, most masked]; None asks for the stock forward pass.
            labels: [rows, most masked]; ``IGNORED_LABEL`` where a row has fewer masked tokens.
            document_starts: int32; where each document begins in the rows laid end to end, then
                the size of all rows; or None. Each document is computed as if it were alone. The
                rows must have no padding.

        Returns:
            (loss sum, right predictions), both fp32 scalars.
        """
        uses_autocast = self.compute_dtype != torch.float32
        with torch.autocast(input_ids.device.type, self.compute_dtype, enabled=uses_autocast):
            if document_starts is None:
                kwargs["attention_mask"] = attention_mask
            else:
                kwargs |= self._isolated(document_starts, *input_ids.shape)
            if masked_positions is None or labels is None:
                return super().forward(input_ids, labels=labels, **kwargs)
            if "document_starts" in kwargs:
                # Variable-length attention has all positions laid end to end.
                states = self.roberta(input_ids, **kwargs).last_hidden_state
                states = pick(states, masked_positions)
            else:
                kwargs["masked_positions"] = masked_positions
                states = self.roberta(input_ids, **kwargs).last_hidden_state
            return self.lm_head(states, labels)

    def compile_parts(self) -> None:
        """Have the layers and the head compiled at their first call, one by one.

        All layers but the last share their compiled code, and gradients of one layer are reduced
        while another's are computed.
        """
        for part in (*self.roberta.encoder.layer, self.lm_head):
            part.compile()

    def _isolated(self, starts: Tensor, rows: int, length: int) -> dict[str, Tensor]:
        """Arguments that end attention and position ids at document ends. Waits for no device."""
        indices = torch.arange(rows * length, dtype=starts.dtype, device=starts.device)
        documents = torch.searchsorted(starts, indices, right=True) - 1
        offsets = (indices - starts[documents]).long().view(rows, length)
        arguments = {"position_ids": self.config.pad_token_id + 1 + offsets}
        if self._varlen_applies(starts.device):
            return {**arguments, "document_starts": starts}
        documents = documents.view(rows, 1, length)
        return {**arguments, "attention_mask": documents[..., :, None] == documents[..., None, :]}

    def _varlen_applies(self, device: torch.device) -> bool:
        """Whether PyTorch's variable-length attention can serve.

        It is a flash kernel: no fp32, no dropout, no odd head sizes.
        """
        if device.type != "cuda" or self.config._attn_implementation != ATTENTION:
            return False
        if torch.cuda.get_device_properties(device).major < 8:
            return False
        autocasts = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if autocasts else self.dtype
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        head_size = self.config.hidden_size // self.config.num_attention_heads
        is_half = dtype in (torch.bfloat16, torch.float16)
        return is_half and not dropout and head_size % 8 == 0 and head_size <= 128


def build_model(
    config: ModelConfig, vocabulary: Vocabulary, *, seq_len: int, seed: int
) -> MaskedRoberta:
    """A new model for up to ``seq_len`` tokens. Its weights are a function of the seed."""
    rounded = -(-vocabulary.size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    positions = max(seq_len + 2, vocabulary.positions(seq_len))
    shape = config.model_dump(exclude={"vocab_size", "max_position_embeddings", "position_init"})
    torch.manual_seed(seed)
    model = MaskedRoberta(
        RobertaConfig(
            **shape,
            vocab_size=config.vocab_size or rounded,
            max_position_embeddings=config.max_position_embeddings or positions,
            type_vocab_size=1,
            bos_token_id=vocabulary.bos_id,
            pad_token_id=vocabulary.pad_id,
            eos_token_id=vocabulary.eos_id,
            attn_implementation=ATTENTION,
            architectures=["RobertaForMaskedLM"],
        )
    )
    if config.position_init == "sinusoidal":
        embedding = model.roberta.embeddings.position_embeddings
        _set_sinusoidal(embedding, config.initializer_range)
    return model


@torch.no_grad()
def _set_sinusoidal(embedding: nn.Embedding, root_mean_square: float) -> None:
    """Set sines and cosines of falling frequencies (Vaswani et al. 2017, section 3.5).

    The row of the padding stays 0.
    """
    first = (embedding.padding_idx or 0) + 1
    positions = torch.arange(embedding.num_embeddings - first)[:, None]
    dimensions = torch.arange(embedding.embedding_dim)
    angles = positions * 10_000.0 ** -(dimensions // 2 * 2 / embedding.embedding_dim)
    waves = torch.where(dimensions % 2 == 0, angles.sin(), angles.cos())
    embedding.weight[first:] = waves * (root_mean_square * 2**0.5)


def training_flops(shape: RobertaConfig, tokens: int, attended_pairs: int, masked: int) -> int:
    """Floating-point operations of the matrix products that one step needs, forward and backward.

    A multiply-add counts as 2, and the backward pass as twice the forward pass (PaLM, appendix B).
    Embedding look-ups, norms and recomputation count nothing; nor do padding and the head at
    positions that are not masked. The last layer counts in full: computing it only at masked
    positions is an optimisation, not less work to account for.
    """
    hidden: int = shape.hidden_size
    layers: int = shape.num_hidden_layers
    per_token = layers * (8 * hidden**2 + 4 * hidden * shape.intermediate_size)
    per_pair = layers * 4 * hidden
    per_masked = 2 * hidden * (hidden + shape.vocab_size)
    return 3 * int(tokens * per_token + attended_pairs * per_pair + masked * per_masked)
