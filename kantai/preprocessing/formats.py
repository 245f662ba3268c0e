"""What a file is: by its name or ``--format``, and whether its first bytes agree.

The name (or ``--format``) decides how a file is read, so that work can be planned without opening a
hundred thousand files. When a file is opened, its first bytes are held against that: a file of
another kind is refused by what it is, and not tokenized as prose.
"""

import argparse
import json
import os
import re

from kantai.errors import UserError

HEAD_BYTES = 4096  # that are looked at; the signature of tar is at byte 257
COMPRESSIONS = {
    ".gz": ".gz",
    ".xz": ".xz",
    ".zst": ".zst",
    ".zstd": ".zst",
    ".bz2": ".bz2",
    ".lz4": ".lz4",
}
ARCHIVES = (".tar", ".zip")
RECORDS = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl", ".csv", ".tsv", ".parquet")
FORMATS = ("text", "jsonl", "csv", "tsv", "parquet", "tar", "zip")
# Files that Spark, Hadoop and pyarrow put beside the data, which hold no records.
BOOKKEEPING = ("_SUCCESS", "_metadata", "_common_metadata")
_SHORT = {
    ".tgz": (".tar", ".gz"),
    ".tbz2": (".tar", ".bz2"),
    ".txz": (".tar", ".xz"),
    ".tzst": (".tar", ".zst"),
}

