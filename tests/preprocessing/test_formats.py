"""A file is read as what it is, or refused by what it is."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kantai.errors import UserError
from kantai.preprocessing import opening
from kantai.preprocessing.documents import documents, pieces
from kantai.preprocessing.files import File, find_files
from kantai.preprocessing.formats import suffixes
from kantai.preprocessing.lines import Report
from kantai.preprocessing.spans import Span
from tests.helpers.commands import run_program
from tests.helpers.files import write_file

RECORDS = b'{"text": "one"}\n{"text": "two"}\n'


def texts(*inputs: Path | str, stated: str = "", **options: object) -> list[str]:
    cut = pieces(find_files([str(name) for name in inputs], stated))
    return [text for piece in cut for text in documents(piece, **options)]  # type: ignore[arg-type]


def tar(entries: dict[str, bytes], mode: str = "w") -> bytes:
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stored.getvalue()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stored.getvalue()


def parquet(**columns: list[object]) -> bytes:
    stored = io.BytesIO()
    pq.write_table(pa.table(columns), stored)
    return stored.getvalue()


def arrow(*, stream: bool) -> bytes:
    stored = io.BytesIO()
    table = pa.table({"text": ["one"]})
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(stored, table.schema) as writer:
        writer.write_table(table)
    return stored.getvalue()


def with_tool(*command: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run(command, input=data, capture_output=True, check=True).stdout


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    "lz4": lambda data: pa.compress(data, codec="lz4", asbytes=True),
}


# --- what a file is, is told from its bytes


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(b"x\n"), r"gzip-compressed: let its name end in \.gz, .*--format text\.gz"),
        (COMPRESSORS["xz"](b"x\n"), "xz-compressed"),
        (COMPRESSORS["bz2"](b"x\n"), r"bzip2-compressed: .* --format text\.bz2"),
        (bz2.compress(b""), "bzip2-compressed"),
        (COMPRESSORS["zst"](b"x\n"), "zstd-compressed"),
        (COMPRESSORS["lz4"](b"x\n"), "lz4-compressed"),
        (
            tar({"a.txt": b"prose\n"}),
            r"a tar archive: let its name end in \.tar, or .* --format tar",
        ),
        (zipped({"a.txt": b"prose\n"}), "a zip archive: .* --format zip"),
        (zipped({"[Content_Types].xml": b"<?xml"}), "an office document or e-book"),
        (zipped({"mimetype": b"application/epub+zip"}), "an office document or e-book"),
        (parquet(text=["one"]), "Parquet: .* --format parquet"),
        (arrow(stream=False), "an Arrow file: .* hub:"),
        (arrow(stream=True), "an Arrow stream: .* hub:"),
        (b"Obj\x01\x04\x14avro.codec\x08null", "an Avro file"),
        (b"ORC\x0a\x0b\x00\x10", "an ORC file"),
        (b"%PDF-1.7\n%\xe2\xe3\n", "a PDF: extract its text first"),
        (b"SQLite format 3\0\x10\0", "an SQLite database"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", "an old office document"),
        (b"{\\rtf1\\ansi", "an RTF document"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # archives hold the time
)
@pytest.mark.parametrize("name", ["a.txt", "part-00000", "a.jsonl"])
def test_binary_file_is_refused_by_what_it_is(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    path = write_file(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"{name} is {what}") as error:
        texts(path)
    assert "\n" not in str(error.value)
    assert "iconv" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (RECORDS, "JSON: give --format jsonl"),
        (b'\xef\xbb\xbf\n  {"id": 1}\n', "JSON"),
        (b'[\n  {\n    "text": "one"\n  }\n]\n', "JSON"),
        (b'["one", "two"]\n["three", "four"]\n', "JSON"),
        (b"<?xml version='1.0'?>\n<a/>\n", "XML: extract"),
        (b"<!DOCTYPE html>\n<p>one", "HTML: extract"),
        (b"WARC/1.0\r\nWARC-Type: response\r\n", "WARC"),
    ],
)
@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("name", ["part-00000", "a.txt", "a"])
def test_structured_file_is_not_read_as_prose(
    tmp_path: Path, name: str, content: bytes, what: str, compression: str
) -> None:
    stored = gzip.compress(content) if compression else content
    path = write_file(tmp_path / f"{name}{compression}", stored)
    with pytest.raises(UserError, match=f"{name}{compression} begins like {what}.*--format text"):
        texts(path)
    assert texts(path, stated="text")


@pytest.mark.parametrize(
    "content",
    [
        "[1]\n",
        "[ 1 ] See below.\n",
        '{"} is a brace.\n',
        "ORCS came.\n",
        "PAR1 was a club.\n",
        "MZ is an abbreviation" * 9 + "\n",
        "{{Infobox}}\n",
        "<h1> is a tag\n",
        '["Yes," he said]\n',
        "BZh9 is how bzip2 begins\n",
        "PK\n",
        '{"a", "b"} is a set\n',
        "II* and MM\n",
        "[]\n",
    ],
)
def test_prose_that_begins_like_something_else_is_read(tmp_path: Path, content: str) -> None:
    assert texts(write_file(tmp_path / "a.txt", content)) == [content.strip("\n")]


def test_span_in_the_middle_of_an_archive_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt", tar({"a.txt": b"prose\n" * 1000}))
    (file,) = find_files([str(path)])
    with pytest.raises(UserError, match=r"a\.txt is a tar archive"):
        list(documents((Span(file, 3000, 4000),)))


def test_compressed_file_of_another_compression_is_named(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt.gz", COMPRESSORS["bz2"](b"x\n"))
    with pytest.raises(UserError, match=r"a\.txt\.gz is bzip2-compressed"):
        texts(path)


def test_archive_named_as_a_compressed_text_is_named(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.gz", gzip.compress(tar({"a.txt": b"prose\n"})))
    with pytest.raises(UserError, match=r"a\.gz is a tar archive"):
        texts(path)
    assert texts(path, stated="tar") == ["prose"]


def test_finding_files_opens_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write_file(tmp_path / f"part-{number:05}", "x\n")
    monkeypatch.setattr(opening, "_open", lambda *_: pytest.fail("a file was opened"))
    assert len(pieces(find_files([str(tmp_path)]))) == 1


# --- names and --format


@pytest.mark.parametrize("name", ["a.jsonlines", "a.jl", "a.JL", "a.jsonlines.bz2"])
def test_json_lines_have_more_names(tmp_path: Path, name: str) -> None:
    content = bz2.compress(RECORDS) if name.endswith("bz2") else RECORDS
    assert texts(write_file(tmp_path / name, content)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "stated", "expected"),
    [
        ("a.txt", "", (".txt", "")),
        ("a.jsonl.gz", "", (".jsonl", ".gz")),
        ("a.tgz", "", (".tar", ".gz")),
        ("a.tar.zstd", "", (".tar", ".zst")),
        ("part-00000", "jsonl", (".jsonl", "")),
        ("part-00000.gz", "jsonl", (".jsonl", ".gz")),
        ("download", "csv.xz", (".csv", ".xz")),
        ("a.tar.gz", "jsonl", (".tar", ".gz")),
        ("a.gz", "tar", (".tar", ".gz")),
        ("a", "tar.bz2", (".tar", ".bz2")),
        ("a.csv", "text", (".text", "")),
    ],
)
def test_stated_format_comes_before_the_name(
    name: str, stated: str, expected: tuple[str, str]
) -> None:
    assert suffixes(name, stated) == expected


def test_format_says_what_files_are_whatever_they_are_called(tmp_path: Path) -> None:
    write_file(tmp_path / "spark" / "part-00000", RECORDS)
    write_file(tmp_path / "spark" / "part-00001.gz", gzip.compress(RECORDS))
    assert texts(tmp_path / "spark", stated="jsonl") == ["one", "two"] * 2
    path = write_file(tmp_path / "download", gzip.compress(b"text\none\n"))
    assert texts(path, stated="csv.gz") == ["one"]
    path = write_file(tmp_path / "table", parquet(text=["one"]))
    assert texts(path, stated="parquet") == ["one"]
    path = write_file(tmp_path / "bundle.zip", zipped({"part-00000": RECORDS}))
    assert texts(path, stated="jsonl") == ["one", "two"]


@pytest.mark.parametrize("wrong", ["json5", "jsonl.rar", "gz", ""])
def test_unknown_format_is_refused_with_the_known_ones(tmp_path: Path, wrong: str) -> None:
    path = write_file(tmp_path / "a.txt", "x")
    command = [sys.executable, "scripts/tokenize_corpus.py", f"--input={path}", "--tokenizer=t"]
    done = run_program([*command, "--output=o", f"--format={wrong}"], code=2)
    assert "is none of text, jsonl, csv, tsv, parquet, tar, zip" in done.stderr


# --- one kind of files in a directory or glob


@pytest.mark.parametrize("pattern", ["corpus", "corpus/*"])
def test_text_beside_records_is_refused_by_its_name(tmp_path: Path, pattern: str) -> None:
    for number in range(3):
        write_file(tmp_path / "corpus" / f"{number}.parquet", parquet(text=["one"]))
    write_file(tmp_path / "corpus" / "README.md", "# A data set\n")
    with pytest.raises(UserError, match=r"README\.md is text by its name, and 3 are records"):
        find_files([str(tmp_path / pattern)])
    assert texts(tmp_path / "corpus" / "*.parquet") == ["one"] * 3


def test_records_beside_texts_are_refused_by_their_name(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "index.json"):
        write_file(tmp_path / "corpus" / name, "x")
    with pytest.raises(UserError, match=r"index\.json has records by its name, and 2 are text"):
        find_files([str(tmp_path / "corpus")])


def test_what_spark_writes_beside_its_files_is_left_out(tmp_path: Path) -> None:
    write_file(tmp_path / "out" / "part-00000.parquet", parquet(text=["one"]))
    table = pa.table({"text": ["one"]})
    for name in ("_common_metadata", "_metadata"):
        pq.write_metadata(table.schema, tmp_path / "out" / name)
    write_file(tmp_path / "out" / "_SUCCESS", "")
    assert texts(tmp_path / "out") == texts(tmp_path / "out" / "*") == ["one"]


# --- compression


def long_zstd(data: bytes) -> bytes:
    return with_tool("zstd", "--long=31", "--ultra", "-c")(data)


@pytest.mark.parametrize("suffix", ["bz2", "lz4", "zst", "zst --long=31", "xz"])
def test_every_compression_is_read_to_the_end_of_its_last_frame(
    tmp_path: Path, suffix: str
) -> None:
    compress = long_zstd if "long" in suffix else COMPRESSORS[suffix]
    name = f"a.txt.{suffix.split(maxsplit=1)[0]}"
    lines = [f"line {number} of some text" for number in range(20_000)]
    halves = ["".join(f"{line}\n" for line in half) for half in (lines[:9_000], lines[9_000:])]
    stored = [compress(half.encode()) for half in halves]
    path = write_file(tmp_path / name, b"".join(stored))
    assert texts(path) == lines
    end = r"a\.txt\.\w+ cannot be read beyond byte \d+ .* damaged, cut off"
    for bad in (
        b"".join(stored)[:-9],
        stored[0] + stored[1][:20],
        stored[0] + b"garbage",
        stored[0] + b"\0" * 3 + b"x" + stored[1],
    ):
        write_file(path, bad)
        with pytest.raises(UserError, match=end):
            texts(path)


@pytest.mark.parametrize(
    ("suffix", "command"),
    [
        ("bz2", ["bzip2", "-c"]),
        ("lz4", ["lz4", "-c"]),
        ("zst", ["zstd", "-c"]),
        ("xz", ["xz", "-c"]),
    ],
)
def test_files_of_the_usual_tools_are_read(tmp_path: Path, suffix: str, command: list[str]) -> None:
    path = write_file(tmp_path / f"a.jsonl.{suffix}", with_tool(*command)(RECORDS))
    assert texts(path) == ["one", "two"]


def test_padding_between_parts_of_xz_is_no_damage(tmp_path: Path) -> None:
    part = lzma.compress(b"one\n")
    path = write_file(tmp_path / "a.txt.xz", part + b"\0" * 8 + part + b"\0" * 4)
    assert texts(path) == ["one", "one"]


def test_compressed_parquet_is_read(tmp_path: Path) -> None:
    for suffix, compress in COMPRESSORS.items():
        path = write_file(tmp_path / f"a.parquet.{suffix}", compress(parquet(text=["one"])))
        assert texts(path) == ["one"], suffix


# --- archives

ENTRIES = {
    "corpus/b.txt": b"one\n\ntwo\n",
    "corpus/a.txt.gz": gzip.compress(b"three\n"),
    "corpus/.hidden.txt": b"x\n",
    "__MACOSX/corpus/._b.txt": b"x\n",
    "corpus/empty.txt": b"",
}
ARCHIVES: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "tar": tar,
    "tar.gz": lambda entries: gzip.compress(tar(entries)),
    "tgz": lambda entries: gzip.compress(tar(entries)),
    "tar.xz": lambda entries: lzma.compress(tar(entries)),
    "tar.bz2": lambda entries: bz2.compress(tar(entries)),
    "tar.zst": lambda entries: COMPRESSORS["zst"](tar(entries)),
    "tar.lz4": lambda entries: COMPRESSORS["lz4"](tar(entries)),
    "zip": zipped,
    "ZIP": lambda entries: zipped(entries, zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_archive_stands_for_the_files_in_it(tmp_path: Path, suffix: str) -> None:
    path = write_file(tmp_path / f"a.{suffix}", ARCHIVES[suffix](ENTRIES))
    report = Report()
    assert texts(path, report=report) == ["one", "two", "three"]
    assert report.first["empty_files"] == f"{path}/corpus/empty.txt"
    records = {
        "a.jsonl": RECORDS,
        "b.csv": b"id,text\n1,three\n",
        "c.parquet": parquet(text=["four"]),
    }
    write_file(path, ARCHIVES[suffix](records))
    assert texts(path) == ["one", "two", "three", "four"]
    write_file(path, ARCHIVES[suffix]({"a.jsonl": RECORDS + b"no JSON\n"}))
    with pytest.raises(UserError, match=rf"a\.{suffix}/a\.jsonl line 3 is not JSON"):
        texts(path)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_archive_is_read_behind_a_url(tmp_path: Path, suffix: str) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe(f"/a.{suffix}", ARCHIVES[suffix](ENTRIES))
    try:
        assert texts(f"memory://a.{suffix}") == ["one", "two", "three"]
    finally:
        memory.store.clear()


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_archive_of_two_kinds_of_files_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write_file(
        tmp_path / f"a.{suffix}", ARCHIVES[suffix]({"a.jsonl": RECORDS, "b.md": b"x"})
    )
    with pytest.raises(UserError, match=rf"a\.{suffix} has files of two kinds: .*b\.md is text"):
        texts(path)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_archive_in_an_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    inner = zipped({"a.txt": b"x\n"})
    for name, message in (("b.zip", "an archive in an archive"), ("b.txt", "is a zip archive")):
        path = write_file(tmp_path / f"a.{suffix}", ARCHIVES[suffix]({name: inner}))
        with pytest.raises(UserError, match=message):
            texts(path)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    whole = tar({"a.txt": b"one\n" * 100, "b.txt": b"two\n" * 100}, "w")
    header = whole[1024 : 1024 + 148]
    assert header.startswith(b"b.txt")
    for name, bad in {
        "cut_between.tar": whole[:1024],
        "cut_in_data.tar": whole[:1200],
        "cut_in_header.tar": whole[:1100],
        "header.tar": whole[:1024] + b"X" + whole[1025:],
        "two.tar": whole + whole,
        "no.tar": b"no archive at all\n" * 100,
        "no.tar.gz": b"no archive at all\n",
        "cut.tar.gz": gzip.compress(whole)[:-9],
        "cut.zip": zipped({"a.txt": b"one\n"})[:-5],
        "no.zip": b"no archive at all\n",
        "data.zip": zipped({"a.txt": b"one\n" * 9}).replace(b"one\none", b"one\nxxx"),
    }.items():
        with pytest.raises(UserError, match=rf"{name}.* (damaged|cut off)") as error:
            texts(write_file(tmp_path / name, bad))
        assert "\n" not in str(error.value), name


def test_encrypted_zip_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "a.txt", "one\n")
    command = ["zip", "-q", "-P", "secret", "-j", tmp_path / "a.zip", tmp_path / "a.txt"]
    subprocess.run(command, check=True)
    with pytest.raises(UserError, match=r"a\.zip is not a readable zip archive, .*encrypted"):
        texts(tmp_path / "a.zip")


def test_archives_and_compressed_files_are_one_piece(tmp_path: Path) -> None:
    for name in ("a.tar", "a.zip", "a.txt.bz2", "a.txt.lz4", "a.tsv", "a.csv"):
        file = File(str(tmp_path / name), 1 << 30, "")
        assert pieces([file]) == [(Span(file, 0, 1 << 30),)], name


def test_document_unit_is_held_against_the_files_in_an_archive(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.tar", tar({"a.jsonl": RECORDS}))
    with pytest.raises(UserError, match=r"a\.tar/a\.jsonl cannot be cut by --document line"):
        texts(path, unit="line")
    assert texts(path, unit="record") == ["one", "two"]


# --- CSV and TSV


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nKant, Immanuel, born\n", r"record 1 \(line 2\) has 3 fields .* has 1"),
        ("a.csv", 'id,text\n1,"a\nb"\n\n2,b,c\n', r"record 3 \(line 5\) has 3 fields .* has 2"),
        ("a.csv", "id,text\n1,a\n2\n", r"record 2 \(line 3\) has 1 fields .* has 2: mend the row"),
        ("a.csv", "id;text\n1;a\n2\n", r"record 2 \(line 3\) has 1 fields parted by ';'"),
        ("a.tsv", "id\ttext\n1\ta\tb\n", r"record 1 \(line 2\) has 3 fields parted by '\\t'"),
        ("a.csv", 'id,text\n1,a\n2,"b\nc\n', r"is not CSV at record 2 \(lines 3 to 4\)"),
        ("a.csv", 'id,text\n1,"a" b\n', r"is not CSV at record 1 \(line 2\)"),
        ("a.csv", '"id,text\n', r"is not CSV at its header \(line 1\)"),
        ("a.tsv", 'id\ttext\n1\t"a ""b"" c"\n', r"line 2 has a quoted field.* --format csv"),
    ],
)
def test_row_that_the_header_does_not_fit_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = write_file(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"{name} {message}"):
        texts(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiter_follows_from_the_header(tmp_path: Path, delimiter: str) -> None:
    stored = io.StringIO()
    rows = [["id", "text"], ["1", "a, b; c | d\te"], [], ["2", 'two\nlines, "quoted"']]
    csv.writer(stored, delimiter=delimiter).writerows(rows)
    path = write_file(tmp_path / "a.csv", stored.getvalue())
    assert texts(path) == ["a, b; c | d\te", 'two\nlines, "quoted"']


def test_comma_comes_first_among_delimiters(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.csv", "a;b,text\nx;y,one;two\n")
    assert texts(path) == ["one;two"]


def test_quotes_mean_nothing_in_tsv(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.tsv", 'id\ttext\n1\t"Yes," he said\n2\tan "odd\n3\t"all"\n')
    assert texts(path) == ['"Yes," he said', 'an "odd', '"all"']
    path = write_file(tmp_path / "a.tsv.bz2", bz2.compress(b"text\none\n"))
    assert texts(path) == ["one"]


# --- fields


def test_nested_and_several_fields_are_joined(tmp_path: Path) -> None:
    rows = [
        {"title": "T", "article": {"body": "one"}, "a.b": "dot", "text": "x"},
        {"title": " ", "article": {"body": "two"}, "a.b": "dot", "text": "x"},
        {"title": None, "article": None, "a.b": "dot", "text": "x"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_file(tmp_path / "a.jsonl", lines)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "hub").mkdir()
    write_file(tmp_path / "hub" / "a.jsonl", lines)
    for name in (tmp_path / "a.jsonl", tmp_path / "a.parquet", f"hub:{tmp_path / 'hub'}"):
        assert texts(name, text_field="article.body") == ["one", "two"], name
        assert texts(name, text_field=["title", "article.body"]) == ["T\n\none", "two"], name
        assert texts(name, text_field="a.b") == ["dot"] * 3, name
        for wrong in ("article", "article.title", "text.body", "nothing.body"):
            with pytest.raises(UserError, match=rf"(line|record) 1 .*'{wrong}'"):
                texts(name, text_field=wrong)
    path = write_file(tmp_path / "a.csv", "title,id,text\nT,1,one\n,2,two\n")
    assert texts(path, text_field=["title", "text"]) == ["T\n\none", "two"]
    with pytest.raises(UserError, match="'body'"):
        texts(path, text_field=["title", "body"])


# --- bad records


def test_bad_records_are_skipped_and_counted_by_choice(tmp_path: Path) -> None:
    write_file(
        tmp_path / "a.jsonl",
        b'{"text": "one"}\nno JSON\n{"body": "x"}\n\n["text"]\n{"text": 5}\n{"text": "two"}\n',
    )
    write_file(tmp_path / "a.csv", "id,text\n1,one\n2\n3,a,b\n\n4,two\n")
    for name, skipped, place in (("a.jsonl", 4, "line 2"), ("a.csv", 2, "record 2 (line 3)")):
        report = Report()
        path = tmp_path / name
        assert texts(path, on_error="skip", report=report) == ["one", "two"]
        assert report.skipped_records == skipped
        assert report.first["skipped_records"] == f"{path} {place}"
        assert report.empty == 1
        assert report.notes() == [f"{skipped} bad records were skipped (first: {path} {place})"]
        with pytest.raises(UserError):
            texts(path)


# --- bombs

MEASURED = """
import datasets, pyarrow.parquet, resource, sys
from kantai.errors import UserError
from kantai.preprocessing.documents import documents, pieces
from kantai.preprocessing.files import find_files
def most(kind):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) // 1024
cut = pieces(find_files([sys.argv[1]]))
before = most("VmRSS")
try:
    found = sum(1 for _ in zip(range(20), (text for piece in cut for text in documents(piece))))
