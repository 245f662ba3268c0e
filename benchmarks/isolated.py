"""Is packing ``isolated`` exact on this machine, and how fast is it? Made-up documents, a model of random weights, no files.

python benchmarks/isolated.py

The logits of documents that share rows, and the gradient of the whole batch, are compared with those of each document alone in fp32.
In bf16 they may differ by twice what each document alone in bf16 differs by. Exit code 1 where they differ by more.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import RobertaConfig

from kantai.config.batch_plan import BatchPlan
from kantai.data.batches import Batches, Stage
from kantai.data.loader import MicroBatch
from kantai.data.masking import IGNORED_LABEL, Masker
from kantai.data.packing import Contiguous
from kantai.data.shards import Shard, Split
from kantai.data.shuffle import Sequential
from kantai.model.attention import ATTENTION
from kantai.model.roberta import MaskedRoberta

BOS, PAD, EOS, MASK = 0, 1, 2, 4
FP32_TOLERANCE = 1e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Found = tuple[Tensor, Tensor]  # logits [tokens, vocabulary], gradient of all parameters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=32 if DEVICE.type == "cuda" else 4,
        help="of a batch that is timed",
    )
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument(
        "--mean_document", type=int, default=150, help="mean length of a document, in tokens"
    )
    parser.add_argument("--layers", type=int, default=12 if DEVICE.type == "cuda" else 2)
    parser.add_argument(
        "--hidden_size",
        type=int,
        default=768 if DEVICE.type == "cuda" else 256,
        help="of heads of 64",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="that each way is timed")
    arguments = parser.parse_args()
    name = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{name}; torch {torch.__version__}; {arguments}")
    torch.manual_seed(0)
    model = MaskedRoberta(
        RobertaConfig(
            vocab_size=8192,
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden_size // 64,
            intermediate_size=4 * arguments.hidden_size,
            max_position_embeddings=arguments.seq_len + 2,
            type_vocab_size=1,
            initializer_range=0.06,  # so that attention and positions show in the logits
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,  # the variable-length kernel has none: training with it takes the mask
            attn_implementation=ATTENTION,
        )
    ).to(DEVICE)

    def inputs(rows: int, isolated: bool) -> dict[str, Tensor]:
        return batch_inputs(rows, arguments.seq_len, arguments.mean_document, isolated)

    exact = check(model, inputs(3, True))
    measure(model, inputs, arguments.rows, arguments.seconds)
    if not has_varlen(model):
        print("\nNOT RUN: variable-length attention, which does not apply on this device")
    sys.exit(0 if exact else 1)


def batch_inputs(rows: int, seq_len: int, mean_document: int, isolated: bool) -> dict[str, Tensor]:
    """The model's arguments for rows cut from made-up documents of geometrically distributed lengths; the same ones every time."""
    generator = np.random.default_rng(0)
    stream = generator.integers(5, 8192, rows * (seq_len - 1))
    stream[generator.random(len(stream)) < 1 / mean_document] = EOS
    masker = Masker(0.15, 0.8, 0.1, 8192, MASK, (BOS, PAD, EOS, 3, MASK), seed=0)
    shards = Split(
        [{"file": "", "documents": 1, "tokens": len(stream)}],
        lambda _: Shard(stream, np.array([0, len(stream)], np.int32)),
    )
    stage = Stage(
        0, 0, BatchPlan(rows, rows, 1), Contiguous(shards, seq_len, BOS, PAD), Sequential(rows)
    )
    batches = Batches([stage], masker, PAD, EOS if isolated else None)
    return MicroBatch(batches.micro_batch(0, 0, 0)).on(DEVICE)


