"""No secret and no escape sequence leaves the process."""

import json
import time
from pathlib import Path

import fsspec
import pytest

from kantai.config.loading import load_config, save_config
from kantai.errors import UserError
from kantai.output import REDACTED, plain, redact, redact_all
from kantai.preprocessing.documents import pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.job import Job
from kantai.preprocessing.merge import merge
from kantai.preprocessing.tokenize import tokenize
from kantai.storage.atomic import read_manifest, staged
from tests.helpers.commands import CONFIG, run_python, script
from tests.helpers.files import file_contents


@pytest.mark.parametrize(
    "text",
    [
        "https://kant:hunter2@host/set",
        "https://kant:hun@ter2@host/set",
        "https://hunter2@host/set",
        "ftp://kant:hunter2@host:21/a.txt and s3://key:hunter2@bucket/x",
        "http://host/a?download=1&token=hunter2",
        "http://host/a?access_token=hunter2#x",
        "https://b.s3.amazonaws.com/a?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2",
        "https://b.s3.amazonaws.com/a?AWSAccessKeyId=hunter2&Signature=hunter2&Expires=9",
        "https://a.blob.core.windows.net/c/a?sv=2024&sig=hunter2",
        "https://storage.googleapis.com/b/a?X-Goog-Signature=hunter2",
        "{'key': 'x', 'secret': 'hunter2'} {\"password\": \"hunter2\"}",
        "S3FileSystem(secret=hunter2, aws_secret_access_key='hunter2')",
        "headers={'Authorization': 'Bearer hunter2'}",
        "Authorization: token hunter2",
        "s3://AKIA123:hunter2/def+x@bucket/k",
        "https://kant:hun#ter2@host/x and https://kant:hun?ter2@host/y",
        "https://host/x#sig=hunter2",
    ],
)
def test_secret_is_redacted(text: str) -> None:
    found = redact(text)
    assert "hunter2" not in found and "ter2" not in found
    assert REDACTED in found
    assert redact(found) == found


@pytest.mark.parametrize("secret", ["AKIAIOSFODNN7EXAMPLE", "hf_abcdefghijklmnopqrstuvwxyz"])
def test_key_known_by_its_shape_is_redacted(secret: str) -> None:
    assert redact(f"InvalidAccessKeyId: {secret} is unknown") == (
        f"InvalidAccessKeyId: {REDACTED} is unknown"
    )


@pytest.mark.parametrize(
    "text",
    [
        "/data/a@b:c.txt",
        "s3://bucket/a@b:c.txt",
        "abfs://container@account.dfs.core.windows.net/a.txt",
        "sftp://kant@host/a.txt",
        "hf://datasets/kant/texts@main/a.txt",
        "http://host:8080/a.txt?download=true&author=kant&monkey=1",
        "train: 1,836 documents, 338,772 tokens in 1 shards",
        "the secret: nobody knew the password: it was lost; a basic understanding, token by token",
        "no tokenizer at data/tokenizer: --tokenizer=data/tokenizer",
    ],
)
def test_text_without_secrets_stays(text: str) -> None:
    assert redact(text) == text


def test_escape_sequences_become_plain_and_languages_stay() -> None:
    assert plain("a\x1b[31mred\x9b2J\x07\r\x7f\u202eb\udce9") == (
        r"a\x1b[31mred\x9b2J\x07\r\x7f\u202eb\udce9"
    )
    for text in ("tab\tand\nline", "纯粹 नगर نقد می‌خواهم 👩‍🚀 Käse"):
        assert plain(text) == text


def test_manifest_of_every_kind_is_redacted(tmp_path: Path) -> None:
    source = {"input": ["https://kant:hunter2@host/a.txt"], "share": 0.1}
    with staged(tmp_path / "new", kind="shards", source=source) as folder:
        (folder / "a").write_text("x")
    assert read_manifest(tmp_path / "new")["source"] == redact_all(source)
    assert "hunter2" not in (tmp_path / "new" / "manifest.json").read_text()


