"""Tokenize the pieces of a corpus, on all cores and nodes.

A piece's shards depend on the input alone, so the result is the same however the work is divided.
Each piece leaves its shards, and last its record, in the hidden folder ``.OUTPUT.partial``. A start
after a kill makes only the pieces that have no record. :func:`kantai.preprocessing.merge.merge`
publishes the folder once every piece has a record.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from kantai.data.rng import Bools, Int64s, TokenIds, UInt64s
from kantai.data.shards import SPLITS, ShardWriter, token_dtype
from kantai.data.tokenizer import batched_texts
from kantai.errors import UserError
from kantai.output import redact_all
from kantai.preprocessing.documents import documents
from kantai.preprocessing.files import File, has_changed
from kantai.preprocessing.job import HELD_OUT, TRAIN, Job, count_tokens, refuse_output
from kantai.preprocessing.lines import Report
from kantai.preprocessing.long_documents import LongDocuments
from kantai.preprocessing.spans import Piece
from kantai.storage.atomic import digest, locked, manifest_entry, replaced

_BATCH_DOCUMENTS = 4096
_PROGRESS_SECONDS = 0.5


def tokenize(job: Job, *, part: int = 0, parts: int = 1, processes: int | None = None) -> None:
    """Tokenize the pieces ``part``, ``part + parts``, ... that are not finished yet.

    Args:
        processes: processes to run; default: one per core.

    Raises:
        UserError: bad input; finished pieces are kept.
    """
    if not 0 < job.held_out_share < 1:
        raise UserError(f"--held_out {job.held_out_share} must lie between 0 and 1")
    if not 0 <= part < parts:
        raise UserError(f"--part {part} must be one of 0 to {parts - 1}, as --parts is {parts}")
    refuse_output(job)
    with locked(job.output, shared=parts > 1):
        refuse_output(job)  # another process may have published it meanwhile
        numbers = range(part, len(job.all_pieces), parts)
        missing = [number for number in numbers if job.read_record(number) is None]
        job.work.mkdir(parents=True, exist_ok=True)
        try:
            _write_pieces(job, missing, processes or len(os.sched_getaffinity(0)))
            # Looking at a data set takes as long as reading a small shard of it: once is enough. A
            # next start finds its other version, and makes all of its pieces again.
            all_pieces = job.all_pieces
            pieces = (all_pieces[number] for number in missing)
            _refuse_changed(file for file in _files(pieces) if file.is_data_set)
        except BaseException:
            if parts == 1 and not any(job.work.glob("*.json")):
                shutil.rmtree(job.work.parent)  # no piece is finished that a next start could use
            raise


class _PieceWriter:
    """Tokenizes the documents of one piece, and writes its shards and its record."""

    def __init__(self, job: Job, number: int) -> None:
        self._job = job
        self._number = number
        self._report = Report()
        self._long_documents = LongDocuments()
        self._held_out_share = job.held_out_share_of(number)
        self._hash_range = [1.0, 0.0]  # the least and the largest hash, which draw the split
        vocab_size = job.vocabulary.size
        self._counts = np.zeros((len(SPLITS), vocab_size), np.int64)
        self._dtype = token_dtype(vocab_size)
        self._shards: dict[str, ShardWriter] = {}
        self._fingerprints: dict[str, list[UInt64s]] = {}
        for split in SPLITS:
            self._shards[split] = ShardWriter(job.work / f"{split}-{number:06d}", self._dtype)
            self._fingerprints[split] = [np.zeros((0, 2), np.uint64)]

    def tokenize(self, show_progress: Callable[[int], Any]) -> None:
        """Write the shards, and last the record; pass on the bytes of text after each batch."""
        job = self._job
        piece = job.all_pieces[self._number]
        texts = documents(piece, job.unit, job.text_field, self._report, job.on_error)
        for batch in batched_texts(self._long_documents.cut(texts), _BATCH_DOCUMENTS):
            show_progress(self._tokenize_batch(batch))
        _refuse_changed(file for file in _files([piece]) if not file.is_data_set)
        shards = {split: self._shards[split].finish() for split in SPLITS}
        self._write_record(shards)

    def _tokenize_batch(self, texts: list[str]) -> int:
        """Tokenize documents, and return how many bytes of text they are."""
        vocabulary = self._job.vocabulary
        fingerprints, text_bytes = _fingerprints(texts)
        ids, lengths = vocabulary.encode(texts)
        tokens, lengths = _append_ends(ids, lengths, vocabulary.eos_id, self._dtype)
        # A document's split depends on its text alone: no text is both trained on and held out.
        hashes = fingerprints[:, 0] * 2.0**-64
        is_held_out = (hashes < self._held_out_share) | (self._held_out_share == 1)
        self._hash_range[0] = min(self._hash_range[0], float(hashes.min()))
        self._hash_range[1] = max(self._hash_range[1], float(hashes.max()))
        for split, chosen in ((TRAIN, ~is_held_out), (HELD_OUT, is_held_out)):
            if chosen.any():
                self._append(split, chosen, tokens, lengths, fingerprints)
        return text_bytes

    def _append(
        self, split: str, chosen: Bools, tokens: TokenIds, lengths: Int64s, fingerprints: UInt64s
    ) -> None:
        """Append the chosen documents to a split."""
        of_split = tokens[np.repeat(chosen, lengths)]
        self._shards[split].append(of_split, lengths[chosen])
        self._counts[SPLITS.index(split)] += count_tokens(of_split, self._job.vocabulary.size)
        if self._job.keeps_fingerprints:
            self._fingerprints[split].append(fingerprints[chosen])

    def _write_record(self, shards: dict[str, list[dict[str, Any]]]) -> None:
        found = {split: np.concatenate(self._fingerprints[split]) for split in SPLITS}
        with replaced(self._job.arrays_path(self._number)) as path, path.open("wb") as file:
            np.savez_compressed(
                file, counts=self._counts, train=found[TRAIN], held_out=found[HELD_OUT]
            )
        record = {
            "key": self._job.key(self._number),
            **shards,
            "arrays": manifest_entry(self._job.arrays_path(self._number)),
            "report": redact_all(asdict(self._report)),
            "long_documents": asdict(self._long_documents),
            "hash_range": self._hash_range,
        }
        record["digest"] = digest(record)
        with replaced(self._job.record_path(self._number)) as path:
            path.write_text(json.dumps(record), encoding="utf-8")


def _files(pieces: Iterable[Piece]) -> Iterable[File]:
    """Return the files of pieces, each once."""
    return dict.fromkeys(span.file for piece in pieces for span in piece)


def _refuse_changed(files: Iterable[File]) -> None:
    """Raise an error if files have changed, since a part of each may be of another version."""
    for file in files:
        if has_changed(file):
            raise UserError(
                f"{file.path} has changed since this start looked at it: run the same command "
                "again when nothing writes to it any more"
            )


def _write_pieces(job: Job, numbers: list[int], max_processes: int) -> None:
    processes = max(1, min(max_processes, len(numbers)))
    pieces = job.all_pieces
    spans = [span for number in numbers for span in pieces[number]]
    if any(span.file.is_compressed for span in spans):
        total = None  # nobody knows how much text is in compressed files
    else:
        total = sum(span.stop - span.start for span in spans)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        if processes == 1:
            for number in numbers:
                _PieceWriter(job, number).tokenize(bar.update)
        else:
            threads = max(1, max_processes // processes)
            _write_in_processes(job, numbers, processes, threads, bar)


def _write_in_processes(
    job: Job, numbers: list[int], processes: int, threads: int, bar: "tqdm[Any]"
) -> None:
    # A fork would inherit the locks that other threads hold.
    context = multiprocessing.get_context("spawn")
    done_bytes = context.Value("q", 0)
    os.environ["TOKENIZERS_PARALLELISM"] = str(threads > 1).lower()
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(processes, context, _start_process, (job, done_bytes)) as pool:
        try:
            with _interrupts_blocked():  # by the new processes for good: this one ends them
                pending = {pool.submit(_write_piece, number) for number in numbers}
            while pending:
                finished, pending = wait(pending, _PROGRESS_SECONDS, FIRST_COMPLETED)
                bar.update(done_bytes.value - bar.n)
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                "a tokenizing process was killed, perhaps because memory ran out: "
                "lower --processes and run it again"
            ) from None
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()  # a piece may take minutes, and is made again
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Have Ctrl-C wait, also in processes that start meanwhile: there for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The state of a pool's process: only a global outlives the initializer. The job keeps its opened
# tokenizer.
_job: Job
_done_bytes: Any


def _start_process(job: Job, done_bytes: Any) -> None:
    global _job, _done_bytes  # noqa: PLW0603
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job = job
    _done_bytes = done_bytes


def _write_piece(number: int) -> None:
    _PieceWriter(_job, number).tokenize(_show_progress)


def _show_progress(text_bytes: int) -> None:
    with _done_bytes.get_lock():
        _done_bytes.value += text_bytes


def _end_with_parent() -> None:
    """End this process when its parent is gone, also when a kill took the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _fingerprints(texts: list[str]) -> tuple[UInt64s, int]:
    """Return 128 bits that name each text, [texts, 2], and the bytes of all texts."""
    encoded = [text.encode() for text in texts]
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in encoded)
    return np.frombuffer(digests, "<u8").reshape(-1, 2), sum(map(len, encoded))


def _append_ends(
    ids: TokenIds, lengths: Int64s, eos_id: int, dtype: np.dtype[Any]
) -> tuple[TokenIds, Int64s]:
    """Return the ids and lengths of documents with ``</s>`` behind each."""
    is_end = np.zeros(len(ids) + len(lengths), np.bool_)
    is_end[np.cumsum(lengths + 1) - 1] = True
    tokens = np.empty(len(is_end), dtype)
    tokens[is_end] = eos_id
    tokens[~is_end] = ids
    return tokens, lengths + 1
