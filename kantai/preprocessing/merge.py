"""Merge the pieces of a tokenizing job: deduplicate, count and publish."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kantai.data.rng import Bools, Int64s, TokenIds
from kantai.data.shards import (
    MIN_SHARD_TOKENS,
    SPLITS,
    TOKEN_COUNTS,
    ShardWriter,
    map_shard,
    token_dtype,
    write_shard,
)
from kantai.errors import UserError
from kantai.preprocessing.encodings import refuse_foreign_files
from kantai.preprocessing.job import HELD_OUT, TRAIN, Job, count_tokens, refuse_output
from kantai.preprocessing.lines import Report
from kantai.preprocessing.long_documents import MAX_CHARACTERS, LongDocuments
from kantai.storage.atomic import locked, manifest_entry, publish, sha256

_NAMED_DOCUMENTS = 3  # of those in both splits
_NAMED_TOKENS = 12
_BUCKET_DOCUMENTS = 1 << 22  # documents whose fingerprints are compared at once
# A document: its fingerprint, and its place among the pieces.
_FINGERPRINT = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("piece", "<u4"), ("split", "<u4"), ("document", "<u4")]
)


def merge(job: Job, min_shard_tokens: int = MIN_SHARD_TOKENS) -> dict[str, Any]:
    """Publish the folder of shards from its pieces, and return its manifest.

    Args:
        min_shard_tokens: smaller shards of the training split are joined. A shard shorter than a
            sequence would give none, and each shard's last sequence repeats some of the one before.

    Raises:
        UserError: a piece is not finished or damaged, a file has another encoding than UTF-8, or a
            split has no documents.
    """
    refuse_output(job)
    with locked(job.output):
        refuse_output(job)  # another process may have published it meanwhile
        records = _read_records(job)
        report = _judged_report(job, records)
        _verify_pieces(job, records)
        contents = _Contents(_count_all_tokens(job), {split: [] for split in SPLITS})
        if job.keeps_fingerprints:
            contents.overlap = _find_duplicates(job, records)
        _move_train_shards(job, records, contents, min_shard_tokens)
        _rewrite_held_out(job, records, contents)
        manifest = _manifest(job, records, report, contents)
        _refuse_empty(job, records, manifest["splits"])
        _publish(job, manifest, contents)
    return manifest


def describe(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield lines on what became of the corpus, and on what a user may want to put right."""
    report = dict(manifest["report"])
    duplicates = report.pop("duplicates")
    long_documents = LongDocuments(**report.pop("long_documents"))
    overlap = report.pop("held_out_in_train", None)
    yield from Report(**report).notes()
    if long_documents.documents:
        yield (
            f"{long_documents.documents:,} documents were longer than {MAX_CHARACTERS:,} "
            f"characters and were cut into {long_documents.parts:,}, at sentence ends where there "
            "are any"
        )
    if duplicates:
        yield f"{duplicates:,} documents had the text of an earlier one and were left out"
    if overlap:
        held_out = manifest["splits"][HELD_OUT]["documents"]
        yield (
            f"{overlap['documents']:,} of {held_out:,} documents of --held_out_input are in the "
            f"training text too and stay in both: {', '.join(overlap['first'])}"
        )
    for name, split in manifest["splits"].items():
        documents = f"{split['documents']:,} documents"
        yield f"{name}: {documents}, {split['tokens']:,} tokens in {len(split['shards'])} shards"


@dataclass
class _Contents:
    """What the merged shards hold."""

    counts: Int64s  # how often each token occurs, [splits, vocabulary]
    shards: dict[str, list[dict[str, Any]]]  # the entries of each split's shards
    duplicates: int = 0  # documents left out
    # The documents that are in both splits, and how the first of them begin.
    overlap: dict[str, Any] = field(default_factory=dict)

    def leave_out(self, split: str, tokens: TokenIds, documents: int) -> None:
        """Subtract duplicates from the counts."""
        self.counts[SPLITS.index(split)] -= count_tokens(tokens, self.counts.shape[1])
        self.duplicates += documents


def _read_records(job: Job) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    missing: list[str] = []
    pieces = len(job.all_pieces)
    for number in range(pieces):
        record = job.read_record(number)
        if record is None:
            missing.append(str(number))
        else:
            records.append(record)
    if missing:
        few = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{len(missing)} of {pieces} pieces are not tokenized yet ({few}): "
            "run the parts they belong to again"
        )
    return records


def _verify_pieces(job: Job, records: list[dict[str, Any]]) -> None:
    """Compare all files of the pieces with their recorded hashes, before any is moved.

    The merged folder gets hashes of its own, which would hide a bit that has flipped since.
    """

    def damaged(number: int) -> str:
        for path, entry in job.files(number, records[number]):
            if sha256(path) != entry["sha256"]:
                return str(path)
        return ""

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(damaged, range(len(records))))
    paths = [path for path in found if path]
    if not paths:
        return
    for number, path in enumerate(found):
        if path:
            job.record_path(number).unlink()  # so that the piece is made again
    raise UserError(
        f"{len(paths)} of {len(records)} pieces were damaged after they were written, "
        f"{paths[0]} the first: tokenize them again with the same command, or the part it was in"
    )


