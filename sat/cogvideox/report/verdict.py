"""A run in one sentence: is the model better than before training, by how much, how sure, and what went wrong."""

from __future__ import annotations

from dataclasses import dataclass

from cogvideox.report.run_folder import RunFolder
from cogvideox.report.series import at_same_steps, last, series

# Of a difference to its standard error: beyond it by chance in 5 of 100 cases (two-sided, normal).
BEYOND_CHANCE = 1.96

BETTER, WORSE, EVEN, UNKNOWN = "better", "worse", "even", "unknown"


@dataclass(frozen=True)
class Verdict:
    kind: str
    # BETTER, WORSE, EVEN (within the error) or UNKNOWN.
    sentence: str


def verdict(run: RunFolder) -> Verdict:
    kind, result = _against_step_0(run)
    return Verdict(kind, f"{result} {_state(run)}, {_losses_on_the_way(run)}.")


def judged(difference: float, error: float | None) -> str:
    """A loss that changed by ``difference``, as one of the kinds. Without an error it is not known."""
    if error is None:
        return UNKNOWN
    if abs(difference) <= BEYOND_CHANCE * error:
        return EVEN
    return BETTER if difference < 0 else WORSE


def _against_step_0(run: RunFolder) -> tuple[str, str]:
    delta = at_same_steps(run.records, ["val/delta", "val/delta_se"])
    later = [i for i, step in enumerate(delta["step"]) if step > 0]
    if later:
        step, difference, error = (float(delta[k][later[-1]]) for k in ("step", "val/delta", "val/delta_se"))
        kind = judged(difference, error)
        size = f"{abs(difference):.4f} ± {error:.4f}"
        sentence = {
            BETTER: f"Better than before training: at step {step:.0f} the held-out loss is lower by {size}",
            WORSE: f"Worse than before training: at step {step:.0f} the held-out loss is higher by {size}",
            EVEN: f"No difference from before training beyond its error: at step {step:.0f} the held-out loss is "
            f"{'lower' if difference < 0 else 'higher'} by {size}",
        }[kind]
        return kind, sentence + _gap(run) + "."
    held_out = series(run.records, "val/loss")
    if len(held_out):
        (step, loss), (first, then) = held_out[-1], held_out[0]
        before = f" ({then:.4f} at step {first:.0f})" if first < step else ""
        sentence = (
            f"The held-out loss is {loss:.4f} at step {step:.0f}{before}, with no error known of a difference"
        )
        return UNKNOWN, sentence + _gap(run) + "."
    return UNKNOWN, (
        "Whether the model gets better is not known: the run has no held-out clips (data.validation_path, "
        "train.validate_every)."
    )


def _gap(run: RunFolder) -> str:
    gap = last(run.records, "val/gap")
    return "" if gap is None else f"; the gap to training clips is {gap:+.4f}"


def _state(run: RunFolder) -> str:
    """How far it is, and how its last life ended."""
    done = f"{run.step} of {run.steps} steps" if run.steps else f"{run.step} steps"
    last_event = next((e["kind"] for e in reversed(run.events) if e.get("kind") in _ENDS), None)
    how = {"failed": " and then failed", "stopped": " and was stopped", "stalled": " and then stalled"}
    is_done = run.steps is not None and run.step >= run.steps
    return f"It did {done}" + ("" if is_done else how.get(last_event, ""))


_ENDS = ("started", "resumed", "stalled", "stopped", "failed", "finished")


def _losses_on_the_way(run: RunFolder) -> str:
    skipped, clips = run.skipped_steps, skipped_clips(run)
    return f"skipped {skipped} of them, and put {clips} clip{'s' * (clips != 1)} aside"


def skipped_clips(run: RunFolder) -> int:
    return len(run.quarantine) or int(run.summary.get("skipped_clips") or 0)
