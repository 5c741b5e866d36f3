"""The linear layers of the network. Their parameters and keys are ``nn.Linear``'s."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox.kernels.forms import has_bf16_products


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


def is_frozen(*layers: nn.Module) -> bool:
    """Plain linear layers that do not train and are whole here, and that nobody watches or fills as they are called."""
    return all(
        type(layer) in (Linear, nn.Linear)
        and not layer.weight.requires_grad
        and not hasattr(layer.weight, "ds_id")  # ZeRO-3 gathers a weight when its layer is called
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        for layer in layers
    )
