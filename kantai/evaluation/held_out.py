"""The held-out loss, under masks that never change, and words for the masks of prompts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kantai.data.batches import Batches
from kantai.data.loader import MicroBatch
from kantai.data.masking import IGNORED_LABEL
from kantai.data.tokenizer import Vocabulary

_WORDS = 5  # for each mask


@dataclass(frozen=True)
class Score:
    """Of all masked tokens of the held-out split."""

    loss: float  # nats a masked token
    accuracy: float  # share of the masked tokens that are predicted right
    masked: int  # number of masked tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def held_out_score(
    model: nn.Module,
    batches: Batches,
    steps: int,
    *,
    rank: int,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    after_batch: Callable[[], None] = lambda: None,
) -> Score:
    """Score a model. Every rank takes its rows of every step, and all get the same score.

    Args:
        batches: see :meth:`kantai.data.dataset.Data.held_out_batches`.
        steps: that go through them once.
        sum_over_ranks: adds a tensor over all ranks.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(steps):
        for micro_step in range(batches.stage_at(step).plan.gradient_accumulation_steps):
            batch = batches.micro_batch(step, micro_step, rank)
            loss_sum, correct = model(**MicroBatch(batch).on(device))
            masked = float((batch.labels != IGNORED_LABEL).sum())
            numbers = [loss_sum.item(), correct.item(), masked]
            sums += torch.tensor(numbers, dtype=torch.float64)
            after_batch()
    total_loss, total_correct, total_masked = sum_over_ranks(sums).tolist()
    count = max(1.0, total_masked)
    return Score(total_loss / count, total_correct / count, int(total_masked))


@torch.no_grad()
def fill_masks(
    model: nn.Module, vocabulary: Vocabulary, prompts: Sequence[str], max_length: int
) -> list[list[tuple[str, float]]]:
    """The likeliest words for the ``<mask>`` of each prompt, with their probabilities.

    Args:
        max_length: tokens that the model has positions for. What a prompt has beyond is not seen.

    Returns:
        For each prompt (word, probability), the likeliest first; none where its mask is not seen.
    """
    model.eval()
    device = next(model.parameters()).device
    tokenizer = vocabulary.tokenizer
    answers: list[list[tuple[str, float]]] = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt).ids[:max_length]
        if vocabulary.mask_id not in ids:
            answers.append([])
            continue
        # Each prompt has its own length, which is not worth compiling for.
        with torch.compiler.set_stance("force_eager"):
            logits = model(torch.tensor([ids], device=device)).logits[0]
        masked = logits[ids.index(vocabulary.mask_id), : vocabulary.size]
        best = masked.float().softmax(0).topk(_WORDS)
        words = [
            tokenizer.decode([token], skip_special_tokens=False).strip()
            for token in best.indices.tolist()
        ]
        answers.append(list(zip(words, best.values.tolist(), strict=True)))
    return answers
