"""Train RoBERTa's byte-level BPE, and measure how well a vocabulary fits a text."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from kantai.data.tokenizer import SPECIAL_TOKENS, Vocabulary, batched_texts, text_parts
from kantai.errors import UserError

_MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # the specials and all bytes
_MAX_SAMPLE_BYTES = 4_000_000_000
_WORD = re.compile(r"\w+")
# How byte-level BPE writes the bytes 0x80 to 0xFF, of which characters outside of ASCII are made (GPT-2's table).
_HIGH_BYTES = {
    character
    for character in pre_tokenizers.ByteLevel.alphabet()
    if 0xA1 <= ord(character) <= 0xFF or ord(character) > 0x121
}


def check_numbers(vocab_size: int, min_frequency: int, sample_bytes: float = 0) -> None:
    """Refuse what no tokenizer can be trained with.

    Raises:
        UserError: ``vocab_size`` has no room for the special tokens and the 256 bytes, ``min_frequency`` is no number of occurrences, or
            the library's 32-bit counts of pairs could overflow with ``sample_bytes`` of text (huggingface/tokenizers#1170).
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size {vocab_size} is too small: the special tokens and the 256 bytes alone "
            f"are {_MIN_VOCAB_SIZE}"
        )
    if min_frequency < 1:
        raise UserError(f"--min_frequency {min_frequency} must be at least 1")
    if not 0 <= sample_bytes <= _MAX_SAMPLE_BYTES:
        raise UserError(
            f"--sample_bytes {sample_bytes:g} must lie between 0 and {_MAX_SAMPLE_BYTES:g}: more "
            "text can overflow the counts"
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, min_frequency: int, *, show_progress: bool = False
) -> Tokenizer:
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
    specials = [
        AddedToken(token, special=True, normalized=False, lstrip=token == "<mask>")
        for token in SPECIAL_TOKENS
    ]
    tokenizer.train_from_iterator(
        itertools.chain.from_iterable(map(text_parts, texts)),
        BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=show_progress,
        ),
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
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
    for group in batched_texts(texts):
        for text in group:
            text_bytes += len(text.encode())
            spaced_words += len(text.split())
            words.update(_WORD.findall(text))
        counts += np.bincount(vocabulary.encode(group)[0], minlength=vocabulary.size)
    tokens_of_words = vocabulary.encode([f" {word}" for word in words])[1]
    whole = (np.fromiter(words.values(), np.int64) * (tokens_of_words == 1)).sum()
    tokens = max(1, int(counts.sum()))
    high_bytes = [
        number
        for byte in _HIGH_BYTES
        if (number := vocabulary.tokenizer.token_to_id(byte)) is not None
    ]
    return {
        "bytes": text_bytes,
        "bytes_per_token": text_bytes / tokens,
        "words_per_token": spaced_words / tokens,
        "one_token_words": int(whole) / max(1, words.total()),
        "used_entries": int((counts > 0).sum()) / (vocabulary.size - len(SPECIAL_TOKENS)),
        "byte_tokens": int(counts[high_bytes].sum()) / tokens,
    }
