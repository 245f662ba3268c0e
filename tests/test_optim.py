"""Weights move as AdamW and Muon say, and the learning rate follows the update."""

from collections.abc import Iterator

import pytest
import torch
from commands import CONFIG
from torch import Tensor, nn

from kantai import optim
from kantai.config import Config, load_config
from kantai.optim import Held, Part, build_optimizer, learning_rate

UPDATES = 4


def load(*arguments: str) -> Config:
    return load_config(CONFIG, ["--data.shards=a", "--data.tokenizer=b", "--run_dir=c", *arguments])


class Tiny(nn.Module):
    """Named like a RoBERTa: an embedding, a tall and a wide matrix, a norm, a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embeddings = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.LayerNorm = nn.LayerNorm(8)
        self.decoder = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.LayerNorm(self.down(self.up(self.embeddings(ids)).relu())))  # type: ignore[no-any-return]


def gradients() -> Iterator[list[Tensor]]:
    """Of each update, for all parameters: far from 0 and of different sizes."""
    torch.manual_seed(2)
    for _ in range(UPDATES):
        yield [torch.randn_like(parameter) * 10.0**number for number, parameter in enumerate(Tiny().parameters(), -5)]


def trained(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    for found in gradients():
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return model.state_dict()


def test_adamw_decays_matrices_and_embeddings_alone() -> None:
    model, settings = Tiny(), load().optimizer
    optimizer = build_optimizer(model, settings)
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert decays == {name: 0.0 if name.endswith("bias") or "Norm" in name else 0.01 for name, _ in model.named_parameters()}
    stock = Tiny()
    groups = [{"params": [parameter], "weight_decay": decays[name]} for name, parameter in stock.named_parameters()]
    expected = trained(torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6), stock)
    for name, value in trained(optimizer, model).items():
        torch.testing.assert_close(value, expected[name])


def test_muon_moves_hidden_matrices_as_pytorchs_does_and_the_rest_by_adamw() -> None:
    model, settings = Tiny(), load("--optimizer.name=muon").optimizer
    optimizer = build_optimizer(model, settings)
    ours = {name for group in optimizer.param_groups if group["kind"] == "muon" for name in group["names"]}
    assert ours == {"up.weight", "down.weight"}
    found = trained(optimizer, model)

    stock = Tiny()
    hidden = [parameter for name, parameter in stock.named_parameters() if name in ours]
    muon = torch.optim.Muon(hidden, lr=settings.learning_rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = build_optimizer(model := Tiny(), load().optimizer)
    by_muon, by_adamw = trained(muon, stock), trained(adamw, model)
    start = Tiny().state_dict()
    for name, value in found.items():
        expected = by_muon if name in ours else by_adamw
        # PyTorch iterates in bf16; its steps differ from ours by that.
        off = (value - expected[name]).norm() / (expected[name] - start[name]).norm()
        assert off < (0.02 if name in ours else 1e-5), name


def test_parameters_are_put_together_from_the_ranks_pieces_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five parameters laid end to end, cut in two in the middle of the third, in buckets of 100 elements or more."""
    monkeypatch.setattr(optim, "_BUCKET_ELEMENTS", 100)
    shapes = [(8, 10), (30,), (7, 9), (110,), (2, 3)]
    wholes = [torch.randn(shape) for shape in shapes]
    flat, cut = torch.cat([whole.flatten() for whole in wholes]), 80 + 30 + 31
    optimizer, buckets, sums = build_optimizer(Tiny(), load().optimizer), list[int](), []
    optimizer.sum_over_ranks = lambda values: buckets.append(values.numel()) or values
    for first, last in ((0, cut), (cut, flat.numel())):
        parts, begin = [], 0
        for name, whole in enumerate(wholes):
            start, end = (min(max(place, begin), begin + whole.numel()) for place in (first, last))
            parts.append(Part(str(name), tuple(whole.shape), start - begin, start - first if end > start else 0, end - start))
            begin += whole.numel()
        values = flat[first:last]
        sums.append(list(optimizer.whole(Held(values, "adamw", parts), values)))
    assert buckets == 2 * [110, 173, 6]
    for whole, (part, one), (_, other) in zip(wholes, *sums, strict=True):
        assert torch.equal(one + other, whole), part


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_was_called_off_changes_nothing(name: str) -> None:
    model = Tiny()
    optimizer = build_optimizer(model, load(f"--optimizer.name={name}").optimizer)
    trained(optimizer, model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moments = [{key: value.clone() for key, value in optimizer.moments(held).items()} for held in optimizer.held]
    steps = [state["step"].clone() for state in optimizer.state.values() if "step" in state]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for held, kept in zip(optimizer.held, moments, strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in optimizer.moments(held).items())
    assert [state["step"] for state in optimizer.state.values() if "step" in state] == steps


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 0.5, 13: 0.1}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 9: 0.5, 13: 0.0244717}),
        ("wsd", {0: 0.25, 3: 1.0, 4: 1.0, 9: 1.0, 10: 1.0, 11: 0.75, 13: 0.25}),
    ],
)
def test_learning_rates(schedule: str, rates: dict[int, float]) -> None:
    arguments = [
        f"--optimizer.schedule={schedule}",
        "--optimizer.learning_rate=1",
        "--optimizer.warmup_updates=4",
        "--optimizer.decay_updates=4",
    ]
    config = load(*arguments)
    for update, rate in rates.items():
        assert learning_rate(config.optimizer, update, 14) == pytest.approx(rate, rel=1e-5)
