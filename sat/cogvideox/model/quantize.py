"""Weights of the transformer's layers in eight bits: half the memory of bfloat16, at a loss that ``report`` measures.

int8 and fp8 need nothing but torch and run on every device: the weight is stored in eight bits with one scale per
output channel and multiplied in the precision of its input. torchao's weight-only forms are there by name. For
sampling (``sample.quantize``), and as the frozen base of a LoRA (``lora.quantize_base``): gradients pass through to the
input, and the backward pass casts the weight anew instead of keeping a cast copy.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger("cogvideox")

METHODS = ("int8", "fp8", "torchao_int8", "torchao_fp8")

HIGH_PRECISION = (
    "patch, text, time and ofs embeddings",
    "position tables",
    "adaLN modulations",
    "layer norms, also of queries and keys",
    "final layer",
    "biases",
    "LoRA kept beside the weights",
)
"""What stays as it is: small, or what every layer depends on."""

_STORAGE = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class _Product(torch.autograd.Function):
    """x -> ``module.product(x)``, linear in x; backward is ``module.transposed``, and no cast weight is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return module.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.module.transposed(gradient), None


class QuantizedLinear(nn.Module, ABC):
    """A frozen linear layer whose weight is held in eight bits, as ``product`` and ``transposed`` know it.

    Its parts are buffers, and for training not ``persistent``: a checkpoint of adapters does not hold their base.
    """

    def __init__(self, linear: nn.Linear, persistent: bool):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("bias", bias, persistent)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What adapters beside it are made in: the network's dtype."""
        return torch.float32 if self.bias is None else self.bias.dtype

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out) in its dtype, without the bias."""

    @abstractmethod
    def transposed(self, gradient: Tensor) -> Tensor:
        """gradient: (..., out). Returns (..., in) in its dtype: the gradient of the input."""

    @abstractmethod
    def dequantised(self) -> Tensor:
        """The weight that is used: (out, in), float32."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in), float32, bfloat16 or float16. Returns (..., out) in its dtype."""
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        y = _Product.apply(x, self) if needs_gradient else self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class EightBitLinear(QuantizedLinear):
    """The weight is stored as w_ij = s_i q_ij, with s_i = max_j |w_ij| / largest q.

    Symmetric and per output channel: y_i = s_i (sum_j q_ij x_j) + b_i, so the product itself runs on q, cast to the
    dtype of x (exact: bfloat16 and wider hold every int8 and float8_e4m3 value).
    method: "int8" (q in -127 ... 127, rounded to even) or "fp8" (torch.float8_e4m3fn, up to 448).
    """

    def __init__(self, linear: nn.Linear, method: str, persistent: bool = True):
        super().__init__(linear, persistent)
        self.method = method
        dtype, largest = _STORAGE[method]
        weight = linear.weight.detach().float()
        # A channel of zeros has any scale.
        scale = (weight.abs().amax(dim=1) / largest).clamp_(min=torch.finfo(torch.float32).tiny)
        quotient = weight / scale[:, None]
        quotient = quotient.round_() if method == "int8" else quotient
        self.register_buffer("weight", quotient.clamp_(-largest, largest).to(dtype), persistent)
        self.register_buffer("scale", scale, persistent)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def product(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # q x is y / s, thousands of times y: beyond what float16 can hold
            return F.linear(x, self.dequantised().to(x.dtype))
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)

    def transposed(self, gradient: Tensor) -> Tensor:
        if gradient.dtype == torch.float16:
            return gradient @ self.dequantised().to(gradient.dtype)
        return (gradient * self.scale.to(gradient.dtype)) @ self.weight.to(gradient.dtype)

    def dequantised(self) -> Tensor:
        return self.weight.float() * self.scale[:, None]

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # Moved with the network, not cast with it, which DeepSpeed and ``.bfloat16()`` do: float8 would lose its eight
        # bits, and bfloat16 scales add an error of their own.
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        for name, before in (("weight", weight), ("scale", scale)):
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.method}"


class TorchaoLinear(QuantizedLinear):
    """torchao's weight-only form of a weight, held out of sight: DeepSpeed broadcasts parameters as plain bytes."""

    def __init__(self, linear: nn.Linear, method: str):
        super().__init__(linear, persistent=False)
        self._held = (_torchao(linear, method).weight,)

    @property
    def device(self) -> torch.device:
        return self._held[0].device

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight(x.dtype))

    def transposed(self, gradient: Tensor) -> Tensor:
        return gradient @ self._weight(gradient.dtype)

    def dequantised(self) -> Tensor:
        return self._weight(torch.float32)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        return self._held[0].dequantize().to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        device = fn(torch.empty(0, device=self._held[0].device)).device
        self._held = (self._held[0].to(device),)
        return super()._apply(fn, recurse)


