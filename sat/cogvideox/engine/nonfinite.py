"""Where a NaN came from: the step that was skipped is done once more, with every layer looked at.

A skipped step changes no weight, so the same batch with the same random streams gives the same NaN again. The
repetition goes around the engine (``torch.autograd.grad`` fills no ``.grad`` and fires none of DeepSpeed's hooks)
and leaves nothing behind: the run after it is bitwise the run without it.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cogvideox.dist import RandomStreams


def first_bad_layer(
    module: nn.Module, batch: Any, streams: Callable[[], RandomStreams], *, backward: bool
) -> str:
    """The layer that made the first value that is not finite, or why none could be named; never raises.

    module: ``module(batch, rng) -> (loss, metrics)``.  streams: makes the random streams of the step anew.
    backward: the loss is finite, look at the gradients. Takes the memory of a training step and of one more gradient.
    """
    try:
        with undisturbed(module):
            rng = streams()
            rng.seed_global()
            return (_in_backward if backward else _in_forward)(module, batch, rng)
    except torch.OutOfMemoryError:
        return "not found: no memory to do the step once more"
    except Exception as error:  # of hooks that a module does not allow, of a data-dependent bug ...
        return f"not found: {type(error).__name__}: {(str(error) or '-').splitlines()[0]}"


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Global random states and the module's buffers (running means) are afterwards what they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    states = random.getstate(), np.random.get_state()
    devices = {p.device for p in module.parameters() if p.device.type != "cpu"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _in_forward(module: nn.Module, batch: Any, rng: RandomStreams) -> str:
    found: list[str] = []

    def look(name: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not found and not _is_finite(output) and _is_finite((args, kwargs)):
            own = [n for n, p in layer.named_parameters(recurse=False) if not _is_finite(p)]
            weights = f", whose own {' and '.join(own)} is not finite" if own else ""
            found.append(f"{_called(name, layer)}, in the forward pass{weights}")

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in module.named_modules():
            hook = layer.register_forward_hook(
                lambda layer, args, kwargs, output, name=name: look(name, layer, args, kwargs, output),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        module(batch, rng)  # whatever the batch is: under ZeRO-3 every rank has to do the pass
    spoilt = [name for name, value in _named(batch) if not _is_finite(value)]
    if spoilt:
        return f"the batch itself ({', '.join(spoilt)})"
    return found[0] if found else "not found: done once more, the forward pass is finite"


def _in_backward(module: nn.Module, batch: Any, rng: RandomStreams) -> str:
    spoilt: list[
        tuple[str, nn.Module, bool]
    ] = []  # layers with a good gradient behind them, in backward order

    def look(name: str, layer: nn.Module, grad_input: Any, grad_output: Any) -> None:
        if _is_finite(grad_output):
            spoilt.append((name, layer, not _is_finite(grad_input)))

    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with ExitStack() as hooks, torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Full backward hook is firing"
        )  # as it should, for first layers
        for name, layer in module.named_modules():
            hook = layer.register_full_backward_hook(
                lambda layer, grad_input, grad_output, name=name: look(name, layer, grad_input, grad_output)
            )
            hooks.callback(hook.remove)
        loss, _ = module(batch, rng)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    bad = {name for name, g in zip(trained, gradients, strict=True) if g is not None and not _is_finite(g)}
    for name, layer, spoils_input in spoilt:
        own = [n for n, _ in layer.named_parameters(recurse=False) if (f"{name}.{n}" if name else n) in bad]
        if spoils_input or own:
            of = "its input" if spoils_input else " and ".join(own)
            return f"{_called(name, layer)}, in the backward pass: the gradient of {of}"
    if bad:
        return f"not found: the gradients of {len(bad)} parameters are not finite, the first {sorted(bad)[0]}"
    return "not found: done once more, the gradients of this rank are finite; their sum or norm is not"


def _called(name: str, layer: nn.Module) -> str:
    return f"{name} ({type(layer).__name__})" if name else type(layer).__name__


def _named(batch: Any) -> list[tuple[str, Any]]:
    return list(batch.items()) if isinstance(batch, Mapping) else [("all of it", batch)]


def _is_finite(values: Any) -> bool:
    """Of every floating tensor in nested tuples, lists and mappings."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    if isinstance(values, Mapping):
        return all(map(_is_finite, values.values()))
    if isinstance(values, list | tuple):
        return all(map(_is_finite, values))
    return True
