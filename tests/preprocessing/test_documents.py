"""Tests that every input format gives its documents in order, or an error with file and place.

Documents do not depend on how a file is cut.
"""

import dataclasses
import gzip
import itertools
import json
import lzma
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kantai.preprocessing.lines
from kantai.errors import UserError
from kantai.preprocessing.documents import Unit, documents, has_paragraphs, pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.lines import Report
from kantai.preprocessing.spans import Span
from tests.helpers.commands import run_program
from tests.helpers.files import read_documents, write_file

WRAPPED = "One line\nand the next.\n\n  \nA second\n   paragraph.\n"


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
    assert list(read_documents([write_file(tmp_path / "a.txt", WRAPPED)], unit)) == expected


def test_json_lines_documents_are_read(tmp_path: Path) -> None:
    path = write_file(
        tmp_path / "a.jsonl",
        b'\xef\xbb\xbf{"text": "one\\ntwo", "id": 1}\r\n\r\n{"text": "  "}\n{"text": "\\u00fc"}',
    )
    assert (
        list(read_documents([path])) == list(read_documents([path], "record")) == ["one\ntwo", "ü"]
    )


@pytest.mark.parametrize(
    "name", ["c4.json.gz", "a.json", "a.ndjson", "A.JSONL", "A.Json.GZ", "a.ndjson.gz"]
)
def test_json_lines_suffixes_are_recognized(tmp_path: Path, name: str) -> None:
    content = b'{"text": "one", "url": "x"}\n{"text": "two"}\n'
    path = write_file(
        tmp_path / name, gzip.compress(content) if name.lower().endswith("gz") else content
    )
    assert list(read_documents([path])) == list(read_documents([path], "record")) == ["one", "two"]


def test_uppercase_suffixes_are_recognized(tmp_path: Path) -> None:
    write_file(tmp_path / "A.CSV", "text\none\n")
    pq.write_table(pa.table({"text": ["two"]}), tmp_path / "B.PARQUET")
    write_file(tmp_path / "C.TXT.XZ", lzma.compress(b"three\n"))
    assert list(
        read_documents([tmp_path / name for name in ("A.CSV", "B.PARQUET", "C.TXT.XZ")])
    ) == [
        "one",
        "two",
        "three",
    ]


