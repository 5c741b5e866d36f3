"""Which kernel computes attention: timed at the shape of the run, and checked, before the run.

Attention is half of the transformer's work or more, and at 64 channels per head the kernels that torch offers differ
by half (H100, forward: FlashAttention-2 324, cuDNN 413, FlashAttention-3 497 TFLOP/s; Shah et al. 2024, figure 5).

All of them are ``F.scaled_dot_product_attention``, also FlashAttention-3 and 4, which torch puts in the place of its
FlashAttention-2 (``torch.nn.attention.activate_flash_attention_impl``): recomputation, compilation and gradients know
one operation. SageAttention and kernels in fp8 are not candidates: their error is several times the tolerance.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvideox.execution import ATTENTION, AUTO, check_attention

logger = logging.getLogger("cogvideox")

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
}

PLUGGED = {"fa3": ("FA3", "flash_attn_interface"), "fa4": ("FA4", "flash_attn.cute")}
"""Kernels that torch takes in place of its own: its name for them, and the package that has them."""

CANDIDATES = ("fa3", "fa4", "cudnn", "flash", "efficient", "math")
"""In the order in which equally fast ones are taken."""

MARGIN = 1.03
"""A kernel that is at most this much slower than the fastest counts as equally fast: the choice of two runs agrees."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the root mean square error, relative. Probabilities and outputs rounded once, to 2^-9 in bfloat16, give 2e-3;
sums over 10^4 keys in float32 1e-6; eight-bit scores 3e-2."""

ROWS = 128
"""Queries whose outputs and gradients are compared: all scores of a clip in float32 would take 60 GB."""

WORK = 8e12
"""FLOPs of a timed call, at most: those of a guidance pair of the 5B. Of longer clips fewer heads are timed."""


@dataclass(frozen=True)
class Shape:
    """What a kernel is timed at.  items: clips x heads.  backward: with gradients, as in training."""

    items: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    backward: bool = False

    def within(self, work: float = WORK) -> Shape:
        per_item = 4.0 * self.tokens**2 * self.head_dim
        items = max(1, min(self.items, int(work / per_item)))
        return Shape(items, self.tokens, self.head_dim, self.dtype, self.backward)

    def __str__(self) -> str:
        passes = "forward and backward" if self.backward else "forward"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.items} heads x {self.tokens} tokens x {self.head_dim}, {kind}, {passes}"


@dataclass(frozen=True)
class Trial:
    """seconds and error are None where ``left_out`` says why the kernel was not timed or not taken."""

    name: str
    seconds: float | None = None
    error: float | None = None
    left_out: str | None = None

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.name} ({self.left_out})"
        because = f", {self.left_out}" if self.left_out else ""
        return f"{self.name} {1e3 * self.seconds:.2f} ms (error {self.error:.1e}{because})"


def attend(
    backend: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v by the kernel ``backend``: (B, heads, S, head_dim) each.

    auto: torch's choice, and always with a mask, which the fast kernels do not take. RuntimeError (torch's) where the
    kernel cannot run on these.
    """
    if backend == AUTO or attn_mask is not None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
    with sdpa_kernel(KERNELS[backend]):
        return F.scaled_dot_product_attention(query, key, value)


def activate(backend: str, device: torch.device) -> None:
    """Make ``backend`` ready in this process. Raises ValueError naming the key where it cannot run on ``device``.

    Kernels of other packages are put in FlashAttention-2's place for the whole process.
    """
    check_attention(backend)
    if backend == AUTO:
        return
    reason = missing(backend, device)
    if reason is not None:
        there = [name for name in ATTENTION if missing(name, device) is None]
        raise ValueError(
            f"model.transformer.attention={backend}: {reason}. On this machine: {', '.join(there)}"
        )
    _plug(backend)


