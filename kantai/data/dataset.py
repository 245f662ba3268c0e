"""What is the model shown? The stations from shards to masks, put together as a config says. No torch: opening is quick."""

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
from kantai.data.shards import SPLITS, ShardSet, open_shards
from kantai.data.shuffle import Sequential, Shuffled
from kantai.data.tokenizer import SPECIAL_TOKENS, Vocabulary, load_tokenizer
from kantai.errors import UserError
from kantai.storage.remote_cache import Cache

# Of what a config shows at each step: raised when a release would show a run other data.
STREAM_VERSION = 1

_EVALUATION_SEED = 0  # held-out masks are the same in every run, so that their losses can be compared
_DERIVED_PROMPTS = 3
_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Data:
    """The opened tokenizer and shards of a run."""

    config: Config
    vocabulary: Vocabulary
    shards: ShardSet

    @cached_property
    def max_steps(self) -> int:
        """Length of the run, given or derived from the epochs."""
        training = self.config.training
        if training.max_steps is not None:
            return training.max_steps
        assert training.epochs is not None
        shapes, epochs_left = self.config.batch_shapes(), training.epochs
        for shape, following in itertools.pairwise(shapes):
            epochs_left -= (following.first_step - shape.first_step) * shape.global_batch_size / self.samples("train", shape.seq_len)
        last = shapes[-1]
        return max(1, last.first_step + round(epochs_left * self.samples("train", last.seq_len) / last.global_batch_size))

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
        """Entropy of the training split's token frequencies, in nats: the loss of a model that has learned only those."""
        return float(self.shards.manifest["splits"]["train"]["unigram_entropy"])

    def samples(self, split: str, seq_len: int | None = None) -> int:
        """Sequences of a split, of the length given or the config's."""
        return int(self._sequences(split, seq_len or self.config.data.seq_len).samples_per_shard.sum())

    def training_batches(self, world_size: int) -> Batches:
        """The training split, shuffled anew every epoch, without end.

        A stage with the sequence length of the one before goes on where that ended. Any other begins with the next window of shards
        (where there is none, the next epoch), so that nothing is shown twice.
        """
        stages: list[Stage] = []
        orders: list[Shuffled] = []
        for shape in self.config.batch_shapes():
            sequences = self._sequences("train", shape.seq_len)
            order = Shuffled(sequences.samples_per_shard, self.config.data.shuffle_window, self.config.seed)
            first_position = stages[-1].position(shape.first_step) if stages else 0
            if orders and order.samples != orders[-1].samples:
                first_position = order.position_of(*orders[-1].next_window(first_position))
            plan = BatchPlan(shape.global_batch_size, shape.max_micro_batch_size, world_size)
            stages.append(Stage(shape.first_step, first_position, plan, sequences, order))
            orders.append(order)
        masking, vocabulary = self.config.masking, self.vocabulary
        masker = dataclasses.replace(
            self._masker(masking.mask_share, masking.random_share, self.config.seed),
            unit=masking.unit,
            words=None if masking.unit == "token" else Words.of(vocabulary.tokenizer, vocabulary.special_ids),
            final_ratio=masking.final_ratio,
            max_steps=self.max_steps,
        )
        return self._batches(stages, masker)

    def held_out_batches(self, world_size: int = 1, rows: int | None = None) -> tuple[Batches, int]:
        """The held-out split in order with masks that never change, and the number of steps that go through it once.

        Single tokens are hidden, masking.ratio of them, whatever training hides: runs that differ in that can still be compared.
        Here every hidden token is shown as ``<mask>``. With the tenth that training leaves in place, a model that copies it and knows
        nothing but word frequencies would seem to be half a nat below the unigram entropy.

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
        """Texts with one ``<mask>`` each: the config's, or some held-out documents with a whole word hidden."""
        return self.config.evaluation.prompts or self._derived_prompts()

    def _masker(self, mask_share: float, random_share: float, seed: int) -> Masker:
        vocabulary, ratio = self.vocabulary, self.config.masking.ratio
        return Masker(ratio, mask_share, random_share, vocabulary.size, vocabulary.mask_id, vocabulary.special_ids, seed)

    def _batches(self, stages: list[Stage], masker: Masker) -> Batches:
        isolated_by = self.vocabulary.eos_id if self.config.data.packing == "isolated" else None
        return Batches(stages, masker, self.vocabulary.pad_id, isolated_by)

    def _sequences(self, split: str, seq_len: int) -> Sequences:
        shards, vocabulary = self.shards.splits[split], self.vocabulary
        if self.config.data.packing == "padded":
            return Padded(shards, seq_len, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
        return Contiguous(shards, seq_len, vocabulary.bos_id, vocabulary.pad_id)

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
        hashes: verify the shards as the config says; else only their sizes, for ranks that need not do what another does.

    Raises:
        UserError: shards or tokenizer missing, damaged, of different making, or too little text for one sequence.
    """
    vocabulary = load_tokenizer(Path(config.data.tokenizer))
    settings = config.data
    shards = open_shards(
        settings.shards,
        hashes=settings.verify_hashes if hashes else False,
        cache=lambda url: shard_cache(url, settings.cache_dir, settings.cache_gb),
    )
    if shards.manifest["tokenizer"] != vocabulary.fingerprint:
        raise UserError(
            f"the shards {config.data.shards} were made with another tokenizer than {config.data.tokenizer}: "
            "name theirs in data.tokenizer, or tokenize the corpus again"
        )
    if config.model.vocab_size is not None and config.model.vocab_size < vocabulary.size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is less than the tokenizer's {vocabulary.size} entries; raise it or leave it out"
        )
    data = Data(config, vocabulary, shards)
    for split in SPLITS:
        for seq_len in {shape.seq_len for shape in config.batch_shapes()}:
            if data.samples(split, seq_len) == 0:
                tokens = shards.manifest["splits"][split]["tokens"]
                raise UserError(
                    f"the split {split} of {config.data.shards} has {tokens} tokens, "
                    f"less than one sequence of data.seq_len {seq_len}: lower that, bring more text, or hold out more of it"
                )
    if config.stages and config.stages[-1].until_step >= data.max_steps:
        raise UserError(f"stages: until_step {config.stages[-1].until_step} is beyond the run's {data.max_steps} steps; lower it")
    needed = config.data.shuffle_window + 1  # at once; with fewer, every row would open a shard again
    for opened in shards.splits.values():
        # One that came from a URL takes space while it is open, even when the cache has let go of it: not one more than are needed.
        opened.open_at_once = needed if shards.cache is not None else max(opened.open_at_once, needed)
    for prompt in config.evaluation.prompts:
        if prompt.count(SPECIAL_TOKENS[4]) != 1:
            raise UserError(f"evaluation.prompts: {prompt!r} must have exactly one {SPECIAL_TOKENS[4]}")
    return data


def shard_cache(url: str, folder: str | None = None, gigabytes: float = 100.0) -> Cache:
    """The cache of this node for shards at a URL, by default below the job's or the system's temporary folder."""
    temporary = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    return Cache(url, Path(folder) if folder else temporary / f"kantai-{os.getuid()}", int(gigabytes * 1e9))
