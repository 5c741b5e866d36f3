"""CogVideoX-type video diffusion models on SwissArmyTransformer: train, fine-tune, sample, convert.

>>> import cogvideox
>>> config = cogvideox.load_config(["configs/cogvideox_5b.yaml", "configs/lora.yaml"], ["train.steps=10"])
>>> net = cogvideox.build_transformer(config)
>>> vae = cogvideox.build_vae(config)
>>> system = cogvideox.VideoDiffusion(config)
>>> info = cogvideox.identify("weights/CogVideoX-5b-sat/transformer")

Names are imported when they are first used: a mistake in a configuration answers before torch is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_PUBLIC = {
    "load_config": "cogvideox.config",
    "save_config": "cogvideox.config",
    "Config": "cogvideox.config",
    "build_transformer": "cogvideox.system",
    "build_vae": "cogvideox.system",
    "VideoDiffusion": "cogvideox.system",
    "identify": "cogvideox.weights.identify",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cogvideox' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def _check_sat_library() -> None:
    """The library is called ``sat`` and so is our source folder; only a regular package may answer to the name."""
    spec = importlib.util.find_spec("sat")
    if spec is None or spec.origin is None:
        found = (
            "nothing" if spec is None else f"only the folder {list(spec.submodule_search_locations or [])}"
        )
        raise ImportError(
            f"the library `sat` (SwissArmyTransformer) is missing: `import sat` finds {found}. "
            f"Run `pip install SwissArmyTransformer` (not editable), and keep sat/__init__.py out of this project"
        )


_check_sat_library()
