"""Tests that a sample is fixed and in proportion, and shares no document with the rest."""

import gzip
import lzma
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kantai.preprocessing.documents import documents, pieces, splittable
from kantai.preprocessing.files import MIB, File, find_files
from kantai.preprocessing.sampling import Sample, draw_samples

COMPRESSORS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def lines(name: str, number: int) -> list[str]:
    """Return different lines of 32 bytes each that compress badly."""
    return [f"{name} {index * 2654435761 % 2**32:013d} {index:08d}" for index in range(number)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[File]:
    """Write 20 MB: a large file, small files, a compressed file and a Parquet file."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "large.txt").write_text("\n".join(lines("large", 250_000)))
    for number in range(100):
        (folder / f"small{number:02}.txt").write_text("\n".join(lines(f"small{number:02}", 1000)))
    (folder / "zipped.txt.gz").write_bytes(
        gzip.compress("\n".join(lines("zip", 250_000)).encode(), 1)
    )
    pq.write_table(
        pa.table({"text": lines("table", 150_000)}), folder / "a.parquet", row_group_size=1000
    )
    return find_files([str(path) for path in sorted(folder.iterdir())])


def drawn(
    files: list[File], sample_bytes: int, seed: int = 0
) -> tuple[Sample, list[str], list[str]]:
    """Return a sample, its documents, and the documents of the rest."""
    samples = draw_samples(
        files,
        sample_bytes,
        seed,
        documents,
        splittable=lambda file: splittable(file, None),
        rest_bytes=2 * MIB,
    )
    sample, rest = (list(sample.read(documents)) for sample in samples)
    return samples[0], sample, rest


def test_sample_draws_every_file_in_proportion(corpus: list[File]) -> None:
    whole = Counter(text[:4] for piece in pieces(corpus) for text in documents(piece))
    total = sum(file.text_bytes for file in corpus)
    sample, texts, _ = drawn(corpus, 8 * MIB)
    assert sample.bytes == sum(len(text) for text in texts)
    assert sample.bytes == pytest.approx(8 * MIB, rel=0.2)
    found = Counter(text[:4] for text in texts)
    for kind, number in whole.items():
        assert found[kind] / number == pytest.approx(8 * MIB / total, rel=0.5), kind
    assert len(set(texts)) == len(texts)


@pytest.mark.slow
def test_rest_shares_no_document_with_sample(corpus: list[File]) -> None:
    for seed in range(4):
        _, sample, rest = drawn(corpus, (8 + seed * 3) * MIB, seed)
        assert rest
        assert set(rest).isdisjoint(sample)
        assert sum(map(len, rest)) < 3 * MIB


@pytest.mark.slow
def test_seed_determines_sample(corpus: list[File]) -> None:
    assert drawn(corpus, 4 * MIB)[1:] == drawn(corpus, 4 * MIB)[1:]
    assert drawn(corpus, 4 * MIB)[1] != drawn(corpus, 4 * MIB, seed=1)[1]


def test_corpus_below_sample_size_is_used_whole(corpus: list[File]) -> None:
    _, texts, rest = drawn(corpus, 64 * MIB)
    assert texts == [text for piece in pieces(corpus) for text in documents(piece)]
    assert set(rest) < set(texts)
    assert MIB < sum(map(len, rest)) < 3 * MIB


@pytest.mark.parametrize(
    ("number", "length", "sample_bytes"), [(400, 400, 2 * MIB), (20, 28_000, 8 * MIB)]
)
def test_uncut_small_files_do_not_overfill_sample(
    tmp_path: Path, number: int, length: int, sample_bytes: int
) -> None:
    for index in range(number):
        (tmp_path / f"{index}.csv").write_text("text\n" + "\n".join(lines(f"{index:03}", length)))
    sample, texts, rest = drawn(find_files([str(tmp_path)]), sample_bytes)
    assert sample.bytes == pytest.approx(sample_bytes, rel=0.2)
    assert len(texts) == sample.files * length
    assert set(rest).isdisjoint(texts)


def compressible_lines(name: str, number: int) -> list[str]:
    """Return lines of 64 bytes each that compress well."""
    return [f"{name} {'the same again and ' * 2}{index:021d}" for index in range(number)]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "txt.gz", "txt.xz", "txt.zst"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_sample_covers_well_compressed_files_evenly(
    tmp_path: Path, suffix: str, share: float
) -> None:
    """The stored bytes may be fewer than the sample's, and files may be longer than it needs."""
    number = 60_000
    for name in "0123":
        content = compressible_lines(name, number)
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(
                pa.table({"text": content}), path, compression="zstd", row_group_size=10_000
            )
        else:
            path.write_bytes(COMPRESSORS[suffix.removeprefix("txt.")]("\n".join(content).encode()))
    files = find_files([str(tmp_path)])
    stored = sum(file.text_bytes for file in files)
    assert stored < 3 * number * 64  # at least a quarter less than the text
    with pytest.MonkeyPatch.context() as patch:
        # A smaller unit makes these files large relative to the sample.
        patch.setattr("kantai.preprocessing.sampling.MIB", 1 << 14)
        sample, texts, rest = drawn(files, int(share * stored))
    assert sample.bytes == pytest.approx(share * stored, rel=0.1)
    for some in (texts, rest):
        quarters = Counter((text[0], int(text[-21:]) * 4 // number) for text in some)
        assert len(quarters) == 16 and min(quarters.values()) > max(quarters.values()) / 3
    assert set(rest).isdisjoint(texts)


def test_well_compressed_corpus_is_used_whole(
    tmp_path: Path,
) -> None:
    content = compressible_lines("0", 60_000)
    pq.write_table(pa.table({"text": content}), tmp_path / "a.parquet", compression="zstd")
    assert drawn(find_files([str(tmp_path)]), 5 * MIB)[1] == content


def test_small_sample_skips_end_of_large_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(
        gzip.compress("\n".join(lines("begin", 100_000) * 18).encode(), 1) + b"damaged"
    )
    (file,) = find_files([str(path)])
    texts = drawn([File(file.path, 100 * MIB, "")], MIB)[1]
    assert sum(map(len, texts)) >= MIB
