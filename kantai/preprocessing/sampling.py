"""Which part of a corpus stands for the whole? A seeded sample, every part of the corpus in it in proportion to its size.

The bytes of the corpus, one file behind the other, are divided into as many equal strata as the sample is to have MiB, and the MiB
around one random point of each is taken: systematic sampling proportional to size. Of what can only be read from its beginning,
documents are drawn one by one instead, from all of it. How many bytes they make together is known only to who has read them, since
compressed text may be any number of times what is stored: so such a part is read twice, first to measure it and then to draw from it.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kantai.data import rng
from kantai.preprocessing.files import HUB, MIB, File, Piece, Span

_PARQUET_BYTES = (
    128 * MIB
)  # its row groups are reached one by one, but how large they are is written at its end
_MIN_SHARE = (
    1 / 16
)  # of documents kept: to reach some at the end of a large compressed file, all of it would have to be read


@dataclass(frozen=True)
class Draw:
    """The documents of a piece whose random numbers lie from ``low`` to below ``high``, until they are ``most_bytes``."""

    piece: Piece
    key: rng.UInt64s
    low: float
    high: float
    most_bytes: float = np.inf


Reader = Callable[[Piece], Iterator[str]]  # gives the documents of a piece


@dataclass
class Sample:
    """What is drawn of a corpus, about how many bytes of UTF-8 that will be, and how many it was once it has been read."""

    draws: list[Draw]
    expected_bytes: int
    bytes: int = 0

    @property
    def files(self) -> int:
        """How many files are touched."""
        return len({span.file.path for draw in self.draws for span in draw.piece})

    def read(self, documents: Reader) -> Iterator[str]:
        """Yield the drawn documents."""
        for draw in self.draws:
            before = self.bytes
            for text, number in zip(documents(draw.piece), _numbers(draw.key), strict=False):
                if draw.low <= number < draw.high:
                    self.bytes += len(text.encode())
                    yield text
                    if self.bytes - before >= draw.most_bytes:
                        break


@dataclass(frozen=True)
class _Part:
    """What is sampled alone."""

    span: Span
    text_bytes: int  # about, until it is measured
    splittable: bool
    measured: bool = False

    def measure(self, documents: Reader) -> "_Part":
        """The same with the bytes of its documents. What can be cut needs none: it is stored as it is read."""
        if self.splittable or self.measured:
            return self
        return replace(
            self,
            text_bytes=sum(len(text.encode()) for text in documents((self.span,))),
            measured=True,
        )


def draw_samples(
    files: Iterable[File],
    sample_bytes: int,
    seed: int,
    documents: Reader,
    *,
    splittable: Callable[[File], bool],
    rest_bytes: int = 10_000_000,
) -> tuple[Sample, Sample]:
    """A sample of about ``sample_bytes``, and one of about ``rest_bytes`` that shares no document with it.

    If the corpus has no more than ``sample_bytes``, all of it is the first, and the second is from the same text.

    Args:
        documents: measures what cannot be cut.
        splittable: whether the parts of a file can be read alone.
    """
    parts = [part for file in files for part in _parts(file, splittable(file))]
    if (
        sum(part.text_bytes for part in parts) <= sample_bytes
    ):  # by what is stored, of which there may be more text
        parts = [part.measure(documents) for part in parts]
    ends = np.cumsum([part.text_bytes for part in parts], dtype=np.float64)
    total = int(ends[-1])
    everything = tuple(part.span for part in parts)
    again = Sample(
        [Draw(everything, rng.fold(seed), 0, rest_bytes / max(total, rest_bytes))], rest_bytes
    )
    if total <= sample_bytes:
        return Sample([Draw(everything, rng.fold(seed), 0, 1)], total), again
    chosen = set(_points(total, sample_bytes, rng.fold(seed, 0)))
    sample = _overlaps(parts, ends, chosen)
    others = set()
    for mib in _points(total, rest_bytes, rng.fold(seed, 1)):
        free = next((other for other in itertools.count(mib) if other not in chosen), mib)
        if free * MIB < total:
            others.add(free)
    rest = _overlaps(parts, ends, others)
    taken: dict[int, float] = {}
    drawn = Sample(_draws(parts, sample, taken, seed, documents), sample_bytes)
    return drawn, Sample(_draws(parts, rest, taken, seed, documents), rest_bytes) if rest else again


def _parts(file: File, splittable: bool) -> list[_Part]:
    if file.path.startswith(HUB):
        return [
            _Part(Span(file, shard, shard + 1), file.text_bytes // file.size, False)
            for shard in range(file.size)
        ]
    if not splittable or file.suffixes[0] != ".parquet":
        return [_Part(Span(file, 0, file.size), file.text_bytes, splittable)]
    starts = range(0, file.size, _PARQUET_BYTES)
    spans = [Span(file, start, min(start + _PARQUET_BYTES, file.size)) for start in starts]
    return [_Part(span, span.stop - span.start, False) for span in spans]


def _points(total: int, wanted: int, key: rng.UInt64s) -> list[int]:
    """One of the MiBs that make ``total`` bytes in each of ``wanted`` / MiB strata."""
    number, drawn = -(-total // MIB), -(-wanted // MIB)
    edges = np.arange(min(number, drawn) + 1) * number // min(number, drawn)
    places = rng.uniform(rng.bits(key, edges[:-1])) * np.diff(edges)
    return [int(mib) for mib in edges[:-1] + places.astype(np.int64)]


def _overlaps(
    parts: list[_Part], ends: npt.NDArray[np.float64], chosen: Iterable[int]
) -> dict[int, list[tuple[int, int]]]:
    """For every part that chosen MiBs of the corpus fall on: which of its bytes they are."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for mib in sorted(chosen):
        index = int(np.searchsorted(ends, mib * MIB, side="right"))
        while (
            index < len(parts)
            and (begin := int(ends[index]) - parts[index].text_bytes) < (mib + 1) * MIB
        ):
            start, stop = (
                max(mib * MIB - begin, 0),
                min((mib + 1) * MIB - begin, parts[index].text_bytes),
            )
            small = not parts[index].splittable and parts[index].text_bytes <= MIB
            if not small:
                found[index].append((start, stop))
            elif start == 0 and begin >= mib * MIB:  # taken whole, by the MiB that it begins in
                found[index].append((0, parts[index].text_bytes))
            index += 1
    return found


