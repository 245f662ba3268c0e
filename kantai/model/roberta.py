"""RoBERTa from a config: the stock model, with the language-model head and the loss on masked positions alone."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaLMHead

from kantai.config.schema import Config
from kantai.data.masking import IGNORED_LABEL
from kantai.data.tokenizer import Vocabulary
from kantai.model.attention import ATTENTION, attend, pick

_VOCAB_MULTIPLE = 64  # matrix products like round sizes


class _LastLayer(RobertaLayer):
    """The last layer, given masked positions, computed at those alone: nobody looks at its other outputs.

    All tokens are still looked at. For 15 % masked it costs a third, and a model of six layers a ninth less.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *rest: Any, masked_positions: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """[rows, length, hidden] in; [rows, most masked, hidden] out, or all rows where ``masked_positions`` is None."""
        if masked_positions is None:
            return super().forward(hidden_states, attention_mask, *rest, **kwargs)  # type: ignore[no-any-return]
        attention = self.attention.self
        picked = pick(hidden_states, masked_positions)
        query, key, value = (
            projection(states).unflatten(2, (-1, attention.attention_head_size)).transpose(1, 2)
            for projection, states in ((attention.query, picked), (attention.key, hidden_states), (attention.value, hidden_states))
        )
        if attention_mask is not None and attention_mask.shape[2] > 1:  # [rows, 1, length, length]
            attention_mask = pick(attention_mask[:, 0], masked_positions)[:, None]
        dropout = attention.dropout.p if self.training else 0.0
        seen = attend(query, key, value, attention_mask, dropout=dropout, scale=attention.scaling)
        return self.feed_forward_chunk(self.attention.output(seen.transpose(1, 2).flatten(2), picked))  # type: ignore[no-any-return]


class _Head(RobertaLMHead):
    """The head, given labels, with the loss behind it: compiled as one, logits are not kept in fp32."""

    def forward(self, states: Tensor, labels: Tensor | None = None) -> Any:
        """Logits, [..., vocabulary]; or the sum of losses and the count of right predictions where there are labels, [...]."""
        logits = super().forward(states)
        if labels is None:
            return logits
        logits, labels = logits.flatten(0, -2).float(), labels.flatten()  # bf16 steps of a loss of 5 are 1/32
        loss_sum = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        return loss_sum, (logits.detach().argmax(1) == labels).sum().float()


class _Norm(nn.LayerNorm):
    """A layer norm that under autocast gives what matrix products take: half the bytes move between them, and none of them casts again."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., hidden] in and out."""
        device = states.device.type
        normed = super().forward(states.float())  # in bf16, PyTorch on CPU adds up gradients in bf16: a tenth off over 1,000 tokens
        return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


