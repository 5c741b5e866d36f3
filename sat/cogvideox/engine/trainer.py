"""The training loop: a module and a loader in, a run folder out. To resume, run the same command again.

The module is any ``nn.Module`` with ``module(batch, rng) -> (loss, metrics)``: a 0-d loss that carries gradients and a
dict of 0-d tensors to log. The loader is anything with ``iterate(start) -> endless generator of batches``, where
``start`` counts the clips that all ranks together have already taken: the next micro-step takes the clips
[start, start + batch_size * ranks), of which this rank gets its share. Worker processes of a loader must
ignore SIGTERM and SIGINT: launchers signal whole sessions, and a worker that dies ends the run before it is saved.
"""

from __future__ import annotations

import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cogvideox import dist, environment
from cogvideox.config import TrainConfig
from cogvideox.dist import RandomStreams
from cogvideox.engine import checkpoint, report
from cogvideox.engine.checkpoint_folders import KeepRule
from cogvideox.engine.ema import EMA, numel
from cogvideox.engine.events import Events
from cogvideox.engine.global_batch import clips_per_step, with_accumulation
from cogvideox.engine.instruments import Instruments, Work
from cogvideox.engine.logging import Means, RunLog, check_trackers, get_logger
from cogvideox.engine.optim import (
    build_optimizer,
    check_train_config,
    clip_or_drop_gradients,
    deepspeed_config,
    kept_in_full,
    learning_rate_factor,
    learning_rates,
    set_learning_rates,
    trainer_checks_gradients,
)
from cogvideox.engine.resources import Resources
from cogvideox.engine.summary import write_summary
from cogvideox.engine.validation import evaluating
from cogvideox.weights import provenance


class Loader(Protocol):
    def iterate(self, start: int) -> Generator[Any, None, None]: ...


@dataclass(frozen=True)
class RunResult:
    step: int
    # Optimizer steps done, those of earlier starts included.
    finished: bool
    # False: a signal ended the run before train.steps; its last step is saved.


