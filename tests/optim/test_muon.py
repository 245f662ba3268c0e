"""Muon's steps equal PyTorch's."""

import torch

from kantai.optim.optimizer import build_optimizer
from tests.helpers.tiny_model import Tiny, load, trained


def test_muon_matches_pytorch_and_leaves_rest_to_adamw() -> None:
    model = Tiny()
    settings = load("--optimizer.name=muon").optimizer
    optimizer = build_optimizer(model, settings)
    ours = {
        name
        for group in optimizer.param_groups
        if group["kind"] == "muon"
        for name in group["names"]
    }
    assert ours == {"up.weight", "down.weight"}
    found = trained(optimizer, model)

    stock = Tiny()
    hidden = [parameter for name, parameter in stock.named_parameters() if name in ours]
    muon = torch.optim.Muon(
        hidden,
        lr=settings.learning_rate,
        weight_decay=0.01,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    by_muon = trained(muon, stock)

    model = Tiny()
    adamw = build_optimizer(model, load().optimizer)
    by_adamw = trained(adamw, model)

    start = Tiny().state_dict()
    for name, value in found.items():
        expected = by_muon if name in ours else by_adamw
        # PyTorch iterates in bf16, so that its steps differ from ours by rounding.
        off = (value - expected[name]).norm() / (expected[name] - start[name]).norm()
        assert off < (0.02 if name in ours else 1e-5), name
