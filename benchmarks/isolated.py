"""Check that packing ``isolated`` is exact on this machine, and measure how fast it is.

python benchmarks/isolated.py

Documents are made up and weights are random; no file is read. Logits and gradient of documents
that share rows are compared with those of each document alone. In fp32 they may differ by rounding.
In bf16 they may differ twice as much as a lone document in bf16 differs from fp32. The exit code is
1 if they differ by more.
"""

import argparse
import itertools
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import calls_per_second
from torch import Tensor
from transformers import RobertaConfig

from kantai.config.batch_plan import BatchPlan
from kantai.data.batches import Batch, Batches, Stage
from kantai.data.loader import MicroBatch
from kantai.data.masking import Masker
from kantai.data.packing import Contiguous
from kantai.data.shards import Shard, Split
from kantai.data.shuffle import Sequential
from kantai.model.attention import ATTENTION
from kantai.model.roberta import MaskedRoberta

BOS, PAD, EOS, UNK, MASK = range(5)
SPECIAL_IDS = (BOS, PAD, EOS, UNK, MASK)
VOCAB_SIZE = 8192
HEAD_SIZE = 64
CHECKED_ROWS = 3
FP32_TOLERANCE = 1e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
Result = tuple[Tensor, Tensor]  # logits [tokens, vocabulary], gradient of all parameters
Inputs = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument, type=int)
    add("--rows", default=32 if ON_GPU else 4, help="rows of the batch that is timed")
    add("--seq_len", default=512, help="tokens of a row")
    add("--mean_document", default=150, help="mean length of a document, in tokens")
    add("--layers", default=12 if ON_GPU else 2, help="layers of the model")
    add("--hidden_size", default=768 if ON_GPU else 256, help="width, in heads of 64")
    add("--seconds", type=float, default=5.0, help="time for which each way is measured")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {threads} threads"
    print(f"{device}; torch {torch.__version__}; {arguments}")

    model = random_model(arguments.layers, arguments.hidden_size, arguments.seq_len)
    batch = partial(made_up_batch, arguments.seq_len, arguments.mean_document)
    is_exact = check(model, batch(CHECKED_ROWS))
    measure(model, batch(arguments.rows), arguments.seconds)
    if not has_varlen(model):
        print("\nNOT RUN: variable-length attention, which this device does not have")
    sys.exit(0 if is_exact else 1)


def random_model(layers: int, hidden_size: int, seq_len: int) -> MaskedRoberta:
    """A model of random weights, without dropout."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_SIZE,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=seq_len + 2,
        type_vocab_size=1,
        initializer_range=0.06,  # so that attention and positions show in the logits
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,  # the variable-length kernel has no dropout
        attn_implementation=ATTENTION,
    )
    return MaskedRoberta(config).to(DEVICE)


def made_up_batch(seq_len: int, mean_document: int, rows: int) -> Batch:
    """Rows cut from documents of geometrically distributed lengths, the same at every call."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(len(SPECIAL_IDS), VOCAB_SIZE, rows * (seq_len - 1))
    tokens[generator.random(len(tokens)) < 1 / mean_document] = EOS
    entry = {"file": "", "documents": 1, "tokens": len(tokens)}
    shard = Shard(tokens, np.array([0, len(tokens)], np.int32))
    sequences = Contiguous(Split([entry], lambda _: shard), seq_len, BOS, PAD)
    stage = Stage(0, 0, BatchPlan(rows, rows, 1), sequences, Sequential(rows))
    masker = Masker(0.15, 0.8, 0.1, VOCAB_SIZE, MASK, SPECIAL_IDS, seed=0)
    return Batches([stage], masker, PAD, EOS).micro_batch(0, 0, 0)


def both_inputs(batch: Batch) -> tuple[Inputs, Inputs]:
    """A batch as the model's arguments: contiguous and isolated."""
    isolated = MicroBatch(batch).on(DEVICE)
    contiguous = {name: value for name, value in isolated.items() if name != "document_starts"}
    return contiguous, isolated


