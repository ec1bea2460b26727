"""`make ui`: the server over the store of the runs."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, digits, enter, free_port, user_environment, with_store

from fffexp.training.experiment import Context, Result, run

LIMIT_S = 120
pytestmark = pytest.mark.slow


def recipe() -> str:
    """What `make ui` passes to the shell, with this environment's programs."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "--old-file=setup",
        "ui",
        f"BIN={Path(sys.executable).parent}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=user_environment())
    assert "mlflow server" in done.stdout
    return done.stdout


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"Content-Type": "application/json"}
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, dict[str, Result]]]:
    """Port of a server over two runs, and their results by id."""
    enter(with_store(tmp_path), monkeypatch)
    done = [run(digits(layer), Context(quiet=True)) for layer in ("ff", "fff")]
    results = {result.run_id: result for result in done if result}
    port = free_port()
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            recipe(),
            shell=True,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=user_environment() | {"PORT": str(port)},
        )
    try:
        end = time.monotonic() + LIMIT_S
        while True:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < end, (tmp_path / "server.log").read_text()
            with suppress(OSError, http.client.HTTPException):
                if ask(port, "GET", "/health")[0] == 200:
                    break
            time.sleep(0.2)
        yield port, results
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_runs_can_be_compared(server: tuple[int, dict[str, Result]]) -> None:
    port, results = server
    status, page = ask(port, "GET", "/")
    assert status == 200
    assert b"<html" in page.lower()
    status, body = ask(port, "GET", "/api/2.0/mlflow/experiments/get-by-name?experiment_name=default")
    assert status == 200
    experiment = json.loads(body)["experiment"]["experiment_id"]
    status, body = ask(port, "POST", "/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment]})
    assert status == 200
    runs = json.loads(body)["runs"]
    assert sorted(r["info"]["run_id"] for r in runs) == sorted(results)
    for found in runs:
        params = {p["key"]: p["value"] for p in found["data"]["params"]}
        metrics = {m["key"]: m["value"] for m in found["data"]["metrics"]}
        assert params["layer"] in ("FF", "FFF")
        assert set(params) >= {"training_width", "inference_size", "flops_per_sample"}
        assert metrics["test/accuracy"] == results[found["info"]["run_id"]].metrics["test/accuracy"]
        assert metrics["speed/latency_b256_ms"] > 0
        assert found["info"]["status"] == "FINISHED"
    status, body = ask(port, "GET", f"/get-artifact?path=config.yaml&run_uuid={next(iter(results))}")
    assert status == 200
    assert b"class_path" in body
