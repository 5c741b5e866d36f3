"""A LoRA step: it does not wait for the device, and at the published size it needs less than PEFT's, counted."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideox import dist
from cogvideox.flops import clip_of
from cogvideox.live_memory import LiveMemory
from cogvideox.system import build_transformer
from scripts import benchmark_memory
from scripts.benchmark import train
from scripts.benchmark.lora_steps import Ours, Pair
from scripts.benchmark.settings import Settings
from scripts.benchmark.twins import rotary_of, transformer_twin

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")


class HostReads(TorchDispatchMode):
    """Operations whose result the host must wait for: (method of DeepSpeed's engine, who asked) -> how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            engine = [f.name for f in frames if f.filename.endswith("deepspeed/runtime/engine.py")]
            phase = next((n for n in ("forward", "backward", "step") if n in engine), "elsewhere")
            asked = "deepspeed" if "/deepspeed/" in frames[-1].filename else Path(frames[-1].filename).name
            self.found[phase, asked] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_the_device_only_where_deepspeed_decides_about_it(precision: str) -> None:
    """Data, forward and backward read nothing back; ZeRO looks at the gradients' norm before it updates."""
    dist.init()
    case = train.cases(Settings(quick=True))[0]
    pair = Pair(train.replace(case, precision=precision).configuration(), has_twin=False)
    ours: Ours = pair.ours()
    ours.step("selective")
    with HostReads() as reads:
        ours.step("selective")
    assert set(reads.found) == {("step", "deepspeed")}
    # Its norm, its clipping, its overflow flag (bf16), and one read of AdamW's own step count, a tensor of the host.
    assert sum(reads.found.values()) <= 4, reads.found


def test_a_log_line_is_what_reads() -> None:
    """The instrument sees a read that is there."""
    with HostReads() as reads:
        torch.ones(2).sum().item()
    assert reads.found == {("elsewhere", Path(__file__).name): 1}


# ----------------------------------------------------------------------------------------- memory at the published size


def units(config: Any, peak: int) -> float:
    return peak / (clip_of(config, config.data).tokens * config.model.transformer.hidden_size * 2)


def ours(layers: int, policy: str) -> float:
    """Peak of a LoRA pass of 5B with so many blocks, in tensors of tokens x width."""
    config = benchmark_memory.config_of("5B", "LoRA", policy, f"model.transformer.num_layers={layers}")
    return units(config, benchmark_memory.counted_pass(config)[1])


def theirs(layers: int) -> float:
    """The same of diffusers with PEFT and gradient checkpointing."""
    from peft import LoraConfig

    config = benchmark_memory.config_of("5B", "LoRA", "full", f"model.transformer.num_layers={layers}")
    plain = benchmark_memory.load("cogvideox_5b", overrides=(f"model.transformer.num_layers={layers}",))
    net = build_transformer(plain, device="meta", skip_init=True).to(torch.bfloat16)
    twin = transformer_twin(net).requires_grad_(False)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    twin.add_adapter(LoraConfig(r=config.lora.rank, lora_alpha=1, target_modules=names))
    twin.enable_gradient_checkpointing()
    twin.train()

    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            x = x.to(torch.bfloat16)
            rope = tuple(table.to("meta") for table in rotary_of(net, torch.empty(x.shape)))
            return twin(x, context, t, image_rotary_emb=rope, return_dict=False)[0]

    with benchmark_memory.fused_attention(), LiveMemory() as memory:
        benchmark_memory.loss_of(config, Network(), "meta").backward()
    return units(config, memory.peak_bytes)


def at_full_depth(few: float, more: float) -> float:
    """From 2 and 4 blocks to the 42 of 5B: all are alike."""
    return few + (more - few) / 2 * 40


def test_a_lora_step_of_5b_needs_less_than_pefts_under_full_and_keeps_attention_for_one_tensor_per_block() -> (
    None
):
    peft = at_full_depth(theirs(2), theirs(4))
    full = at_full_depth(ours(2, "full"), ours(4, "full"))
    selective = at_full_depth(ours(2, "selective"), ours(4, "selective"))
    assert full <= 56
    assert full <= 0.9 * peft
    # Attention's output and its log-sum-exp, which are then not computed twice.
    assert selective - full == pytest.approx(42 * 1.03 - 1, abs=0.5)
