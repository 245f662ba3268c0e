"""Which ids? Train and load RoBERTa's byte-level BPE."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from kantai import UserError
from kantai.checkpoint import digest

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MODEL_MAX_LENGTH = 512
_LEAST_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # the specials and all bytes
_MOST_SAMPLE_BYTES = 4_000_000_000
# The library holds about 100 bytes for each token of the texts it is given together.
_CHARACTERS_AT_ONCE = 1 << 20
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
_WORD = re.compile(r"\w+")
# How byte-level BPE writes the bytes 0x80 to 0xFF, of which characters outside of ASCII are made (GPT-2's table).
_HIGH_BYTES = {character for character in pre_tokenizers.ByteLevel.alphabet() if 0xA1 <= ord(character) <= 0xFF or ord(character) > 0x121}


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
                for part in _parts(text):
                    part_counts[-1] += 1
                    yield part

        self.tokenizer.encode_special_tokens = True
        try:
            for group in _groups(parts()):
                lists = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(group, add_special_tokens=False)]
                lengths += map(len, lists)
                ids.append(np.fromiter(itertools.chain.from_iterable(lists), np.uint32))
        finally:
            self.tokenizer.encode_special_tokens = False
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        return np.concatenate(ids), np.diff(ends[np.cumsum([0, *part_counts])])


def check_numbers(vocab_size: int, min_frequency: int, sample_bytes: float = 0) -> None:
    """Refuse what no tokenizer can be trained with.

    Raises:
        UserError: ``vocab_size`` has no room for the special tokens and the 256 bytes, ``min_frequency`` is no number of occurrences, or
            the library's 32-bit counts of pairs could overflow with ``sample_bytes`` of text (huggingface/tokenizers#1170).
    """
    if vocab_size < _LEAST_VOCAB_SIZE:
        raise UserError(f"--vocab_size {vocab_size} is too small: the special tokens and the 256 bytes alone are {_LEAST_VOCAB_SIZE}")
    if min_frequency < 1:
        raise UserError(f"--min_frequency {min_frequency} must be at least 1")
    if not 0 <= sample_bytes <= _MOST_SAMPLE_BYTES:
        raise UserError(f"--sample_bytes {sample_bytes:g} must lie between 0 and {_MOST_SAMPLE_BYTES:g}: more text can overflow the counts")


def train_tokenizer(texts: Iterable[str], vocab_size: int, min_frequency: int, *, show_progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE with RoBERTa's special tokens as ids 0 to 4.

    The memory it takes grows with the different words of the texts, and so with a part of their size.

    Args:
        texts: documents, together at most 4 GB.
        vocab_size: most entries; a small corpus fills fewer.
        min_frequency: how often a pair must occur to become an entry.

    Raises:
        UserError: see :func:`check_numbers`.
    """
    check_numbers(vocab_size, min_frequency)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # <mask> takes the space before it, as in RoBERTa: "human <mask>" leaves no lone space token behind "human".
    specials = [AddedToken(token, special=True, normalized=False, lstrip=token == "<mask>") for token in SPECIAL_TOKENS]
    tokenizer.train_from_iterator(
        itertools.chain.from_iterable(map(_parts, texts)),
        BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=show_progress,
        ),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return tokenizer


def coverage(vocabulary: Vocabulary, texts: Iterable[str]) -> dict[str, float]:
    """How well a vocabulary fits texts, best ones that it was not trained on.

    Returns:
        ``bytes``: of UTF-8, that were looked at.
        ``bytes_per_token``: more is shorter sequences. Compare it within one language only.
        ``words_per_token``: of words between white space.
        ``one_token_words``: share of the words (of letters and digits, behind a space) that are one token.
        ``used_entries``: share of the vocabulary that occurs.
        ``byte_tokens``: share of the tokens that are one byte of a character outside of ASCII: those that the vocabulary lacks.
    """
    text_bytes = spaced_words = 0
    words: Counter[str] = Counter()
    counts = np.zeros(vocabulary.size, np.int64)
    for group in _groups(texts):
        for text in group:
            text_bytes += len(text.encode())
            spaced_words += len(text.split())
            words.update(_WORD.findall(text))
        counts += np.bincount(vocabulary.encode(group)[0], minlength=vocabulary.size)
    tokens_of_words = vocabulary.encode([f" {word}" for word in words])[1]
    whole = (np.fromiter(words.values(), np.int64) * (tokens_of_words == 1)).sum()
    tokens = max(1, int(counts.sum()))
    high_bytes = [number for byte in _HIGH_BYTES if (number := vocabulary.tokenizer.token_to_id(byte)) is not None]
    return {
        "bytes": text_bytes,
        "bytes_per_token": text_bytes / tokens,
        "words_per_token": spaced_words / tokens,
        "one_token_words": int(whole) / max(1, words.total()),
        "used_entries": int((counts > 0).sum()) / (vocabulary.size - len(SPECIAL_TOKENS)),
        "byte_tokens": int(counts[high_bytes].sum()) / tokens,
    }


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


def _parts(text: str) -> Iterator[str]:
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


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
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
