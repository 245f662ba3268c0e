"""Tests that remote files arrive whole or not at all, once a node.

The tests cover bad networks, parallel and killed processes, and full caches.
"""

import hashlib
import http.server
import json
import mmap
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from kantai.data.dataset import shard_cache
from kantai.errors import UserError
from kantai.storage.remote_cache import Cache, RemoteFile, private_folder
from tests.helpers.commands import MAX_SECONDS, ROOT, Program, run_program, wait_until

PLENTY = 1 << 30
SIZE = 200_000
FAULTS = ("500", "503", "cut", "short", "wrong", "stall", "hang up")
CHILD = """
import json, multiprocessing, sys, time
from pathlib import Path
from kantai.storage.remote_cache import Cache, RemoteFile
url, folder, files = json.loads(sys.argv[1])
files = [RemoteFile(*file) for file in files]
cache = Cache(url, Path(folder), 1 << 30, backoff_seconds=0.01)
def read(file):
    with cache.open(file) as opened:
        assert len(opened.read()) == file.size
"""


class Server(http.server.ThreadingHTTPServer):
    """Serves ``contents`` with the faults that ``fault`` returns, and counts requests by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/set"
        self.contents: dict[str, bytes] = {}
        self.fault: Callable[[], str] = lambda: ""
        self.asked: Counter[str] = Counter()
        self.pause_seconds = 0.06  # before each eighth of a slow answer
        self.held = threading.Event()
        self.closing = threading.Event()

    def add(self, name: str, size: int = SIZE) -> RemoteFile:
        self.contents[f"/set/{name}"] = content = random.Random(name).randbytes(size)
        return RemoteFile(name, size, hashlib.sha256(content).hexdigest())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up: tests make them do so."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        fault = self.server.fault()
        content = self.server.contents.get(self.path)
        if fault.isdigit() or content is None:
            self._answer(int(fault or 404), b"no")
        elif fault == "wrong":
            self._answer(200, bytes([content[0] ^ 1]) + content[1:])
        elif fault == "short":
            self._answer(200, content[:-1])
        elif fault == "slow":  # slow, but never stalled
            self._answer(200, content, sent=0)
            for start in range(0, len(content), len(content) // 8):
                time.sleep(self.server.pause_seconds)
                self.wfile.write(content[start : start + len(content) // 8])
        elif fault == "hold":
            self._answer(200, content, sent=len(content) // 2)
            self.server.held.wait(MAX_SECONDS)
            self.wfile.write(content[len(content) // 2 :])
        elif fault == "hang up":
            self.close_connection = True
        else:
            self._answer(200, content, sent=len(content) // 2 if fault else None)
            if fault == "stall":
                self.server.closing.wait(3600)
            self.close_connection = bool(fault)

    do_HEAD = do_GET

    def _answer(self, status: int, content: bytes, sent: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


@pytest.fixture(scope="module")
def s3() -> Iterator[s3fs.S3FileSystem]:
    """Start an S3 server; drivers find it by environment variables, as users set them."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        file_system = s3fs.S3FileSystem(skip_instance_cache=True)
        file_system.mkdir("bucket")
        yield file_system
    moto.stop()


def cache_of(url: str, folder: Path, limit_bytes: int = PLENTY, **settings: Any) -> Cache:
    return Cache(
        url,
        folder,
        limit_bytes,
        **{"backoff_seconds": 0.001, "stall_seconds": MAX_SECONDS} | settings,
    )


def content_of(cache: Cache, file: RemoteFile) -> bytes:
    with cache.open(file) as opened:
        return opened.read()


def arrives(cache: Cache, file: RemoteFile) -> bool:
    return hashlib.sha256(content_of(cache, file)).hexdigest() == file.sha256


def whole_files(folder: Path) -> set[str]:
    """Return the hashes of the whole files in a cache."""
    return {path.name for path in folder.glob("*/*") if len(path.name) == 64}


def partials(folder: Path) -> list[Path]:
    return list(folder.glob("*/*.partial"))


