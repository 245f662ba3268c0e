"""Put the pieces of a tokenizing job together: deduplicate, count, publish."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kantai.data.shards import SPLITS, TOKEN_COUNTS, Int64s, ShardWriter, map_shard, token_dtype, write_shard
from kantai.errors import UserError
from kantai.preprocessing.job import HELD_OUT, TRAIN, Job, count_tokens, read_arrays
from kantai.preprocessing.lines import Report
from kantai.storage.atomic import manifest_entry, publish

_BUCKET_DOCUMENTS = 1 << 22  # whose fingerprints are compared at once


def merge(job: Job) -> dict[str, Any]:
    """Publish the folder from its pieces, all of which must be done, and return its manifest.

    Raises:
        UserError: pieces are missing, or there are no documents in one of the splits.
    """
    records = [job.finished_piece(number) for number in range(len(job.pieces))]
    missing = [str(number) for number, found in enumerate(records) if found is None]
    if missing:
        few = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise UserError(f"{len(missing)} of {len(records)} pieces are not tokenized yet ({few}): run the parts they belong to again")
    done = [found for found in records if found is not None]
    folder, vocab_size = job.work.parent, job.vocabulary.size
    if job.unique:
        _find_duplicates(job, sum(shard["documents"] for found in done for split in SPLITS for shard in found[split]))
    counts = sum((read_arrays(job, number)["counts"].astype(np.int64) for number in range(len(done))), np.zeros((2, vocab_size), np.int64))
    train: list[dict[str, Any]] = []
    held_out = ShardWriter(folder / HELD_OUT, token_dtype(vocab_size))
    left_out = 0
    for number, found in enumerate(done):
        for row, split in enumerate(SPLITS):
            for shard, duplicates in _with_duplicates(found[split], job.duplicates(number, split)):
                left_out += len(duplicates)
                if split == TRAIN and not len(duplicates):
                    job.shard(shard["file"]).rename(folder / shard["file"])
                    train.append(shard)
                    continue
                tokens, lengths, dropped = _without(job.shard(shard["file"]), duplicates)
                counts[row] -= count_tokens(dropped, vocab_size)
                if split == HELD_OUT:
                    held_out.add(tokens, lengths)  # a piece has few of them: together they fill shards
                elif len(lengths):
                    train.append(write_shard(folder / shard["file"], tokens, lengths))
    report = Report()
    for found in done:
        report.merge(Report(**found["report"]))
    splits = {TRAIN: train, HELD_OUT: held_out.close()}
    meta: dict[str, Any] = {
        "kind": "shards",
        "tokenizer": job.vocabulary.fingerprint,
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).name,
        "source": job.source,
        "report": asdict(report) | {"duplicates": left_out},
        "splits": {split: _split_entry(splits[split], counts[row], job.vocabulary.eos_id) for row, split in enumerate(SPLITS)},
    }
    _refuse_empty(meta["splits"], job)
    np.save(folder / TOKEN_COUNTS, counts)
    files = {shard["file"]: {key: shard[key] for key in ("bytes", "sha256")} for split in SPLITS for shard in splits[split]}
    files[TOKEN_COUNTS] = manifest_entry(folder / TOKEN_COUNTS)
    for leftover in folder.glob("*.*"):  # of a merge that was killed, and then asked for something else
        if leftover.name not in files:
            leftover.unlink()
    publish(folder, job.output.absolute(), files, **meta)
    shutil.rmtree(job.output / job.work.name)
    return meta


def describe(manifest: dict[str, Any]) -> Iterator[str]:
    """What became of the corpus, in lines: everything that somebody may want to know or put right."""
    report = dict(manifest["report"])
    duplicates = report.pop("duplicates")
    yield from Report(**report).notes()
    if duplicates:
        yield f"{duplicates:,} documents had the text of an earlier one and were left out"
    for name, split in manifest["splits"].items():
        yield f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens in {len(split['shards'])} shards"


def _find_duplicates(job: Job, documents: int) -> None:
    """Note which documents of every piece have the text of an earlier one.

    Fingerprints are dealt to files by their value, and one file at a time is sorted, so that memory does not grow with the corpus.
    """
    row = np.dtype([("high", "<u8"), ("low", "<u8"), ("piece", "<u4"), ("split", "<u4"), ("document", "<u4")])
    buckets = 1 + documents // _BUCKET_DOCUMENTS
    folder = job.work / "fingerprints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for old in job.work.glob("*.duplicates"):
        old.unlink()
    for number in range(len(job.pieces)):
        arrays = read_arrays(job, number)
        for place, split in enumerate(SPLITS):
            rows = np.empty(len(arrays[split]), row)
            rows["high"], rows["low"] = arrays[split].T
            rows["piece"], rows["split"], rows["document"] = number, place, np.arange(len(rows))
            bucket = rows["low"] % np.uint64(buckets)
            for chosen in np.unique(bucket):
                _append(folder / str(chosen), rows[bucket == chosen])
    for path in folder.iterdir():
        rows = np.fromfile(path, row)
        rows = rows[np.lexsort((rows["low"], rows["high"]))]  # stable: of equal ones the first stays first
        again = rows[1:][(rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])]
        again = again[np.lexsort((again["document"], again["split"], again["piece"]))]
        for group in np.split(again, np.flatnonzero(np.diff(again["piece"].astype(np.int64) * 2 + again["split"])) + 1):
            if len(group):
                _append(job.work / f"{group['piece'][0]:06d}-{SPLITS[group['split'][0]]}.duplicates", group["document"])


def _with_duplicates(shards: list[dict[str, Any]], duplicates: Int64s) -> Iterator[tuple[dict[str, Any], Int64s]]:
    """A piece's shards, each with those of its documents that are duplicates."""
    first = 0
    for shard in shards:
        here = duplicates[(first <= duplicates) & (duplicates < first + shard["documents"])] - first
        first += shard["documents"]
        yield shard, here


def _without(path: Path, documents: Int64s) -> tuple[npt.NDArray[Any], Int64s, npt.NDArray[Any]]:
    """A shard's tokens and lengths without some of its documents, and the tokens of those."""
    with path.open("rb") as file:
        shard = map_shard(file)
    kept = np.ones(len(shard.lengths), np.bool_)
    kept[documents] = False
    of_token = np.repeat(kept, shard.lengths)
    return shard.tokens[of_token], shard.lengths[kept], shard.tokens[~of_token]


def _split_entry(shards: list[dict[str, Any]], token_counts: Int64s, eos_id: int) -> dict[str, Any]:
    words = np.delete(token_counts, eos_id)
    shares = words[words > 0] / max(1, words.sum())
    return {
        "shards": [{key: shard[key] for key in ("file", "documents", "tokens")} for shard in shards],
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        # In nats a token: the loss of a model that knows the frequency of every token and nothing else.
        "unigram_entropy": float(-(shares * np.log(shares)).sum()),
    }


def _refuse_empty(splits: dict[str, dict[str, Any]], job: Job) -> None:
    documents = {split: splits[split]["documents"] for split in SPLITS}
    if all(documents.values()):
        return
    shutil.rmtree(job.work.parent)
    if not any(documents.values()):
        raise UserError("no documents to train on: the input has no text")
    if not documents[TRAIN]:
        raise UserError("no documents to train on: lower --held_out")
    raise UserError(f"none of {documents[TRAIN]} documents was held out: raise --held_out, or cut smaller documents")


def _append(path: Path, rows: npt.NDArray[Any]) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(rows).tobytes())
