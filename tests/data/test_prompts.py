"""Prompts are derived for every language: a word hidden where there are words."""

from pathlib import Path

import numpy as np
import pytest

from kantai.data.prompts import derive_prompts
from kantai.data.shards import Shard
from kantai.data.tokenizer import MASK_TOKEN, load_tokenizer, save_tokenizer
from kantai.preprocessing.tokenizer_training import train_tokenizer

ENGLISH = "The critique of pure reason is a book about the possibility of all knowledge."
HINDI = "शुद्ध बुद्धि की समीक्षा कांट की मुख्य रचना है और यह नगर में लिखी गई थी।"
ARABIC = "نقد العقل المحض هو الكتاب الرئيسي للفيلسوف كانط وقد كتبه في المدينة."
CHINESE = "纯粹理性批判是康德的主要著作。人类的知识从经验开始。但并非都来自经验。"
THAI = "บทวิจารณ์เหตุผลบริสุทธิ์เป็นผลงานหลักของคานท์"


def prompts(folder: Path, texts: list[str], vocab_size: int = 500, seq_len: int = 64) -> list[str]:
    save_tokenizer(train_tokenizer(texts * 5, vocab_size, 2), folder)
    vocabulary = load_tokenizer(folder)
    ids, lengths = vocabulary.encode(texts)
    ends = np.cumsum(lengths)
    tokens = np.insert(ids, ends, vocabulary.eos_id)
    boundaries = np.concatenate([[0], np.cumsum(lengths + 1)]).astype(np.int32)
    return derive_prompts([Shard(tokens, boundaries)], vocabulary, seq_len)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [ENGLISH, HINDI, ARABIC])
def test_prompt_hides_a_whole_word_where_there_are_spaces(tmp_path: Path, text: str) -> None:
    found = prompts(tmp_path, [text] * 5)
    assert len(found) == 3
    before, _, after = found[0].partition(MASK_TOKEN)
    assert before.endswith(" ") and after.startswith(" ")
    words = text.split()
    hidden = words[len(before.split())]
    assert text.startswith(f"{before}{hidden}{after}".rstrip("."))


@pytest.mark.parametrize("text", [CHINESE, THAI])
def test_prompt_hides_characters_where_there_are_no_spaces(tmp_path: Path, text: str) -> None:
    found = prompts(tmp_path, [text[shift:] + text[:shift] for shift in range(6)], 400)
    assert len(found) == 3
    for prompt in found:
        assert prompt.count(MASK_TOKEN) == 1
        assert "\ufffd" not in prompt
        assert len(prompt) > len(MASK_TOKEN)


@pytest.mark.parametrize("text", ["12 345 67 8 90 12 55", "🙂🙃😀 😃😄", "a b c d e f"])
def test_prompt_hides_what_can_be_seen_where_there_are_no_letters(
    tmp_path: Path, text: str
) -> None:
    (prompt, *_) = prompts(tmp_path, [text] * 3, 300)
    assert prompt.count(MASK_TOKEN) == 1


def test_document_that_has_a_mask_or_no_context_gives_no_prompt(tmp_path: Path) -> None:
    assert prompts(tmp_path, ["I write <mask> in my text.", "x", "ACGT" * 5]) == []
