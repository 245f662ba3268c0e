"""Tests that inputs are found in a fixed order and cut into pieces that depend on files alone."""

import datetime
import functools
import gzip
import http.server
import json
import lzma
import os
import ssl
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from kantai.errors import UserError
from kantai.preprocessing.documents import documents, pieces
from kantai.preprocessing.files import MIB, File, find_files, hub_dataset
from kantai.preprocessing.opening import open_file
from kantai.preprocessing.spans import cut
from tests.helpers.commands import run_python
from tests.helpers.files import write_file


def texts(*inputs: str) -> list[str]:
    return [text for piece in pieces(find_files(inputs)) for text in documents(piece)]


def test_directory_means_all_files_below_but_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.text", ".hidden.txt", ".git/config", "a/.DS_Store"):
        write_file(tmp_path / "corpus" / name, "x")
    found = find_files([str(tmp_path / "corpus")])
    assert [os.path.relpath(file.path, tmp_path / "corpus") for file in found] == [
        "a/b/c.text",
        "a/z.txt",
        "b.txt",
    ]


def test_glob_searches_matching_directories(
    tmp_path: Path, memory: fsspec.AbstractFileSystem
) -> None:
    names = ["a.txt", "b/c.txt", "b/d/e.txt", "b-/x.txt", "f/g.txt"]
    for name in (*names, "b/.hidden/x.txt", ".git/config"):
        write_file(tmp_path / name, "x")
        memory.pipe(f"/corpus/{name}", b"x")
    for place, found_of in (
        (tmp_path, "*"),
        (tmp_path, "**"),
        (tmp_path, "**/*"),
        (tmp_path, "[abf]*"),
    ):
        assert [
            os.path.relpath(file.path, place) for file in find_files([f"{place}/{found_of}"])
        ] == sorted(names, key=lambda n: n.split("/"))
    for pattern in ("*", "**", "**/*"):
        found = [
            file.path.removeprefix("memory:///corpus/").removeprefix("memory://corpus/")
            for file in find_files([f"memory://corpus/{pattern}"])
        ]
        assert found == sorted(names, key=lambda name: name.split("/"))


def test_linked_directories_are_searched_once(tmp_path: Path) -> None:
    write_file(tmp_path / "elsewhere" / "deep" / "a.txt", "x")
    write_file(tmp_path / "corpus" / "b.txt", "x")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "twice").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "deep" / "circle").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "z.txt").symlink_to("b.txt")
    for name in (str(tmp_path / "corpus"), str(tmp_path / "corpus" / "*")):
        assert [os.path.relpath(file.path, tmp_path / "corpus") for file in find_files([name])] == [
            "b.txt",
            "linked/deep/a.txt",
        ]


@pytest.mark.parametrize(
    "given", ["corpus", "corpus/*", "corpus/sub", "corpus/sub/part*.txt", "corpus/sub/part-1.txt"]
)
@pytest.mark.parametrize("target", ["/mnt/gone/part-1.txt", "part-1.txt"])
def test_broken_link_is_an_error(tmp_path: Path, given: str, target: str) -> None:
    write_file(tmp_path / "corpus" / "sub" / "part-0.txt", "x")
    (tmp_path / "corpus" / "sub" / "part-1.txt").symlink_to(target)
    with pytest.raises(
        UserError,
        match=(
            rf"corpus/sub/part-1\.txt is a link to {target}, "
            r"which cannot be read: .*; mend or remove it"
        ),
    ):
        find_files([str(tmp_path / given)])


def test_directory_below_hidden_parent_is_searched(tmp_path: Path) -> None:
    path = write_file(tmp_path / ".cache" / "corpus" / "a.txt", "x")
    assert [file.path for file in find_files([str(path.parent)])] == [str(path)]


