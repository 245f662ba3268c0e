"""RoBERTa from a config: the stock model, with the language-model head and the loss on masked positions alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, RobertaConfig, RobertaForMaskedLM
from transformers.masking_utils import sdpa_mask
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaLMHead

from kantai import UserError
from kantai import config as settings
from kantai.batches import Batch
from kantai.masking import IGNORED_LABEL
from kantai.tokenizer import Vocabulary

_VOCAB_MULTIPLE = 64  # matrix products like round sizes
ATTENTION = "sdpa_or_varlen"  # in memory only: transformers writes no attention into a config file


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
        picked = _pick(hidden_states, masked_positions)
        query, key, value = (
            projection(states).unflatten(2, (-1, attention.attention_head_size)).transpose(1, 2)
            for projection, states in ((attention.query, picked), (attention.key, hidden_states), (attention.value, hidden_states))
        )
        if attention_mask is not None and attention_mask.shape[2] > 1:  # [rows, 1, length, length]
            attention_mask = _pick(attention_mask[:, 0], masked_positions)[:, None]
        dropout = attention.dropout.p if self.training else 0.0
        seen = _attend(query, key, value, attention_mask, dropout=dropout, scale=attention.scaling)
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
                states = _pick(self.roberta(input_ids, **kwargs).last_hidden_state, masked_positions)
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


def _pick(states: Tensor, positions: Tensor) -> Tensor:
    """[rows, length, size] at [rows, picked], as [rows, picked, size]."""
    return states.gather(1, positions[:, :, None].expand(-1, -1, states.shape[2]))


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout: float, scale: float) -> Tensor:
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
        return _attend(query, key, value, attention_mask, dropout=dropout, scale=scaling).transpose(1, 2), None
    rows, _, length, _ = query.shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    # A row's length for the longest document's, which only the device knows.
    out: Any = varlen_attn(query, key, value, document_starts, document_starts, length, length)
    return out.unflatten(0, (rows, length)), None


AttentionInterface.register(ATTENTION, _sdpa_or_varlen)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def build_model(config: settings.Config, vocabulary: Vocabulary) -> MaskedRoberta:
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


@dataclass(frozen=True)
class MicroBatch:
    """A batch on its way from a loader to a device.

    A loader's worker sends arrays: tensors would go through shared memory, one file descriptor each, which is slower for so little and
    runs out where containers have little of it.
    """

    batch: Batch
    pinned: dict[str, Tensor] | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of :meth:`MaskedRoberta.forward`."""
        names = ("input_ids", "attention_mask", "masked_positions", "labels", "document_starts")
        arrays = {name: getattr(self.batch, name) for name in names}
        return self.pinned or {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory, from which it is copied while the device computes; called by the loader."""
        return MicroBatch(self.batch, {name: tensor.pin_memory() for name, tensor in self.inputs.items()})

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The arguments on a device."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}


class SavedState:
    """The tensors of a checkpoint by name, whichever of its files they are in, read when they are asked for.

    Attributes:
        shapes: of all of them.
        metadata: what else the files say.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Open the files.

        Raises:
            UserError: one is not what the engine writes.
        """
        self.checkpoint = checkpoint
        try:
            files = [safe_open(path, framework="pt") for path in sorted(checkpoint.glob("state-*.safetensors"))]
            self._files = {name: file for file in files for name in file.keys()}
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}
            self.metadata: dict[str, str] = {key: value for file in files for key, value in (file.metadata() or {}).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{checkpoint} is no checkpoint: {error}") from None

    def refuse_others(self, expected: dict[str, tuple[int, ...]], *, strict: bool = True) -> None:
        """Compare names and shapes with a model's.

        Args:
            strict: refuse tensors that are not expected, too.

        Raises:
            UserError: a tensor is missing, is one too many, or has another shape.
        """
        for name in sorted(expected.keys() ^ self.shapes.keys()):
            if name in expected or strict:
                raise UserError(
                    f"{self.checkpoint} {'lacks' if name in expected else 'has an unknown'} tensor {name}: it is of another model"
                )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise UserError(f"{self.checkpoint}: {name} has shape {list(self.shapes[name])}, the model's is {list(shape)}")

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, read now."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def load_weights(model: MaskedRoberta, checkpoint: Path) -> None:
    """Set a model's weights from a checkpoint of any backend and world size.

    Raises:
        UserError: a weight is missing or has another shape.
    """
    saved, parameters = SavedState(checkpoint), dict(model.named_parameters())
    saved.refuse_others({name: tuple(parameter.shape) for name, parameter in parameters.items()}, strict=False)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


@torch.no_grad()
def _set_sinusoidal(embedding: nn.Embedding, root_mean_square: float) -> None:
    """Sines and cosines of geometrically falling frequencies (Vaswani et al. 2017, section 3.5); the padding's row stays 0."""
    first = (embedding.padding_idx or 0) + 1
    places = torch.arange(embedding.num_embeddings - first)[:, None]
    dimensions = torch.arange(embedding.embedding_dim)
    angles = places * 10_000.0 ** -(dimensions // 2 * 2 / embedding.embedding_dim)
    embedding.weight[first:] = torch.where(dimensions % 2 == 0, angles.sin(), angles.cos()) * (root_mean_square * 2**0.5)


def training_flops(shape: RobertaConfig, tokens: int, attended_pairs: int, masked: int) -> int:
    """Floating-point operations of the matrix products that one update needs, forward and backward.

    Counted as 2 a multiply-add, the backward pass as twice the forward (PaLM, appendix B); embedding look-ups, norms and recomputation
    count nothing, and neither do padding and the head on positions that are not masked. The last layer counts whole: it is computed at
    masked positions alone, but that is how, and not what.
    """
    hidden: int = shape.hidden_size
    per_token = shape.num_hidden_layers * (8 * hidden**2 + 4 * hidden * shape.intermediate_size)
    per_pair = shape.num_hidden_layers * 4 * hidden
    per_masked = 2 * hidden * (hidden + shape.vocab_size)
    return 3 * int(tokens * per_token + attended_pairs * per_pair + masked * per_masked)
