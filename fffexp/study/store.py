"""Jobs in an Optuna storage, shared by any number of processes: none is done twice, and none is left out."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from fffexp.errors import UserError
from fffexp.files import first_line, store_lock

# heartbeats, their retries and constraints are used knowingly, and pinned
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
# lists are written as JSON, as all values are, and come back as they were
warnings.filterwarnings("ignore", "Choices for a categorical distribution should be a tuple", UserWarning)

# a worker that has not been heard of for this long is taken for dead
HEARTBEAT_S = 5
GRACE_S = 20


class Storage(optuna.storages.RDBStorage):
    """Optuna's, with states that change one at a time: SQLite would hand a waiting trial to two workers."""

    _threads = threading.RLock()
    _held = False

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other process changes the state of a trial in this block."""
        with self._threads, nullcontext() if self._held else store_lock(self.url):
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
    # its job needs no other: it has a result, or failed for a reason of its own
    return trial.state.is_finished() and (trial.state != TrialState.FAIL or "error" in trial.user_attrs)


def attempts(trial: FrozenTrial) -> int:
    """How often its job was started."""
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback
    return len(retry.retry_history(trial)) + (trial.state != TrialState.WAITING)


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
                    optuna.storages.RetryHeartbeatStaleTrialCallback()(self.study, trial)

    def run_one(self, objective: Callable[[optuna.Trial], Any], errors: tuple[type[Exception], ...] = ()) -> bool:
        """Do a job that waits, if there is one; whether there was.

        What the objective raises makes the trial fail: an error of `errors` finishes it, any other is raised here.
        """
        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return False
        raised: Exception | None = None

        def checked(trial: optuna.Trial) -> Any:
            nonlocal raised
            if "job" not in trial.user_attrs:
                raise Surplus
            try:
                return objective(trial)
            except errors as error:
                trial.set_user_attr("error", str(error))
                raise
            except SystemExit as stop:  # of SIGTERM, which Optuna would let pass with the trial still running
                raise KeyboardInterrupt from stop
            except Exception as error:
                raised = error
                raise

        try:
            # the collection frees a trainer and its data, which refer to each other
            self.study.optimize(checked, n_trials=1, catch=(Surplus, *errors), gc_after_trial=True)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError, AssertionError) as error:
            # a trial that was given up in the meantime, because this machine slept, say, cannot end a second time;
            # Optuna then says so by any of these
            if error is raised and not isinstance(error, optuna.exceptions.UpdateFinishedTrialError):
                raise
        return True

    def finished(self) -> dict[str, FrozenTrial]:
        """The trials of the jobs that are."""
        trials = self.trials()
        return {key: trials[key] for key in self.jobs() if key in trials and _finished(trials[key])}

    def all_finished(self) -> bool:
        """Whether every job is."""
        return len(self.finished()) == len(self.jobs())