def check(model: MaskedRoberta, batch: Batch) -> bool:
    """Print how far each way is from every document alone. Returns whether all are exact enough."""
    contiguous, isolated = both_inputs(batch)
    labels = torch.from_numpy(batch.labels_by_position()).to(DEVICE)
    starts = isolated["document_starts"].unique().tolist()
    print(f"\n{CHECKED_ROWS} rows, {len(starts) - 1} documents: largest difference of a logit,")
    print("difference of the gradient over its size")

    model.set_attn_implementation("sdpa")
    expected = alone(model, isolated, labels, bf16=False)
    report("contiguous, fp32: not to be exact", together(model, contiguous, bf16=False), expected)
    in_fp32 = report("isolated, mask, fp32", together(model, isolated, bf16=False), expected)
    one_by_one = report("each alone, bf16", alone(model, isolated, labels, bf16=True), expected)
    in_bf16 = [report("isolated, mask, bf16", together(model, isolated, bf16=True), expected)]
    if has_varlen(model):
        model.set_attn_implementation(ATTENTION)
        found = together(model, isolated, bf16=True)
        in_bf16.append(report("isolated, varlen, bf16", found, expected))

    is_exact = max(in_fp32) <= FP32_TOLERANCE and all(
        difference <= 2 * allowed
        for differences in in_bf16
        for difference, allowed in zip(differences, one_by_one, strict=True)
    )
    print("exact" if is_exact else "NOT EXACT")
    return is_exact


def alone(model: MaskedRoberta, isolated: Inputs, labels: Tensor, *, bf16: bool) -> Result:
    """Logits and gradient from each document as the only row of a batch, by the stock forward."""
    model.zero_grad()
    ids = isolated["input_ids"].flatten()
    found = []
    for start, stop in itertools.pairwise(isolated["document_starts"].unique().tolist()):
        logits = forward(model, {"input_ids": ids[None, start:stop]}, bf16).logits[0].float()
        of_document = labels.flatten()[start:stop]
        torch.nn.functional.cross_entropy(logits, of_document, reduction="sum").backward()
        found.append(logits.detach())
    return torch.cat(found), gradient(model)


def together(model: MaskedRoberta, inputs: Inputs, *, bf16: bool) -> Result:
    """Logits and gradient from all rows at once, as in training."""
    model.zero_grad()
    forward(model, inputs, bf16)[0].backward()
    names = inputs.keys() & {"input_ids", "document_starts"}
    with torch.no_grad():
        logits = forward(model, {name: inputs[name] for name in names}, bf16).logits
    return logits.flatten(0, 1).float(), gradient(model)


def forward(model: MaskedRoberta, inputs: Inputs, bf16: bool) -> Any:
    """What the model returns, with matrix products in bf16 or fp32."""
    model.compute_dtype = torch.bfloat16 if bf16 else torch.float32
    return model(**inputs)


def has_varlen(model: MaskedRoberta) -> bool:
    """Whether the model would take variable-length attention in bf16 on this device."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        applies = model._varlen_applies(DEVICE)
    model.set_attn_implementation(chosen)
    return applies


def gradient(model: MaskedRoberta) -> Tensor:
    """All parameters' gradients in one vector."""
    gradients = (parameter.grad for parameter in model.parameters())
    return torch.cat([grad.flatten().double() for grad in gradients if grad is not None])


def report(name: str, found: Result, expected: Result) -> tuple[float, float]:
    """Print and return the largest difference of a logit, and the gradient's over its size."""
    logit = float((found[0] - expected[0]).abs().max())
    relative = float((found[1] - expected[1]).norm() / expected[1].norm())
    print(f"  {name:36s} {logit:9.2e} {relative:9.2e}")
    return logit, relative


def measure(model: MaskedRoberta, batch: Batch, seconds: float) -> None:
    """Print the tokens a second of forward and backward together."""
    rows = len(batch.input_ids)
    print(f"\n{rows} rows, {'bf16' if ON_GPU else 'fp32'}, forward and backward: tokens a second")
    contiguous, isolated = both_inputs(batch)
    ways = [("contiguous", contiguous, "sdpa"), ("isolated, mask", isolated, "sdpa")]
    if has_varlen(model):
        ways.append(("isolated, varlen", isolated, ATTENTION))
    for name, inputs, attention in ways:
        model.set_attn_implementation(attention)
        rate = calls_per_second(partial(train_once, model, inputs), seconds, warm_up=3)
        print(f"  {name:36s} {rate * batch.input_ids.size:11,.0f}")


def train_once(model: MaskedRoberta, inputs: Inputs) -> None:
    """One forward and backward pass, to its end."""
    forward(model, inputs, bf16=ON_GPU)[0].backward()
    if ON_GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