class MaskedRoberta(RobertaForMaskedLM):
    """``RobertaForMaskedLM`` whose forward, given masked positions, computes the last layer and logits for those only.

    Parameters, state dict and config are the stock ones. Of roberta-base's forward FLOPs at 512 tokens and 15 % masked, the head
    on all positions is a third.

    Attributes:
        compute_dtype: of matrix products and what moves between them, by autocast in the forward; parameters stay as they are.
    """

    compute_dtype = torch.float32

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        # With the weights that they were given.
        self.roberta.encoder.layer[-1].__class__, self.lm_head.__class__ = _LastLayer, _Head
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
        """Sum of the losses of the masked tokens, and how many of them are predicted right.

        Args:
            input_ids: [rows, length].
            attention_mask: [rows, length], or None when there is no padding.
            masked_positions: [rows, most masked]; None asks for the stock forward.
            labels: [rows, most masked], ``IGNORED_LABEL`` where ``masked_positions`` is filling.
            document_starts: int32, where in the rows laid end to end each document begins, then their size; or None. Each document is
                computed as if it were alone. The rows must have no padding.

        Returns:
            (loss sum, count of right predictions), both fp32 scalars.
        """
        with torch.autocast(input_ids.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            if document_starts is None:
                kwargs["attention_mask"] = attention_mask
            else:
                kwargs |= self._isolated(document_starts, *input_ids.shape)
            if masked_positions is None or labels is None:
                return super().forward(input_ids, labels=labels, **kwargs)
            if "document_starts" in kwargs:  # variable-length attention has all positions laid end to end
                states = pick(self.roberta(input_ids, **kwargs).last_hidden_state, masked_positions)
            else:
                states = self.roberta(input_ids, masked_positions=masked_positions, **kwargs).last_hidden_state
            return self.lm_head(states, labels)

    def compile_parts(self) -> None:
        """Have the layers and the head compiled at their first call.

        One by one: all layers but the last share what is compiled, and gradients of one go out while another's are computed.
        """
        for part in (*self.roberta.encoder.layer, self.lm_head):
            part.compile()

    def _isolated(self, starts: Tensor, rows: int, length: int) -> dict[str, Tensor]:
        """The stock forward's arguments under which attention and position ids stop at document ends. Never waits for the device."""
        places = torch.arange(rows * length, dtype=starts.dtype, device=starts.device)
        documents = torch.searchsorted(starts, places, right=True) - 1
        offsets = (places - starts[documents]).long().view(rows, length)
        arguments = {"position_ids": self.config.pad_token_id + 1 + offsets}
        if self._varlen_applies(starts.device):
            return {**arguments, "document_starts": starts}
        documents = documents.view(rows, 1, length)
        return {**arguments, "attention_mask": documents[..., :, None] == documents[..., None, :]}

    def _varlen_applies(self, device: torch.device) -> bool:
        """Whether PyTorch's variable-length attention can do it: a flash kernel, so without fp32, dropout and odd head sizes."""
        if device.type != "cuda" or self.config._attn_implementation != ATTENTION or torch.cuda.get_device_properties(device).major < 8:
            return False
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else self.dtype
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        head_size = self.config.hidden_size // self.config.num_attention_heads
        return dtype in (torch.bfloat16, torch.float16) and not dropout and head_size % 8 == 0 and head_size <= 128


def build_model(config: Config, vocabulary: Vocabulary) -> MaskedRoberta:
    """A freshly initialised model; the weights are a function of the config's seed."""
    model, seq_len = config.model, config.data.seq_len
    rounded = -(-vocabulary.size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    shape = model.model_dump(exclude={"vocab_size", "max_position_embeddings", "position_init"})
    torch.manual_seed(config.seed)
    built = MaskedRoberta(
        RobertaConfig(
            **shape,
            vocab_size=model.vocab_size or rounded,
            max_position_embeddings=model.max_position_embeddings or seq_len + 2,
            type_vocab_size=1,
            bos_token_id=vocabulary.bos_id,
            pad_token_id=vocabulary.pad_id,
            eos_token_id=vocabulary.eos_id,
            attn_implementation=ATTENTION,
            architectures=["RobertaForMaskedLM"],
        )
    )
    if model.position_init == "sinusoidal":
        _set_sinusoidal(built.roberta.embeddings.position_embeddings, model.initializer_range)
    return built


@torch.no_grad()
def _set_sinusoidal(embedding: nn.Embedding, root_mean_square: float) -> None:
    """Sines and cosines of geometrically falling frequencies (Vaswani et al. 2017, section 3.5); the padding's row stays 0."""
    first = (embedding.padding_idx or 0) + 1
    places = torch.arange(embedding.num_embeddings - first)[:, None]
    dimensions = torch.arange(embedding.embedding_dim)
    angles = places * 10_000.0 ** -(dimensions // 2 * 2 / embedding.embedding_dim)
    embedding.weight[first:] = torch.where(dimensions % 2 == 0, angles.sin(), angles.cos()) * (root_mean_square * 2**0.5)


def training_flops(shape: RobertaConfig, tokens: int, attended_pairs: int, masked: int) -> int:
    """Floating-point operations of the matrix products that one step needs, forward and backward.

    Counted as 2 a multiply-add, the backward pass as twice the forward (PaLM, appendix B); embedding look-ups, norms and recomputation
    count nothing, and neither do padding and the head on positions that are not masked. The last layer counts whole: it is computed at
    masked positions alone, but that is how, and not what.
    """
    hidden: int = shape.hidden_size
    per_token = shape.num_hidden_layers * (8 * hidden**2 + 4 * hidden * shape.intermediate_size)
    per_pair = shape.num_hidden_layers * 4 * hidden
    per_masked = 2 * hidden * (hidden + shape.vocab_size)
    return 3 * int(tokens * per_token + attended_pairs * per_pair + masked * per_masked)
