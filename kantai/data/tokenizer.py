"""Trained tokenizers: open, save, and encode documents of any length."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kantai.data.rng import Int64s, TokenIds
from kantai.errors import UserError
from kantai.storage.atomic import digest

MASK_TOKEN = "<mask>"
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", MASK_TOKEN)
MODEL_MAX_LENGTH = 512
# The library holds about 100 bytes for each token of the texts in one call.
_CHARACTERS_AT_ONCE = 1 << 20
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")


@dataclass(frozen=True)
class Vocabulary:
    """A trained tokenizer, its five special ids, and a fingerprint of its vocabulary and merges."""

    tokenizer: Tokenizer
    size: int
    bos_id: int
    pad_id: int
    eos_id: int
    unk_id: int
    mask_id: int
    fingerprint: str

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are never masked."""
        return (self.bos_id, self.pad_id, self.eos_id, self.unk_id, self.mask_id)

    def encode(self, texts: list[str]) -> tuple[TokenIds, Int64s]:
        """Tokenize documents.

        No special tokens are added or recognized: a document's own ``<s>``, which HTML has, or
        ``<mask>`` is text like any other.

        Returns:
            The ids of all documents one after another, and the number of each document's ids.
        """
        # The parts are cut twice: to keep them would double the memory of a long document.
        part_counts = [sum(1 for _ in text_parts(text)) for text in texts]
        parts = itertools.chain.from_iterable(map(text_parts, texts))
        ids: list[TokenIds] = [np.zeros(0, np.uint32)]
        lengths: list[int] = []
        self.tokenizer.encode_special_tokens = True
        try:
            for group in batched_texts(parts):
                encodings = self.tokenizer.encode_batch_fast(group, add_special_tokens=False)
                lists = [encoding.ids for encoding in encodings]
                lengths += map(len, lists)
                ids.append(np.fromiter(itertools.chain.from_iterable(lists), np.uint32))
        finally:
            self.tokenizer.encode_special_tokens = False
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        return np.concatenate(ids), np.diff(ends[np.cumsum([0, *part_counts])])


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json``, ``vocab.json``, ``merges.txt`` and ``AutoTokenizer``'s config."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    # transformers would write the same, but takes seconds to import.
    mask = {
        "content": MASK_TOKEN,
        "lstrip": True,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "__type": "AddedToken",
    }
    config = {
        "tokenizer_class": "RobertaTokenizer",
        "model_max_length": MODEL_MAX_LENGTH,
        "add_prefix_space": False,
        "trim_offsets": True,
        "errors": "replace",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": mask,
    }
    text = json.dumps(config, indent=1) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load_tokenizer(folder: Path) -> Vocabulary:
    """Open a tokenizer folder, ours or any Hugging Face one with RoBERTa's special tokens.

    Raises:
        UserError: ``tokenizer.json`` is missing, unreadable, or lacks special tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"no tokenizer at {folder}: train one with scripts/train_tokenizer.py")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        model = json.loads(tokenizer.to_str())["model"]
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer: {error}") from None
    # A Hugging Face file may carry the settings of its last use, which would silently cut or pad
    # documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    ids = {token: number for token, number in found.items() if number is not None}
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise UserError(
            f"{path} lacks {' '.join(missing)}: a RoBERTa tokenizer has {' '.join(SPECIAL_TOKENS)}"
        )
    fingerprint = digest([model["vocab"], model.get("merges"), ids])
    bos_id, pad_id, eos_id, unk_id, mask_id = ids.values()
    size = tokenizer.get_vocab_size()
    return Vocabulary(tokenizer, size, bos_id, pad_id, eos_id, unk_id, mask_id, fingerprint)


def text_parts(text: str) -> Iterator[str]:
    """Cut a text into parts of one to two million characters that together give its tokens.

    A text is cut before a single space between two letters or digits. GPT-2's pattern always
    separates two words there: the word before cannot match the space, and the word that begins with
    the space is matched without a look back. A word is cut only if a million characters have no
    such place.
    """
    start = 0
    while len(text) - start > 2 * _CHARACTERS_AT_ONCE:
        end = start + 2 * _CHARACTERS_AT_ONCE
        place = _BETWEEN_WORDS.search(text, start + _CHARACTERS_AT_ONCE, end)
        stop = place.start() if place else end
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


def batched_texts(texts: Iterable[str], max_texts: float = math.inf) -> Iterator[list[str]]:
    """Group consecutive texts, a million characters or ``max_texts`` together."""
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE or len(group) == max_texts:
            yield group
            group = []
            characters = 0
    if group:
        yield group
