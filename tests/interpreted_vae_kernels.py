"""What `test_vae_kernels.py` runs in a process where Triton interprets its kernels: `activated` by them and without."""

from __future__ import annotations

import pytest
import torch
from vae_cases import random

from cogvideox.vae import norms
from cogvideox.vae.blocks import double_frames


@pytest.fixture(autouse=True)
def _kernels_for_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "is_fused", lambda x: True)


# float32: sums of a few thousand terms. bfloat16: both fields and the result are rounded, 2^-9 of terms that may be
# larger than their sum.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("scale", [0, 1, 4])
@pytest.mark.parametrize("past_frames", [0, 2])
def test_norm_modulation_and_silu(dtype: torch.dtype, scale: int, past_frames: int) -> None:
    """Frames of more than one piece, the last of them partly filled; a mean far from zero."""
    s = scale or 1
    x = (random(2, 6, 3, 15 * s, 20 * s) * 2 + 5).to(dtype)
    z = random(2, 5, 3, 15, 20, seed=2).to(dtype) if scale else None
    torch.manual_seed(0)
    norm = norms.SpatialNorm(6, 5, 3) if scale else torch.nn.GroupNorm(3, 6, eps=norms.NORM_EPS)
    plain = norm.norm_layer if scale else norm
    plain.weight.copy_(random(6, seed=3)), plain.bias.copy_(random(6, seed=4))
    norm.to(dtype)
    past = random(2, 6, past_frames, *x.shape[3:], seed=5).to(dtype) if past_frames else None
    for twice in (False, True):
        exact, wide = norm.double(), x.double()
        frames = double_frames(wide, True) if twice else wide
        given = () if z is None else (double_frames(z.double(), True) if twice else z.double(),)
        expected = torch.nn.functional.silu(exact(frames, *given))
        expected = expected[:, :, [0, 1, 3]] if twice else expected
        norm.to(dtype)
        found = norms.activated(norm, [x], z, past, others_twice=twice)
        assert found.dtype == dtype
        assert past is None or torch.equal(found[:, :, :past_frames], past)
        found = found[:, :, past_frames:].double()
        largest = expected.abs().max()
        assert (found - expected).abs().max() <= TOLERANCE[dtype] * largest
    overwritten = x.clone()
    assert norms.activated(norm, [overwritten], z, in_place=True) is overwritten
    torch.testing.assert_close(overwritten, norms.activated(norm, [x], z))
