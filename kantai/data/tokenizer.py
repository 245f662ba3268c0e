"""Trained tokenizers: open, save, and encode documents of any length."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from kantai.data.rng import Int64s, TokenIds
from kantai.errors import UserError
from kantai.storage.atomic import digest

MASK_TOKEN = "<mask>"
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", MASK_TOKEN)
MODEL_MAX_LENGTH = 512
# The library holds about 100 bytes for each token of the texts in one call.
_CHARACTERS_AT_ONCE = 1 << 20
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
# No document has this character: reading replaces it.
_UNWRITABLE = "\0"


@dataclass(frozen=True)
class Vocabulary:
    """A trained tokenizer, its five special ids, and fingerprints of all that decides the ids.

    Attributes:
        tokenizer: finds special tokens in a text, as prompts need it.
        size: the largest id + 1. Some tokenizers have fewer entries, and ids that none has.
        fingerprint: of the model, the normalizer, the pre-tokenizer and the added tokens.
        old_fingerprint: of vocabulary, merges and special ids alone, as kantai 0.1 recorded it.
    """

    tokenizer: Tokenizer
    size: int
    bos_id: int
    pad_id: int
    eos_id: int
    unk_id: int
    mask_id: int
    fingerprint: str
    old_fingerprint: str

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are never masked."""
        return (self.bos_id, self.pad_id, self.eos_id, self.unk_id, self.mask_id)

    def has_fingerprint(self, recorded: Any) -> bool:
        """Whether shards or a checkpoint, also of kantai 0.1, were made with this tokenizer."""
        return recorded in (self.fingerprint, self.old_fingerprint)

    def has_size(self, recorded: Any) -> bool:
        """Whether shards, also of kantai 0.1, were made with as many entries."""
        return recorded in (self.size, self.tokenizer.get_vocab_size())

    def positions(self, seq_len: int) -> int:
        """Positions that a RoBERTa needs: it counts them from the id of ``<pad>`` on."""
        return seq_len + self.pad_id + 1

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
        for group in batched_texts(parts):
            encodings = self._encoder.encode_batch_fast(group, add_special_tokens=False)
            lists = [encoding.ids for encoding in encodings]
            lengths += map(len, lists)
            ids.append(np.fromiter(itertools.chain.from_iterable(lists), np.uint32))
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        return np.concatenate(ids), np.diff(ends[np.cumsum([0, *part_counts])])

    @cached_property
    def _encoder(self) -> Tokenizer:
        """The tokenizer for documents, in which no special token can be written.

        The library's ``encode_special_tokens`` does not suffice: it keeps special tokens from being
        cut out of a text, but they are in the vocabulary as well, where the model may find them.
        """
        content = json.loads(self.tokenizer.to_str())
        added = content["added_tokens"]
        special = {entry["content"] for entry in added if entry["special"]} | {*SPECIAL_TOKENS}
        for entry in added:
            if entry["content"] in special:
                entry["content"] = _unwritable(entry["content"])
                entry["normalized"] = False
        content["model"] = _without_written(content["model"], special)
        content["post_processor"] = None
        encoder = Tokenizer.from_str(json.dumps(content))
        encoder.encode_special_tokens = True
        return encoder


def _unwritable(token: str) -> str:
    return f"{_UNWRITABLE}{token}"


def _without_written(model: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """A model with the same ids that gives none of ``special`` for what is written in a text."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram
        pieces = (
            (_unwritable(piece) if piece in special else piece, *rest) for piece, *rest in vocab
        )
        return {**model, "vocab": list(pieces)}
    entries = {_unwritable(token) if token in special else token: vocab[token] for token in vocab}
    changed = {**model, "vocab": entries}
    if "dropout" in model:  # a document has the same ids whenever it is tokenized
        changed["dropout"] = None
    if model.get("unk_token") in special:
        changed["unk_token"] = _unwritable(model["unk_token"])
    if "merges" in model:
        changed["merges"] = [
            pair
            for pair in map(_pair, model["merges"])
            if special.isdisjoint((*pair, "".join(pair)))
        ]
    return changed


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


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
        content = json.loads(tokenizer.to_str())
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
    _refuse_shared_ids(path, tokenizer, content["added_tokens"])
    _refuse_dropped_characters(path, content)
    old_fingerprint = digest([content["model"]["vocab"], content["model"].get("merges"), ids])
    bos_id, pad_id, eos_id, unk_id, mask_id = ids.values()
    return Vocabulary(
        tokenizer=tokenizer,
        size=max(tokenizer.get_vocab().values()) + 1,
        bos_id=bos_id,
        pad_id=pad_id,
        eos_id=eos_id,
        unk_id=unk_id,
        mask_id=mask_id,
        fingerprint=_fingerprint(content),
        old_fingerprint=old_fingerprint,
    )


def _refuse_dropped_characters(path: Path, content: dict[str, Any]) -> None:
    """Refuse a BPE that leaves out characters that it does not know (huggingface/tokenizers#517).

    Raises:
        UserError: it does.
    """
    model = content["model"]
    if model["type"] != "BPE" or model.get("unk_token") is not None:
        return
    known = model["vocab"].keys()
    of_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
    if model.get("byte_fallback") and of_bytes <= known:
        return
    steps = json.dumps([content["pre_tokenizer"], content["normalizer"]])
    if '"ByteLevel"' in steps and set(pre_tokenizers.ByteLevel.alphabet()) <= known:
        return
    raise UserError(
        f"{path} drops the characters that it does not know: give its model an unk_token, or train "
        "it with the whole byte alphabet, as scripts/train_tokenizer.py does"
    )


def _refuse_shared_ids(path: Path, tokenizer: Tokenizer, added: list[dict[str, Any]]) -> None:
    """Refuse a tokenizer whose added tokens have the ids of other entries.

    Where ids have gaps, the library may number added tokens so, whatever the file says.
    """
    by_id: dict[int, str] = {}
    names = {entry["content"] for entry in added}
    for token, number in tokenizer.get_vocab().items():
        other = by_id.setdefault(number, token)
        if other != token and (token in names or other in names):
            raise UserError(
                f"{path}: {token!r} and {other!r} have the same id {number}, as ids of its "
                "vocabulary have gaps: write all added tokens into the vocabulary, too"
            )


def _fingerprint(content: dict[str, Any]) -> str:
    """A digest of everything in a ``tokenizer.json`` that decides the ids of documents.

    What is off or left out counts as missing: other releases of the library write it otherwise.
    """
    added = [
        # A special token's flags say how it is found in a prompt. In documents it is not.
        [entry["content"], entry["id"]] if entry["special"] else entry
        for entry in content["added_tokens"]
    ]
    parts = ("model", "normalizer", "pre_tokenizer")
    return digest([*(_told(content[part]) for part in parts), _told(added)])


def _told(value: Any) -> Any:
    """A value without what is off or empty, and without what is about places in the text."""
    if isinstance(value, list):
        return [_told(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _told(entry)
        for key, entry in value.items()
        if entry is not None and entry is not False and entry != "" and key != "trim_offsets"
    }


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
