"""The command line: mistakes in one line, quick help, signals."""

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.entities import Run
from processes import CONFIGS, Process, client, digits, enter, history, runs, started, wait_until, with_store

from fffexp import environment
from fffexp.cli import main

LAYER = [f"--config={CONFIGS / 'model' / 'one_cycle.yaml'}", f"--config={CONFIGS / 'layer' / 'fff.yaml'}"]
MOE = ["--model.layer=NoisyTopKMoE", "--model.layer.num_experts=4", "--model.layer.expert_width=4"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a command ends with."""

    def call(*args: str) -> str:
        assert main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fffexp: ")
        assert len(line) < 500
        return line

    return call


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--model.layer=Nonesuch"], ["model.layer", "Nonesuch"]),
        (["--model.layer.dept=3"], ["model.layer", "dept"]),
        (["--model.layer.depth=three"], ["model.layer", "depth"]),
        (["--model.lair.depth=3"], ["lair"]),
        (["--nonesuch=1"], ["nonesuch"]),
        (["--model.in_shape=[1]"], ["model.in_shape", "data.in_shape"]),
        (["--model.num_classes=10"], ["model.num_classes", "data.num_classes"]),
        (["--data.init_args.seed=3"], ["data.init_args.seed", "seed_everything"]),
        (["--data=Nonesuch"], ["data", "Nonesuch"]),
        (["--data.batch_size=0"], ["batch_size"]),
        (["--data.normalize=max"], ["normalize"]),
        (["--seed_everything=-1"], ["seed"]),
        (["--trainer.max_epcohs=3"], ["max_epcohs"]),
        (["--trainer.max_epochs=many"], ["max_epochs"]),
        (["--model.layer.depth=-1"], ["depth", "-1"]),
        (["--model.layer.depth=40"], ["depth", "GiB"]),
        (["--model.layer.leaf_width=0"], ["leaf_width"]),
        (["--model.aux_weights.harden=0.1"], ["aux_weights.harden", "hardening_mean"]),
        (["--model.aux_weights.inverse_temperature.init_args.start=-1"], ["exponential schedule", "-1"]),
        (["--model.label_smoothing=2"], ["label_smoothing"]),
        (["--model.optimizer=Nonesuch"], ["optimizer", "Nonesuch"]),
        (["--model.lr_scheduler.init_args.pct_stat=1"], ["pct_stat"]),
        (["--config=nonesuch.yaml"], ["nonesuch.yaml"]),
        (["--test=perhaps"], ["test"]),
        (["--ckpt_path=nonesuch.ckpt"], ["nonesuch.ckpt"]),
        ([f"--ckpt_path={__file__}"], [__file__, "no checkpoint"]),
        (["--model.aux_weights.importance=-5"], ["aux_weights.importance is -5"]),
        (["--trainer.devices=0"], ["devices"]),
        (["--trainer.devices=3"], ["trainer.devices is 3", "one device"]),
        (["--trainer.devices=-1"], ["trainer.devices is -1", "one device"]),
        (["--trainer.strategy=ddp_fork"], ["trainer.strategy is ddp_fork"]),
        (["--seed_everything=1099511627776"], ["seed_everything", "4294967295"]),
        (["--trainer.max_epochs=0"], ["trainer.max_epochs is 0"]),
        (["--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val is -1"]),
        (["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches is 0"]),
        (["--name=../../x"], ["name is '../../x'"]),
        (["--name=a\nb"], ["name is"]),
        ([f"--name={'x' * 101}"], ["name is", "100"]),
        (["--tracking_uri=postgresql+nonesuch://me:secret@127.0.0.1:9/x"], ["me:***@127.0.0.1"]),
        (["--tracking_uri=mysql://me:secret@127.0.0.1:9/x"], ["me:***@127.0.0.1", "sqlite:///FILE"]),
        (["--trainer.max_epochs=-3"], ["max_epochs"]),
        (["--trainer.max_epochs=-1"], ["no end of the training", "max_epochs"]),
        (["--trainer.limit_train_batches=0"], ["no step to train"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else None,
)
def test_a_mistake_is_told_in_one_line(args: list[str], named: list[str], mistake: Callable[..., str]) -> None:
    line = mistake(*digits(), *args)
    for part in named:
        assert part in line
    assert not Path("outputs/checkpoints").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there(mistake: Callable[..., str]) -> None:
    line = mistake(*digits(), "--trainer.accelerator=gpu")
    assert "trainer.accelerator" in line
    assert "cpu" in line


def test_a_callback_that_waits_for_an_unknown_metric(mistake: Callable[..., str]) -> None:
    line = mistake(*digits(), "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/nonesuch")
    assert "val/nonesuch" in line
    assert "val/accuracy" in line


@pytest.mark.skipif(not Path("/proc").exists(), reason="no folder that root cannot write to")
def test_a_current_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_store(tmp_path)
    monkeypatch.setenv("FFFEXP_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.chdir("/proc")
    assert main(digits("ff")) == 0
    (run,) = runs(tmp_path)
    assert run.info.status == "FINISHED"
    assert list(tmp_path.glob("outputs/checkpoints/*/last.ckpt"))


def test_a_fit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_store(tmp_path)
    monkeypatch.setenv("PATH", "/nonesuch")
    environment.git_commit.cache_clear()
    assert main(digits("ff")) == 0
    environment.git_commit.cache_clear()
    (run,) = runs(tmp_path)
    assert run.data.tags["git_commit"] == "unknown"


def test_experts(mistake: Callable[..., str]) -> None:
    base = [*digits()[:-1], "--model.aux_weights=null"]
    assert "Switch gate" in mistake(*base, *MOE, "--model.layer.top_k=1")
    assert "top_k is 5 but there are 4 experts" in mistake(*base, *MOE, "--model.layer.top_k=5")


def test_config_files(mistake: Callable[..., str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    for text, named in (
        ("model: [", "bad.yaml"),
        ("just words", "bad.yaml"),
        ("modle: {layer: FFF}", "modle"),
        ("trainer: {max_epoch: 3}", "max_epoch"),
        ("trainer: {max_epochs: 3}\ntrainer: {max_epochs: 4}", "bad.yaml, line 2: 'trainer' is given twice"),
        ("a: &a [*a]", "bad.yaml, line 1: an alias contains itself"),
    ):
        bad.write_text(text)
        assert named in mistake(*digits(), f"--config={bad}"), text


def test_missing_parts(mistake: Callable[..., str]) -> None:
    assert "data" in mistake("fit", *LAYER)
    assert "layer" in mistake("fit", f"--config={CONFIGS / 'data' / 'digits.yaml'}")


def test_unknown_commands(mistake: Callable[..., str]) -> None:
    assert "'fitt'" in mistake("fitt")
    assert "--fit" in mistake("--fit")
    assert "nonesuch" in mistake("study", "nonesuch")


def test_a_key_is_not_guessed_from_its_beginning(mistake: Callable[..., str]) -> None:
    assert "--trainer.max_epoch " in mistake(*digits("ff"), "--trainer.max_epoch", "1")
    assert "--job " in mistake("study", "run", "x.yaml", "--job", "2")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fffexp {version('fffexp')}\n"


# data on disk


def encode(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> bytes:
    code = {"u1": 0x08, "i1": 0x09, "f4": 0x0D}[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, rows in (("train", 60), ("t10k", 20)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(encode(random.integers(0, 256, (rows, 5, 4)).astype("u1")))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(encode(random.integers(0, 10, rows).astype("u1")))
    return folder


def swap(folder: Path) -> None:
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    a, b = images.read_bytes(), labels.read_bytes()
    images.write_bytes(b)
    labels.write_bytes(a)


def truncate(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-7])


def label_out_of_range(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(encode(np.full(60, 10, "u1")))


def spoil_a_pixel(folder: Path) -> None:
    images = np.zeros((60, 5, 4), "f4")
    images[3, 2, 1] = np.nan
    (folder / "train-images-idx3-ubyte").write_bytes(encode(images))


def remove(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (truncate, ["train-images-idx3-ubyte", "truncated"]),
        (swap, ["train-images-idx3-ubyte", "should hold images"]),
        (label_out_of_range, ["train-labels-idx1-ubyte", "label 10", "outside 0 to 9"]),
        (spoil_a_pixel, ["train-images-idx3-ubyte", "NaN", "row 3"]),
        (remove, ["t10k-labels-idx1-ubyte", "missing"]),
    ],
)
def test_spoilt_data(
    spoil: Callable[[Path], None], named: list[str], idx: Path, mistake: Callable[..., str], tmp_path: Path
) -> None:
    with_store(tmp_path)
    spoil(idx)
    line = mistake("fit", *LAYER, "--data=IDX", f"--data.root={idx}", "--trainer.max_epochs=1")
    for part in [str(idx), *named]:
        assert part in line
    assert all(r.info.status == "FAILED" for r in runs(tmp_path))


def test_a_missing_folder_of_data(mistake: Callable[..., str]) -> None:
    line = mistake("fit", *LAYER, "--data=FashionMNIST", "--data.root=nonesuch")
    assert "nonesuch" in line
    assert "make data" in line


def test_a_tracking_store_out_of_reach(mistake: Callable[..., str]) -> None:
    line = mistake(*digits(), "--tracking_uri=http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in line
    assert "--tracking_uri" in line
    assert "nonesuch://x" in mistake(*digits(), "--tracking_uri=nonesuch://x")
    assert not Path("outputs").exists()


def test_a_tracking_store_that_cannot_be_made(mistake: Callable[..., str]) -> None:
    Path("file").write_text("")
    assert "file/mlflow.db" in mistake(*digits(), "--tracking_uri=sqlite:///file/mlflow.db")


# help


def loaded_by(*args: str) -> tuple[str, set[str]]:
    code = (
        "import sys; from fffexp.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('loaded', *sorted(m for m in ('torch', 'lightning', 'mlflow', 'optuna') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.splitlines()
    return "\n".join([*text, *done.stderr.splitlines()]), set(last.split()[1:])


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--help"], "usage: fffexp"),
        ([], "usage: fffexp"),
        (["study", "--help"], "resume"),
        (["study", "run", "--help"], "--jobs"),
        (["nonesuch"], "nonesuch"),
    ],
)
def test_help_does_not_wait_for_torch(args: list[str], shown: str) -> None:
    text, modules = loaded_by(*args)
    assert not modules
    assert shown in text


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "study", "bench"):
        assert f"\n  {command} " in text


def test_help_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--config", "--model.help", "--data", "--tracking_uri", "--test", "--name"):
        assert option in text


def test_the_module_is_the_console_script() -> None:
    script = Path(sys.executable).with_name("fffexp")
    if not script.exists():
        pytest.skip("the package is not installed with its script")
    commands = ([str(script)], [sys.executable, "-m", "fffexp"])
    for args in (["--help"], ["nonesuch"]):
        done = [subprocess.run([*c, *args], capture_output=True, text=True, timeout=120) for c in commands]
        assert done[0].returncode == done[1].returncode
        assert done[0].stdout == done[1].stdout
        assert done[0].stderr == done[1].stderr


# signals

SIGNALS = {"terminated": signal.SIGTERM, "interrupted": signal.SIGINT, "killed": signal.SIGKILL}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Process]]]:
    """Long fits on one store, stopped by a signal each, at the same time to save some."""
    folder = with_store(tmp_path_factory.mktemp("signals"))
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(started(*digits(epochs=100_000), f"--name={name}", folder=folder, label=name))
            for name in SIGNALS
        }
        for name, number in SIGNALS.items():
            processes[name].until_printed("epoch 2/")
            processes[name].send(number)
        for process in processes.values():
            process.wait(60)
        yield folder, processes


def only_run(folder: Path, name: str) -> Run:
    (run,) = runs(folder, name)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["terminated", "interrupted"])
def test_a_stopped_fit_is_failed_at_once(name: str, stopped: tuple[Path, dict[str, Process]]) -> None:
    folder, processes = stopped
    assert processes[name].popen.returncode == 128 + SIGNALS[name]
    assert "Traceback" not in processes[name].errors()
    run = only_run(folder, name)
    assert run.info.status == "FAILED"
    assert len(history(folder, run.info.run_id, "val/accuracy")) >= 2, "what it had measured is kept"


@pytest.mark.slow
def test_a_killed_fit_is_failed_by_the_next(
    stopped: tuple[Path, dict[str, Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, processes = stopped
    assert processes["killed"].popen.returncode == -signal.SIGKILL
    assert only_run(folder, "killed").info.status == "RUNNING"
    enter(folder, monkeypatch)
    assert main([*digits("ff"), "--name=killed", "--test=false"]) == 0
    assert [r.info.status for r in runs(folder, "killed")] == ["FAILED", "FINISHED"]


@pytest.mark.slow
def test_a_running_fit_is_left_alone_by_the_next(tmp_path: Path) -> None:
    with_store(tmp_path)
    with started(*digits("ff", epochs=100_000), "--name=digits", folder=tmp_path) as process:
        process.until_printed("epoch 1/")
        assert main([*digits("ff"), "--name=digits", "--test=false"]) == 0
        assert process.popen.poll() is None
        assert sorted(r.info.status for r in runs(tmp_path)) == ["FINISHED", "RUNNING"]
        os.kill(process.popen.pid, signal.SIGTERM)
        process.wait(60)
    wait_until(lambda: client(tmp_path).get_run(runs(tmp_path)[0].info.run_id).info.status == "FAILED", 10)