def missing(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on ``device`` at all; None where it may, depending on shape and dtype."""
    if backend == AUTO:
        return None
    if device.type == "cpu" and backend not in ("flash", "math"):
        return "it needs a GPU"
    if backend not in PLUGGED:
        return None
    name, package = PLUGGED[backend]
    known = getattr(torch_attention, "list_flash_attention_impls", list)()
    if name not in known:
        return f"this version of torch ({torch.__version__}) has no place for it"
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that holds it
        found = False
    return None if found else f"no package {package}"


def probe(shape: Shape, device: torch.device, names: Sequence[str] = CANDIDATES) -> list[Trial]:
    """Time and error of every kernel at ``shape``, in the order of ``names``; they run one after the other."""
    shape = shape.within()
    active = _plugged()
    try:
        case = _Case(shape, device)
        return [_trial(name, case, device) for name in names]
    finally:
        _plug(active)


def choose(trials: Sequence[Trial]) -> str:
    """The fastest kernel within tolerance; of those within ``MARGIN`` of it, the first. ``auto`` for none."""
    able = [trial for trial in trials if trial.left_out is None]
    if not able:
        return AUTO
    fastest = min(trial.seconds for trial in able)
    return next(trial.name for trial in able if trial.seconds <= MARGIN * fastest)


def fastest_backend(shape: Shape, device: torch.device) -> str:
    """The choice for a run of ``shape``, logged with what it was chosen from. About a second on a GPU."""
    if device.type == "cpu":
        logger.info("attention: torch has one fused kernel on the CPU, nothing is probed")
        return AUTO
    began = time.perf_counter()
    trials = probe(shape, device)
    chosen = choose(trials)
    timed, others = (
        "; ".join(str(t) for t in trials if (t.seconds is None) is absent) for absent in (False, True)
    )
    logger.info(
        "attention: %s, for %s: %s%s (%.1f s)",
        "torch's own choice, as no kernel passed" if chosen == AUTO else chosen,
        shape.within(),
        timed,
        f"; left out: {others}" if others else "",
        time.perf_counter() - began,
    )
    return chosen


class _Case:
    """Random queries, keys and values laid out as the network's, and what float32 makes of ``ROWS`` of the queries.

    The gradient of the output is zero but at these, so that all gradients of keys and values come from them.
    """

    def __init__(self, shape: Shape, device: torch.device):
        self.shape = shape
        generator = torch.Generator(device).manual_seed(0)
        size = (1, shape.tokens, 3, shape.items, shape.head_dim)
        # One tensor for all three: a token's heads are neighbours in memory, as in the network.
        qkv = torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(shape.dtype)
        self.inputs = [t.transpose(1, 2).detach() for t in qkv.unbind(2)]  # (1, heads, S, d) each
        self.rows = torch.randperm(shape.tokens, generator=generator, device=device)[:ROWS].sort().values
        self.upstream = torch.zeros_like(self.inputs[0])
        chosen = (1, shape.items, len(self.rows), shape.head_dim)
        noise = torch.randn(chosen, generator=generator, device=device, dtype=torch.float32)
        self.upstream[:, :, self.rows] = noise.to(shape.dtype)
        for tensor in self.inputs:
            tensor.requires_grad_(shape.backward)
        self.expected = self._in_float32()

    def run(self, backend: str) -> list[Tensor]:
        """Output, and gradients of q, k, v where the shape asks for them."""
        with torch.set_grad_enabled(self.shape.backward):
            out = attend(backend, *self.inputs)
            if not self.shape.backward:
                return [out]
            return [out.detach(), *torch.autograd.grad(out, self.inputs, self.upstream)]

    def error(self, found: Sequence[Tensor]) -> float:
        """The largest root mean square error of them, each relative to the root mean square of what is expected."""
        parts = self._at_rows(found)
        return max(
            ((a.float() - b).square().mean() / b.square().mean()).sqrt().item()
            for a, b in zip(parts, self.expected, strict=True)
        )

    def scores_bytes(self) -> int:
        s = self.shape
        return s.items * s.tokens**2 * s.dtype.itemsize

    def _at_rows(self, found: Sequence[Tensor]) -> list[Tensor]:
        out, *gradients = found
        parts = [out[:, :, self.rows]]
        return parts if not gradients else [*parts, gradients[0][:, :, self.rows], *gradients[1:]]

    def _in_float32(self) -> list[Tensor]:
        """Head by head: 128 x 17776 scores of one are 9 MB."""
        by_head = []
        for head in range(self.shape.items):
            q, k, v = (t[:, head : head + 1].detach().float() for t in self.inputs)
            q = q[:, :, self.rows]
            leaves = [t.requires_grad_(self.shape.backward) for t in (q, k, v)]
            with torch.set_grad_enabled(self.shape.backward):
                scores = leaves[0] @ leaves[1].transpose(-1, -2) / math.sqrt(self.shape.head_dim)
                out = scores.softmax(-1) @ leaves[2]
                parts = [out.detach()]
                if self.shape.backward:
                    upstream = self.upstream[:, head : head + 1][:, :, self.rows].float()
                    parts += torch.autograd.grad(out, leaves, upstream)
            by_head.append(parts)
        return [torch.cat(parts, dim=1) for parts in zip(*by_head, strict=True)]


def _trial(name: str, case: _Case, device: torch.device) -> Trial:
    reason = missing(name, device)
    if reason is None and name == "math":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        needed = 4 * case.scores_bytes()  # scores and probabilities, and their gradients
        if needed > free / 2:
            reason = f"its scores take {needed / 2**30:.0f} GiB"
    if reason is not None:
        return Trial(name, left_out=reason)
    try:
        _plug(name)
        error = case.error(case.run(name))  # the warm-up
        seconds = _timed(lambda: case.run(name), device)
    except (
        RuntimeError,
        ImportError,
    ) as problem:  # torch's "no available kernel", a package for another torch
        if isinstance(problem, torch.cuda.OutOfMemoryError):
            return Trial(name, left_out="out of memory")
        return Trial(name, left_out=str(problem).strip().splitlines()[0][:100])
    limit = TOLERANCE.get(case.shape.dtype, TOLERANCE[torch.float32])
    too_far = None if error <= limit else f"more than {limit:.0e}"
    return Trial(name, seconds, error, too_far)


def _timed(call: Callable[[], object], device: torch.device, runs: int = 3) -> float:
    """Seconds of the fastest of ``runs`` calls."""
    seconds = []
    for _ in range(runs):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def _plug(backend: str | None) -> None:
    """Put the kernel of another package in FlashAttention-2's place, or FlashAttention-2 back there."""
    wanted = PLUGGED[backend][0] if backend in PLUGGED else None
    current = getattr(torch_attention, "current_flash_attention_impl", lambda: None)()
    if wanted == current:
        return
    if wanted is None:
        torch_attention.restore_flash_attention_impl()
    else:
        torch_attention.activate_flash_attention_impl(wanted)


def _plugged() -> str | None:
    current = getattr(torch_attention, "current_flash_attention_impl", lambda: None)()
    return next((name for name, (known, _) in PLUGGED.items() if known == current), None)
