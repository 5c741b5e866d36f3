"""``build(part, **context)``: turn a ``{target, params}`` part of the configuration into an object."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any


def resolve(target: str) -> Any:
    """Import ``package.module.Name``. Raises ValueError naming what is missing."""
    module_name, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        if error.name and not (module_name + ".").startswith(error.name + "."):
            raise  # the module exists; something that it imports does not
        raise ValueError(f"target {target}: there is no module {module_name}") from error
    except AttributeError as error:
        raise ValueError(f"target {target}: module {module_name} has no {name}") from error


def factory(part: Any, **context: Any) -> functools.partial:
    """The target with its ``params`` bound, and of ``context`` only what its signature names (params win)."""
    callee = resolve(part.target)
    parameters = inspect.signature(callee).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = {p.name for p in parameters}
        unknown = [key for key in part.params if key not in names]
        if unknown:
            raise ValueError(
                f"{part.target} has no argument {unknown[0]}; it takes {', '.join(sorted(names))}"
            )
        context = {key: value for key, value in context.items() if key in names}
    return functools.partial(callee, **{**context, **part.params})


def build(part: Any, **context: Any) -> Any:
    """An instance of a class, or a function with its parameters bound (samplers, losses)."""
    bound = factory(part, **context)
    return bound() if inspect.isclass(bound.func) else bound
