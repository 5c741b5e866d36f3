"""Bytes moved, counted, on cases that are known by hand. The transformer's are in test_counted.py."""

from __future__ import annotations

import torch

from cogvideox.traffic import Traffic


def counted(run) -> Traffic:
    with Traffic() as traffic:
        run()
    return traffic


def test_an_operation_moves_what_it_reads_and_writes_each_tensor_once() -> None:
    x, row = torch.ones(6, 5), torch.ones(5)
    assert counted(lambda: x + x).bytes == 4 * (30 + 30)  # one tensor read, whatever it is called
    assert counted(lambda: x + x.clone()).bytes == 4 * (30 + 30) + 4 * 3 * 30
    assert counted(lambda: x + row).bytes == 4 * (30 + 5 + 30)
    assert counted(lambda: x + row.expand(6, 5)).bytes == 4 * (30 + 5 + 30)  # a row shown six times
    assert counted(lambda: x.add_(1.0)).bytes == 4 * (30 + 30)
    assert counted(lambda: x.T.reshape(5, 6)[1:].unsqueeze(0)).bytes == 0  # views
    assert counted(lambda: x.bfloat16()).bytes == 4 * 30 + 2 * 30
    assert counted(lambda: torch.empty(1000)).bytes == 0


def test_products_are_told_apart() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    traffic = counted(lambda: torch.relu(a @ b))
    assert traffic.by_operation["mm"] == 4 * (12 + 20 + 15) and traffic.between == 4 * (15 + 15)
    assert traffic.bytes == traffic.by_operation["mm"] + traffic.between and traffic.calls["mm"] == 1


def test_operators_that_are_not_torch_s_are_named() -> None:
    library = torch.library.Library("cogvideox_test_traffic", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: torch.empty_like(x), "Meta")
    try:
        x = torch.empty(6, 5, device="meta")
        traffic = counted(lambda: torch.ops.cogvideox_test_traffic.twice(x + x))
        assert traffic.foreign == {"cogvideox_test_traffic::twice"}
        assert traffic.by_operation["twice"] == 4 * (30 + 30)  # one kernel, whatever it computes inside
    finally:
        library._destroy()
