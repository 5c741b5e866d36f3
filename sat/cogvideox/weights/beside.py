"""What stands beside weights: a diffusers ``config.json``, a run's ``config.yaml`` and ``state.json``. No torch.

Names and shapes do not tell everything (the patch of a linear embedding, a VAE's latent scale), and a config file may
contradict them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# diffusers' and transformers' keys -> fields of WeightsInfo.
_CONFIG_JSON = {
    "transformer": {
        "num_layers": "num_layers",
        "num_attention_heads": "num_attention_heads",
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "time_embed_dim": "time_embed_dim",
        "text_embed_dim": "text_hidden_size",
        "ofs_embed_dim": "ofs_embed_dim",
    },
    "vae": {"layers_per_block": "num_res_blocks", "latent_channels": "z_channels"},
    "t5": {"num_layers": "num_layers", "d_model": "hidden_size", "num_heads": "num_attention_heads"},
}


@dataclass
class Beside:
    config_json: dict[str, Any] = field(default_factory=dict)
    # Of diffusers or transformers.
    config_yaml: dict[str, Any] = field(default_factory=dict)
    # The merged configuration of a run of this project.
    config_file: Path | None = None
    # Where ``config_yaml`` stands; None: in the weights' own record (provenance.py).
    state: dict[str, Any] = field(default_factory=dict)
    # The checkpoint's ``state.json``.
    problems: list[str] = field(default_factory=list)

    @property
    def is_run(self) -> bool:
        """Whether the weights are a checkpoint of a run of this project."""
        return bool(self.state) and self.config_file is not None

    def section(self, *path: str) -> dict[str, Any]:
        """A section of the run's configuration; empty where it has none: ``section("model", "transformer")``."""
        node: Any = self.config_yaml
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node if isinstance(node, dict) else {}


def read_beside(folder: Path) -> Beside:
    """Read what there is; a file that cannot be read becomes a problem in words."""
    found = Beside()
    found.config_json = _object(folder / "config.json", json.loads, found.problems)
    found.state = _object(folder / "state.json", json.loads, found.problems)
    if found.state:
        # RUN/checkpoints/STEP: the checkpoint has a copy; that of the run may have changed since.
        places = (folder, folder.parent.parent)
        found.config_file = next((p / "config.yaml" for p in places if (p / "config.yaml").is_file()), None)
    if found.config_file is not None:
        import yaml

        found.config_yaml = _object(found.config_file, yaml.safe_load, found.problems)
    return found


def stated_geometry(beside: Beside) -> tuple[dict[str, Any], str]:
    """patch_size and learned_table as a configuration says them, and which one it is; empty where none does."""
    if beside.config_json.get("patch_size"):
        config, side = beside.config_json, int(beside.config_json["patch_size"])
        patch = (int(config.get("patch_size_t") or 1), side, side)
        learned = bool(config.get("use_learned_positional_embeddings", False))
        return {"patch_size": patch, "learned_table": learned}, "config.json"
    section = beside.section("model", "transformer")
    if section.get("patch_size"):
        position = section.get("position") or {}
        learned = bool((position.get("params") or {}).get("learned_table", False))
        learned |= str(position.get("target", "")).endswith(".LearnedPosition3D")
        patch = tuple(section["patch_size"])
        where = str(beside.config_file or "the file's record of its run")
        return {"patch_size": patch, "learned_table": learned}, where
    return {}, ""


def contradictions(beside: Beside, family: str, found: Mapping[str, Any]) -> list[str]:
    """Where ``config.json`` says another number than the tensors. found: fields of WeightsInfo."""
    stated = {
        key: (beside.config_json[key], found[name])
        for key, name in _CONFIG_JSON.get(family, {}).items()
        if key in beside.config_json
    }
    if family == "transformer" and "patch_size" in beside.config_json:
        patch = stated_geometry(beside)[0]["patch_size"]
        stated["patch_size_t"] = (patch[0], found["patch_size"][0])
        stated["patch_size"] = (patch[1], found["patch_size"][1])
    if family == "vae" and "block_out_channels" in beside.config_json:
        widths = [found["channels"] * m for m in found["channel_multipliers"]]
        stated["block_out_channels"] = (list(beside.config_json["block_out_channels"]), widths)
    return [
        f"config.json says {key}={said}, the tensors have {have}"
        for key, (said, have) in stated.items()
        if said != have and have is not None
    ]


def _object(path: Path, parse: Any, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text())
    except Exception as error:  # json and yaml raise different ones
        problems.append(f"{path.name} beside cannot be read ({type(error).__name__})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} beside is no mapping")
        return {}
    return content
