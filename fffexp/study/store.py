"""Jobs in an Optuna storage, shared by any number of processes: none is done twice, and none is left out."""

import copy
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from fffexp.environment import machine, peak_memory_mb
from fffexp.errors import UserError, report
from fffexp.files import first_line, store_lock
from fffexp.outages import PATIENCE_S, hurry, is_outage, last_outage_s, patiently

# heartbeats, their retries and constraints are used knowingly, and pinned
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
# lists are written as JSON, as all values are, and come back as they were
warnings.filterwarnings("ignore", "Choices for a categorical distribution should be a tuple", UserWarning)

# a worker that has not been heard of for this long is taken for dead
HEARTBEAT_S = 5
GRACE_S = 20
# a job is given up after so many errors that a worker reports, and after so many workers that vanish with it
MAX_ERRORS, MAX_VANISHED = 3, 8


class Storage(optuna.storages.RDBStorage):
    """Optuna's, with states that change one at a time: SQLite would hand a waiting trial to two workers."""

    _threads = threading.RLock()
    _held = False

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other process changes the state of a trial in this block."""
        with self._threads, nullcontext() if self._held else store_lock(self.url, PATIENCE_S):
            before, self._held = self._held, True
            try:
                yield
            finally:
                self._held = before

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """As Optuna's; a trial that is begun has a heartbeat before anybody can see it running."""
        with self.exclusive():
            if state == TrialState.RUNNING and self.get_trial(trial_id).state == TrialState.WAITING:
                self.record_heartbeat(trial_id)
            return super().set_trial_state_values(trial_id, state, values)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        # after an outage not before those that live have been heard of again
        return super()._get_stale_trial_ids(study_id) if last_outage_s() > GRACE_S else []

    def record_heartbeat(self, trial_id: int) -> None:
        """As Optuna's, with what a worker has needed: the kernel may kill it for that."""
        super().record_heartbeat(trial_id)
        if (peak := peak_memory_mb()) is not None:
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # this machine slept, and another took the trial
                self.set_trial_user_attr(trial_id, "peak_memory_mb", peak)


# all that is asked of it, by Optuna's cache too
_CACHED = ("_create_new_trial", "_get_trials", "_set_trial_param", "_get_stale_trial_ids", "record_heartbeat")
for _name in (*BaseStorage.__abstractmethods__, *_CACHED):
    setattr(Storage, _name, patiently(getattr(Storage, _name)))


