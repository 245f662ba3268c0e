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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from kantai.data.rng import Int64s, UInt64s
from kantai.data.shards import SPLITS, ShardWriter, token_dtype
from kantai.errors import UserError
from kantai.preprocessing.documents import documents
from kantai.preprocessing.job import HELD_OUT, TRAIN, Job, count_tokens
from kantai.preprocessing.lines import Report
from kantai.storage.atomic import Damaged, read_manifest, replaced

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 20, 4096
_SECONDS_BETWEEN_LOOKS = 0.5


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
    missing = [number for number in range(part, len(job.pieces), parts) if job.finished_piece(number) is None]
    job.work.mkdir(parents=True, exist_ok=True)
    try:
        _write_pieces(job, missing, processes or len(os.sched_getaffinity(0)))
    except BaseException:
        if parts == 1 and not any(job.work.glob("*.json")):
            shutil.rmtree(job.work.parent)  # nothing to go on from
        raise


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
            for row, split, these, of_these in ((0, TRAIN, ~held_out, ~of_token), (1, HELD_OUT, held_out, of_token)):
                if these.any():
                    of_split = tokens[of_these]
                    writers[split].append(of_split, lengths[these])
                    counts[row] += count_tokens(of_split, self.vocabulary.size)
                    if job.unique:
                        fingerprints[split].append(digests[these])
            self.progress(size)
        shards = {split: writers[split].finish() for split in SPLITS}
        found_in = {split: np.concatenate(fingerprints[split]) for split in SPLITS}
        with replaced(job.work / f"{number:06d}.npz") as path, path.open("wb") as file:
            np.savez_compressed(file, counts=counts, train=found_in[TRAIN], held_out=found_in[HELD_OUT])
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
