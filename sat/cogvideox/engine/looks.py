"""Looks at the model while it trains: validation and previews, when they are due and with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from cogvideox.config import TrainConfig
from cogvideox.engine.ema import EMA
from cogvideox.engine.resources import Resources
from cogvideox.engine.stop import Pulse, StopSignal
from cogvideox.engine.validation import evaluating

Validate = Callable[[nn.Module], dict[str, float | None]]
Preview = Callable[[nn.Module, int], dict[str, Any] | None]


class Looks:
    """``evaluate`` and ``render`` are called on every rank. Both raise ``Abandoned`` on every rank where one of them is
    asked to stop: a validation may take longer than the grace that a launcher gives."""

    def __init__(
        self,
        module: nn.Module,
        ema: EMA | None,
        config: TrainConfig,
        validate: Validate | None,
        preview: Preview | None,
        resources: Resources,
    ):
        self.module, self.ema, self.config, self.resources = module, ema, config, resources
        self.validate, self.preview = validate, preview
        self.best: dict[str, float] | None = None
        # {"step", "val/loss"} of the lowest held-out loss so far.
        self.previewed: dict[str, Any] | None = None
        # What the last preview returned.
        self.unfinished: dict[str, float | None] | None = None
        # The line of the present step, where a stop did not wait for its validation.
        self._held_out: tuple[int, float | None] = (0, None)

    def hear(self, stop: StopSignal, mark: Callable[[], None]) -> None:
        """Let both be stopped by ``stop``; ``mark`` is called whenever they make progress."""
        for look in (self.validate, self.preview):
            if hasattr(look, "pulse"):
                look.pulse = Pulse(stop, mark)

    def is_evaluated(self, step: int, last: bool) -> bool:
        every = self.config.validate_every
        return self.validate is not None and every is not None and (step % every == 0 or last)

    def is_previewed(self, step: int, last: bool, is_saved: bool) -> bool:
        every = self.config.preview_every
        return self.preview is not None and (last or (is_saved if every is None else step % every == 0))

    def is_preview_missing(self, step: int) -> bool:
        """Whether a start at ``step`` begins with a preview: the base model's, or one that the last start did not
        finish."""
        every = self.config.preview_every or self.config.save_every
        is_due = self.preview is not None and (step % every == 0 or step == self.config.steps)
        return is_due and (self.previewed or {}).get("step") != step

    def evaluate(self, step: int) -> dict[str, float | None]:
        with self.resources("validate"), self._evaluation() as module:
            metrics = self.validate(module)
        loss = metrics.get("val/loss")
        loss = loss if loss is not None and math.isfinite(loss) else None
        if loss is not None and (self.best is None or loss < self.best["val/loss"]):
            self.best = {"step": step, "val/loss": loss}
        self._held_out = (step, loss)
        return metrics

    def render(self, step: int) -> dict[str, Any] | None:
        with self.resources("preview"), self._evaluation() as module:
            rendered = self.preview(module, step)
        self.previewed = rendered or self.previewed
        return rendered

    def state(self, step: int) -> dict[str, Any]:
        """Of a checkpoint of ``step``, as JSON values: ``val/loss`` is that of this very step, or null."""
        return {
            "val/loss": self._held_out[1] if self._held_out[0] == step else None,
            "best": self.best,
            "unfinished": self.unfinished,
            "validation": getattr(self.validate, "state", lambda: None)(),
        }

    def load(self, state: dict[str, Any], previewed: dict[str, Any] | None, is_own: bool) -> None:
        """is_own: whether the checkpoint is one of this run, whose unfinished line is this run's business."""
        self.best, self.previewed = state["best"], previewed
        self.unfinished = state["unfinished"] if is_own else None
        self._held_out = (state["step"], state["val/loss"])
        getattr(self.validate, "load", lambda state: None)(state["validation"])

    @contextmanager
    def _evaluation(self) -> Iterator[nn.Module]:
        """The module in evaluation mode, with the averaged weights where there are any."""
        applied = self.ema.applied() if self.ema is not None else nullcontext()
        with applied, evaluating(self.module):
            yield self.module
