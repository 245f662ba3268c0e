"""Tests that training is deterministic and makes frequent words entries."""

import filecmp
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from kantai.data.tokenizer import load_tokenizer, save_tokenizer
from kantai.errors import UserError
from kantai.preprocessing.documents import Unit, documents, pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.tokenizer_training import coverage, train_tokenizer
from tests.helpers.commands import run_program


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
