"""What is the model shown? The stations from shards to masks, put together as a config says. No torch: opening is quick."""

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
_PROMPT_TOKENS = (8, 40)


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
        tokenizer = self.vocabulary.tokenizer
        prompts: list[str] = []
        for shard in self.shards.splits["held_out"]:
            for start, stop in zip(shard.boundaries, shard.boundaries[1:], strict=False):
                document = shard.tokens[start : min(stop, start + _PROMPT_TOKENS[1])].tolist()
                document = [token for token in document if token != self.vocabulary.eos_id]
                words = [tokenizer.id_to_token(token) or "" for token in document]
                # A word that is one token: it starts with a space, is made of letters, and another word follows.
                whole = [
                    place
                    for place in range(_PROMPT_TOKENS[0] // 2, len(words) - 1)
                    if words[place].startswith("Ġ")
                    and words[place][1:].isalpha()
                    and len(words[place]) > 4
                    and words[place + 1].startswith("Ġ")
                ]
                if len(document) >= _PROMPT_TOKENS[0] and whole:
                    place = whole[len(whole) // 2]
                    before, after = tokenizer.decode(document[:place]), tokenizer.decode(document[place + 1 :])
                    prompts.append(f"{before} {SPECIAL_TOKENS[4]}{after}")
                if len(prompts) == _DERIVED_PROMPTS:
                    return prompts
        return prompts


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
