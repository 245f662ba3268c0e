"""Read the files in tar and zip archives one after the other, without unpacking them."""

import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from kantai.errors import UserError
from kantai.preprocessing.files import MIB, File, Member
from kantai.preprocessing.formats import ARCHIVES, check_one_kind, is_hidden, kind
from kantai.preprocessing.opening import open_file, seekable

_Entry = tuple[str, int, BinaryIO]  # name, size, content


def members(file: File) -> Iterator[Member]:
    """Yield the files in an archive, in its order; hidden ones and links are left out.

    A member can be read until the next one is asked for.

    Raises:
        UserError: the archive is damaged, cut off, encrypted or no archive, or holds an archive, or
            text beside records.
    """
    format_suffix, compression = file.suffixes
    entries = _zip_entries if format_suffix == ".zip" else _tar_entries
    stated = "" if file.format.split(".")[0] in ("tar", "zip") else file.format
    first: Member | None = None
    try:
        with open_file(file) as content:
            for name, size, opened in entries(content):
                path = f"{file.path}/{name}"
                member = Member(path, size, file.version, stated, content=opened)
                if member.suffixes[0] in ARCHIVES:
                    raise UserError(f"{path} is an archive in an archive: unpack {file.path} first")
                if size:
                    first = first or member
                    if kind(first.suffixes[0]) != kind(member.suffixes[0]):
                        both = [first, member]
                        check_one_kind(
                            file.path,
                            [one.path for one in both],
                            [one.suffixes[0] for one in both],
                        )
                yield member
    except UserError:
        raise
    except Exception as error:  # each library, decompressor and network raises its own
        name = (format_suffix + compression).removeprefix(".")
        raise UserError(
            f"{file.path} is not a readable {name} archive, "
            f"it is damaged, cut off, encrypted or of another kind: {error}"
        ) from None


class _TarInfo(tarfile.TarInfo):
    """Refuses a header that would fill the memory: tarfile reads it whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        is_header = self.type in (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
        )
        if is_header and self.size > MIB:
            raise tarfile.ReadError("it has a header longer than 1 MiB")
        return super()._proc_member(archive)  # type: ignore[misc] # made to be overridden


def _tar_entries(content: BinaryIO) -> Iterator[_Entry]:
    with tarfile.open(fileobj=content, mode="r|", tarinfo=_TarInfo, errors="replace") as archive:
        while True:
            info = archive.next()
            if info is None:
                break
            vars(archive)["members"].clear()  # which would grow with the archive
            opened = archive.extractfile(info) if info.isreg() else None
            if opened and not is_hidden(info.name):
                yield info.name, info.size, cast(BinaryIO, opened)
        _check_end(archive)


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse an archive without its end, or with more behind it.

    tarfile takes a cut between two members, a damaged header and the beginning of a second archive
    for the end.
    """
    stream: Any = archive.fileobj
    if stream.tell() != archive.offset + tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end is missing")
    while True:
        rest = stream.read(MIB)
        if not rest:
            return
        if rest.strip(b"\0"):
            raise tarfile.ReadError(
                f"a header is damaged, or a second archive begins, after byte {archive.offset}"
            )


def _zip_entries(content: BinaryIO) -> Iterator[_Entry]:
    with seekable(content) as stored, zipfile.ZipFile(stored) as archive:
        for info in archive.infolist():
            if not info.is_dir() and not is_hidden(info.filename):
                with archive.open(info) as opened:
                    yield info.filename, info.file_size, cast(BinaryIO, opened)
