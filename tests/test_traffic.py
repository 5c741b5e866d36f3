"""Bytes moved, counted: closed forms, and the known figure of diffusers' transformer layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformer_cases import full

from cogvideox.traffic import Traffic

SIZES = {"2b": (1920, 30), "5b": (3072, 48)}  # width, heads
TOKENS = 226 + 13 * 30 * 45


@pytest.fixture(autouse=True)
def _fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that a GPU picks: torch would take the unfused one on the meta device."""

    def flash(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)


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


def passes(kind: str, forward_of) -> float:
    """Reads and writes per layer of a guidance pair at 49 x 480 x 720, in tensors of tokens x width in bf16."""
    traffic = []
    for layers in (1, 2):
        forward = forward_of(kind, layers)
        with torch.no_grad():
            traffic.append(counted(forward).bytes)
    return (traffic[1] - traffic[0]) / (2 * TOKENS * SIZES[kind][0] * 2)


def in_diffusers(kind: str, layers: int):
    from diffusers import CogVideoXTransformer3DModel

    rotary = kind == "5b"
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(
            num_attention_heads=SIZES[kind][1],
            num_layers=layers,
            text_embed_dim=4096,
            sample_width=90,
            sample_height=60,
            use_rotary_positional_embeddings=rotary,
        ).to(torch.bfloat16)
        x, text = (torch.empty(size, dtype=torch.bfloat16) for size in ((2, 13, 16, 60, 90), (2, 226, 4096)))
        rope = (torch.empty(TOKENS - 226, 64), torch.empty(TOKENS - 226, 64)) if rotary else None
        timesteps = torch.zeros(2)
    return lambda: model(x, text, timesteps, image_rotary_emb=rope)


def ours(kind: str, layers: int):
    net = full(
        kind, dtype=torch.bfloat16, num_layers=layers, num_frames=49, latent_height=60, latent_width=90
    )
    with torch.device("meta"):
        x, text = torch.empty(2, 13, 16, 60, 90), torch.empty(2, 226, 4096, dtype=torch.bfloat16)
        timesteps = torch.zeros(2)
    return lambda: net(x, timesteps, text)


@pytest.mark.parametrize(("kind", "known"), [("5b", 118.7), ("2b", 61.0)])
def test_diffusers_layers_move_what_was_counted_of_them_before(kind: str, known: float) -> None:
    """118.7 and 61.0 are of another counter, which reads the tokens once for q, k and v: three products read them
    three times, two passes more."""
    assert passes(kind, in_diffusers) == pytest.approx(known + 2.0, abs=0.1)


@pytest.mark.parametrize(("kind", "most"), [("5b", 34.3), ("2b", 33.9)])
def test_our_layers_move_what_their_fused_operators_and_products_must(kind: str, most: float) -> None:
    """The bar is 45. By hand: norm and modulation 2, q|k|v 4, norm and rotation 4, attention 4, its output 2, gate with
    norm and modulation 4, the MLP's two products 5 each, gate 3, and the weights once: 33 and 24 D^2 bytes (1.0)."""
    assert passes(kind, ours) <= most < 45


@pytest.mark.parametrize("kind", SIZES)
def test_nothing_is_copied_concatenated_or_cast_in_a_layer(kind: str) -> None:
    calls = []
    for layers in (1, 2):
        with torch.no_grad():
            calls.append(counted(ours(kind, layers)).calls)
    assert sorted(calls[1] - calls[0]) == [
        "_addmm_activation",
        "_scaled_dot_product_flash_attention",
        "add_gated",
        "addmm",
        "gate_norm_modulate",
        "norm_modulate",
        "norm_rotate",
        "silu",  # of the time embedding: a row
    ]
