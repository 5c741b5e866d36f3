"""The linear layers of the network. Their parameters and keys are ``nn.Linear``'s."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """``nn.Linear``; without gradients, on a CPU that has no bf16 instructions, bf16 is multiplied as float32.

    torch's own bf16 product takes 5 times as long there as casting the operands (2372 x 512 x 2048, AVX2). Both sum
    in float32 and round once. A float32 copy of the operands lives during the product; training, where it would be
    kept for the backward pass, takes torch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        is_slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled()
        if not is_slow or has_bf16_products():
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


@torch.compiler.assume_constant_result  # a compiled graph would break here, also where the result is cached
def has_bf16_products() -> bool:
    """Whether torch multiplies bf16 matrices by instructions of this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
