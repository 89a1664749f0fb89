"""A sweep: one run of `finetune.py` per trial, with values from Optuna, in one folder from which it can be resumed.

Optuna's journal holds the trials and their results; the folder of each trial is a complete run.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from to_finetune.errors import RunError, UsageError, at_least_one
from to_finetune.files import check_place, write_json
from to_finetune.training.arguments import ArgumentsElsewhere, DataArguments, FinetuneArguments, ModelArguments
from to_finetune.training.parser import parse_arguments
from to_finetune.training.prepare import settle
from to_finetune.training.recipe import resolved_config, without_secrets
from to_finetune.training.search import (
    Space,
    as_flags,
    combinations,
    design,
    distribution,
    extremes,
    range_ends,
    search_texts,
)
from to_finetune.training.trial import last_line, record_of, train

EDGE = 0.05  # share of a range: if the best value is this close to an end, a better one may lie beyond it
JOURNAL = "sweep.journal"  # Optuna's, in the sweep's folder
OnLine = Callable[[str, str], None]  # is called with a run's name and a line that it logs
FAILURES = 3  # consecutive failures, other than divergence, that end a sweep


@dataclass(frozen=True)
class Trial:
    """One run of a sweep that has ended.

    Attributes:
        number: from 0; a run on another seed has the number of the trial that it repeats.
        values: what the trial sets, in addition to the flags of all trials.
        status: "done", "diverged" (its loss was not finite), or "failed" (for another reason).
        loss: the objective; None unless it is done.
        first_fifth: the mean training loss of the first fifth of the steps.
        seconds: of training.
        folder: name of the run's folder, in the sweep's.
        error: why it failed or diverged; None if it is done.
    """

    number: int
    values: dict[str, Any]
    status: str
    loss: float | None
    first_fifth: float | None
    seconds: float | None
    folder: str
    error: str | None


@dataclass
class Sweep:
    """The state of a sweep.

    Attributes:
        folder: of the whole sweep.
        flags: of `finetune.py`, shared by all trials.
        args: the settings that these flags stand for.
        objective: "eval_loss", the held-out loss at the end, or without held-out data "train_loss_mean".
        search: the values of each searched key, as written: {"learning_rate": "0.0008..0.08"}.
        planned: number of trials in all.
        trials: the trials that have ended.
        judged: runs of the best trial's values on the judging seeds.
    """

    folder: Path
    flags: list[str]
    args: FinetuneArguments
    objective: str
    search: dict[str, str]
    planned: int
    trials: list[Trial] = field(default_factory=list)
    judged: list[Trial] = field(default_factory=list)

    @property
    def ranking(self) -> list[Trial]:
        """The trials, best first; those without a loss last."""
        return sorted(self.trials, key=lambda t: math.inf if t.loss is None else t.loss)

    @property
    def best(self) -> Trial | None:
        """The trial with the lowest loss."""
        return next((trial for trial in self.ranking if trial.loss is not None), None)

    @property
    def best_flags(self) -> list[str]:
        """The flags of the best trial's run, except for its folder."""
        return [*self.flags, *(as_flags(self.best.values, self.args) if self.best else [])]

    def judgement(self) -> tuple[float | None, float | None]:
        """Return mean and standard deviation of the loss over the judging seeds; None for too few."""
        losses = [trial.loss for trial in self.judged if trial.loss is not None]
        return (
            statistics.mean(losses) if losses else None,
            statistics.stdev(losses) if len(losses) > 1 else None,
        )

    def loss_at(self, factor: float) -> float | None:
        """Return the loss at `factor` times the best learning rate; infinite if that diverges.

        Interpolates between the two nearest trials, linearly in the logarithm of the rate. None if there is no trial
        beyond that rate, or if trials differ in more than the rate.
        """
        if self.best is None or list(self.search) != ["learning_rate"]:
            return None
        rate = self.best.values["learning_rate"] * factor
        points = [
            (trial.values["learning_rate"], math.inf if trial.loss is None else trial.loss)
            for trial in self.trials
            if trial.status != "failed"
        ]
        x0, y0 = max((point for point in points if point[0] <= rate), default=(0.0, 0.0))
        x1, y1 = min((point for point in points if point[0] >= rate), default=(0.0, 0.0))
        if not (x0 and x1):
            return None
        if x0 == x1 or math.inf in (y0, y1):
            return max(y0, y1)
        return y0 + (y1 - y0) * math.log(rate / x0) / math.log(x1 / x0)

    def edges(self) -> dict[str, str | None]:
        """Return each range whose end is near the best value, with an equally wide one around that value to try next.

        None in place of a range that `finetune.py` would refuse.
        """
        found = dict[str, str | None]()
        for key, text in self.search.items():
            ends = range_ends(text)
            if self.best is None or ends is None:
                continue
            value, half = self.best.values[key], math.sqrt(ends[1] / ends[0])
            place = math.log(value / ends[0]) / math.log(ends[1] / ends[0])
            if EDGE < place < 1 - EDGE:
                continue
            around = [value / half, value * half]
            if isinstance(value, int):
                around = [max(1, math.floor(around[0])), math.ceil(around[1])]
            text = "..".join(f"{end:.3g}" for end in around)
            try:
                _check_values({key: distribution(key, text, self.args)}, self.flags, self.args)
                found[key] = text
            except UsageError:
                found[key] = None
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the contents of sweep.json."""
        mean, deviation = self.judgement()
        return {
            "objective": self.objective,
            "search": self.search,
            "planned": self.planned,
            "best": self.best.number if self.best else None,
            "best_flags": without_secrets(self.best_flags),
            "at_an_end_of_its_range": self.edges(),
            "interpolated_loss_at_a_third_of_the_best_rate": _no_infinity(self.loss_at(1 / 3)),
            "interpolated_loss_at_three_times_the_best_rate": _no_infinity(self.loss_at(3)),
            "trials": [asdict(trial) for trial in self.trials],
            "judged": [asdict(trial) for trial in self.judged],
            "judged_mean": mean,
            "judged_standard_deviation": deviation,
        }


def sweep(
    flags: Sequence[str],
    search: Sequence[str] = (),
    trials: int = 12,
    output_dir: str = "runs/sweep",
    seeds: Sequence[int] = (),
    on_line: OnLine = lambda run, line: None,
    on_trial: Callable[[Sweep], None] = lambda sweep: None,
) -> Sweep:
    """Run `finetune.py` once per trial and find the values with the lowest loss; resumes a sweep that was stopped.

    A single range is tried on an even grid; lists alone are tried in random combinations, all of them if `trials`
    allows. Otherwise the first half of the trials is spread over the space, and Optuna's TPE chooses the others.

    Args:
        flags: of `finetune.py`.
        search: ``"learning_rate=1e-3..1e-1"`` (a range, in log scale) or ``"alpha=0,0.1,0.3"`` (a list), for numbers
            among the flags and for options of the optimizer. Default: the learning rate, from a tenth to ten times that
            of `flags`.
        trials: in all; a sweep that is done goes on when this is raised.
        output_dir: the sweep's folder.
        seeds: the best values are trained on each of these.
        on_line: called with a run's name and each line that it logs.
        on_trial: called at the start and whenever a run has ended, with sweep.json up to date.

    Raises:
        UsageError: for values that cannot be searched or run, and for a folder that holds something else.
        RunError: when no trial has a loss, or several in a row failed for another reason than divergence.
        KeyboardInterrupt: on Ctrl-C and SIGTERM, once the run has saved its checkpoint.
    """
    base = _parse(flags)
    args = base[2]
    at_least_one(trials=trials)
    _check_seeds(seeds)
    settle(base[0], args)
    texts = search_texts(search, args)
    space = {key: distribution(key, text, args) for key, text in texts.items()}
    _check_values(space, flags, args)

    check_place("output_dir", Path(output_dir))
    is_new = not Path(output_dir, JOURNAL).exists()
    study = _open(output_dir, {"search": texts, **_settings(base)}, design(space, trials))
    planned = int(min(trials, combinations(space)))
    made = Sweep(Path(output_dir), list(flags), args, _objective(base[1]), texts, planned)
    for frozen in study.get_trials(states=(TrialState.COMPLETE,)):
        made.trials.append(_ended(made, frozen.number, frozen.params, f"trial-{frozen.number:03d}", frozen.value))

    def tell() -> None:
        write_json(made.folder / "sweep.json", made.to_json())
        on_trial(made)

    with _alone(made.folder):
        tell()
        _search(study, space, made, is_new, on_line, tell)
        _judge(made, seeds, on_line, tell)
    return made


def _search(
    study: optuna.Study, space: Space, made: Sweep, is_new: bool, on_line: OnLine, tell: Callable[[], None]
) -> None:
    """Run the trials that are missing; call `tell` after each.

    Raises:
        RunError: when several in a row failed for another reason than divergence, or none has a loss.
    """
    failures = 0
    while len(made.trials) < made.planned:
        number, values = _next(study, space, made)
        try:
            trial = _run(made, number, values, f"trial-{number:03d}", on_line)
        except UsageError:
            if is_new and not made.trials:  # the corrected command would count as another sweep
                shutil.rmtree(made.folder)
            raise
        if trial.status != "failed":  # a failed trial stays open, and the same command retries it
            study.tell(number, math.inf if trial.loss is None else trial.loss)
        made.trials.append(trial)
        tell()
        failures = failures + 1 if trial.status == "failed" else 0
        if failures == FAILURES:
            raise RunError(f"{FAILURES} trials in a row failed, {trial.folder} last: {trial.error}")
    if made.best is None:
        raise RunError(f"None of {made.planned} trials has a loss; {made.trials[0].folder}: {made.trials[0].error}")


def _judge(made: Sweep, seeds: Sequence[int], on_line: OnLine, tell: Callable[[], None]) -> None:
    """Train the best values on each seed; call `tell` after each."""
    best = made.best
    assert best is not None
    for seed in seeds:
        values = {**best.values, "seed": seed}
        if seed == made.args.seed:  # the trials' own seed
            made.judged.append(replace(best, values=values))
        else:
            made.judged.append(_run(made, best.number, values, f"trial-{best.number:03d}-seed-{seed}", on_line))
        tell()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the sweep's lock, or raise if it is running already: both would train in the same folders."""
    lock = FileLock(folder / "sweep.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"output_dir={str(folder)!r} holds a sweep that is running.") from None
    try:
        yield
    finally:
        lock.release()


Arguments = tuple[ModelArguments, DataArguments, FinetuneArguments]


def _parse(flags: Sequence[str]) -> Arguments:
    """Parse the flags as a trial will, but set up no device: this process only watches, and takes no GPU memory."""
    base = parse_arguments(flags, ArgumentsElsewhere)
    if base[2].resume_from_checkpoint is not None:
        raise UsageError("resume_from_checkpoint is not taken here: the same command resumes the sweep.")
    if base[2].push_to_hub:
        raise UsageError("push_to_hub is not taken here: every trial would be. `to-finetune push` takes the best.")
    return base


def _settings(base: Arguments) -> dict[str, Any]:
    """Return the settings that a sweep must still have when it is resumed."""
    config = resolved_config(*base)
    config.pop("output_dir", None)
    return config


def _objective(data: DataArguments) -> str:
    held_out = data.val_set_size or data.eval_dataset_name or data.dataset_test_split
    return "eval_loss" if held_out else "train_loss_mean"


def _check_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UsageError(f"seeds: {seed} is not valid: 0 to {2**32 - 1}.")
        if list(seeds).count(seed) > 1:
            raise UsageError(f"seeds: {seed} is given twice.")


def _check_values(space: Space, flags: Sequence[str], args: FinetuneArguments) -> None:
    """Parse the flags for the ends of each range and the values of each list, so that no trial is refused later.

    Raises:
        UsageError: for the first that is refused.
    """
    for key, d in space.items():
        for value in extremes(d):
            try:
                _parse([*flags, *as_flags({key: value}, args)])
            except UsageError as error:
                raise UsageError(f"search: {key}={value} cannot be run: {error}") from None


def _open(output_dir: str, settings: dict[str, Any], first: Sequence[dict[str, Any]]) -> optuna.Study:
    """Open the study in the folder, or create one that begins with the trials `first`.

    Raises:
        UsageError: when the folder holds another sweep, naming what differs, or something else.
    """
    folder, journal = Path(output_dir), Path(output_dir, JOURNAL)
    if not journal.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"output_dir={output_dir!r} holds something else than a sweep. Choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)
    settings = json.loads(json.dumps(settings))
    before = study.user_attrs.get("settings")
    if before is None:
        for values in first:
            study.enqueue_trial(values, skip_if_exists=True)
        study.set_user_attr("settings", settings)  # last: without it all of this is done again
    elif before != settings:
        differing = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        raise UsageError(
            f"output_dir={output_dir!r} holds another sweep: it had "
            + ", ".join(f"{key}={before.get(key)!r}, now {settings.get(key)!r}" for key in differing)
            + ". Go on with the same settings, or choose a new folder."
        )
    return study


def _next(study: optuna.Study, space: Space, made: Sweep) -> tuple[int, dict[str, Any]]:
    """Return the number and the values of a trial that has begun but not ended, or of a new one."""
    tried = {trial.number for trial in made.trials}
    for frozen in study.get_trials(states=(TrialState.RUNNING,)):
        if frozen.number not in tried and frozen.params.keys() == space.keys():
            return frozen.number, frozen.params
    # Each trial has its own sampler seed, so that it is the same wherever the sweep was stopped.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), n_startup_trials=0)
    trial = study.ask(dict(space))
    return trial.number, trial.params


def _run(made: Sweep, number: int, values: dict[str, Any], name: str, on_line: OnLine) -> Trial:
    """Train in the folder `name`; a run that is done there is only read.

    Raises:
        UsageError: when `finetune.py` refuses its flags.
        KeyboardInterrupt: when this process was told to stop.
    """
    flags = [*made.flags, *as_flags(values, made.args)]
    record = train(made.folder / name, flags, lambda line: on_line(name, line))  # a failed run has results too
    loss = record["results"].get(made.objective) if record.get("status") == "done" else None
    return _ended(made, number, values, name, loss)


def _ended(made: Sweep, number: int, values: dict[str, Any], name: str, loss: float | None) -> Trial:
    """Return a run as a `Trial`, from its record; an infinite `loss` means that it diverged."""
    record = record_of(made.folder / name)
    results = record.get("results", {})
    error = str(record.get("error") or last_line(made.folder / name))
    status = "done"
    if loss is None or loss == math.inf:
        blown_up = error.startswith("RunError") and ("diverged" in error or "not finite" in error)
        status, loss = "diverged" if loss == math.inf or blown_up else "failed", None
    return Trial(
        number=number,
        values=dict(values),
        status=status,
        loss=loss,
        first_fifth=results.get("train_loss_first_fifth"),
        seconds=results.get("train_seconds"),
        folder=name,
        error=None if status == "done" else error,
    )


def _no_infinity(loss: float | None) -> float | str | None:
    return "diverges" if loss == math.inf else loss
