"""transformers loads our tokenizer with equal ids, special tokens and limits."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer, RobertaTokenizerFast

import kantai.data.tokenizer
from kantai.data.tokenizer import (
    SPECIAL_TOKENS,
    Vocabulary,
    load_tokenizer,
    save_tokenizer,
    text_parts,
)
from kantai.errors import UserError
from kantai.preprocessing.documents import Unit, documents, pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.tokenizer_training import train_tokenizer
from kantai.storage.atomic import digest
from tests.helpers.tokenizer_kinds import KINDS, changed, loaded, trained


def read_documents(path: Path, unit: Unit) -> Iterator[str]:
    return (
        text for piece in pieces(find_files([str(path)]), unit) for text in documents(piece, unit)
    )


TEXTS = [
    "",
    " ",
    "a",
    "  two leading spaces",
    "trailing space ",
    "The Critique of Pure Reason.",
    "return the <mask> of the object",
    "return the<mask>of the object",
    "<mask> first, last <mask>",
    "two <mask> <mask> in a row",
    "tabs\tand\nnewlines\r\n\r\n and   runs   of   spaces",
    "don't, I'll, we've: contractions",
    "1234567890 3.14 1e-6",
    "Königsberg, naïve, façade, coöperate",
    "Критика чистого разума",
    "純粋理性批判",
    "نقد العقل المحض",
    "🙂👩‍👩‍👧‍👦🇩🇪 and combining e\u0301",
    "non-breaking\u00a0space, zero\u200bwidth, BOM\ufeff, \u2028 line separator",
    "\x01 control \x7f",
    "</s> written out, <s> too, <pad> and <unk>",
    "<MASK> < mask> <mask",
    "x" * 600,
    "word " * 600,
]


@pytest.mark.parametrize("loader", [AutoTokenizer, RobertaTokenizerFast])
def test_transformers_gives_equal_ids(loader: type, tokenizer_dir: Path, corpus_file: Path) -> None:
    ours = load_tokenizer(tokenizer_dir)
    theirs = loader.from_pretrained(str(tokenizer_dir))
    for text in [*TEXTS, *read_documents(corpus_file, "paragraph")]:
        assert theirs(text)["input_ids"] == ours.tokenizer.encode(text).ids, text
        if "<" not in text:  # our encode takes special tokens in documents as text
            assert (
                theirs(text, add_special_tokens=False)["input_ids"]
                == ours.encode([text])[0].tolist()
            ), text


@pytest.mark.parametrize("loader", [AutoTokenizer, RobertaTokenizerFast])
def test_transformers_knows_special_tokens_and_limits(loader: type, tokenizer_dir: Path) -> None:
    ours = load_tokenizer(tokenizer_dir)
    theirs = loader.from_pretrained(str(tokenizer_dir))
    assert (
        theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS))
        == list(ours.special_ids)
        == [0, 1, 2, 3, 4]
    )
    assert (theirs.bos_token, theirs.cls_token, theirs.eos_token, theirs.sep_token) == (
        "<s>",
        "<s>",
        "</s>",
        "</s>",
    )
    assert (theirs.pad_token_id, theirs.unk_token_id, theirs.mask_token_id) == (1, 3, 4)
    assert len(theirs) == theirs.vocab_size == ours.size == 1000
    assert theirs.model_max_length == 512
    assert theirs("a", "b")["input_ids"] == ours.tokenizer.encode("a", "b").ids


def test_encoded_text_decodes_without_special_tokens(tokenizer_dir: Path) -> None:
    vocabulary = load_tokenizer(tokenizer_dir)
    texts = [text for text in TEXTS if "<" not in text]
    ids, lengths = vocabulary.encode(texts)
    assert set(ids).isdisjoint(vocabulary.special_ids)
    for text, of_text in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        assert vocabulary.tokenizer.decode(of_text) == text


def test_mask_token_absorbs_preceding_space(tokenizer_dir: Path) -> None:
    vocabulary = load_tokenizer(tokenizer_dir)
    for text in ("a <mask> of", "a<mask> of"):
        ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
        assert [vocabulary.tokenizer.id_to_token(token) for token in ids] == ["a", "<mask>", "Ġof"]


def test_special_tokens_in_document_are_text(tokenizer_dir: Path) -> None:
    vocabulary = load_tokenizer(tokenizer_dir)
    text = "<s>struck out</s>, a <pad> and a <mask>"
    ids, _ = vocabulary.encode([text])
    assert set(ids).isdisjoint(vocabulary.special_ids)
    assert vocabulary.tokenizer.decode(ids) == text
    # The <mask> of a prompt stays a special token afterwards.
    assert vocabulary.mask_id in vocabulary.tokenizer.encode(text).ids


def test_fingerprint_depends_on_vocabulary_and_merges(
    tmp_path: Path, tokenizer_dir: Path, corpus_file: Path
) -> None:
    ours = load_tokenizer(tokenizer_dir)
    AutoTokenizer.from_pretrained(str(tokenizer_dir)).save_pretrained(tmp_path / "resaved")
    assert load_tokenizer(tmp_path / "resaved").fingerprint == ours.fingerprint

    prints = {ours.fingerprint}
    for number, (vocab_size, min_frequency) in enumerate([(999, 2), (1000, 500)]):
        (tmp_path / str(number)).mkdir()
        save_tokenizer(
            train_tokenizer(read_documents(corpus_file, "paragraph"), vocab_size, min_frequency),
            tmp_path / str(number),
        )
        prints.add(load_tokenizer(tmp_path / str(number)).fingerprint)

    shutil.copytree(tokenizer_dir, tmp_path / "merged")
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"][-2:] = reversed(content["model"]["merges"][-2:])
    (tmp_path / "merged" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    prints.add(load_tokenizer(tmp_path / "merged").fingerprint)
    assert len(prints) == 4


def test_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=f"no tokenizer at {folder}"):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"not JSON", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "BPE"}}'],
)
def test_malformed_tokenizer_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_stored_truncation_and_padding_are_ignored(tmp_path: Path, tokenizer_dir: Path) -> None:
    foreign = load_tokenizer(tokenizer_dir)
    foreign.tokenizer.enable_truncation(8)
    foreign.tokenizer.enable_padding(pad_id=1, pad_token="<pad>", pad_to_multiple_of=8)
    foreign.tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["word " * 600, "short"]
    ours, theirs = (load_tokenizer(folder).encode(texts) for folder in (tokenizer_dir, tmp_path))
    assert [array.tolist() for array in theirs] == [array.tolist() for array in ours]


def test_tokenizer_lacking_special_tokens_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    content = (tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(
        content.replace("<mask>", "[MASK]").replace("<pad>", "[PAD]"), encoding="utf-8"
    )
    with pytest.raises(UserError, match="lacks <pad> <mask>"):
        load_tokenizer(tmp_path)


def test_empty_documents_have_no_ids(tokenizer_dir: Path) -> None:
    vocabulary = load_tokenizer(tokenizer_dir)
    for texts in ([], [""], ["", ""]):
        ids, lengths = vocabulary.encode(texts)
        assert (ids.tolist(), lengths.tolist()) == ([], [0] * len(texts))
        assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)


@pytest.fixture(scope="module")
def vocabulary(tokenizer_dir: Path) -> Vocabulary:
    return load_tokenizer(tokenizer_dir)


ATOMS = [
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "\x1c",
    "a",
    "it's",
    " über",
    "42 ",
    ".",
    "_",
    "e\u0301",
    "🙂",
    "</s>",
    "<mask>",
]


@settings(max_examples=300)
@given(st.lists(st.lists(st.sampled_from(ATOMS), max_size=20).map("two words".join), max_size=5))
def test_long_documents_keep_ids_when_cut(vocabulary: Vocabulary, texts: list[str]) -> None:
    whole = vocabulary.encode(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kantai.data.tokenizer, "_CHARACTERS_AT_ONCE", 20)
        in_parts = vocabulary.encode(texts)
    assert [array.tolist() for array in in_parts] == [array.tolist() for array in whole]


def test_text_without_spaces_survives_cutting(vocabulary: Vocabulary) -> None:
    text = "純粋理性批判" * 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kantai.data.tokenizer, "_CHARACTERS_AT_ONCE", 500)
        assert len(list(text_parts(text))) > 5
        ids, lengths = vocabulary.encode([text, "short"])
    assert vocabulary.tokenizer.decode(ids[: lengths[0]]) == text
    assert vocabulary.tokenizer.decode(ids[lengths[0] :]) == "short"


# As in a corpus of HTML and of papers on language models: trainers learn these tokens, too.
WRITTEN = "the <mask> of <s>pure</s> reason, </s> a <pad> and <unk> <s> of<mask> reasons"
SAMPLE = [WRITTEN, "the critique of pure reason and of the power of judgement, the critiques"] * 40


@pytest.mark.parametrize("kind", KINDS)
def test_written_special_token_is_text_to_every_tokenizer(tmp_path: Path, kind: str) -> None:
    vocabulary = loaded(trained(kind, SAMPLE), tmp_path)
    tokenizer = vocabulary.tokenizer
    ids, _ = vocabulary.encode([WRITTEN])
    reserved = set(vocabulary.special_ids)
    if kind == "WordLevel":  # it has no entry for a written token, as for any other word
        reserved.remove(vocabulary.unk_id)
    assert reserved.isdisjoint(ids.tolist()), [tokenizer.id_to_token(token) for token in ids]
    if kind != "WordLevel":
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert text.replace(" ", "") == WRITTEN.replace(" ", "")

    plain = SAMPLE[1]
    assert vocabulary.encode([plain])[0].tolist() == tokenizer.encode(plain).ids
    prompt = tokenizer.encode("the critique of <mask> reason").ids
    assert prompt.count(vocabulary.mask_id) == 1


@pytest.mark.parametrize(
    "normalizer", [normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents()]
)
@pytest.mark.parametrize("kind", ["Unigram", "BPE that ignores merges", "WordPiece"])
def test_normalized_text_gives_no_special_token(
    tmp_path: Path, kind: str, normalizer: normalizers.Normalizer
) -> None:
    tokenizer = trained(kind, SAMPLE)
    tokenizer.normalizer = normalizer
    vocabulary = loaded(tokenizer, tmp_path)
    for text in (
        WRITTEN,
        WRITTEN.upper(),
        "the \uff1cmask\uff1e of \uff1c/s\uff1e",
        "the <ma\u0301sk> of </s>",
    ):
        ids = set(vocabulary.encode([text])[0].tolist())
        assert {0, 1, 2, 4}.isdisjoint(ids), text


def test_special_token_that_is_not_marked_as_one_is_text(tmp_path: Path) -> None:
    def unmark(content: dict[str, Any]) -> None:
        for entry in content["added_tokens"]:
            entry["special"] = False

    for number, kind in enumerate(KINDS):
        vocabulary = loaded(changed(trained(kind, SAMPLE), unmark), tmp_path / str(number))
        assert {0, 1, 2, 4}.isdisjoint(vocabulary.encode([WRITTEN])[0].tolist()), kind


def test_added_token_that_is_not_special_is_found_in_a_text(tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS):
        tokenizer = trained(kind, SAMPLE[1::2])
        tokenizer.add_tokens([AddedToken("<url>", normalized=False)])
        tokenizer.add_special_tokens(["<end>"])
        vocabulary = loaded(tokenizer, tmp_path / str(number))
        ids = vocabulary.encode(["the <url> of <end> reason"])[0].tolist()
        assert tokenizer.token_to_id("<url>") in ids, kind
        assert tokenizer.token_to_id("<end>") not in ids, kind


def test_same_document_has_the_same_ids_despite_dropout(tmp_path: Path) -> None:
    def drop(content: dict[str, Any]) -> None:
        content["model"]["dropout"] = 0.5

    tokenizer = trained("byte-level BPE", SAMPLE)
    vocabulary = loaded(changed(tokenizer, drop), tmp_path)
    assert vocabulary.encode([SAMPLE[1]])[0].tolist() == tokenizer.encode(SAMPLE[1]).ids


def test_largest_id_decides_the_size(tmp_path: Path) -> None:
    def move_mask(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["<mask>"] = 70_000
        for entry in content["added_tokens"]:
            if entry["content"] == "<mask>":
                entry["id"] = 70_000

    for number, kind in enumerate(["byte-level BPE", "WordPiece", "WordLevel"]):
        moved = changed(trained(kind, SAMPLE), move_mask)
        vocabulary = loaded(moved, tmp_path / str(number))
        assert vocabulary.tokenizer.get_vocab_size() < 4000
        assert (vocabulary.mask_id, vocabulary.size) == (70_000, 70_001)


def test_entries_with_the_same_id_are_refused(tmp_path: Path) -> None:
    """The library gives an added token the number of entries as its id, whatever the file says."""

    def remove_mask(content: dict[str, Any]) -> None:
        del content["model"]["vocab"]["<mask>"]

    tokenizer = changed(trained("WordLevel", SAMPLE), remove_mask)
    with pytest.raises(UserError, match=r"'<mask>'.* have the same id \d+, as ids .* gaps"):
        loaded(tokenizer, tmp_path)


def test_fingerprint_names_all_that_decides_the_ids(tmp_path: Path) -> None:
    def edited(change: Callable[[dict[str, Any]], None]) -> Tokenizer:
        return changed(trained("byte-level BPE", SAMPLE), change)

    def with_added(token: AddedToken) -> Tokenizer:
        tokenizer = trained("byte-level BPE", SAMPLE)
        tokenizer.add_tokens([token])
        return tokenizer

    def with_model(**fields: Any) -> Tokenizer:
        return edited(lambda content: content["model"].update(fields))

    lowercase = {"type": "Lowercase"}
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    different = [
        trained("byte-level BPE", SAMPLE),
        edited(lambda content: content.update(normalizer=lowercase)),
        edited(lambda content: content.update(normalizer={"type": "NFC"})),
        edited(lambda content: content.update(pre_tokenizer={**spaced, "use_regex": True})),
        edited(lambda content: content.update(pre_tokenizer={**spaced, "use_regex": False})),
        with_added(AddedToken("<url>", normalized=False)),
        with_added(AddedToken("<url>", normalized=True)),
        with_added(AddedToken("<url>", normalized=False, single_word=True)),
        with_added(AddedToken("critique", normalized=False)),
        with_model(ignore_merges=True),
        with_model(unk_token="<unk>"),
    ]
    prints = {
        loaded(tokenizer, tmp_path / str(number)).fingerprint
        for number, tokenizer in enumerate(different)
    }
    assert len(prints) == len(different)


def test_fingerprint_of_kantai_0_1_is_recognized(tmp_path: Path, tokenizer_dir: Path) -> None:
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    before = digest([model["vocab"], model["merges"], ids])
    vocabulary = load_tokenizer(tokenizer_dir)
    assert before != vocabulary.fingerprint
    assert vocabulary.has_fingerprint(before)
    assert vocabulary.has_fingerprint(vocabulary.fingerprint)
    assert not vocabulary.has_fingerprint(None)

    added = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    added.add_tokens(["<url>"])
    other = loaded(added, tmp_path)
    assert other.has_fingerprint(before)  # it left added tokens out
    assert not other.has_fingerprint(vocabulary.fingerprint)


def test_bpe_that_drops_characters_is_refused(tmp_path: Path) -> None:
    """huggingface/tokenizers#517: without an unk_token, what the model does not know is gone."""
    texts = ["die liest ein und aus"] * 20
    good = trained("BPE", texts)
    assert loaded(good, tmp_path / "good").size > 5
    for name in ("BPE", "byte-level BPE"):
        bad = changed(trained(name, texts), forget_unknown)
        with pytest.raises(UserError, match="drops the characters that it does not know"):
            loaded(bad, tmp_path / name)


def forget_unknown(content: dict[str, Any]) -> None:
    """Take away the unknown token, and a byte."""
    content["model"]["unk_token"] = None
    content["model"]["vocab"].pop("Ā", None)
