"""Words: which tokens of a row begin a word of the text, whatever the tokenizer."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from kantai.data.rng import Bools, Int64s
from kantai.errors import UserError

UInt8s = npt.NDArray[np.uint8]

# Classes of characters. 0: the token is a word by itself.
_LETTER, _NUMBER, _OTHER, _WHITESPACE, _SINGLE, _INHERITED = (1 << bit for bit in range(6))
_INK = _LETTER | _NUMBER | _OTHER
_CONTRACTIONS = frozenset(("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"))
_ZERO_WIDTH_SPACE = "\u200b"  # divides words, unlike other characters without width
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_SPACE_SIGN = "\u2581"


@dataclass(frozen=True, eq=False)
class Words:
    """Word starts in rows of ids.

    A word is a run of letters, of digits, or of other characters except white space. Combining
    marks, such as the vowel signs of Hindi and Thai, belong to the character before them. So do
    joiners. The space before a word belongs to it. These are the words of GPT-2's pattern where
    text has no marks.

    Neighbouring tokens decide. A token continues the previous word if it has no leading space and
    starts with the class (letter, number, whitespace or other) that the previous token ends with,
    or if the previous token is a lone space. Tokens that together make one character count as one
    token. A contraction (``'ll``) that is one token is a word; one of several tokens is two.
    """

    # [vocabulary], the class that a token begins with; 0: it always begins a word.
    # A single whitespace character has _SINGLE as well.
    begins: UInt8s
    # [vocabulary], the classes with which the next token continues the word. _INHERITED: those of
    # the previous token, as this one is nothing but marks.
    goes_on: UInt8s
    # Of each entry of a vocabulary of bytes; it may have parts of characters.
    texts: Sequence[bytes] = ()
    begins_inside: Bools | None = None  # [vocabulary], whether a token begins inside a character

    @classmethod
    def of(cls, tokenizer: Tokenizer, special_ids: tuple[int, ...]) -> "Words":
        """Tables of a tokenizer's vocabulary; special and added tokens are words by themselves.

        Raises:
            UserError: the tokenizer drops white space, so that its tokens have no words.
        """
        content = json.loads(tokenizer.to_str())
        texts = _texts(tokenizer, content)
        _refuse_lost_spaces(tokenizer, texts)
        decoded = (text.decode(errors="replace") for text in texts)
        kinds = np.array([_begins_and_goes_on(text) for text in decoded], np.uint8)
        alone = [*special_ids, *(entry["id"] for entry in content["added_tokens"])]
        kinds[alone] = 0
        inside = np.array([_is_inside(text) for text in texts], np.bool_)
        inside[alone] = False
        return cls(kinds[:, 0].copy(), kinds[:, 1].copy(), texts, inside)

    def starts(self, rows: Int64s) -> Bools:
        """Which tokens begin a word, [rows, length]; special tokens and a row's first do."""
        begins = self.begins.take(rows)
        goes_on = self.goes_on.take(rows)
        inside = self._join_characters(rows, begins, goes_on)
        _inherit(goes_on)
        starts = np.ones(rows.shape, np.bool_)
        np.equal(begins[:, 1:] & goes_on[:, :-1], 0, out=starts[:, 1:])
        # Whitespace leaves its last character, if that is a space, to the word that follows.
        # Any other last character becomes a word by itself.
        starts[:, 1:-1] |= (begins[:, 1:-1] >= _SINGLE) & (begins[:, 2:] & _INK != 0)
        starts &= ~inside
        return starts

    def _join_characters(self, rows: Int64s, begins: UInt8s, goes_on: UInt8s) -> Bools:
        """Give tokens that share a character the classes that they have together.

        Returns:
            Which tokens begin inside a character that the previous token began, [rows, length].
        """
        inside = np.zeros(rows.shape, np.bool_)
        if self.begins_inside is None:
            return inside
        inside[:, 1:] = self.begins_inside.take(rows[:, 1:]) & (goes_on[:, :-1] != 0)
        edges = np.diff(inside.ravel().view(np.int8), prepend=0, append=0)
        firsts = np.flatnonzero(edges == 1) - 1
        stops = np.flatnonzero(edges == -1)
        ids = rows.ravel()
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
            text = b"".join(self.texts[token] for token in ids[first:stop].tolist())
            begin, go_on = _begins_and_goes_on(text.decode(errors="replace"))
            begins.reshape(-1)[first] = begin
            goes_on.reshape(-1)[first:stop] = go_on
        return inside


def _inherit(goes_on: UInt8s) -> None:
    """Give tokens of nothing but marks the class of the token before them."""
    inherited = goes_on == _INHERITED
    if inherited.any():
        places = np.where(inherited, 0, np.arange(goes_on.shape[1]))
        goes_on[:] = np.take_along_axis(goes_on, np.maximum.accumulate(places, axis=1), 1)


@lru_cache(maxsize=1 << 16)
def _begins_and_goes_on(text: str) -> tuple[int, int]:
    if text.isspace():
        begins = _WHITESPACE | (_SINGLE if len(text) == 1 else 0)
        return begins, _WHITESPACE | (_INK if text == " " else 0)
    begins = 0 if text[:1] in ("", " ") else _class(text[0])
    if text in {"", *_CONTRACTIONS}:
        return begins, 0
    base = next((character for character in reversed(text) if not _is_mark(character)), None)
    if base is None:
        return begins, _INHERITED
    return begins, _LETTER if base == " " and text[-1] != " " else _class(base)


def _class(character: str) -> int:
    if character.isspace():
        return _WHITESPACE
    if _is_mark(character):
        return _INK  # it continues any word
    if character == "\ufffd":  # part of a character, where a row begins
        return _LETTER
    return {"L": _LETTER, "N": _NUMBER}.get(unicodedata.category(character)[0], _OTHER)


def _is_mark(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "M" or (category == "Cf" and character != _ZERO_WIDTH_SPACE)


def _is_inside(text: bytes) -> bool:
    """Whether a text begins with a byte that is not the first of a character."""
    return text[:1] >= b"\x80" and text[:1] < b"\xc0"


def _texts(tokenizer: Tokenizer, content: dict[str, Any]) -> list[bytes]:
    """What each entry of the vocabulary stands for in a text, by id; UTF-8, or parts of it.

    A token that begins a word for another reason than a space is written with a space, too.
    """
    model = content["model"]
    components = list(_components([content["pre_tokenizer"], content["decoder"]]))
    is_bytes = any(component["type"] == "ByteLevel" for component in components)
    signs = [component["replacement"] for component in components if _is_metaspace(component)]
    if not signs and _SPACE_SIGN in json.dumps(content["normalizer"], ensure_ascii=False):
        signs = [_SPACE_SIGN]
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    begins_words = bool(prefix or model["type"] == "WordLevel") and not (is_bytes or signs)
    to_bytes = _byte_level_reader() if is_bytes else _utf8_reader(signs, model)

    def read(token: str) -> bytes:
        text = token
        if prefix and token.startswith(prefix):
            text = token[len(prefix) :]
        elif begins_words:
            text = f" {token}"
        if suffix and text.endswith(suffix):
            return to_bytes(text[: -len(suffix)]) + b" "
        return to_bytes(text)

    vocabulary = tokenizer.get_vocab()
    texts = [b""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        texts[number] = read(token)
    return texts


def _components(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield pre-tokenizers and decoders, also those in a sequence."""
    if isinstance(tree, list):
        for entry in tree:
            yield from _components(entry)
    elif isinstance(tree, dict):
        if "type" in tree:
            yield tree
        for entry in tree.values():
            yield from _components(entry)


def _is_metaspace(component: dict[str, Any]) -> bool:
    return bool(component["type"] == "Metaspace")


def _byte_level_reader() -> Callable[[str], bytes]:
    """Maps the characters that stand for bytes (GPT-2's table) back; others are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {chr(byte): bytes([byte]) for byte in printable}
    table |= {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}
    return lambda text: b"".join(table.get(character, character.encode()) for character in text)


def _utf8_reader(signs: list[str], model: dict[str, Any]) -> Callable[[str], bytes]:
    """Reads tokens with a sign for the space, and perhaps with tokens for bytes."""

    def read(text: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(text) if model.get("byte_fallback") else None
        if byte:
            return bytes.fromhex(byte[1])
        for sign in signs:
            text = text.replace(sign, " ")
        return text.encode()

    return read


def _refuse_lost_spaces(tokenizer: Tokenizer, texts: list[bytes]) -> None:
    """Raise an error if two words give the same tokens with and without a space between."""
    letters = [text for text in texts if text.decode(errors="replace").strip().isalpha()]
    if not letters:
        return
    word = max(letters, key=len).decode().strip()
    ids = tokenizer.encode(f"{word} {word}", add_special_tokens=False).ids
    found = b"".join(texts[token] for token in ids).strip()
    if ids and b" " not in found:
        raise UserError(
            "masking.unit word and span need to know where words end, and the tokenizer of "
            "data.tokenizer drops white space: set masking.unit to token, or bring a tokenizer "
            "that keeps it (scripts/train_tokenizer.py trains one)"
        )
