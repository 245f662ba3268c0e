"""Train RoBERTa's byte-level BPE tokenizer, and measure how well a vocabulary fits a text."""

import contextlib
import itertools
import json
import re
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from kantai.data.tokenizer import SPECIAL_TOKENS, Vocabulary, batched_texts, text_parts
from kantai.errors import UserError
from kantai.preprocessing.training_progress import bars_of_library, is_terminal

_MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # the special tokens and all bytes
_MAX_SAMPLE_BYTES = 2_000_000_000  # a pair takes a byte, and its count 31 bits
# Of 400,000 letters of DNA, training took two minutes, and four times as long for twice as many:
# the library goes through a whole word for each of its merges.
_MAX_WORD_CHARACTERS = 1000
_LONG_SPACE = re.compile(rf"\s{{{_MAX_WORD_CHARACTERS + 1}}}")
_SECONDS_TO_END = 1.0
# Byte-level BPE writes the bytes 0x80 to 0xFF as these characters (GPT-2's table). Characters
# outside of ASCII consist of such bytes.
_HIGH_BYTES = {
    character
    for character in pre_tokenizers.ByteLevel.alphabet()
    if 0xA1 <= ord(character) <= 0xFF or ord(character) > 0x121
}


def check_settings(
    vocab_size: int,
    min_frequency: int,
    sample_bytes: float = 0,
    special_tokens: Collection[str] = (),
) -> None:
    """Refuse settings with which no tokenizer can be trained.

    Raises:
        UserError: ``vocab_size`` has no room for the special tokens and the 256 bytes,
            ``min_frequency`` is below 1, the library's 32-bit counts of pairs could overflow
            with ``sample_bytes`` of text (huggingface/tokenizers#1170), or ``special_tokens``
            cannot be entries beside the others.
    """
    min_vocab_size = _MIN_VOCAB_SIZE + len(special_tokens)
    if vocab_size < min_vocab_size:
        raise UserError(
            f"--vocab_size {vocab_size} is too small: "
            f"the special tokens and the 256 bytes alone are {min_vocab_size}"
        )
    taken = {*SPECIAL_TOKENS, *pre_tokenizers.ByteLevel.alphabet()}
    for token in special_tokens:
        if token in taken:
            raise UserError(f"--special_tokens: {token!r} is an entry already; leave it out")
        if not token or token != token.strip() or "\0" in token:
            raise UserError(
                f"--special_tokens: {token!r} must be something, and have no white space around it"
            )
        taken.add(token)
    if min_frequency < 1:
        raise UserError(f"--min_frequency {min_frequency} must be at least 1")
    if not 0 <= sample_bytes <= _MAX_SAMPLE_BYTES:
        raise UserError(
            f"--sample_bytes {sample_bytes:g} must lie between 0 and {_MAX_SAMPLE_BYTES:g}: "
            "more text can overflow the counts"
        )


@dataclass
class LongWords:
    """Words that were cut for training.

    Attributes:
        count: how many.
        longest: characters of the longest.
    """

    count: int = 0
    longest: int = 0

    def notes(self) -> Iterator[str]:
        """Yield a line for the user if there are any."""
        if self.count:
            yield (
                f"{self.count:,} words have more than {_MAX_WORD_CHARACTERS:,} characters (the "
                f"longest {self.longest:,}) and were cut for training: if they are no language, "
                "leave them out"
            )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    min_frequency: int,
    *,
    special_tokens: Collection[str] = (),
    long_words: LongWords | None = None,
) -> Tokenizer:
    """Train a byte-level BPE with RoBERTa's special tokens as ids 0 to 4.

    Memory grows with the number of different words in the texts.

    Args:
        texts: documents, together at most 2 GB.
        vocab_size: maximum number of entries; a small corpus fills fewer.
        min_frequency: how often a pair must occur to become an entry.
        special_tokens: entries behind RoBERTa's five. Each is one token wherever a text has it.
        long_words: counts the words that are cut.

    Raises:
        UserError: see :func:`check_settings`.
    """
    check_settings(vocab_size, min_frequency, special_tokens=special_tokens)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As in RoBERTa, <mask> takes the space before it: "human <mask>" has no lone space token.
    specials = [
        AddedToken(token, special=True, normalized=False, lstrip=token == "<mask>")
        for token in SPECIAL_TOKENS
    ]
    specials += [AddedToken(token, normalized=False) for token in special_tokens]
    shows_progress = is_terminal()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=shows_progress,
        progress_format="json" if shows_progress else "silent",
    )
    parts = itertools.chain.from_iterable(map(text_parts, texts))
    short = _cut_long_words(parts, tokenizer.pre_tokenizer, long_words or LongWords())

    def train(texts: Iterator[str]) -> None:
        bars = bars_of_library() if shows_progress else contextlib.nullcontext()
        with bars:
            tokenizer.train_from_iterator(texts, trainer)

    _end_at_interrupt(train, short)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return _with_ordinary(tokenizer, special_tokens) if special_tokens else tokenizer


