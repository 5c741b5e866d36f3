"""The Triton kernels without a GPU: their numbers, interpreted, and that they compile for GPUs of three generations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not used either")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cogvideox.kernels.on_cuda import add_gated, norm_modulate, norm_rotate  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GENERATIONS = {"A100": 80, "H100": 90, "RTX 50": 120}
ROW = {"WIDTH": 3072, "BLOCK": 4096}
HEAD = {"DIM": 64, "BLOCK": 64, "ROWS": norm_rotate.ROWS, "NORM": True, "ROTATE": True}
KERNELS = {
    "add_gated": (add_gated._forward, ROW, 8),
    "add_gated backward": (add_gated._backward, ROW | {"SUMS": True}, 8),
    "norm_modulate": (norm_modulate._forward, ROW | {"GATED": True}, 8),
    "norm_modulate backward": (
        norm_modulate._backward,
        ROW | {"GATED": True, "NORM_SUMS": True, "GATE_SUMS": True},
        8,
    ),
    "norm_rotate": (norm_rotate._forward, HEAD, 4),
    "norm_rotate backward": (norm_rotate._backward, HEAD | {"SUMS": True}, 4),
}
COUNTS = {"tokens", "text_length", "text_blocks", "rows", "count", "heads", "tiles"}
IN_FLOAT32 = {"means", "rstds", "partial", "cos", "sin"}


def test_the_numbers_are_those_of_the_formulas() -> None:
    """Triton decides at its import whether it interprets, so another process does."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-5000:]


@pytest.fixture(scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(kernel, constants: dict, warps: int, generation: int):
    """For bf16 tensors whose strides are multiples of 16, as Triton would at the first call."""
    signature, known = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name == "eps":
            signature[name] = "fp32"
        elif name.endswith(("_item", "_head", "_token", "_part")) or name in COUNTS:
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in IN_FLOAT32 else "*bf16"
        if name.endswith(("_item", "_head", "_token", "_part")) or signature[name].startswith("*"):
            known[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, known)
    return triton.compile(source, GPUTarget("cuda", generation, 32), {"num_warps": warps})


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("gpu", GENERATIONS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_compiles_and_keeps_to_registers(name: str, gpu: str, tmp_path: Path) -> None:
    """At the 5B's sizes; nothing goes to local memory, and rows move 16 bytes at a time."""
    kernel, constants, warps = KERNELS[name]
    result = compiled(kernel, constants, warps, GENERATIONS[gpu])
    assert "ld.global.v4" in result.asm["ptx"] and "st.global.v4" in result.asm["ptx"]
    (tmp_path / "kernel.cubin").write_bytes(result.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
    registers = int(usage.split("REG:")[1].split()[0])
    assert registers * warps * 32 <= 65_536  # of a multiprocessor: at least one block fits
