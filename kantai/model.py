"""RoBERTa from a config: the stock model, with the language-model head and the loss on masked positions alone."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM

from kantai import UserError
from kantai import config as settings
from kantai.batches import Batch
from kantai.masking import IGNORED_LABEL
from kantai.tokenizer import Vocabulary

_VOCAB_MULTIPLE = 64  # matrix products like round sizes


class MaskedRoberta(RobertaForMaskedLM):
    """``RobertaForMaskedLM`` whose forward, given masked positions, computes logits for those only.

    Parameters, state dict and config are the stock ones. Of roberta-base's forward FLOPs at 512 tokens and 15 % masked, the head
    on all positions is a third.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        masked_positions: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Sum of the losses of the masked tokens, and how many of them are predicted right.

        Args:
            input_ids: [rows, length].
            attention_mask: [rows, length], or None when there is no padding.
            masked_positions: [rows, most masked]; None asks for the stock forward.
            labels: [rows, most masked], ``IGNORED_LABEL`` where ``masked_positions`` is filling.

        Returns:
            (loss sum, count of right predictions), both fp32 scalars.
        """
        if masked_positions is None or labels is None:
            return super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        hidden = self.roberta(input_ids, attention_mask=attention_mask).last_hidden_state
        picked = hidden.gather(1, masked_positions[:, :, None].expand(-1, -1, hidden.shape[2]))
        logits = self.lm_head(picked).flatten(0, 1).float()  # fp32 under every backend: bf16 steps of a loss of 5 are 1/32
        labels = labels.flatten()
        loss_sum = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        return loss_sum, (logits.detach().argmax(1) == labels).sum().float()


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
            attn_implementation="sdpa",
            architectures=["RobertaForMaskedLM"],
        )
    )
    if model.position_init == "sinusoidal":
        _set_sinusoidal(built.roberta.embeddings.position_embeddings, model.initializer_range)
    return built


def as_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch as the arguments of :meth:`MaskedRoberta.forward`, on a device."""
    arrays = {"input_ids": batch.input_ids, "masked_positions": batch.masked_positions, "labels": batch.labels}
    tensors = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}
    if batch.attention_mask is not None:
        tensors["attention_mask"] = torch.from_numpy(batch.attention_mask).to(device, non_blocking=True)
    return tensors


def load_weights(model: MaskedRoberta, checkpoint: Path) -> None:
    """Set a model's weights from a checkpoint of any backend and world size.

    Raises:
        UserError: a weight is missing or has another shape.
    """
    weights = {name: tensor for path in sorted(checkpoint.glob("state-*.safetensors")) for name, tensor in load_file(path).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                raise UserError(f"{checkpoint} has no {name} of shape {list(parameter.shape)}: it is of another model")
            parameter.copy_(weights[name])


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
    count nothing, and neither do padding and the head on positions that are not masked.
    """
    hidden: int = shape.hidden_size
    per_token = shape.num_hidden_layers * (8 * hidden**2 + 4 * hidden * shape.intermediate_size)
    per_pair = shape.num_hidden_layers * 4 * hidden
    per_masked = 2 * hidden * (hidden + shape.vocab_size)
    return 3 * int(tokens * per_token + attended_pairs * per_pair + masked * per_masked)
