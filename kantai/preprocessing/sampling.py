"""Draw a seeded sample of a corpus that holds every part of it in proportion to its size.

The corpus is its files, one behind the other. It is divided into as many equal strata as the sample
is to have MiB, and one random MiB of each stratum is drawn: systematic sampling in proportion to
size.

Files that can only be read from their beginning (compressed text, CSV, row groups of Parquet, data
sets of the Hub) give documents instead, drawn one by one from the whole file, as many bytes as MiBs
were drawn from it. Compressed text may be any number of times its stored size, so that only reading
it tells how many bytes of documents it has. Such a file is read twice: to measure it, and to draw.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from kantai.data import rng
from kantai.preprocessing.files import HUB, MIB, File
from kantai.preprocessing.spans import Piece, Span

_PARQUET_BYTES = 128 * MIB  # row groups are reached one by one; their sizes are at the file's end
# The minimum share of a file's documents that is drawn. A smaller share of a large compressed file
# would be drawn by reading all of it; its beginning is enough for that.
_MIN_SHARE = 1 / 16
_NUMBERS_AT_ONCE = 4096

Reader = Callable[[Piece], Iterator[str]]  # yields the documents of a piece
_Range = tuple[int, int]  # bytes from the first to before the second


@dataclass(frozen=True)
class Draw:
    """The documents of a piece whose random number is at least ``low`` and below ``high``."""

    piece: Piece
    key: rng.UInt64s  # of the random numbers, one a document
    low: float
    high: float
    max_bytes: float = np.inf  # drawing ends once the documents have this many bytes


@dataclass
class Sample:
    """A part of the documents of a corpus."""

    draws: list[Draw]
    expected_bytes: int  # an estimate of the bytes of UTF-8
    bytes: int = 0  # read so far

    @property
    def files(self) -> int:
        """How many files the sample is from."""
        return len({span.file.path for draw in self.draws for span in draw.piece})

    def read(self, documents: Reader) -> Iterator[str]:
        """Yield the drawn documents."""
        for draw in self.draws:
            before = self.bytes
            for text, number in zip(documents(draw.piece), _numbers(draw.key), strict=False):
                if draw.low <= number < draw.high:
                    self.bytes += len(text.encode())
                    yield text
                    if self.bytes - before >= draw.max_bytes:
                        break


def draw_samples(
    files: Iterable[File],
    sample_bytes: int,
    seed: int,
    documents: Reader,
    *,
    splittable: Callable[[File], bool],
    rest_bytes: int = 10_000_000,
) -> tuple[Sample, Sample]:
    """Draw a sample of about ``sample_bytes``, and one of ``rest_bytes`` without its documents.

    If the corpus has no more than ``sample_bytes``, the first sample is all of it, and the second
    is drawn from the same documents.

    Args:
        documents: reads a piece; used to measure files that cannot be split.
        splittable: whether parts of a file can be read alone.
    """
    parts = [part for file in files for part in _parts(file, splittable(file))]
    if sum(part.text_bytes for part in parts) <= sample_bytes:
        # The stored bytes fit, but there may be more text in them.
        for part in parts:
            part.measure(documents)
    corpus = _Corpus(parts, seed, documents)
    everything = tuple(part.span for part in parts)
    share = rest_bytes / max(corpus.total_bytes, rest_bytes)
    rest_of_all = Sample([Draw(everything, rng.fold(seed), 0, share)], rest_bytes)
    if corpus.total_bytes <= sample_bytes:
        return Sample([Draw(everything, rng.fold(seed), 0, 1)], corpus.total_bytes), rest_of_all

    sample_mibs = set(_one_mib_a_stratum(corpus.total_bytes, sample_bytes, rng.fold(seed, 0)))
    rest_mibs = set()
    for mib in _one_mib_a_stratum(corpus.total_bytes, rest_bytes, rng.fold(seed, 1)):
        free = next((other for other in itertools.count(mib) if other not in sample_mibs), mib)
        if free * MIB < corpus.total_bytes:
            rest_mibs.add(free)
    sample_ranges = corpus.ranges(sample_mibs)
    rest_ranges = corpus.ranges(rest_mibs)
    sample = Sample(corpus.draw(sample_ranges), sample_bytes)
    if not rest_ranges:
        return sample, rest_of_all
    return sample, Sample(corpus.draw(rest_ranges), rest_bytes)


@dataclass
class _Part:
    """A span that is sampled alone."""

    span: Span  # the file, a shard of a data set, or 128 MiB of a Parquet file
    text_bytes: int  # an estimate, until it is measured
    splittable: bool  # whether any range of its bytes can be read alone
    is_measured: bool = False

    def measure(self, documents: Reader) -> None:
        """Count the bytes of the documents; those of a splittable part are its stored bytes."""
        if not self.splittable and not self.is_measured:
            self.text_bytes = sum(len(text.encode()) for text in documents((self.span,)))
            self.is_measured = True


def _parts(file: File, splittable: bool) -> list[_Part]:
    if file.path.startswith(HUB):
        spans = [Span(file, shard, shard + 1) for shard in range(file.size)]
        return [_Part(span, file.text_bytes // file.size, False) for span in spans]
    if not splittable or file.suffixes[0] != ".parquet":
        return [_Part(Span(file, 0, file.size), file.text_bytes, splittable)]
    starts = range(0, file.size, _PARQUET_BYTES)
    spans = [Span(file, start, min(start + _PARQUET_BYTES, file.size)) for start in starts]
    return [_Part(span, span.stop - span.start, False) for span in spans]


def _one_mib_a_stratum(total_bytes: int, wanted_bytes: int, key: rng.UInt64s) -> list[int]:
    """Divide the MiBs of a corpus into ``wanted_bytes`` / MiB strata and draw one MiB of each."""
    mibs = -(-total_bytes // MIB)
    strata = min(mibs, -(-wanted_bytes // MIB))
    edges = np.arange(strata + 1) * mibs // strata
    places = rng.uniform(rng.bits(key, edges[:-1])) * np.diff(edges)
    return [int(mib) for mib in edges[:-1] + places.astype(np.int64)]


class _Corpus:
    """Parts, one behind the other, from which several samples are drawn without overlap."""

    def __init__(self, parts: list[_Part], seed: int, documents: Reader) -> None:
        self._parts = parts
        self._seed = seed
        self._documents = documents
        # Measuring a part later changes its text_bytes; its place in the corpus stays.
        self._ends = np.cumsum([part.text_bytes for part in parts], dtype=np.float64)
        self.total_bytes = int(self._ends[-1])
        self._drawn_shares: dict[int, float] = {}  # of the parts that gave documents

    def ranges(self, mibs: Iterable[int]) -> dict[int, list[_Range]]:
        """Find the bytes of each part, by its index, that fall into some MiBs of the corpus."""
        found: dict[int, list[_Range]] = defaultdict(list)
        for mib in sorted(mibs):
            first = int(np.searchsorted(self._ends, mib * MIB, side="right"))
            for index in range(first, len(self._parts)):
                part = self._parts[index]
                begin = int(self._ends[index]) - part.text_bytes
                if begin >= (mib + 1) * MIB:
                    break
                start = max(mib * MIB - begin, 0)
                stop = min((mib + 1) * MIB - begin, part.text_bytes)
                if part.splittable or part.text_bytes > MIB:
                    found[index].append((start, stop))
                elif begin >= mib * MIB:  # a small part is drawn whole, by the MiB it begins in
                    found[index].append((0, part.text_bytes))
        return found

    def draw(self, ranges: dict[int, list[_Range]]) -> list[Draw]:
        """Turn ranges of bytes into draws; of parts that cannot be split, draw new documents."""
        spans: list[Span] = []
        draws: list[Draw] = []
        for index, of_part in ranges.items():
            if self._parts[index].splittable:
                file = self._parts[index].span.file
                spans += [Span(file, start, stop) for start, stop in of_part]
            else:
                draws += self._draw_documents(index, sum(stop - start for start, stop in of_part))
        if spans:
            draws.insert(0, Draw(tuple(spans), rng.fold(self._seed, 3), 0, 1))
        return draws

    def _draw_documents(self, index: int, wanted_bytes: int) -> list[Draw]:
        """Draw documents of one part: the first sample low random numbers, the second high ones."""
        part = self._parts[index]
        share = _MIN_SHARE
        max_bytes = float(wanted_bytes)
        if part.is_measured or wanted_bytes >= _MIN_SHARE * part.text_bytes:
            part.measure(self._documents)
            share = min(1.0, wanted_bytes / max(1, part.text_bytes))
            max_bytes = np.inf
        low = 0.0
        high = share
        if index in self._drawn_shares:
            low = max(self._drawn_shares[index], 1 - share)
            high = 1.0
        if low >= high:
            return []
        self._drawn_shares.setdefault(index, high)
        return [Draw((part.span,), rng.fold(self._seed, 2, index), low, high, max_bytes)]


def _numbers(key: rng.UInt64s) -> Iterator[float]:
    """Yield the random numbers of a piece's documents, in [0, 1)."""
    for start in itertools.count(0, _NUMBERS_AT_ONCE):
        counters = np.arange(start, start + _NUMBERS_AT_ONCE)
        yield from rng.uniform(rng.bits(key, counters)).tolist()
