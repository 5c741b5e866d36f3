"""Products with frozen weights in a LoRA step: the numbers of the plain form, what is kept, what is done again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cogvideox.kernels.gelu import linear_gelu
from cogvideox.model import frozen_mlp
from cogvideox.model.linear import Linear
from cogvideox.model.lora import LoRALinear

ROWS, WIDTH, RANK = 600, 16, 4  # 600 rows are three pieces of the MLP, the last one short


def frozen(inputs: int, outputs: int, *, bias: bool = True) -> Linear:
    torch.manual_seed(inputs + outputs)
    return Linear(inputs, outputs, bias=bias, dtype=torch.float64).requires_grad_(False)


def adapter(parts: int, *, bias: bool = True) -> LoRALinear:
    layer = LoRALinear(frozen(WIDTH, 3 * WIDTH, bias=bias), RANK, alpha=2.0, parts=parts)
    for up in layer.matrix_B:
        nn.init.normal_(up)
    return layer


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Kept:
    """Tensors that autograd saves inside the block, without parameters."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __enter__(self) -> list[int]:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self.hooks.__enter__()
        return self.sizes

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            self.sizes.append(tensor.numel())
        return tensor


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_an_adapted_layer_is_the_layer_of_the_summed_weight(parts: int, bias: bool) -> None:
    """Value and all gradients of x (W + s cat_i(B_i A_i))^T + b, by autograd through the dense weight."""
    layer, x, probe = adapter(parts, bias=bias), draw(2, 5, WIDTH).requires_grad_(), draw(2, 5, 3 * WIDTH)
    base = layer.original
    update = torch.cat([up @ down for up, down in zip(layer.matrix_B, layer.matrix_A, strict=True)])
    trained = [x, *layer.matrix_A, *layer.matrix_B]
    expected = F.linear(x, base.weight + 2.0 / RANK * update, base.bias)
    found = layer(x)
    assert type(found.grad_fn.next_functions[0][0]).__name__ == "_AdaptedProductBackward"
    # float64, sums of 16 products: 1e-15 times their size
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for own, other in zip(
        torch.autograd.grad(found, trained, probe), torch.autograd.grad(expected, trained, probe), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_an_adapted_layer_keeps_its_input_and_the_small_products() -> None:
    layer, x = adapter(3), draw(ROWS, WIDTH).requires_grad_()
    with Kept() as sizes:
        layer(x)
    assert sorted(sizes) == sorted([ROWS * WIDTH, ROWS * 3 * RANK])


def test_the_first_layers_input_gets_no_gradient() -> None:
    """Below the first adapter nothing trains: the base's second product and one of the adapter's six are left out."""
    layer, x = adapter(3), draw(ROWS, WIDTH)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    base, small = 2 * ROWS * WIDTH * 3 * WIDTH, 2 * ROWS * RANK * 3 * WIDTH
    assert counter.get_total_flops() == base + 5 * small


def test_the_mlp_in_pieces_is_the_plain_one() -> None:
    first, last = frozen(WIDTH, 4 * WIDTH), frozen(4 * WIDTH, WIDTH)
    x, probe = draw(2, ROWS // 2, WIDTH).requires_grad_(), draw(2, ROWS // 2, WIDTH)
    found, expected = frozen_mlp.frozen_mlp(x, first, last), last(F.gelu(first(x), approximate="tanh"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64, as above
    gradients = [torch.autograd.grad(y, x, probe)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_the_mlp_in_pieces_keeps_its_input_and_nothing_after_it() -> None:
    first, last = frozen(WIDTH, 4 * WIDTH), frozen(4 * WIDTH, WIDTH)
    x = draw(ROWS, WIDTH).requires_grad_()
    with Kept() as sizes:
        frozen_mlp.frozen_mlp(x, first, last)
    assert sizes == [ROWS * WIDTH]
    with Kept() as sizes:
        last(linear_gelu(first, x))
    assert max(sizes) == ROWS * 4 * WIDTH


def test_a_checkpointed_mlp_does_its_last_product_once() -> None:
    """Forward 2, again 1, backward 2 products of 2 N D 4D: the last one is not done again."""
    first, last = frozen(WIDTH, 4 * WIDTH), frozen(4 * WIDTH, WIDTH)
    x = draw(ROWS, WIDTH).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = torch.utils.checkpoint.checkpoint(
            lambda z: frozen_mlp.frozen_mlp(z.sin(), first, last), x, use_reentrant=False
        )
        y.sum().backward()
    assert counter.get_total_flops() == 5 * 2 * ROWS * WIDTH * 4 * WIDTH
