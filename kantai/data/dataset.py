"""A run's data as its config says: shards, order, packing, masks and batches put together.

This module imports no torch, so that data opens quickly.
"""

import dataclasses
import itertools
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kantai.config.batch_plan import BatchPlan
from kantai.config.schema import Config
from kantai.data.batches import Batches, Stage
from kantai.data.masking import Masker
from kantai.data.packing import Contiguous, Padded, Sequences
from kantai.data.prompts import derive_prompts
from kantai.data.shards import MIN_SHARD_TOKENS, SPLITS, ShardSet, open_shards
from kantai.data.shuffle import Sequential, Shuffled
from kantai.data.tokenizer import MASK_TOKEN, Vocabulary, load_tokenizer
from kantai.data.words import Words
from kantai.errors import UserError
from kantai.storage.remote_cache import Cache, private_folder

# Of what a config shows at each step: raised when a release would show a run other data.
STREAM_VERSION = 1
# Of runs that mask words or spans. 2: a word goes on after combining marks, and parts of a
# character have the class of that character.
STREAM_VERSION_OF_WORDS = 2

_NOTABLE_SHARE = 0.001

# Held-out masks are the same in every run, so that the runs' losses can be compared.
_EVALUATION_SEED = 0


def stream_version(masking_unit: str) -> int:
    """The version of the data stream of a run that masks such units."""
    return STREAM_VERSION if masking_unit == "token" else STREAM_VERSION_OF_WORDS


