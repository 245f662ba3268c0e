"""How good is it? The loss on the held-out split under masks that never change, and words for the masks of some prompts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kantai.data.batches import Batches
from kantai.data.loader import MicroBatch
from kantai.data.masking import IGNORED_LABEL
from kantai.data.tokenizer import Vocabulary


@dataclass(frozen=True)
class Score:
    """Of all masked tokens of the held-out split."""

    loss: float  # nats a masked token
    accuracy: float
    masked: int

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
    """Score a model; every rank takes its rows of every step, and all get the same score.

    Args:
        batches, steps: see :meth:`kantai.data.dataset.Data.held_out_batches`.
        device: of the model.
        sum_over_ranks: adds a tensor over all ranks.
        after_batch: is called after each of them.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(steps):
        for micro_step in range(batches.stage_at(step).plan.gradient_accumulation_steps):
            batch = batches.micro_batch(step, micro_step, rank)
            loss_sum, correct = model(**MicroBatch(batch).on(device))
            sums += torch.tensor([loss_sum.item(), correct.item(), float((batch.labels != IGNORED_LABEL).sum())], dtype=torch.float64)
            after_batch()
    loss_sum, correct, masked = sum_over_ranks(sums).tolist()
    return Score(loss_sum / max(1.0, masked), correct / max(1.0, masked), int(masked))


@torch.no_grad()
def fill_masks(
    model: nn.Module, vocabulary: Vocabulary, prompts: Sequence[str], max_length: int, top_k: int = 5
) -> list[list[tuple[str, float]]]:
    """The ``top_k`` likeliest words for the ``<mask>`` of each prompt, with their probabilities, likeliest first.

    Args:
        max_length: tokens that the model has positions for; what a prompt has beyond is not seen.
    """
    model.eval()
    device = next(model.parameters()).device
    answers: list[list[tuple[str, float]]] = []
    for prompt in prompts:
        ids = vocabulary.tokenizer.encode(prompt).ids[:max_length]
        if vocabulary.mask_id not in ids:
            answers.append([])
            continue
        with torch.compiler.set_stance("force_eager"):  # each prompt has its own length, which is not worth compiling for
            logits = model(torch.tensor([ids], device=device)).logits[0, ids.index(vocabulary.mask_id), : vocabulary.size]
        best = logits.float().softmax(0).topk(top_k)
        words = [vocabulary.tokenizer.decode([token], skip_special_tokens=False).strip() for token in best.indices.tolist()]
        answers.append(list(zip(words, best.values.tolist(), strict=True)))
    return answers
