"""Long documents are cut where a reader would cut them, and nothing but white space is lost."""

import json
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from kantai.data.shards import open_shards
from kantai.preprocessing.job import Job
from kantai.preprocessing.long_documents import MAX_CHARACTERS, LongDocuments, cut_text
from kantai.preprocessing.merge import describe, merge
from kantai.preprocessing.tokenize import tokenize
from tests.helpers.commands import script

MakeJob = Callable[..., Job]
SENTENCES = {
    "English": "Reason must, in all its undertakings, subject itself to criticism. ",
    "English in quotes": 'She asked him where he went, and he said: "Home!" ',
    "Chinese": "人類的理性在其知識的某一門類中有一種特殊的命運。",
    "Japanese": "人間の理性は、ある種の認識について特殊な運命を担っている！",  # noqa: RUF001
    "Hindi": "मानव बुद्धि का अपने ज्ञान के एक भाग में विशेष भाग्य है। ",
    "Hindi without spaces": "मानव बुद्धि का विशेष भाग्य है॥",
    "Arabic": "هل للعقل البشري هذا المصير الخاص؟ ",
    "Urdu": "انسانی عقل کی یہ خاص تقدیر ہے۔ ",  # noqa: RUF001
    "Armenian": "Մարդկային բանականությունն ունի հատուկ ճակատագիր։ ",  # noqa: RUF001
    "Burmese": "လူ့ဉာဏ်သည် ထူးခြားသော ကံကြမ္မာရှိသည်။",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_long_document_is_cut_at_sentence_ends(language: str) -> None:
    sentence = SENTENCES[language]
    text = sentence * (2 * MAX_CHARACTERS // len(sentence))
    parts = list(cut_text(text))
    assert len(parts) >= 16
    for part in parts:
        assert len(part) <= 4096
        assert part[-5:] == text.strip()[-5:]
        assert part[:5] == text[:5]
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_text_without_sentence_ends_is_cut_at_white_space() -> None:
    text = " ".join(f"word{number}" for number in range(20_000))
    parts = list(cut_text(text))
    assert " ".join(parts) == text
    assert min(map(len, parts[:-1])) > 2000
    assert len(parts[-1]) > 1000


@pytest.mark.parametrize("cluster", ["a", "字", "e\u0301\u0323", "กี่", "👩\u200d🚀"])
def test_text_without_white_space_is_cut_between_characters(cluster: str) -> None:
    text = cluster * (2 * MAX_CHARACTERS // len(cluster))
    parts = list(cut_text(text))
    assert "".join(parts) == text
    for part, following in pairwise(parts):
        assert 2000 < len(part) <= 4096
        assert not unicodedata.category(following[0]).startswith("M")
        assert part[-1] != "\u200d" and following[0] != "\u200d"


def test_text_that_two_documents_share_is_cut_alike(corpus_file: Path) -> None:
    text = corpus_file.read_text(encoding="utf-8")
    for separator in (" ", ""):
        book = separator.join(text.split())
        excerpt = list(cut_text(book[50_000:200_000]))
        shared = set(cut_text(book)) & set(excerpt)
        assert len(shared) > 0.8 * len(excerpt)


def test_last_part_is_not_tiny(corpus_file: Path) -> None:
    text = corpus_file.read_text(encoding="utf-8")
    for length in range(MAX_CHARACTERS, MAX_CHARACTERS + 9000, 97):
        assert min(map(len, cut_text(text[:length]))) > 900


def test_marks_alone_are_cut_too() -> None:
    text = "\u0301" * 100_000
    assert "".join(cut_text(text)) == text


def test_document_of_ordinary_length_stays_as_it_is() -> None:
    ordinary = ["a. " * (MAX_CHARACTERS // 3), " short  and spaced ", "x" * MAX_CHARACTERS]
    counter = LongDocuments()
    assert list(counter.cut(ordinary)) == ordinary
    assert (counter.documents, counter.parts) == (0, 0)


def test_white_space_alone_gives_no_document() -> None:
    assert list(LongDocuments().cut([" \n" * MAX_CHARACTERS])) == []


def test_corpus_in_one_line_is_split(make_job: MakeJob, tmp_path: Path, corpus_file: Path) -> None:
    book = tmp_path / "book.txt"
    text = " ".join(corpus_file.read_text(encoding="utf-8").split())
    book.write_text(text, encoding="utf-8")
    job = make_job("shards", files=[book])
    tokenize(job, processes=1)
    manifest = merge(job)
    splits = manifest["splits"]
    assert splits["train"]["documents"] > 60
    assert 0 < splits["held_out"]["tokens"] < splits["train"]["tokens"] / 3
    parts = splits["train"]["documents"] + splits["held_out"]["documents"]
    assert manifest["report"]["long_documents"] == {"documents": 1, "parts": parts}
    said = f"1 documents were longer than 32,768 characters and were cut into {parts:,}"
    assert any(line.startswith(said) for line in describe(manifest))
    decoded = [
        job.vocabulary.tokenizer.decode(shard.tokens)
        for split in ("train", "held_out")
        for shard in open_shards(job.output).splits[split]
    ]
    assert sum(len("".join(part.split())) for part in decoded) == len("".join(text.split()))


@pytest.mark.parametrize("unit", ["record", "file"])
def test_long_record_or_file_is_cut_by_the_program(
    unit: str, tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    text = corpus_file.read_text(encoding="utf-8")
    book = tmp_path / ("book.jsonl" if unit == "record" else "book.txt")
    book.write_text(json.dumps({"text": text}) if unit == "record" else text, encoding="utf-8")
    output = tmp_path / "shards"
    where = ["--input", book, "--tokenizer", tokenizer_dir, "--output", output]
    done = script("tokenize_corpus", *where, "--document", unit, "--held_out", "0.1")
    assert done.returncode == 0, done.stderr
    assert "1 documents were longer than 32,768 characters and were cut into" in done.stdout
    assert open_shards(output).manifest["splits"]["held_out"]["documents"] > 1
