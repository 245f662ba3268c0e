"""Judge by its bytes whether a file is UTF-8, and name the encoding that it seems to have.

A few stray bytes are repaired and counted; a file of another encoding is refused. Each file is
judged alone, by all of its text: the verdict is the same however the file is cut into pieces, and
whatever the other files hold. A file that is cut is judged when its pieces are put together. The
beginning of a large file is judged before the rest is read, so that hours are not lost.
"""

import codecs
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kantai.errors import UserError
from kantai.output import redact
from kantai.preprocessing.files import HUB, MIB, File, Member
from kantai.preprocessing.opening import open_file

_MAX_SHARE = 0.01  # of the bytes; prose of another encoding than UTF-8 mostly has more
# English or Dutch in CP1252 has less. There, all characters beyond ASCII are spoiled, and there are
# more of them than of stray bytes.
_STRAY_SHARE = 0.0001
_STRAY_CHARACTERS = 10
_LARGE_FILE_BYTES = 4 * MIB
_SAMPLE_BYTES = 1 << 16
_SEARCHED_BYTES = 64 * MIB  # for a sample of spoiled lines
# UTF-32's marks come first, since UTF-16's begins one of them.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Names of Python that iconv does not know.
_ICONV_NAMES = {
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
    "mac-roman": "MACINTOSH",
}
# Windows' encodings that have the same letters as ISO's, and quotation marks and dashes, too.
_OF_WINDOWS = {
    "iso8859-1": "cp1252",
    "iso8859-15": "cp1252",
    "iso8859-7": "cp1253",
    "iso8859-8": "cp1255",
    "iso8859-9": "cp1254",
}


@dataclass
class Tally:
    """What the text of a file, or of a part of it, is made of.

    Attributes:
        size: bytes.
        beyond_ascii: bytes of valid characters beyond ASCII, the first byte of each left out.
        invalid: places that are not UTF-8, or half a surrogate pair.
        nul: NUL characters.
        first: the place of the first defect; "" if there is none.
    """

    size: int = 0
    beyond_ascii: int = 0
    invalid: int = 0
    nul: int = 0
    first: str = ""

    def include(self, following: "Tally") -> None:
        """Include the tally of what was read next."""
        self.size += following.size
        self.beyond_ascii += following.beyond_ascii
        self.invalid += following.invalid
        self.nul += following.nul
        self.first = self.first or following.first

    @property
    def is_foreign(self) -> bool:
        """Whether there are so many defects that the text has another encoding than UTF-8."""
        defects = self.invalid + self.nul
        return defects > _MAX_SHARE * self.size or (
            defects >= _STRAY_CHARACTERS
            and defects > _STRAY_SHARE * self.size
            and self.invalid > self.beyond_ascii
        )


def tally(stored: bytes, text: str) -> Tally:
    """Count the bytes of a text, as they were stored, and the U+FFFD that replaced some of them."""
    found = Tally(len(stored))
    if len(text) == len(stored) and "\ufffd" not in text:
        return found
    nul = stored.count(b"\0")
    replaced = text.count("\ufffd") - stored.count("\ufffd".encode())
    found.nul = nul
    found.invalid = max(0, replaced - nul)
    found.beyond_ascii = len(text.encode()) - len(text) - 2 * replaced  # U+FFFD has three bytes
    return found


def refuse_mark(beginning: bytes, path: str) -> None:
    """Refuse a file that begins with the byte-order mark of another encoding.

    Raises:
        UserError: it does.
    """
    for mark, encoding in _MARKS.items():
        if beginning.startswith(mark):
            raise UserError(
                f"{path} line 1 is not UTF-8, but {encoding} by its byte-order mark: "
                f"{_advice(path, encoding)}"
            )


def refuse_foreign_beginning(file: File) -> None:
    """Refuse a large text file whose first MiB is not UTF-8.

    Whether it is looked at depends on the file alone, and not on how it is cut.

    Raises:
        UserError: the file has another encoding.
    """
    if file.size <= _LARGE_FILE_BYTES or isinstance(file, Member):  # a member is read once
        return
    with open_file(file) as content:
        try:
            stored = content.read(MIB)
        except Exception:  # reading the documents says what is wrong, and where
            return
    refuse_mark(stored, file.path)
    stored = stored[: stored.rfind(b"\n") + 1] or stored[:-4]  # may end within a character
    found = tally(stored, stored.decode(errors="replace").replace("\0", "\ufffd"))
    if found.is_foreign:
        found.first = f"{file.path} in its first MiB"
        refuse_foreign(file, found)


