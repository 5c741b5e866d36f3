"""The mechanics of configuration: merge mappings, fill dataclasses, check parts, name the near miss."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A mistake in the configuration, in one sentence that names the key."""


@dataclass
class Part:
    """A swappable part: ``target`` is any importable path, ``params`` its keyword arguments."""

    target: str
    params: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- merging


def merge_files(paths: list[Path], *, is_upstream: Callable, translate: Callable) -> dict[str, Any]:
    """Load and merge YAML files; later wins.

    Those of CogVideo's ``sat/`` folder are merged as there (a part whose target changes keeps its params), translated
    together, and stand where the first of them stands.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    before: dict[str, Any] = {}  # files of this project in front of upstream's
    ours: dict[str, Any] = {}
    upstream: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"configuration file not found: {path}")
        try:
            loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from error
        if loaded is None or loaded == {}:
            continue
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path}: expected a mapping of sections, found a {type(loaded).__name__}")
        if is_upstream(loaded):
            if not upstream:
                before, ours = ours, {}
            upstream = OmegaConf.to_container(OmegaConf.merge(upstream, loaded), resolve=False)
        else:
            ours = merge(ours, loaded)
    if upstream:
        ours = merge(merge(before, translate(upstream)), ours)
    return ours


def merge(base: Any, overlay: dict[str, Any], path: str = "") -> Any:
    """Deep merge, overlay wins. Lists are replaced whole, or item by item where the overlay maps indices (one past
    the last appends).

    A part whose ``target`` changes loses its old ``params``: they were another part's.
    """
    if isinstance(base, list):
        result: Any = list(base)
        for index in overlay:
            if not str(index).isdigit() or int(index) > len(base):
                raise ConfigError(f"{path}.{index}: {path} is a list of {len(base)} items, numbered from 0")
    else:
        result = dict(base)
        if "params" in base and overlay.get("target", base.get("target")) != base.get("target"):
            result["params"] = {}
    for key, value in overlay.items():
        where = f"{path}.{key}" if path else str(key)
        slot = int(key) if isinstance(result, list) else key
        if isinstance(result, list) and slot == len(result):
            result.append(None)
        old = result[slot] if isinstance(result, list) else result.get(slot)
        if isinstance(old, str) and isinstance(value, dict) and value.keys() <= {"target", "params"}:
            old = {"target": old}  # a part that was written as its target alone
        mergeable = isinstance(value, dict) and (isinstance(old, dict) or (isinstance(old, list) and value))
        result[slot] = merge(old, value, where) if mergeable else value
    return result


def set_by_path(tree: dict[str, Any], override: str) -> None:
    """Apply one ``key.path=value`` override in place; the value is read as YAML. List items go by index."""
    import yaml

    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: an override has the form key.path=value")
    try:
        value = _yaml_scalar(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: {text!r} is not a YAML value: {_one_line(error)}") from error
    names = key.removeprefix("--").split(".")
    nested: Any = value
    for name in reversed(names):
        nested = {name: nested}
    merged = merge(tree, nested)
    tree.clear()
    tree.update(merged)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _yaml_scalar(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as a string; nobody who writes it means one.
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) and "e" in value.lower() else value
        except ValueError:
            return value
    return value


def resolve_interpolations(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``tree`` with every ``${section.key}`` replaced by that key's value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve an interpolation: {str(error).splitlines()[0]}") from error


def dump_yaml(tree: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False, width=110)


# -------------------------------------------------------------------------------------------- typed dataclasses


def to_dataclass(cls: type, tree: dict[str, Any]) -> Any:
    """Fill dataclass ``cls`` from nested mappings, checking every key and type, and every part's arguments."""
    return _fill(cls, resolve_interpolations(tree), "", cls)


def _fill(cls: type, tree: Any, path: str, root: type) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping with the keys {_names(cls)}, found {tree!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            raise ConfigError(_unknown_key(key, path, fields, root))
    values = {}
    for name, f in fields.items():
        where = f"{path}.{name}" if path else name
        if name in tree:
            value = tree[name]
            if (
                hints[name] is Part
                and isinstance(value, dict)
                and f.default_factory is not dataclasses.MISSING
            ):
                value = merge(
                    dataclasses.asdict(f.default_factory()), value
                )  # params alone change the default part
            values[name] = _convert(value, hints[name], where, root)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} is missing: expected {_type_name(hints[name])}")
    result = cls(**values)
    if {"target", "params"} <= fields.keys():
        check_part(result.target, result.params, path)
    return result


