"""Jobs on a real SQLite storage."""

import itertools
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import requests
from optuna.trial import TrialState

from fffexp.errors import UserError
from fffexp.study import store
from fffexp.study.store import Job, Queue, Storage

JOBS: dict[str, Job] = {"a": ({"x": 0.5}, {"number": 0}), "b": ({}, {"number": 1}), "c": ({}, {"number": 2})}
names = itertools.count()


class Oops(Exception):
    pass


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder}/optuna.db"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return store.open_storage(url_in(tmp_path_factory.mktemp("store")))


def make(storage: Storage, jobs: Mapping[str, Job] = JOBS) -> Queue:
    sampler = optuna.samplers.RandomSampler(seed=0)
    name = f"s{next(names)}"
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize", sampler=sampler)
    return Queue(storage, study, lambda: jobs)


@pytest.fixture
def queue(storage: Storage) -> Queue:
    return make(storage)


def waiting(queue: Queue) -> list[str]:
    queue.fill()
    return sorted(t.user_attrs["job"] for t in queue.study.get_trials(states=(TrialState.WAITING,)))


def draw(trial: optuna.Trial) -> float:
    return trial.suggest_float("x", 0, 1)


def raising(error: BaseException) -> Callable[[optuna.Trial], float]:
    def objective(trial: optuna.Trial) -> float:
        draw(trial)
        raise error

    return objective


def test_every_job_is_done_once(queue: Queue) -> None:
    assert not queue.run_one(draw)
    assert waiting(queue) == waiting(queue) == ["a", "b", "c"]
    done = []
    while queue.run_one(lambda trial: done.append(trial.user_attrs["job"]) or draw(trial)):  # type: ignore[func-returns-value] # None
        assert queue.all_finished() is (len(done) == 3)
    assert done == ["a", "b", "c"]
    assert waiting(queue) == []
    assert queue.finished()["a"].params == {"x": 0.5}, "the value that was given"
    assert all(store.attempts(trial) == 1 for trial in queue.finished().values())


