"""Words are those of the text, in any language and with any tokenizer."""
# ruff: noqa: RUF001 - other alphabets have letters that look like Latin ones

import hashlib
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from kantai.config.loading import load_config
from kantai.data.dataset import open_data
from kantai.data.masking import IGNORED_LABEL, Masker
from kantai.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from kantai.data.words import Words
from kantai.errors import UserError
from tests.helpers.commands import CONFIG
from tests.helpers.tokenizer_kinds import KINDS, changed, loaded, trained

TEXTS = {
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে, ১৯৪৮ সালে।",
    "Thai": "มนุษย์ทั้งหลาย เกิดมามีอิสระ และเสมอภาคกัน ในเกียรติศักดิ์ และสิทธิ",
    "Tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; அவர்கள் மதிப்பிலும் சமமானவர்கள்",
    "pointed Hebrew": "בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ, כׇּל־בְּנֵי הָאָדָם",
    "pointed Arabic": "يُولَدُ جَمِيعُ النَّاسِ أَحْرَارًا، مُتَسَاوِينَ فِي الْكَرَامَةِ وَالْحُقُوقِ",
    "Persian": "می‌خواهم کتاب‌های آن‌ها را بخوانم، نمی‌توانم",
    "Vietnamese, decomposed": unicodedata.normalize(
        "NFD", "Tất cả mọi người sinh ra đều được tự do"
    ),
    "Russian": "Все люди рождаются свободными и равными — «в своём достоинстве» и правах…",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。"
    "他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "English": "“All human beings”—naïve or not—are born free (1948) and equal… in 100% of cases",
    "emoji": "good ❤️ day 👍🏽 to you 👩‍👩‍👧 all",
}


def words_of(text: str) -> list[int]:
    """The number of the word of each character; a space belongs to the word behind it."""
    numbers: list[int] = []
    kind = ""
    number = 0
    for character in text:
        category = unicodedata.category(character)
        is_mark = category[0] == "M" or category == "Cf"
        found = category[0] if character == " " or category[0] in "LN" else "other"
        if not is_mark and found != kind:
            number += kind != "Z"
            kind = found
        numbers.append(number)
    return numbers