@dataclass(frozen=True)
class Data:
    """The opened tokenizer and shards of a run."""

    config: Config
    vocabulary: Vocabulary
    shards: ShardSet

    @cached_property
    def max_steps(self) -> int:
        """Steps of the run, given or derived from the epochs."""
        training = self.config.training
        if training.max_steps is not None:
            return training.max_steps
        assert training.epochs is not None
        shapes = self.config.batch_shapes()
        epochs_left = training.epochs
        for shape, following in itertools.pairwise(shapes):
            shown = (following.first_step - shape.first_step) * shape.global_batch_size
            epochs_left -= shown / self.samples("train", shape.seq_len)
        last = shapes[-1]
        samples_left = epochs_left * self.samples("train", last.seq_len)
        return max(1, last.first_step + round(samples_left / last.global_batch_size))

    @property
    def seed(self) -> int:
        """Of the initial weights, the sample order, the masks and dropout."""
        return self.config.seed

    @property
    def seq_len(self) -> int:
        """Tokens of the longest sequence, for which the model has positions."""
        return self.config.data.seq_len

    @property
    def workers(self) -> int:
        """Data-loader processes a rank."""
        return self.config.data.workers

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the training split's token frequencies, in nats.

        A model that has learned only these frequencies has this loss.
        """
        return float(self.shards.manifest["splits"]["train"]["unigram_entropy"])

    @cached_property
    def words(self) -> Words | None:
        """Where words begin, if the run masks words or spans of them."""
        if self.config.masking.unit == "token":
            return None
        return Words.of(self.vocabulary.tokenizer, self.vocabulary.special_ids)

    def samples(self, split: str, seq_len: int | None = None) -> int:
        """Number of sequences of a split, of the given length or the config's."""
        sequences = self._sequences(split, seq_len or self.config.data.seq_len)
        return int(sequences.samples_per_shard.sum())

    def describe_unshown(self, seq_len: int) -> str:
        """A sentence on the training tokens that an epoch does not show, or shows twice.

        It is empty where these are fewer than one in a thousand, or at a URL, where it would take
        reading the shards.
        """
        is_padded = self.config.data.packing == "padded"
        if is_padded and self.shards.cache is not None:
            return ""
        sequences = self._sequences("train", seq_len)
        unshown, repeated = sequences.shares_unshown_and_repeated()
        if max(unshown, repeated) < _NOTABLE_SHARE:
            return ""
        if is_padded:
            return (
                f"an epoch does not show {unshown:.1%} of the training tokens: data.packing padded "
                f"leaves out what is beyond {seq_len} tokens of a document"
            )
        found = (
            f"an epoch does not show {unshown:.1%} of the training tokens, and shows "
            f"{repeated:.1%} twice"
        )
        tokens = self.shards.splits["train"].tokens
        short = int((tokens < MIN_SHARD_TOKENS).sum())
        if len(tokens) == 1 or not short:
            return found
        return f"{found}, as {short:,} shards are short: tokenize the corpus again to join them"

    def training_batches(self, world_size: int) -> Batches:
        """The training split, shuffled anew every epoch, without end.

        A stage that keeps the sequence length continues where the stage before it ended. Any other
        stage begins with the next window of shards, or with the next epoch after the last window:
        nothing is shown twice.
        """
        stages: list[Stage] = []
        orders: list[Shuffled] = []
        for shape in self.config.batch_shapes():
            sequences = self._sequences("train", shape.seq_len)
            order = Shuffled(
                sequences.samples_per_shard, self.config.data.shuffle_window, self.config.seed
            )
            first_position = stages[-1].position(shape.first_step) if stages else 0
            if orders and order.samples != orders[-1].samples:
                first_position = order.position_of(*orders[-1].next_window(first_position))
            plan = BatchPlan(shape.global_batch_size, shape.max_micro_batch_size, world_size)
            stages.append(Stage(shape.first_step, first_position, plan, sequences, order))
            orders.append(order)
        masking = self.config.masking
        masker = dataclasses.replace(
            self._masker(masking.mask_share, masking.random_share, self.config.seed),
            unit=masking.unit,
            words=self.words,
            final_ratio=masking.final_ratio,
            max_steps=self.max_steps,
        )
        return self._batches(stages, masker)

    def held_out_batches(self, world_size: int = 1, rows: int | None = None) -> tuple[Batches, int]:
        """The held-out split in order, with masks that never change, and its number of steps.

        A share ``masking.ratio`` of single tokens is masked, whatever unit training masks: runs
        that differ in the unit can still be compared. Every masked token is shown as ``<mask>``.
        Training leaves a tenth of them in place. A model that copies these and knows nothing but
        word frequencies would seem to be half a nat below the unigram entropy.

        Args:
            rows: of a rank and micro-step; default: as many as fit in training.
        """
        rows = rows or self.config.batch_shapes()[-1].max_micro_batch_size
        plan = BatchPlan(rows * world_size, rows, world_size)
        sequences = self._sequences("held_out", self.config.data.seq_len)
        samples = min(self.samples("held_out"), self.config.evaluation.max_sequences)
        stage = Stage(0, 0, plan, sequences, Sequential(samples))
        batches = self._batches([stage], self._masker(1.0, 0.0, _EVALUATION_SEED))
        return batches, -(-samples // plan.global_batch_size)

    @cached_property
    def prompts(self) -> list[str]:
        """Texts with one ``<mask>`` each: the config's, or held-out ones with a word hidden."""
        given = self.config.evaluation.prompts
        held_out = self.shards.splits["held_out"]
        return given or derive_prompts(held_out, self.vocabulary, self.config.data.seq_len)

    def _masker(self, mask_share: float, random_share: float, seed: int) -> Masker:
        return Masker(
            self.config.masking.ratio,
            mask_share,
            random_share,
            self.vocabulary.size,
            self.vocabulary.mask_id,
            self.vocabulary.special_ids,
            seed,
        )

    def _batches(self, stages: list[Stage], masker: Masker) -> Batches:
        is_isolated = self.config.data.packing == "isolated"
        isolated_by = self.vocabulary.eos_id if is_isolated else None
        return Batches(stages, masker, self.vocabulary.pad_id, isolated_by)

    def _sequences(self, split: str, seq_len: int) -> Sequences:
        shards = self.shards.splits[split]
        ids = self.vocabulary
        if self.config.data.packing == "padded":
            return Padded(shards, seq_len, ids.bos_id, ids.eos_id, ids.pad_id)
        return Contiguous(shards, seq_len, ids.bos_id, ids.pad_id)


def open_data(config: Config, *, hashes: bool = True) -> Data:
    """Open and check the tokenizer and shards that a config names.

    Args:
        hashes: verify the shards as the config says; otherwise compare only their sizes, as ranks
            do that leave the rest to another.

    Raises:
        UserError: shards or tokenizer are missing, damaged or do not fit each other or the
            settings.
    """
    settings = config.data
    vocabulary = load_tokenizer(Path(settings.tokenizer))
    shards = open_shards(
        settings.shards,
        hashes=settings.verify_hashes if hashes else False,
        cache=lambda url: shard_cache(url, settings.cache_dir, settings.cache_gb),
    )
    _refuse_other_tokenizer(config, vocabulary, shards)
    _refuse_small_model(config, vocabulary)
    data = Data(config, vocabulary, shards)
    _ = data.words  # refuses a tokenizer whose tokens have no words
    _refuse_too_little_text(data)
    if config.stages and config.stages[-1].until_step >= data.max_steps:
        raise UserError(
            f"stages: until_step {config.stages[-1].until_step} is beyond the run's "
            f"{data.max_steps} steps; lower it"
        )
    needed = settings.shuffle_window + 1  # with fewer, every row would open a shard again
    for split in shards.splits.values():
        # A shard from a URL takes space while it is open, even after the cache has evicted it, so
        # no more are open than needed.
        if shards.cache is not None or split.open_at_once < needed:
            split.open_at_once = needed
    for prompt in config.evaluation.prompts:
        if prompt.count(MASK_TOKEN) != 1:
            raise UserError(f"evaluation.prompts: {prompt!r} must have exactly one {MASK_TOKEN}")
    return data


def _refuse_other_tokenizer(config: Config, vocabulary: Vocabulary, shards: ShardSet) -> None:
    settings = config.data
    advice = "name theirs in data.tokenizer, or tokenize the corpus again"
    if not vocabulary.has_fingerprint(shards.manifest["tokenizer"]):
        raise UserError(
            f"the shards {settings.shards} were made with another tokenizer than "
            f"{settings.tokenizer}: {advice}"
        )
    entries = shards.manifest["vocab_size"]
    if not vocabulary.has_size(entries):
        raise UserError(
            f"the shards {settings.shards} were made with a tokenizer of {entries} entries, and "
            f"{settings.tokenizer} has {vocabulary.size}: {advice}"
        )


def _refuse_small_model(config: Config, vocabulary: Vocabulary) -> None:
    """Refuse an embedding without a row for each id, or without a position for each token."""
    entries = config.model.vocab_size
    if entries is not None and entries < vocabulary.size:
        raise UserError(
            f"model.vocab_size {entries} is less than the tokenizer's "
            f"{vocabulary.size} entries; raise it or leave it out"
        )
    positions = config.model.max_position_embeddings
    needed = vocabulary.positions(config.data.seq_len)
    if positions is not None and positions < needed:
        raise UserError(
            f"model.max_position_embeddings {positions} is less than the {needed} that "
            f"data.seq_len {config.data.seq_len} needs, as RoBERTa counts positions from the "
            f"tokenizer's id of <pad>, {vocabulary.pad_id}, on; raise it or leave it out"
        )


def _refuse_too_little_text(data: Data) -> None:
    for split in SPLITS:
        for seq_len in {shape.seq_len for shape in data.config.batch_shapes()}:
            if data.samples(split, seq_len) == 0:
                tokens = data.shards.manifest["splits"][split]["tokens"]
                raise UserError(
                    f"the split {split} of {data.config.data.shards} has {tokens} tokens, "
                    f"less than one sequence of data.seq_len {seq_len}: "
                    "lower that, bring more text, or hold out more of it"
                )


def shard_cache(url: str, folder: str | None = None, gigabytes: float = 100.0) -> Cache:
    """This node's cache of shards at a URL.

    By default it is a private folder below the temporary folder of the job or the system.
    """
    temporary = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    place = Path(folder) if folder else private_folder(temporary / f"kantai-{os.getuid()}")
    return Cache(url, place, int(gigabytes * 1e9))
