"""Muon's steps are PyTorch's."""

import torch

from kantai.optim.optimizer import build_optimizer
from tests.helpers.tiny_model import Tiny, load, trained


def test_muon_moves_hidden_matrices_as_pytorchs_does_and_the_rest_by_adamw() -> None:
    model, settings = Tiny(), load("--optimizer.name=muon").optimizer
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
    adamw = build_optimizer(model := Tiny(), load().optimizer)
    by_muon, by_adamw = trained(muon, stock), trained(adamw, model)
    start = Tiny().state_dict()
    for name, value in found.items():
        expected = by_muon if name in ours else by_adamw
        # PyTorch iterates in bf16; its steps differ from ours by that.
        off = (value - expected[name]).norm() / (expected[name] - start[name]).norm()
        assert off < (0.02 if name in ours else 1e-5), name