def refuse_foreign(file: File, found: Tally) -> None:
    """Refuse a file whose text has another encoding.

    Raises:
        UserError: it has; the message names the encoding that it seems to have.
    """
    if not found.is_foreign:
        return
    if found.invalid:
        fault = f"is not UTF-8, as {found.invalid:,} characters in {found.size:,} bytes of the file"
    else:
        fault = f"has a NUL byte, as {found.nul:,} of {found.size:,} bytes of the file"
    encoding = _seeming_encoding(_sample(file))
    if encoding:
        raise UserError(
            f"{found.first} {fault}; it seems to be {encoding}: {_advice(file.path, encoding)}"
        )
    raise UserError(
        f"{found.first} {fault}: it is binary, or text of another encoding; find out which, and "
        f"{_advice(file.path, 'ENCODING')}"
    )


def refuse_foreign_files(files: Iterable[File], tallies: Mapping[str, Tally]) -> None:
    """Refuse the first file, if any, whose text has another encoding.

    Args:
        tallies: of files that were read, by redacted path.

    Raises:
        UserError: see :func:`refuse_foreign`.
    """
    for file in files:
        found = tallies.get(redact(file.path))
        if found is not None:
            refuse_foreign(file, found)


def judged(
    texts: Iterable[str], files: Iterable[File], tallies: Mapping[str, Tally]
) -> Iterator[str]:
    """Pass texts on, and refuse files of another encoding after the last text.

    Raises:
        UserError: see :func:`refuse_foreign_files`.
    """
    yield from texts
    refuse_foreign_files(files, tallies)


def _advice(path: str, encoding: str) -> str:
    if path.startswith(HUB) or path.lower().endswith(".parquet"):
        return f"write it again from text that was decoded as {encoding}"
    command = f"iconv -f {encoding} -t UTF-8"
    if "://" in path:
        return f"download it and convert it, as with {command} FILE > NEW"
    if File(path, 0, "").suffixes[1]:
        return f"unpack it and convert it, as with {command} FILE > NEW"
    return f"convert it first, as with {command} {shlex.quote(path)} > NEW"


def _sample(file: File) -> bytes:
    """Return some lines that are not UTF-8, or the beginning of a file that has NULs there."""
    if file.path.startswith(HUB) or isinstance(file, Member) or file.suffixes[0] == ".parquet":
        return b""
    found = b""
    searched = 0
    try:
        with open_file(file) as content:
            while len(found) < _SAMPLE_BYTES and searched < _SEARCHED_BYTES:
                block = content.read(MIB)
                if not block:
                    break
                if b"\0" in block:
                    return block[:_SAMPLE_BYTES]
                if not block.isascii():
                    lines = block.split(b"\n")
                    found += b"".join(line + b"\n" for line in lines if not _is_utf8(line))
                searched += len(block)
    except Exception:  # without a sample, the message names no encoding
        return b""
    return found[:_SAMPLE_BYTES]


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _seeming_encoding(sample: bytes) -> str | None:
    """Return iconv's name of the encoding that a sample seems to have; None if none is likely."""
    import chardet  # imported here: only bad input waits for it

    found = chardet.detect(sample)["encoding"] if sample else None
    if found is None and b"\0" in sample:
        return _kind_of_utf16(sample)
    if found is None:
        return None
    name = codecs.lookup(found).name
    of_windows = _OF_WINDOWS.get(name, name)
    if sample.decode(name, "replace") == sample.decode(of_windows, "replace"):
        name = of_windows  # what follows the sample may have more than ISO's characters
    if name in ("utf-8", "ascii"):
        return None
    return _ICONV_NAMES.get(name, name.upper().replace("_", "-"))


def _kind_of_utf16(sample: bytes) -> str | None:
    """Return the UTF-16 whose line ends and spaces are in a sample of text without Latin letters.

    Its NULs are too few for a detector.
    """
    names = ("UTF-16LE", "UTF-16BE")
    texts = [sample[: len(sample) & ~1].decode(name, errors="replace") for name in names]
    little, big = (text.count("\n") + text.count(" ") - text.count("\ufffd") for text in texts)
    if max(little, big) <= 0 or little == big:
        return None
    return names[0] if little > big else names[1]