_COMPRESSED_ADVICE = "let its name end in {0}, or say so by --format, as in --format text{0}"
_ARCHIVE_ADVICE = "let its name end in {0}, or give --format {1}"
_CONVERT = "convert it to text, .jsonl or .parquet first"
_EXTRACT = "extract its text first"
_READ_BY_HUB = "give its folder as --input hub:FOLDER, or convert it to .parquet"
# Signature, what it is, the suffix it should have ("" if it cannot be read), what to do.
_SIGNATURES = [
    (re.compile(pattern, re.DOTALL), name, suffix, advice)
    for pattern, name, suffix, advice in (
        (rb"\x1f\x8b", "gzip-compressed", ".gz", _COMPRESSED_ADVICE),
        (rb"\xfd7zXZ\0", "xz-compressed", ".xz", _COMPRESSED_ADVICE),
        (rb"\x28\xb5\x2f\xfd", "zstd-compressed", ".zst", _COMPRESSED_ADVICE),
        (rb"[\x50-\x5f]\x2a\x4d\x18", "zstd-compressed", ".zst", _COMPRESSED_ADVICE),
        (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2-compressed", ".bz2", _COMPRESSED_ADVICE),
        (rb"\x04\x22\x4d\x18", "lz4-compressed", ".lz4", _COMPRESSED_ADVICE),
        (rb".{257}ustar", "a tar archive", ".tar", _ARCHIVE_ADVICE),
        (
            rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|docProps/|word/|xl/|ppt/|mimetype)",
            "an office document or e-book",
            "",
            _CONVERT,
        ),
        (rb"PK(\x03\x04|\x05\x06)", "a zip archive", ".zip", _ARCHIVE_ADVICE),
        (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "", "unpack it first"),
        (rb"Rar!\x1a\x07", "a RAR archive", "", "unpack it first"),
        (rb"LZIP\x01", "lzip-compressed", "", "decompress it first"),
        (rb"\x1f[\x9d\xa0]", "compressed by compress", "", "decompress it first"),
        (rb"\xff\x06\0\0sNaPpY", "Snappy-compressed", "", "decompress it first"),
        (rb"PAR1", "Parquet", ".parquet", _ARCHIVE_ADVICE),
        (rb"ARROW1\0\0", "an Arrow file", "", _READ_BY_HUB),
        (rb"\xff\xff\xff\xff.{2}\0\0\x10\0\0\0", "an Arrow stream", "", _READ_BY_HUB),
        (rb"FEA1", "a Feather file", "", _CONVERT),
        (rb"Obj\x01", "an Avro file", "", _CONVERT),
        (rb"ORC", "an ORC file", "", _CONVERT),
        (rb"SEQ[\x04-\x06]", "a Hadoop sequence file", "", _CONVERT),
        (rb"SQLite format 3\0", "an SQLite database", "", _CONVERT),
        (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", "", _CONVERT),
        (rb"\x93NUMPY", "a NumPy array", "", _CONVERT),
        (rb"\x80[\x02-\x05][}\]c\x95]", "a Python pickle", "", _CONVERT),
        (rb"%PDF-\d", "a PDF", "", _EXTRACT),
        (rb"%!PS-", "PostScript", "", _EXTRACT),
        (rb"\{\\rtf\d", "an RTF document", "", _EXTRACT),
        (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old office document", "", _EXTRACT),
        (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*", "an image", "", "take it out"),
        (rb"\x7fELF|MZ.{56}|\xca\xfe\xba\xbe", "a program", "", "take it out"),
    )
]
# These letters can begin a text: a binary file has such bytes behind them, and a text has not.
_PLAIN_SIGNATURES = ("an ORC file", "Parquet", "a Feather file", "a program", "an image")
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a]")
_MARKUP = [
    (re.compile(rb"(\[\s*)?\{\s*\"(?:[^\"\\\n]|\\.){0,200}\"\s*:"), "JSON", "jsonl"),
    (re.compile(rb"<\?xml\s", re.IGNORECASE), "XML", ""),
    (re.compile(rb"<!doctype html|<html[\s>]", re.IGNORECASE), "HTML", ""),
    (re.compile(rb"WARC/\d"), "WARC, a web archive", ""),
]


def suffixes(name: str, stated: str = "") -> tuple[str, str]:
    """Return format and compression of a file in lower case, such as (".jsonl", ".gz").

    Args:
        name: of the file.
        stated: what ``--format`` says; "" leaves it to the name. An archive stays one by its name,
            and a compression too, unless another is stated.
    """
    base, last = os.path.splitext(name.lower())
    compression = ""
    if last in _SHORT:
        last, compression = _SHORT[last]
    elif last in COMPRESSIONS:
        compression = COMPRESSIONS[last]
        last = os.path.splitext(base)[1]
    if not stated:
        return last, compression
    stated_format, stated_compression = suffixes(f"stated.{stated}")
    if last in ARCHIVES and stated_format not in ARCHIVES:
        return last, compression
    return stated_format, stated_compression or compression


def format_argument(text: str) -> str:
    """Check the value of ``--format``, such as ``jsonl`` or ``text.gz``."""
    name, _, compression = text.lower().lstrip(".").partition(".")
    if name not in FORMATS or (compression and f".{compression}" not in COMPRESSIONS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(FORMATS)}; a compression may follow, as in jsonl.gz"
        )
    return f"{name}.{compression}" if compression else name


def kind(format_suffix: str) -> str:
    """Return ``records``, ``text`` (every format without a name) or, where it is open, ``other``.

    Archives may hold either. Arrow files are refused when they are opened, with better advice.
    """
    if format_suffix in (*ARCHIVES, ".arrow"):
        return "other"
    return "records" if format_suffix in RECORDS else "text"


def is_hidden(path: str) -> bool:
    """Tell whether a path inside a folder or archive is left out: hidden, or bookkeeping."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return hidden or parts[-1:] == [] or parts[-1] in BOOKKEEPING


def check_one_kind(name: str, paths: list[str], formats: list[str]) -> None:
    """Refuse text among records, or records among text, in one directory, glob or archive."""
    of_kind: dict[str, list[str]] = {"records": [], "text": [], "other": []}
    for path, format_suffix in zip(paths, formats, strict=True):
        of_kind[kind(format_suffix)].append(path)
    records = of_kind["records"]
    text = of_kind["text"]
    if not records or not text:
        return
    if len(text) <= len(records):
        odd, other = f"{text[0]} is text by its name", f"{len(records):,} are records"
    else:
        odd, other = f"{records[0]} has records by its name", f"{len(text):,} are text"
    raise UserError(
        f"{name} has files of two kinds: {odd}, and {other}; give the right ones by a quoted glob, "
        "as '*.parquet', or say by --format what all of them are"
    )


def check_stored(path: str, head: bytes, compression: str) -> None:
    """Refuse a compressed file that is of another kind than its name says."""
    found = _signature(head)
    if found and found[1] != compression:
        raise UserError(_refusal(path, *found))


def check_text(path: str, head: bytes, format_suffix: str, stated: str) -> None:
    """Refuse binary files and, unless the format is stated, structured ones read as text.

    Args:
        head: the first bytes of the text, decompressed.
        format_suffix: how the file is read.
        stated: what ``--format`` says.
    """
    found = _signature(head)
    if found:
        raise UserError(_refusal(path, *found))
    if stated or kind(format_suffix) != "text":
        return
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, name, flag in _MARKUP:
        if pattern.match(start):
            raise UserError(_structured(path, name, flag))
    if start.startswith(b"[") and _is_json_list(start.split(b"\n")[0]):
        raise UserError(_structured(path, "JSON", "jsonl"))


def _signature(head: bytes) -> tuple[str, str, str] | None:
    for pattern, name, suffix, advice in _SIGNATURES:
        if pattern.match(head):
            if name in _PLAIN_SIGNATURES and not _CONTROL.search(head):
                continue
            return name, suffix, advice
    return None


def _refusal(path: str, name: str, suffix: str, advice: str) -> str:
    return f"{path} is {name}: {advice.format(suffix, suffix.removeprefix('.'))}"


def _structured(path: str, name: str, flag: str) -> str:
    right = f"give --format {flag} if it has a record a line" if flag else _EXTRACT
    return f"{path} begins like {name}: {right}, or --format text to read it as it stands"


def _is_json_list(line: bytes) -> bool:
    """Tell whether a line is a JSON array; [1] may be a note in prose."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and len(found) > 1
