"""How do texts become shards? Piece by piece, on all cores and nodes, going on after a kill, and to the same bytes however it is divided.

What is in a piece depends on the input alone. Each leaves, in the hidden folder ``.OUTPUT.partial``, its shards and last of all a record of
them; :func:`merge` puts the pieces together and publishes the folder when the records of all are there.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from kantai import UserError
from kantai.checkpoint import Damaged, digest, publish, read_manifest, record, replaced
from kantai.corpus import Unit, documents
from kantai.files import Piece
from kantai.lines import Report
from kantai.shards import SPLITS, TOKEN_COUNTS, Int64s, ShardWriter, map_shard, token_dtype, write_shard
from kantai.tokenizer import Vocabulary, load_tokenizer

UInt64s = npt.NDArray[np.uint64]

_TRAIN, _HELD_OUT = SPLITS
_FORMAT = 1  # of the pieces; those of another one are made again
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 4096
_BUCKET_DOCUMENTS = 1 << 22  # whose fingerprints are compared at once
_COUNTED_AT_ONCE = 1 << 20
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Job:
    """What is to be tokenized, and how: everything that decides the bytes of the result."""

    pieces: list[Piece]
    unit: Unit | None
    text_field: str
    tokenizer: Path
    output: Path
    source: dict[str, Any]  # noted in the manifest
    held_out_share: float = 0.01
    unique: bool = False  # of documents with the same text, only the first is kept

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The opened tokenizer."""
        return load_tokenizer(self.tokenizer)

    @property
    def work(self) -> Path:
        """Where the pieces are until the folder is published."""
        return self.output.absolute().with_name(f".{self.output.name}.partial") / "pieces"

    def key(self, number: int) -> str:
        """A digest of all that a piece's shards depend on."""
        spans = [(span.file.path, span.file.size, span.file.version, span.start, span.stop) for span in self.pieces[number]]
        return digest([_FORMAT, spans, self.unit, self.text_field, self.vocabulary.fingerprint, self.held_out_share, self.unique])

    def record(self, number: int) -> dict[str, Any] | None:
        """What was noted of a piece when it was done; None while it is not, or where it was made from something else."""
        try:
            found = json.loads((self.work / f"{number:06d}.json").read_text(encoding="utf-8"))
            if found["key"] != self.key(number) or not (self.work / f"{number:06d}.npz").exists():
                return None
            shards = [shard for split in SPLITS for shard in found[split]]
            whole = all(self.shard(shard["file"]).stat().st_size == shard["bytes"] for shard in shards)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return dict(found) if whole else None

    def doubles(self, number: int, split: str) -> Int64s:
        """Those documents of a piece that are in the set already and are to be left out."""
        path = self.work / f"{number:06d}-{split}.doubles"
        return np.sort(np.fromfile(path, "<u4").astype(np.int64)) if self.unique and path.exists() else np.zeros(0, np.int64)

    def shard(self, name: str) -> Path:
        """Where a piece's shard is: :func:`merge` moves them one by one."""
        path = self.work / name
        return path if path.exists() else self.work.parent / name


def tokenize(job: Job, *, part: int = 0, parts: int = 1, processes: int | None = None) -> None:
    """Write those of the pieces ``part``, ``part + parts``, ... that are not done yet.

    Args:
        processes: how many work at it; default: as many as there are cores.

    Raises:
        UserError: bad input; what other pieces had done is kept.
    """
    if not 0 < job.held_out_share < 1:
        raise UserError(f"--held_out {job.held_out_share} must lie between 0 and 1")
    if not 0 <= part < parts:
        raise UserError(f"--part {part} must be one of 0 to {parts - 1}, as --parts is {parts}")
    if job.output.exists():
        if _is_published(job.output):  # and a kill came before its pieces were tidied up; what else is there is not ours to remove
            shutil.rmtree(job.output / job.work.name, ignore_errors=True)
        raise UserError(f"{job.output} exists already; remove it or choose another output")
    missing = [number for number in range(part, len(job.pieces), parts) if job.record(number) is None]
    job.work.mkdir(parents=True, exist_ok=True)
    try:
        _write_pieces(job, missing, processes or len(os.sched_getaffinity(0)))
    except BaseException:
        if parts == 1 and not any(job.work.glob("*.json")):
            shutil.rmtree(job.work.parent)  # nothing to go on from
        raise


