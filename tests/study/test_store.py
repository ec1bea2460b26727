"""Slots of work on a real SQLite storage."""

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from fffexp.errors import UserError
from fffexp.study import store

WORK = {0: {"layer": "FF"}, 1: {"layer": "FFF"}, 2: {"layer": "FF"}}
names = itertools.count()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/optuna.db"


@pytest.fixture(scope="module")
def storage(url: str) -> RDBStorage:
    return store.open_storage(url)


@pytest.fixture
def study(storage: RDBStorage) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(storage=storage, study_name=f"s{next(names)}", direction="maximize", sampler=sampler)


@pytest.fixture
def fill(study: optuna.Study, url: str) -> Callable[[], list[int]]:
    """Fill, and tell the slots that wait."""

    def call() -> list[int]:
        store.fill(study, url, WORK)
        waiting = study.get_trials(states=(TrialState.WAITING,))
        return sorted(t.user_attrs["slot"] for t in waiting)

    return call


def take(study: optuna.Study, url: str) -> tuple[optuna.Trial, str, float]:
    trial = store.take(study, url)
    assert trial is not None
    return trial, trial.suggest_categorical("layer", ["FF", "FFF"]), trial.suggest_float("x", 0, 1)


def test_every_slot_is_handed_out_once(study: optuna.Study, url: str, fill: Callable[[], list[int]]) -> None:
    assert store.take(study, url) is None
    assert fill() == [0, 1, 2]
    assert fill() == [0, 1, 2]
    assert not store.all_finished(study, WORK)
    taken = [take(study, url) for _ in WORK]
    assert {t.user_attrs["slot"]: {"layer": layer} for t, layer, _ in taken} == WORK
    assert store.take(study, url) is None
    assert fill() == [], "all are running"
    for trial, *_ in taken:
        assert not store.all_finished(study, WORK)
        study.tell(trial, 0.5)
    assert store.all_finished(study, WORK)
    assert fill() == []


def test_workers_that_take_at_once_get_different_trials(study: optuna.Study, storage: RDBStorage, url: str) -> None:
    store.fill(study, url, {slot: {} for slot in range(12)})

    def work(_: int) -> list[int]:
        own = optuna.load_study(study_name=study.study_name, storage=storage)
        return [trial.number for trial in iter(lambda: store.take(own, url), None)]

    with ThreadPoolExecutor(4) as pool:
        taken = [number for numbers in pool.map(work, range(4)) for number in numbers]
    assert sorted(taken) == list(range(12))


def test_an_interrupted_slot_is_filled_with_what_it_had_drawn(
    study: optuna.Study, url: str, fill: Callable[[], list[int]]
) -> None:
    fill()
    trial, layer, x = take(study, url)
    slot = trial.user_attrs["slot"]
    study.tell(trial, state=TrialState.FAIL)
    assert not store.finished(study.trials[trial.number])
    for _ in range(2):
        take(study, url)
    assert fill() == [slot]
    assert fill() == [slot]
    again = take(study, url)
    assert again[0].user_attrs["slot"] == slot
    assert again[1:] == (layer, x)


def test_a_slot_interrupted_before_it_drew_is_filled(
    study: optuna.Study, url: str, fill: Callable[[], list[int]]
) -> None:
    fill()
    trial = store.take(study, url)
    assert trial is not None
    study.tell(trial, state=TrialState.FAIL)
    assert fill() == [0, 1, 2]


def test_a_trial_whose_worker_died_while_taking_it_is_filled(
    study: optuna.Study, fill: Callable[[], list[int]]
) -> None:
    fill()
    study.ask()
    assert fill() == [0, 1, 2]


@pytest.mark.parametrize("end", ["complete", "pruned", "error"])
def test_a_finished_slot_is_not(end: str, study: optuna.Study, url: str, fill: Callable[[], list[int]]) -> None:
    fill()
    trial, *_ = take(study, url)
    if end == "complete":
        study.tell(trial, 0.5)
    elif end == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    else:
        trial.set_user_attr("error", "the loss is nan")
        study.tell(trial, state=TrialState.FAIL)
    assert store.finished(study.trials[trial.number])
    assert trial.user_attrs["slot"] not in fill()
    assert len(fill()) == 2


def test_current_is_the_finished_trial_of_a_slot_else_the_newest(
    study: optuna.Study, url: str, fill: Callable[[], list[int]]
) -> None:
    fill()
    first, *_ = take(study, url)
    slot = first.user_attrs["slot"]
    study.tell(first, state=TrialState.FAIL)
    assert store.current(study)[slot].number == first.number
    fill()
    newest = store.current(study)[slot]
    assert newest.number > first.number
    while (second := take(study, url)[0]).user_attrs["slot"] != slot:
        pass
    study.tell(second, 0.5)
    study.enqueue_trial({}, user_attrs={"slot": slot})
    assert store.current(study)[slot].number == second.number
    assert set(store.current(study)) == set(WORK)


def test_trials_without_a_slot_do_not_count(study: optuna.Study, fill: Callable[[], list[int]]) -> None:
    study.enqueue_trial({})
    assert store.current(study) == {}
    assert not store.all_finished(study, WORK)


def test_the_slot_of_a_dead_worker_is_filled(url: str) -> None:
    impatient = RDBStorage(url, heartbeat_interval=1, grace_period=1)
    study = optuna.create_study(storage=impatient, study_name=f"s{next(names)}")
    store.fill(study, url, {0: {}})
    trial = store.take(study, url)
    assert trial is not None
    store.fill(study, url, {0: {}})
    assert store.take(study, url) is None, "its heart beat a moment ago"
    time.sleep(2.5)
    store.fill(study, url, {0: {}})
    assert study.trials[trial.number].state == TrialState.FAIL
    assert store.take(study, url) is not None


def test_a_storage_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (f"sqlite:///{tmp_path}/file/optuna.db", "nonesuch://x", "postgresql+psycopg://u:p@127.0.0.1:9/x"):
        with pytest.raises(UserError, match="cannot be") as error:
            store.open_storage(bad)
        assert "\n" not in str(error.value)
        assert bad in str(error.value) or "u:p" in bad
