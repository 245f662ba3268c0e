"""What is the model shown? The stations from shards to masks, put together as a config says. No torch: opening is quick."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kantai import UserError
from kantai.batches import Batches, Contiguous, Padded, Sequences
from kantai.config import BatchPlan, Config
from kantai.masking import Masker
from kantai.order import Order, Sequential, Shuffled
from kantai.rng import fold
from kantai.shards import ShardSet, open_shards
from kantai.tokenizer import SPECIAL_TOKENS, Vocabulary, load_tokenizer

_EVALUATION_SEED = 0  # held-out masks are the same in every run, so that their losses can be compared
_DERIVED_PROMPTS = 3
_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Data:
    """The opened tokenizer and shards of a run."""

    config: Config
    vocabulary: Vocabulary
    shards: ShardSet
    training_samples: int
    held_out_samples: int

    @property
    def total_updates(self) -> int:
        """Length of the run, given or derived from the epochs."""
        training = self.config.training
        if training.total_updates is not None:
            return training.total_updates
        assert training.epochs is not None
        return max(1, round(training.epochs * self.training_samples / self.config.batch.global_batch_size))

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the training split's token frequencies, in nats: the loss of a model that has learned only those."""
        return float(self.shards.manifest["splits"]["train"]["unigram_entropy"])

    def training_batches(self, plan: BatchPlan) -> Batches:
        """The training split, shuffled anew every epoch, without end."""
        seed, masking = self.config.seed, self.config.masking
        return self._batches(
            "train", Shuffled(self.training_samples, seed), self._masker(masking.mask_share, masking.random_share, seed), plan
        )

    def held_out_batches(self, plan: BatchPlan) -> tuple[Batches, int]:
        """The held-out split in order with masks that never change, and the number of steps that go through it once.

        Here every hidden token is shown as ``<mask>``. With the tenth that training leaves in place, a model that copies it and knows
        nothing but word frequencies would seem to be half a nat below the unigram entropy.
        """
        samples = min(self.held_out_samples, self.config.evaluation.max_sequences)
        batches = self._batches("held_out", Sequential(samples), self._masker(1.0, 0.0, _EVALUATION_SEED), plan)
        return batches, -(-samples // plan.global_batch_size)

    def prompts(self) -> list[str]:
        """Texts with one ``<mask>`` each: the config's, or some held-out documents with a whole word hidden."""
        return self.config.evaluation.prompts or self._derived_prompts()

    def _masker(self, mask_share: float, random_share: float, seed: int) -> Masker:
        vocabulary, ratio = self.vocabulary, self.config.masking.ratio
        return Masker(ratio, mask_share, random_share, vocabulary.size, vocabulary.mask_id, vocabulary.special_ids, seed)

    def _batches(self, split: str, order: Order, masker: Masker, plan: BatchPlan) -> Batches:
        return Batches(_sequences(self.config, self.vocabulary, self.shards, split), order.at, masker, plan, self.vocabulary.pad_id)

    def _derived_prompts(self) -> list[str]:
        length = min(_PROMPT_TOKENS, self.config.data.seq_len - 2)
        documents = (shard.tokens[a:b] for shard in self.shards.splits["held_out"] for a, b in itertools.pairwise(shard.boundaries))
        # Long documents first: short ones are headings as often as not.
        by_length = sorted((document[:-1] for document in itertools.islice(documents, 1000)), key=lambda document: len(document) < length)
        prompts = (self._hide_a_word(document[:length].tolist()) for document in by_length)
        return list(itertools.islice(filter(None, prompts), _DERIVED_PROMPTS))

    def _hide_a_word(self, document: list[int]) -> str | None:
        """A document's text with ``<mask>`` for a word in its middle that is one token; None where there is none."""
        tokenizer = self.vocabulary.tokenizer
        tokens = [tokenizer.id_to_token(token) or "" for token in document]
        starts = [token.startswith("Ġ") for token in tokens]
        words = [place for place in range(2, len(tokens) - 1) if starts[place] and starts[place + 1] and len(tokens[place]) > 4]
        words = [place for place in words if tokens[place][1:].isalpha()]
        if not words:
            return None
        place = words[len(words) // 2]
        return f"{tokenizer.decode(document[:place])} {SPECIAL_TOKENS[4]}{tokenizer.decode(document[place + 1 :])}"


def open_data(config: Config, *, hashes: bool = True) -> Data:
    """Open and check what a config names.

    Args:
        hashes: verify every byte of the shards, not only their sizes.

    Raises:
        UserError: shards or tokenizer missing, damaged, of different making, or too little text for one sequence.
    """
    vocabulary = load_tokenizer(Path(config.data.tokenizer))
    shards = open_shards(Path(config.data.shards), hashes=hashes)
    if shards.manifest["tokenizer"] != vocabulary.fingerprint:
        raise UserError(
            f"the shards {config.data.shards} were made with another tokenizer than {config.data.tokenizer}: "
            "name theirs in data.tokenizer, or tokenize the corpus again"
        )
    if config.model.vocab_size is not None and config.model.vocab_size < vocabulary.size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is less than the tokenizer's {vocabulary.size} entries; raise it or leave it out"
        )
    counts = {split: _sequences(config, vocabulary, shards, split).samples for split in ("train", "held_out")}
    for split, count in counts.items():
        if count == 0:
            tokens = shards.manifest["splits"][split]["tokens"]
            raise UserError(
                f"the split {split} of {config.data.shards} has {tokens} tokens, "
                f"less than one sequence of data.seq_len {config.data.seq_len}: lower that, bring more text, or hold out more of it"
            )
    data = Data(config, vocabulary, shards, counts["train"], counts["held_out"])
    if config.optimizer.warmup_updates >= data.total_updates > 1:
        raise UserError(
            f"optimizer.warmup_updates {config.optimizer.warmup_updates} is not less than the run's {data.total_updates} updates; lower it"
        )
    for prompt in config.evaluation.prompts:
        if prompt.count(SPECIAL_TOKENS[4]) != 1:
            raise UserError(f"evaluation.prompts: {prompt!r} must have exactly one {SPECIAL_TOKENS[4]}")
    return data


def dropout_seed(seed: int, update: int, micro_step: int, rank: int) -> int:
    """The seed of torch's generators for one micro-step, so that no generator state is ever saved."""
    return int(fold(seed, update, micro_step, rank)[0] >> np.uint64(1))


def _sequences(config: Config, vocabulary: Vocabulary, shards: ShardSet, split: str) -> Sequences:
    opened: Sequence[tuple[np.ndarray, np.ndarray]] = [(shard.tokens, shard.boundaries) for shard in shards.splits[split]]
    seq_len = config.data.seq_len
    if config.data.packing == "padded":
        return Padded(opened, seq_len, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    return Contiguous([tokens for tokens, _ in opened], seq_len, vocabulary.bos_id, vocabulary.pad_id)
