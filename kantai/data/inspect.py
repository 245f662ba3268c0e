"""Inspection: figures of a set of shards, a step as text, and a hash of a stretch of the stream."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from kantai.data.batches import Batch, Batches
from kantai.data.dataset import Data
from kantai.data.masking import IGNORED_LABEL
from kantai.data.packing import Contiguous, Padded, sampled_lengths
from kantai.data.rng import Int64s
from kantai.data.shards import SPLITS, ShardSet, Split
from kantai.data.tokenizer import Vocabulary
from kantai.errors import UserError

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_FREQUENT_TOKENS = 20


def describe_shards(
    shards: ShardSet, vocabulary: Vocabulary | None, seq_lens: Iterable[int] = (128, 512)
) -> Iterator[str]:
    """Lines on the manifest and the splits.

    Args:
        vocabulary: writes frequent tokens as text; None: as ids.
        seq_lens: sequence lengths at which to count the tokens that are not shown, or shown twice.

    Raises:
        UserError: the shards were made with another tokenizer.
    """
    manifest = shards.manifest
    if vocabulary is not None and not vocabulary.has_fingerprint(manifest["tokenizer"]):
        raise UserError(
            "the shards were made with another tokenizer than --tokenizer names: name theirs, or "
            "leave it out to see ids"
        )
    tokenizer = manifest["tokenizer"][:16]
    yield f"tokenizer  {tokenizer}, {manifest['vocab_size']:,} entries, {manifest['dtype']}"
    for name, value in manifest["source"].items():
        yield f"{name:<10} {value}"
    for name, value in manifest["report"].items():
        if value:
            yield f"report     {name}: {value}"
    for split, counts in zip(SPLITS, shards.token_counts(), strict=True):
        opened = shards.splits[split]
        entry = manifest["splits"][split]
        yield ""
        yield (
            f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
            f"{len(opened)} shards"
        )
        yield (
            f"  unigram entropy   {entry['unigram_entropy']:.4f} nats a token; "
            f"{np.count_nonzero(counts):,} of the entries occur"
        )
        yield from _describe_lengths(opened, seq_lens)
        yield _describe_frequent_tokens(counts, vocabulary)


def _describe_lengths(split: Split, seq_lens: Iterable[int]) -> Iterator[str]:
    seq_lens = list(seq_lens)
    lengths = sampled_lengths(split)
    percentiles = zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES), strict=True)
    values = ", ".join(f"{percent} %: {length:,.0f}" for percent, length in percentiles)
    sampled = " (of some shards)" if len(lengths) < split.documents.sum() else ""
    yield f"  document lengths  mean {lengths.mean():,.1f}; {values}{sampled}"

    unshown = []
    repeated = []
    left_out = []
    for seq_len in seq_lens:
        at = f"at seq_len {seq_len}"
        contiguous = Contiguous(split, seq_len, 0, 0).shares_unshown_and_repeated()
        padded = Padded(split, seq_len, 0, 0, 0).shares_unshown_and_repeated()
        unshown.append(f"{contiguous[0]:.1%} {at}")
        repeated.append(f"{contiguous[1]:.1%} {at}")
        left_out.append(f"{padded[0]:.1%} {at}")
    yield f"  tokens not shown  {', '.join(unshown)}: in shards shorter than a sequence"
    yield f"  tokens twice      {', '.join(repeated)}: in the last sequence of each shard"
    yield f"  tokens left out   {', '.join(left_out)}: by the packing padded alone"


def _describe_frequent_tokens(counts: Int64s, vocabulary: Vocabulary | None) -> str:
    total = max(1, counts.sum())
    frequent = np.argsort(counts, kind="stable")[::-1][:_FREQUENT_TOKENS].tolist()
    tokens = (f"{_token(vocabulary, token)} {counts[token] / total:.2%}" for token in frequent)
    return f"  frequent tokens   {'  '.join(tokens)}"


def describe_step(
    data: Data, batches: Batches, step: int, rank: int, rows: int, *, at: Callable[[int], int] = int
) -> Iterator[str]:
    """The rows that a rank was shown in a step, counted from 0: epoch, sample id and text.

    Masked tokens are written as ``[shown|true]``.

    Args:
        rows: most rows to describe.
        at: maps a step to the step of its data, which is a later one if the run skipped data.
    """
    shown = at(step)
    stage = batches.stage_at(shown)
    plan = stage.plan
    epochs, samples = batches.samples(shown)
    yield f"step {step}: {plan}, of up to {stage.sequences.seq_len} tokens; rank {rank}:"
    if shown != step:
        yield f"its data is that of step {shown} by the config: the run skipped what lies before"
    for micro_step in range(plan.gradient_accumulation_steps):
        batch = batches.micro_batch(shown, micro_step, rank)
        numbers = plan.rows(rank, micro_step)
        for row, (ids, labels) in zip(numbers, _rows(batch, data.vocabulary.pad_id), strict=True):
            if rows == 0 or samples[row] < 0:
                return
            rows -= 1
            yield f"\nrow {row}: epoch {epochs[row]}, sample {samples[row]}"
            yield _marked_text(data.vocabulary, ids, labels)


def hash_stream(
    batches: Batches, first_step: int, stop_step: int, *, at: Callable[[int], int] = int
) -> str:
    """SHA-256 of the data of the steps from ``first_step`` up to ``stop_step``, as hex digits.

    The hash is the same for every number of ranks and every micro-batch size.
    """
    digest = hashlib.sha256()
    for step in map(at, range(first_step, stop_step)):
        plan = batches.stage_at(step).plan
        dealt = (
            batches.micro_batch(step, micro_step, rank)
            for rank in range(plan.world_size)
            for micro_step in range(plan.gradient_accumulation_steps)
        )
        hash_step(digest, dealt, plan.global_batch_size, batches.pad_id)
    return digest.hexdigest()


def hash_step(digest: Any, dealt: Iterable[Batch], global_batch_size: int, pad_id: int) -> None:
    """Add a step's rows to a hash: ids without padding, masked positions and labels.

    Args:
        dealt: the micro-batches of all ranks in the order of their rows: by rank, then micro-step.
    """
    rows = (row for batch in dealt for row in _rows(batch, pad_id))
    for _, (ids, labels) in zip(range(global_batch_size), rows, strict=False):
        is_masked = labels != IGNORED_LABEL
        for numbers in (ids, np.flatnonzero(is_masked), labels[is_masked]):
            digest.update(len(numbers).to_bytes(4, "little") + numbers.astype("<i4").tobytes())


def _rows(batch: Batch, pad_id: int) -> Iterator[tuple[Int64s, Int64s]]:
    """Ids of each row without padding, and labels at the ids' positions."""
    for ids, of_row in zip(batch.input_ids, batch.labels_by_position(), strict=True):
        length = len(ids) - int((ids[::-1] != pad_id).argmax())
        yield ids[:length], of_row[:length]


def _token(vocabulary: Vocabulary | None, token: int) -> str:
    if vocabulary is None:
        return str(token)
    return repr(vocabulary.tokenizer.decode([token], skip_special_tokens=False))


def _marked_text(vocabulary: Vocabulary, ids: Int64s, labels: Int64s) -> str:
    """The text of a row, with masked tokens as ``[shown|true]``."""

    def text(tokens: Int64s) -> str:
        return str(vocabulary.tokenizer.decode(tokens.tolist(), skip_special_tokens=False))

    parts = []
    end = 0
    for place in np.flatnonzero(labels != IGNORED_LABEL).tolist():
        masked = slice(place, place + 1)
        parts.append(text(ids[end:place]))
        parts.append(f"[{text(ids[masked])}|{text(labels[masked])}]")
        end = place + 1
    parts.append(text(ids[end:]))
    return "".join(parts)