class Trainer:
    """Trains ``module`` on this rank; every rank makes one alike. ``dist.init()`` comes before."""

    def __init__(
        self,
        module: nn.Module,
        loader: Loader,
        config: TrainConfig,
        run_dir: str | Path,
        *,
        deepspeed_overrides: dict[str, Any] | None = None,
        seed: int = 0,
        validate: Callable[[nn.Module], dict[str, float | None]] | None = None,
        preview: Callable[[nn.Module, int], dict[str, Any] | None] | None = None,
        facts: Callable[[], dict[str, Any]] = dict,
        work: Work | None = None,
        resources: Resources | None = None,
        decay_norms_and_biases: bool = False,
        accepted: Sequence[str] = (),
    ):
        """validate(module) -> metrics and preview(module, step) -> JSON values are called on every rank, in evaluation
        mode, with the averaged weights where there are any: every ``validate_every`` and ``preview_every`` steps, and
        at the end; validate also before the first step. It may have ``state()`` -> JSON values, kept in checkpoints,
        and ``load(state)``, called where one is resumed.

        facts(), called on rank 0 at each save: what else a checkpoint's record (``weights.provenance``) says of the
        run, as JSON values: ``config``, ``dataset``, ``sources`` ... The last preview is a part of that record.

        work: of a training step for one sample, for tokens/s, FLOP/s and MFU. resources: the process's own account, if
        it has kept one so far. A module that has the attribute ``phases`` is given the trainer's (``phases.Phases``),
        and one that has ``parameter_group(name)`` names the groups whose norms are logged. A metric of the module may
        also have one element per sample; each counts as a value of its own.

        accepted: how the configuration differs from that of the checkpoint, in words, for the record of the resume.
        """
        check_train_config(config, dist.device())
        check_trackers(config.trackers)
        config = with_accumulation(config, dist.world_size())
        self.config, self.loader, self.run_dir, self.seed = config, loader, Path(run_dir), seed
        self.validate, self.preview, self.facts = validate, preview, facts
        self.previewed: dict[str, Any] | None = None
        self.logger = get_logger()
        self.events, self.accepted = Events(self.run_dir), list(accepted)
        self.start_from = checkpoint.choose(self.run_dir / "checkpoints", config.resume, self.events)

        optimizer = build_optimizer(module, config.optimizer, decay_norms_and_biases, config.groups)
        self.optimizer, self.base_learning_rates = optimizer, learning_rates(optimizer)
        settings = deepspeed_config(
            config,
            deepspeed_overrides or {},
            trainable=sum(numel(p) for p in module.parameters() if p.requires_grad),
            world_size=dist.world_size(),
            device=dist.device(),
        )
        fits = {
            "precision": config.precision,
            "zero_stage": settings["zero_optimization"]["stage"],
            "parameters": checkpoint.trained_parameters(module, optimizer),
        }
        if self.start_from is not None:
            checkpoint.check_fits(self.start_from, fits)
        self._set_learning_rate(0.0)  # DeepSpeed's stage 0 takes a step on zero gradients when it starts
        deepspeed = dist.import_deepspeed()
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        dist.set_timeout(config.timeout_minutes)
        stage = self.engine.zero_optimization_stage()
        if stage == 0:
            self.engine.basic_optimizer.state.clear()  # ... which must not count in Adam's bias correction
        self.checks_gradients = trainer_checks_gradients(stage, config.precision)
        in_full, updated = kept_in_full(optimizer)
        if in_full:
            self.logger.info(
                f"{in_full:,} of {updated:,} numbers of this rank keep optimizer states of 32 bits"
            )

        self.ema = None if config.ema_decay is None else EMA(self.engine.module, config.ema_decay)
        self.checkpoints = checkpoint.Checkpoints(
            self.engine,
            self.run_dir / "checkpoints",
            fits=fits,
            keep=KeepRule(config.keep_checkpoints, config.keep_best, config.keep_every),
            timeout_minutes=config.timeout_minutes,
            ema=self.ema,
            config_file=self.run_dir / "config.yaml",
        )
        self.step = self.samples_seen = self.skipped_steps = self.skipped_in_a_row = 0
        self.best: dict[str, float] | None = None
        # {"step", "val/loss"} of the lowest held-out loss so far.
        self.resumed: dict[str, Any] | None = None
        self.grad_norm: Tensor | float = 0.0
        self.means = Means()
        self.instruments = Instruments(self.engine, optimizer, config, self.run_dir, work)
        self.phases, self.resources = self.instruments.phases, resources or Resources(self.engine.device)
        if self.start_from is not None:
            self._resume(self.start_from)

    def run(self) -> RunResult:
        """Train up to ``train.steps``, or until a signal asks to stop; the last step is saved either way.

        Raises FloatingPointError after ``max_nonfinite_steps`` consecutive skipped steps, OSError if a checkpoint
        cannot be written.
        """
        config = self.config
        log = RunLog(
            self.run_dir,
            steps=config.steps,
            start=-1 if self.resumed is None else self.step,
            trackers=config.trackers,
        )
        self._say_started()
        stopping = False
        self.resources.begin("train")
        with StopSignal() as stop:
            batches = self.loader.iterate(self.samples_seen)
            try:
                if self.step == 0 and self._is_evaluated(last=False):
                    log.write(0, self._evaluated())
                while self.step < config.steps and not stopping:
                    is_logged = (self.step + 1) % config.log_every == 0 or self.step + 1 == config.steps
                    with self.instruments.step(self.step + 1, is_logged):
                        self._train_step(batches)
                    self.step += 1
                    self.samples_seen += clips_per_step(config, dist.world_size())
                    log.advance()
                    stopping = stop.agreed()
                    last = self.step == config.steps
                    record: dict[str, float | None] = {}
                    if is_logged:
                        record |= self._measured()
                    held_out = None
                    if self._is_evaluated(last):
                        record |= self._evaluated()
                        held_out = self._compared(record.get("val/loss"))
                    if record:
                        log.write(self.step, record)
                    is_saved = self._is_due(config.save_every) or last or stopping
                    if is_saved:
                        log.sync()
                        with self.resources("save"):
                            self._save(held_out)
                    # After the save: a kill during a long rendering costs no training step.
                    if not stopping and self._is_previewed(last, is_saved):
                        self._render_preview(is_saved)
            finally:
                batches.close()  # ends its worker processes
                self.instruments.close()
                log.close()
        self.resources.begin("report")
        if dist.is_main() and log.path.stat().st_size:
            report.loss_curve(self.run_dir)
        write_summary(self, self.skipped_steps)
        if stopping and self.step < config.steps:
            self.logger.info(
                f"stopped by {stop.name} after step {self.step}, which is saved; run the same command to go on"
            )
        return RunResult(self.step, finished=self.step >= config.steps)

    def _train_step(self, batches: Iterator[Any]) -> None:
        """One optimizer step over ``gradient_accumulation_steps`` batches. Nothing here waits for the device."""
        config, engine, phases = self.config, self.engine, self.phases
        self._set_learning_rate(
            learning_rate_factor(
                self.step,
                steps=config.steps,
                schedule=config.lr_schedule,
                warmup_steps=config.warmup_steps,
                min_ratio=config.min_lr_ratio,
            )
        )
        for micro_step in range(config.gradient_accumulation_steps):
            with phases("data"):
                batch = dist.to_device(next(batches), engine.device)
            rng = RandomStreams.at(
                self.seed, self.step, micro_step, dist.rank(), dist.world_size(), engine.device
            )
            rng.seed_global()
            with phases("forward"):
                loss, metrics = engine(batch, rng)
            with phases("backward"):
                engine.backward(poisoned_if_not_finite(loss))
            self.means.add(
                {"train/loss": loss, **{f"train/{name}": value for name, value in metrics.items()}}
            )
            with phases("optimizer"):
                if self.checks_gradients and engine.is_gradient_accumulation_boundary():
                    self.grad_norm = clip_or_drop_gradients(engine.module, config.gradient_clipping)
                engine.step()
        if self.checks_gradients:
            was_applied = bool(torch.isfinite(self.grad_norm))
        else:
            # DeepSpeed made its decision from the norm over all ranks: it is the same on each.
            was_applied, self.grad_norm = engine.was_step_applied(), engine.get_global_grad_norm()
        if was_applied:
            self.skipped_in_a_row = 0
            if self.ema is not None:
                with phases("optimizer"):
                    self.ema.update()
        else:
            self._count_skipped(batch, loss)

    def _set_learning_rate(self, factor: float) -> None:
        # Loading a checkpoint replaces the groups: they are looked up each time.
        set_learning_rates(self.optimizer, [base * factor for base in self.base_learning_rates])

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0

    def _is_evaluated(self, last: bool) -> bool:
        every = self.config.validate_every
        return self.validate is not None and every is not None and (self._is_due(every) or last)

    def _is_previewed(self, last: bool, is_saved: bool) -> bool:
        every = self.config.preview_every
        return self.preview is not None and (last or (is_saved if every is None else self._is_due(every)))

    def _measured(self) -> dict[str, float | None]:
        """What is logged of training since the last time: here the device is waited for."""
        gradient_norm = float(self.grad_norm)
        return {
            **self.means.flush(),
            "train/grad_norm": gradient_norm,
            "train/lr": learning_rates(self.optimizer)[0],
            "train/skipped_steps": float(self.skipped_steps),
            "train/samples": float(self.samples_seen),
            **self.instruments.read(gradient_norm),
            **self.resources.metrics(),
        }

    def _evaluated(self) -> dict[str, float | None]:
        with self.resources("validate"), self._evaluation() as module:
            return self.validate(module)

    def _render_preview(self, is_saved: bool) -> None:
        with self.resources("preview"), self._evaluation() as module:
            rendered = self.preview(module, self.step)
        self.previewed = rendered or self.previewed
        if rendered and is_saved:
            self.checkpoints.note(self.step, {provenance.KEY: self._record()})

    @contextmanager
    def _evaluation(self) -> Iterator[nn.Module]:
        """The module in evaluation mode, with the averaged weights where there are any."""
        module = self.engine.module
        with self.ema.applied() if self.ema is not None else nullcontext(), evaluating(module):
            yield module

    def _count_skipped(self, batch: Any, loss: Tensor) -> None:
        """A loss or gradient was not finite: say whose, and stop the run if that has become the rule."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        keys = batch.get("key") if isinstance(batch, dict) else None
        suspects = [
            f"rank {rank}: loss {value}" + (f", batch {names}" if names else "")
            for rank, (value, names) in enumerate(dist.gather((loss.item(), keys)))
            if not torch.isfinite(torch.tensor(value))
        ]
        cause = "; ".join(suspects) or "the losses are finite, the gradients are not"
        limit = self.config.max_nonfinite_steps
        self.logger.warning(
            f"step {self.step + 1} skipped, {self.skipped_in_a_row} in a row (the limit is {limit}): {cause}"
        )
        if self.skipped_in_a_row >= limit:
            raise FloatingPointError(
                f"{limit} consecutive steps up to {self.step + 1} had a non-finite loss or gradient ({cause}). "
                f"The checkpoints before are whole: lower train.optimizer.params.lr, try another train.precision, or "
                f"look at these clips (train.max_nonfinite_steps={limit} is the limit)"
            )

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def _save(self, held_out: float | None) -> None:
        """held_out: the loss on held-out clips at this step; None where it was not measured."""
        self.checkpoints.save(
            self.step,
            {
                "samples_seen": self.samples_seen,
                "global_batch_size": clips_per_step(self.config, dist.world_size()),
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row,
                "val/loss": held_out,
                "best": self.best,
                # A save between two logging steps: what was measured so far counts in the next line.
                "means": dist.gather(self.means.state()),
                "validation": getattr(self.validate, "state", lambda: None)(),
                "resources": self.resources.state(),
                provenance.KEY: self._record(),
            },
        )

    def _compared(self, loss: float | None) -> float | None:
        """Remember the best held-out loss; returns ``loss``, or None if it is no number."""
        if loss is None or not math.isfinite(loss):
            return None
        if self.best is None or loss < self.best["val/loss"]:
            self.best = {"step": self.step, "val/loss": loss}
        return loss

    def _record(self) -> dict[str, Any]:
        """Where the weights come from, for those who find only the checkpoint; complete on rank 0."""
        facts = self.facts() if dist.is_main() else {}
        return provenance.record(
            step=self.step,
            seed=self.seed,
            world_size=dist.world_size(),
            preview=self.previewed,
            **facts,
        )

    def _resume(self, folder: Path) -> None:
        hyperparameters = [dict(group) for group in self.optimizer.param_groups]
        state = self.checkpoints.load(folder)
        for group, mine in zip(self.optimizer.param_groups, hyperparameters, strict=True):
            # The checkpoint's come with its groups; run.force may have let others pass.
            group.update({key: mine[key] for key in self.config.optimizer.params.keys() & mine.keys()})
        self.step, self.samples_seen, self.best = state["step"], state["samples_seen"], state["best"]
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self.resources.load(state["resources"])
        # Of the ranks that were, each counts once: those of rank 5 go to rank 1 of 4, none to a rank that is new.
        self.means.load(state["means"][dist.rank() :: dist.world_size()], self.engine.device)
        self.previewed = state.get(provenance.KEY, {}).get("preview")
        getattr(self.validate, "load", lambda state: None)(state.get("validation"))
        before, now = state["global_batch_size"], clips_per_step(self.config, dist.world_size())
        if now != before:
            self.logger.warning(
                f"a step takes {now} clips from here on, {before} before: the learning rate was chosen for those. The "
                f"order of the clips goes on where it ended; train.global_batch_size={before} keeps the batch on any "
                f"number of ranks"
            )
        self.resumed = {
            "checkpoint": str(folder),
            "step": self.step,
            "samples": self.samples_seen,
            "world_size": {"before": state["world_size"], "now": dist.world_size()},
            "global_batch_size": {"before": before, "now": now},
            "accepted": self.accepted,
        }
        self.logger.info(f"resumed from {folder}: {self.step} of {self.config.steps} steps are done")

    def _say_started(self) -> None:
        self.events.write(
            "started",
            ranks=dist.world_size(),
            steps=self.config.steps,
            versions=environment.versions(),
            command=shlex.join(sys.argv),
        )
        if self.resumed is not None:
            self.events.write("resumed", **self.resumed)
        saved, validated = self.config.save_every, self.config.validate_every
        if self.validate is not None and self.config.keep_best and validated and saved % validated:
            self.logger.info(
                f"train.keep_best chooses among the steps that are validated and saved, every "
                f"{math.lcm(saved, validated)} and the last: train.save_every={saved} is no multiple of "
                f"train.validate_every={validated}"
            )


def poisoned_if_not_finite(loss: Tensor) -> Tensor:
    """``loss``, with NaN gradients if it is not finite itself (a bad constant term has finite ones).

    So the reduction of the gradients, which happens anyway, tells every rank to skip the step: no flag is exchanged.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


class StopSignal:
    """SIGTERM or SIGINT (Ctrl-C) asks all ranks for a last checkpoint; a second one ends the process at once.

    torchrun passes its own signal on and kills what is left after 30 s (``--shutdown-timeout`` of newer versions).
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)
    # Launchers and terminals may both deliver the same signal: within this time it counts once.
    _DUPLICATE_SECONDS = 1.0

    def __init__(self) -> None:
        self.name = "another rank's signal"
        self._received_at: float | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._receive) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at, self.name = now, signal.Signals(number).name
        elif now - self._received_at > self._DUPLICATE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call, once a step."""
        return dist.any_rank(self._received_at is not None)