def wait_until_idle(before: set[threading.Thread]) -> None:
    """Wait until the cache's threads that are not in ``before`` have ended."""
    wait_until(
        lambda: (
            not [
                thread
                for thread in set(threading.enumerate()) - before
                if thread.name in ("prefetch", "transfer")
            ]
        )
    )


def start_child(
    code: str, url: str, folder: Path, files: list[RemoteFile], launcher: Sequence[str] = ()
) -> Program:
    job = json.dumps([url, str(folder), [[file.name, file.size, file.sha256] for file in files]])
    of_s3 = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return Program(
        [*launcher, sys.executable, "-c", CHILD + code, job], PYTHONPATH=str(ROOT), **of_s3
    )


def assert_ends_well(program: Program) -> None:
    assert program.wait_for_end() == 0, program.report()


@pytest.mark.parametrize("scheme", ["memory", "file", "http", "s3"])
def test_remote_files_are_fetched_once(
    scheme: str, tmp_path: Path, server: Server, s3: s3fs.S3FileSystem
) -> None:
    url = {
        "memory": "memory://set/",
        "file": f"file://{tmp_path}/set",
        "http": server.url,
        "s3": "s3://bucket/set",
    }[scheme]
    file = server.add("part/train-00000.arrow")
    content = server.contents[f"/set/{file.name}"]
    (tmp_path / "set" / "part").mkdir(parents=True)
    file_system, root = fsspec.core.url_to_fs(url)
    if scheme != "http":
        file_system.pipe_file(f"{root}/{file.name}", content)

    cache = cache_of(url, tmp_path / "cache")
    assert content_of(cache, file) == cache.read_small(file.name) == content

    del server.contents[f"/set/{file.name}"]
    if scheme != "http":
        file_system.rm_file(f"{root}/{file.name}")
    for again in (cache, cache_of(url.rstrip("/"), tmp_path / "cache")):
        assert content_of(again, file) == content
    with pytest.raises(
        UserError,
        match=r"cannot read .*set/part/train-00000\.arrow: FileNotFoundError: .* \(try 1 of 6\)",
    ):
        cache.read_small(file.name)


def test_s3_object_written_in_parts_arrives_whole(
    tmp_path: Path, s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs requests the parts of a large object in parallel and writes them out of order."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"default_block_size": 100_000})
    content = random.Random(1).randbytes(1_000_001)
    s3.pipe_file("bucket/large", content)
    file = RemoteFile("large", len(content), hashlib.sha256(content).hexdigest())
    assert content_of(cache_of("s3://bucket", tmp_path), file) == content


def test_files_arrive_whole_over_bad_network(tmp_path: Path, server: Server) -> None:
    files = [server.add(f"{number}.arrow") for number in range(16)]
    answers = [*FAULTS * 2, *[""] * 14]
    random.Random(7).shuffle(answers)
    server.fault = lambda: answers.pop() if answers else ""
    cache = cache_of(server.url, tmp_path, tries=12, stall_seconds=1.0)
    assert all(arrives(cache, file) for file in files)
    assert not answers
    assert whole_files(tmp_path) == {file.sha256 for file in files} and not partials(tmp_path)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "500"),
        ("503", "503"),
        ("429", "429"),
        ("cut", "ContentLengthError|ClientPayloadError"),
        ("short", f"{SIZE - 1} bytes arrived, not {SIZE}"),
        ("wrong", "what arrived fails its checksum"),
        ("stall", "imeout"),
    ],
)
def test_failing_file_is_named_after_all_tries(
    tmp_path: Path, server: Server, fault: str, reason: str
) -> None:
    file = server.add("train-00000.arrow")
    server.fault = lambda: fault
    with pytest.raises(
        UserError,
        match=rf"cannot read {server.url}/{file.name}: .*({reason}).* \(try 3 of 3\); see",
    ) as caught:
        cache_of(
            server.url, tmp_path, tries=3, **{"stall_seconds": 0.5} if fault == "stall" else {}
        ).open(file)
    assert "\n" not in str(caught.value)
    assert server.asked == {f"/set/{file.name}": 3}
    assert not whole_files(tmp_path) and not partials(tmp_path)


