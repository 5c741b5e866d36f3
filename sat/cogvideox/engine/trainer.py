"""The training loop: a module and a loader in, a run folder out. To resume, run the same command again.

The module is any ``nn.Module`` with ``module(batch, rng) -> (loss, metrics)``: a 0-d loss that carries gradients and a
dict of 0-d tensors to log. The loader is anything with ``iterate(start) -> endless generator of batches``, where
``start`` counts the clips that all ranks together have already taken: the next micro-step takes the clips
[start, start + batch_size * ranks), of which this rank gets its share. A loader may leave out samples that fail, and
offer as ``quarantine`` which they are (``engine/quarantine.py``). Its processes must ignore SIGTERM, SIGINT and
SIGUSR1: launchers signal whole sessions, and the run needs them until its last step is saved.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cogvideox import dist, environment
from cogvideox.config import TrainConfig
from cogvideox.dist import RandomStreams
from cogvideox.engine import checkpoint
from cogvideox.engine.checkpoint_folders import KeepRule
from cogvideox.engine.ema import EMA, numel
from cogvideox.engine.events import Events
from cogvideox.engine.external_parameters import register_external_parameters
from cogvideox.engine.global_batch import clips_per_step, with_accumulation
from cogvideox.engine.instruments import Instruments, Work
from cogvideox.engine.logging import Means, RunLog, forget, get_logger, truncate
from cogvideox.engine.looks import Looks, Preview, Validate
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
from cogvideox.engine.quarantine import SharedQuarantine
from cogvideox.engine.resources import Resources
from cogvideox.engine.skipped import SkippedSteps
from cogvideox.engine.stop import Abandoned, StopSignal
from cogvideox.engine.summary import write_summary
from cogvideox.engine.trackers import check_trackers
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
        validate: Validate | None = None,
        preview: Preview | None = None,
        facts: Callable[[], dict[str, Any]] = dict,
        work: Work | None = None,
        resources: Resources | None = None,
        decay_norms_and_biases: bool = False,
        accepted: Sequence[str] = (),
    ):
        """validate(module) -> metrics and preview(module, step) -> JSON values are called on every rank, in evaluation
        mode, with the averaged weights where there are any: every ``validate_every`` and ``preview_every`` steps, and
        at the end; both also before the first step. ``metrics`` in what preview returns are logged, a line of their
        own. validate may have ``state()`` -> JSON values, kept in checkpoints, and ``load(state)``, called where one is
        resumed. One that has an attribute ``pulse`` is given the trainer's (``stop.Pulse``).

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
        self.facts, self.accepted, self.logger = facts, list(accepted), get_logger()
        self.events = Events(self.run_dir)
        self.quarantine = SharedQuarantine(loader, self.run_dir, self.events)
        self.watchdog = Watchdog(60.0 * config.timeout_minutes, self.events)
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
        # The watchdog has seen a hung rank by then, and has named it.
        dist.set_timeout(2.0 * config.timeout_minutes + 1.0)
        stage = self.engine.zero_optimization_stage()
        if stage == 3:
            register_external_parameters(module)
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
        self.step = self.samples_seen = 0
        self.skipped = SkippedSteps(self.engine, config, seed, self.events)
        self.resumed: dict[str, Any] | None = None
        self.grad_norm: Tensor | float = 0.0
        self.means = Means()
        self.instruments = Instruments(self.engine, optimizer, config, self.run_dir, work)
        self.phases, self.resources = self.instruments.phases, resources or Resources(self.engine.device)
        self.looks = Looks(self.engine.module, self.ema, config, validate, preview, self.resources)
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
        config, looks = self.config, self.looks
        self._forget_what_is_made_again()
        start = -1 if self.resumed is None else self.step
        log = RunLog(self.run_dir, steps=config.steps, start=start, trackers=config.trackers)
        self._say_started()
        self.resources.begin("train")
        with StopSignal() as stop:
            looks.hear(stop, lambda: self.watchdog.at(self.step, "evaluation"))
            batches = self.loader.iterate(self.samples_seen)
            try:
                stopping = self._make_up(log, stop.agreed())
                while self.step < config.steps and not stopping:
                    is_logged = (self.step + 1) % config.log_every == 0 or self.step + 1 == config.steps
                    with self.instruments.step(self.step + 1, is_logged):
                        self._train_step(batches)
                    self.step += 1
                    self.samples_seen += clips_per_step(config, dist.world_size())
                    log.advance()
                    stopping = stop.agreed()
                    last = self.step == config.steps
                    record = self._measured() if is_logged else {}
                    stopping = self._write(log, record, looks.is_evaluated(self.step, last), stopping)
                    is_saved = self.step % config.save_every == 0 or last or stopping
                    if is_saved:
                        self._save(log)
                    # After the save: a kill during a long rendering costs no training step.
                    if not stopping and looks.is_previewed(self.step, last, is_saved):
                        stopping = self._preview(log, is_saved)
                        if stopping and not is_saved:
                            self._save(log)
                self.watchdog.rest(self.step, "end")
            finally:
                batches.close()  # ends its worker processes
                self.instruments.close()
                log.close(60.0 if self.step >= config.steps else 10.0)
        self.resources.begin("report")
        write_summary(self)
        return self._ended(stop)

    def _train_step(self, batches: Iterator[Any]) -> None:
        """One optimizer step over ``gradient_accumulation_steps`` batches. Nothing here waits for the device."""
        config, engine = self.config, self.engine
        self._set_learning_rate(
            learning_rate_factor(
                self.step,
                steps=config.steps,
                schedule=config.lr_schedule,
                warmup_steps=config.warmup_steps,
                min_ratio=config.min_lr_ratio,
            )
        )
        self.quarantine.begin(self.step + 1)
        taken: list[tuple[Any, Tensor]] = []
        for micro_step in range(config.gradient_accumulation_steps):
            with self._phase("data"):
                host_batch = next(batches)
                batch = dist.to_device(host_batch, engine.device)
            rng = RandomStreams.at(
                self.seed, self.step, micro_step, dist.rank(), dist.world_size(), engine.device
            )
            rng.seed_global()
            with self._phase("forward"):
                loss, metrics = engine(batch, rng)
            with self._phase("backward"):
                engine.backward(poisoned_if_not_finite(loss))
            taken.append((host_batch, loss.detach()))
            self.means.add(
                {"train/loss": loss, **{f"train/{name}": value for name, value in metrics.items()}}
            )
            with self._phase("optimizer"):
                if self.checks_gradients and engine.is_gradient_accumulation_boundary():
                    self.grad_norm = clip_or_drop_gradients(engine.module, config.gradient_clipping)
                engine.step()
        if self.checks_gradients:
            was_applied = bool(torch.isfinite(self.grad_norm))
        else:
            # DeepSpeed made its decision from the norm over all ranks: it is the same on each.
            was_applied, self.grad_norm = engine.was_step_applied(), engine.get_global_grad_norm()
        if was_applied:
            self.skipped.in_a_row = 0
            if self.ema is not None:
                with self._phase("optimizer"):
                    self.ema.update()
        else:
            self.watchdog.at(self.step + 1, "search for what is not finite")
            self.skipped.count(self.step, taken)
        self.watchdog.at(self.step + 1, "end of the step")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A part of the step: timed, and where the watchdog looks for this rank."""
        self.watchdog.at(self.step + 1, name)
        with self.phases(name):
            yield

    def _set_learning_rate(self, factor: float) -> None:
        # Loading a checkpoint replaces the groups: they are looked up each time.
        set_learning_rates(self.optimizer, [base * factor for base in self.base_learning_rates])

    def _measured(self) -> dict[str, float | None]:
        """What is logged of training since the last time: here the device is waited for."""
        self.quarantine.share()
        gradient_norm = float(self.grad_norm)
        return {
            **self.means.flush(),
            "train/grad_norm": gradient_norm,
            "train/lr": learning_rates(self.optimizer)[0],
            "train/skipped_steps": float(self.skipped.steps),
            "train/samples": float(self.samples_seen),
            **self.instruments.read(gradient_norm),
            **self.resources.metrics(),
        }

    # ----------------------------------------------------------------------------------------------------------- looks

    def _make_up(self, log: RunLog, stopping: bool) -> bool:
        """What comes before the next step: the base model's validation and preview, or those that the last start, which
        was stopped or killed, did not finish. True where a signal asks to stop."""
        if self.resumed is None:
            stopping = self._write(log, {}, self.looks.is_evaluated(0, last=False), stopping)
        elif self.looks.unfinished is not None:
            stopping = self._write(log, self.looks.unfinished, True, stopping)
            log.sync()
            self.checkpoints.note(self.step, self.looks.state(self.step))
        if not stopping and self.looks.is_preview_missing(self.step):
            stopping = self._preview(log, self._has_own_checkpoint())
        return stopping

    def _write(self, log: RunLog, record: dict[str, float | None], evaluates: bool, stopping: bool) -> bool:
        """The step's line. A stop does not wait for a validation: the next start writes the line again, with it."""
        evaluated = None
        if evaluates and not stopping:
            stopping, evaluated = self._unless_stopped("validation", self.looks.evaluate)
        self.looks.unfinished = record if evaluates and evaluated is None else None
        if record or evaluated:
            log.write(self.step, record | (evaluated or {}))
        return stopping

    def _preview(self, log: RunLog, is_saved: bool) -> bool:
        """Render, and log what was measured; True where a signal asks to stop."""
        stopping, rendered = self._unless_stopped("preview", self.looks.render)
        if rendered and rendered.get("metrics"):
            log.write(self.step, rendered["metrics"])
            log.sync()  # before the checkpoint says that it is there
        if rendered and is_saved:
            self.checkpoints.note(self.step, {provenance.KEY: self._record()})
        return stopping

    def _unless_stopped(self, name: str, look: Callable[[int], Any]) -> tuple[bool, Any]:
        """(whether a signal ended it before its time, on every rank alike; what ``look`` returned)."""
        self.watchdog.at(self.step, name)
        try:
            return False, look(self.step)
        except Abandoned:
            self.logger.info(f"a signal ends the {name} of step {self.step} before its time")
            return True, None

    def _forget_what_is_made_again(self) -> None:
        """Lines of ``metrics.jsonl`` of the step from which this start goes on, before the log is opened."""
        path = self.run_dir / "metrics.jsonl"
        if dist.is_main() and self.looks.unfinished is not None:
            truncate(path, self.step - 1)
        elif dist.is_main() and self.looks.is_preview_missing(self.step):
            forget(path, self.step, "preview/")

    def _has_own_checkpoint(self) -> bool:
        """Whether the run stands at a checkpoint in its own folder: not at step 0, and not at another run's."""
        directory = self.checkpoints.directory
        return self.start_from is not None and self.start_from.parent.resolve() == directory.resolve()

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def _save(self, log: RunLog) -> None:
        log.sync()
        self.quarantine.share()
        with self.watchdog.paused(self.step, "save"), self.resources("save"):
            self.checkpoints.save(
                self.step,
                {
                    "samples_seen": self.samples_seen,
                    "global_batch_size": clips_per_step(self.config, dist.world_size()),
                    "skipped_steps": self.skipped.steps,
                    "skipped_in_a_row": self.skipped.in_a_row,
                    "quarantine": self.quarantine.state(),
                    **self.looks.state(self.step),
                    # A save between two logging steps: what was measured so far counts in the next line.
                    "means": dist.gather(self.means.state()),
                    "resources": self.resources.state(),
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
            preview=self.looks.previewed,
            **facts,
        )

    def _resume(self, folder: Path) -> None:
        hyperparameters = [dict(group) for group in self.optimizer.param_groups]
        state = self.checkpoints.load(folder)
        for group, mine in zip(self.optimizer.param_groups, hyperparameters, strict=True):
            # The checkpoint's come with its groups; run.force may have let others pass.
            group.update({key: mine[key] for key in self.config.optimizer.params.keys() & mine.keys()})
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.skipped.steps, self.skipped.in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self.quarantine.restore(state["quarantine"])
        self.resources.load(state["resources"])
        # Of the ranks that were, each counts once: those of rank 5 go to rank 1 of 4, none to a rank that is new.
        self.means.load(state["means"][dist.rank() :: dist.world_size()], self.engine.device)
        previewed = state.get(provenance.KEY, {}).get("preview")
        self.looks.load(state, previewed, self._has_own_checkpoint())
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
            step=self.step,
            ranks=dist.world_size(),
            steps=self.config.steps,
            versions=environment.versions(),
            command=shlex.join(sys.argv),
        )
        if self.resumed is not None:
            self.events.write("resumed", **self.resumed)
        saved, validated = self.config.save_every, self.config.validate_every
        if self.looks.validate is not None and self.config.keep_best and validated and saved % validated:
            self.logger.info(
                f"train.keep_best chooses among the steps that are validated and saved, every "
                f"{math.lcm(saved, validated)} and the last: train.save_every={saved} is no multiple of "
                f"train.validate_every={validated}"
            )

    def _ended(self, stop: StopSignal) -> RunResult:
        finished = self.step >= self.config.steps and self.looks.unfinished is None
        if finished:
            self.events.write("finished", step=self.step)
        else:
            where = f"after step {self.step}, which is saved" if self.step else "before the first step"
            self.logger.info(f"stopped by {stop.name} {where}; run the same command to go on")
            seconds = None if stop.seconds is None else round(stop.seconds, 2)
            self.events.write("stopped", step=self.step, signal=stop.name, seconds_since_signal=seconds)
        return RunResult(self.step, finished)


def poisoned_if_not_finite(loss: Tensor) -> Tensor:
    """``loss``, with NaN gradients if it is not finite itself (a bad constant term has finite ones).

    So the reduction of the gradients, which happens anyway, tells every rank to skip the step: no flag is exchanged.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
