"""Which kernel computes attention: timed, checked against float32, and the same again for the same run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch.nn import attention as torch_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_cases import inputs, randomise, tiny

from cogvideox.config import ConfigError, load_config
from cogvideox.model import attention_backends as backends
from cogvideox.model.attention_backends import Shape, Trial, attend, choose, probe
from cogvideox.system_attention import settle_attention

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CPU = torch.device("cpu")
SMALL = Shape(items=2, tokens=96, head_dim=16, dtype=torch.float32, backward=True)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("name", ["auto", "flash", "math"])
def test_a_kernel_is_softmax_of_the_scaled_scores(name: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 40, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = exact(q.double(), k.double(), v.double())
    # float32 sums over 40 keys
    torch.testing.assert_close(attend(name, q, k, v).double(), expected, atol=1e-6, rtol=0)


def test_what_the_probe_compares_with_is_attention_and_its_gradients() -> None:
    case = backends._Case(SMALL, CPU)
    leaves = [t.detach().double().requires_grad_(True) for t in case.inputs]
    out = exact(*leaves)
    gradients = torch.autograd.grad(out, leaves, case.upstream.double())
    expected = case._at_rows([out.detach(), *gradients])
    for found, right in zip(case.expected, expected, strict=True):
        torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)
    assert case.error([out.detach(), *gradients]) < 1e-6
    # An error of a hundredth in one gradient alone is seen.
    gradients = gradients[0], gradients[1] * 1.01, gradients[2]
    assert case.error([out.detach(), *gradients]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_the_cpu_are_within_tolerance_and_others_say_what_they_need(dtype: torch.dtype) -> None:
    trials = {t.name: t for t in probe(Shape(2, 300, 64, dtype, backward=True), CPU)}
    for name in ("flash", "math"):
        trial = trials.pop(name)
        assert trial.left_out is None and 0 < trial.error < backends.TOLERANCE[dtype] / 2
    assert {t.left_out for t in trials.values()} == {"it needs a GPU"}


def test_an_inexact_kernel_is_timed_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded_to_eight_bits(backend: str, q, k, v, attn_mask=None):
        scale = [t.detach().abs().amax(-1, keepdim=True) / 127 for t in (q, k)]
        q, k = ((t / s).round() * s for t, s in zip((q, k), scale, strict=True))
        return attend("math", q, k, v)

    real = backends.attend
    monkeypatch.setattr(
        backends, "attend", lambda name, *a: (rounded_to_eight_bits if name == "flash" else real)(name, *a)
    )
    trials = {t.name: t for t in probe(Shape(2, 300, 64, torch.float32), CPU)}
    assert trials["flash"].seconds > 0 and "more than" in trials["flash"].left_out
    assert choose(list(trials.values())) == "math"


def test_of_equally_fast_kernels_the_first_is_taken_and_none_is_auto() -> None:
    def trial(name: str, seconds: float, left_out: str | None = None) -> Trial:
        return Trial(name, seconds, 1e-3, left_out)

    assert choose([trial("cudnn", 1.02), trial("flash", 1.0)]) == "cudnn"
    assert choose([trial("cudnn", 1.1), trial("flash", 1.0)]) == "flash"
    assert choose([trial("fa3", 0.5, "more than 1e-02"), trial("flash", 1.0)]) == "flash"
    assert choose([Trial("cudnn", left_out="it needs a GPU")]) == "auto"


def test_long_clips_are_timed_with_fewer_heads() -> None:
    pair = Shape(items=96, tokens=17776, head_dim=64, dtype=torch.bfloat16)  # 5B, 7.8 TFLOP
    assert pair.within() == pair
    longer = Shape(items=96, tokens=45106, head_dim=64, dtype=torch.bfloat16).within()
    assert longer.tokens == 45106 and longer.items * 4 * 45106**2 * 64 <= 8e12


def test_another_packages_kernel_takes_the_place_of_flash_and_leaves_it_after_the_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = []

    class Handle:
        def remove(self) -> None:
            events.append("out")

    torch_attention.register_flash_attention_impl(
        "OURS", register_fn=lambda: (events.append("in"), Handle())[1]
    )
    monkeypatch.setitem(backends.PLUGGED, "fa3", ("OURS", "json"))
    monkeypatch.setattr(
        backends, "missing", lambda name, device: None if name in ("fa3", "flash") else "not here"
    )
    trials = probe(SMALL, CPU, ("fa3", "flash"))
    assert [t.left_out for t in trials] == [None, None] and events == ["in", "out"]
    backends.activate("fa3", CPU)
    probe(SMALL, CPU, ("flash",))  # and is put back
    assert events == ["in", "out", "in", "out", "in"]
    backends.activate("flash", CPU)
    assert events[-1] == "out" and torch_attention.current_flash_attention_impl() is None


def test_what_is_missing_is_said() -> None:
    gpu = torch.device("cuda")
    assert backends.missing("fa3", gpu) == "no package flash_attn_interface"
    assert backends.missing("flash", gpu) is None and backends.missing("cudnn", CPU) == "it needs a GPU"


# ------------------------------------------------------------------------------------------------------ in the network


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def test_the_network_uses_the_kernel_that_it_is_told() -> None:
    net = randomise(tiny("5b"))
    arguments, found = inputs(net), {}
    for name in ("auto", "flash", "math"):
        net.attention_backend = name
        with torch.no_grad(), Operations() as operations:
            found[name] = net(**arguments)
        assert (FLASH in operations.seen) == (name != "math")
    for out in found.values():
        torch.testing.assert_close(out, found["auto"], atol=1e-5, rtol=0)  # float32, another order of sums


def test_a_mask_and_a_reference_work_with_every_kernel() -> None:
    q, k, v = torch.randn(3, 2, 3, 40, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    torch.testing.assert_close(attend("flash", q, k, v, mask), attend("auto", q, k, v, mask), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["flash", "math"])
def test_a_chosen_kernel_breaks_no_graph(name: str) -> None:
    net = randomise(tiny("5b", num_layers=1, attention=name, checkpoint_activations="selective"))
    arguments = inputs(net)
    expected = net(**arguments)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**arguments), expected, atol=1e-5, rtol=0)


def test_recomputation_keeps_the_output_of_a_chosen_kernel() -> None:
    net = randomise(tiny("5b", attention="flash", checkpoint_activations="selective"))
    with Operations() as operations:
        net(**inputs(net)).square().mean().backward()
    assert operations.seen.count(FLASH) == 2  # one per layer


# ------------------------------------------------------------------------------------------------------------ of a run


def config(attention: str):
    return load_config([CONFIGS / "tiny_t2v.yaml"], [f"model.transformer.attention={attention}"])


def test_a_misspelt_kernel_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="attention='cuddn': did you mean cudnn"):
        config("cuddn")


def test_a_kernel_that_does_not_run_here_is_an_error_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="attention=cudnn: it needs a GPU.*: auto, flash, math"):
        settle_attention(config("cudnn"), CPU, training=True)


def test_on_a_cpu_nothing_is_probed_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cogvideox")
    assert settle_attention(config("auto"), CPU, training=False) == "auto"
    assert "on the CPU, nothing is probed" in caplog.text


def test_a_run_goes_on_with_the_kernel_that_it_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Shape] = []

    def probed(shape: Shape, device: torch.device) -> str:
        asked.append(shape)
        return "math"

    monkeypatch.setattr("cogvideox.system_attention.fastest_backend", probed)
    assert settle_attention(config("auto"), CPU, training=True, recorded="flash") == "flash"
    assert settle_attention(config("flash"), CPU, training=True, recorded="math") == "flash"
    assert settle_attention(config("auto"), CPU, training=True, recorded="auto") == "auto" and not asked
    assert settle_attention(config("auto"), CPU, training=True, recorded="cudnn") == "math"
    assert "has used cudnn so far, which does not run here: it needs a GPU" in caplog.text
    settle_attention(config("auto"), CPU, training=False)
    # 16 clips of 4 heads; 3 latents of 8 x 8, in patches of 2 x 2, and 32 bytes of text; sampling: pairs of them
    assert asked == [
        Shape(64, 80, 32, torch.float32, backward=True),
        Shape(128, 80, 32, torch.float32, backward=False),
    ]