def test_recorded_config_is_redacted(tmp_path: Path) -> None:
    config = load_config(CONFIG, ["--data.shards=https://kant:hunter2@host/set"])
    save_config(config, tmp_path / "config.yaml")
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()
    recorded = load_config(tmp_path / "config.yaml")
    assert recorded.data.shards == f"https://kant:{REDACTED}@host/set"


def test_pieces_and_shards_of_a_secret_url_hold_no_secret(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    """A piece that a start with another token made is used."""
    memory = fsspec.filesystem("memory")
    lines = b"".join(b"plain words %d\n" % number for number in range(3000)) + b"K\xe4se\n"
    memory.pipe("/a.txt?token=hunter2", lines)
    try:
        files = find_files(["memory://a.txt?token=hunter2"])
        job = Job(
            pieces(files, "line", 10_000), "line", "text", tokenizer_dir, tmp_path / "new", {}
        )
        tokenize(job, processes=1)
        records = b"".join(path.read_bytes() for path in job.work.glob("*.json"))
        merge(job)
    finally:
        memory.store.clear()
    assert b"tallies" in records
    assert b"hunter2" not in records + b"".join(file_contents(tmp_path / "new").values())


def test_error_and_traceback_are_redacted_and_plain() -> None:
    url = "https://kant:hunter2@host/a"
    begin = "from kantai.errors import UserError, run_command\ndef main(): raise "
    done = run_python(f"{begin}UserError('{url} \\x1b[2J is bad')\nrun_command(main)")
    assert done.stderr == f"error: https://kant:{REDACTED}@host/a \\x1b[2J is bad\n"
    assert done.returncode == 2
    done = run_python(f"{begin}RuntimeError('{url}')\nrun_command(main)")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and REDACTED in done.stderr
    assert "hunter2" not in done.stderr.splitlines()[-1]
    with pytest.raises(UserError, match=f"kant:{REDACTED}@"):
        raise UserError(url)


def test_what_is_printed_is_plain(tmp_path: Path) -> None:
    code = (
        "from kantai.errors import run_command\nrun_command(lambda: print('\\x1b[2J \\udce9 ok'))"
    )
    assert run_python(code).stdout == "\\x1b[2J \\udce9 ok\n"
    name = tmp_path / "a\x1b[31m.txt"
    name.write_bytes(b"fine\n" * 9 + b"K\xe4se und B\xe4r\n" * 9)
    done = script("train_tokenizer", "--input", name, "--output", tmp_path / "new")
    assert done.returncode == 2
    assert "\x1b" not in done.stderr and r"a\x1b[31m.txt" in done.stderr


def test_corpus_with_escape_sequences_is_inspected_plainly(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"\x1b]0;title\x07 {n} \x1b[2J\n" for n in range(400)))
    shards = tmp_path / "shards"
    made = ("--tokenizer", tokenizer_dir, "--output", shards, "--held_out", 0.1)
    assert script("tokenize_corpus", "--input", text, *made).returncode == 0
    where = [f"--data.shards={shards}", f"--data.tokenizer={tokenizer_dir}"]
    done = script("inspect_data", "--config", CONFIG, "--step", 0, *where)
    assert done.returncode == 0, done.stderr
    assert "\\x1b]0;title\\x07" in done.stdout
    assert "\x1b" not in done.stdout and "\x07" not in done.stdout
    assert json.loads((shards / "manifest.json").read_text())["source"]["input"] == [str(text)]


@pytest.mark.parametrize("part", ["a.b-c", "?a&b;", "://x:", "http://a", "secret=", "word ", "_"])
def test_long_text_is_redacted_in_time_that_grows_with_its_length(part: str) -> None:
    start = time.process_time()
    redact(part * 50_000)
    assert time.process_time() - start < 10  # the square of its length took minutes
