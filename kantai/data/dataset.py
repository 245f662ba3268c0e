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
from kantai.data.masking import Masker, Words
from kantai.data.packing import Contiguous, Padded, Sequences
from kantai.data.prompts import derive_prompts
from kantai.data.shards import SPLITS, ShardSet, open_shards
from kantai.data.shuffle import Sequential, Shuffled
from kantai.data.tokenizer import MASK_TOKEN, Vocabulary, load_tokenizer
from kantai.errors import UserError
from kantai.storage.remote_cache import Cache, private_folder

# Of what a config shows at each step: raised when a release would show a run other data.
STREAM_VERSION = 1

# Held-out masks are the same in every run, so that the runs' losses can be compared.
_EVALUATION_SEED = 0


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

    def samples(self, split: str, seq_len: int | None = None) -> int:
        """Number of sequences of a split, of the given length or the config's."""
        sequences = self._sequences(split, seq_len or self.config.data.seq_len)
        return int(sequences.samples_per_shard.sum())

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
        vocabulary = self.vocabulary
        words = None
        if masking.unit != "token":
            words = Words.of(vocabulary.tokenizer, vocabulary.special_ids)
        masker = dataclasses.replace(
            self._masker(masking.mask_share, masking.random_share, self.config.seed),
            unit=masking.unit,
            words=words,
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
    if shards.manifest["tokenizer"] != vocabulary.fingerprint:
        raise UserError(
            f"the shards {settings.shards} were made with another tokenizer than "
            f"{settings.tokenizer}: name theirs in data.tokenizer, or tokenize the corpus again"
        )
    if config.model.vocab_size is not None and config.model.vocab_size < vocabulary.size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is less than the tokenizer's "
            f"{vocabulary.size} entries; raise it or leave it out"
        )
    data = Data(config, vocabulary, shards)
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
