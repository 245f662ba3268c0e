"""The model computes each document of a shared row as if it were alone."""

import itertools
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kantai.config.loading import load_config
from kantai.data.batches import Batch, document_starts
from kantai.data.dataset import open_data
from kantai.data.loader import MicroBatch
from kantai.data.masking import IGNORED_LABEL
from kantai.data.tokenizer import load_tokenizer
from kantai.model import attention as attention_module
from kantai.model.roberta import MaskedRoberta, build_model
from tests.helpers.commands import ROOT

BOS, PAD, EOS = 0, 1, 2
LENGTH = 32

SMALL = [
    "--model.hidden_size=32",
    "--model.num_attention_heads=2",
    "--model.intermediate_size=64",
    f"--data.seq_len={LENGTH}",
]


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path) -> MaskedRoberta:
    """A model with the quickstart's initialisation.

    Its large weights and sinusoidal positions make context and position show in the logits.
    """
    config = load_config(ROOT / "configs/quickstart.yaml", SMALL)
    return build_model(
        config.model, load_tokenizer(tokenizer_dir), seq_len=config.data.seq_len, seed=config.seed
    ).eval()


def batch_of(packing: str, shards_dir: Path, tokenizer_dir: Path) -> Batch:
    """Return three rows of the training split, the last one empty."""
    where = [
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--data.packing={packing}",
    ]
    sizes = ["--batch.global_batch_size=5", "--batch.micro_batch_size=3"]
    data = open_data(load_config(ROOT / "configs/quickstart.yaml", [*SMALL, *where, *sizes]))
    return data.training_batches(1).micro_batch(3, 1, 0)


def starts_of(rows: list[list[int]]) -> Tensor:
    return torch.from_numpy(document_starts(np.array(rows), EOS).astype(np.int32))


def documents_of(row: list[int]) -> list[slice]:
    """Return the slices of a row's documents, each with its ``</s>``."""
    cuts = [0, *(place + 1 for place, token in enumerate(row[:-1]) if token == EOS), len(row)]
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts)]


