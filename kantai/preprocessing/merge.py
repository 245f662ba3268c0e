"""Merge the pieces of a tokenizing job: deduplicate, count and publish."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kantai.data.rng import Int64s, TokenIds
from kantai.data.shards import (
    SPLITS,
    TOKEN_COUNTS,
    ShardWriter,
    map_shard,
    token_dtype,
    write_shard,
)
from kantai.errors import UserError
from kantai.preprocessing.encodings import refuse_foreign_files
from kantai.preprocessing.job import HELD_OUT, TRAIN, Job, count_tokens
from kantai.preprocessing.lines import Report
from kantai.storage.atomic import manifest_entry, publish

_BUCKET_DOCUMENTS = 1 << 22  # documents whose fingerprints are compared at once
# A document: its fingerprint, and its place among the pieces.
_FINGERPRINT = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("piece", "<u4"), ("split", "<u4"), ("document", "<u4")]
)


def merge(job: Job) -> dict[str, Any]:
    """Publish the folder of shards from its pieces, and return its manifest.

    Raises:
        UserError: a piece is not finished, a file has another encoding than UTF-8, or a split has
            no documents.
    """
    records = _read_records(job)
    report = _judged_report(job, records)
    if job.unique:
        _find_duplicates(job, records)
    contents = _Contents(_count_all_tokens(job), {split: [] for split in SPLITS})
    for number, record in enumerate(records):
        _move_train_shards(job, number, record[TRAIN], contents)
    _rewrite_held_out(job, records, contents)
    manifest = _manifest(job, report, contents)
    _refuse_empty(job, manifest["splits"])
    _publish(job, manifest, contents)
    return manifest


def describe(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield lines on what became of the corpus, and on what a user may want to put right."""
    report = dict(manifest["report"])
    duplicates = report.pop("duplicates")
    yield from Report(**report).notes()
    if duplicates:
        yield f"{duplicates:,} documents had the text of an earlier one and were left out"
    for name, split in manifest["splits"].items():
        documents = f"{split['documents']:,} documents"
        yield f"{name}: {documents}, {split['tokens']:,} tokens in {len(split['shards'])} shards"


@dataclass
class _Contents:
    """What the merged shards hold.

    Attributes:
        counts: how often each token occurs, [splits, vocabulary].
        shards: the entries of each split's shards.
        duplicates: documents left out.
    """

    counts: Int64s
    shards: dict[str, list[dict[str, Any]]]
    duplicates: int = 0

    def leave_out(self, split: str, tokens: TokenIds, documents: int) -> None:
        """Subtract duplicates from the counts."""
        self.counts[SPLITS.index(split)] -= count_tokens(tokens, self.counts.shape[1])
        self.duplicates += documents


def _read_records(job: Job) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    missing: list[str] = []
    for number in range(len(job.pieces)):
        record = job.read_record(number)
        if record is None:
            missing.append(str(number))
        else:
            records.append(record)
    if missing:
        few = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{len(missing)} of {len(job.pieces)} pieces are not tokenized yet ({few}): "
            "run the parts they belong to again"
        )
    return records


def _count_all_tokens(job: Job) -> Int64s:
    counts = np.zeros((len(SPLITS), job.vocabulary.size), np.int64)
    for number in range(len(job.pieces)):
        counts += job.read_arrays(number)["counts"]
    return counts


def _find_duplicates(job: Job, records: list[dict[str, Any]]) -> None:
    """Write lists of the documents of every piece that have the text of an earlier one.

    Fingerprints are divided by their value over files, and one file at a time is sorted, so that
    memory does not grow with the corpus.
    """
    folder = job.work / "fingerprints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for old in job.work.glob("*.duplicates"):
        old.unlink()
    shards = (shard for record in records for split in SPLITS for shard in record[split])
    buckets = 1 + sum(shard["documents"] for shard in shards) // _BUCKET_DOCUMENTS
    for number in range(len(job.pieces)):
        rows = _fingerprints(job, number)
        bucket = rows["low"] % np.uint64(buckets)
        for chosen in np.unique(bucket):
            _append_rows(folder / str(chosen), rows[bucket == chosen])
    for path in folder.iterdir():
        for again in _repeated(np.fromfile(path, _FINGERPRINT)):
            split = SPLITS[again["split"][0]]
            _append_rows(job.duplicates_path(again["piece"][0], split), again["document"])


def _fingerprints(job: Job, number: int) -> npt.NDArray[np.void]:
    """Return the fingerprints of a piece's documents."""
    arrays = job.read_arrays(number)
    of_splits = []
    for index, split in enumerate(SPLITS):
        rows = np.empty(len(arrays[split]), _FINGERPRINT)
        rows["high"] = arrays[split][:, 0]
        rows["low"] = arrays[split][:, 1]
        rows["piece"] = number
        rows["split"] = index
        rows["document"] = np.arange(len(rows))
        of_splits.append(rows)
    return np.concatenate(of_splits)


def _repeated(rows: npt.NDArray[np.void]) -> Iterator[npt.NDArray[np.void]]:
    """Yield the rows whose fingerprint an earlier row has, by piece and split."""
    rows = rows[np.lexsort((rows["low"], rows["high"]))]  # stable: the first of equals stays first
    is_equal = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    again = rows[1:][is_equal]
    again = again[np.lexsort((again["document"], again["split"], again["piece"]))]
    group = again["piece"].astype(np.int64) * len(SPLITS) + again["split"]
    for of_group in np.split(again, np.flatnonzero(np.diff(group)) + 1):
        if len(of_group):
            yield of_group