def _convert(value: Any, hint: Any, path: str, root: type) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), path, root)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        if hint is Part and isinstance(value, str):
            value = {"target": value}
        return _fill(hint, value, path, root)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{path}={value!r}: expected a list of {_type_name(arguments[0])}")
        return [_convert(item, arguments[0], f"{path}.{i}", root) for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}={value!r}: expected a mapping")
        return value
    if hint is float and isinstance(value, str):
        value = _yaml_scalar(value)
    right = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool),
        bool: isinstance(value, bool),
        str: isinstance(value, str),
    }
    if not right[hint]:
        raise ConfigError(f"{path}={value!r}: expected {_type_name(hint)}, found {type(value).__name__}")
    return float(value) if hint is float else value


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union, list, dict):
        return (
            str(hint)
            .replace("typing.", "")
            .replace("cogvideox.config.", "")
            .replace("cogvideox.config_merge.", "")
        )
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if hint in names:
        return names[hint]
    return "a {target, params} part" if hint is Part else f"a section {_names(hint)}"


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _unknown_key(key: str, path: str, fields: dict[str, Any], root: type) -> str:
    where = f"{path}.{key}" if path else str(key)
    near = difflib.get_close_matches(str(key), list(fields), n=1)
    if near:
        return f"unknown key {where}: did you mean {f'{path}.' if path else ''}{near[0]}?"
    every = list(_all_paths(root))
    elsewhere = [p for p in every if p.split(".")[-1] == key]
    if not elsewhere:
        elsewhere = difflib.get_close_matches(where, every, n=1, cutoff=0.75)
    hint = f"did you mean {elsewhere[0]}?" if elsewhere else f"the keys here are {', '.join(fields)}"
    return f"unknown key {where}: {hint}"


def _all_paths(cls: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield prefix + f.name
        for candidate in (hints[f.name], *typing.get_args(hints[f.name])):
            if dataclasses.is_dataclass(candidate) and candidate is not Part:
                yield from _all_paths(candidate, f"{prefix}{f.name}.")


# ------------------------------------------------------------------------------------- parts, checked from source


def check_part(target: str, params: dict[str, Any], path: str) -> None:
    """Check that ``target`` exists and takes ``params``, reading its source without importing it.

    Importing SAT, torch or transformers takes seconds; an unknown name should be reported at once. What cannot be
    decided from the source (re-exported names, ``**kwargs``) is left to ``build``, which raises the same errors.
    """
    where = f"{path}." if path else ""
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError(
            f"{where}target={target!r}: expected an importable path such as package.module.Name"
        )
    source = _source_of(module_name)
    if source is None:
        raise ConfigError(f"{where}target={target}: there is no module {module_name}")
    definitions = _definitions(str(source)) if source.suffix == ".py" else {"*": None}
    if name not in definitions:
        if "*" in definitions:
            return
        near = difflib.get_close_matches(name, list(definitions), n=1)
        public = ", ".join(sorted(n for n in definitions if not n.startswith("_")))
        hint = f"did you mean {near[0]}?" if near else f"it defines {public}"
        raise ConfigError(f"{where}target={target}: {module_name} has no {name}; {hint}")
    accepted = definitions[name]
    if accepted is None:
        return
    for key in params:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(accepted) or 'no arguments'}"
            raise ConfigError(f"unknown key {where}params.{key}: {name} has no such argument; {hint}")


def _source_of(module_name: str) -> Path | None:
    """The file of a module, found without importing its parents."""
    top, *rest = module_name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or []:
        base = Path(folder).joinpath(*rest)
        for candidate in (
            base.with_suffix(".py"),
            base / "__init__.py",
            *base.parent.glob(base.name + ".*.so"),
        ):
            if candidate.is_file():
                return candidate
    return None


@lru_cache(maxsize=64)
def _definitions(source: str) -> dict[str, list[str] | None]:
    """Name -> argument names of each class and function of a module; None where only running it would tell."""
    tree = ast.parse(Path(source).read_text())
    result: dict[str, list[str] | None] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            result[node.name] = _arguments(node)
        elif isinstance(node, ast.ClassDef):
            init = next(
                (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
            )
            decorators = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
            if init is not None:
                result[node.name] = _arguments(init, skip_self=True)
            elif "dataclass" in decorators and not node.bases:
                result[node.name] = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
            else:
                result[node.name] = None
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            result.update({(alias.asname or alias.name).split(".")[0]: None for alias in node.names})
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            result.update({t.id: None for t in targets if isinstance(t, ast.Name)})
    if any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body):
        result["*"] = None
    return result


def _arguments(function: ast.FunctionDef, skip_self: bool = False) -> list[str] | None:
    a = function.args
    if a.kwarg is not None:
        return None
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return names[1:] if skip_self else names
