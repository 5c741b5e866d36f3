"""Embedding of a number (the timestep, or ``ofs``) as a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoid(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """[cos(v f_i) | sin(v f_i)] with f_i = max_period^(-i / half), i < half = dim / 2  (Ho et al. 2020; cosine first).

    values: (B,), integers or fractions. Returns (B, dim) in float32.
    """
    assert dim % 2 == 0, dim
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=values.device)
    # In this order of operations: at t = 999 another rounding of a frequency moves the output by 1e-5.
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * index / half)
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)


def embedding_mlp(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
    )