def test_text_field_selects_record_field(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.jsonl", '{"text": 1, "body": "right"}\n')
    assert list(read_documents([path], text_field="body")) == ["right"]


def test_parquet_documents_are_read(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3], "text": ["one\ntwo", " ", "ü"], "body": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert list(read_documents([tmp_path / "a.parquet"])) == ["one\ntwo", "ü"]
    assert list(read_documents([tmp_path / "a.parquet"], "record", "body")) == ["x", "y", "z"]


def test_files_are_read_in_given_order(tmp_path: Path) -> None:
    files = [
        write_file(tmp_path / "b.txt", "text"),
        write_file(tmp_path / "a.jsonl", '{"text": "record"}'),
    ]
    assert list(read_documents(files)) == ["text", "record"]


@pytest.mark.parametrize(
    ("name", "content", "unit", "message"),
    [
        (
            "latin1.txt",
            "fine\nÜber\n".encode("latin-1"),
            "line",
            r"latin1\.txt line 2 is not UTF-8",
        ),
        (
            "latin1.txt",
            "fine\n\nÜber\n".encode("latin-1"),
            "paragraph",
            r"latin1\.txt line 3 is not UTF-8",
        ),
        ("utf16.txt", "one\ntwo\n".encode("utf-16"), "line", r"utf16\.txt line 1 is not UTF-8"),
        ("binary.txt", b"fine\nx\0y\n", "file", r"binary\.txt line 2 has a NUL"),
        ("bad.jsonl", b'{"text": "x"}\n\n{"text": \n', "record", r"bad\.jsonl line 3 is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "record", r"deep\.jsonl line 1 is not JSON"),
        (
            "bad.jsonl",
            b'{"text": "x"}\n{"text": "\xfc"}\n',
            "record",
            r"bad\.jsonl line 2 is not UTF-8",
        ),
        (
            "field.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            "record",
            r"field\.jsonl line 2 .* 'text': name the right one with --text_field",
        ),
        ("number.jsonl", b'{"text": 5}\n', "record", r"number\.jsonl line 1 .* 'text'"),
        ("list.jsonl", b'["text"]\n', None, r"list\.jsonl line 1 is not JSON with a record a line"),
        (
            "array.json",
            b'[\n  {"text": "x"},\n  {"text": "y"}\n]\n',
            None,
            r"array\.json line 1 is not JSON with a record a line: .* jq",
        ),
        (
            "pretty.json",
            b'{\n  "text": "x"\n}\n',
            None,
            r"pretty\.json line 1 is not JSON with a record a line: .* jq",
        ),
        (
            "surrogate.jsonl",
            b'{"text": "fine"}\n{"text": "half a pair: \\ud83d"}\n',
            None,
            r"surrogate\.jsonl (line|record) 2 ",
        ),
        ("no.parquet", b"PAR1 but not really", None, r"no\.parquet is not a readable Parquet file"),
    ],
)
def test_bad_content_error_names_its_place(
    tmp_path: Path, name: str, content: bytes, unit: Unit | None, message: str
) -> None:
    path = write_file(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        list(read_documents([path], unit))


@pytest.mark.parametrize("values", [{"body": ["x", "y"]}, {"text": [1, 2]}, {"text": [b"x", b"y"]}])
def test_parquet_without_text_is_an_error(tmp_path: Path, values: dict[str, list[object]]) -> None:
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet record \d .*'text'"):
        list(read_documents([tmp_path / "a.parquet"]))


def test_parquet_of_other_encoding_is_an_error(tmp_path: Path) -> None:
    offsets = pa.array([0, 4], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, offsets, pa.py_buffer("Über".encode("latin-1"))]
    )
    pq.write_table(pa.table({"text": column}), tmp_path / "latin1.parquet")
    with pytest.raises(UserError, match=r"latin1\.parquet record 1 is not UTF-8"):
        list(read_documents([tmp_path / "latin1.parquet"]))


@pytest.mark.parametrize(
    ("name", "unit", "expected"),
    [
        ("a.txt", "record", "give line, paragraph or file"),
        ("a.jsonl", "line", "give record"),
        ("a.jsonl", "paragraph", "give record"),
        ("a.parquet", "file", "give record"),
    ],
)
def test_document_unit_must_fit_file_format(
    tmp_path: Path, name: str, unit: Unit, expected: str
) -> None:
    path = write_file(tmp_path / name, json.dumps({"text": "x"}))
    with pytest.raises(UserError, match=f"{name} cannot be cut by --document {unit}: {expected}"):
        list(read_documents([path], unit))


COMPRESSORS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read_to_their_end(suffix: str, tmp_path: Path) -> None:
    compress = COMPRESSORS[suffix]
    lines = [f"line {number} of some text" for number in range(20_000)]
    half = (
        "".join(f"{line}\n" for line in lines[:10_000]).encode(),
        "".join(f"{line}\n" for line in lines[10_000:]).encode(),
    )
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compress(half[0]) + compress(half[1]))  # as `cat a.gz b.gz` does
    assert list(read_documents([path])) == lines
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert list(read_documents([tmp_path / f"a.jsonl.{suffix}"])) == ["one", "two"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        UserError,
        match=(
            rf"a\.txt\.{suffix} cannot be read beyond byte \d+ of its text, "
            r"it is damaged, cut off or out of reach"
        ),
    ):
        list(read_documents([path]))
    path.write_bytes(b"no compressed file")
    with pytest.raises(UserError, match="beyond byte 0"):
        list(read_documents([path]))


def test_csv_documents_are_read(tmp_path: Path) -> None:
    long = "x" * 300_000
    path = tmp_path / "a.csv"
    path.write_text(
        f'\ufeffid,text\r\n1,plain\r\n2,"two\nlines, with ""quotes"""\r\n3,\r\n4,{long}\r\n',
        encoding="utf-8",
        newline="",
    )
    assert list(read_documents([path])) == ["plain", 'two\nlines, with "quotes"', long]
    assert list(read_documents([path], "record", "id")) == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match="--text_field"):
        list(read_documents([path], text_field="body"))
    path.write_text("id,text\n1\n2,short rows have no text\n")
    with pytest.raises(UserError, match=r"a\.csv record 1 \(line 2\) has 1 fields .* has 2"):
        list(read_documents([path]))
    path.write_text('id,text\n1,"never closed\n')
    with pytest.raises(UserError, match=r"a\.csv is not CSV"):
        list(read_documents([path]))


