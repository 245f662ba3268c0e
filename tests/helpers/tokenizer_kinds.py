"""Tokenizers of every kind that kantai accepts, trained on a text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kantai.data.tokenizer import SPECIAL_TOKENS, Vocabulary, load_tokenizer

UNKNOWN = {"unk_token": "<unk>"}
BYTES = {"initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}


def _byte_level(tokenizer: Tokenizer) -> trainers.Trainer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trainers.BpeTrainer(vocab_size=400, **BYTES, **_TRAINING)


def _byte_level_on_white_space(tokenizer: Tokenizer) -> trainers.Trainer:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return trainers.BpeTrainer(vocab_size=600, **BYTES, **_TRAINING)


def _metaspace(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()


def _bpe(tokenizer: Tokenizer) -> trainers.Trainer:
    _metaspace(tokenizer)
    return trainers.BpeTrainer(vocab_size=400, **_TRAINING)


def _unigram(tokenizer: Tokenizer) -> trainers.Trainer:
    _metaspace(tokenizer)
    return trainers.UnigramTrainer(vocab_size=400, **UNKNOWN, **_TRAINING)


def _word_piece(tokenizer: Tokenizer) -> trainers.Trainer:
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return trainers.WordPieceTrainer(vocab_size=400, **_TRAINING)


def _bert(tokenizer: Tokenizer) -> trainers.Trainer:
    trainer = _word_piece(tokenizer)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trainer


def _word_level(tokenizer: Tokenizer) -> trainers.Trainer:
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return trainers.WordLevelTrainer(vocab_size=4000, **_TRAINING)


def _suffix(tokenizer: Tokenizer) -> trainers.Trainer:
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    return trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", **_TRAINING)


_TRAINING: dict[str, Any] = {"special_tokens": list(SPECIAL_TOKENS), "show_progress": False}
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Tokenizer], trainers.Trainer]]] = {
    "byte-level BPE": (models.BPE, _byte_level),
    "byte-level BPE on white space": (models.BPE, _byte_level_on_white_space),
    "BPE": (lambda: models.BPE(**UNKNOWN), _bpe),
    "BPE that ignores merges": (lambda: models.BPE(ignore_merges=True, **UNKNOWN), _bpe),
    "BPE with a suffix": (lambda: models.BPE(end_of_word_suffix="</w>", **UNKNOWN), _suffix),
    "Unigram": (models.Unigram, _unigram),
    "WordPiece": (lambda: models.WordPiece(**UNKNOWN), _word_piece),
    "WordPiece of BERT": (lambda: models.WordPiece(**UNKNOWN), _bert),
    "WordLevel": (lambda: models.WordLevel(**UNKNOWN), _word_level),
}


def trained(kind: str, texts: list[str]) -> Tokenizer:
    """A tokenizer of one of ``KINDS``."""
    model, prepare = KINDS[kind]
    tokenizer = Tokenizer(model())
    trainer = prepare(tokenizer)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def loaded(tokenizer: Tokenizer, folder: Path) -> Vocabulary:
    """A tokenizer saved to a folder, and opened as a run opens it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def changed(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    """A copy whose ``tokenizer.json`` was edited."""
    content = json.loads(tokenizer.to_str())
    change(content)
    return Tokenizer.from_str(json.dumps(content))