def _with_ordinary(tokenizer: Tokenizer, tokens: Collection[str]) -> Tokenizer:
    """Have tokens be found in documents, where special ones are text like any other.

    The library's trainer marks all tokens that it is given as special.
    """
    content = json.loads(tokenizer.to_str())
    for entry in content["added_tokens"]:
        entry["special"] &= entry["content"] not in tokens
    return Tokenizer.from_str(json.dumps(content))


def _cut_long_words(
    texts: Iterable[str], pre_tokenizer: pre_tokenizers.PreTokenizer, found: LongWords
) -> Iterator[str]:
    """Cut words that would take the square of their length to train on."""
    for text in texts:
        if not _may_have_long_words(text):
            yield text
            continue
        begin = 0
        for _, (start, stop) in pre_tokenizer.pre_tokenize_str(text):
            if stop - start <= _MAX_WORD_CHARACTERS:
                continue
            found.count += 1
            found.longest = max(found.longest, stop - start)
            yield text[begin:start]
            for cut in range(start, stop, _MAX_WORD_CHARACTERS):
                yield text[cut : min(cut + _MAX_WORD_CHARACTERS, stop)]
            begin = stop
        yield text[begin:]


def _may_have_long_words(text: str) -> bool:
    if len(text) <= _MAX_WORD_CHARACTERS:
        return False
    longest = max(map(len, text.split()), default=0)
    return longest > _MAX_WORD_CHARACTERS or _LONG_SPACE.search(text) is not None


def _end_at_interrupt(work: Callable[[Iterator[str]], None], texts: Iterable[str]) -> None:
    """Do some work on texts in a thread, so that Ctrl-C ends the program at once.

    Python heeds no signal while its main thread is in the library, which may take hours.
    """
    errors: list[BaseException] = []
    interrupted = threading.Event()

    def texts_until_interrupted() -> Iterator[str]:
        for text in texts:
            if interrupted.is_set():
                raise KeyboardInterrupt
            yield text

    def run() -> None:
        try:
            work(texts_until_interrupted())
        except BaseException as error:  # the caller's to raise
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        interrupted.set()
        thread.join(_SECONDS_TO_END)
        raise
    if errors:
        raise errors[0]


def describe_coverage(fit: dict[str, float]) -> str:
    """A line for the user."""
    return (
        f"{fit['bytes_per_token']:.2f} bytes and {fit['words_per_token']:.2f} words a token, "
        f"{fit['one_token_words']:.0%} of words whole"
    )


def refuse_bytes_alone(vocabulary: Vocabulary, special_tokens: Collection[str]) -> None:
    """Refuse a vocabulary that learned nothing from its texts.

    Raises:
        UserError: it has no entry beside the special tokens and the bytes.
    """
    if vocabulary.size == _MIN_VOCAB_SIZE + len(special_tokens):
        raise UserError(
            "the corpus filled no entry beyond the single bytes: "
            "bring more text, or lower --min_frequency"
        )


@cache
def _words() -> re.Pattern[str]:
    characters = map(chr, range(sys.maxunicode + 1))
    marks = "".join(mark for mark in characters if unicodedata.category(mark)[0] == "M")
    return re.compile(rf"[\w{marks}]+")


def coverage(vocabulary: Vocabulary, texts: Iterable[str]) -> dict[str, float]:
    """Measure how well a vocabulary fits texts, best of all texts that it was not trained on.

    Returns:
        ``bytes``: bytes of UTF-8 in the texts.
        ``bytes_per_token``: the higher, the shorter the sequences. It compares vocabularies of one
        language only.
        ``words_per_token``: the same for words, divided by white space.
        ``one_token_words``: share of the words (letters and digits with their combining marks,
        after a space) that are one token.
        ``used_entries``: share of the vocabulary that occurs.
        ``byte_tokens``: share of the tokens that are one byte of a character outside of ASCII; the
        vocabulary lacks these characters.
    """
    text_bytes = 0
    spaced_words = 0
    words: Counter[str] = Counter()
    counts = np.zeros(vocabulary.size, np.int64)
    for group in batched_texts(texts):
        for text in group:
            text_bytes += len(text.encode())
            spaced_words += len(text.split())
            words.update(_words().findall(text))
        counts += np.bincount(vocabulary.encode(group)[0], minlength=vocabulary.size)
    tokens_of_words = vocabulary.encode([f" {word}" for word in words])[1]
    whole = (np.fromiter(words.values(), np.int64) * (tokens_of_words == 1)).sum()
    tokens = max(1, int(counts.sum()))
    ids = (vocabulary.tokenizer.token_to_id(byte) for byte in _HIGH_BYTES)
    high_bytes = [number for number in ids if number is not None]
    return {
        "bytes": text_bytes,
        "bytes_per_token": text_bytes / tokens,
        "words_per_token": spaced_words / tokens,
        "one_token_words": int(whole) / max(1, words.total()),
        "used_entries": int((counts > 0).sum()) / (vocabulary.size - len(SPECIAL_TOKENS)),
        "byte_tokens": int(counts[high_bytes].sum()) / tokens,
    }