def test_invalid_characters_are_repaired_in_every_format(tmp_path: Path) -> None:
    many = 200
    write_file(
        tmp_path / "a.jsonl",
        b"\n".join(
            [
                b'{"text": "a\\ud83d"}',
                b'{"text": "b\\u0000"}',
                *[b'{"text": "\\ud83d\\ude42"}'] * many,
            ]
        ),
    )
    write_file(
        tmp_path / "a.csv",
        b"\n".join([b"id,text", b"1,a\xff", b"2,b\0", *[b"3,\xf0\x9f\x99\x82"] * many]),
    )
    texts = [b"a\xff", b"b\0", *["🙂".encode()] * many]
    column = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=1)
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        report = Report()
        assert list(read_documents([tmp_path / name], report=report)) == [
            "a\ufffd",
            "b\ufffd",
            *["🙂"] * many,
        ], name
        assert (report.replaced, report.invalid_utf8, report.nul) == (2, 1, 1), name
        place = {"a.jsonl": "line 2", "a.csv": "line 3", "a.parquet": "record 2"}[name]
        assert report.first["nul"] == f"{tmp_path / name} {place}"


def test_empty_and_null_documents_are_counted(tmp_path: Path) -> None:
    write_file(tmp_path / "a.jsonl", '{"text": null}\n{"text": ""}\n{"text": "x"}\n')
    write_file(tmp_path / "blank.jsonl", '\n{"text": "x"}\n  \n')
    write_file(tmp_path / "a.csv", "id,text\n\n1,x\n2,\n")
    pq.write_table(pa.table({"text": ["x", None, " "]}), tmp_path / "a.parquet")
    write_file(tmp_path / "a.txt", "x\n\n \n")
    write_file(tmp_path / "empty.txt", "")
    for name in ("a.jsonl", "blank.jsonl", "a.csv", "a.parquet", "a.txt"):
        report = Report()
        assert list(read_documents([tmp_path / name, tmp_path / "empty.txt"], report=report)) == [
            "x"
        ]
        assert (report.documents, report.characters, report.empty, report.empty_files) == (
            1,
            1,
            2,
            1,
        ), name
        assert report.first["empty_files"] == str(tmp_path / "empty.txt")