def _append_rows(path: Path, rows: npt.NDArray[Any]) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(rows).tobytes())


def _move_train_shards(
    job: Job, number: int, shards: list[dict[str, Any]], contents: _Contents
) -> None:
    """Move the shards of a piece to the folder, and rewrite those that have duplicates."""
    folder = job.work.parent
    for shard, duplicates in _with_duplicates(shards, job.read_duplicates(number, TRAIN)):
        path = job.shard_path(shard["file"])
        if not len(duplicates):
            path.rename(folder / shard["file"])
            contents.shards[TRAIN].append(shard)
            continue
        tokens, lengths, dropped = _without(path, duplicates)
        contents.leave_out(TRAIN, dropped, len(duplicates))
        if len(lengths):
            contents.shards[TRAIN].append(write_shard(folder / shard["file"], tokens, lengths))


def _rewrite_held_out(job: Job, records: list[dict[str, Any]], contents: _Contents) -> None:
    """Write the held-out documents of all pieces together: each piece has too few for a shard."""
    writer = ShardWriter(job.work.parent / HELD_OUT, token_dtype(job.vocabulary.size))
    for number, record in enumerate(records):
        of_piece = job.read_duplicates(number, HELD_OUT)
        for shard, duplicates in _with_duplicates(record[HELD_OUT], of_piece):
            tokens, lengths, dropped = _without(job.shard_path(shard["file"]), duplicates)
            contents.leave_out(HELD_OUT, dropped, len(duplicates))
            writer.append(tokens, lengths)
    contents.shards[HELD_OUT] = writer.finish()


def _with_duplicates(
    shards: list[dict[str, Any]], duplicates: Int64s
) -> Iterator[tuple[dict[str, Any], Int64s]]:
    """Yield the shards of a piece, each with those of its documents that are duplicates."""
    first = 0
    for shard in shards:
        behind = first + shard["documents"]
        yield shard, duplicates[(first <= duplicates) & (duplicates < behind)] - first
        first = behind


def _without(path: Path, documents: Int64s) -> tuple[TokenIds, Int64s, TokenIds]:
    """Read a shard without some documents.

    Returns:
        The tokens and lengths of the other documents, and the tokens of these.
    """
    with path.open("rb") as file:
        shard = map_shard(file)
    kept = np.ones(len(shard.lengths), np.bool_)
    kept[documents] = False
    is_kept_token = np.repeat(kept, shard.lengths)
    return shard.tokens[is_kept_token], shard.lengths[kept], shard.tokens[~is_kept_token]


def _manifest(job: Job, report: Report, contents: _Contents) -> dict[str, Any]:
    splits = {
        split: _split_entry(contents.shards[split], counts, job.vocabulary.eos_id)
        for split, counts in zip(SPLITS, contents.counts, strict=True)
    }
    return {
        "kind": "shards",
        "tokenizer": job.vocabulary.fingerprint,
        "vocab_size": job.vocabulary.size,
        "dtype": token_dtype(job.vocabulary.size).name,
        "source": job.source,
        "report": report.counts() | {"duplicates": contents.duplicates},
        "splits": splits,
    }


def _judged_report(job: Job, records: list[dict[str, Any]]) -> Report:
    """Merge the pieces' reports, and judge the encoding of the files that were cut.

    Raises:
        UserError: a file has another encoding than UTF-8.
    """
    report = Report()
    for record in records:
        report.merge(Report.of_record(record["report"]))
    if report.tallies:
        files = {span.file.path: span.file for piece in job.pieces for span in piece}
        refuse_foreign_files(files.values(), report.tallies)
    return report


def _split_entry(shards: list[dict[str, Any]], token_counts: Int64s, eos_id: int) -> dict[str, Any]:
    counts = np.delete(token_counts, eos_id)
    shares = counts[counts > 0] / max(1, counts.sum())
    return {
        "shards": [
            {key: shard[key] for key in ("file", "documents", "tokens")} for shard in shards
        ],
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        # In nats a token: the loss of a model that knows only how frequent every token is.
        "unigram_entropy": float(-(shares * np.log(shares)).sum()),
    }


def _refuse_empty(job: Job, splits: dict[str, dict[str, Any]]) -> None:
    """Remove the pieces and raise an error if a split has no documents."""
    train = splits[TRAIN]["documents"]
    held_out = splits[HELD_OUT]["documents"]
    if train and held_out:
        return
    shutil.rmtree(job.work.parent)
    if train:
        raise UserError(
            f"none of {train} documents was held out: raise --held_out, or cut smaller documents"
        )
    if held_out:
        raise UserError("no documents to train on: lower --held_out")
    raise UserError("no documents to train on: the input has no text")


def _publish(job: Job, manifest: dict[str, Any], contents: _Contents) -> None:
    folder = job.work.parent
    np.save(folder / TOKEN_COUNTS, contents.counts)
    files = {
        shard["file"]: {key: shard[key] for key in ("bytes", "sha256")}
        for split in SPLITS
        for shard in contents.shards[split]
    }
    files[TOKEN_COUNTS] = manifest_entry(folder / TOKEN_COUNTS)
    # A merge that was killed, and had other settings, may have left shards.
    for path in folder.glob("*.*"):
        if path.name not in files:
            path.unlink()
    publish(folder, job.output.absolute(), files, **manifest)
    shutil.rmtree(job.output / job.work.name)