def check(model: MaskedRoberta, given: dict[str, Tensor]) -> bool:
    """Print how far each way is from every document alone; returns whether all is as exact as it should be."""
    documents = len(given["document_starts"].unique()) - 1
    print(
        f"\n3 rows, {documents} documents: largest difference of a logit, relative one of the gradient"
    )
    model.set_attn_implementation("sdpa")
    expected = alone(model, given, bf16=False)
    whole = {key: value for key, value in given.items() if key != "document_starts"}
    report("contiguous, fp32: not to be exact", in_rows(model, whole, bf16=False), expected)
    exact = (
        max(report("isolated, mask, fp32", in_rows(model, given, bf16=False), expected))
        <= FP32_TOLERANCE
    )
    allowed = [
        2 * difference
        for difference in report("each alone, bf16", alone(model, given, bf16=True), expected)
    ]
    found = [report("isolated, mask, bf16", in_rows(model, given, bf16=True), expected)]
    if has_varlen(model):
        model.set_attn_implementation(ATTENTION)
        found.append(report("isolated, varlen, bf16", in_rows(model, given, bf16=True), expected))
    exact &= all(
        difference <= most
        for differences in found
        for difference, most in zip(differences, allowed, strict=True)
    )
    print("exact" if exact else "NOT EXACT")
    return exact


def alone(model: MaskedRoberta, given: dict[str, Tensor], bf16: bool) -> Found:
    """Logits and gradient from each document as the only row of a batch, by the stock forward."""
    labels = torch.full_like(given["input_ids"], IGNORED_LABEL)
    for row, positions, answers in zip(
        labels, given["masked_positions"], given["labels"], strict=True
    ):
        row[positions[answers != IGNORED_LABEL]] = answers[answers != IGNORED_LABEL]
    model.zero_grad()
    found = []
    for start, stop in itertools.pairwise(given["document_starts"].unique().tolist()):
        logits = (
            forward(model, {"input_ids": given["input_ids"].flatten()[None, start:stop]}, bf16)
            .logits[0]
            .float()
        )
        torch.nn.functional.cross_entropy(
            logits, labels.flatten()[start:stop], reduction="sum"
        ).backward()
        found.append(logits.detach())
    return torch.cat(found), gradient(model)


def in_rows(model: MaskedRoberta, given: dict[str, Tensor], bf16: bool) -> Found:
    """Logits and gradient from all rows at once, as in training."""
    model.zero_grad()
    forward(model, given, bf16)[0].backward()
    with torch.no_grad():
        logits = forward(
            model,
            {key: given[key] for key in ("input_ids", "document_starts") if key in given},
            bf16,
        ).logits
    return logits.flatten(0, 1).float(), gradient(model)


def forward(model: MaskedRoberta, given: dict[str, Tensor], bf16: bool) -> Any:
    """The model's answer in the arithmetic of ``training.precision``."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        return model(**given)


def has_varlen(model: MaskedRoberta) -> bool:
    """Whether variable-length attention is what the model would take here in bf16."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        applies = model._varlen_applies(DEVICE)
    model.set_attn_implementation(chosen)
    return applies


def gradient(model: MaskedRoberta) -> Tensor:
    """All parameters' gradients in one vector."""
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def report(name: str, found: Found, expected: Found) -> tuple[float, float]:
    """Print and return the largest difference of a logit, and the gradient's difference over its size."""
    logit = float((found[0] - expected[0]).abs().max())
    relative = float((found[1] - expected[1]).norm() / expected[1].norm())
    print(f"  {name:36s} {logit:9.2e} {relative:9.2e}")
    return logit, relative


def measure(
    model: MaskedRoberta,
    inputs: Callable[[int, bool], dict[str, Tensor]],
    rows: int,
    seconds: float,
) -> None:
    """Print tokens a second of forward and backward together."""
    on_gpu = DEVICE.type == "cuda"
    print(f"\n{rows} rows, {'bf16' if on_gpu else 'fp32'}, forward and backward: tokens a second")
    ways = [
        ("contiguous", False, "sdpa"),
        ("isolated, mask", True, "sdpa"),
        ("isolated, varlen", True, ATTENTION),
    ]
    for name, isolated, attention in ways if has_varlen(model) else ways[:-1]:
        model.set_attn_implementation(attention)
        given = inputs(rows, isolated)
        steps, start = -3, 0.0  # three to warm up
        while steps < 1 or time.perf_counter() < start + seconds:
            forward(model, given, bf16=on_gpu)[0].backward()
            if on_gpu:
                torch.cuda.synchronize()
            steps += 1
            start = time.perf_counter() if steps == 0 else start
        print(
            f"  {name:36s} {steps * given['input_ids'].numel() / (time.perf_counter() - start):11,.0f}"
        )


if __name__ == "__main__":
    main()