@pytest.mark.parametrize(
    ("status", "reason"), [("404", "FileNotFoundError"), ("403", "403"), ("401", "401")]
)
def test_missing_or_forbidden_file_is_not_retried(
    tmp_path: Path, server: Server, status: str, reason: str
) -> None:
    file = server.add("train-00000.arrow")
    server.fault = lambda: status
    for read in (lambda cache: cache.open(file), lambda cache: cache.read_small(file.name)):
        server.asked.clear()
        with pytest.raises(UserError, match=rf"{reason}.* \(try 1 of 6\)"):
            read(cache_of(server.url, tmp_path))
        assert server.asked.total() == 1


def test_forbidden_s3_object_is_not_retried(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server.fault = lambda: "403"
    with pytest.raises(UserError, match=r"PermissionError.* \(try 1 of 6\)"):
        cache_of("s3://bucket", tmp_path).open(RemoteFile("a", 1, "0" * 64))


def test_stalled_transfer_is_abandoned(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The S3 driver's read timeout is an hour here."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 3600}})
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    file = server.add("bucket/a")
    server.fault = lambda: "stall" if server.asked.total() == 1 else ""
    background = set(threading.enumerate())
    cache = cache_of("s3://bucket", tmp_path, stall_seconds=2.0)
    assert arrives(cache, RemoteFile("a", file.size, file.sha256))
    assert server.asked["/set/bucket/a"] >= 2
    server.closing.set()  # the abandoned transfer continues and does no damage
    wait_until_idle(background)
    assert whole_files(tmp_path) == {file.sha256} and arrives(
        cache, RemoteFile("a", file.size, file.sha256)
    )


class Slow(fsspec.AbstractFileSystem):
    """Sends a file in eight parts, each in half of the time that a transfer may stall.

    Only this class advances the cache's clock, and it sends a part after the cache has looked at
    the part before. The test does not depend on the load of the machine.
    """

    protocol = "slow"
    cachable = False
    stall_seconds = 0.04  # the cache looks four times in this time
    content = random.Random(2).randbytes(SIZE)
    now = 0.0
    looked = threading.Event()
    transfers = 0

    @classmethod
    def monotonic(cls) -> float:
        cls.looked.set()
        return cls.now

    def get_file(self, rpath: str, lpath: str, **_: object) -> None:
        type(self).transfers += 1
        with open(lpath, "wb", buffering=0) as file:
            for start in range(0, SIZE, SIZE // 8):
                type(self).now += self.stall_seconds / 2
                file.write(self.content[start : start + SIZE // 8])
                for _ in range(2):  # the first look may precede the write
                    self.looked.clear()
                    assert self.looked.wait(MAX_SECONDS)


def test_slow_transfer_is_not_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transfer takes longer than it may stall, and never stalls."""
    fsspec.register_implementation("slow", Slow, clobber=True)
    monkeypatch.setattr(
        "kantai.storage.remote_cache.time",
        SimpleNamespace(monotonic=Slow.monotonic, time_ns=time.time_ns, sleep=time.sleep),
    )
    file = RemoteFile("a", SIZE, hashlib.sha256(Slow.content).hexdigest())
    assert arrives(cache_of("slow://bucket", tmp_path, stall_seconds=Slow.stall_seconds), file)
    assert Slow.now == pytest.approx(4 * Slow.stall_seconds) and Slow.transfers == 1


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "/a",
        "a/../../b",
        "a//b",
        "a\\b",
        "",
        ".",
        "http://elsewhere/a",
        "a?b",
        "%2e%2e/a",
        "a\n",
    ],
)
def test_unsafe_file_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no plain path below it"):
        RemoteFile(name, 1, "0" * 64)


@pytest.mark.parametrize(
    ("size", "sha256"), [(-1, "0" * 64), (1, "../" * 21 + "0"), (1, "0" * 63), (1, "")]
)
def test_invalid_size_or_hash_is_refused(size: int, sha256: str) -> None:
    with pytest.raises(UserError, match="no file has"):
        RemoteFile("a", size, sha256)


@pytest.mark.parametrize(
    ("url", "missing"),
    [
        ("gs://bucket/set", "gcsfs .*\\(with pip install\\)"),
        ("nothing://set", "no kind that fsspec reads"),
    ],
)
def test_missing_driver_is_named(tmp_path: Path, url: str, missing: str) -> None:
    with pytest.raises(UserError, match=f"cannot read {url}: .*{missing}"):
        Cache(url, tmp_path, PLENTY)


def test_processes_fetch_each_file_once(tmp_path: Path, server: Server) -> None:
    files = [server.add(f"{number}.arrow") for number in range(3)]
    (tmp_path / "ready").mkdir()
    code = f"""
import os
ready = Path({str(tmp_path / "ready")!r})
(ready / str(os.getpid())).touch()
while len(list(ready.iterdir())) < 4:
    time.sleep(0.001)
for file in files:
    read(file)
"""
    server.fault = lambda: "slow"
    for process in [start_child(code, server.url, tmp_path / "cache", files) for _ in range(4)]:
        assert_ends_well(process)
    assert server.asked == {f"/set/{file.name}": 1 for file in files}


def test_threads_fetch_each_file_once(tmp_path: Path, server: Server) -> None:
    file = server.add("a")
    server.fault = lambda: "slow"
    cache = cache_of(server.url, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: arrives(cache, file), range(4)))
    assert server.asked == {"/set/a": 1}


def test_next_download_removes_killed_partial_file(tmp_path: Path, server: Server) -> None:
    file = server.add("a")
    other = server.add("b")
    server.fault = lambda: "stall" if server.asked.total() == 1 else ""
    program = start_child("read(files[0])", server.url, tmp_path, [file])
    wait_until(lambda: [path for path in partials(tmp_path) if path.stat().st_size > 0], program)
    program.kill_all()
    assert len(partials(tmp_path)) == 1 and not whole_files(tmp_path)
    cache = cache_of(server.url, tmp_path)
    assert arrives(cache, other)
    assert not partials(tmp_path)
    assert arrives(cache, file)


def test_running_download_is_left_alone(tmp_path: Path, server: Server) -> None:
    slow = server.add("slow")
    other = server.add("other")
    server.fault = lambda: "hold" if server.asked.total() == 1 else ""
    program = start_child("read(files[0])", server.url, tmp_path, [slow])
    wait_until(lambda: partials(tmp_path), program)
    assert arrives(cache_of(server.url, tmp_path), other)
    assert len(partials(tmp_path)) == 1
    server.held.set()
    assert_ends_well(program)
    assert whole_files(tmp_path) == {slow.sha256, other.sha256}
    assert server.asked == {"/set/slow": 1, "/set/other": 1}


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_forked_children_and_parent_keep_reading(
    scheme: str, tmp_path: Path, server: Server, s3: s3fs.S3FileSystem
) -> None:
    """A DataLoader forks its workers while the parent prefetches."""
    files = [server.add(f"{number}") for number in range(12)]
    url = {"http": server.url, "s3": "s3://bucket/fork"}[scheme]
    for file in files if scheme == "s3" else []:
        s3.pipe_file(f"bucket/fork/{file.name}", server.contents[f"/set/{file.name}"])
    code = """
read(files[0])
cache.prefetch(files[:4])
def work(some):
    cache.prefetch(some)
    for file in some:
        read(file)
fork = multiprocessing.get_context("fork")
workers = [fork.Process(target=work, args=(files[start:9:2],)) for start in (1, 2)]
for worker in workers:
    worker.start()
for file in files[8:11]:
    read(file)
for worker in workers:
    worker.join()
    assert worker.exitcode == 0, worker.exitcode
read(files[11])
"""
    assert_ends_well(start_child(code, url, tmp_path, files))
    assert whole_files(tmp_path) == {file.sha256 for file in files}
    if scheme == "http":
        assert server.asked == {f"/set/{file.name}": 1 for file in files}


def test_lock_is_freed_despite_forked_child(tmp_path: Path, server: Server) -> None:
    file = server.add("a")
    server.fault = lambda: "hold"
    code = f"""
cache.prefetch(files)
while not list(Path(folder).glob("*/*.partial")):
    time.sleep(0.001)
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=({MAX_SECONDS},))
worker.start()
Path({str(tmp_path / "forked")!r}).touch()
read(files[0])  # waits for the prefetching thread, which is of this process only
worker.kill()
"""
    program = start_child(code, server.url, tmp_path / "cache", [file])
    wait_until((tmp_path / "forked").exists, program)
    server.held.set()
    assert_ends_well(program)


def test_least_recently_used_files_are_evicted(tmp_path: Path, server: Server) -> None:
    files = [server.add(str(number)) for number in range(6)]
    hashes = [file.sha256 for file in files]
    (tmp_path / "mine").mkdir()
    others = [tmp_path / "mine" / ("0" * 64), tmp_path / "notes.txt"]
    for other in others:
        other.write_bytes(bytes(2 * SIZE))
        os.utime(other, (0, 0))
    cache = cache_of(server.url, tmp_path, 3 * SIZE)
    for used, left in [
        (0, {0}),
        (1, {0, 1}),
        (2, {0, 1, 2}),
        (0, {0, 1, 2}),
        (3, {0, 2, 3}),
        (4, {0, 3, 4}),
        (3, {0, 3, 4}),
        (5, {3, 4, 5}),
    ]:
        assert arrives(cache, files[used])
        assert whole_files(tmp_path) - {"0" * 64} == {hashes[number] for number in left}
    second = cache_of(f"{server.url}/", tmp_path, 3 * SIZE)
    third = cache_of(server.url.replace("127.0.0.1", "localhost"), tmp_path, 3 * SIZE)
    assert arrives(second, files[4]) and arrives(third, files[4])  # the two URLs share one limit
    assert len([path for path in tmp_path.glob("*/*") if path.stat().st_size == SIZE]) == 3
    assert all(other.exists() for other in others)


def test_mapped_file_outlives_eviction(tmp_path: Path, server: Server) -> None:
    first = server.add("1")
    second = server.add("2")
    cache = cache_of(server.url, tmp_path, SIZE)
    with cache.open(first) as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    assert arrives(cache, second)
    assert whole_files(tmp_path) == {second.sha256}
    assert mapped[:] == server.contents["/set/1"]
    mapped.close()


def test_file_above_limit_is_refused(tmp_path: Path, server: Server) -> None:
    with pytest.raises(
        UserError, match=rf"/a has {SIZE} bytes, and the cache may hold {SIZE - 1}: raise its limit"
    ):
        cache_of(server.url, tmp_path, SIZE - 1).open(server.add("a"))
    assert not server.asked


def test_truncated_file_is_fetched_again(tmp_path: Path, server: Server) -> None:
    file = server.add("a")
    cache = cache_of(server.url, tmp_path)
    assert arrives(cache, file)
    os.truncate(next(tmp_path.glob(f"*/{file.sha256}")), SIZE // 2)
    assert arrives(cache, file)


def test_versions_of_a_file_are_not_mixed(tmp_path: Path, server: Server) -> None:
    cache = cache_of(server.url, tmp_path)
    old = server.add("a")
    assert arrives(cache, old)
    content = server.contents["/set/a"] = bytes(SIZE)
    new = RemoteFile("a", SIZE, hashlib.sha256(content).hexdigest())
    assert content_of(cache, new) == content
    assert arrives(cache, old)


def test_full_disk_evicts_old_files(tmp_path: Path, server: Server) -> None:
    """The child mounts a disk that holds three and a half files."""
    files = [server.add(str(number)) for number in range(5)]
    large = server.add("large", 5 * SIZE)
    code = f"""
import subprocess
from kantai.errors import UserError
size = "size={3 * SIZE + SIZE // 2}"
subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
cache = Cache(url, Path(folder), 1 << 30, backoff_seconds=0.01)
*files, large = files
for file in files:
    read(file)
held = {{path.name for path in Path(folder).glob("*/*") if not path.suffix}}
assert held == {{file.sha256 for file in files[2:]}}
try:
    read(large)
except UserError as error:
    assert str(error).startswith(f"no space left on {{folder}} for {{large.size}} bytes"), error
else:
    raise AssertionError
assert not list(Path(folder).glob("*/*.partial"))
"""
    own_mounts = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    assert_ends_well(start_child(code, server.url, tmp_path, [*files, large], own_mounts))


def test_prefetched_files_are_not_fetched_again(tmp_path: Path, server: Server) -> None:
    files = [server.add(str(number)) for number in range(4)]
    cache = cache_of(server.url, tmp_path)
    cache.prefetch(files)
    wait_until(lambda: len(whole_files(tmp_path)) == 4)
    assert list(server.asked) == [f"/set/{number}" for number in range(4)]  # in this order
    assert all(arrives(cache, file) for file in files)
    assert server.asked.total() == 4


def test_prefetching_skips_failing_files(tmp_path: Path, server: Server) -> None:
    files = [server.add(str(number)) for number in range(4)]
    del server.contents["/set/1"]
    cache = cache_of(server.url, tmp_path)
    cache.prefetch(files)
    wait_until(lambda: files[3].sha256 in whole_files(tmp_path))
    assert whole_files(tmp_path) == {files[number].sha256 for number in (0, 2, 3)}
    with pytest.raises(UserError, match="/1: FileNotFoundError"):
        cache.open(files[1])


def test_prefetching_evicts_only_unneeded_files(tmp_path: Path, server: Server) -> None:
    old, needed, *wanted = (server.add(str(number)) for number in range(7))
    cache = cache_of(server.url, tmp_path, 4 * SIZE)
    for file in (needed, old, wanted[0]):
        assert arrives(cache, file)
    server.fault = lambda: "hold"
    # Four files fit: the needed one, the cached one and two more.
    cache.prefetch([needed, *wanted])
    wait_until(lambda: server.asked["/set/3"])
    assert arrives(cache_of(server.url, tmp_path, 4 * SIZE), wanted[0])
    server.held.set()
    wait_until(lambda: wanted[2].sha256 in whole_files(tmp_path))
    assert whole_files(tmp_path) == {file.sha256 for file in (needed, *wanted[:3])}
    cache.prefetch([old, needed, *wanted[:2]])  # the oldest file is unneeded now
    wait_until(lambda: old.sha256 in whole_files(tmp_path))
    assert whole_files(tmp_path) == {file.sha256 for file in (old, needed, *wanted[:2])}


def test_prefetching_keeps_files_in_use(tmp_path: Path, server: Server) -> None:
    background = set(threading.enumerate())
    used, *wanted = (server.add(str(number)) for number in range(3))
    cache = cache_of(server.url, tmp_path, 2 * SIZE)
    assert arrives(cache, used)
    server.fault = lambda: "hold"
    cache.prefetch(wanted)
    wait_until(lambda: server.asked["/set/1"])
    # Another cache of the folder reads the file after the call.
    assert arrives(cache_of(server.url, tmp_path, 2 * SIZE), used)
    server.held.set()
    wait_until_idle(background)
    assert whole_files(tmp_path) == {used.sha256, wanted[0].sha256}
    assert not server.asked["/set/2"]


def test_prefetching_prefers_files_needed_first(tmp_path: Path, server: Server) -> None:
    files = [server.add(str(number)) for number in range(4)]
    cache = cache_of(server.url, tmp_path, 2 * SIZE)
    assert arrives(cache, files[2]) and arrives(cache, files[3])
    cache.prefetch(files)
    wait_until(lambda: files[1].sha256 in whole_files(tmp_path))
    assert whole_files(tmp_path) == {files[0].sha256, files[1].sha256}


@pytest.mark.parametrize("end", ["stop", "prefetch"])
def test_newer_prefetch_replaces_older(tmp_path: Path, server: Server, end: str) -> None:
    background = set(threading.enumerate())
    files = [server.add(str(number)) for number in range(3)]
    server.fault = lambda: "hold"
    cache = cache_of(server.url, tmp_path)
    cache.prefetch(files[:2])
    wait_until(lambda: server.asked["/set/0"])
    if end == "stop":
        cache.stop_prefetching()
        server.held.set()
        wait_until(lambda: files[0].sha256 in whole_files(tmp_path))
    else:
        cache.prefetch(files[2:])
        server.held.set()
        wait_until(lambda: {files[0].sha256, files[2].sha256} <= whole_files(tmp_path))
    wait_until_idle(background)
    assert not server.asked["/set/1"]


@pytest.mark.parametrize("by", ["same cache", "other cache"])
def test_kept_file_of_same_size_is_hashed_when_first_opened(
    by: str, tmp_path: Path, server: Server
) -> None:
    """The disk lost a bit, or another user of the folder changed the file."""
    file = server.add("a")
    writer = cache_of(server.url, tmp_path)
    writer.open(file).close()
    reader = writer if by == "same cache" else cache_of(server.url, tmp_path)
    kept = next(tmp_path.glob(f"*/{file.sha256}"))
    content = kept.read_bytes()
    changed = kept.with_name("changed")
    changed.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    changed.rename(kept)
    assert arrives(reader, file)
    assert kept.read_bytes() == content and server.asked.total() == 2
    assert arrives(reader, file) and server.asked.total() == 2


def test_link_in_place_of_kept_file_is_not_followed(tmp_path: Path, server: Server) -> None:
    file = server.add("a")
    cache = cache_of(server.url, tmp_path / "cache")
    cache.open(file).close()
    kept = next((tmp_path / "cache").glob(f"*/{file.sha256}"))
    elsewhere = kept.rename(tmp_path / "elsewhere")
    before = elsewhere.stat()
    kept.symlink_to(elsewhere)
    assert arrives(cache_of(server.url, tmp_path / "cache"), file)
    assert not kept.is_symlink() and elsewhere.stat().st_mtime_ns == before.st_mtime_ns
    assert server.asked.total() == 2


def test_private_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "job" / "kantai-0")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)  # as an earlier release made it
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("made", ["link", "dangling link", "file", "other user"])
def test_folder_that_another_user_made_first_is_refused(made: str, tmp_path: Path) -> None:
    folder = tmp_path / "kantai-0"
    if made == "other user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        folder.mkdir()
        os.chown(folder, 12345, 12345)
    elif made == "file":
        folder.touch()
    else:
        folder.symlink_to(tmp_path if made == "link" else tmp_path / "nothing")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="is a link, or belongs to another user"):
        private_folder(folder)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("variable", ["SLURM_TMPDIR", "TMPDIR"])
def test_default_cache_is_private(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    shard_cache("memory://set")
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link, or belongs to another user"):
        shard_cache("memory://set")


@pytest.mark.slow
@pytest.mark.parametrize("made", ["nothing", "own", "link", "other user"])
def test_scratch_folder_of_job_is_private(made: str, tmp_path: Path) -> None:
    """The launcher of slurm/launch.sh, outside SLURM."""
    scratch = tmp_path / "kantai-1"
    if made == "own":
        scratch.mkdir(mode=0o755)
    elif made == "link":
        (tmp_path / "elsewhere").mkdir()
        scratch.symlink_to(tmp_path / "elsewhere")
    elif made == "other user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        scratch.mkdir()
        os.chown(scratch, 12345, 12345)
    printing = tmp_path / "tempdir.py"
    printing.write_text("import os; print(os.environ['TMPDIR'])")
    done = run_program(
        ["bash", "slurm/launch.sh", "configs/accelerate/cpu.yaml", printing],
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        LOCAL_SCRATCH=str(tmp_path),
        ATTEMPT_LOGS=str(tmp_path),
        SLURM_JOB_ID="1",
        SLURM_NNODES="1",
        SLURM_NODEID="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29876",
    )
    if made in ("nothing", "own"):
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "rank-00000.log").read_text() == f"{scratch}\n"
        assert scratch.stat().st_mode & 0o777 == 0o700
    else:
        assert done.returncode == 2 and "belongs to another user" in done.stderr
        assert not list(tmp_path.glob("elsewhere/*"))
