"""The count of live tensors on cases whose peak is known by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cogvideox.live_memory import LiveMemory

MATRIX = 64 * 64 * 4  # bytes of a 64 x 64 float32 matrix


@pytest.fixture(params=["meta", "cpu"])
def x(request) -> torch.Tensor:
    return torch.ones(64, 64, device=request.param)


def test_a_chain_of_products_holds_input_and_output_of_one_link(x):
    with LiveMemory() as memory:
        y = x @ x
        for _ in range(10):
            y = y @ x
    assert memory.peak_bytes == 2 * MATRIX
    assert memory.live_bytes == MATRIX
    del y
    assert memory.live_bytes == 0


def test_what_is_kept_adds_up(x):
    with LiveMemory() as memory:
        kept = [x @ x for _ in range(10)]
    assert memory.peak_bytes == memory.live_bytes == 10 * MATRIX
    assert len(kept) == len(memory.at_peak) == 10 and memory.at_peak[0] == (MATRIX, "mm")


def test_views_and_in_place_operations_add_nothing(x):
    with LiveMemory() as memory:
        x.view(4, -1).t()[1:].mul_(2)
        x += 1
        F.silu(x, inplace=True)
        torch.add(x, x, out=x)
    assert memory.peak_bytes == 0


def test_a_view_keeps_its_whole_storage_alive(x):
    with LiveMemory() as memory:
        corner = (x @ x)[:1, :1]
        assert memory.live_bytes == MATRIX
        corner = corner.clone()
        assert memory.live_bytes == corner.numel() * 4


def test_inputs_and_weights_are_not_counted(x):
    layer = torch.nn.Linear(64, 32, device=x.device)
    with LiveMemory() as memory, torch.no_grad():
        layer(x)
    assert memory.peak_bytes == 64 * 32 * 4


def test_a_freed_address_counts_again(x):
    with LiveMemory() as memory:
        for _ in range(50):
            y = torch.empty(1 << 14, device=x.device)
            assert memory.live_bytes == 1 << 16
            del y
    assert memory.peak_bytes == 1 << 16 and memory.live_bytes == 0


def test_tensors_saved_for_backward_count_until_backward(x):
    weight = torch.ones(64, 64, device=x.device, requires_grad=True)
    with LiveMemory() as memory:
        loss = (x @ weight).exp().sum()  # exp saves its result
        assert memory.live_bytes == MATRIX + 4
        loss.backward()
    assert weight.grad.shape == (64, 64)


def test_types_count_with_their_size(x):
    with LiveMemory() as memory:
        half = x.bfloat16()
    assert memory.peak_bytes == MATRIX // 2 and half.dtype == torch.bfloat16


def test_a_convolution_of_a_slice_counts_its_hidden_copy():
    x = torch.empty(1, 8, 10, 4, 4, device="meta")
    weight = torch.empty(8, 8, 1, 1, 1, device="meta")
    frame = 8 * 16 * 4
    with LiveMemory() as whole:
        F.conv3d(x, weight)
    with LiveMemory() as sliced:
        F.conv3d(x[:, :, 2:6], weight)
    assert whole.peak_bytes == 10 * frame
    assert sliced.peak_bytes == 8 * frame and sliced.peak_operation == "convolution"


def test_the_count_on_meta_is_that_on_a_cpu():
    peaks = []
    for device in ("meta", "cpu"):
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 3)
        ).to(device)
        with LiveMemory() as memory, torch.no_grad():
            layers(torch.empty(1, 3, 32, 32, device=device))
        peaks.append(memory.peak_bytes)
    assert peaks[0] == peaks[1] > 0
