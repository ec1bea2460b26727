"""The benchmark's numbers: what is timed, against what, and never for a wrong output."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fffexp.bench import measure
from fffexp.bench.contenders import make, public_layers
from fffexp.bench.measure import last_level_cache_bytes, measure_limits
from fffexp.bench.setting import Setting
from fffexp.cli import main
from fffexp.files import hold

SMALL = ["--leaf_width", "4", "--in_features", "24", "--out_features", "20", "--seconds", "0.001"]
OF_THREE = ["--layers", "FF", "NoisyTopKMoE", "FFF"]
POINTS = ["--depths", "0", "3", "--batch_sizes", "1", "33"]
SIZES: dict[str, Any] = {"in_features": 24, "out_features": 20, "leaf_width": 4}
KEYS = {  # those that others rely on
    *("task", "layer", "backend", "in_features", "out_features", "training_width", "inference_width", "depth"),
    *("leaf_width", "num_experts", "top_k", "batch_size", "threads", "dtype", "device", "median_s", "p10_s", "p90_s"),
    *("flops", "bytes", "limit_s", "speedup_over_ff", "speedup_over_moe", "speedup_over_peer", "max_abs_error"),
    *("peak_bytes", "fastest_ff_s"),
}


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may be timing on this machine."""
    monkeypatch.setenv("FFFEXP_TIMING_LOCK", str(tmp_path / "timing.lock"))


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Limits take seconds to measure: the devices that they were asked of."""
    asked: list[str] = []

    def quick(dtype: torch.dtype, device: str) -> dict[str, float]:
        asked.append(device)
        return {"gemm_flops_per_s": 1e11, "read_bytes_per_s": 1e10}

    monkeypatch.setattr("fffexp.bench.measure.measure_limits", quick)
    return asked


def bench(task: str, path: Path, *more: str) -> dict[str, Any]:
    assert main(["bench", task, *SMALL, *more, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def by_layer(found: dict[str, Any], **which: Any) -> dict[str, dict[str, Any]]:
    return {r["layer"]: r for r in found["records"] if all(r[key] == value for key, value in which.items())}


def test_inference_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench("inference", tmp_path / "a.json", *POINTS, *OF_THREE, "--peers")
    printed = capsys.readouterr().out
    records = found["records"]
    layers = ("FF", "NoisyTopKMoE", "FFF", "fastfeedforward")
    # the peer crashes at depth 0
    expected = [(w, b, layer) for w in (4, 32) for b in (1, 33) for layer in layers[: 3 if w == 4 else 4]]
    assert [(r["training_width"], r["batch_size"], r["layer"]) for r in records] == expected
    for r in records:
        assert r.keys() >= KEYS
        assert r["layer"] in printed
        assert r["p10_s"] <= r["median_s"] <= r["p90_s"]
        assert r["max_abs_error"] < 1e-5
        assert r["limit_s"] == max(r["flops"] / 1e11, r["bytes"] / 1e10)
        assert r["task"] == "inference"
    deep = by_layer(found, batch_size=33, training_width=32)
    assert deep["FF"]["speedup_over_ff"] is None
    assert deep["FF"]["backend"] == "linear"
    assert deep["FF"]["flops"] == 33 * 2 * 32 * (24 + 20)
    assert deep["FF"]["bytes"] == 4 * (32 * (24 + 20 + 1) + 20 + 33 * (24 + 20))
    assert deep["FFF"]["flops"] == 33 * 2 * (3 * 24 + 4 * (24 + 20))
    assert deep["FFF"]["visited_share"] == 1
    assert [deep["FFF"][name] for name in ("depth", "leaf_width", "num_experts", "top_k")] == [3, 4, None, None]
    assert [deep["NoisyTopKMoE"][name] for name in ("depth", "leaf_width", "num_experts", "top_k")] == [None, 4, 8, 1]
    assert found["limits"] == {"gemm_flops_per_s": 1e11, "read_bytes_per_s": 1e10}
    assert {"cpu", "cores", "threads", "torch", "compiler", "commit", "date"} <= found["environment"].keys()


def test_a_speedup_is_the_median_of_the_ratios_of_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"FF": [4.0, 40.0, 4.0], "FF addmm": [1.0, 1.0, 1.0], "NoisyTopKMoE": [3.0, 30.0, 3.0], "FFF": [2.0, 20, 2]}
    spent["fastfeedforward"] = [8.0, 80.0, 8.0]
    monkeypatch.setattr(measure, "interleaved", lambda calls, *_, **__: {name: spent[name] for name in calls})
    found = bench("inference", tmp_path / "a.json", "--depths", "2", "--batch_sizes", "3", *OF_THREE, "--peers")
    speedups = {
        r["layer"]: tuple(r[f"speedup_over_{other}"] for other in ("ff", "moe", "peer")) for r in found["records"]
    }
    assert speedups["FF"] == (None, None, None)
    assert speedups["NoisyTopKMoE"] == (pytest.approx(4 / 3), None, None)
    assert speedups["FFF"] == (2, 1.5, 4)
    dense = by_layer(found)["FF"]
    assert (dense["median_s"], dense["fastest_ff"], dense["fastest_ff_s"]) == (4, "addmm", 1)


def test_training_records(tmp_path: Path) -> None:
    found = bench("training", tmp_path / "a.json", *POINTS, *OF_THREE, "--peers")
    records = found["records"]
    # no peer at depth 0, and two sparse forms of FFF at each of 4 points
    assert len(records) == 14 + 8
    ran = {"FF": "linear", "NoisyTopKMoE": "eager", "FFF": "native", "fastfeedforward": "0.2.1"}
    ran |= {"FFF chosen_leaf": "sparse", "FFF chosen_path": "sparse"}
    assert {r["layer"]: r["backend"] for r in records} == ran
    for r in records:
        assert r["median_s"] >= max(r["forward_s"], r["backward_s"], r["optimizer_s"])
    deep = by_layer(found, batch_size=33, training_width=32)
    # 1 + (2^d - 1) in / (w (in + out)): operations of the forward pass
    assert deep["FFF"]["operations_over_ff"] == pytest.approx(1 + 7 * 24 / (32 * 44))
    # forward, the gradients of the weights and those of the hidden activations; the nodes have no hidden ones
    assert deep["FF"]["flops"] == 33 * 2 * 32 * (2 * (24 + 20) + 20)
    assert deep["FFF"]["flops"] == deep["FF"]["flops"] + 33 * 2 * 2 * 7 * 24
    assert deep["NoisyTopKMoE"]["flops"] == 33 * 2 * (2 * 4 * (2 * (24 + 20) + 20) + 4 * 8 * 24)
    assert deep["FFF chosen_leaf"]["flops"] == 33 * 2 * (4 * (2 * (24 + 20) + 20) + 3 * 24)
    assert deep["FFF chosen_path"]["flops"] == 33 * 2 * (4 * (2 * (24 + 20) + 20) + 3 * 3 * 24)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_backend_that_ran_is_named(tmp_path: Path, backend: str, dtype: str) -> None:
    more = ["--depths", "3", "--batch_sizes", "33", "--backend", backend, "--dtype", dtype]
    layers = {*public_layers()}
    if (backend, dtype) == ("native", "bfloat16"):  # which PEER does not have
        more += ["--layers", *sorted(layers := layers - {"PEER"})]
    records = bench("inference", tmp_path / "a.json", *more)["records"]
    assert {r["layer"] for r in records} == layers, "all public layers by default"
    # trees whose nodes are the neurons have one less than a power of two, each
    assert {r["training_width"] for r in records} == {32, 28}
    assert {r["backend"] for r in records if r["layer"] != "FF"} == {backend}
    assert {r["dtype"] for r in records} == {dtype}


def test_a_file_is_completed_and_what_it_has_is_kept(tmp_path: Path, measured: list[str]) -> None:
    path = tmp_path / "a.json"
    before = bench("inference", path, "--depths", "1", "--batch_sizes", "2", "--layers", "FF", "FFF")
    again = bench("inference", path, "--depths", "1", "--batch_sizes", "2", "--layers", "FF", "FFF")
    assert again == before
    after = bench("inference", path, "--depths", "1", "2", "--batch_sizes", "2", "--layers", "FF", "FFF", "SwitchMoE")
    assert after["records"][:2] == before["records"]
    assert [(r["training_width"], r["layer"]) for r in after["records"][2:]] == [
        *[(8, "SwitchMoE"), (16, "FF"), (16, "FFF"), (16, "SwitchMoE")]
    ]
    assert by_layer(after, training_width=8)["SwitchMoE"]["speedup_over_ff"]
    assert measured == ["cpu"], "the limits are kept too"
    bench("inference", path, "--depths", "1", "--batch_sizes", "2", "--layers", "FF", "--threads", "1", "2")
    assert json.loads(path.read_text())["limits_by_threads"].keys() == {"1", "2"}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ["--dtype", "float64"], "measured with another dtype"),
        ({}, ["--in_features", "8"], "measured with another in_features"),
        ({}, ["--backend", "eager"], "FFF was measured with the backend native, now it is eager"),
        ({"environment": {"cpu": "another"}}, [], "measured with another cpu"),
        ({"environment": {"torch": "1.0"}}, [], "measured with another torch"),
        ({"records": [{"seed": 1}]}, [], "it holds no records of this benchmark"),
    ],
)
def test_a_file_of_another_setting_or_machine_is_refused(
    change: dict[str, Any], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, more = tmp_path / "a.json", ["--depths", "1", "--batch_sizes", "2", "--layers", "FFF"]
    found = bench("inference", path, *more)
    if change:
        found["environment"] |= change.get("environment", {})
        found["records"] = change.get("records", found["records"])
        path.write_text(json.dumps(found))
    capsys.readouterr()
    assert main(["bench", "inference", *SMALL, *more, "--json", str(path), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert json.loads(path.read_text()) == found


def test_records_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "a.json", 0

    def stop(*_: object) -> float:
        nonlocal asked
        asked += 1
        if asked > 4:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(measure, "visited_share", stop)
    more = ["--depths", "1", "2", "--batch_sizes", "2", "--layers", "FF", "SwitchMoE"]
    assert main(["bench", "inference", *SMALL, *more, "--json", str(path)]) == 130
    assert [r["layer"] for r in json.loads(path.read_text())["records"]] == ["FF", "SwitchMoE"]
    assert list(tmp_path.glob("*a.json*")) == [path]


def test_two_commands_do_not_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, status = tmp_path / "a.json", []
    with hold(path):
        thread = threading.Thread(
            target=lambda: status.append(main(["bench", "inference", *SMALL, "--json", str(path)]))
        )
        thread.start()
        thread.join()
    assert status == [2]
    assert "another command writes it" in capsys.readouterr().err
    assert not path.exists()


@pytest.fixture
def own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a user's file, as the current one."""
    shutil.copy(Path(__file__).with_name("own_layers.py"), tmp_path / "own.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own", raising=False)