def open_storage(url: str) -> Storage:
    """The storage of studies, UserError if out of reach; Optuna logs nothing but errors from then on."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    with store_lock(url):
        try:
            return Storage(url, engine_kwargs=engine, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S)
        except Exception as error:  # every database and driver has errors of its own
            raise UserError(
                f"the storage {url} cannot be used ({first_line(error)}): start it, or give another by --storage"
            ) from error


def studies(storage: Storage) -> dict[str, optuna.Study]:
    """All Optuna studies by their names."""
    return {n: optuna.load_study(study_name=n, storage=storage) for n in optuna.get_all_study_names(storage)}


def find(name: str, url: str) -> tuple[Storage, dict[str, optuna.Study]]:
    """The storage, and the Optuna studies of a study by their names; UserError if there is no such study."""
    storage = open_storage(url)
    found = studies(storage)
    if f"{name}/runs" not in found:
        known = ", ".join(each.removesuffix("/runs") for each in found if each.endswith("/runs"))
        raise UserError(f"no study {name!r} in {url}; there are: {known or 'none'}")
    return storage, {part: study for part, study in found.items() if part.startswith(f"{name}/")}


def running(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that a worker seems to work on."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


@patiently
def free(storage: Storage, study: optuna.Study) -> int:
    """Fail the trials of workers that are gone; how many there were."""
    with storage.exclusive():
        before = len(running(study))
        optuna.storages.fail_stale_trials(study)
        for trial in running(study):
            begun = trial.datetime_start
            if "job" not in trial.user_attrs and begun and time.time() - begun.timestamp() > GRACE_S:
                study.tell(trial.number, state=TrialState.FAIL)
        return before - len(running(study))


Job = tuple[dict[str, Any], dict[str, Any]]  # values that are given to a trial, and its user attributes


class Surplus(Exception):  # no error
    """A trial that Optuna made because nothing waited any more."""


def _finished(trial: FrozenTrial) -> bool:
    # its job needs no other: it has a result, or failed for good
    return trial.state.is_finished() and (trial.state != TrialState.FAIL or error_of(trial) is not None)


def error_of(trial: FrozenTrial) -> str | None:
    """Why the job of a trial is not tried again; None if it has not failed for good."""
    attrs = trial.user_attrs
    if "error" in attrs or trial.state != TrialState.FAIL:
        return attrs.get("error")
    vanished = attempts(trial) - len(attrs.get("errors", ())) - attrs.get("interruptions", 0)
    peak = attrs.get("peak_memory_mb")
    needed = f", the last of which had needed up to {peak:.0f} MiB" if peak else ""
    return f"{vanished} workers vanished with it{needed}" if vanished >= MAX_VANISHED else None


def _checked(values: Any, count: int) -> Any:
    # Optuna would fail the trial without saying why
    each = values if isinstance(values, tuple) else (values,)
    if len(each) != count or not all(isinstance(value, float | int) and not math.isnan(value) for value in each):
        raise ValueError(f"its objectives are {values}, and not {count} numbers")
    return values


def attempts(trial: FrozenTrial) -> int:
    """How often its job was started."""
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback
    return len(retry.retry_history(trial)) + (trial.state != TrialState.WAITING)


def _worker(pid: int) -> str:
    return f"{machine()}/{pid}"


class Queue:
    """The jobs of an Optuna study.

    A job is enqueued as a waiting trial, which one worker gets, and enqueued again if that worker is interrupted or
    dies, with all that the trial had drawn and stored. `jobs`, by their keys, may grow from call to call.
    """

    def __init__(self, storage: Storage, study: optuna.Study, jobs: Callable[[], Mapping[str, Job]]) -> None:
        self.storage, self.study, self.jobs = storage, study, jobs

    def trials(self) -> dict[str, FrozenTrial]:
        """For each job that was ever enqueued the trial that stands for it: a finished one, else the newest."""
        trials: dict[str, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            job = trial.user_attrs.get("job")
            if job is not None and not (job in trials and _finished(trials[job])):
                trials[job] = trial
        return trials

    @patiently
    def fill(self) -> None:
        """Enqueue every job that is neither finished, running nor waiting."""
        with self.storage.exclusive():
            optuna.storages.fail_stale_trials(self.study)
            trials = self.trials()
            for key, (values, attrs) in self.jobs().items():
                trial = trials.get(key)
                if trial is None:
                    self.study.enqueue_trial(values, user_attrs={"job": key, **attrs})
                elif trial.state == TrialState.FAIL and not _finished(trial):
                    # which changes the trial that it is given
                    optuna.storages.RetryHeartbeatStaleTrialCallback()(self.study, copy.deepcopy(trial))

    def run_one(self, objective: Callable[[optuna.Trial], Any], errors: tuple[type[Exception], ...] = ()) -> bool:
        """Do a job that waits, if there is one; whether there was.

        What the objective raises makes the trial fail. An error of `errors` finishes the job; any other is reported,
        and finishes it when it is the third. After Ctrl-C or SIGTERM, raised as KeyboardInterrupt, and where a store
        does not answer, which is raised here, it is tried again.
        """
        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return False
        stop: BaseException | None = None  # or the outage
        begun: int | None = None

        def put_back(trial: optuna.Trial, why: BaseException) -> None:
            nonlocal stop
            stop = why
            with suppress(Exception):  # the storage is away, or has given the trial up
                trial.set_user_attr("interruptions", trial.user_attrs.get("interruptions", 0) + 1)

        def checked(trial: optuna.Trial) -> Any:
            nonlocal begun
            begun, attrs = trial._trial_id, trial.user_attrs
            if "job" not in attrs:
                raise Surplus
            trial.set_user_attr("worker", _worker(os.getpid()))
            try:
                return _checked(objective(trial), len(self.study.directions))
            except errors as error:
                trial.set_user_attr("error", str(error))
                raise
            except (optuna.TrialPruned, optuna.exceptions.UpdateFinishedTrialError):
                raise
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                if isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) == 128 + signal.SIGTERM:
                    hurry()
                    put_back(trial, KeyboardInterrupt())
                    raise KeyboardInterrupt from error  # Optuna would let SystemExit pass, the trial still running
                if is_outage(error):
                    put_back(trial, error)
                    raise
                found = [*attrs.get("errors", ()), f"{type(error).__name__}: {error}"]
                trial.set_user_attr("errors", found)
                if len(found) >= MAX_ERRORS:
                    trial.set_user_attr("error", found[-1])
                report(f"trial {attrs.get('number')}, error {len(found)} of {MAX_ERRORS}: {found[-1]}")
                raise RuntimeError(found[-1]) from error

        try:
            # the collection frees a trainer and its data, which refer to each other
            self.study.optimize(checked, n_trials=1, catch=(Exception,), gc_after_trial=True)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError, AssertionError):
            # a trial that was given up in the meantime, because this machine slept, say, cannot end a second time;
            # Optuna then says so by any of these; what the objective raises is caught
            if begun is None or not self.storage.get_trial(begun).state.is_finished():
                raise
        if stop is not None:
            raise stop
        return True

    @patiently
    def give_up(self, pid: int) -> bool:
        """Fail what a process of this machine did, which has ended without saying so; whether it did anything."""
        with self.storage.exclusive():
            left = [trial for trial in running(self.study) if trial.user_attrs.get("worker") == _worker(pid)]
            for trial in left:
                self.study.tell(trial.number, state=TrialState.FAIL)
        return bool(left)

    def finished(self) -> dict[str, FrozenTrial]:
        """The trials of the jobs that are."""
        trials = self.trials()
        return {key: trials[key] for key in self.jobs() if key in trials and _finished(trials[key])}

    def all_finished(self) -> bool:
        """Whether every job is."""
        return len(self.finished()) == len(self.jobs())
