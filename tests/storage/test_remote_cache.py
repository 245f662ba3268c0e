"""Remote files arrive whole or not at all, once a node, whatever the network, the processes and the
folder's size do to them.
"""

import hashlib
import http.server
import json
import mmap
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from kantai.errors import UserError
from kantai.storage.remote_cache import Cache, RemoteFile
from tests.helpers.commands import MAX_SECONDS, ROOT, Program, wait_until

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
    """Serves what is in ``contents``, as badly as ``fault`` says, and counts what it is asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/set"
        self.contents: dict[str, bytes] = {}
        self.fault: Callable[[], str] = lambda: ""
        self.asked: Counter[str] = Counter()
        self.pause_seconds = 0.06  # of a slow answer, eight times
        self.held = threading.Event()
        self.closing = threading.Event()

    def add(self, name: str, size: int = SIZE) -> RemoteFile:
        self.contents[f"/set/{name}"] = content = random.Random(name).randbytes(size)
        return RemoteFile(name, size, hashlib.sha256(content).hexdigest())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what is tested."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        fault, content = self.server.fault(), self.server.contents.get(self.path)
        if fault.isdigit() or content is None:
            self._answer(int(fault or 404), b"no")
        elif fault == "wrong":
            self._answer(200, bytes([content[0] ^ 1]) + content[1:])
        elif fault == "short":
            self._answer(200, content[:-1])
        elif fault == "slow":  # but never still
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
    """An S3 server that drivers find as users let them find theirs: by the environment."""
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


def kept(folder: Path) -> set[str]:
    """Hashes of the whole files in a cache."""
    return {path.name for path in folder.glob("*/*") if len(path.name) == 64}


def partials(folder: Path) -> list[Path]:
    return list(folder.glob("*/*.partial"))


def until_idle(before: set[threading.Thread]) -> None:
    """Return when no thread that a cache has started since is at work."""
    wait_until(
        lambda: (
            not [
                thread
                for thread in set(threading.enumerate()) - before
                if thread.name in ("prefetch", "transfer")
            ]
        )
    )


def child(
    code: str, url: str, folder: Path, files: list[RemoteFile], launcher: Sequence[str] = ()
) -> Program:
    job = json.dumps([url, str(folder), [[file.name, file.size, file.sha256] for file in files]])
    of_s3 = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return Program(
        [*launcher, sys.executable, "-c", CHILD + code, job], PYTHONPATH=str(ROOT), **of_s3
    )


def ended_well(program: Program) -> None:
    assert program.wait_for_end() == 0, program.report()


@pytest.mark.parametrize("scheme", ["memory", "file", "http", "s3"])
def test_files_of_any_url_are_fetched_once(
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


def test_a_large_object_written_in_parts_arrives(
    tmp_path: Path, s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a size, s3fs asks for parts of an object at the same time and writes them out of order."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"default_block_size": 100_000})
    content = random.Random(1).randbytes(1_000_001)
    s3.pipe_file("bucket/large", content)
    file = RemoteFile("large", len(content), hashlib.sha256(content).hexdigest())
    assert content_of(cache_of("s3://bucket", tmp_path), file) == content


def test_everything_arrives_whole_from_a_bad_network(tmp_path: Path, server: Server) -> None:
    files = [server.add(f"{number}.arrow") for number in range(16)]
    answers = [*FAULTS * 2, *[""] * 14]
    random.Random(7).shuffle(answers)
    server.fault = lambda: answers.pop() if answers else ""
    cache = cache_of(server.url, tmp_path, tries=12, stall_seconds=1.0)
    assert all(arrives(cache, file) for file in files)
    assert not answers
    assert kept(tmp_path) == {file.sha256 for file in files} and not partials(tmp_path)


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
def test_what_never_arrives_is_named_after_all_tries(
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
    assert not kept(tmp_path) and not partials(tmp_path)


@pytest.mark.parametrize(
    ("status", "reason"), [("404", "FileNotFoundError"), ("403", "403"), ("401", "401")]
)
def test_what_is_not_there_or_not_for_us_is_asked_for_once(
    tmp_path: Path, server: Server, status: str, reason: str
) -> None:
    file = server.add("train-00000.arrow")
    server.fault = lambda: status
    for read in (lambda cache: cache.open(file), lambda cache: cache.read_small(file.name)):
        server.asked.clear()
        with pytest.raises(UserError, match=rf"{reason}.* \(try 1 of 6\)"):
            read(cache_of(server.url, tmp_path))
        assert server.asked.total() == 1


def test_no_right_to_an_object_is_told_from_a_passing_failure(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server.fault = lambda: "403"
    with pytest.raises(UserError, match=r"PermissionError.* \(try 1 of 6\)"):
        cache_of("s3://bucket", tmp_path).open(RemoteFile("a", 1, "0" * 64))


def test_a_transfer_that_its_driver_never_ends_is_given_up(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here S3's driver waits for an hour."""
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
    server.closing.set()  # what was given up goes on, and ruins nothing
    until_idle(background)
    assert kept(tmp_path) == {file.sha256} and arrives(
        cache, RemoteFile("a", file.size, file.sha256)
    )


