"""What lives at the peak of a forward pass without gradients, counted at full size on the meta device."""

from __future__ import annotations

import pytest
import torch
from transformer_cases import KINDS, full, inputs, randomise, tiny

from cogvideox.live_memory import LiveMemory


@pytest.fixture
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that a GPU picks: torch would take the unfused one on the meta device, with a table of S x S."""

    def flash(query, key, value, attn_mask=None):
        assert attn_mask is None
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)


def peak(
    kind: str, *, chunk_rows: int | None, size: tuple[int, int] = (60, 90), unfused: bool = False
) -> LiveMemory:
    """A guidance pair of the published size: batch 2, 13 latents of 60 x 90, bfloat16."""
    net = full(kind, dtype=torch.bfloat16, num_layers=3, num_frames=49, latent_height=60, latent_width=90)
    net.chunk_mlp(chunk_rows)
    if unfused:  # somebody looks at the hidden layer before the GELU
        for layer in net.transformer.layers:
            layer.mlp.dense_h_to_4h.register_forward_hook(lambda *_: None)
    with torch.device("meta"):
        x = torch.empty(2, 13, 16, *size, dtype=torch.float32)
        context = torch.empty(2, 226, 4096, dtype=torch.bfloat16)
        timesteps = torch.zeros(2)
        with LiveMemory() as memory, torch.no_grad():
            net(x, timesteps, context)
    return memory


@pytest.mark.parametrize(("kind", "gigabytes"), [("5b", 1.8), ("2b", 1.15)])
def test_activations_of_a_guidance_pair_stay_under_the_bar(
    fused_attention: None, kind: str, gigabytes: float
) -> None:
    """The bar is 2.4 GB for the 5B. Layers come one after the other, so three have the peak of all."""
    chunked = peak(kind, chunk_rows=8192)
    assert chunked.peak_bytes <= gigabytes * 1e9
    assert chunked.peak_operation == "_scaled_dot_product_flash_attention"  # and not the MLP


@pytest.mark.parametrize("size", [(60, 90), (90, 160)])
def test_the_planner_s_constants_are_the_counted_peaks(fused_attention: None, size: tuple[int, int]) -> None:
    """With the GELU in its product the MLP is not the peak, and chunks of it save nothing; without (a LoRA beside the
    weights, or eight-bit weights) they do."""
    from cogvideox.planning.sampling import LIVE_TENSORS, LIVE_TENSORS_UNFUSED

    unit = 2 * (226 + 13 * size[0] * size[1] // 4) * 3072 * 2
    cases = {(None, False): LIVE_TENSORS, (8192, False): LIVE_TENSORS, (8192, True): LIVE_TENSORS}
    cases[None, True] = LIVE_TENSORS_UNFUSED
    for (rows, unfused), constant in cases.items():
        counted = peak("5b", chunk_rows=rows, size=size, unfused=unfused).peak_bytes / unit
        assert counted <= constant <= 1.03 * counted


@pytest.mark.parametrize("rows", [1, 7, 154, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_size_change_nothing_but_rounding(kind: str, rows: int) -> None:
    net = randomise(tiny(kind))
    arguments = inputs(net)
    with torch.no_grad():
        expected = net(**arguments)
        net.chunk_mlp(rows)
        torch.testing.assert_close(net(**arguments), expected, atol=1e-5, rtol=0)


def test_training_does_not_chunk_and_does_not_overwrite() -> None:
    net, plain = randomise(tiny("5b")), randomise(tiny("5b"))
    net.chunk_mlp(3)
    for one in (net, plain):
        one(**inputs(one)).square().mean().backward()
    pairs = zip(net.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_numbers_are_those_of_training(kind: str) -> None:
    net = randomise(tiny(kind))
    with torch.no_grad():
        inference = net(**inputs(net))
    assert torch.equal(inference, net(**inputs(net)))


def test_queries_that_somebody_else_holds_are_not_overwritten() -> None:
    """Without the norm of queries and keys they are views of one product, which a mixin may look at afterwards."""
    from functools import partial

    from cogvideox.model.adaln import ExpertAdaLN

    net = randomise(tiny("5b", adaln=partial(ExpertAdaLN, qk_ln=False)))
    seen = {}
    rope = net.mixins["pos_embed"]

    def hook(module, args, output):
        seen["qkv"], seen["copy"] = output, output.clone()

    net.transformer.layers[0].attention.query_key_value.register_forward_hook(hook)
    with torch.no_grad():
        net(**inputs(net))
    assert rope is not None and torch.equal(seen["qkv"], seen["copy"])


def test_a_chunk_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="MLP chunks of 0 tokens: expected at least 1"):
        tiny("2b").chunk_mlp(0)
