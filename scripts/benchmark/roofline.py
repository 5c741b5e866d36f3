"""What this machine can do, measured on the spot: matrix products, attention at head size 64, copies.

    python -m scripts.benchmark roofline

With these rates any time is a fraction of a bound that nobody on this machine beats:

    bound = bound_of(lambda: net(**inputs), settings.device, "bfloat16")
    Row(..., bound_fraction=bound / seconds)

On a CPU one thread and small sizes, on a GPU the sizes of the published models.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.benchmark.counting import Operations
from scripts.benchmark.results import Row
from scripts.benchmark.settings import Settings

DTYPES = ("float32", "bfloat16")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HEAD = 64
FEWEST, MOST = 2, 20
"""Runs of one measurement; it ends between them when its time is up."""


@dataclass(frozen=True)
class Sizes:
    """square: the side of the large product.  rows, width: of the model's four products.
    tokens, heads: of the attention.  copied: elements of each of three arrays.  seconds: for one measurement.
    """

    square: int
    rows: int
    width: int
    tokens: int
    heads: int
    copied: int
    seconds: float

    @property
    def products(self) -> dict[str, tuple[int, int, int]]:
        """name -> (m, k, n) of (m, k) x (k, n). The four are qkv, the attention's output, and both of the MLP."""
        n, d = self.rows, self.width
        square = (self.square,) * 3
        return {
            "square": square,
            "qkv": (n, d, 3 * d),
            "out": (n, d, d),
            "h to 4h": (n, d, 4 * d),
            "4h to h": (n, 4 * d, d),
        }


GPU_SIZES = (
    Sizes(8192, 2 * 17_776, 3072, 17_776, 48, 2**28, 0.25),
    Sizes(8192, 2 * 17_776, 1920, 17_776, 30, 2**28, 0.25),
)
"""Of 5B and 2B, a guidance pair of 49 x 480 x 720."""

CPU_SIZES = (Sizes(1536, 2 * 1186, 512, 17_776, 1, 2**25, 0.5),)
"""The products of the CPU's benchmark network, attention with one head of the published tokens."""

QUICK_SIZES = (Sizes(64, 64, 64, 64, 1, 2**10, 0.0),)


@dataclass(frozen=True)
class Rates:
    """The best of what was measured in one dtype: FLOP/s of products and of attention, bytes/s read and written."""

    matmul: float
    attention: float
    memory: float

    def bound_seconds(self, flops_matmul: float, flops_attention: float, bytes_moved: float) -> float:
        """The least time: arithmetic at the best rates, or, where that takes longer, all bytes at the copy's rate.

        A multiply-add is 2 FLOPs.  bytes_moved: what has to be read and written however the work is arranged: weights,
        inputs, outputs.
        """
        arithmetic = flops_matmul / self.matmul + flops_attention / self.attention
        return max(arithmetic, bytes_moved / self.memory)


@functools.cache
def rates(device: str, dtype: str) -> Rates:
    """Of this machine, measured once per process (on a CPU about 12 s). dtype: "float32" or "bfloat16"."""
    # A CPU without bf16 instructions is faster where bf16 is multiplied as float32, which is as exact.
    dtypes = DTYPES if dtype == "bfloat16" else (dtype,)

    def best(kind: str) -> float:
        return 1e9 * max(
            row.counted[RATE]
            for row in measured(device, False)
            if row.counted and row.case.startswith(kind) and row.case.endswith(dtypes)
        )

    return Rates(best("product"), best("attention"), best("triad"))


def bound_of(work: Callable[[], Any], device: str, dtype: str) -> float:
    """The least seconds of ``work()``: its products and attention, counted in one run, at the best rates."""
    with Operations() as counted:
        work()
    products = counted.flops - counted.attention
    return rates(device, dtype).bound_seconds(products, counted.attention, 0.0)


RATE = "G/s"
"""10^9 FLOPs or bytes in a second."""


def run(settings: Settings) -> list[Row]:
    return list(measured(settings.device, settings.quick))


@functools.cache
def measured(device: str, quick: bool) -> tuple[Row, ...]:
    rows: list[Row] = []
    sizes = QUICK_SIZES if quick else GPU_SIZES if device == "cuda" else CPU_SIZES
    for index, size in enumerate(sizes):
        for dtype in DTYPES:
            # A GPU's float32 is not what any of the published models runs in.
            if device == "cuda" and dtype == "float32" and index:
                continue
            for name, (m, k, n) in size.products.items():
                if name == "square" and index:
                    continue
                rows.append(_product(name, m, k, n, device, dtype, size.seconds))
            rows += _attention(size, device, dtype)
        if not index:
            rows.append(_triad(size, device))
    return tuple(rows)


def _product(name: str, m: int, k: int, n: int, device: str, dtype: str, seconds: float) -> Row:
    a = _random((m, k), device, dtype)
    weight, bias = _random((n, k), device, dtype), _random((n,), device, dtype)
    spent = fastest(lambda: F.linear(a, weight, bias), device, seconds)
    return _row(f"product, {name}, {m} x {k} x {n}, {dtype}", "torch", spent, 2 * m * k * n)


def _attention(size: Sizes, device: str, dtype: str) -> list[Row]:
    rows = []
    # torch has one fused kernel for CPUs, and calls it flash.
    for name, backend in BACKENDS.items() if device == "cuda" else [("flash", SDPBackend.FLASH_ATTENTION)]:
        heads = 1 if name == "math" else size.heads  # it makes a table of tokens x tokens for each
        shape = (1, heads, size.tokens, HEAD)
        case = (
            f"attention, {heads} {'head' if heads == 1 else 'heads'} of {HEAD}, {size.tokens} tokens, {dtype}"
        )
        work = partial(_attend, *(_random(shape, device, dtype) for _ in range(3)), backend)
        try:
            spent = fastest(work, device, size.seconds)
        except RuntimeError as error:  # a kernel that does not take this dtype, or not on this GPU
            rows.append(Row("roofline", case, name, note=f"refused: {str(error).splitlines()[0]}"))
        else:
            rows.append(_row(case, name, spent, 4 * size.tokens**2 * HEAD * heads))
    return rows


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(query, key, value)


def _triad(size: Sizes, device: str) -> Row:
    """a = b + c: two read, one written  (McCalpin's STREAM, without its factor)."""
    b, c = (_random((size.copied,), device, "float32") for _ in range(2))
    a = torch.empty_like(b)
    spent = fastest(lambda: torch.add(b, c, out=a), device, size.seconds)
    case = f"triad, 3 arrays of {4 * size.copied / 1e6:.0f} MB, float32"
    return _row(case, "torch", spent, 3 * 4 * size.copied)


def _random(shape: tuple[int, ...], device: str, dtype: str) -> torch.Tensor:
    """Random, because a GPU multiplies zeros with less power and a higher clock."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, dtype))


def _row(case: str, candidate: str, seconds: float, work: float) -> Row:
    return Row("roofline", case, candidate, seconds, counted={RATE: work / seconds / 1e9})


def fastest(work: Callable[[], object], device: str, seconds: float) -> float:
    """Of several runs within about so many seconds, after one to warm up: a rate that can be reached."""
    measure = _device_seconds if device == "cuda" else _cpu_seconds
    work()
    end, spent = time.monotonic() + seconds, []
    while len(spent) < MOST and (len(spent) < FEWEST or time.monotonic() < end):
        spent.append(measure(work))
    return min(spent)


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return max(time.process_time() - start, 1e-9)


def _device_seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
