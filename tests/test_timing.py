"""Timings: who waits for whom, and what is measured."""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fffexp import timing
from fffexp.timing import MAX_ROUNDS, MIN_ROUNDS, exclusive_timing, interleaved_medians, measure, wait_for_timing

NAMES = {
    *("speed/latency_b1_ms", "speed/latency_b256_ms", "speed/throughput_b2048"),
    *("speed/reference_latency_b1_ms", "speed/reference_latency_b256_ms"),
    *("speed/latency_b1_ratio", "speed/latency_b256_ratio"),
}


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a machine of our own: others may be timing on this one."""
    monkeypatch.setattr(timing, "_LOCK", tmp_path / "fffexp-timing.lock")
    monkeypatch.setattr(timing, "_open_lock", None)
    monkeypatch.setattr(timing, "_looked", 0.0)


def test_contenders_run_in_turn() -> None:
    calls: list[str] = []
    contenders = {"a": partial(calls.append, "a"), "b": partial(calls.append, "b")}
    medians = interleaved_medians(contenders)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert list(medians) == ["a", "b"]
    assert all(0 < seconds < 0.01 for seconds in medians.values())


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, MAX_ROUNDS), (0.03, MIN_ROUNDS)])
def test_rounds(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    monkeypatch.setattr(timing, "ROUNDS_S", 60.0 if not seconds else 0.3)
    calls: Counter[str] = Counter()

    def run() -> None:
        calls["a"] += 1
        time.sleep(seconds)

    medians = interleaved_medians({"a": run})
    assert rounds <= calls["a"] <= rounds + 1
    assert medians["a"] >= seconds


def test_the_median_ignores_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_S", 0.0)
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        if count == 5:
            time.sleep(0.05)

    assert interleaved_medians({"a": run})["a"] < 0.01


HOLD = """
import sys
from fffexp.timing import exclusive_timing
with exclusive_timing():
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that is timing until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"TMPDIR": str(tmp_path), "PATH": ""},
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def time_exclusively() -> None:
    with exclusive_timing():
        pass


def test_one_process_times_and_training_pauses(holder: "subprocess.Popen[str]") -> None:
    threads = [threading.Thread(target=target, daemon=True) for target in (time_exclusively, wait_for_timing)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert all(thread.is_alive() for thread in threads)
    assert holder.stdin
    holder.stdin.write("\n")
    holder.stdin.flush()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_a_killed_process_holds_nobody_up(holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()
    thread = threading.Thread(target=time_exclusively, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_training_does_not_hold_up_timing() -> None:
    wait_for_timing()
    thread = threading.Thread(target=time_exclusively, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("samples", [3, 300])
def test_measure(samples: int) -> None:
    network, reference = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), nn.Flatten()
    shapes: Counter[tuple[int, ...]] = Counter()
    network.register_forward_pre_hook(lambda _, inputs: shapes.update([tuple(inputs[0].shape)]))
    inputs = torch.randn(samples, 3, 4)
    results = measure(network, inputs, reference)
    assert set(results) == NAMES
    assert all(value > 0 for value in results.values())
    assert set(shapes) == {(1, 3, 4), (256, 3, 4), (2048, 3, 4)}
    assert min(shapes.values()) >= MIN_ROUNDS
    for size in ("b1", "b256"):
        ratio = results[f"speed/latency_{size}_ms"] / results[f"speed/reference_latency_{size}_ms"]
        assert results[f"speed/latency_{size}_ratio"] == pytest.approx(ratio)
    assert all(p.grad is None for p in network.parameters())
    assert not network.training
    # and it can be trained on
    network(inputs).sum().backward()