def _draws(
    parts: list[_Part],
    wanted: dict[int, list[tuple[int, int]]],
    taken: dict[int, float],
    seed: int,
    documents: Reader,
) -> list[Draw]:
    """What to read for the wanted bytes: of documents that are drawn, others than the shares that are taken already, which it adds to."""
    spans: list[Span] = []
    draws: list[Draw] = []
    for index, ranges in wanted.items():
        if parts[index].splittable:
            spans += [Span(parts[index].span.file, start, stop) for start, stop in ranges]
            continue
        wanted_bytes = sum(stop - start for start, stop in ranges)
        share, most_bytes = _MIN_SHARE, float(wanted_bytes)
        if parts[index].measured or wanted_bytes >= _MIN_SHARE * parts[index].text_bytes:
            parts[index] = parts[index].measure(documents)
            share, most_bytes = min(1.0, wanted_bytes / max(1, parts[index].text_bytes)), np.inf
        low = max(taken[index], 1 - share) if index in taken else 0.0
        high = 1.0 if index in taken else share
        if low < high:
            taken.setdefault(index, high)
            draws.append(
                Draw((parts[index].span,), rng.fold(seed, 2, index), low, high, most_bytes)
            )
    if spans:
        draws.insert(0, Draw(tuple(spans), rng.fold(seed, 3), 0, 1))
    return draws


def _numbers(key: rng.UInt64s) -> Iterator[float]:
    blocks = (
        rng.uniform(rng.bits(key, np.arange(start, start + 4096))).tolist()
        for start in itertools.count(0, 4096)
    )
    return itertools.chain.from_iterable(blocks)
