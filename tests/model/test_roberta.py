"""The model equals the stock model, and computes its loss on masked positions only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import RobertaConfig, RobertaForMaskedLM

from kantai.config.loading import load_config
from kantai.config.schema import Config
from kantai.data.batches import Batch
from kantai.data.dataset import open_data
from kantai.data.loader import MicroBatch
from kantai.data.masking import IGNORED_LABEL
from kantai.data.tokenizer import Vocabulary, load_tokenizer
from kantai.model.roberta import MaskedRoberta, build_model, training_flops
from kantai.preprocessing.documents import pieces
from kantai.preprocessing.files import find_files
from kantai.preprocessing.job import Job
from kantai.preprocessing.merge import merge
from kantai.preprocessing.tokenize import tokenize
from tests.helpers.commands import CONFIG, ROOT
from tests.helpers.tokenizer_kinds import changed, loaded

SMALL = [
    "--model.hidden_size=32",
    "--model.num_attention_heads=2",
    "--model.intermediate_size=64",
    "--data.seq_len=32",
]


@pytest.fixture(params=["contiguous", "padded"])
def config(request: pytest.FixtureRequest, shards_dir: Path, tokenizer_dir: Path) -> Config:
    where = [
        f"--data.shards={shards_dir}",
        f"--data.tokenizer={tokenizer_dir}",
        f"--data.packing={request.param}",
    ]
    return load_config(ROOT / "configs/quickstart.yaml", [*SMALL, *where])


def model_and_batch(config: Config) -> tuple[MaskedRoberta, Batch]:
    data = open_data(config)
    return build_model(
        config.model, data.vocabulary, seq_len=config.data.seq_len, seed=config.seed
    ).eval(), data.training_batches(1).micro_batch(3, 0, 0)


def test_loss_and_gradients_equal_stock_model(config: Config) -> None:
    model, batch = model_and_batch(config)
    inputs = MicroBatch(batch).inputs
    assert config.data.packing == "contiguous" or not inputs["attention_mask"].all()
    loss_sum, correct = model(**inputs)
    masked = int((batch.labels != IGNORED_LABEL).sum())
    (loss_sum / masked).backward()

    # The stock model keeps transformers' default attention.
    stock = RobertaForMaskedLM(RobertaConfig.from_dict(model.config.to_dict())).eval()
    stock.load_state_dict(model.state_dict())
    labels = torch.full_like(inputs["input_ids"], IGNORED_LABEL)
    for row, positions in enumerate(inputs["masked_positions"]):
        for position, label in zip(positions, inputs["labels"][row], strict=True):
            if label != IGNORED_LABEL:
                labels[row, position] = label

    out = stock(
        input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), labels=labels
    )
    out.loss.backward()

    assert (loss_sum / masked).item() == pytest.approx(out.loss.item(), rel=1e-6)
    assert (
        correct.item()
        == ((out.logits.argmax(-1) == labels) & (labels != IGNORED_LABEL)).sum().item()
    )
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), stock.named_parameters(), strict=True
    ):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6), name


@torch.no_grad()
def test_bf16_loss_equals_fp32_within_rounding(config: Config) -> None:
    """On a CPU, attention takes another path in bf16."""
    model, batch = model_and_batch(config)
    inputs = MicroBatch(batch).inputs
    exact = model(**inputs)[0]
    model.compute_dtype = torch.bfloat16
    rounded = model(**inputs)[0]
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-3)

    if "attention_mask" in inputs:
        behind_padding = inputs["input_ids"].where(inputs["attention_mask"].bool(), 7)
        assert model(**{**inputs, "input_ids": behind_padding})[0] == rounded


@pytest.mark.parametrize("config", ["contiguous"], indirect=True)
def test_bf16_gradients_equal_fp32_within_rounding(config: Config) -> None:
    rounded, batch = model_and_batch(config)
    exact, _ = model_and_batch(config)
    rounded.compute_dtype = torch.bfloat16
    for model in (rounded, exact):
        model(**MicroBatch(batch).inputs)[0].backward()
    for (name, ours), (_, theirs) in zip(
        rounded.named_parameters(), exact.named_parameters(), strict=True
    ):
        if not name.endswith("key.bias"):  # its gradient is rounding only
            assert (ours.grad - theirs.grad).norm() <= 0.02 * theirs.grad.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("config", ["padded"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_keep_compute_dtype(config: Config, dtype: torch.dtype) -> None:
    """Under autocast alone, norms return fp32: twice the bytes, and a cast per product."""
    model, batch = model_and_batch(config)
    model.compute_dtype = dtype
    found: list[torch.dtype] = []
    for layer in model.roberta.encoder.layer:
        layer.register_forward_hook(
            lambda _layer, given, out: found.extend([given[0].dtype, out.dtype])
        )
    model(**MicroBatch(batch).inputs)
    assert found == [dtype] * 2 * len(model.roberta.encoder.layer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of its own code
@pytest.mark.parametrize("config", ["padded"], indirect=True)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_compiled_parts_give_equal_loss_and_gradients(
    config: Config, dtype: torch.dtype, allowed: float
) -> None:
    compiled, batch = model_and_batch(config)
    plain, _ = model_and_batch(config)
    compiled.compile_parts()
    inputs = MicroBatch(batch).inputs
    losses = []
    for model in (plain, compiled):
        model.compute_dtype = dtype
        losses.append(model(**inputs)[0])
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=allowed / 100)
    for (name, ours), (_, theirs) in zip(
        compiled.named_parameters(), plain.named_parameters(), strict=True
    ):
        # The gradient of a key's bias is rounding only.
        assert (ours.grad - theirs.grad).norm() <= allowed * (theirs.grad.norm() + 0.03), name


def test_padding_changes_no_loss(config: Config) -> None:
    model, batch = model_and_batch(config)
    inputs = MicroBatch(batch).inputs
    if "attention_mask" not in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    before, _ = model(**inputs)
    inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 16), value=1)
    inputs["attention_mask"] = torch.nn.functional.pad(
        inputs["attention_mask"], (0, 16), value=False
    )
    after, _ = model(**inputs)
    assert before.item() == pytest.approx(after.item(), rel=1e-5)


def test_training_flops_match_torch_counter(shards_dir: Path, tokenizer_dir: Path) -> None:
    where = [f"--data.shards={shards_dir}", f"--data.tokenizer={tokenizer_dir}"]
    model, batch = model_and_batch(load_config(ROOT / "configs/quickstart.yaml", [*SMALL, *where]))
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    counter = FlopCounterMode(display=False)
    with counter:
        loss_sum, _ = model(**MicroBatch(batch).inputs)
        loss_sum.backward()
    # The head computes every slot, also the slots that a row does not fill. In the last layer,
    # unmasked positions serve as key and value only, and the counter misses the fused attention.
    hidden = model.config.hidden_size
    slots = batch.labels.size
    spared = (batch.tokens - slots) * (
        4 * hidden**2 + 4 * hidden * model.config.intermediate_size
    ) + 4 * hidden * batch.attended_pairs
    assert (
        counter.get_total_flops()
        == training_flops(model.config, batch.tokens, batch.attended_pairs, slots) - 3 * spared
    )


def test_tutorial_model_has_83504416_parameters(tokenizer_dir: Path) -> None:
    config = load_config(ROOT / "configs/tutorial.yaml")
    model = build_model(
        config.model, load_tokenizer(tokenizer_dir), seq_len=config.data.seq_len, seed=config.seed
    )
    assert model.num_parameters() == 83_504_416


def test_vocabulary_is_padded_and_positions_fit(config: Config) -> None:
    model, _ = model_and_batch(config)
    assert model.config.vocab_size == 1024  # 1000 entries, padded to a multiple of 64
    assert model.config.max_position_embeddings == 34
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_sinusoidal_products_depend_on_distance_only(config: Config) -> None:
    changed = config.model_copy(
        update={"model": config.model.model_copy(update={"position_init": "sinusoidal"})}
    )
    table = model_and_batch(changed)[0].roberta.embeddings.position_embeddings.weight.detach()
    places = table[2:]
    assert places.square().mean().sqrt().item() == pytest.approx(
        config.model.initializer_range, rel=1e-4
    )
    products = places @ places.T
    for distance in (1, 5, 20):
        assert torch.allclose(products.diagonal(distance), products[0, distance], atol=1e-5)


def with_special_ids(folder: Path, tokenizer_dir: Path, ids: dict[str, int]) -> Vocabulary:
    """A tokenizer whose special tokens have swapped ids with others, or ids beyond them."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))

    def move(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        for token, number in ids.items():
            other = next((name for name in vocab if vocab[name] == number), None)
            if other is not None:
                vocab[other] = vocab[token]
            vocab[token] = number
        for entry in content["added_tokens"]:
            entry["id"] = vocab[entry["content"]]

    return loaded(changed(tokenizer, move), folder)


@pytest.mark.parametrize("ids", [{"<pad>": 0}, {"<pad>": 7}, {"<pad>": 900}, {"<mask>": 1024}])
@pytest.mark.parametrize("packing", ["contiguous", "isolated", "padded"])
def test_model_fits_any_special_ids(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, packing: str, ids: dict[str, int]
) -> None:
    vocabulary = with_special_ids(tmp_path / "tokenizer", tokenizer_dir, ids)
    assert vocabulary.size == 1 + max(999, *ids.values())
    cut = pieces(find_files([str(corpus_file)]), "paragraph")
    job = Job(cut, "paragraph", "text", tmp_path / "tokenizer", tmp_path / "shards", {}, 0.05)
    tokenize(job, processes=1)
    merge(job)
    where = [f"--data.shards={job.output}", f"--data.tokenizer={tmp_path / 'tokenizer'}"]
    config = load_config(CONFIG, [*SMALL, *where, f"--data.packing={packing}"])
    model, batch = model_and_batch(config)
    loss_sum, _ = model(**MicroBatch(batch).inputs)
    loss_sum.backward()
    assert loss_sum.isfinite()
    assert model.config.vocab_size % 64 == 0
    assert model.config.vocab_size >= vocabulary.size