READING = """
import datasets, pyarrow.parquet, sys
from kantai.preprocessing.documents import documents, pieces
from kantai.preprocessing.files import find_files
def most(kind):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) // 1024
cut = pieces(find_files([sys.argv[1]]))
before = most("VmRSS")
print(sum(1 for piece in cut for text in documents(piece)), most("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("hub", [False, True])
def test_reader_memory_is_bounded_by_bytes_not_records(tmp_path: Path, hub: bool) -> None:
    """The file has 150 MB. Arrow holds one page, so that each record of the row group has its own.

    Of JSON lines, datasets holds 10 MB.
    """
    texts = [f"{row:06d}" * 50_000 for row in range(500)]
    if hub:
        (tmp_path / "a.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    else:
        with pq.ParquetWriter(
            tmp_path / "a.parquet",
            pa.schema({"text": pa.string()}),
            compression="none",
            use_dictionary=False,
            write_batch_size=1,
        ) as writer:
            writer.write_table(pa.table({"text": texts}))
    done = run_program(
        [sys.executable, "-c", READING, f"hub:{tmp_path}" if hub else tmp_path / "a.parquet"],
        code=0,
    )
    found, megabytes = map(int, done.stdout.split())
    assert found == 500
    assert megabytes < 120


@pytest.mark.parametrize("prefix", ["", "hub:"])
def test_records_over_byte_limit_are_refused(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kantai.preprocessing.lines, "MAX_DOCUMENT_BYTES", 1000)
    pq.write_table(pa.table({"text": ["x" * 1000, "y" * 1001]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="record 2: a document longer than 256 MiB"):
        list(
            documents(
                pieces(find_files([prefix + str(tmp_path / ("" if prefix else "a.parquet"))]))[0]
            )
        )


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_every_arrow_string_type_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(
        pa.table({"text": pa.array(["one", None, "ü"]).cast(kind)}), tmp_path / "a.parquet"
    )
    assert list(read_documents([tmp_path / "a.parquet"])) == ["one", "ü"]


# Cuts can fall within line ends, byte order marks and characters of several bytes.
ATOMS = [
    b"\n",
    b"\n\n",
    b"\r\n",
    b"\r",
    b" ",
    b" \n",
    b"\t",
    b"a",
    b"bc",
    "ü".encode(),
    "🙂".encode(),
    "\u2028".encode(),
    b"\xef\xbb\xbf",
    b"\xff",
    b"\0",
]
LINES = [
    b'{"text": "a\xc3\xbc"}',
    b'{"text": "\\ud800"}',
    b"",
    b" ",
    b'{"text": null}',
    b'{"text": "b"}\r',
    b'{"text": "\xff"}',
]


@settings(max_examples=300)
@given(
    st.one_of(
        st.tuples(
            st.sampled_from(["line", "paragraph"]),
            st.lists(st.sampled_from(ATOMS), max_size=30).map(b"".join),
        ),
        st.tuples(st.just("record"), st.lists(st.sampled_from(LINES), max_size=6).map(b"\n".join)),
    ),
    st.booleans(),
    st.lists(st.integers(1, 120), max_size=6),
    st.integers(1, 9),
)
def test_spans_have_documents_of_whole_file(
    unit_and_text: tuple[Unit, bytes], mark: bool, cuts: list[int], block: int
) -> None:
    unit, text = unit_and_text
    text = b"\xef\xbb\xbf" * mark + text or b" "
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kantai.preprocessing.lines, "_BLOCK_BYTES", block)
        patch.setattr("kantai.preprocessing.encodings._MAX_SHARE", 1.0)
        (file,) = find_files(
            [str(write_file(Path(folder) / ("a.jsonl" if unit == "record" else "a.txt"), text))]
        )
        whole = Report()
        parts = Report()
        expected = list(documents((Span(file, 0, file.size),), unit, report=whole))
        spans = [
            Span(file, start, stop)
            for start, stop in itertools.pairwise(
                sorted({0, *(c for c in cuts if c < file.size), file.size})
            )
        ]
        assert [
            text for span in spans for text in documents((span,), unit, report=parts)
        ] == expected
    parts.tallies.clear()  # those of a whole file are judged at its end
    assert dataclasses.replace(parts, first={}) == dataclasses.replace(whole, first={})
    assert parts.first.keys() == whole.first.keys()
    if unit == "line":
        lines = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
        repaired = [line.decode(errors="replace").replace("\0", "\ufffd") for line in lines]
        assert expected == [line for line in repaired if line.strip()]


def test_error_in_later_span_names_byte_offset(tmp_path: Path) -> None:
    (file,) = find_files(
        [str(write_file(tmp_path / "a.jsonl", '{"text": "x"}\r\n' * 5 + "no JSON\n"))]
    )
    with pytest.raises(UserError, match=r"a\.jsonl line at byte 75 is not JSON"):
        list(documents((Span(file, 20, file.size),)))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 4000), max_size=8), st.integers(1, 40))
def test_row_group_belongs_to_one_span(cuts: list[int], rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        texts = [f"text {number}" for number in range(100)]
        pq.write_table(
            pa.table({"id": range(100), "text": texts}),
            Path(folder) / "a.parquet",
            row_group_size=rows,
        )
        (file,) = find_files([f"{folder}/a.parquet"])
        spans = [
            Span(file, start, stop)
            for start, stop in itertools.pairwise(
                sorted({0, *(c for c in cuts if c < file.size), file.size})
            )
        ]
        assert [text for span in spans for text in documents((span,))] == texts


def test_pieces_have_documents_of_whole_corpus(tmp_path: Path) -> None:
    lines = [f"line {number} of some text" for number in range(20_000)]
    write_file(tmp_path / "a.txt", "\n".join(lines))
    write_file(tmp_path / "b.txt.gz", gzip.compress("\n".join(lines).encode()))
    cut = pieces(find_files([str(tmp_path)]), piece_bytes=100_000)
    assert len(cut) > 4
    assert [text for piece in cut for text in documents(piece)] == lines * 2


def test_piece_planning_refuses_unfit_document_unit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give record"):
        pieces(find_files([str(write_file(tmp_path / "a.jsonl", "{}"))]), "line")


def test_text_has_paragraphs_if_blank_lines_end_many(tmp_path: Path) -> None:
    cases = {
        "wrapped.txt": (WRAPPED * 20, True),
        "lines.txt": ("a sentence a line\n" * 2000, False),
        "two chapters.txt": ("a sentence a line\n" * 1000 + "\n" + "a sentence\n" * 1000, False),
        "a.JSONL": ('{"text": "x"}\n\n' * 50, False),
    }
    for name, (text, expected) in cases.items():
        (file,) = find_files([str(write_file(tmp_path / name, text))])
        assert has_paragraphs(file) == expected, name
    packed = write_file(tmp_path / "a.txt.gz", gzip.compress(WRAPPED.encode() * 20))
    assert has_paragraphs(*find_files([str(packed)]))