def test_glob_matches_are_sorted_and_unique(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/er/d.txt"):
        write_file(tmp_path / name, "x")
    inputs = [
        str(tmp_path / "c.md"),
        str(tmp_path / "**" / "*.txt"),
        str(tmp_path / "a.txt"),
        f"{tmp_path}/./",
        str(tmp_path),
    ]
    assert [Path(file.path).name for file in find_files(inputs)] == [
        "c.md",
        "a.txt",
        "b.txt",
        "d.txt",
    ]


def test_existing_path_wins_over_glob(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a[1].txt", "x")
    assert [file.path for file in find_files([str(path)])] == [str(path)]


@pytest.mark.parametrize("missing", ["nothing.txt", "*.txt", "empty_folder"])
def test_input_without_files_is_an_error(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UserError, match="no input at") as error:
        find_files([str(tmp_path / missing)])
    assert missing in str(error.value)


def test_empty_files_are_kept_unless_all_are_empty(tmp_path: Path) -> None:
    write_file(tmp_path / "void.txt", "")
    with pytest.raises(UserError, match=r"void\.txt is empty"):
        find_files([str(tmp_path)])
    write_file(tmp_path / "zero.txt", "")
    with pytest.raises(UserError, match=r"every one of 2 files is empty, .*void\.txt the first"):
        find_files([str(tmp_path)])
    write_file(tmp_path / "full.txt", "x")
    assert [file.size for file in find_files([str(tmp_path)])] == [1, 0, 0]


def test_file_version_changes_with_modification_time(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.jsonl", '{"text": "x"}\n')
    inputs = [[str(path)], [f"hub:{tmp_path}"]]
    before = [find_files(names)[0].version for names in inputs]
    assert [find_files(names)[0].version for names in inputs] == before
    os.utime(path, ns=(0, 12345))
    hub_dataset.cache_clear()  # another process has an empty cache
    after = [find_files(names)[0].version for names in inputs]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_local_files_import_no_remote_libraries(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt", "x")
    code = (
        "import sys, kantai.preprocessing.files as f; "
        f"file, = f.find_files([{str(path)!r}]); "
        "print({'fsspec', 'datasets', 'pyarrow'} & sys.modules.keys())"
    )
    assert run_python(code).stdout == "set()\n"


# --- remote files


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_remote_files_directories_and_globs_are_read(memory: fsspec.AbstractFileSystem) -> None:
    compressed = {
        "c.txt.gz": gzip.compress,
        "d.txt.xz": lzma.compress,
        "e.txt.zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    }
    memory.pipe(
        {
            "/corpus/b/a.txt": b"one\n",
            "/corpus/a.text": b"two\n",
            "/corpus/.hidden/x.txt": b"x\n",
        }
    )
    for name, compress in compressed.items():
        memory.pipe(f"/corpus/{name}", compress(f"{name}\n".encode() * 3))
    everything = ["two", "one", *(name for name in compressed for _ in range(3))]
    assert texts("memory://corpus") == everything
    assert texts("memory://corpus/**/*.txt") == texts("memory://corpus/b/a.txt") == ["one"]
    assert texts("memory://corpus/c*", "memory://corpus/c.txt.gz") == ["c.txt.gz"] * 3
    with pytest.raises(UserError, match="no input at memory://other"):
        find_files(["memory://other"])


def test_remote_files_are_cut_into_pieces(memory: fsspec.AbstractFileSystem) -> None:
    lines = [f"line {number}" for number in range(5000)]
    memory.pipe("/a.txt", "\n".join(lines).encode())
    with memory.open("/b.parquet", "wb") as file:
        pq.write_table(pa.table({"text": lines}), file, row_group_size=100)
    cut_files = pieces(find_files(["memory://a.txt", "memory://b.parquet"]), piece_bytes=7000)
    assert len(cut_files) > 10
    assert [text for piece in cut_files for text in documents(piece)] == lines * 2


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """A server that sends whole files only, as Python's own does."""

    def log_message(self, *arguments: object) -> None:
        pass


class ByteRanges(WholeFiles):
    """A server that sends requested byte ranges."""

    def do_GET(self) -> None:
        if "Range" not in self.headers:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        start, stop = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = content[start : stop + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)
        type(self).parts_sent += 1
        return None

    parts_sent = 0


@pytest.fixture(params=[WholeFiles, ByteRanges])
def web(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(request.param, directory=str(tmp_path / "web"))
    )
    # A reader hangs up when it has enough.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
    assert request.param is WholeFiles or ByteRanges.parts_sent


def test_http_files_are_read(tmp_path: Path, web: str) -> None:
    lines = [f"line {number} of a file too long for one block" for number in range(200_000)]
    write_file(tmp_path / "web" / "a.txt", "\n".join(lines))
    write_file(tmp_path / "web" / "b.jsonl.gz", gzip.compress(b'{"text": "compressed"}\n'))
    inputs = [f"{web}/a.txt", f"{web}/b.jsonl.gz?download=true"]
    assert [
        text
        for piece in pieces(find_files(inputs), piece_bytes=4 * MIB)
        for text in documents(piece)
    ] == [*lines, "compressed"]
    with pytest.raises(UserError, match="no input at http"):
        find_files([f"{web}/nothing.txt"])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/a.txt", "pip install gcsfs"),
        ("abfs://bucket/a.txt", "pip install adlfs"),
        ("nosuch://a.txt", "Protocol not known: nosuch"),
        ("NOBODY/a.txt", "cannot be reached: nothing listens there"),
        ("hub:./nothing_here", "hub:./nothing_here cannot be opened"),
    ],
)
def test_unreachable_input_error_names_the_cause(url: str, message: str, closed_url: str) -> None:
    with pytest.raises(UserError, match=message):
        find_files([url.replace("NOBODY", closed_url)])


# --- data sets


def test_hub_dataset_is_streamed_by_shard(tmp_path: Path) -> None:
    for number in range(3):
        rows = "".join(
            json.dumps({"text": f"{number} {row}", "id": row}) + "\n" for row in range(4)
        )
        write_file(tmp_path / "lines" / f"train-{number}.jsonl", rows)
    write_file(tmp_path / "lines" / "test-0.jsonl", '{"text": "test"}\n{"text": null}\n')
    (file,) = find_files([f"hub:{tmp_path / 'lines'}"])
    assert file.size == len(pieces([file])) == 3
    assert (
        texts(file.path)
        == texts(f"{file.path}:default:train")
        == [f"{number} {row}" for number in range(3) for row in range(4)]
    )
    assert texts(f"{file.path}:default:test") == ["test"]
    (tmp_path / "tables").mkdir()
    pq.write_table(
        pa.table({"text": pa.array([b"a\xff", *[b"b"] * 100], pa.binary()).view(pa.string())}),
        tmp_path / "tables" / "a.parquet",
    )
    assert texts(f"hub:{tmp_path / 'tables'}") == ["a\ufffd", *["b"] * 100]
    for wrong, message in ((":default:validation", "Bad split"), (":english", "cannot be opened")):
        with pytest.raises(UserError, match=message):
            find_files([file.path + wrong])
    with pytest.raises(UserError, match="shard 0 record 1 has no text in its field 'body'"):
        list(documents(pieces([file])[0], text_field="body"))


# --- pieces

sizes = st.lists(
    st.tuples(st.integers(0, 300), st.sampled_from([".txt", ".txt.gz", ".csv", ".jsonl"])),
    max_size=12,
)


@given(sizes, st.integers(1, 150))
def test_pieces_cover_every_byte_once_in_order(
    files: list[tuple[int, str]], piece_bytes: int
) -> None:
    found = [File(f"{number}{suffix}", size, "") for number, (size, suffix) in enumerate(files)]
    cut_files = cut(
        found,
        splittable=lambda file: file.suffixes in ((".txt", ""), (".jsonl", "")),
        piece_bytes=piece_bytes,
    )
    position = [(file.path, 0) for file in found]
    for span in (span for piece in cut_files for span in piece):
        assert position.pop(0) == (span.file.path, span.start)
        if span.stop < span.file.size:
            assert span.file.suffixes[0] in (".txt", ".jsonl")
            assert not span.file.suffixes[1]
            position.insert(0, (span.file.path, span.stop))
    assert not position
    for piece in cut_files:
        text = sum((span.stop - span.start) * (4 if span.file.suffixes[1] else 1) for span in piece)
        assert piece
        assert text <= piece_bytes or len(piece) == 1


def test_small_files_share_pieces() -> None:
    found = [File(f"{number}.txt", 10_000, "") for number in range(100_000)]
    cut_files = cut(found, splittable=lambda _: True)
    assert 60 < len(cut_files) < 70
    assert len(cut([File("a.txt", 10**12, "")], splittable=lambda _: True)) == -(
        -(10**12) // (128 * MIB)
    )


def test_file_opens_at_byte_offset(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/a.txt", b"0123456789")
    for name in (str(write_file(tmp_path / "a.txt", "0123456789")), "memory://a.txt"):
        with open_file(find_files([name])[0], 4) as content:
            assert content.read() == b"456789"


def test_file_of_several_spellings_is_read_once_by_its_first_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_file(tmp_path / "a" / "one.txt", "x\n")
    (tmp_path / "link.txt").symlink_to(path)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    spellings = [
        "a/one.txt",
        str(path),
        "a/../a/one.txt",
        "./a/one.txt",
        "link.txt",
        "linked/one.txt",
        "a",
        "*/*.txt",
        f"file://{path}",
        f"local://{path}",
    ]
    assert texts(*spellings) == ["x"]
    for name in spellings[:6]:
        assert [file.path for file in find_files([name, *spellings])] == [str(Path(name))]
    write_file(tmp_path / "b" / "one.txt", "x\n")
    assert texts("a/one.txt", "b/one.txt") == ["x", "x"]  # equal text is not the same file


def test_url_of_several_spellings_is_read_once(tmp_path: Path, web: str) -> None:
    lines = [f"line {number} of a file too long for one block" for number in range(100_000)]
    write_file(tmp_path / "web" / "a b.txt", "\n".join(lines))
    spellings = [
        f"{web}/a%20b.txt",
        f"{web}/a b.txt",
        f"{web}/c/../a%20b.txt",
        f"{web.replace('http', 'HTTP')}/%61%20b.txt",
        f"{web}/a%20b.txt#top",
    ]
    cut_files = pieces(find_files(spellings), piece_bytes=MIB)
    assert [text for piece in cut_files for text in documents(piece)] == lines
    assert len(find_files([f"{web}/a%20b.txt", f"{web}/a%20b.txt?version=2"])) == 2


def test_data_set_of_several_spellings_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "set" / "a.jsonl", '{"text": "x"}\n')
    monkeypatch.chdir(tmp_path)
    spellings = ["hub:./set", f"hub:{tmp_path}/set", "hub:./set:default", "hub:./set:default:train"]
    assert texts(*spellings) == ["x"]


class Refusing(WholeFiles):
    """A server that answers with the status that the path names, or not at all."""

    def do_GET(self) -> None:
        name = self.path.strip("/").partition(".")[0]
        if name == "silent":
            threading.Event().wait(3)
        elif name != "hangup":
            self.send_error(int(name))

    do_HEAD = do_GET


@pytest.fixture
def refusing() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("401.txt", "cannot be reached: it asks for a password or token"),
        ("403.txt", "cannot be reached: access is denied"),
        ("404.txt", "no input at"),
        ("410.txt", "no input at"),
        ("429.txt", "cannot be reached: the server asks to be asked less often"),
        ("500.txt", r"cannot be reached: the server fails \(500\): try again later"),
        ("503.txt", r"cannot be reached: the server fails \(503\)"),
        ("silent.txt", "cannot be reached: no answer within 0.5 seconds"),
        ("hangup.txt", "cannot be reached: .*[Dd]isconnected"),
    ],
)
def test_answer_of_a_server_is_said_in_words(
    name: str, message: str, refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kantai.storage.network.STALL_SECONDS", 0.5)
    with pytest.raises(UserError, match=f"{refusing}/{name} {message}|{message} {refusing}/{name}"):
        find_files([f"{refusing}/{name}"])


def test_unknown_host_and_http_without_tls_are_said_in_words(refusing: str) -> None:
    with pytest.raises(UserError, match="no such host is known"):
        find_files(["http://no-such-host.invalid/a.txt"])
    with pytest.raises(UserError, match=r"TLS fails .* http:// and not https://"):
        find_files([f"{refusing.replace('http', 'https')}/200.txt"])


def test_certificate_that_nobody_signed_is_named(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = write_file(tmp_path / "chain.pem", secret + certificate.public_bytes(Encoding.PEM))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.raises(UserError, match="its certificate is not trusted: self-signed"):
            find_files([f"https://127.0.0.1:{server.server_port}/200.txt"])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_http_server_without_parts_sends_archives_and_parquet(tmp_path: Path, web: str) -> None:
    lines = [f"line {number}" for number in range(20_000)]
    folder = tmp_path / "web"
    write_file(folder / "b.txt", "\n".join(lines))
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(folder / "b.txt", "b.txt")
    with tarfile.open(folder / "a.tar.gz", "w:gz") as archive_of_tar:
        archive_of_tar.add(folder / "b.txt", "b.txt")
    pq.write_table(pa.table({"text": lines}), folder / "a.parquet", row_group_size=5000)
    for name in ("a.zip", "a.tar.gz", "a.parquet"):
        assert texts(f"{web}/{name}") == lines, name


def test_pipe_is_refused(tmp_path: Path) -> None:
    """``--input <(zcat text)`` was read as an empty file, and in a folder left out in silence."""
    write_file(tmp_path / "a.txt", "x")
    os.mkfifo(tmp_path / "b.txt")
    for name in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(UserError, match=r"b\.txt is a pipe or a device"):
            find_files([str(name)])