def merge(job: Job) -> dict[str, Any]:
    """Publish the folder from its pieces, all of which must be done, and return its manifest.

    Raises:
        UserError: pieces are missing, or there are no documents in one of the splits.
    """
    records = [job.record(number) for number in range(len(job.pieces))]
    missing = [str(number) for number, found in enumerate(records) if found is None]
    if missing:
        few = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise UserError(f"{len(missing)} of {len(records)} pieces are not tokenized yet ({few}): run the parts they belong to again")
    done = [found for found in records if found is not None]
    folder, vocab_size = job.work.parent, job.vocabulary.size
    if job.unique:
        _find_doubles(job, sum(shard["documents"] for found in done for split in SPLITS for shard in found[split]))
    counts = sum((_arrays(job, number)["counts"].astype(np.int64) for number in range(len(done))), np.zeros((2, vocab_size), np.int64))
    train: list[dict[str, Any]] = []
    held_out = ShardWriter(folder / _HELD_OUT, token_dtype(vocab_size))
    duplicates = 0
    for number, found in enumerate(done):
        for row, split in enumerate(SPLITS):
            for shard, doubles in _with_doubles(found[split], job.doubles(number, split)):
                duplicates += len(doubles)
                if split == _TRAIN and not len(doubles):
                    job.shard(shard["file"]).rename(folder / shard["file"])
                    train.append(shard)
                    continue
                tokens, lengths, dropped = _without(job.shard(shard["file"]), doubles)
                counts[row] -= _counted(dropped, vocab_size)
                if split == _HELD_OUT:
                    held_out.add(tokens, lengths)  # a piece has few of them: together they fill shards
                elif len(lengths):
                    train.append(write_shard(folder / shard["file"], tokens, lengths))
    report = Report()
    for found in done:
        report.add(Report(**found["report"]))
    splits = {_TRAIN: train, _HELD_OUT: held_out.close()}
    meta: dict[str, Any] = {
        "kind": "shards",
        "tokenizer": job.vocabulary.fingerprint,
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).name,
        "source": job.source,
        "report": asdict(report) | {"duplicates": duplicates},
        "splits": {split: _split_entry(splits[split], counts[row], job.vocabulary.eos_id) for row, split in enumerate(SPLITS)},
    }
    _refuse_empty(meta["splits"], job)
    np.save(folder / TOKEN_COUNTS, counts)
    files = {shard["file"]: {key: shard[key] for key in ("bytes", "sha256")} for split in SPLITS for shard in splits[split]}
    files[TOKEN_COUNTS] = record(folder / TOKEN_COUNTS)
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


def _is_published(folder: Path) -> bool:
    try:
        return read_manifest(folder).get("kind") == "shards"
    except Damaged:
        return False


class _Worker:
    """Writes pieces, one after another."""

    def __init__(self, job: Job, progress: Callable[[int], Any]) -> None:
        self.job, self.progress, self.vocabulary = job, progress, job.vocabulary

    def write(self, number: int) -> None:
        """Write a piece's shards and, last, its record."""
        job, report, dtype = self.job, Report(), token_dtype(self.vocabulary.size)
        writers = {split: ShardWriter(job.work / f"{split}-{number:06d}", dtype) for split in SPLITS}
        counts = np.zeros((2, self.vocabulary.size), np.int64)
        fingerprints: dict[str, list[UInt64s]] = {split: [np.zeros((0, 2), np.uint64)] for split in SPLITS}
        for texts in _batched(documents(job.pieces[number], job.unit, job.text_field, report)):
            digests, size = _fingerprints(texts)
            tokens, lengths = _ended(*self.vocabulary.encode(texts), eos_id=self.vocabulary.eos_id, dtype=dtype)
            # A document's split depends on its text alone, so that the same text is never both trained on and held out.
            held_out = digests[:, 0] * 2.0**-64 < job.held_out_share
            of_token = np.repeat(held_out, lengths)
            for row, split, these, of_these in ((0, _TRAIN, ~held_out, ~of_token), (1, _HELD_OUT, held_out, of_token)):
                if these.any():
                    of_split = tokens[of_these]
                    writers[split].add(of_split, lengths[these])
                    counts[row] += _counted(of_split, self.vocabulary.size)
                    if job.unique:
                        fingerprints[split].append(digests[these])
            self.progress(size)
        shards = {split: writers[split].close() for split in SPLITS}
        found_in = {split: np.concatenate(fingerprints[split]) for split in SPLITS}
        with replaced(job.work / f"{number:06d}.npz") as path, path.open("wb") as file:
            np.savez_compressed(file, counts=counts, train=found_in[_TRAIN], held_out=found_in[_HELD_OUT])
        with replaced(job.work / f"{number:06d}.json") as path:
            path.write_text(json.dumps({"key": job.key(number), **shards, "report": asdict(report)}), encoding="utf-8")


