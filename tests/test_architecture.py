"""The architecture as a test: who may import whom, and behind which door each outside library stands."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sat" / "cogvideox"

# A unit is a folder of the package, or a file directly in it. Each may import itself and what stands in its row.
ALLOWED = {
    "config_merge": set(),
    "upstream_rules": set(),
    "upstream_source": {"config_merge", "upstream_rules"},
    "upstream_model": {"upstream_rules", "upstream_source"},
    "upstream_diffusion": {"upstream_rules", "upstream_source"},
    "upstream_run": {"upstream_model", "upstream_rules", "upstream_source"},
    "upstream_yaml": {
        "config_merge",
        "environment",
        "upstream_diffusion",
        "upstream_model",
        "upstream_rules",
        "upstream_run",
        "upstream_source",
    },
    "config_text": {"config"},
    "live_memory": set(),
    "traffic": set(),
    "patterns": set(),
    "recompute": set(),
    "execution": set(),
    "optimizer_names": set(),
    "config_names": {"config_merge", "diffusion", "optimizer_names"},
    "config": {"config_merge", "config_names", "execution", "optimizer_names", "recompute", "upstream_yaml"},
    "environment": set(),
    "build": set(),
    "gpus": set(),
    "page": set(),
    "dist": {"environment"},
    "diffusion": set(),
    "kernels": set(),
    "model": {"execution", "kernels", "patterns", "recompute"},
    "vae": {"kernels"},
    "cache": set(),
    "conditioning": {"cache"},
    "data": {"cache"},
    "weights": {"patterns"},
    "lora_sizes": {"config", "patterns"},
    "flops": {"config", "patterns", "recompute"},
    "plan": {"config", "config_merge", "lora_sizes"},
    "planning": {"config", "flops", "gpus", "lora_sizes", "optimizer_names", "plan", "recompute"},
    "phases": set(),
    "engine": {
        "config",
        "build",
        "dist",
        "environment",
        "gpus",
        "optimizer_names",
        "patterns",
        "phases",
        "weights",
    },
    "convert": {"model", "vae", "weights"},
    "system_sampling": set(),
    "system_text": {"build", "conditioning", "config", "weights"},
    "system_vae": {"config", "vae", "weights"},
    "system_validation": {"diffusion"},
    "system_weights": {"build", "model", "system_text", "weights"},
    "system_attention": {"config", "dist", "execution", "flops", "model", "system_vae"},
    "system_cache": {
        "cache",
        "conditioning",
        "config",
        "data",
        "dist",
        "system_text",
        "system_vae",
        "system_weights",
    },
    "system": {
        "system_sampling",
        "system_text",
        "system_vae",
        "system_validation",
        "system_weights",
        "config",
        "build",
        "dist",
        "model",
        "conditioning",
        "vae",
        "diffusion",
        "planning",
        "weights",
        "phases",
    },
    "sampling": {
        "config",
        "environment",
        "dist",
        "page",
        "model",
        "system",
        "system_sampling",
        "system_vae",
        "data",
        "plan",
        "planning",
        "weights",
    },
    "evaluation": {"config", "dist", "data", "diffusion", "engine"},
    "report": {"config", "config_text", "engine", "page", "sampling", "weights"},
    "command_line": {"config_merge", "environment"},
}

# Outside library -> the only files (or folders) that may import it.
DOORS = {
    "sat": {"model", "dist.py"},
    "deepspeed": {"engine", "dist.py"},
    "omegaconf": {"config_merge.py"},
    "transformers": {"conditioning/text.py"},
    "decord": {"data/reader.py"},
    "av": {"data/reader.py", "sampling/video_io.py"},
    "wandb": {"engine/trackers.py"},
    "tensorboardX": {"engine/trackers.py"},
    "diffusers": {"convert/verify.py"},
    "huggingface_hub": {"weights/files/hub.py"},
    "torchao": {"model/quantize.py"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside functions; ``import_module("x")`` too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            if isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = unit(path)
    assert own in ALLOWED, f"{own} is new: give it a row in the table of allowed arrows"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("cogvideox.")}
    known = {unit(p) for p in FILES}
    assert (used & known) - {own} <= ALLOWED[own]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_outside_library_has_one_door(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for library in {name.split(".")[0] for name in imports(path)} & DOORS.keys():
        assert place in DOORS[library] or place.split("/")[0] in DOORS[library], f"{place} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_a_door(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"train_video", "sample_video", "scripts"}


def test_the_source_root_does_not_shadow_the_sat_library() -> None:
    assert not (ROOT / "sat" / "__init__.py").exists()
    assert [
        p.name for p in (ROOT / "sat").iterdir() if not p.name.endswith((".egg-info", "__pycache__"))
    ] == ["cogvideox"]
    assert importlib.util.find_spec("sat").origin is not None


def test_a_shadowed_sat_library_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "sat").mkdir()
    code = (
        "import sys, importlib.util, importlib.machinery as m\n"
        f"spec = m.ModuleSpec('sat', None, is_package=True); spec.submodule_search_locations = [{str(tmp_path)!r}]\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: spec if name == 'sat' else find(name, *a)\n"
        "import cogvideox\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "sat", capture_output=True, text=True, timeout=60
    )
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "SwissArmyTransformer" in last and str(tmp_path) in last


def test_no_device_literals() -> None:
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert ".cuda()" not in line and 'torch.device("cuda")' not in line, f"{path}:{number}"