class Slow(fsspec.AbstractFileSystem):
    """Brings bytes in pieces. By the clock that the cache looks at, each takes half as long as a
    transfer may stand still.

    Time goes on here alone, and a piece comes when the one before has been seen: nothing depends on
    how busy the machine is.
    """

    protocol = "slow"
    cachable = False
    stall_seconds = 0.04  # a quarter of which the cache waits between two looks
    content = random.Random(2).randbytes(SIZE)
    now, looked, transfers = 0.0, threading.Event(), 0

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
                for _ in range(2):  # the first may have begun before
                    self.looked.clear()
                    assert self.looked.wait(MAX_SECONDS)


def test_a_slow_transfer_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than a transfer may stand still, and never does."""
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
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no plain path below it"):
        RemoteFile(name, 1, "0" * 64)


@pytest.mark.parametrize(
    ("size", "sha256"), [(-1, "0" * 64), (1, "../" * 21 + "0"), (1, "0" * 63), (1, "")]
)
def test_a_hash_that_leads_elsewhere_is_refused(size: int, sha256: str) -> None:
    with pytest.raises(UserError, match="no file has"):
        RemoteFile("a", size, sha256)


@pytest.mark.parametrize(
    ("url", "missing"),
    [
        ("gs://bucket/set", "gcsfs .*\\(with pip install\\)"),
        ("nothing://set", "no kind that fsspec reads"),
    ],
)
def test_a_missing_driver_is_named(tmp_path: Path, url: str, missing: str) -> None:
    with pytest.raises(UserError, match=f"cannot read {url}: .*{missing}"):
        Cache(url, tmp_path, PLENTY)


def test_processes_of_a_node_fetch_a_file_once(tmp_path: Path, server: Server) -> None:
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
    for process in [child(code, server.url, tmp_path / "cache", files) for _ in range(4)]:
        ended_well(process)
    assert server.asked == {f"/set/{file.name}": 1 for file in files}


def test_threads_of_a_process_fetch_a_file_once(tmp_path: Path, server: Server) -> None:
    file = server.add("a")
    server.fault = lambda: "slow"
    cache = cache_of(server.url, tmp_path)
    threads = [threading.Thread(target=arrives, args=(cache, file)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == {"/set/a": 1}


def test_sigkill_in_mid_download_leaves_nothing_that_stays(tmp_path: Path, server: Server) -> None:
    file, other = server.add("a"), server.add("b")
    server.fault = lambda: "stall" if server.asked.total() == 1 else ""
    program = child("read(files[0])", server.url, tmp_path, [file])
    wait_until(lambda: [path for path in partials(tmp_path) if path.stat().st_size > 0], program)
    program.kill_all()
    assert len(partials(tmp_path)) == 1 and not kept(tmp_path)
    cache = cache_of(server.url, tmp_path)
    assert arrives(cache, other)
    assert not partials(tmp_path)
    assert arrives(cache, file)


def test_a_download_under_way_is_left_alone(tmp_path: Path, server: Server) -> None:
    slow, other = server.add("slow"), server.add("other")
    server.fault = lambda: "hold" if server.asked.total() == 1 else ""
    program = child("read(files[0])", server.url, tmp_path, [slow])
    wait_until(lambda: partials(tmp_path), program)
    assert arrives(cache_of(server.url, tmp_path), other)
    assert len(partials(tmp_path)) == 1
    server.held.set()
    ended_well(program)
    assert kept(tmp_path) == {slow.sha256, other.sha256}
    assert server.asked == {"/set/slow": 1, "/set/other": 1}


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_forked_children_and_their_parent_go_on_reading(
    scheme: str, tmp_path: Path, server: Server, s3: s3fs.S3FileSystem
) -> None:
    """As the workers of a DataLoader are forked, in the middle of their parent's prefetching."""
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
workers = [multiprocessing.get_context("fork").Process(target=work, args=(files[1 + start : 9 : 2],)) for start in range(2)]
for worker in workers:
    worker.start()