_worker: _Worker  # of this process


def _write_pieces(job: Job, pieces: list[int], most_processes: int) -> None:
    processes = max(1, min(most_processes, len(pieces)))
    spans = [span for number in pieces for span in job.pieces[number]]
    total = None if any(span.file.suffixes[1] for span in spans) else sum(span.stop - span.start for span in spans)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=not sys.stderr.isatty()) as bar:
        if processes == 1:
            worker = _Worker(job, bar.update)
            for number in pieces:
                worker.write(number)
        else:
            _in_processes(job, pieces, processes, max(1, most_processes // processes), bar)


def _in_processes(job: Job, pieces: list[int], processes: int, threads: int, bar: "tqdm[Any]") -> None:
    context = multiprocessing.get_context("spawn")  # a fork would take over whatever locks other threads hold
    done = context.Value("q", 0)
    os.environ |= {"TOKENIZERS_PARALLELISM": str(threads > 1).lower(), "RAYON_NUM_THREADS": str(threads)}
    with ProcessPoolExecutor(processes, context, _start_worker, (job, done)) as pool:
        try:
            pending = {pool.submit(_write, number) for number in pieces}
            while pending:
                finished, pending = wait(pending, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                bar.update(done.value - bar.n)
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise UserError("a process that tokenized was killed, perhaps for want of memory: lower --processes and run it again") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(job: Job, done: Any) -> None:
    global _worker  # noqa: PLW0603 (what a pool's initializer makes can be kept nowhere else)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def progress(size: int) -> None:
        with done.get_lock():
            done.value += size

    _worker = _Worker(job, progress)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(number: int) -> None:
    _worker.write(number)


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fingerprints(texts: list[str]) -> tuple[UInt64s, int]:
    """128 bits that name each text, [texts, 2], and the bytes of all."""
    content = [text.encode() for text in texts]
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in content)
    return np.frombuffer(digests, "<u8").reshape(-1, 2), sum(map(len, content))


def _ended(ids: npt.NDArray[Any], lengths: Int64s, *, eos_id: int, dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], Int64s]:
    """Documents' ids and lengths, with ``</s>`` behind each."""
    is_end = np.zeros(len(ids) + len(lengths), np.bool_)
    is_end[np.cumsum(lengths + 1) - 1] = True
    tokens = np.empty(len(is_end), dtype)
    tokens[is_end], tokens[~is_end] = eos_id, ids
    return tokens, lengths + 1


def _counted(tokens: npt.NDArray[Any], vocab_size: int) -> Int64s:
    """How often each entry of the vocabulary occurs; in slices, since ``bincount`` makes eight bytes of every token."""
    slices = (tokens[start : start + _COUNTED_AT_ONCE] for start in range(0, len(tokens), _COUNTED_AT_ONCE))
    return sum((np.bincount(part, minlength=vocab_size) for part in slices), np.zeros(vocab_size, np.int64))


def _find_doubles(job: Job, documents: int) -> None:
    """Note which documents of every piece have the text of an earlier one.

    Fingerprints are dealt to files by their value, and one file at a time is sorted, so that memory does not grow with the corpus.
    """
    row = np.dtype([("high", "<u8"), ("low", "<u8"), ("piece", "<u4"), ("split", "<u4"), ("document", "<u4")])
    buckets = 1 + documents // _BUCKET_DOCUMENTS
    folder = job.work / "fingerprints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for old in job.work.glob("*.doubles"):
        old.unlink()
    for number in range(len(job.pieces)):
        arrays = _arrays(job, number)
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
                _append(job.work / f"{group['piece'][0]:06d}-{SPLITS[group['split'][0]]}.doubles", group["document"])


def _with_doubles(shards: list[dict[str, Any]], doubles: Int64s) -> Iterator[tuple[dict[str, Any], Int64s]]:
    """A piece's shards, each with those of its documents that are doubles."""
    first = 0
    for shard in shards:
        here = doubles[(first <= doubles) & (doubles < first + shard["documents"])] - first
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
    if not documents[_TRAIN]:
        raise UserError("no documents to train on: lower --held_out")
    raise UserError(f"none of {documents[_TRAIN]} documents was held out: raise --held_out, or cut smaller documents")


def _arrays(job: Job, number: int) -> Any:
    with np.load(job.work / f"{number:06d}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def _append(path: Path, rows: npt.NDArray[Any]) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(rows).tobytes())