def expected_starts(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[bool]]:
    """The ids of a text, and which of them begin a word."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    words = words_of(text)
    starts = [True]
    for (_, stop), (start, _) in zip(encoding.offsets, encoding.offsets[1:], strict=False):
        starts.append(words[start] != words[stop - 1])
    return encoding.ids, starts


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_words_are_those_of_the_text(kind: str, language: str) -> None:
    text = TEXTS[language]
    # Half of the text, so that words are in pieces and byte-level tokens are parts of characters.
    learned = text if kind.startswith("Word") else text[: len(text) // 2]
    tokenizer = trained(kind, [learned, TEXTS["English"], *text])
    special = tuple(tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    ids, expected = expected_starts(tokenizer, text)
    starts = Words.of(tokenizer, special).starts(np.array([[special[0], *ids]]))[0, 1:]
    known = [place for place, token in enumerate(ids) if token not in special]
    assert len(known) > len(ids) / 2
    wrong = [place for place in known[1:] if starts[place] != expected[place]]
    pairs = [tuple(tokenizer.id_to_token(ids[p]) for p in (place - 1, place)) for place in wrong]
    if kind == "WordPiece of BERT":  # it divides what is written in Chinese, and punctuation
        pairs = [pair for pair in pairs if language != "Chinese" and "".join(pair).isalnum()]
    assert not pairs


@pytest.mark.parametrize("kind", ["byte-level BPE", "Unigram", "WordPiece of BERT"])
@pytest.mark.parametrize("language", ["Hindi", "Bengali", "Tamil", "pointed Hebrew"])
def test_no_word_is_masked_in_part(kind: str, language: str) -> None:
    text = TEXTS[language]
    tokenizer = trained(kind, [text])
    special = tuple(tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    ids, expected = expected_starts(tokenizer, text)
    rows = np.tile([special[0], *ids], (200, 1))
    size = tokenizer.get_vocab_size()
    words = Words.of(tokenizer, special)
    masker = Masker(0.3, 1.0, 0.0, size, special[4], special, seed=0, unit="word", words=words)
    masked = masker(rows, np.zeros(200, np.int64), np.arange(200), 0)
    where = np.zeros(rows.shape, np.bool_)
    real = masked.labels != IGNORED_LABEL
    where[np.nonzero(real)[0], masked.masked_positions[real]] = True
    units = np.cumsum(expected)
    for number in np.unique(units):
        of_word = where[:, 1:][:, units == number]
        if of_word.shape[1] <= 8:  # a longer word is masked in pieces
            assert (of_word.all(1) == of_word.any(1)).all()


def test_words_of_a_byte_tokenizer_are_those_of_latin_text_before(tokenizer_dir: Path) -> None:
    """Runs of kantai 0.1 had these masks, of text without marks and without split characters."""
    vocabulary = load_tokenizer(tokenizer_dir)
    text = (
        "It's what they'll say:\n\n  'tis (or isn't) 42 a_b--c... \t of the   return value, x1y2 "
    )
    ids = vocabulary.encode([text * 40])[0].astype(np.int64)
    rows = np.full((len(ids) // 63, 64), vocabulary.bos_id)
    rows[:, 1:] = ids[: len(ids) // 63 * 63].reshape(-1, 63)
    rows[::3, 40] = vocabulary.eos_id
    words = Words.of(vocabulary.tokenizer, vocabulary.special_ids)
    numbers = np.arange(len(rows))
    found = hashlib.sha256(words.starts(rows).tobytes())
    for unit in ("word", "span"):
        masker = Masker(0.15, 0.8, 0.1, 1000, 4, vocabulary.special_ids, 3, unit, words)
        found.update(masker(rows, numbers, numbers, 0).input_ids.tobytes())
    assert found.hexdigest() == "6b0b4abb10c3f9eef051cef704dcb3e239f4409a732141ba8e7583d6c71c3982"


def test_parts_of_a_character_are_one_word_with_it() -> None:
    tokenizer = trained("byte-level BPE", ["a"])  # every byte is a token
    texts = {"a—b": [True, True, False, False, True], "aéb": [True, False, False, False]}
    texts["कि"] = [True, False, False, False, False, False]
    texts["a。 b"] = [True, True, False, False, True, False]
    for text, expected in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        starts = Words.of(tokenizer, (0, 1, 2, 3, 4)).starts(np.array([[0, *ids, 2, ids[-1]]]))
        assert starts[0, 1:-2].tolist() == expected, text
        assert starts[0, -2:].tolist() == [True, True]


def test_added_token_is_a_word() -> None:
    tokenizer = trained("byte-level BPE", ["see the (<url>)"] * 3)
    tokenizer.add_tokens([AddedToken("<url>", normalized=False)])
    encoding = tokenizer.encode("(<url>)", add_special_tokens=False)
    assert encoding.tokens == ["(", "<url>", ")"]
    starts = Words.of(tokenizer, (0, 1, 2, 3, 4)).starts(np.array([encoding.ids]))
    assert starts.tolist() == [[True, True, True]]


def test_tokenizer_that_drops_white_space_is_refused(
    tmp_path: Path, shards_dir: Path, corpus_file: Path
) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator([TEXTS["English"], "lower case words"], trainer)
    with pytest.raises(UserError, match=r"drops white space: set masking\.unit to token"):
        Words.of(tokenizer, (0, 1, 2, 3, 4))


def test_check_refuses_a_tokenizer_without_words(
    tmp_path: Path, shards_dir: Path, tokenizer_dir: Path
) -> None:
    def drop_spaces(content: dict[str, object]) -> None:
        split = {"type": "WhitespaceSplit"}
        before = content["pre_tokenizer"]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, before]}

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    vocabulary = loaded(changed(tokenizer, drop_spaces), tmp_path / "tokenizer")
    with pytest.raises(UserError, match="drops white space"):
        Words.of(vocabulary.tokenizer, vocabulary.special_ids)
    where = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    config = load_config(CONFIG, [*where, "--masking.unit=word"])
    assert open_data(config).words is not None
    assert open_data(load_config(CONFIG, where)).words is None


def as_in_llama(tokenizer: Tokenizer) -> Tokenizer:
    """Spaces are replaced by a normalizer, and unknown characters are tokens of their bytes."""

    def change(content: dict[str, Any]) -> None:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        prepend = {"type": "Prepend", "prepend": "\u2581"}
        content["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
        content["pre_tokenizer"] = None
        content["decoder"] = None
        content["model"]["byte_fallback"] = True
        vocab = content["model"]["vocab"]
        vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}

    return changed(tokenizer, change)


@pytest.mark.parametrize("language", TEXTS)
def test_words_are_those_of_the_text_with_tokens_for_bytes(language: str) -> None:
    text = TEXTS[language]
    tokenizer = as_in_llama(trained("BPE", [text[: len(text) // 3]]))
    special = tuple(tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    ids, expected = expected_starts(tokenizer, text)
    assert any((tokenizer.id_to_token(token) or "").startswith("<0x") for token in ids)
    starts = Words.of(tokenizer, special).starts(np.array([[special[0], *ids]]))[0, 1:]
    assert starts.tolist()[1:] == expected[1:]