for file in files[8:11]:
    read(file)
for worker in workers:
    worker.join()
    assert worker.exitcode == 0, worker.exitcode
read(files[11])
"""
    ended_well(child(code, url, tmp_path, files))
    assert kept(tmp_path) == {file.sha256 for file in files}
    if scheme == "http":
        assert server.asked == {f"/set/{file.name}": 1 for file in files}


def test_a_lock_is_freed_though_a_forked_child_has_it_too(tmp_path: Path, server: Server) -> None:
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
    program = child(code, server.url, tmp_path / "cache", [file])
    wait_until((tmp_path / "forked").exists, program)
    server.held.set()
    ended_well(program)


def test_the_least_recently_used_are_evicted_under_the_limit(
    tmp_path: Path, server: Server
) -> None:
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
        assert kept(tmp_path) - {"0" * 64} == {hashes[number] for number in left}
    second = cache_of(f"{server.url}/", tmp_path, 3 * SIZE)
    third = cache_of(server.url.replace("127.0.0.1", "localhost"), tmp_path, 3 * SIZE)
    assert arrives(second, files[4]) and arrives(third, files[4])  # two URLs, one limit
    assert len([path for path in tmp_path.glob("*/*") if path.stat().st_size == SIZE]) == 3
    assert all(other.exists() for other in others)


def test_what_is_mapped_outlives_its_eviction(tmp_path: Path, server: Server) -> None:
    first, second = server.add("1"), server.add("2")
    cache = cache_of(server.url, tmp_path, SIZE)
    with cache.open(first) as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    assert arrives(cache, second)
    assert kept(tmp_path) == {second.sha256}
    assert mapped[:] == server.contents["/set/1"]
    mapped.close()


def test_a_file_larger_than_the_limit_is_refused(tmp_path: Path, server: Server) -> None:
    with pytest.raises(
        UserError, match=rf"/a has {SIZE} bytes, and the cache may hold {SIZE - 1}: raise its limit"
    ):
        cache_of(server.url, tmp_path, SIZE - 1).open(server.add("a"))
    assert not server.asked


def test_a_torn_file_is_fetched_again(tmp_path: Path, server: Server) -> None:
    file = server.add("a")
    cache = cache_of(server.url, tmp_path)
    assert arrives(cache, file)
    os.truncate(next(tmp_path.glob(f"*/{file.sha256}")), SIZE // 2)
    assert arrives(cache, file)


def test_sets_of_different_days_are_not_mixed(tmp_path: Path, server: Server) -> None:
    cache = cache_of(server.url, tmp_path)
    old = server.add("a")
    assert arrives(cache, old)
    content = server.contents["/set/a"] = bytes(SIZE)
    new = RemoteFile("a", SIZE, hashlib.sha256(content).hexdigest())
    assert content_of(cache, new) == content
    assert arrives(cache, old)


def test_a_full_device_gives_up_old_files_before_the_run(tmp_path: Path, server: Server) -> None:
    """A device of three files and a half, which only the child sees."""
    files = [server.add(str(number)) for number in range(5)]
    large = server.add("large", 5 * SIZE)
    code = f"""
import subprocess
from kantai.errors import UserError
subprocess.run(["mount", "-t", "tmpfs", "-o", "size={3 * SIZE + SIZE // 2}", "tmpfs", folder], check=True)
cache = Cache(url, Path(folder), 1 << 30, backoff_seconds=0.01)
*files, large = files
for file in files:
    read(file)
assert {{path.name for path in Path(folder).glob("*/*") if not path.suffix}} == {{file.sha256 for file in files[2:]}}
try:
    read(large)
except UserError as error:
    assert str(error).startswith(f"no space left on {{folder}} for {{large.size}} bytes"), error
else:
    raise AssertionError
