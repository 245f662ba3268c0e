"""Tests that training is deterministic and makes frequent words entries."""

import contextlib
import filecmp
import json
import os
import pty
import random
import re
import subprocess
import sys
import termios
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from kantai.data.tokenizer import load_tokenizer, save_tokenizer
from kantai.data.words import Words
from kantai.errors import UserError
from kantai.preprocessing.documents import Unit, documents, pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.tokenizer_training import LongWords, coverage, train_tokenizer
from tests.helpers.commands import ENVIRONMENT, ROOT, run_program, script


def read(path: Path, unit: Unit) -> Iterator[str]:
    return (
        text for piece in pieces(find_files([str(path)]), unit) for text in documents(piece, unit)
    )


# The five words have 22 joints between letters. Each joint becomes an entry after the 261 special
# tokens and bytes.
FREQUENT = ["The Critique of Pure Reason. Critique of Reason, of Pure Reason."] * 20
# The tutorial's corpus and its vocabulary size, where KANTAI_CORPUS names the file.
KANT = (
    [(read(Path(os.environ["KANTAI_CORPUS"]), "line"), 11_565)]
    if "KANTAI_CORPUS" in os.environ
    else []
)


def test_training_is_deterministic(tmp_path: Path, tokenizer_dir: Path, corpus_file: Path) -> None:
    save_tokenizer(train_tokenizer(read(corpus_file, "paragraph"), 1000, 2), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert filecmp.cmpfiles(tmp_path, tokenizer_dir, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize(("texts", "entries"), [(FREQUENT, 261 + 22), *KANT])
def test_frequent_words_become_one_token(texts: Iterable[str], entries: int) -> None:
    tokenizer = train_tokenizer(texts, 52_000, 2)
    assert tokenizer.get_vocab_size() == entries
    assert (
        tokenizer.encode("The Critique of Pure Reason.").tokens
        == "<s> The ĠCritique Ġof ĠPure ĠReason . </s>".split()
    )


def test_small_corpus_yields_smaller_vocabulary() -> None:
    # The vocabulary has all bytes, including those that the corpus lacks.
    assert train_tokenizer(["abab"], 52_000, 2).get_vocab_size() == 262
    assert train_tokenizer(["abab"], 52_000, 3).get_vocab_size() == 261


@pytest.mark.parametrize(("vocab_size", "min_frequency"), [(260, 2), (0, 2), (-1, 2), (1000, 0)])
def test_impossible_vocabulary_settings_are_refused(vocab_size: int, min_frequency: int) -> None:
    with pytest.raises(
        UserError, match=r"--vocab_size .* is too small|--min_frequency 0 must be at least 1"
    ):
        train_tokenizer(["text"], vocab_size, min_frequency)


def test_coverage_counts_words_bytes_and_entries(tokenizer_dir: Path) -> None:
    vocabulary = load_tokenizer(tokenizer_dir)
    seen = coverage(vocabulary, ["return the object", "return 純"])
    tokens = vocabulary.encode(["return the object", "return 純"])[1].sum()
    assert seen["bytes"] == 27
    assert seen["bytes_per_token"] == 27 / tokens
    assert seen["words_per_token"] == 5 / tokens
    assert seen["one_token_words"] == 4 / 5
    assert seen["byte_tokens"] == 3 / tokens
    assert 3 < seen["used_entries"] * (vocabulary.size - 5) <= tokens
    assert coverage(vocabulary, [])["bytes"] == 0


def test_thread_count_does_not_change_tokenizer(tmp_path: Path, corpus_file: Path) -> None:
    text = corpus_file.read_text(encoding="utf-8")
    (tmp_path / "corpus.txt").write_text(
        "".join(f"{text}part {number}\n" for number in range(8)), encoding="utf-8"
    )
    numbers = ["--vocab_size=1000", "--sample_bytes=1e6", f"--input={tmp_path / 'corpus.txt'}"]
    for parallel in ("true", "false"):
        command = [
            sys.executable,
            "scripts/train_tokenizer.py",
            *numbers,
            f"--output={tmp_path / parallel}",
        ]
        done = run_program(command, TOKENIZERS_PARALLELISM=parallel)
        assert "trained on 1,0" in done.stdout
    names = ["merges.txt", "tokenizer.json", "vocab.json", "report.json"]
    assert filecmp.cmpfiles(tmp_path / "true", tmp_path / "false", names, shallow=False) == (
        names,
        [],
        [],
    )
    report = json.loads((tmp_path / "true" / "report.json").read_text(encoding="utf-8"))
    assert report["sample_bytes"] < 1.1e6 < report["corpus_bytes"]
    assert report["coverage"]["one_token_words"] > 0.5


def dna(letters: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=letters))


@pytest.mark.parametrize(
    "long",
    [
        dna(200_000),
        " " * 200_000 + "a",
        "=" * 150_000 + "-" * 50_000,
        "".join(random.Random(1).choices("0123456789", k=200_000)),
        "".join(random.Random(2).choices("純粋理性批判の", k=200_000)),
    ],
)
def test_long_word_takes_no_square_of_its_length(long: str) -> None:
    found = LongWords()
    start = time.process_time()
    tokenizer = train_tokenizer([f"{FREQUENT[0]} {long}", *FREQUENT], 2000, 2, long_words=found)
    assert time.process_time() - start < 10  # it took 45 s, and four times as much for 400,000
    assert found.count >= 1
    assert found.longest >= 50_000
    (note,) = found.notes()
    assert (
        f"{found.count} words have more than 1,000 characters (the longest {found.longest:,})"
        in note
    )
    assert "ĠCritique" in tokenizer.encode(FREQUENT[0]).tokens


def test_words_of_a_thousand_letters_are_left_whole() -> None:
    texts = [f"{dna(1000, seed)} {dna(999, seed + 50)}" for seed in range(20)] + FREQUENT
    found = LongWords()
    tokenizer = train_tokenizer(texts, 1000, 2, long_words=found)
    assert (found.count, list(found.notes())) == (0, [])
    pieces = [piece for text in texts for piece in (text[:1000], text[1000:])]
    assert tokenizer.to_str() == train_tokenizer(pieces[:40] + FREQUENT, 1000, 2).to_str()


def test_error_of_a_reader_ends_training() -> None:
    def broken() -> Iterator[str]:
        yield "text"
        raise UserError("the 2nd text is broken")

    with pytest.raises(UserError, match="the 2nd text is broken"):
        train_tokenizer(broken(), 1000, 2)


OWN = ["<url>", "[speaker 1]", "\u20ac\u20ac"]


def test_own_special_token_is_one_token_wherever_a_text_has_it(tmp_path: Path) -> None:
    texts = [*FREQUENT, "see <url>, said [speaker 1] for \u20ac\u20ac5"]
    save_tokenizer(train_tokenizer(texts, 400, 2, special_tokens=OWN), tmp_path)
    vocabulary = load_tokenizer(tmp_path)
    assert [vocabulary.tokenizer.token_to_id(token) for token in OWN] == [5, 6, 7]
    assert vocabulary.special_ids == (0, 1, 2, 3, 4)
    text = "see <url>,<url> said [speaker 1]: \u20ac\u20ac7 <mask> </s>"
    ids = vocabulary.encode([text])[0].tolist()
    assert [token for token in ids if token < 8] == [5, 5, 6, 7]
    assert vocabulary.tokenizer.decode(ids, skip_special_tokens=False) == text
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    prompt = "see <url> and <mask> [speaker 1]"
    assert theirs(prompt)["input_ids"] == vocabulary.tokenizer.encode(prompt).ids
    words = Words.of(vocabulary.tokenizer, vocabulary.special_ids)
    place = ids.index(6)
    assert words.starts(np.array([ids]))[0, place : place + 2].all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<mask>"], "'<mask>' is an entry already"),
        (["a"], "'a' is an entry already"),
        (["<url>", "<url>"], "'<url>' is an entry already"),
        ([""], "'' must be something"),
        ([" x"], "' x' must be something, and have no white space around it"),
    ],
)
def test_own_special_token_that_cannot_be_is_refused(tokens: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"--special_tokens: {message}"):
        train_tokenizer(["text"], 1000, 2, special_tokens=tokens)


