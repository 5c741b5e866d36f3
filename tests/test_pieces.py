"""An optimizer's groups in pieces: the same updates, bit for bit."""

from __future__ import annotations

import torch

from cogvideox.engine.pieces import cut_groups


def optimizer(most: int | None = None) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 5), (3, 3), (50, 2), (7,), (2, 2))
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    groups = [
        {"params": parameters[:3], "lr": 0.1, "name": "a"},
        {"params": parameters[3:], "weight_decay": 0.5},
    ]
    return parameters, torch.optim.AdamW(groups if most is None else cut_groups(groups, most), lr=0.01)


def test_pieces_hold_at_most_so_many_elements_in_order_with_their_settings() -> None:
    parameters, cut = optimizer(30)
    groups = cut.param_groups
    assert [[p.numel() for p in group["params"]] for group in groups] == [[20, 9], [100], [7, 4]]
    flat = [p for group in groups for p in group["params"]]
    assert all(one is other for one, other in zip(flat, parameters, strict=True))
    assert [(group["lr"], group.get("name"), group["weight_decay"]) for group in groups] == [
        (0.1, "a", 0.01),
        (0.1, "a", 0.01),
        (0.01, None, 0.5),
    ]


def test_names_go_with_their_parameters() -> None:
    groups = [{"params": [torch.zeros(size) for size in (3, 4, 5)], "names": ["a", "b", "c"]}]
    cut = cut_groups(groups, 7)
    assert [(group["names"], [p.numel() for p in group["params"]]) for group in cut] == [
        (["a", "b"], [3, 4]),
        (["c"], [5]),
    ]


def test_updates_are_the_same_bits() -> None:
    (whole, one), (pieces, two) = optimizer(), optimizer(25)
    for step in range(3):
        for parameters, each in ((whole, one), (pieces, two)):
            for index, parameter in enumerate(parameters):
                seed = torch.Generator().manual_seed(10 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=seed)
            each.step()
    assert len(two.param_groups) > len(one.param_groups)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
