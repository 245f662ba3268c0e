"""Tests that newlines end lines, their length is bounded, and few invalid bytes are repaired."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from kantai.errors import UserError
from kantai.preprocessing.documents import Unit, documents, pieces
from kantai.preprocessing.files import MIB, find_files
from kantai.preprocessing.lines import Report
from tests.helpers.files import read_documents, write_file

WRAPPED = "One line\nand the next.\n\n  \nA second\n   paragraph.\n"


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
def test_byte_order_mark_and_crlf_change_nothing(tmp_path: Path, unit: Unit) -> None:
    plain = write_file(tmp_path / "plain.txt", WRAPPED + "Überfluß\n")
    other = write_file(
        tmp_path / "other.txt",
        b"\xef\xbb\xbf" + (WRAPPED + "Überfluß\n").replace("\n", "\r\n").encode(),
    )
    assert list(read_documents([other], unit)) == list(read_documents([plain], unit))


def test_last_line_needs_no_newline(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt", "one\n\ntwo")
    assert (
        list(read_documents([path], "line"))
        == list(read_documents([path], "paragraph"))
        == ["one", "two"]
    )


def test_blank_file_gives_no_documents(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt", "\n  \n\t\r\n")
    assert all(list(read_documents([path], unit)) == [] for unit in ("line", "paragraph", "file"))


def lines_with_bad(documents: int, *bad: bytes) -> list[bytes]:
    return [*bad, *(f"good line {number}".encode() for number in range(documents - len(bad)))]


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_few_invalid_documents_are_repaired_and_counted(tmp_path: Path, unit: Unit) -> None:
    end = {"line": b"\n", "paragraph": b"\n\n"}[unit]
    path = write_file(
        tmp_path / "a.txt", end.join([b"fine", *lines_with_bad(299, b"\xdcber", b"x\0y \xff")])
    )
    report = Report()
    assert list(read_documents([path], unit, report=report))[:3] == [
        "fine",
        "\ufffdber",
        "x\ufffdy \ufffd",
    ]
    assert (report.documents, report.replaced, report.invalid_utf8, report.nul) == (300, 2, 2, 1)
    first, second = {"line": (2, 3), "paragraph": (3, 5)}[unit]
    assert report.first == dict.fromkeys(("replaced", "invalid_utf8"), f"{path} line {first}") | {
        "nul": f"{path} line {second}"
    }
    assert report.notes()[0].startswith("2 documents had bytes that are not UTF-8")
    assert json.loads(json.dumps(dataclasses.asdict(report))) == dataclasses.asdict(report)


def test_more_than_one_spoiled_document_in_a_hundred_is_another_encoding(tmp_path: Path) -> None:
    """Judged by bytes: a document of a few stray bytes may be long."""
    good = write_file(tmp_path / "good.txt", b"\n".join(lines_with_bad(20, b"\xfc", b"\xfc")))
    assert len(list(read_documents([good]))) == 20
    bad = write_file(tmp_path / "bad.txt", b"\n".join(lines_with_bad(9, b"\xfc", b"\xfc")))
    with pytest.raises(
        UserError, match=r"bad\.txt line 1 is not UTF-8, as 2 characters in 87 bytes of the file"
    ):
        list(read_documents([bad]))


def test_only_newlines_end_lines(tmp_path: Path) -> None:
    text = "one\rtwo\x0b\x0c\x1c\x85\u2028three\r\r\nfour\r"
    assert list(read_documents([write_file(tmp_path / "a.txt", text)])) == [
        text[: text.index("\r\r")] + "\r",
        "four\r",
    ]


def test_documents_of_100_mb_are_read(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt", b"x" * 100_000_000 + b"\nshort\n" + b"y" * 10_000_000)
    assert [
        len(text) for piece in pieces(find_files([str(path)])) for text in documents(piece)
    ] == [100_000_000, 5, 10_000_000]


def test_lines_over_byte_limit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(b"short\n")
        for _ in range(300):
            file.write(b"x" * MIB)
    for unit in ("line", "paragraph", "file"):
        with pytest.raises(UserError, match="longer than 256 MiB"):
            list(read_documents([path], unit))