@pytest.mark.usefixtures("own_layers")
@pytest.mark.parametrize("task", ["inference", "training", "model"])
def test_a_layer_from_outside_joins(task: str, tmp_path: Path) -> None:
    more = [
        "--depths",
        "3",
        "--batch_sizes",
        "33",
        "--out_features",
        "24",
        "--layers",
        "FF",
        "own.LowRank",
        "own.Plain",
    ]
    found = bench(task, tmp_path / "a.json", *more, "--layer_args", '{"own.LowRank": {"rank": 3}}')
    assert by_layer(found)["own.Plain"]["inference_width"] == 32
    own = by_layer(found)["own.LowRank"]
    assert own["training_width"] == 32
    assert own["depth"] is None
    if task == "inference":
        assert own["flops"] == 33 * 2 * (3 * (24 + 32) + 32 * 24)
    if task != "model":
        assert own["speedup_over_ff"]


@pytest.mark.usefixtures("own_layers")
@pytest.mark.parametrize(
    ("task", "layer", "message"),
    [
        ("inference", "own.Wrong", "its output is off by"),
        ("training", "own.Wrong", "its output is off by"),
        ("training", "own.WrongGradient", "its gradient of down.weight is off by"),
        ("inference", "own.Missing", "cannot be imported"),
        ("inference", "own.torch", "is no class derived from fffexp.FeedforwardLayer"),
        ("inference", "own.Picky", "missing 1 required positional argument: 'angle'"),
    ],
)
def test_what_is_wrong_is_not_timed(
    task: str, layer: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    assert main(["bench", task, *SMALL, "--depths", "2", "--layers", layer, "--json", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert layer in error
    assert "\n" not in error
    assert not path.exists()


def test_leaves_and_experts_share_their_weights() -> None:
    moe, tree, switch = (
        contender.layer for contender in make(Setting(["NoisyTopKMoE", "FFF", "SwitchMoE"], top_k=2, **SIZES), 3)
    )
    assert moe.training_width == tree.training_width == switch.training_width == 32
    assert (
        len(
            {
                dict(layer.named_parameters())[name].data_ptr()
                for layer, name in (
                    (moe, "experts.hidden_weight"),
                    (tree, "leaves.hidden_weight"),
                    (switch, "experts.hidden_weight"),
                )
            }
        )
        == 1
    )
    assert len(moe.route(torch.randn(300, 24)).unique()) == 8, "the gate sends all samples the same way"


def test_forms_of_a_layer_compute_what_it_computes() -> None:
    dense, tree = (contender.layer for contender in make(Setting(["FF", "FFF"], **SIZES), 3))
    x = torch.randn(40, 24)
    (form,) = dense.fast_forms().values()
    torch.testing.assert_close(form(x), dense(x))
    for trained, sparse in tree.training_forms().items():
        assert sparse.sparse_gradients
        torch.testing.assert_close(sparse.train()(x), tree.eval()(x), msg=trained)
        assert not tree.sparse_gradients
        assert [*map(id, sparse.parameters())] == [*map(id, tree.parameters())]


def test_inputs_rotate_until_the_weights_do_not_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(["FFF"], **SIZES)
    layers = [contender.layer for contender in make(setting, 6)]
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 2**30)
    batches = measure.beyond_caches(layers, setting, 1)
    assert measure.visited_share(layers[0], batches) >= measure.WHOLE
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 100)
    assert len(measure.beyond_caches(layers, setting, 1)) == 8
    assert len({float(batch[0, 0]) for batch in batches}) == len(batches)


def test_limits_count_operations_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fffexp.bench.measure.REPEATS", 2)
    limits = measure_limits(torch.float32, "cpu")
    assert 1e8 < limits["gemm_flops_per_s"] < 1e14
    assert 1e8 < limits["read_bytes_per_s"] < 1e13
    assert 2**18 <= last_level_cache_bytes() <= 2**32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "-1"], "depths"),
        (["--batch_sizes", "0"], "batch_sizes"),
        (["--layers", "Dense"], "'Dense' is not one of FF"),
        (["--dtype", "int8"], "dtype"),
        (["--device", "cuda:99"], "--device cuda:99: torch cannot use it here"),
        (["--device", "gpu"], "--device gpu: torch cannot use it here"),
        (["--device", "meta"], "--device meta: give cpu"),
        (["--depths", "40"], "depth 40: the weights would take"),
        (["--peers", "--dtype", "bfloat16", "--depths", "1"], "float32 alone"),
        (["--backend", "triton", "--depths", "1"], "--backend triton"),
        (["--layer_args", '{"FFF": {"angle": 3}}'], "unexpected keyword argument 'angle'"),
        (["--layer_args", '{"Dense": {"angle": 3}}'], "'Dense' is not one of FF"),
        (["--json"], "--json"),
        (["--json", "/proc/no/x.json"], "--json /proc/no/x.json"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "inference", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
