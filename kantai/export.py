"""Export: a stock Hugging Face folder, loaded back and compared before anybody can see it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import RobertaForMaskedLM, pipeline

from kantai.config.loading import to_yaml
from kantai.data.tokenizer import Vocabulary
from kantai.errors import UserError
from kantai.model.roberta import MaskedRoberta
from kantai.storage.atomic import staged
from kantai.training.metrics import read_metrics
from kantai.training.run_dir import RunDir

_MAX_DIFFERENCE = 1e-4  # of a logit, between two paths through the same fp32 weights
# Folders of earlier releases of transformers have these beside tokenizer_config.json.
_SPECIAL_TOKENS_FILES = ("special_tokens_map.json", "added_tokens.json")


def export(run_dir: RunDir, model: MaskedRoberta, step: int, output: Path) -> float:
    """Write weights (safetensors), config, tokenizer and model card.

    They are published only after ``pipeline("fill-mask")`` has given the same logits.

    Args:
        model: with the weights of ``step``.

    Returns:
        The largest difference between a logit of the trained model and of the one loaded back.

    Raises:
        UserError: ``output`` exists, or the model that was loaded back is another one.
    """
    lineage = {"step": step, "run": str(run_dir.path), **run_dir.lineage}
    with staged(output, kind="model", lineage=lineage) as folder:
        _write_model(model, folder)
        source = Path(run_dir.config.data.tokenizer)
        _write_tokenizer(source, folder, run_dir.data.vocabulary, run_dir.data.seq_len)
        card = _model_card(run_dir, model, lineage)
        (folder / "README.md").write_text(card, encoding="utf-8")
        difference = _difference(run_dir, model, folder)
        if not difference <= _MAX_DIFFERENCE:
            raise UserError(
                f"the exported model's logits differ from the trained one's by {difference}: "
                f"{output} was not written"
            )
    return difference


def _write_model(model: MaskedRoberta, folder: Path) -> None:
    stock = RobertaForMaskedLM(model.config)
    stock.load_state_dict(model.state_dict())
    state = stock.state_dict()
    # transformers 4.43 to 4.50 read the bias under this name alone; without it, they take zeros.
    state["lm_head.decoder.bias"] = state["lm_head.bias"].clone()
    stock.save_pretrained(folder, state_dict=state)


def _write_tokenizer(source: Path, folder: Path, vocabulary: Vocabulary, seq_len: int) -> None:
    """Write a tokenizer's files anew. What else lies in its folder is not taken along."""
    tokenizer = vocabulary.tokenizer
    text = _for_older_readers(tokenizer)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer.model.save(str(folder))
    for name in _SPECIAL_TOKENS_FILES:
        if (source / name).exists():
            _write_json(folder / name, _read_json(source / name))
    path = source / "tokenizer_config.json"
    config = _read_json(path) if path.exists() else {"tokenizer_class": "RobertaTokenizer"}
    config.pop("auto_map", None)  # names a Python file, which is not taken along
    # The model has positions for seq_len tokens only: beyond, PyTorch would fail with an index
    # out of range.
    _write_json(folder / path.name, {**config, "model_max_length": seq_len})


def _for_older_readers(tokenizer: Tokenizer) -> str:
    """A ``tokenizer.json`` as tokenizers before 0.20 read it, which transformers up to 4.44 bring.

    They know merges as strings alone, which a token with a space in it does not allow, and before
    0.15 they know no ``prepend_scheme``.
    """
    tree = json.loads(tokenizer.to_str())
    merges = tree["model"].get("merges")
    if merges and not any(" " in token for merge in merges for token in merge):
        tree["model"]["merges"] = [" ".join(merge) for merge in merges]
    for part in _metaspaces([tree.get("pre_tokenizer"), tree.get("decoder")]):
        part["add_prefix_space"] = part["prepend_scheme"] != "never"
    before = tokenizer.to_str(pretty=True)
    after = json.dumps(tree, indent=2, ensure_ascii=False)
    # Both are read once, which may move the last bit of a score.
    is_equal = Tokenizer.from_str(after).to_str() == Tokenizer.from_str(before).to_str()
    return after if is_equal else before