def test_jobs_may_be_added(storage: Storage) -> None:
    jobs = dict(JOBS)
    queue = make(storage, jobs)
    assert waiting(queue) == ["a", "b", "c"]
    while queue.run_one(draw):
        pass
    jobs["d"] = ({}, {})
    assert not queue.all_finished()
    assert waiting(queue) == ["d"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_job_keeps_what_it_had(stop: BaseException, queue: Queue) -> None:
    queue.fill()
    queue.run_one(draw)
    before = {}

    def objective(trial: optuna.Trial) -> float:
        before["x"] = draw(trial)
        trial.set_user_attr("run/0", {"seed": 0})
        raise stop

    with pytest.raises(KeyboardInterrupt):
        queue.run_one(objective)
    assert "b" not in queue.finished()
    assert waiting(queue) == waiting(queue) == ["b", "c"]
    stored = []
    while queue.run_one(lambda trial: stored.append(dict(trial.user_attrs)) or draw(trial)):  # type: ignore[func-returns-value] # None
        pass
    (again,) = (attrs for attrs in stored if attrs["job"] == "b")
    assert again["run/0"] == {"seed": 0}
    assert queue.finished()["b"].params == before
    assert store.attempts(queue.finished()["b"]) == 2


def test_an_error_of_its_own_finishes_a_job(queue: Queue) -> None:
    queue.fill()
    assert queue.run_one(raising(Oops("the loss is nan")), (Oops,))
    assert waiting(queue) == ["b", "c"]
    assert queue.finished()["a"].user_attrs["error"] == "the loss is nan"


@pytest.mark.parametrize("error", [Oops("oh"), ValueError("own"), AssertionError("no"), MemoryError("full")], ids=repr)
def test_any_other_error_is_tried_three_times(
    error: Exception, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = make(storage, {"a": JOBS["a"]})
    text = f"{type(error).__name__}: {error}"
    for attempt in (1, 2, 3):
        assert waiting(queue) == ["a"]
        assert queue.run_one(raising(error))
        assert capsys.readouterr().err == f"fffexp: trial 0, error {attempt} of 3: {text}\n"
    assert waiting(queue) == []
    trial = queue.finished()["a"]
    assert (store.error_of(trial), trial.user_attrs["errors"], store.attempts(trial)) == (text, [text] * 3, 3)


def test_an_objective_that_is_no_number_is_tried_three_times(storage: Storage) -> None:
    queue = make(storage, {"a": JOBS["a"]})
    for value in (float("nan"), (1.0, 2.0), "text"):
        assert waiting(queue) == ["a"]
        assert queue.run_one(lambda trial, value=value: value)  # type: ignore[misc] # a default of a lambda
    assert waiting(queue) == []
    assert "text" in str(store.error_of(queue.finished()["a"]))


def test_interruptions_are_not_counted(storage: Storage) -> None:
    queue = make(storage, {"a": JOBS["a"]})
    for _ in range(store.MAX_VANISHED + 1):
        queue.fill()
        with pytest.raises(KeyboardInterrupt):
            queue.run_one(raising(KeyboardInterrupt()))
    assert waiting(queue) == ["a"]


def test_a_store_that_does_not_answer_is_no_fault_of_a_job(storage: Storage) -> None:
    queue = make(storage, {"a": JOBS["a"]})
    for _ in range(store.MAX_VANISHED + 1):
        queue.fill()
        with pytest.raises(requests.ConnectionError):
            queue.run_one(raising(requests.ConnectionError("refused")))
    assert waiting(queue) == ["a"]


def test_a_job_with_which_workers_vanish_is_given_up(storage: Storage) -> None:
    queue = make(storage, {"a": JOBS["a"]})
    for _ in range(store.MAX_VANISHED):
        assert waiting(queue) == ["a"]
        process = multiprocessing.get_context("fork").Process(target=queue.run_one, args=(die,))
        process.start()
        process.join()
        queue.give_up(process.pid or 0)
    assert waiting(queue) == []
    error = store.error_of(queue.finished()["a"])
    assert re.fullmatch(r"8 workers vanished with it, the last of which had needed up to \d+ MiB", str(error))


def die(trial: optuna.Trial) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_pruned_job_is_finished(queue: Queue) -> None:
    queue.fill()
    assert queue.run_one(raising(optuna.TrialPruned()))
    assert waiting(queue) == ["b", "c"]


def test_a_trial_that_nobody_asked_for_does_not_count(storage: Storage) -> None:
    queue = make(storage, {"a": JOBS["a"]})
    queue.fill()
    # what Optuna makes where another worker took the job between the look and the claim has no job
    queue.study.enqueue_trial({})
    assert queue.run_one(draw)
    assert queue.run_one(draw)
    assert set(queue.finished()) == {"a"}
    assert Counter(t.state for t in queue.study.trials) == {TrialState.COMPLETE: 1, TrialState.FAIL: 1}


def test_a_job_given_up_meanwhile_cannot_end_twice(queue: Queue) -> None:
    queue.fill()

    def asleep(trial: optuna.Trial) -> float:
        queue.study.tell(trial.number, state=TrialState.FAIL)  # as another worker does, when the heart has stopped
        return 0.5

    assert queue.run_one(asleep)
    assert waiting(queue) == ["a", "b", "c"]

    def late(trial: optuna.Trial) -> float:
        queue.study.tell(trial.number, state=TrialState.FAIL)
        trial.set_user_attr("run/0", {})
        return 0.5

    assert queue.run_one(late)
    assert waiting(queue) == ["a", "b", "c"]


def slow(trial: optuna.Trial) -> float:
    x = draw(trial)
    time.sleep(random.random() * 0.3)
    return x


def work(url: str, name: str, keys: list[str], heartbeat_s: int) -> None:
    queue = open_queue(url, name, keys, heartbeat_s)
    random.seed(os.getpid())
    while not queue.all_finished():
        if not queue.run_one(slow):
            queue.fill()
            time.sleep(0.1)


def open_queue(url: str, name: str, keys: list[str], heartbeat_s: int = 60) -> Queue:
    engine = {"connect_args": {"timeout": 60}}
    storage = Storage(url, engine_kwargs=engine, heartbeat_interval=heartbeat_s, grace_period=heartbeat_s)
    jobs: dict[str, Job] = {key: ({}, {}) for key in keys}
    return Queue(storage, optuna.load_study(study_name=name, storage=storage), lambda: jobs)


def start(url: str, name: str, keys: list[str], heartbeat_s: int) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=work, args=(url, name, keys, heartbeat_s))
    process.start()
    return process


def assert_each_done_once(queue: Queue) -> None:
    completed = [t for t in queue.study.trials if t.state == TrialState.COMPLETE]
    assert Counter(t.user_attrs["job"] for t in completed) == Counter(dict.fromkeys(queue.jobs(), 1))
    assert not [t for t in queue.study.trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]


@pytest.mark.slow
def test_processes_that_work_at_once(tmp_path: Path) -> None:
    url, keys = url_in(tmp_path), [str(i) for i in range(30)]
    optuna.create_study(storage=store.open_storage(url), study_name="s")
    workers = [start(url, "s", keys, 60) for _ in range(3)]
    for process in workers:
        process.join(90)
        assert process.exitcode == 0
    queue = open_queue(url, "s", keys)
    assert_each_done_once(queue)
    assert {store.attempts(t) for t in queue.finished().values()} == {1}, "started once as well"


@pytest.mark.slow
def test_workers_that_are_killed_at_any_moment(tmp_path: Path) -> None:
    url, keys = url_in(tmp_path), [str(i) for i in range(60)]
    optuna.create_study(storage=store.open_storage(url), study_name="s")
    workers = [start(url, "s", keys, 1) for _ in range(3)]
    random.seed(0)
    queue = open_queue(url, "s", keys, 1)
    for _ in range(8):
        time.sleep(1 + random.random())
        victim = workers.pop(0)
        if victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
            workers.append(start(url, "s", keys, 1))
    for process in workers:
        process.join(120)
        assert process.exitcode == 0
    completed = Counter(t.user_attrs.get("job") for t in queue.study.trials if t.state == TrialState.COMPLETE)
    assert completed == Counter(dict.fromkeys(keys, 1))


def test_the_job_of_a_dead_worker_is_put_back(tmp_path: Path) -> None:
    url = url_in(tmp_path)
    optuna.create_study(storage=store.open_storage(url), study_name="s")
    queue = open_queue(url, "s", ["a"], 1)
    queue.fill()
    (trial,) = queue.study.trials
    # as a worker does that is killed before its first heartbeat
    assert queue.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    assert not queue.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING), "nobody else can take it"
    assert waiting(queue) == [], "it was heard of a moment ago"
    time.sleep(2.5)
    assert waiting(queue) == ["a"]
    assert [t.state for t in queue.study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_a_storage_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (f"sqlite:///{tmp_path}/file/optuna.db", "nonesuch://x", "postgresql+psycopg://u:p@127.0.0.1:9/x"):
        with pytest.raises(UserError, match=r"cannot be|not known|needs a driver") as error:
            store.open_storage(bad)
        assert "\n" not in str(error.value)
        assert bad in str(error.value) or "u:p" in bad
