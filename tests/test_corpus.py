"""Every kind of input gives the documents it holds, in a fixed order, or one line that names file and place."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kantai import UserError
from kantai.corpus import Unit, documents, find_files

WRAPPED = "One line\nand the next.\n\n  \nA second\n   paragraph.\n"


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (None, ["One line", "and the next.", "A second", "   paragraph."]),
        ("line", ["One line", "and the next.", "A second", "   paragraph."]),
        ("paragraph", ["One line and the next.", "A second paragraph."]),
        ("file", [WRAPPED.rstrip("\n")]),
    ],
)
def test_text_is_cut_into_units(tmp_path: Path, unit: Unit | None, expected: list[str]) -> None:
    assert list(documents([written(tmp_path / "a.txt", WRAPPED)], unit)) == expected


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path, unit: Unit) -> None:
    plain = written(tmp_path / "plain.txt", WRAPPED + "Überfluß\n")
    other = written(tmp_path / "other.txt", b"\xef\xbb\xbf" + (WRAPPED + "Überfluß\n").replace("\n", "\r\n").encode())
    assert list(documents([other], unit)) == list(documents([plain], unit))


def test_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "one\n\ntwo")
    assert list(documents([path], "line")) == list(documents([path], "paragraph")) == ["one", "two"]


def test_blank_file_gives_no_documents(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "\n  \n\t\r\n")
    assert all(list(documents([path], unit)) == [] for unit in ("line", "paragraph", "file"))


def test_json_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one\\ntwo", "id": 1}\r\n\r\n{"text": "  "}\n{"text": "\\u00fc"}')
    assert list(documents([path])) == list(documents([path], "record")) == ["one\ntwo", "ü"]


def test_field_of_a_record_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": 1, "body": "right"}\n')
    assert list(documents([path], text_field="body")) == ["right"]


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3], "text": ["one\ntwo", " ", "ü"], "body": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert list(documents([tmp_path / "a.parquet"])) == ["one\ntwo", "ü"]
    assert list(documents([tmp_path / "a.parquet"], "record", "body")) == ["x", "y", "z"]


def test_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    files = [written(tmp_path / "b.txt", "text"), written(tmp_path / "a.jsonl", '{"text": "record"}')]
    assert list(documents(files)) == ["text", "record"]


def test_directory_means_all_files_below_but_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.jsonl", ".hidden.txt", ".git/config", "a/.DS_Store"):
        written(tmp_path / "corpus" / name, "x")
    found = find_files([str(tmp_path / "corpus")])
    assert [path.relative_to(tmp_path / "corpus").as_posix() for path in found] == ["a/b/c.jsonl", "a/z.txt", "b.txt"]


def test_hidden_parents_do_not_hide_a_directory(tmp_path: Path) -> None:
    path = written(tmp_path / ".cache" / "corpus" / "a.txt", "x")
    assert find_files([str(path.parent)]) == [path]


def test_globs_are_sorted_and_no_file_comes_twice(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/er/d.txt"):
        written(tmp_path / name, "x")
    inputs = [str(tmp_path / "c.md"), str(tmp_path / "**" / "*.txt"), str(tmp_path / "a.txt"), str(tmp_path)]
    assert [path.name for path in find_files(inputs)] == ["c.md", "a.txt", "b.txt", "d.txt"]


def test_a_name_with_glob_characters_is_a_name_first(tmp_path: Path) -> None:
    path = written(tmp_path / "a[1].txt", "x")
    assert find_files([str(path)]) == [path]


@pytest.mark.parametrize("missing", ["nothing.txt", "*.txt", "empty_folder"])
def test_input_that_matches_nothing_is_named(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UserError, match="no input at") as error:
        find_files([str(tmp_path / missing)])
    assert missing in str(error.value)


def test_empty_file_is_named(tmp_path: Path) -> None:
    written(tmp_path / "full.txt", "x")
    written(tmp_path / "void.txt", "")
    with pytest.raises(UserError, match=r"void\.txt is empty"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "content", "unit", "message"),
    [
        ("latin1.txt", "fine\nÜber\n".encode("latin-1"), "line", r"latin1\.txt line 2 is not UTF-8"),
        ("latin1.txt", "fine\n\nÜber\n".encode("latin-1"), "paragraph", r"latin1\.txt line 3 is not UTF-8"),
        ("utf16.txt", "one\ntwo\n".encode("utf-16"), "line", r"utf16\.txt line 1 is not UTF-8"),
        ("binary.txt", b"fine\nx\0y\n", "file", r"binary\.txt line 2 has a NUL"),
        ("bad.jsonl", b'{"text": "x"}\n\n{"text": \n', "record", r"bad\.jsonl line 3 is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "record", r"deep\.jsonl line 1 is not JSON"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": "\xfc"}\n', "record", r"bad\.jsonl line 2 is not UTF-8"),
        (
            "field.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            "record",
            r"field\.jsonl record 2 .* 'text': name the right one with --text_field",
        ),
        ("number.jsonl", b'{"text": 5}\n', "record", r"number\.jsonl record 1 .* 'text'"),
        ("list.jsonl", b'["text"]\n', None, r"list\.jsonl record 1 .* 'text'"),
        ("surrogate.jsonl", b'{"text": "fine"}\n{"text": "half a pair: \\ud83d"}\n', None, r"surrogate\.jsonl (line|record) 2 "),
        ("no.parquet", b"PAR1 but not really", None, r"no\.parquet is not a readable Parquet file"),
    ],
)
def test_bad_content_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, unit: Unit | None, message: str) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        list(documents([path], unit))


@pytest.mark.parametrize("values", [{"body": ["x", "y"]}, {"text": ["x", None]}, {"text": [b"x", b"y"]}])
def test_parquet_without_text_in_its_field_is_named(tmp_path: Path, values: dict[str, list[object]]) -> None:
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet record \d .*'text'"):
        list(documents([tmp_path / "a.parquet"]))


def test_parquet_whose_text_is_not_utf8_is_named(tmp_path: Path) -> None:
    offsets = pa.array([0, 4], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer("Über".encode("latin-1"))])
    pq.write_table(pa.table({"text": column}), tmp_path / "latin1.parquet")
    with pytest.raises(UserError, match=r"latin1\.parquet"):
        list(documents([tmp_path / "latin1.parquet"]))


@pytest.mark.parametrize(
    ("name", "unit", "expected"),
    [
        ("a.txt", "record", "give line, paragraph or file"),
        ("a.jsonl", "line", "give record"),
        ("a.jsonl", "paragraph", "give record"),
        ("a.parquet", "file", "give record"),
    ],
)
def test_unit_that_does_not_fit_the_file_is_refused(tmp_path: Path, name: str, unit: Unit, expected: str) -> None:
    path = written(tmp_path / name, json.dumps({"text": "x"}))
    with pytest.raises(UserError, match=f"{name} cannot be cut by --document {unit}: {expected}"):
        list(documents([path], unit))


COMPRESSORS = {"gz": gzip.compress, "xz": lzma.compress, "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read_to_the_end_of_their_last_part(suffix: str, tmp_path: Path) -> None:
    compress = COMPRESSORS[suffix]
    lines = [f"line {number} of some text" for number in range(20_000)]
    half = "".join(f"{line}\n" for line in lines[:10_000]).encode(), "".join(f"{line}\n" for line in lines[10_000:]).encode()
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compress(half[0]) + compress(half[1]))  # as `cat a.gz b.gz` makes
    assert list(documents([path])) == lines
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert list(documents([tmp_path / f"a.jsonl.{suffix}"])) == ["one", "two"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"a\.txt\.{suffix} cannot be read beyond line \d+, it is damaged or cut off"):
        list(documents([path]))
    path.write_bytes(b"no compressed file")
    with pytest.raises(UserError, match="beyond line 0"):
        list(documents([path]))


def test_csv_records(tmp_path: Path) -> None:
    long = "x" * 300_000
    path = tmp_path / "a.csv"
    path.write_text(f'\ufeffid,text\r\n1,plain\r\n2,"two\nlines, with ""quotes"""\r\n3,\r\n4,{long}\r\n', encoding="utf-8", newline="")
    assert list(documents([path])) == ["plain", 'two\nlines, with "quotes"', long]
    assert list(documents([path], "record", "id")) == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match="--text_field"):
        list(documents([path], text_field="body"))
    path.write_text('id,text\n1,"never closed\n')
    with pytest.raises(UserError, match=r"a\.csv is not CSV"):
        list(documents([path]))
