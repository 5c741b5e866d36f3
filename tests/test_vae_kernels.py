"""The Triton kernels of the VAE's norms without a GPU: their numbers, interpreted, and that they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not used either")

from cogvideox.kernels.on_cuda import group_norm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CONSTANTS = {"PIECE": 4096, "PIXELS": group_norm.PIXELS}
IN_FLOAT32 = {"means", "squares", "factor", "offset"}
TENSORS = IN_FLOAT32 | {"x", "scale", "shift", "out"}


def test_the_numbers_are_those_of_torchs_group_norm() -> None:
    """Triton decides at its import whether it interprets, so another process does."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_vae_kernels.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-5000:]


@pytest.mark.parametrize("fields", [True, False])
@pytest.mark.parametrize("name", ["_plane_moments", "_scaled_silu"])
def test_they_compile_for_an_h200(name: str, fields: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(group_norm, name)
    constants = CONSTANTS | {"HAS_FIELDS": fields}
    signature, known = {}, {}
    for index, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            known[(index,)] = constants[parameter.name]
        elif parameter.name in TENSORS:
            signature[parameter.name] = "*fp32" if parameter.name in IN_FLOAT32 else "*bf16"
        else:
            signature[parameter.name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=known)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]
