"""Captions to tokens with a T5 encoder: T5-v1.1-XXL of the published models, or a small one on bytes, in one class."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox.conditioning.features import TextFeatures
from cogvideox.conditioning.text_cache import TextCache

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TextCondition(nn.Module):
    """``{"caption": [B strings]}`` -> ``{"tokens": (B, max_length, D)}``; a dropped caption is all zeros.

    max_length: every caption is padded to it, end-of-sequence token included (226; 1.5: 224).
    dropout: probability that a training caption is dropped, for classifier-free guidance.
    trainable: False keeps the encoder frozen and outside the module tree, so that no engine casts, trains or stores it;
      it moves to the device of its input. True registers it as ``transformer`` (SAT's key names) and trains it.
      Its own dropout follows T5's ``dropout_rate`` (0.1 unless config says 0) and draws from torch's global generator.
    model: folder of a pretrained encoder, read at its first use: config.json, weights and spiece.model together (SAT's
      t5-v1_1-xxl), or a folder with ``text_encoder/`` and ``tokenizer/`` (diffusers).
    config: arguments of ``transformers.T5Config`` for random weights instead; ``init_seed`` alone decides them.
    tokenizer: "byt5" (one token per byte, needs no file), a folder with a T5 tokenizer, or None for that of ``model``.
    dtype: of the weights: fp32, bf16 or fp16.
    on_long: what happens to a caption of more than max_length tokens: "error", or "cut" and count it in ``num_cut``.
    allow_empty: whether a blank caption is data. False: it is an error, as it is mostly a lost label.
    features: encoded captions, which are looked up: no encoder and no tokenizer is ever built.
    """

    def __init__(
        self,
        max_length: int,
        dropout: float = 0.1,
        trainable: bool = False,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        dtype: str = "fp32",
        on_long: str = "error",
        allow_empty: bool = False,
        init_seed: int = 0,
        features: TextFeatures | None = None,
    ):
        super().__init__()
        if max_length < 1:
            raise ValueError(f"text condition max_length={max_length}: expected at least 1 token")
        if not 0 <= dropout <= 1:
            raise ValueError(f"text condition dropout={dropout}: expected a probability from 0 to 1")
        if on_long not in ("error", "cut"):
            raise ValueError(f"text condition on_long={on_long!r}: expected 'error' or 'cut'")
        if dtype not in DTYPES:
            raise ValueError(f"text condition dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        if model is not None and config is not None:
            raise ValueError(
                "text condition: give model (a pretrained folder) or config (random weights), not both"
            )
        if config is not None and tokenizer is None:
            raise ValueError('text condition: config needs a tokenizer too, such as tokenizer: "byt5"')
        if trainable and model is None and config is None and features is None:
            raise ValueError(
                "text condition trainable=True: set model (a pretrained folder) or config (random weights)"
            )
        self.max_length, self.dropout, self.trainable = max_length, dropout, trainable
        self.on_long, self.allow_empty, self.num_cut = on_long, allow_empty, 0
        self._model, self._config, self._tokenizer_name = model, config, tokenizer
        self._dtype, self._dtype_name, self._init_seed = DTYPES[dtype], dtype, init_seed
        self.features, self._device = features, None
        self.cached: TextCache | None = None
        # Looked at first: what is encoded there needs no encoder.
        self._tokenizer = None
        self.transformer: nn.Module | None = None
        if features is not None:
            self._check_features(features)
        elif trainable:
            self.transformer = self._build().train().requires_grad_(True)
        elif config is not None:
            self._hold_frozen(self._build())

    def forward(self, batch: dict[str, Any], drop: Tensor) -> dict[str, Tensor]:
        """batch: ``caption``, B strings, or ``text_features`` (B, max_length, D), which are those captions encoded.
        drop: (B,) bool, on the device where the tokens are wanted.
        """
        if "text_features" in batch:
            tokens = batch["text_features"].to(drop.device)
        else:
            tokens = self.encode(batch["caption"], drop.device)
        # Not a product with 0 or 1: a NaN of the encoder must not survive in a dropped caption.
        return {"tokens": tokens.masked_fill(drop[:, None, None], 0)}

    def encode(
        self, captions: Sequence[str], device: torch.device | str = "cpu", *, allow_empty: bool | None = None
    ) -> Tensor:
        """Captions -> (B, max_length, D).  Raises ValueError for a caption that is too long or empty."""
        if self.features is not None:
            self._check_captions(captions, allow_empty)
            return self.features.encode(captions).to(device)
        if self.cached is not None and all(caption in self.cached for caption in captions):
            return self.cached.encode(captions).to(device)
        ids = self.tokenize(captions, allow_empty=allow_empty)
        return self.encode_ids(ids.to(self._device or device)).to(device)

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Padded token ids (B, L) int64 -> the encoder's last hidden state (B, L, D)."""
        self.load()
        if not self.trainable and next(self.transformer.parameters()).device != ids.device:
            self.transformer.to(ids.device)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            # No attention mask: the published models attend to the padding and were trained on what it becomes.
            return self.transformer(input_ids=ids).last_hidden_state

    def tokenize(self, captions: Sequence[str], *, allow_empty: bool | None = None) -> Tensor:
        """Captions -> ids (B, max_length) int64 on the CPU: tokens, the end-of-sequence token, padding."""
        self._check_captions(captions, allow_empty)
        tokenizer = self._load_tokenizer()
        rows = tokenizer(list(captions), add_special_tokens=True, padding=False, verbose=False)["input_ids"]
        rows = [self._fit(ids, caption) for ids, caption in zip(rows, captions, strict=True)]
        vocabulary = self._encoder_config["vocab_size"]
        if max(map(max, rows)) >= vocabulary:
            raise ValueError(
                f"the tokenizer gives token {max(map(max, rows))}, the text encoder has vocab_size={vocabulary}: "
                f"tokenizer and encoder do not belong together"
            )
        pad = tokenizer.pad_token_id
        return torch.tensor([ids + [pad] * (self.max_length - len(ids)) for ids in rows])

    @property
    def hidden_size(self) -> int:
        """D, the encoder's width, without loading the weights."""
        return self._encoder_config["d_model"]

    def load(self) -> None:
        """Read the frozen encoder now, not at its first use. Does nothing where it is there."""
        if self.transformer is None:
            self._hold_frozen(self._build())

    def release(self) -> None:
        """Free the memory of a pretrained frozen encoder, once all captions are encoded; it is read again if needed."""
        if not self.trainable and self._model is not None:
            self._hold_frozen(None)

    def stay_on(self, device: torch.device) -> None:
        """Freeze the encoder and run it on ``device`` from now on, wherever its tokens are wanted."""
        encoder = self._modules.pop("transformer", None) or self.transformer
        self._hold_frozen(encoder if encoder is None else encoder.to(device))
        self._device = device

    @property
    def is_placed(self) -> bool:
        """Whether nothing of it is ever to be put on the network's device: ``features``, or ``stay_on``."""
        return self.features is not None or self._device is not None

    @property
    def has_encoder(self) -> bool:
        """Whether it is known which encoder this is: ``model`` or ``config``."""
        return self._model is not None or self._config is not None

    @property
    def folder(self) -> str | None:
        """``model``: the pretrained encoder."""
        return self._model

    @property
    def dtype_name(self) -> str:
        """Of the weights and of the features: fp32, bf16 or fp16."""
        return self._dtype_name

    def identity(self) -> dict[str, str]:
        """What the settings say of the encoder, weights apart: ``dtype``, and the SHA-256 of its ``config``."""
        settings = self._encoder_config if self._config is None else [self._config, self._init_seed]
        config = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return {"config": config, "dtype": self._dtype_name}

    def tokenizer_files(self) -> list[Path]:
        """The files that make the tokenizer; none for "byt5"."""
        if self._tokenizer_name == "byt5":
            return []
        names = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        return [self._tokenizer_folder() / n for n in names if (self._tokenizer_folder() / n).is_file()]

    def _check_features(self, features: TextFeatures) -> None:
        """As far as it is known without the encoder: of one in a folder, which need not be there, only its dtype."""
        if features.max_length != self.max_length:
            raise ValueError(
                f"{features.path} holds text of {features.max_length} tokens, max_length={self.max_length}"
            )
        known = {"dtype": self._dtype_name} if self._config is None else self.identity()
        for name, value in known.items():
            if features.encoder.get(name) != value:
                raise ValueError(
                    f"{features.path} is of another text encoder than model.conditions says: its {name} is "
                    f"{features.encoder.get(name)}, expected {value}; encode the prompts with this configuration"
                )

    def _check_captions(self, captions: Sequence[str], allow_empty: bool | None) -> None:
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions: expected a list of strings, found {captions!r:.80}")
        if not (self.allow_empty if allow_empty is None else allow_empty):
            empty = [i for i, caption in enumerate(captions) if not caption.strip()]
            if empty:
                raise ValueError(
                    f"the caption at position {empty[0]} is empty; allow_empty: true takes it as it is"
                )

    def _hold_frozen(self, transformer: nn.Module | None) -> None:
        if transformer is not None:
            transformer.eval().requires_grad_(False)
        # Around nn.Module.__setattr__, which would register it.
        object.__setattr__(self, "transformer", transformer)

    def _fit(self, ids: list[int], caption: str) -> list[int]:
        if len(ids) <= self.max_length:
            return ids
        lost = self._words_cut(caption)
        if self.on_long == "error":
            raise ValueError(
                f"a caption has {len(ids)} tokens, {self.max_length} fit: these words would be cut: {lost!r}. Shorten "
                f"it, or set on_long: cut (it begins {caption[:60]!r})"
            )
        self.num_cut += 1
        if str(self.num_cut).rstrip("0") == "1":  # the 1st, 10th, 100th ...: seen, and not in every step
            logger.warning(
                "%d captions cut to %d tokens so far; this one began %r and lost %r",
                self.num_cut,
                self.max_length,
                caption[:60],
                lost,
            )
        return ids[: self.max_length - 1] + ids[-1:]  # the last token ends the sequence

    def cut_words(self, captions: Sequence[str]) -> dict[int, str]:
        """Position -> the words that do not fit, for the captions that are too long (whatever ``on_long`` says)."""
        rows = self._load_tokenizer()(list(captions), padding=False, verbose=False)["input_ids"]
        long = [i for i, ids in enumerate(rows) if len(ids) > self.max_length]
        return {i: self._words_cut(captions[i]) for i in long}

    def _words_cut(self, caption: str) -> str:
        """The words of a caption that is too long from the first that does not fit whole."""
        words, tokenizer = caption.split(), self._load_tokenizer()
        fits, too_many = 0, len(words)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            length = len(tokenizer(" ".join(words[:middle]), verbose=False)["input_ids"])
            fits, too_many = (middle, too_many) if length <= self.max_length else (fits, middle)
        return " ".join(words[fits:])

    def _build(self) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        if self._config is not None:
            _check_t5_keys(self._config, set(T5Config().to_dict()))
            # T5 draws its weights from the global CPU generator: borrow it, so that they depend on init_seed alone.
            # A frozen encoder is in no checkpoint, it must come out the same in training and in sampling.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self._init_seed)
                if self.trainable:
                    return T5EncoderModel(T5Config(**self._config)).to(self._dtype)
                with torch.device(
                    "cpu"
                ):  # also inside `with torch.device("meta")`: nothing would ever fill it
                    return T5EncoderModel(T5Config(**self._config)).to(self._dtype)
        folder = self._weights_folder()
        try:
            model, info = T5EncoderModel.from_pretrained(
                folder, dtype=self._dtype, local_files_only=True, output_loading_info=True
            )
        except OSError as error:
            raise ValueError(f"text encoder {folder}: {error}") from error
        if info["missing_keys"]:
            # transformers would leave these random and only warn.
            raise ValueError(
                f"text encoder {folder}: the weights lack {sorted(info['missing_keys'])[:3]} ..."
            )
        return model

    def _weights_folder(self) -> Path:
        if self._model is None:
            raise ValueError(
                "there is no text encoder: set load.text_encoder to the folder of T5 (t5-v1_1-xxl)"
            )
        root = Path(self._model)
        folder = root / "text_encoder" if (root / "text_encoder").is_dir() else root
        if not (folder / "config.json").is_file():
            found = "holds no config.json" if folder.is_dir() else "is no folder"
            raise ValueError(
                f"text encoder {folder} {found}: expected config.json, weights and spiece.model of a T5"
            )
        return folder

    @functools.cached_property
    def _encoder_config(self) -> dict[str, Any]:
        """The encoder's settings, of which d_model and vocab_size are always there."""
        if self._config is None:
            return json.loads((self._weights_folder() / "config.json").read_text())
        from transformers import T5Config

        return T5Config(**self._config).to_dict()

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import ByT5Tokenizer, T5Tokenizer

            if self._tokenizer_name == "byt5":
                self._tokenizer = ByT5Tokenizer()
            else:
                self._tokenizer = T5Tokenizer.from_pretrained(self._tokenizer_folder(), local_files_only=True)
        return self._tokenizer

    def _tokenizer_folder(self) -> Path:
        if self._tokenizer_name is not None:
            places = [Path(self._tokenizer_name)]
        else:
            weights = self._weights_folder()
            places = [weights, Path(self._model) / "tokenizer", weights.parent / "tokenizer"]
        for place in places:
            # Without these files transformers makes an empty tokenizer, for which every word is unknown.
            if (place / "spiece.model").is_file() or (place / "tokenizer.json").is_file():
                return place
        looked = ", ".join(str(place) for place in dict.fromkeys(places))
        raise ValueError(
            f'no tokenizer (spiece.model or tokenizer.json) in {looked}; tokenizer: "byt5" needs none'
        )


def _check_t5_keys(config: dict[str, Any], known: set[str]) -> None:
    """T5Config takes any key and ignores those it does not know."""
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"text condition config: T5 has no setting {key}{hint}")
