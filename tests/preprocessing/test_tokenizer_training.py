"""The same text gives the same tokenizer, and its words become entries."""

import filecmp
import json
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from kantai.data.tokenizer import load_tokenizer, save_tokenizer
from kantai.errors import UserError
from kantai.preprocessing.documents import Unit, documents, pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.tokenizer_training import LongWords, coverage, train_tokenizer
from tests.helpers.commands import run_program


def read(path: Path, unit: Unit) -> Iterator[str]:
    return (
        text for piece in pieces(find_files([str(path)]), unit) for text in documents(piece, unit)
    )


# The five words have 22 joints between letters, each of which becomes an entry beside the specials
# and bytes.
FREQUENT = ["The Critique of Pure Reason. Critique of Reason, of Pure Reason."] * 20
# The tutorial's own text and what training on it gave, where KANTAI_CORPUS names the file.
KANT = (
    [(read(Path(os.environ["KANTAI_CORPUS"]), "line"), 11_565)]
    if "KANTAI_CORPUS" in os.environ
    else []
)


def test_two_trainings_give_the_same_files(
    tmp_path: Path, tokenizer_dir: Path, corpus_file: Path
) -> None:
    save_tokenizer(train_tokenizer(read(corpus_file, "paragraph"), 1000, 2), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert filecmp.cmpfiles(tmp_path, tokenizer_dir, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize(("texts", "entries"), [(FREQUENT, 261 + 22), *KANT])
def test_words_of_the_corpus_become_one_token_each(texts: Iterable[str], entries: int) -> None:
    tokenizer = train_tokenizer(texts, 52_000, 2)
    assert tokenizer.get_vocab_size() == entries
    assert (
        tokenizer.encode("The Critique of Pure Reason.").tokens
        == "<s> The ĠCritique Ġof ĠPure ĠReason . </s>".split()
    )


def test_small_corpus_fills_fewer_entries_than_allowed() -> None:
    assert (
        train_tokenizer(["abab"], 52_000, 2).get_vocab_size() == 262
    )  # and every byte is there, seen or not
    assert train_tokenizer(["abab"], 52_000, 3).get_vocab_size() == 261


@pytest.mark.parametrize(("vocab_size", "min_frequency"), [(260, 2), (0, 2), (-1, 2), (1000, 0)])
def test_numbers_that_cannot_be_are_refused(vocab_size: int, min_frequency: int) -> None:
    with pytest.raises(
        UserError, match=r"--vocab_size .* is too small|--min_frequency 0 must be at least 1"
    ):
        train_tokenizer(["text"], vocab_size, min_frequency)


def test_coverage(tokenizer_dir: Path) -> None:
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


def test_processes_train_the_same_tokenizer_on_any_number_of_threads(
    tmp_path: Path, corpus_file: Path
) -> None:
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
    assert [note.split(" characters")[0] for note in found.notes()] == [
        f"{found.count} words of more than 1,000"
    ]
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
