"""Prompts from held-out documents, with a word or character hidden behind ``<mask>``."""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator

from kantai.data.rng import TokenIds
from kantai.data.shards import Split
from kantai.data.tokenizer import MASK_TOKEN, Vocabulary

_PROMPTS = 3
_PROMPT_TOKENS = 24
_DOCUMENTS_READ = 1000
_WORD_CHARACTERS = 20  # more between spaces is a sentence of a language without them

_Hidden = tuple[str, int, int]  # a text, and where in it the hidden part begins and ends
_Finder = Callable[[str, Vocabulary], Iterator[tuple[int, int]]]


def derive_prompts(held_out: Split, vocabulary: Vocabulary, seq_len: int) -> list[str]:
    """Texts with one ``<mask>`` each: beginnings of up to three held-out documents.

    Where a language puts spaces between words, a mask hides a whole word: if possible one of a
    single token and of at least four letters. Elsewhere it hides a token of whole characters.
    """
    length = min(_PROMPT_TOKENS, seq_len - 2)
    documents = list(itertools.islice(_documents(held_out), _DOCUMENTS_READ))
    # Long documents come first: short ones are headings as often as not.
    long_first = sorted(documents, key=lambda document: len(document) < length)
    prompts: dict[int, str] = {}  # by the document's number: no document gives two
    for find, is_wanted in _PREFERENCES:
        for number, document in enumerate(long_first):
            if len(prompts) == _PROMPTS:
                break
            if number not in prompts:
                prompt = _hide(document[:length].tolist(), vocabulary, find, is_wanted)
                if prompt is not None:
                    prompts[number] = prompt
    return list(prompts.values())


def _documents(split: Split) -> Iterator[TokenIds]:
    """The documents of a split without their ``</s>``."""
    for shard in split:
        for start, stop in itertools.pairwise(shard.boundaries):
            yield shard.tokens[start : stop - 1]


def _hide(
    document: list[int],
    vocabulary: Vocabulary,
    find: _Finder,
    is_wanted: Callable[[_Hidden], bool],
) -> str | None:
    """A document's text with ``<mask>`` in its middle; None if there is nothing wanted to hide."""
    text = vocabulary.tokenizer.decode(document, skip_special_tokens=False)
    text = text.rstrip("\ufffd")  # a character of several tokens may be cut at the end
    if MASK_TOKEN in text:
        return None
    wanted = [
        (start, stop)
        for start, stop in find(text, vocabulary)
        if is_wanted((text, start, stop)) and (text[:start] + text[stop:]).strip()
    ]
    if not wanted:
        return None
    start, stop = wanted[len(wanted) // 2]
    return text[:start] + MASK_TOKEN + text[stop:]


def _tokens(text: str, vocabulary: Vocabulary) -> Iterator[tuple[int, int]]:
    """Places of tokens that share no character with others, without the white space before.

    Tokens that are parts of one character all have the place of the whole character.
    """
    tokenizer = vocabulary.tokenizer
    tokenizer.encode_special_tokens = True
    try:
        spans = tokenizer.encode(text, add_special_tokens=False).offsets
    finally:
        tokenizer.encode_special_tokens = False
    for number, (start, stop) in enumerate(spans):
        before = spans[number - 1][1] if number else 0
        after = spans[number + 1][0] if number + 1 < len(spans) else stop
        if before <= start < stop <= after:
            yield stop - len(text[start:stop].lstrip()), stop


def _words(text: str, _: Vocabulary) -> Iterator[tuple[int, int]]:
    """Places of what stands between white space, of as many tokens as it may be."""
    for word in re.finditer(rf"\S{{1,{_WORD_CHARACTERS}}}(?!\S)", text):
        yield word.span()


def _is_kind(character: str, kinds: str) -> bool:
    """Whether a character is of one of these kinds: L a letter, M a mark such as a vowel sign."""
    return unicodedata.category(character)[0] in kinds


def _is_letters(hidden: _Hidden) -> bool:
    """Whether it is letters, each with its marks."""
    text, start, stop = hidden
    letters = text[start:stop]
    parts_letter = _is_kind(letters[:1] or " ", "M") or _is_kind(text[stop : stop + 1] or " ", "M")
    return start < stop and not parts_letter and all(_is_kind(c, "LM") for c in letters)


def _is_word(hidden: _Hidden) -> bool:
    """Whether letters stand between spaces."""
    text, start, stop = hidden
    inside = 0 < start and stop < len(text)
    return inside and text[start - 1] == " " == text[stop] and _is_letters(hidden)


def _is_long_word(hidden: _Hidden) -> bool:
    """Whether it is a word of at least four letters that stands behind another one."""
    text, start, stop = hidden
    return stop - start >= 4 and " " in text[: start - 1] and _is_word(hidden)


def _is_visible(hidden: _Hidden) -> bool:
    text, start, stop = hidden
    return start < stop and text[start:stop].isprintable() and "\ufffd" not in text[start:stop]


# What to hide, the best first. A word of several tokens is second to a word of one, which is all
# that a model can fill in; but GPT-2's pattern cuts most words of Hindi at their vowel signs.
_PREFERENCES = (
    (_tokens, _is_long_word),
    (_tokens, _is_word),
    (_words, _is_word),
    (_tokens, _is_letters),
    (_tokens, _is_visible),
)
