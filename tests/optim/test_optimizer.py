"""The optimizer matches AdamW, gathers ranks' slices and obeys found_inf."""

import pytest
import torch

from kantai.optim import sharding
from kantai.optim.optimizer import build_optimizer
from kantai.optim.sharding import Layout, ParamSlice, ShardedTensor
from tests.helpers.tiny_model import Tiny, load, trained


def test_adamw_decays_only_matrices_and_embeddings() -> None:
    model = Tiny()
    settings = load().optimizer
    optimizer = build_optimizer(model, settings)
    decays = {
        name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]
    }
    assert decays == {
        name: 0.0 if name.endswith("bias") or "Norm" in name else 0.01
        for name, _ in model.named_parameters()
    }

    stock = Tiny()
    groups = [
        {"params": [parameter], "weight_decay": decays[name]}
        for name, parameter in stock.named_parameters()
    ]
    expected = trained(
        torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6), stock
    )
    for name, value in trained(optimizer, model).items():
        torch.testing.assert_close(value, expected[name])


def test_gather_joins_rank_slices_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks share five parameters laid end to end. The cut is in the third.

    A bucket closes at 100 elements or more.
    """
    monkeypatch.setattr(sharding, "_BUCKET_ELEMENTS", 100)
    shapes = [(8, 10), (30,), (7, 9), (110,), (2, 3)]
    wholes = [torch.randn(shape) for shape in shapes]
    flat = torch.cat([whole.flatten() for whole in wholes])
    cut = 80 + 30 + 31
    buckets: list[int] = []
    sums = []
    layout = Layout([], lambda values: buckets.append(values.numel()) or values)
    for first, last in ((0, cut), (cut, flat.numel())):
        parts = []
        begin = 0
        for name, whole in enumerate(wholes):
            start, end = (min(max(place, begin), begin + whole.numel()) for place in (first, last))
            parts.append(
                ParamSlice(
                    str(name),
                    tuple(whole.shape),
                    start - begin,
                    start - first if end > start else 0,
                    end - start,
                )
            )
            begin += whole.numel()

        values = flat[first:last]
        sums.append(list(layout.gather(ShardedTensor(values, "adamw", parts), values)))
    assert buckets == 2 * [110, 173, 6]
    for whole, (part, one), (_, other) in zip(wholes, *sums, strict=True):
        assert torch.equal(one + other, whole), part


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_step_with_found_inf_changes_nothing(name: str) -> None:
    model = Tiny()
    optimizer = build_optimizer(model, load(f"--optimizer.name={name}").optimizer)
    trained(optimizer, model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moments = [
        {key: value.clone() for key, value in optimizer.moments(sharded).items()}
        for sharded in optimizer.layout.tensors
    ]
    steps = [state["step"].clone() for state in optimizer.state.values() if "step" in state]

    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.set_scaling(torch.ones(()))
    optimizer.step()

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for sharded, kept in zip(optimizer.layout.tensors, moments, strict=True):
        assert all(
            torch.equal(value, kept[key]) for key, value in optimizer.moments(sharded).items()
        )
    assert [state["step"] for state in optimizer.state.values() if "step" in state] == steps
