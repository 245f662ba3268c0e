"""Prompts from held-out documents, with a whole word hidden behind ``<mask>``."""

import itertools
from collections.abc import Iterator

from kantai.data.rng import TokenIds
from kantai.data.shards import Split
from kantai.data.tokenizer import MASK_TOKEN, Vocabulary

_PROMPTS = 3
_PROMPT_TOKENS = 24
_DOCUMENTS_READ = 1000


def derive_prompts(held_out: Split, vocabulary: Vocabulary, seq_len: int) -> list[str]:
    """Texts with one ``<mask>`` each: beginnings of up to three held-out documents."""
    length = min(_PROMPT_TOKENS, seq_len - 2)
    documents = itertools.islice(_documents(held_out), _DOCUMENTS_READ)
    # Long documents come first: short ones are headings as often as not.
    long_first = sorted(documents, key=lambda document: len(document) < length)
    prompts = (_hide_word(document[:length].tolist(), vocabulary) for document in long_first)
    return list(itertools.islice(filter(None, prompts), _PROMPTS))


def _documents(split: Split) -> Iterator[TokenIds]:
    """The documents of a split without their ``</s>``."""
    for shard in split:
        for start, stop in itertools.pairwise(shard.boundaries):
            yield shard.tokens[start : stop - 1]


def _hide_word(document: list[int], vocabulary: Vocabulary) -> str | None:
    """A document's text with ``<mask>`` for a word of one token in its middle.

    None if there is no word of one token that has at least four letters.
    """
    tokenizer = vocabulary.tokenizer
    tokens = [tokenizer.id_to_token(token) or "" for token in document]
    starts = [token.startswith("Ġ") for token in tokens]
    words = [
        place
        for place in range(2, len(tokens) - 1)
        if starts[place] and starts[place + 1]
        if len(tokens[place]) > 4 and tokens[place][1:].isalpha()
    ]
    if not words:
        return None
    hidden = words[len(words) // 2]
    before = tokenizer.decode(document[:hidden])
    after = tokenizer.decode(document[hidden + 1 :])
    return f"{before} {MASK_TOKEN}{after}"
