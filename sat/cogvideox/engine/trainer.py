"""The training loop: a module and a loader in, a run folder out. To resume, run the same command again.

The module is any ``nn.Module`` with ``module(batch, rng) -> (loss, metrics)``: a 0-d loss that carries gradients and a
dict of 0-d tensors to log. The loader is anything with ``iterate(start) -> endless generator of batches``, where
``start`` counts the batches (one per micro-step) that this rank has already taken. A loader may leave out samples that
fail, and offer as ``quarantine`` which they are (``engine/quarantine.py``). Its processes must ignore SIGTERM, SIGINT
and SIGUSR1: launchers signal whole sessions, and the run needs them until its last step is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cogvideox import dist
from cogvideox.config import TrainConfig
from cogvideox.dist import RandomStreams
from cogvideox.engine import checkpoint, report
from cogvideox.engine.ema import EMA, numel
from cogvideox.engine.events import Events
from cogvideox.engine.logging import Means, RunLog, Stopwatch, get_logger, memory, truncate
from cogvideox.engine.optim import (
    build_optimizer,
    check_train_config,
    clip_or_drop_gradients,
    deepspeed_config,
    learning_rate_factor,
    trainer_checks_gradients,
)
from cogvideox.engine.quarantine import SharedQuarantine
from cogvideox.engine.skipped import SkippedSteps
from cogvideox.engine.stop import Abandoned, Pulse, StopSignal
from cogvideox.engine.trackers import check_trackers
from cogvideox.engine.validation import evaluating
from cogvideox.engine.watchdog import Watchdog
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
        decay_norms_and_biases: bool = False,
    ):
        """validate(module) -> metrics and preview(module, step) -> JSON values are called on every rank, in evaluation
        mode, with the averaged weights where there are any: every ``validate_every`` and ``preview_every`` steps, and
        at the end.

        facts(), called on rank 0 at each save: what else a checkpoint's record (``weights.provenance``) says of the
        run, as JSON values: ``config``, ``dataset``, ``sources`` ... The last preview is a part of that record.
        """
        check_train_config(config, dist.device())
        check_trackers(config.trackers)
        self.config, self.loader, self.run_dir, self.seed = config, loader, Path(run_dir), seed
        self.validate, self.preview, self.facts = validate, preview, facts
        self.previewed: dict[str, Any] | None = None
        self.logger = get_logger()
        self.events = Events(self.run_dir)
        self.quarantine = SharedQuarantine(loader, self.run_dir, self.events)
        self.watchdog = Watchdog(60.0 * config.timeout_minutes, self.events)
        self.start_from = checkpoint.find(self.run_dir / "checkpoints", config.resume)

        optimizer = build_optimizer(module, config.optimizer, decay_norms_and_biases)
        self.optimizer, self.base_learning_rates = (
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
        )
        settings = deepspeed_config(
            config,
            deepspeed_overrides or {},
            trainable=sum(numel(p) for p in module.parameters() if p.requires_grad),
            world_size=dist.world_size(),
            device=dist.device(),
        )
        self._set_learning_rate(0.0)  # DeepSpeed's stage 0 takes a step on zero gradients when it starts
        deepspeed = dist.import_deepspeed()
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        # The watchdog has seen a hung rank by then, and has named it.
        dist.set_timeout(2.0 * config.timeout_minutes + 1.0)
        stage = self.engine.zero_optimization_stage()
        if stage == 0:
            self.engine.basic_optimizer.state.clear()  # ... which must not count in Adam's bias correction
        self.checks_gradients = trainer_checks_gradients(stage, config.precision)

        self.ema = None if config.ema_decay is None else EMA(self.engine.module, config.ema_decay)
        self.checkpoints = checkpoint.Checkpoints(
            self.engine,
            self.run_dir / "checkpoints",
            precision=config.precision,
            keep=config.keep_checkpoints,
            ema=self.ema,
            config_file=self.run_dir / "config.yaml",
        )
        self.step = 0
        # The line of this step, where a stop did not wait for its validation.
        self.unfinished: dict[str, float | None] | None = None
        self.skipped = SkippedSteps(self.engine, config, seed, self.events)
        self.grad_norm: Tensor | float = 0.0
        self.means, self.stopwatch = Means(), Stopwatch()
        if self.start_from is not None:
            self._resume(self.start_from)

    def run(self) -> RunResult:
        """Train up to ``train.steps``, or until a signal asks to stop; the last step is saved either way.

        Raises FloatingPointError after ``max_nonfinite_steps`` consecutive skipped steps, OSError if a checkpoint
        cannot be written, ConnectionError (an OSError) if another rank is gone.
        """
        self.watchdog.start()
        try:
            return self._run()
        except Exception as error:
            with suppress(OSError):
                text = f"{type(error).__name__}: {error}"
                self.events.append("failed", rank=dist.rank(), where=self.watchdog.place, error=text)
            if dist.is_lost_connection(error):
                raise ConnectionError(
                    f"rank {dist.rank()} ends in {self.watchdog.place}: another rank has ended, or does not answer; "
                    f"that rank's own message says why. The same command goes on from the last checkpoint "
                    f"({str(error).splitlines()[0]})"
                ) from error
            raise
        finally:
            self.watchdog.close()

    def _run(self) -> RunResult:
        config = self.config
        if self.unfinished is not None and dist.is_main():
            truncate(self.run_dir / "metrics.jsonl", self.step - 1)
        log = RunLog(self.run_dir, steps=config.steps, start=self.step, trackers=config.trackers)
        self.events.write("started", step=self.step, ranks=dist.world_size())
        with StopSignal() as stop:
            for look in (self.validate, self.preview):
                if hasattr(look, "pulse"):
                    look.pulse = Pulse(stop, lambda: self._at("evaluation"))
            batches = self.loader.iterate(self.step * config.gradient_accumulation_steps)
            try:
                stopping = self._make_up(log, stop.agreed())
                while self.step < config.steps and not stopping:
                    with self.stopwatch.step():
                        self._train_step(batches)
                    self.step += 1
                    log.advance()
                    stopping = stop.agreed()
                    last = self.step == config.steps
                    record: dict[str, float | None] = {}
                    if self._is_due(config.log_every) or last:
                        self.quarantine.share()
                        record |= self._measured()
                    stopping = self._write(log, record, self._is_evaluated(last), stopping)
                    is_saved = self._is_due(config.save_every) or last or stopping
                    if is_saved:
                        log.sync()
                        self._save()
                    # After the save: a kill during a long rendering costs no training step.
                    if not stopping and self._is_previewed(last, is_saved):
                        stopping, _ = self._unless_stopped("preview", self._render_preview, is_saved)
                        if stopping and not is_saved:
                            self._save()
                self.watchdog.rest(self.step, "end")
            finally:
                batches.close()  # ends its worker processes
                log.close(60.0 if self.step >= config.steps else 10.0)
        if dist.is_main() and log.path.stat().st_size:
            report.loss_curve(self.run_dir)
        finished = self.step >= config.steps and self.unfinished is None
        if not finished:
            self.logger.info(
                f"stopped by {stop.name} after step {self.step}, which is saved; run the same command to go on"
            )
            seconds = None if stop.seconds is None else round(stop.seconds, 2)
            self.events.write("stopped", step=self.step, signal=stop.name, seconds_since_signal=seconds)
        else:
            self.events.write("finished", step=self.step)
        return RunResult(self.step, finished)

    def _at(self, phase: str) -> None:
        """Tell the watchdog what comes after ``self.step``."""
        self.watchdog.at(self.step, phase)

    def _make_up(self, log: RunLog, stopping: bool) -> bool:
        """Do what a stop put off at the step from which this run goes on; True where one asks to stop again."""
        directory = self.checkpoints.directory
        if self.start_from is None or self.start_from.parent.resolve() != directory.resolve():
            self.unfinished = None  # of another run, whose business it is
            return stopping
        if self.unfinished is not None:
            stopping = self._write(log, self.unfinished, True, stopping)
            self.checkpoints.note(self.step, {"unfinished": self.unfinished})
        is_shown = self.previewed is not None and self.previewed.get("step") == self.step
        if not (stopping or is_shown) and self._is_previewed(False, self._is_due(self.config.save_every)):
            stopping, _ = self._unless_stopped("preview", self._render_preview, True)
        return stopping

    def _write(self, log: RunLog, record: dict[str, float | None], evaluates: bool, stopping: bool) -> bool:
        """The step's line. A stop does not wait for a validation: the next start writes the line again, with it."""
        evaluated = None
        if evaluates and not stopping:
            stopping, evaluated = self._unless_stopped("validation", self._evaluated)
        self.unfinished = record if evaluates and evaluated is None else None
        if record or evaluated:
            log.write(self.step, record | (evaluated or {}))
        return stopping

    def _unless_stopped(self, phase: str, look: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
        """(whether a signal ended it before its time, on every rank alike; what ``look`` returned)."""
        self._at(phase)
        try:
            return False, look(*arguments)
        except Abandoned:
            self.logger.info(f"a signal ends the {phase} of step {self.step} before its time")
            return True, None

    def _train_step(self, batches: Iterator[Any]) -> None:
        """One optimizer step over ``gradient_accumulation_steps`` batches. Nothing here waits for the device."""
        config, engine = self.config, self.engine
        at, step = self.watchdog.at, self.step + 1
        self._set_learning_rate(
            learning_rate_factor(
                self.step,
                steps=config.steps,
                schedule=config.lr_schedule,
                warmup_steps=config.warmup_steps,
                min_ratio=config.min_lr_ratio,
            )
        )
        self.quarantine.begin(step)
        taken: list[tuple[Any, Tensor]] = []
        for micro_step in range(config.gradient_accumulation_steps):
            at(step, "data")
            with self.stopwatch.data():
                host_batch = next(batches)
                batch = dist.to_device(host_batch, engine.device)
            at(step, "forward")
            rng = RandomStreams.at(
                self.seed, self.step, micro_step, dist.rank(), dist.world_size(), engine.device
            )
            rng.seed_global()
            loss, metrics = engine(batch, rng)
            taken.append((host_batch, loss.detach()))
            at(step, "backward")
            engine.backward(poisoned_if_not_finite(loss))
            self.means.add(
                {"train/loss": loss, **{f"train/{name}": value for name, value in metrics.items()}}
            )
            if self.checks_gradients and engine.is_gradient_accumulation_boundary():
                self.grad_norm = clip_or_drop_gradients(engine.module, config.gradient_clipping)
            at(step, "optimizer")
            engine.step()
        if self.checks_gradients:
            was_applied = bool(torch.isfinite(self.grad_norm))
        else:
            # DeepSpeed made its decision from the norm over all ranks: it is the same on each.
            was_applied, self.grad_norm = engine.was_step_applied(), engine.get_global_grad_norm()
        if was_applied:
            self.skipped.in_a_row = 0
            if self.ema is not None:
                self.ema.update()
        else:
            at(step, "search for what is not finite")
            self.skipped.count(self.step, taken)
        at(step, "end of the step")

    def _set_learning_rate(self, factor: float) -> None:
        # Loading a checkpoint replaces the groups: they are looked up each time.
        for group, base in zip(self.optimizer.param_groups, self.base_learning_rates, strict=True):
            group["lr"] = base * factor

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
        config = self.config
        samples = config.batch_size * config.gradient_accumulation_steps * dist.world_size()
        return {
            **self.means.flush(),
            "train/grad_norm": float(self.grad_norm),
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/skipped_steps": float(self.skipped.steps),
            **self.stopwatch.flush(samples),
            **memory(self.engine.device),
        }

    def _evaluated(self) -> dict[str, float | None]:
        with self._evaluation() as module:
            return self.validate(module)

    def _render_preview(self, is_saved: bool) -> None:
        with self._evaluation() as module:
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

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def _save(self) -> None:
        self.quarantine.share()
        with self.watchdog.paused(self.step, "save"):
            self._save_paused()

    def _save_paused(self) -> None:
        self.checkpoints.save(
            self.step,
            {
                "skipped_steps": self.skipped.steps,
                "skipped_in_a_row": self.skipped.in_a_row,
                "quarantine": self.quarantine.state(),
                "unfinished": self.unfinished,
                "samples_per_step": self.config.batch_size * self.config.gradient_accumulation_steps,
                # A save between two logging steps: what was measured so far counts in the next line.
                "means": dist.gather(self.means.state()),
                provenance.KEY: self._record(),
            },
        )

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
        state = self.checkpoints.load(folder)
        self.step = state["step"]
        self.skipped.steps, self.skipped.in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self.quarantine.restore(state.get("quarantine", []))  # older checkpoints have none
        self.unfinished = state.get("unfinished")
        self.means.load(state["means"][dist.rank()], self.engine.device)
        self.previewed = state.get(provenance.KEY, {}).get("preview")
        samples = self.config.batch_size * self.config.gradient_accumulation_steps
        if samples != state["samples_per_step"]:
            self.logger.warning(
                f"{folder} took {state['samples_per_step']} clips per rank and step, this run takes {samples}: "
                f"the order of the clips does not go on where it ended"
            )
        self.logger.info(f"resumed from {folder}: {self.step} of {self.config.steps} steps are done")


def poisoned_if_not_finite(loss: Tensor) -> Tensor:
    """``loss``, with NaN gradients if it is not finite itself (a bad constant term has finite ones).

    So the reduction of the gradients, which happens anyway, tells every rank to skip the step: no flag is exchanged.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