assert not list(Path(folder).glob("*/*.partial"))
"""
    mounts_of_its_own = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    ended_well(child(code, server.url, tmp_path, [*files, large], mounts_of_its_own))


def test_what_is_prefetched_need_not_be_waited_for(tmp_path: Path, server: Server) -> None:
    files = [server.add(str(number)) for number in range(4)]
    cache = cache_of(server.url, tmp_path)
    cache.prefetch(files)
    wait_until(lambda: len(kept(tmp_path)) == 4)
    assert list(server.asked) == [f"/set/{number}" for number in range(4)]  # in this order
    assert all(arrives(cache, file) for file in files)
    assert server.asked.total() == 4


def test_prefetching_leaves_out_what_fails(tmp_path: Path, server: Server) -> None:
    files = [server.add(str(number)) for number in range(4)]
    del server.contents["/set/1"]
    cache = cache_of(server.url, tmp_path)
    cache.prefetch(files)
    wait_until(lambda: files[3].sha256 in kept(tmp_path))
    assert kept(tmp_path) == {files[number].sha256 for number in (0, 2, 3)}
    with pytest.raises(UserError, match="/1: FileNotFoundError"):
        cache.open(files[1])


def test_prefetching_evicts_what_is_old_and_nothing_that_is_needed_now(
    tmp_path: Path, server: Server
) -> None:
    old, needed, *wanted = (server.add(str(number)) for number in range(7))
    cache = cache_of(server.url, tmp_path, 4 * SIZE)
    for file in (needed, old, wanted[0]):
        assert arrives(cache, file)
    server.fault = lambda: "hold"
    cache.prefetch(
        [needed, *wanted]
    )  # four of which fit: what is needed, what is there and two more
    wait_until(lambda: server.asked["/set/3"])
    assert arrives(cache_of(server.url, tmp_path, 4 * SIZE), wanted[0])
    server.held.set()
    wait_until(lambda: wanted[2].sha256 in kept(tmp_path))
    assert kept(tmp_path) == {file.sha256 for file in (needed, *wanted[:3])}
    cache.prefetch([old, needed, *wanted[:2]])  # the eldest is now what nobody wants
    wait_until(lambda: old.sha256 in kept(tmp_path))
    assert kept(tmp_path) == {file.sha256 for file in (old, needed, *wanted[:2])}


def test_prefetching_spares_what_others_use(tmp_path: Path, server: Server) -> None:
    background = set(threading.enumerate())
    used, *wanted = (server.add(str(number)) for number in range(3))
    cache = cache_of(server.url, tmp_path, 2 * SIZE)
    assert arrives(cache, used)
    server.fault = lambda: "hold"
    cache.prefetch(wanted)
    wait_until(lambda: server.asked["/set/1"])
    assert arrives(cache_of(server.url, tmp_path, 2 * SIZE), used)  # by another, after the call
    server.held.set()
    until_idle(background)
    assert kept(tmp_path) == {used.sha256, wanted[0].sha256}
    assert not server.asked["/set/2"]


def test_prefetching_prefers_what_is_needed_first(tmp_path: Path, server: Server) -> None:
    files = [server.add(str(number)) for number in range(4)]
    cache = cache_of(server.url, tmp_path, 2 * SIZE)
    assert arrives(cache, files[2]) and arrives(cache, files[3])
    cache.prefetch(files)
    wait_until(lambda: files[1].sha256 in kept(tmp_path))
    assert kept(tmp_path) == {files[0].sha256, files[1].sha256}


@pytest.mark.parametrize("end", ["stop", "prefetch"])
def test_a_newer_wish_replaces_the_older(tmp_path: Path, server: Server, end: str) -> None:
    background = set(threading.enumerate())
    files = [server.add(str(number)) for number in range(3)]
    server.fault = lambda: "hold"
    cache = cache_of(server.url, tmp_path)
    cache.prefetch(files[:2])
    wait_until(lambda: server.asked["/set/0"])
    if end == "stop":
        cache.stop_prefetching()
        server.held.set()
        wait_until(lambda: files[0].sha256 in kept(tmp_path))
    else:
        cache.prefetch(files[2:])
        server.held.set()
        wait_until(lambda: {files[0].sha256, files[2].sha256} <= kept(tmp_path))
    until_idle(background)
    assert not server.asked["/set/1"]