@dataclass(frozen=True)
class QuantizeReport:
    """What ``quantize`` did. relative_error: of one forward pass, |y' - y| / |y| (L2); None where none was asked."""

    method: str
    layers: int
    bytes_before: int
    bytes_after: int
    relative_error: float | None

    def __str__(self) -> str:
        saved = f"{self.bytes_before / 2**30:.2f} -> {self.bytes_after / 2**30:.2f} GiB"
        error = (
            ""
            if self.relative_error is None
            else f", relative error of one forward {self.relative_error:.2e}"
        )
        kept = ", ".join(HIGH_PRECISION)
        return f"{self.method}: {self.layers} linear layers, {saved}{error}. As they were: {kept}"


@torch.no_grad()
def quantize(net: nn.Module, method: str, probe: Mapping[str, Any] | None = None) -> QuantizeReport:
    """Store the linear layers inside ``net.transformer.layers`` in eight bits, in place, one after another; to sample.

    method: one of METHODS.  probe: arguments of ``net`` with which its output before and after is compared (the
    report; two forward passes).  LoRA layers keep their matrices and lose bits in the layer that they adapt: merge
    them first.  Raises ValueError for an unknown method, a network that is quantized already, or torchao missing.
    """
    check_method(method)
    named = list(_linear_layers(net))
    if not named:
        raise ValueError(
            f"sample.quantize={method}: the network has no linear layers left (quantized already?)"
        )
    before = None if probe is None else net(**probe)
    bytes_before = _layer_bytes(net)
    if method.startswith("torchao"):
        for owner, name, linear in named:
            setattr(owner, name, _torchao(linear, method))
    else:
        for owner, name, linear in named:
            setattr(owner, name, EightBitLinear(linear, method))
    error = None
    if before is not None:
        error = float((net(**probe) - before).norm() / before.norm())
    report = QuantizeReport(method, len(named), bytes_before, _layer_bytes(net), error)
    logger.info("sample.quantize: %s", report)
    return report


@torch.no_grad()
def quantize_base(net: nn.Module, method: str) -> int:
    """The same for training adapters on top, which are injected afterwards. Returns how many layers there are."""
    check_method(method, "lora.quantize_base")
    named = list(_linear_layers(net))
    bytes_before = _layer_bytes(net)
    for owner, name, linear in named:
        is_torchao = method.startswith("torchao")
        quantized = TorchaoLinear(linear, method) if is_torchao else EightBitLinear(linear, method, False)
        setattr(owner, name, quantized)
    held = sum(_torchao_bytes(module) for module in net.modules())
    report = QuantizeReport(method, len(named), bytes_before, _layer_bytes(net) + held, None)
    logger.info("lora.quantize_base: %s", report)
    return len(named)


def check_method(method: str, key: str = "sample.quantize") -> None:
    """Raise ValueError for a name that is none of METHODS, or a library that is missing."""
    if method not in METHODS:
        raise ValueError(f"{key}={method!r}: expected null or one of {', '.join(METHODS)}")
    if method.startswith("torchao"):
        import importlib.util

        if importlib.util.find_spec("torchao") is None:
            own = method.removeprefix("torchao_")
            raise ValueError(
                f"{key}={method} needs torchao, which is not installed: pip install torchao, or "
                f"{key}={own}, which needs nothing"
            )


def _torchao(linear: nn.Linear, method: str) -> nn.Linear:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if method == "torchao_int8" else Float8WeightOnlyConfig()
    holder = nn.ModuleDict({"linear": linear})  # torchao replaces children of what it is given
    quantize_(holder, config)
    return holder["linear"]


def _torchao_bytes(module: nn.Module) -> int:
    if not isinstance(module, TorchaoLinear):
        return 0
    names, _ = module._held[0].__tensor_flatten__()
    return sum(getattr(module._held[0], name).nbytes for name in names)


def _linear_layers(net: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for owner in list(net.transformer.layers.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                yield owner, name, child


def _layer_bytes(net: nn.Module) -> int:
    tensors = (*net.transformer.layers.parameters(), *net.transformer.layers.buffers())
    return sum(t.nbytes for t in tensors)
