"""Which ids? Train and load RoBERTa's byte-level BPE."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from kantai import UserError
from kantai.checkpoint import digest

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MODEL_MAX_LENGTH = 512
_LEAST_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # the specials and all bytes


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

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of documents, without special tokens: a document's own ``<s>`` (HTML has it) or ``<mask>`` is text like any other."""
        self.tokenizer.encode_special_tokens = True
        try:
            return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            self.tokenizer.encode_special_tokens = False


def train_tokenizer(texts: Iterable[str], vocab_size: int, min_frequency: int, *, show_progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE with RoBERTa's special tokens as ids 0 to 4.

    Args:
        texts: documents.
        vocab_size: most entries; a small corpus fills fewer.
        min_frequency: how often a pair must occur to become an entry.

    Raises:
        UserError: ``vocab_size`` has no room for the special tokens and the 256 bytes.
    """
    if vocab_size < _LEAST_VOCAB_SIZE:
        raise UserError(f"--vocab_size {vocab_size} is too small: the special tokens and the 256 bytes alone are {_LEAST_VOCAB_SIZE}")
    if min_frequency < 1:
        raise UserError(f"--min_frequency {min_frequency} must be at least 1")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # <mask> takes the space before it, as in RoBERTa: "human <mask>" leaves no lone space token behind "human".
    specials = [AddedToken(token, special=True, normalized=False, lstrip=token == "<mask>") for token in SPECIAL_TOKENS]
    tokenizer.train_from_iterator(
        texts,
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
    ids = {token: number for token in SPECIAL_TOKENS if (number := tokenizer.token_to_id(token)) is not None}
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise UserError(f"{path} lacks {' '.join(missing)}: a RoBERTa tokenizer has {' '.join(SPECIAL_TOKENS)}")
    fingerprint = digest([model["vocab"], model.get("merges"), ids])
    bos_id, pad_id, eos_id, unk_id, mask_id = ids.values()
    return Vocabulary(tokenizer, tokenizer.get_vocab_size(), bos_id, pad_id, eos_id, unk_id, mask_id, fingerprint)
