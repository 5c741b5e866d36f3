"""How other programs apply a LoRA file, read from their sources: names and shapes only, none of their code.

Each takes the tensors of a file and changes the weights of a network under diffusers' names.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

# ComfyUI, comfy/ldm/cogvideo/model.py: its names of diffusers' modules in a block, and outside of the blocks.
COMFYUI_BLOCK = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}
COMFYUI_OUTSIDE = {
    f"{kind}_embedding.linear_{i}": f"{kind}_embedding_linear_{i}" for kind in ("time", "ofs") for i in (1, 2)
}


def comfyui_name(module: str) -> str:
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
        return f"blocks.{match[1]}.{COMFYUI_BLOCK.get(match[2], match[2])}"
    return COMFYUI_OUTSIDE.get(module, module)


@torch.no_grad()
def apply_in_comfyui(tensors: dict[str, Tensor], twin: nn.Module, strength: float = 1.0) -> set[str]:
    """ComfyUI, comfy/lora.py and comfy/weight_adapter/lora.py; returns the names that it does not know.

    Every weight of its model has the names ``diffusion_model.PATH`` and ``lora_unet_PATH`` with underscores; under
    either it looks for ``.lora_up`` and ``.lora_down``, then ``.lora_B`` and ``.lora_A``, and ``.alpha``. The update is
    strength * (alpha / rank, or 1 without alpha) * up @ down.
    """
    left = set(tensors)
    for name, weight in twin.named_parameters():
        path = comfyui_name(name.removesuffix(".weight"))
        for key in (f"diffusion_model.{path}", f"lora_unet_{path.replace('.', '_')}"):
            for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                if name.endswith(".weight") and f"{key}.{up}.weight" in tensors:
                    up, down = tensors[f"{key}.{up}.weight"], tensors[f"{key}.{down}.weight"]
                    alpha = tensors.get(f"{key}.alpha")
                    scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
                    weight += strength * scale * (up @ down)
                    left -= {n for n in left if n.startswith(f"{key}.")}
    return left


@torch.no_grad()
def apply_in_kohya_readers(tensors: dict[str, Tensor], twin: nn.Module, strength: float = 1.0) -> None:
    """VideoX-Fun, videox_fun/utils/lora_utils.py, and ComfyUI-CogVideoXWrapper, lora_utils.py (``merge_lora``).

    The part of a name before its first dot is the module: behind the last ``lora_unet_``, its words between underscores
    are tried as attributes from the left, a word that is none being joined to the next. The update is
    strength * (alpha / rank, or 1 without alpha) * up @ down. ``networks/lora.py`` of sd-scripts has the same tensors.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, element = key.split(".", 1)
        layers.setdefault(layer, {})[element] = value
    for layer, elements in layers.items():
        words = layer.split("lora_unet_")[-1].split("_")
        module, word = twin, ""
        for part in words:
            word = f"{word}_{part}" if word else part
            if word in module._modules:
                module, word = module._modules[word], ""
        assert not word and isinstance(module, nn.Linear), f"{layer}: no module found"
        up, down = elements["lora_up.weight"], elements["lora_down.weight"]
        alpha = elements.get("alpha")
        module.weight += strength * (1.0 if alpha is None else alpha.item() / up.shape[1]) * (up @ down)


def load_in_diffusers(path: Path, twin: nn.Module, strength: float = 1.0) -> None:
    """``CogVideoXPipeline.load_lora_weights`` and ``set_adapters``, without the rest of a pipeline."""
    from diffusers import CogVideoXPipeline

    state, metadata = CogVideoXPipeline.lora_state_dict(
        path.parent, weight_name=path.name, return_lora_metadata=True
    )
    assert all("lora" in key for key in state)  # load_lora_weights refuses the file otherwise
    CogVideoXPipeline.load_lora_into_transformer(state, twin, adapter_name="ours", metadata=metadata)
    twin.set_adapters("ours", weights=strength)
