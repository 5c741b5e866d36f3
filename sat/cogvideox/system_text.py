"""The conditions of a configuration, and where their text comes from: an encoder, or features in a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cogvideox.build import build
from cogvideox.conditioning.features import TextFeatures
from cogvideox.conditioning.text import TextCondition
from cogvideox.config import Config, ConfigError, LoadConfig, Part
from cogvideox.weights import load
from cogvideox.weights.files.hub import resolve
from cogvideox.weights.files.locate import locate
from cogvideox.weights.fill import LoadReport
from cogvideox.weights.provenance import sha256

logger = logging.getLogger("cogvideox")


def build_conditions(config: Config) -> list[Any]:
    """``model.conditions``, with the text of ``sample.text_features`` where it is set."""
    features = _read_features(config)
    return [build(_condition(part, config, features)) for part in config.model.conditions]


def load_text_encoders(conditions: Iterable[Any], section: LoadConfig) -> list[LoadReport]:
    """Fill the encoders that are there; a pretrained folder is read by the condition itself, at its first use."""
    reports = []
    for index, condition in enumerate(conditions):
        encoder = getattr(condition, "transformer", None)
        if section.text_encoder and encoder is not None:
            reports.append(
                load.load_text_encoder(encoder, section.text_encoder, index=index, ema=section.ema)
            )
    return reports


def text_encoder_alone(config: Config) -> tuple[TextCondition, list[Path], dict[str, Any]]:
    """(the text condition with its weights, their files, what identifies the encoder), without the other models.

    ``sample.text_features`` is not looked at: this is what writes them.
    """
    text = text_condition_alone(config)
    load_text_weights(text, config)
    files = text_files(text, config)
    return text, files, text_identity(text, files, sha256)


def text_condition_alone(config: Config) -> TextCondition:
    """The text condition; a pretrained encoder is not read yet, and one with random weights not filled."""
    return build(_condition(_text_part(config), config, None)).eval().requires_grad_(False)


def load_text_weights(text: TextCondition, config: Config) -> None:
    """What ``load.text_encoder`` says, into a condition that stands alone."""
    index = config.model.conditions.index(_text_part(config))
    load_text_encoders([None] * index + [text], config.load)
    text.load()


def text_files(text: TextCondition, config: Config) -> list[Path]:
    """The files of the encoder's weights; none where they are random."""
    path = text.folder or config.load.text_encoder
    if not path:
        return []
    source = locate(path, "text_encoder")
    return [*source.files, *(source.ema_files if config.load.ema else ())]


def text_identity(
    text: TextCondition, files: list[Path], digest_of_files: Callable[[list[Path]], str]
) -> dict[str, Any]:
    """All that decides the features of a caption besides its length: settings, dtype, weights, tokenizer."""
    tokenizer = text.tokenizer_files()
    return text.identity() | {
        "weights": digest_of_files(files) if files else None,
        "tokenizer": digest_of_files(tokenizer) if tokenizer else "byt5",
    }


def _read_features(config: Config) -> TextFeatures | None:
    section, network = config.sample, config.model.transformer
    if section is None or section.text_features is None:
        return None
    length = _text_part(config).params.get("max_length", network.text_length)
    features = TextFeatures(section.text_features, length, network.text_hidden_size)
    logger.info(
        "sample.text_features: %d prompts of %s; no text encoder is loaded",
        len(features.prompts),
        features.path,
    )
    return features


def _text_part(config: Config) -> Part:
    parts = [part for part in config.model.conditions if part.target.endswith(".TextCondition")]
    if len(parts) != 1:
        raise ConfigError(
            f"text features belong to one text condition, model.conditions holds {len(parts)}: set "
            f"sample.text_features=null and data.text_cache=null"
        )
    return parts[0]


def _condition(part: Part, config: Config, features: TextFeatures | None) -> Part:
    """A condition's part with what other sections say of it: where its weights are, and that LoRA freezes it."""
    params = dict(part.params)
    is_text = part.target.endswith("TextCondition")
    if is_text and features is not None:
        return Part(part.target, {**params, "features": features})
    if params.get("model") is None and params.get("config") is None and is_text:
        path = config.load.text_encoder
        params["model"] = path and str(resolve(path, "text_encoder"))
    if config.lora is not None and "trainable" in params:
        params["trainable"] = False
    return Part(part.target, params)
