"""Parameters that are used without calling their module, under ZeRO-3.

ZeRO-3 gathers a module's parameters when that module is called. A fused operation takes them from a module that is not:
``external_parameters`` of a part of the network says which, and which module they are needed in.
"""

from __future__ import annotations

from torch import nn

from cogvideox import dist


def register_external_parameters(module: nn.Module) -> None:
    """Let DeepSpeed gather them too. After ``deepspeed.initialize`` with ZeRO-3, before the first forward pass."""
    register = dist.import_deepspeed().zero.register_external_parameter
    for part in module.modules():
        if hasattr(part, "external_parameters"):
            for user, parameter in part.external_parameters():
                register(user, parameter)