def _metaspaces(tree: Any) -> Iterator[dict[str, Any]]:
    """The parts of a tokenizer that take spaces for letters, as SentencePiece does."""
    if isinstance(tree, dict) and "prepend_scheme" in tree:
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(part, dict | list):
            yield from _metaspaces(part)


def _read_json(path: Path) -> dict[str, Any]:
    """An object from a file of a tokenizer's folder."""
    folder = path.parent.resolve()
    # The cache of the Hugging Face Hub links to its blobs.
    if path.resolve().parent not in (folder, folder.parent.parent / "blobs"):
        raise UserError(f"{path} is a link out of its folder: put the file itself there")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a tokenizer's config: bring it back from a copy")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _difference(run_dir: RunDir, model: MaskedRoberta, folder: Path) -> float:
    """Compare the trained model with the pipeline of a folder, on one held-out sequence."""
    vocabulary = run_dir.data.vocabulary
    batches, _ = run_dir.data.held_out_batches(rows=1)
    ids = torch.from_numpy(batches.micro_batch(0, 0, 0).input_ids)
    ids = ids[:, ids[0] != vocabulary.pad_id]
    loaded = pipeline("fill-mask", model=str(folder), device="cpu")
    text = vocabulary.tokenizer.decode(ids[0, 1:9].tolist())
    if loaded.tokenizer(text).input_ids != vocabulary.tokenizer.encode(text).ids:
        return float("inf")
    trained = model.cpu().float().eval()(ids).logits
    exported = loaded.model.eval()(ids).logits.float()
    return float((exported - trained).abs().max())


def _model_card(run_dir: RunDir, model: MaskedRoberta, lineage: dict[str, Any]) -> str:
    data = run_dir.data
    front = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["roberta", "fill-mask", "kantai"],
    }
    batch_size = run_dir.config.batch.global_batch_size
    tokens = data.shards.manifest["splits"]["train"]["tokens"]
    facts = {
        "parameters": f"{model.num_parameters():,}",
        "steps": f"{lineage['step']:,} of {batch_size} sequences of {data.seq_len} tokens",
        "training split": f"{tokens:,} tokens",
        "unigram entropy": f"{data.unigram_entropy:.3f} nats a token",
        **_last_score(run_dir.path / "metrics.jsonl", lineage["step"]),
    }
    fingerprints = {key: lineage[key] for key in ("config", "shards", "tokenizer", "code")}
    return "\n".join(
        [
            f"---\n{to_yaml(front)}---\n",
            f"# {run_dir.path.name}\n",
            "A RoBERTa masked language model, pretrained from scratch",
            f"with kantai {lineage['versions']['kantai']}.\n",
            "| | |\n|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
            "\n## Lineage\n\nSHA-256 of what decided the result.\n\n| | |\n|---|---|",
            *(f"| {key} | `{value}` |" for key, value in fingerprints.items()),
            *(f"| {name} | {version} |" for name, version in lineage["versions"].items()),
            f"\n## Settings\n\n```yaml\n{to_yaml(lineage['settings'])}```\n",
        ]
    )


def _last_score(metrics: Path, step: int) -> dict[str, str]:
    """The last held-out score up to a step, for the card."""
    records = read_metrics(metrics, "held_out/loss") if metrics.exists() else iter(())
    scores = [
        record
        for record in records
        if isinstance(record["held_out/loss"], float) and record["step"] <= step
    ]
    if not scores:
        return {}
    last = scores[-1]
    loss = last["held_out/loss"]
    return {
        "held-out loss": f"{loss:.3f} nats a masked token (step {last['step']})",
        "held-out accuracy": f"{last['held_out/accuracy']:.1%}",
        "held-out perplexity": f"{np.exp(loss):,.1f}",
    }
