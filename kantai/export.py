"""Export: a stock Hugging Face folder, loaded back and compared before anybody can see it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import RobertaForMaskedLM, pipeline

from kantai.config.loading import to_yaml
from kantai.errors import UserError
from kantai.model.roberta import MaskedRoberta
from kantai.storage.atomic import MANIFEST, staged
from kantai.training.metrics import read_metrics
from kantai.training.run_dir import RunDir

_MAX_DIFFERENCE = 1e-4  # of a logit, between two paths through the same fp32 weights


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
        stock = RobertaForMaskedLM(model.config)
        stock.load_state_dict(model.state_dict())
        stock.save_pretrained(folder)
        _copy_tokenizer(Path(run_dir.config.data.tokenizer), folder, run_dir.data.seq_len)
        card = _model_card(run_dir, model, lineage)
        (folder / "README.md").write_text(card, encoding="utf-8")
        difference = _difference(run_dir, model, folder)
        if not difference <= _MAX_DIFFERENCE:
            raise UserError(
                f"the exported model's logits differ from the trained one's by {difference}: "
                f"{output} was not written"
            )
    return difference


def _copy_tokenizer(source: Path, folder: Path, seq_len: int) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name != MANIFEST and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    # The model has positions for seq_len tokens only: beyond, PyTorch would fail with an index
    # out of range.
    path = folder / "tokenizer_config.json"
    config = {"tokenizer_class": "RobertaTokenizer"}
    try:
        if path.exists():
            config = json.loads(path.read_bytes())
        text = json.dumps({**config, "model_max_length": seq_len}, indent=1)
    except (ValueError, TypeError):
        raise UserError(
            f"{source / path.name} is not a tokenizer's config: bring it back from a copy"
        ) from None
    path.write_text(text + "\n", encoding="utf-8")


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
    records = read_metrics(metrics) if metrics.exists() else iter(())
    scores = [
        record
        for record in records
        if record.get("held_out/loss") is not None and record["step"] <= step
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
