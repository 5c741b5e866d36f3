"""A configuration as YAML for a person to read: the sections in their order, without the values that are defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from cogvideox.config import Config


def concise_yaml(config: Config) -> str:
    """YAML that ``load_config`` reads back to the same ``Config``; keys that hold their default are left out."""
    sections = [_dump({name: value}) for name, value in _without_defaults(config).items()]
    return "\n".join(sections)


def _without_defaults(section: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, and all those that have none, as plain mappings."""
    values = {
        field.name: (getattr(section, field.name), _default(field)) for field in dataclasses.fields(section)
    }
    return {name: _plain(value) for name, (value, default) in values.items() if value != default}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _without_defaults(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default  # MISSING, which equals nothing, where there is none


class _Dumper(yaml.SafeDumper):
    """Block style, with lists of plain values on one line and items of lists indented below their key."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _represent_list(dumper: yaml.Dumper, items: list[Any]) -> yaml.Node:
    is_plain = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=is_plain)


_Dumper.add_representer(list, _represent_list)


def _dump(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
