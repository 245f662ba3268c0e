"""A trained tokenizer: opened, saved, and used to encode documents of any length."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from kantai.errors import UserError
from kantai.storage.atomic import digest

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MODEL_MAX_LENGTH = 512
# The library holds about 100 bytes for each token of the texts it is given together.
_CHARACTERS_AT_ONCE = 1 << 20
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")


@dataclass(frozen=True)
class Vocabulary:
    """A trained tokenizer, its five special ids, and a fingerprint that names its vocabulary and merges."""

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

    def encode(self, texts: list[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Tokenize documents, without special tokens: one's own ``<s>`` (HTML has it) or ``<mask>`` is text like any other.

        Returns:
            The ids of all documents, one after another, and how many each has.
        """
        ids: list[npt.NDArray[np.uint32]] = [np.zeros(0, np.uint32)]
        lengths: list[int] = []
        part_counts: list[int] = []

        def parts() -> Iterator[str]:
            for text in texts:
                part_counts.append(0)
                for part in text_parts(text):
                    part_counts[-1] += 1
                    yield part

        self.tokenizer.encode_special_tokens = True
        try:
            for group in batched_texts(parts()):
                lists = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(group, add_special_tokens=False)]
                lengths += map(len, lists)
                ids.append(np.fromiter(itertools.chain.from_iterable(lists), np.uint32))
        finally:
            self.tokenizer.encode_special_tokens = False
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        return np.concatenate(ids), np.diff(ends[np.cumsum([0, *part_counts])])


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json``, ``vocab.json``, ``merges.txt`` and what ``AutoTokenizer`` needs to load them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    # "{" rather than the library's own writer: it would take seconds of imports for these few lines.
    mask = {"content": "<mask>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    config = {
        "tokenizer_class": "RobertaTokenizer",
        "model_max_length": MODEL_MAX_LENGTH,
        "add_prefix_space": False,
        "trim_offsets": True,
        "errors": "replace",
        **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL_TOKENS[:4], strict=True)),
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": mask,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Vocabulary:
    """Open a tokenizer folder, ours or any Hugging Face one with RoBERTa's special tokens.

    Raises:
        UserError: no ``tokenizer.json`` there, an unreadable one, or one without the special tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"no tokenizer at {folder}: train one with scripts/train_tokenizer.py")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        model = json.loads(tokenizer.to_str())["model"]
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer: {error}") from None
    # A Hugging Face file may carry the settings of its last use, which would cut or fill documents without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = {token: number for token in SPECIAL_TOKENS if (number := tokenizer.token_to_id(token)) is not None}
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise UserError(f"{path} lacks {' '.join(missing)}: a RoBERTa tokenizer has {' '.join(SPECIAL_TOKENS)}")
    fingerprint = digest([model["vocab"], model.get("merges"), ids])
    bos_id, pad_id, eos_id, unk_id, mask_id = ids.values()
    return Vocabulary(tokenizer, tokenizer.get_vocab_size(), bos_id, pad_id, eos_id, unk_id, mask_id, fingerprint)


def text_parts(text: str) -> Iterator[str]:
    """A text in parts of one to two million characters, which have its tokens.

    It is cut before a single space between two letters or digits. There GPT-2's pattern always parts two words: what comes before
    cannot match the space, and what begins with it is matched without a look back. Only where a million characters have no such
    place a word may be cut.
    """
    start = 0
    while len(text) - start > 2 * _CHARACTERS_AT_ONCE:
        place = _BETWEEN_WORDS.search(text, start + _CHARACTERS_AT_ONCE, start + 2 * _CHARACTERS_AT_ONCE)
        stop = place.start() if place else start + 2 * _CHARACTERS_AT_ONCE
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


def batched_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive texts, as many together as make a million characters."""
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group
