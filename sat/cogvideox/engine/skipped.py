"""Steps that were skipped for a loss or gradient that is not finite: counted, explained, too many refused."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cogvideox import dist
from cogvideox.config import TrainConfig
from cogvideox.dist import RandomStreams
from cogvideox.engine.events import Events
from cogvideox.engine.logging import get_logger
from cogvideox.engine.nonfinite import first_bad_layer

_SEARCHES = 20  # in the life of a process: each costs about a step, and a sick run needs no more of them


class SkippedSteps:
    """``count`` is called on every rank for each step that was skipped on all of them."""

    def __init__(self, engine: Any, config: TrainConfig, seed: int, events: Events):
        self.engine, self.config, self.seed, self.events = engine, config, seed, events
        self.steps = self.in_a_row = self._searches = 0

    def count(self, step: int, taken: list[tuple[Any, Tensor]]) -> None:
        """Say whose loss it was, of which clips, and which layer made it; FloatingPointError where that is the rule.

        step: from 0.  taken: this rank's batches of the step, as the loader gave them, and their losses.
        """
        self.steps += 1
        self.in_a_row += 1
        found = self._explained(step, taken)
        cause = "; ".join(found) or "the losses are finite, the gradients are not"
        limit = self.config.max_nonfinite_steps
        get_logger().warning(
            f"step {step + 1} skipped, {self.in_a_row} in a row (the limit is {limit}): {cause}"
        )
        if self.in_a_row >= limit:
            raise FloatingPointError(
                f"{limit} consecutive steps up to {step + 1} had a non-finite loss or gradient ({cause}). "
                f"The checkpoints before are whole: lower train.optimizer.params.lr, try another train.precision, or "
                f"look at these clips (train.max_nonfinite_steps={limit} is the limit)"
            )

    def _explained(self, step: int, taken: list[tuple[Any, Tensor]]) -> list[str]:
        """One text for each rank that is to blame, also written as an event."""
        losses = [loss.item() for _, loss in taken]
        bad = {
            rank: next(i for i, loss in enumerate(values) if not math.isfinite(loss))
            for rank, values in enumerate(dist.gather(losses))
            if not all(map(math.isfinite, values))
        }
        mine = bad.get(dist.rank())
        layer = self._search(step, [batch for batch, _ in taken], bad)
        keys = [_clips(batch) for batch, _ in taken]
        clips = keys[mine] if mine is not None else [key for group in keys for key in group]
        facts = {"loss": losses[-1 if mine is None else mine], "clips": clips, "first_bad_layer": layer}
        ranks = dist.gather(facts)
        # Finite losses everywhere: the ranks whose gradients are not, or all, where that was not found out.
        blamed = (
            list(bad)
            or [r for r, f in enumerate(ranks) if is_found(f["first_bad_layer"])]
            or list(range(len(ranks)))
        )
        texts = []
        for rank in blamed:
            one = ranks[rank]
            loss = one["loss"] if math.isfinite(one["loss"]) else str(one["loss"])  # JSON has no NaN
            self.events.write("skipped_step", step=step + 1, rank=rank, **{**one, "loss": loss})
            if bad:
                batch = f", batch {one['clips']}" if one["clips"] else ""
                texts.append(f"rank {rank}: loss {loss}{batch}, first bad layer: {one['first_bad_layer']}")
            elif is_found(one["first_bad_layer"]):
                texts.append(f"rank {rank}: the loss is finite, first bad layer: {one['first_bad_layer']}")
        return texts

    def _search(self, step: int, batches: list[Any], bad: dict[int, int]) -> str:
        """This rank's first bad layer. bad: rank -> the micro-step of its first bad loss."""
        if self._searches >= _SEARCHES:
            return f"not looked for: {_SEARCHES} skipped steps of this start were examined"
        if not bad and self.config.precision == "fp16":
            return "not looked for: under fp16 the loss scale makes gradients overflow now and then"
        self._searches += 1
        mine = bad.get(dist.rank())
        # ZeRO-3 gathers weights in every layer: all ranks do the same passes.
        together = self.engine.zero_optimization_stage() == 3
        if not bad:
            if together:
                return "not looked for: the gradients of ZeRO-3 are in parts"
            wanted = list(range(len(batches)))
        elif together:
            wanted = sorted(set(bad.values()))
        else:
            wanted = [] if mine is None else [mine]
        answer = "not looked for: this rank's loss is finite"
        for micro_step in wanted:
            text = first_bad_layer(
                self.engine.module,
                dist.to_device(batches[micro_step], self.engine.device),
                lambda micro_step=micro_step: RandomStreams.at(
                    self.seed, step, micro_step, dist.rank(), dist.world_size(), self.engine.device
                ),
                backward=not bad,
            )
            if micro_step == mine or not bad:
                answer = text
            if not bad and is_found(text):
                break
        return answer


def is_found(layer: str) -> bool:
    return not layer.startswith("not ")


def _clips(batch: Any) -> list[Any]:
    """The ids of a batch's samples, where it says them."""
    keys = batch.get("key") if isinstance(batch, dict) else None
    return list(keys) if isinstance(keys, list | tuple) else [] if keys is None else [keys]
