"""Optuna studies with a fixed list of trials to do, shared by any number of processes.

Every piece of work is a slot. A slot is enqueued as a waiting trial, taken by a worker, and enqueued again if
that worker is interrupted or dies; so nothing is done twice and nothing is left out.
"""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from fffexp.errors import UserError
from fffexp.stores import first_line, store_lock

# a worker that has not been heard of for this long is taken for dead
HEARTBEAT_S = 5
GRACE_S = 20

DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def open_storage(url: str) -> RDBStorage:
    """The storage of studies.

    Raises:
        UserError: it cannot be reached.
    """
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        with store_lock(url):
            return RDBStorage(url, engine_kwargs=engine, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S)
    except UserError:
        raise
    except Exception as error:  # every database and driver has errors of its own
        raise UserError(
            f"the storage {url} cannot be used ({first_line(error)}): start it, or give another by --storage"
        ) from error


def finished(trial: FrozenTrial) -> bool:
    """Whether the slot of this trial needs no other: it has a result, or failed for a reason of its own."""
    return trial.state in DONE or (trial.state == TrialState.FAIL and "error" in trial.user_attrs)


def current(study: optuna.Study) -> dict[int, FrozenTrial]:
    """For each slot the trial that stands for it: a finished one, else the newest."""
    slots: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        slot = trial.user_attrs.get("slot")
        if slot is not None and not (slot in slots and finished(slots[slot])):
            slots[slot] = trial
    return slots


def fill(study: optuna.Study, url: str, work: Mapping[int, dict[str, Any]]) -> None:
    """Enqueue every slot of the work that is neither finished, running nor waiting."""
    with store_lock(url):
        for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "taken" not in running.user_attrs:  # its worker died within `take`, before the first heartbeat
                study.tell(running.number, state=TrialState.FAIL)
        optuna.storages.fail_stale_trials(study)
        slots = current(study)
        for slot, params in work.items():
            trial = slots.get(slot)
            if trial is None:
                study.enqueue_trial(params, user_attrs={"slot": slot})
            elif trial.state == TrialState.FAIL and not finished(trial):
                # with what the interrupted trial had drawn, so that an interruption does not change the search
                study.enqueue_trial({**params, **trial.params}, user_attrs={"slot": slot})


def take(study: optuna.Study, url: str) -> optuna.Trial | None:
    """A trial to work on, or None if none waits; its first heartbeat is written before anybody else can look."""
    # SQLite would hand the same waiting trial to two workers
    with store_lock(url):
        if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return None
        trial = study.ask()
        study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined] # open_storage has heartbeats
        trial.set_user_attr("taken", True)
        return trial


def all_finished(study: optuna.Study, work: Mapping[int, dict[str, Any]]) -> bool:
    """Whether every slot of the work is."""
    slots = current(study)
    return all(slot in slots and finished(slots[slot]) for slot in work)