def random_rows(seed: int, rows: int = 3) -> list[list[int]]:
    """Return rows of random documents of 1 to 20 tokens."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(5, 1000, (rows, LENGTH))
    for row in ids:
        row[np.cumsum(generator.integers(1, 21, LENGTH))[: LENGTH // 2].clip(max=LENGTH - 1)] = EOS
    ids[:, 0] = BOS
    return ids.tolist()  # type: ignore[no-any-return]


def reference_varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, *bounds: Tensor | int
) -> Tensor:
    """Compute ``torch.nn.attention.varlen.varlen_attn`` of [tokens, heads, head size].

    The real kernel needs a GPU.
    """
    starts, of_keys, longest, longest_key = bounds
    assert isinstance(starts, Tensor) and starts is of_keys and starts.dtype == torch.int32
    assert isinstance(longest, int) and longest == longest_key >= int(starts.diff().max())
    sizes = starts.diff().tolist()
    per_document = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    attend = nn.functional.scaled_dot_product_attention
    return torch.cat(
        [
            attend(*(states.transpose(0, 1) for states in document)).transpose(0, 1)
            for document in per_document
            if len(document[0])
        ]
    )


@pytest.mark.parametrize("seed", range(3))
def test_logits_equal_each_document_alone(model: MaskedRoberta, seed: int) -> None:
    rows = random_rows(seed)
    with torch.no_grad():
        together = model(torch.tensor(rows), document_starts=starts_of(rows)).logits
        for row, found in zip(rows, together, strict=True):
            for document in documents_of(row):
                alone = model(torch.tensor([row[document]])).logits[0]
                assert torch.allclose(found[document], alone, atol=1e-5, rtol=0)


def test_attention_across_documents_changes_logits(model: MaskedRoberta) -> None:
    rows = random_rows(0)
    with torch.no_grad():
        isolated = model(torch.tensor(rows), document_starts=starts_of(rows)).logits
        whole = model(torch.tensor(rows)).logits
    assert (isolated - whole).abs().amax((0, 2)).min() > 0.01


def test_changed_document_keeps_logits_of_others(model: MaskedRoberta) -> None:
    rows = random_rows(1)
    changed = [list(row) for row in rows]
    inside = documents_of(rows[1])[1]
    changed[1][inside] = [token if token == EOS else 1004 - token for token in rows[1][inside]]
    with torch.no_grad():
        before, after = (
            model(torch.tensor(ids), document_starts=starts_of(ids)).logits
            for ids in (rows, changed)
        )
    differs = (before != after).any(-1)
    assert differs[1, inside].all() and differs.sum() == inside.stop - inside.start > 1


def test_loss_and_gradients_sum_over_documents(
    model: MaskedRoberta, shards_dir: Path, tokenizer_dir: Path
) -> None:
    batch = batch_of("isolated", shards_dir, tokenizer_dir)
    model.zero_grad()
    loss_sum, correct = model(**MicroBatch(batch).inputs)
    loss_sum.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    expected_loss = 0.0
    expected_correct = 0
    labels = np.full(batch.input_ids.shape, IGNORED_LABEL)
    for row, positions, answers in zip(labels, batch.masked_positions, batch.labels, strict=True):
        row[positions[answers != IGNORED_LABEL]] = answers[answers != IGNORED_LABEL]
    for start, stop in itertools.pairwise(np.unique(batch.document_starts)):
        alone, answers = (
            torch.from_numpy(ids.reshape(-1)[start:stop]) for ids in (batch.input_ids, labels)
        )
        logits = model(alone[None]).logits[0]
        loss = nn.functional.cross_entropy(logits, answers, reduction="sum")
        loss.backward()
        expected_loss += loss.item()
        expected_correct += int((logits.argmax(1) == answers).sum())

    assert loss_sum.item() == pytest.approx(expected_loss, rel=1e-5)
    assert correct.item() == expected_correct
    # The batch has an empty row, which adds nothing.
    assert (batch.input_ids[2] == PAD).sum() == LENGTH - 1
    for name, p in model.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=1e-5), name


def test_kernel_path_equals_mask_path(
    model: MaskedRoberta, shards_dir: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = MicroBatch(batch_of("isolated", shards_dir, tokenizer_dir)).inputs
    kernel = Mock(side_effect=reference_varlen_attn)
    found = {}
    for path in ("mask", "kernel"):
        model.zero_grad()
        loss_sum, _ = model(**inputs)
        loss_sum.backward()
        found[path] = (
            loss_sum.item(),
            {name: p.grad.clone() for name, p in model.named_parameters()},
        )
        monkeypatch.setattr(MaskedRoberta, "_varlen_applies", lambda self, device: True)
        monkeypatch.setattr(attention_module, "varlen_attn", kernel)
    assert kernel.call_count == model.config.num_hidden_layers
    assert found["mask"][0] == pytest.approx(found["kernel"][0], rel=1e-6)
    for name, gradient in found["mask"][1].items():
        assert torch.allclose(gradient, found["kernel"][1][name], atol=1e-5), name


def test_kernel_path_never_waits_for_device(
    model: MaskedRoberta, shards_dir: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real operator runs on tensors without values: reading a value would raise."""
    monkeypatch.setattr(MaskedRoberta, "_varlen_applies", lambda self, device: True)
    inputs = MicroBatch(batch_of("isolated", shards_dir, tokenizer_dir)).inputs
    mode = FakeTensorMode()
    parameters = {
        name: nn.Parameter(mode.from_tensor(p.detach())) for name, p in model.named_parameters()
    }
    buffers = {name: mode.from_tensor(b) for name, b in model.named_buffers()}
    with mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        loss_sum, _ = torch.func.functional_call(model, {**parameters, **buffers}, kwargs=fakes)
        loss_sum.backward()
    query = parameters["roberta.encoder.layer.0.attention.self.query.weight"]
    assert query.grad is not None and query.grad.shape == query.shape


def test_saved_config_omits_attention(model: MaskedRoberta, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    assert model.config._attn_implementation not in (tmp_path / "config.json").read_text()