def test_program_trains_own_special_tokens(tmp_path: Path, corpus_file: Path) -> None:
    where = [f"--input={corpus_file}", f"--output={tmp_path / 'tokenizer'}", "--vocab_size=400"]
    done = script("train_tokenizer", *where, "--special_tokens", *OWN)
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(tmp_path / "tokenizer").tokenizer.token_to_id(OWN[2]) == 7
    assert done.stderr == ""  # no bar where nobody looks
    done = script(
        "train_tokenizer", f"--input={corpus_file}", *where[1:], "--special_tokens", "<s>"
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "--special_tokens: '<s>' is an entry already" in done.stderr


def test_terminal_shows_how_long_training_takes(tmp_path: Path) -> None:
    """The library's stages are shown with the time that is left, and then the result alone."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    (tmp_path / "corpus.txt").write_text("\n".join(dna(900, line) for line in range(1000)))
    command = [sys.executable, "scripts/train_tokenizer.py", f"--input={tmp_path / 'corpus.txt'}"]
    process = subprocess.Popen(
        [*command, f"--output={tmp_path / 'tokenizer'}", "--vocab_size=4000"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while block := os.read(screen, 4096):
            shown += block
    printed, _ = process.communicate()
    assert process.returncode == 0, shown
    assert b"the corpus filled 4,000 of 4,000 entries" in printed
    assert re.search(rb"compute merges: .* \d+/4000 \[\d\d:\d\d<\d\d:\d\d", shown), shown
    assert b"reading: " in shown
    assert b'"stage"' not in shown
    assert b"Pre-processing" not in shown
    os.close(screen)


def test_word_with_vowel_signs_is_one_word(tmp_path: Path) -> None:
    text = "\u0915\u093f\u0924\u093e\u092c \u0939\u0948"  # two words of Hindi
    save_tokenizer(train_tokenizer([text] * 9, 400, 2), tmp_path)
    seen = coverage(load_tokenizer(tmp_path), [text])
    assert seen["one_token_words"] == 0  # GPT-2's pattern cuts at the vowel signs
    assert seen["words_per_token"] == 2 / load_tokenizer(tmp_path).encode([text])[1].sum()