def _count_all_tokens(job: Job) -> Int64s:
    counts = np.zeros((len(SPLITS), job.vocabulary.size), np.int64)
    for number in range(len(job.all_pieces)):
        counts += job.read_arrays(number)["counts"]
    return counts


def _find_duplicates(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write lists of the documents of every piece that have the text of an earlier one.

    Fingerprints are divided by their value over files, and one file at a time is sorted, so that
    memory does not grow with the corpus.

    Returns:
        How many documents of the user's own held-out split are in the training split too, and how
        the first of them begin; empty if there are none.
    """
    folder = job.work / "fingerprints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for old in job.work.glob("*.duplicates"):
        old.unlink()
    shards = (shard for record in records for split in SPLITS for shard in record[split])
    buckets = 1 + sum(shard["documents"] for shard in shards) // _BUCKET_DOCUMENTS
    for number in range(len(records)):
        rows = _fingerprints(job, number)
        bucket = rows["low"] % np.uint64(buckets)
        for chosen in np.unique(bucket):
            _append_rows(folder / str(chosen), rows[bucket == chosen])
    overlap = 0
    first = np.zeros(0, _FINGERPRINT)
    for path in folder.iterdir():
        rows, is_first = _by_fingerprint(np.fromfile(path, _FINGERPRINT))
        if job.unique:
            for again in _repeated(rows, is_first):
                split = SPLITS[again["split"][0]]
                _append_rows(job.duplicates_path(again["piece"][0], split), again["document"])
        if not job.held_out_pieces:
            continue  # the split follows from the text
        in_both = _in_both(rows, is_first)
        overlap += len(in_both)
        first = np.sort(np.concatenate([first, in_both]), order=["piece", "document"])
        first = first[:_NAMED_DOCUMENTS]
    if not overlap:
        return {}
    beginnings = [_beginning(job, records[row["piece"]], int(row["document"])) for row in first]
    return {"documents": overlap, "first": beginnings}


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


def _repeated(rows: npt.NDArray[np.void], is_first: Bools) -> Iterator[npt.NDArray[np.void]]:
    """Yield the rows whose fingerprint an earlier row of their split has, by piece and split."""
    is_first_of_split = is_first.copy()
    is_first_of_split[1:] |= rows["split"][1:] != rows["split"][:-1]
    again = rows[~is_first_of_split]
    again = again[np.lexsort((again["document"], again["split"], again["piece"]))]
    group = again["piece"].astype(np.int64) * len(SPLITS) + again["split"]
    for of_group in np.split(again, np.flatnonzero(np.diff(group)) + 1):
        if len(of_group):
            yield of_group


def _in_both(rows: npt.NDArray[np.void], is_first: Bools) -> npt.NDArray[np.void]:
    """Return the held-out rows whose fingerprint a row of the training split has."""
    first_split = rows["split"][is_first][np.cumsum(is_first) - 1]
    in_both: npt.NDArray[np.void] = rows[(rows["split"] > 0) & (first_split == 0)]
    return in_both


def _by_fingerprint(rows: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.void], Bools]:
    """Sort rows by fingerprint, then split.

    Returns:
        The rows, the first of equals first, and which of them are the first of their fingerprint.
    """
    rows = rows[np.lexsort((rows["split"], rows["low"], rows["high"]))]  # a stable sort
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
    return rows, is_first


def _beginning(job: Job, record: dict[str, Any], document: int) -> str:
    """Return how a held-out document of a piece begins."""
    for shard in record[HELD_OUT]:
        if document < shard["documents"]:
            break
        document -= shard["documents"]
    with job.shard_path(shard["file"]).open("rb") as file:
        mapped = map_shard(file)
    start, stop = mapped.boundaries[document : document + 2].tolist()
    few = mapped.tokens[start : min(stop - 1, start + _NAMED_TOKENS)].tolist()
    more = " ..." if stop - 1 - start > _NAMED_TOKENS else ""
    return repr(job.vocabulary.tokenizer.decode(few) + more)


def _append_rows(path: Path, rows: npt.NDArray[Any]) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(rows).tobytes())


def _move_train_shards(
    job: Job, records: list[dict[str, Any]], contents: _Contents, min_shard_tokens: int
) -> None:
    """Move large shards of the training split to the folder, and write the others anew.

    Written anew are shards that have duplicates, and small ones, which are joined. What these are
    made of stays with the pieces, so that a merge that was killed finds it again.
    """
    parts: list[tuple[dict[str, Any], Int64s]] = []
    for number, record in enumerate(records):
        parts += _with_duplicates(record[TRAIN], job.read_duplicates(number, TRAIN))
    sizes = [_tokens_kept(job, *part) for part in parts]
    folder = job.work.parent
    for group in _joined(sizes, min_shard_tokens):
        shard, duplicates = parts[group[0]]
        if len(group) == 1 and not len(duplicates):
            job.shard_path(shard["file"]).rename(folder / shard["file"])
            contents.shards[TRAIN].append(shard)
            continue
        tokens: list[TokenIds] = []
        lengths: list[Int64s] = []
        for of_group in group:
            kept_tokens, kept_lengths = _kept(job, TRAIN, *parts[of_group], contents)
            tokens.append(kept_tokens)
            lengths.append(kept_lengths)
        contents.shards[TRAIN].append(
            write_shard(folder / shard["file"], np.concatenate(tokens), np.concatenate(lengths))
        )
    for part, size in zip(parts, sizes, strict=True):
        if not size:  # all of its documents are duplicates
            _kept(job, TRAIN, *part, contents)


def _joined(sizes: list[int], min_tokens: int) -> list[list[int]]:
    """Say which shards are joined, by their numbers; those without a token are left out.

    Small shards are joined in their order, whatever large ones lie between, until they have
    ``min_tokens``. What remains goes to the last group.
    """
    groups: list[list[int]] = []
    small: list[int] = []
    collected = 0
    for number, size in enumerate(sizes):
        if size >= max(1, min_tokens):
            groups.append([number])
        elif size:
            small.append(number)
            collected += size
            if collected >= min_tokens:
                groups.append(small)
                small = []
                collected = 0
    if groups:
        groups[-1] += small
    elif small:
        groups.append(small)
    return groups


def _rewrite_held_out(job: Job, records: list[dict[str, Any]], contents: _Contents) -> None:
    """Write the held-out documents of all pieces together: each piece has too few for a shard."""
    writer = ShardWriter(job.work.parent / HELD_OUT, token_dtype(job.vocabulary.size))
    for number, record in enumerate(records):
        of_piece = job.read_duplicates(number, HELD_OUT)
        for shard, duplicates in _with_duplicates(record[HELD_OUT], of_piece):
            writer.append(*_kept(job, HELD_OUT, shard, duplicates, contents))
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


def _tokens_kept(job: Job, shard: dict[str, Any], duplicates: Int64s) -> int:
    """Return how many tokens of a shard are in no duplicate."""
    tokens = int(shard["tokens"])
    if not len(duplicates):
        return tokens
    with job.shard_path(shard["file"]).open("rb") as file:
        return tokens - int(map_shard(file).lengths[duplicates].sum())


def _kept(
    job: Job, split: str, entry: dict[str, Any], duplicates: Int64s, contents: _Contents
) -> tuple[TokenIds, Int64s]:
    """Read the tokens and lengths of a shard's documents, and leave duplicates out."""
    with job.shard_path(entry["file"]).open("rb") as file:
        shard = map_shard(file)
    if not len(duplicates):
        return shard.tokens, shard.lengths
    kept = np.ones(len(shard.lengths), np.bool_)
    kept[duplicates] = False
    is_kept_token = np.repeat(kept, shard.lengths)
    contents.leave_out(split, shard.tokens[~is_kept_token], len(duplicates))
    return shard.tokens[is_kept_token], shard.lengths[kept]


def _manifest(
    job: Job, records: list[dict[str, Any]], report: Report, contents: _Contents
) -> dict[str, Any]:
    long_documents = LongDocuments()
    for record in records:
        long_documents.documents += record["long_documents"]["documents"]
        long_documents.parts += record["long_documents"]["parts"]
    counted = {
        **report.counts(),
        "duplicates": contents.duplicates,
        "long_documents": asdict(long_documents),
    }
    if contents.overlap:
        counted["held_out_in_train"] = contents.overlap
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
        "report": counted,
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
        files = {span.file.path: span.file for piece in job.all_pieces for span in piece}
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


def _refuse_empty(
    job: Job, records: list[dict[str, Any]], splits: dict[str, dict[str, Any]]
) -> None:
    """Remove the pieces and raise an error if a split has no documents."""
    train = splits[TRAIN]["documents"]
    held_out = splits[HELD_OUT]["documents"]
    if train and held_out:
        return
    shutil.rmtree(job.work.parent)
    if not train and (not held_out or job.held_out_pieces):
        raise UserError("no documents to train on: the input has no text")
    if job.held_out_pieces:
        raise UserError("--held_out_input has no text: name other files, or give --held_out")
    least = min(record["hash_range"][0] for record in records)
    largest = max(record["hash_range"][1] for record in records)
    documents = train or held_out
    fault = f"none of {documents:,} documents was {'held out' if train else 'left to train on'}"
    if least == largest:  # an equal text is in one split alone, whatever the share
        reason = "it is the only one" if documents == 1 else "all have the same text"
        raise UserError(
            f"{fault}, as {reason}: bring more text, cut smaller documents by --document, or name "
            "text to hold out by --held_out_input"
        )
    if train:
        raise UserError(
            f"{fault}: raise --held_out above {least:.3g}, cut smaller documents by --document, or "
            "name text to hold out by --held_out_input"
        )
    raise UserError(f"{fault}: lower --held_out below {largest:.3g}")


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
