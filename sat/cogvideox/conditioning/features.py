"""Encoded prompts in a safetensors file: made once by ``scripts/encode_prompts.py``, then sampling needs no T5.

One tensor per prompt, (L, D) in the encoder's dtype, under the SHA-256 of prompt, L and encoder. The metadata key
``text_features`` is a JSON object: ``prompts``, ``max_length`` (L), ``width`` (D), and ``encoder``, what identifies it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

METADATA = "text_features"
_FIELDS = {"prompts": list, "max_length": int, "width": int, "encoder": dict}


class TextFeatures:
    """The encoded prompts of a file, or of all ``*.safetensors`` of a folder, which must be of one encoder.

    path: the file or folder.  max_length, width: L and D that the model takes.  Only headers are read here, a tensor
    when its prompt is asked for. Raises ValueError: nothing there, a damaged or foreign file, another L or D, files of
    two encoders.
    """

    def __init__(self, path: str | Path, max_length: int, width: int):
        self.path, self.max_length, self.width = Path(path).expanduser(), max_length, width
        self.encoder: dict[str, Any] = {}
        self._files: dict[str, Path] = {}  # prompt -> its file
        for file in _files_of(self.path):
            self._add(file)

    @property
    def prompts(self) -> list[str]:
        return list(self._files)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, L, D) on the CPU, in the encoder's dtype.  Raises ValueError for one that is not there."""
        self.check(prompts)
        return torch.stack([self._read(prompt) for prompt in prompts])

    def check(self, prompts: Sequence[str]) -> None:
        """Raise one ValueError that names the prompts that are not there and the command that adds them."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._files]
        if missing:
            output = self.path / "NAME.safetensors" if self.path.is_dir() else f"{self.path} --add"
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{self.path} holds no features of {', '.join(map(repr, missing[:3]))}{more}: where the text encoder "
                f"is, run python -m scripts.encode_prompts --base ... --prompt-file FILE --output {output}"
            )

    def _add(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                metadata, keys = opened.metadata() or {}, set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is damaged or no safetensors file ({error}): encode the prompts again"
            ) from error
        record = _record(file, metadata)
        found, expected = (record["max_length"], record["width"]), (self.max_length, self.width)
        if found != expected:
            raise ValueError(
                f"{file} holds text of {found[0]} tokens x {found[1]}, the model takes {expected[0]} x {expected[1]}: "
                f"encode the prompts with the configuration (--base) of this model"
            )
        if self.encoder and record["encoder"] != self.encoder:
            raise ValueError(
                f"{self.path} holds features of two text encoders, {file.name} is of another one than "
                f"{next(iter(self._files.values())).name}: keep one of them"
            )
        self.encoder = record["encoder"]
        for prompt in record["prompts"]:
            if feature_key(prompt, self.max_length, self.encoder) not in keys:
                raise ValueError(f"{file} is damaged: it lists the prompt {prompt!r} and lacks its tensor")
            self._files[prompt] = file

    def _read(self, prompt: str) -> Tensor:
        return read_features(self._files[prompt], prompt, self.max_length, self.width, self.encoder)


def read_features(file: Path, prompt: str, max_length: int, width: int, encoder: Mapping[str, Any]) -> Tensor:
    """A prompt's (L, D) out of a file of ``write_features``.  ValueError where the file is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            features = opened.get_tensor(feature_key(prompt, max_length, encoder))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): encode the prompts again") from error
    if features.shape != (max_length, width) or not features.isfinite().all():
        raise ValueError(
            f"{file} is damaged: the features of {prompt!r} are {tuple(features.shape)}, expected finite numbers "
            f"({max_length}, {width}): encode the prompts again"
        )
    return features


def write_features(
    path: Path, features: Mapping[str, Tensor], encoder: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write prompt -> (L, D), all of one shape and dtype.

    encoder: what identifies the text encoder, for JSON.  metadata: further entries, such as where it comes from.
    """
    length, width = next(iter(features.values())).shape
    record = {"prompts": list(features), "max_length": length, "width": width, "encoder": dict(encoder)}
    tensors = {feature_key(p, length, encoder): tensor.cpu().contiguous() for p, tensor in features.items()}
    save_file(tensors, path, {**metadata, METADATA: json.dumps(record)})


def feature_key(prompt: str, max_length: int, encoder: Mapping[str, Any]) -> str:
    """The name of a prompt's tensor: the SHA-256 of all that decides it."""
    known = json.dumps([prompt, max_length, dict(encoder)], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()


def _files_of(path: Path) -> list[Path]:
    files = sorted(path.glob("[!.]*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise ValueError(
            f"sample.text_features={path}: there is no such file, and no folder with *.safetensors; "
            f"python -m scripts.encode_prompts writes one"
        )
    return files


def _record(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        record = json.loads(metadata[METADATA])
        if all(isinstance(record[name], kind) for name, kind in _FIELDS.items()):
            return record
    except (KeyError, ValueError, TypeError):
        pass
    raise ValueError(f"{file} holds no encoded prompts: expected a file of python -m scripts.encode_prompts")