except UserError as error:
    found = str(error)
print(most("VmHWM") - before, found, sep="\\n")
"""


def measured(path: Path) -> tuple[int, str]:
    done = run_program([sys.executable, "-c", MEASURED, path], code=0)
    megabytes, found = done.stdout.splitlines()
    return int(megabytes), found


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY"])
def test_memory_is_bounded_where_rows_share_stored_bytes(tmp_path: Path, encoding: str) -> None:
    """20 KB of Parquet: 64 of 1,000 rows of 50 MB took 3.2 GB."""
    path = tmp_path / "a.parquet"
    options: dict[str, object] = {"use_dictionary": True, "store_schema": False}
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["x" * 50_000_000])
    column: object = text
    if encoding != "dictionary":
        column = ["x" * 50_000_000] * 20
        options = {"use_dictionary": False, "column_encoding": encoding}
    pq.write_table(pa.table({"text": column}), path, compression="zstd", **options)
    assert path.stat().st_size < 100_000
    megabytes, found = measured(path)
    assert found == "20"
    assert megabytes < 900


@pytest.mark.slow
def test_row_group_of_mostly_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array(["x" * 200_000_000] * 6, pa.large_string())
    pq.write_table(pa.table({"text": column}), path, compression="zstd", use_dictionary=False)
    megabytes, found = measured(path)
    assert "would fill the memory" in found
    assert megabytes < 100


@pytest.mark.slow
def test_record_of_endless_lists_is_refused(tmp_path: Path) -> None:
    line = b'{"text": "x", "a": [' + b"[]," * 40_000_000 + b"[]]}\n"
    megabytes, found = measured(write_file(tmp_path / "a.jsonl.gz", gzip.compress(line, 1)))
    assert "line 1 is not JSON" in found
    assert megabytes < 1500


def test_header_of_tar_does_not_fill_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.pax_headers = {"comment": "x" * (2 << 20)}
    info.size = 2
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as archive:
        archive.addfile(info, io.BytesIO(b"x\n"))
    path = write_file(tmp_path / "a.tar.gz", gzip.compress(stored.getvalue()))
    with pytest.raises(UserError, match="a header longer than 1 MiB"):
        texts(path)


def test_fields_of_a_csv_record_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kantai.preprocessing.lines.MAX_DOCUMENT_BYTES", 1000)
    field = '"' + ("x" * 90 + "\n") * 9 + '"'
    path = write_file(tmp_path / "a.csv", f"id,text\n1,a\n{field},{field}\n")
    with pytest.raises(UserError, match="a document longer than 256 MiB"):
        texts(path)


def test_folder_of_datasets_is_told_how_it_is_read(tmp_path: Path) -> None:
    write_file(tmp_path / "saved" / "data-00000-of-00001.arrow", arrow(stream=True))
    write_file(tmp_path / "saved" / "state.json", "{}")
    with pytest.raises(UserError, match=r"\.arrow is an Arrow stream: .* --input hub:FOLDER"):
        texts(tmp_path / "saved")
    assert texts(f"hub:{tmp_path / 'saved'}") == ["one"]


def test_nothing_but_bad_records_is_refused_when_they_are_skipped(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(UserError, match=r"all 2 records .* line 1 has no text in its field 'body'"):
        texts(path, text_field="body", on_error="skip")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_archive_without_files_is_counted_as_empty(tmp_path: Path, suffix: str) -> None:
    path = write_file(tmp_path / f"a.{suffix}", ARCHIVES[suffix]({".hidden": b"x"}))
    report = Report()
    assert texts(path, report=report) == []
    assert report.first["empty_files"] == str(path)


def test_links_in_archives_are_left_out(tmp_path: Path) -> None:
    write_file(tmp_path / "d" / "a.txt", "one\n")
    (tmp_path / "d" / "b.txt").symlink_to("a.txt")
    (tmp_path / "d" / "c.txt").hardlink_to(tmp_path / "d" / "a.txt")
    (tmp_path / "d" / "secret.txt").symlink_to("/etc/passwd")
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", tmp_path, "./d"], check=True)
    assert texts(tmp_path / "a.tar") == ["one"]


def test_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.csv", "text,text\none,two\n")
    with pytest.raises(UserError, match=r"a\.csv has two fields called 'text'"):
        texts(path)
    table = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has two fields called 'text'"):
        texts(tmp_path / "a.parquet")
