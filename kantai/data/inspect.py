"""What was the model shown? A set of shards in figures, a step in words, and a hash of a stretch of the stream."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kantai.data.batches import Batch, Batches
from kantai.data.dataset import Data
from kantai.data.masking import IGNORED_LABEL
from kantai.data.shards import SPLITS, ShardSet
from kantai.data.tokenizer import Vocabulary

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_MAX_SHARDS_READ = 64
_FREQUENT_TOKENS = 20


def describe_shards(shards: ShardSet, vocabulary: Vocabulary | None, seq_lens: Iterable[int] = (128, 512)) -> Iterator[str]:
    """Manifest, splits, document lengths, what of them ``padded`` leaves out at some ``seq_lens``, and most frequent tokens."""
    manifest = shards.manifest
    yield f"tokenizer  {manifest['tokenizer'][:16]}, {manifest['vocab_size']:,} entries, {manifest['dtype']}"
    yield from (f"{name:<10} {value}" for name, value in manifest["source"].items())
    yield from (f"report     {name}: {value}" for name, value in manifest["report"].items() if value)
    counts = shards.token_counts()
    for split, of_split in zip(SPLITS, counts, strict=True):
        opened, entry = shards.splits[split], manifest["splits"][split]
        yield ""
        yield f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, {len(opened)} shards"
        yield f"  unigram entropy   {entry['unigram_entropy']:.4f} nats a token; {np.count_nonzero(of_split):,} of the entries occur"
        read = np.unique(np.linspace(0, len(opened) - 1, min(len(opened), _MAX_SHARDS_READ)).astype(np.int64))
        lengths = np.concatenate([opened[number].lengths for number in read.tolist()])
        spread = ", ".join(f"{p} %: {length:,.0f}" for p, length in zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES), strict=True))
        yield f"  document lengths  mean {lengths.mean():,.1f}; {spread}" + (f" (of {len(read)} shards)" if len(read) < len(opened) else "")
        beyond = (f"{np.maximum(lengths - seq_len + 1, 0).sum() / max(1, lengths.sum()):.1%} at seq_len {seq_len}" for seq_len in seq_lens)
        yield f"  tokens left out   {', '.join(beyond)}: by the packing padded alone"
        frequent = np.argsort(of_split, kind="stable")[::-1][:_FREQUENT_TOKENS].tolist()
        words = (f"{_token(vocabulary, token)} {of_split[token] / max(1, of_split.sum()):.2%}" for token in frequent)
        yield f"  frequent tokens   {'  '.join(words)}"


def describe_step(data: Data, batches: Batches, step: int, rank: int, rows: int, *, at: Callable[[int], int] = int) -> Iterator[str]:
    """What a rank was shown in a step, counted from 0: epoch, sample and text of its rows, each masked token as ``[shown|true]``.

    Args:
        at: which step's data a step is shown; another one's after a run has skipped some.
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
        for row, (ids, labels) in zip(plan.rows(rank, micro_step), _rows(batch, data.vocabulary.pad_id), strict=True):
            if rows == 0 or samples[row] < 0:
                return
            rows -= 1
            yield f"\nrow {row}: epoch {epochs[row]}, sample {samples[row]}"
            yield _marked(data.vocabulary, ids, labels)


def hash_stream(batches: Batches, first_step: int, stop_step: int, *, at: Callable[[int], int] = int) -> str:
    """SHA-256 of what the steps from ``first_step`` up to ``stop_step`` show: the same on every cluster and in any division.

    Args:
        at: see :func:`describe_step`.
    """
    digest = hashlib.sha256()
    for step in map(at, range(first_step, stop_step)):
        plan = batches.stage_at(step).plan
        micro_steps = range(plan.gradient_accumulation_steps)
        dealt = (batches.micro_batch(step, micro_step, rank) for rank in range(plan.world_size) for micro_step in micro_steps)
        hash_step(digest, dealt, plan.global_batch_size, batches.pad_id)
    return digest.hexdigest()


def hash_step(digest: Any, dealt: Iterable[Batch], global_batch_size: int, pad_id: int) -> None:
    """Add a step's rows to a hash: ids without padding, masked positions and labels.

    Args:
        dealt: the micro-batches of all ranks in the order of their rows: by rank, then by micro-step.
    """
    rows = (row for batch in dealt for row in _rows(batch, pad_id))
    for _, (ids, labels) in zip(range(global_batch_size), rows, strict=False):
        for numbers in (ids, *np.nonzero(labels != IGNORED_LABEL), labels[labels != IGNORED_LABEL]):
            digest.update(len(numbers).to_bytes(4, "little") + numbers.astype("<i4").tobytes())


def _rows(batch: Batch, pad_id: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Ids of each row without padding, and its labels at their positions in the row."""
    labels = np.full(batch.input_ids.shape, IGNORED_LABEL, np.int64)
    rows, slots = np.nonzero(batch.labels != IGNORED_LABEL)
    labels[rows, batch.masked_positions[rows, slots]] = batch.labels[rows, slots]
    for ids, of_row in zip(batch.input_ids, labels, strict=True):
        length = len(ids) - int((ids[::-1] != pad_id).argmax())
        yield ids[:length], of_row[:length]


def _token(vocabulary: Vocabulary | None, token: int) -> str:
    return repr(vocabulary.tokenizer.decode([token], skip_special_tokens=False)) if vocabulary is not None else str(token)


def _marked(vocabulary: Vocabulary, ids: npt.NDArray[Any], labels: npt.NDArray[Any]) -> str:
    masked = np.flatnonzero(labels != IGNORED_LABEL).tolist()

    def text(tokens: Iterable[int]) -> str:
        return str(vocabulary.tokenizer.decode(list(tokens), skip_special_tokens=False))

    pieces, end = [], 0
    for place in masked:
        pieces += [text(ids[end:place].tolist()), f"[{text([int(ids[place])])}|{text([int(labels[place])])}]"]
        end = place + 1
    return "".join([*pieces, text(ids[end:].tolist())])
