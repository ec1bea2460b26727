"""Every file in configs/ and studies/ goes through the real command line."""

import gzip
import math
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from processes import CONFIGS, ROOT, artifact, enter, runs, with_store

import fffexp.layers
from fffexp.configs import load_config
from fffexp.study.spec import load
from fffexp.training.experiment import Context, build, run

EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))
LONG = ("text_ff", "text_moe", "text_switch")  # text_fff is of their kind
EXPERIMENTS_IN_TIERS = [pytest.param(p, marks=[pytest.mark.slow] if p.stem in LONG else []) for p in EXPERIMENTS]
LAYERS = sorted(path for path in (CONFIGS / "layer").glob("*.yaml") if path.stem != "none")
RECIPES = sorted((CONFIGS / "recipe").glob("*.yaml"))
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
HEADLINES = ("digits_depth_leaf", "fashion_depth_leaf")
STUDIES_IN_TIERS = [pytest.param(p, marks=[] if p.stem in HEADLINES else pytest.mark.slow) for p in STUDIES]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
SMALL = ["--data.init_args.batch_size=2", "--trainer.limit_val_batches=2"]  # of a text
Arguments = Callable[[Path], list[str]]
IMAGES = {"train": 600, "t10k": 100}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random files of the same form as Fashion-MNIST's, but few rows."""
    folder, random = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    for part, rows in IMAGES.items():
        images = random.integers(0, 256, (rows, 28, 28)).astype("u1")
        labels = random.integers(0, 10, rows).astype("u1")
        for name, array in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / name).write_bytes(gzip.compress(header + array.tobytes()))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of the same form as GCIDE, but short."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number} is the number after {number - 1}.\n" for number in range(2000)))
    return path


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs.npy and targets.npy."""
    folder, random = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    np.save(folder / "inputs.npy", random.normal(size=(60, 5)))
    np.save(folder / "targets.npy", np.arange(60) % 3)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images in a folder for each of two classes."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(40):
        (folder / str(number % 2)).mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (9, 8, 3)).astype("u1")
        Image.fromarray(pixels).save(folder / str(number % 2) / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_store(tmp_path_factory.mktemp("configs"))


@pytest.fixture(autouse=True)
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(workplace, monkeypatch)


def content(path: Path) -> Any:
    return load_config(path)


@pytest.fixture(scope="module")
def data_arguments(fashion: Path, text: Path, arrays: Path, pictures: Path) -> Callable[[Path], list[str]]:
    """What a config needs beside itself, for its data are not here."""
    found = {
        "fffexp.data.FashionMNIST": [f"--data.init_args.root={fashion}"],
        "fffexp.data.Text": [f"--data.init_args.path={text}", *SMALL],
        "fffexp.data.Arrays": [f"--data.init_args.{name}={arrays / name}.npy" for name in ("inputs", "targets")],
        "fffexp.data.ImageFolder": [f"--data.init_args.root={pictures}"],
    }
    return lambda path: found.get(content(path).get("data", {}).get("class_path"), [])


def model_of(path: Path) -> Any:
    model = content(path)["model"]
    return model.get("init_args", model)


@pytest.mark.parametrize("path", EXPERIMENTS_IN_TIERS, ids=lambda path: path.stem)
def test_an_experiment_stands_alone(path: Path, data_arguments: Arguments, workplace: Path) -> None:
    result = run(["fit", f"--config={path}", *SHORT, *data_arguments(path)], Context(quiet=True))
    assert result is not None
    if path.stem.startswith("text"):
        assert 3.5 < result.metrics["test/loss"] < math.log(256) + 0.5, "of 256 bytes the text has some 30"
    else:
        assert 1.5 < result.metrics["test/loss"] < 3.5, "two batches from where all ten classes are as likely"
    (ours,) = (r for r in runs(workplace) if r.info.run_id == result.run_id)
    assert ours.info.status == "FINISHED"
    written = yaml.safe_load(artifact(workplace, result.run_id, "config.yaml").read_text())
    said = content(path)
    assert written["name"] == said["name"]
    assert result.params["layer"] == model_of(path)["layer"]["class_path"].rsplit(".", 1)[-1]
    assert written["model"]["init_args"]["layer"]["init_args"].items() >= model_of(path)["layer"]["init_args"].items()


@pytest.mark.parametrize("network", [(), ("model/vit",)], ids=["mlp", "vit"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda path: path.stem)
def test_the_pieces_compose(layer: Path, network: tuple[str, ...]) -> None:
    pieces = ("data/digits", "model/one_cycle", "trainer/averaged", *network)
    configs = [f"--config={CONFIGS / piece}.yaml" for piece in pieces]
    args = ["fit", *configs, f"--config={layer}", *SHORT]
    result = build(args) if network else run(args, Context(quiet=True))
    assert result is not None
    assert result.params["layer"] == content(layer)["model"]["layer"]["class_path"].rsplit(".", 1)[-1]
    assert result.params["lr_scheduler"] == "OneCycle"
    assert ("test/accuracy" in result.metrics) == (not network)
    assert result.params["network"] == ("ViT" if network else "MLP")
    assert result.params.get("network.num_blocks") == (4 if network else None)


def test_a_network_without_layers() -> None:
    pieces = ("data/digits", "model/one_cycle", "trainer/averaged", "model/vit")
    configs = [f"--config={CONFIGS / piece}.yaml" for piece in pieces]
    result = run(["fit", *configs, f"--config={CONFIGS}/layer/none.yaml", *SHORT], Context(quiet=True))
    assert result is not None
    assert (result.params["layer"], result.params["inference_size"], result.params["parameters"]) == (None, 0, 0)
    assert "test/accuracy" in result.metrics


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_go_on_top(recipe: Path, data_arguments: Arguments) -> None:
    layer = recipe.stem.removesuffix("_narrow")
    layer = layer if (CONFIGS / "layer" / f"{layer}.yaml").is_file() else "fff"
    pieces = ["data/digits", "model/one_cycle", "trainer/averaged", f"layer/{layer}"]
    if recipe.stem.startswith("paper"):  # a whole protocol, not ours
        pieces = ["data/digits", "layer/fff"]
    data = []
    if recipe.stem == "text":
        pieces, data = ["data/text_gcide", "layer/fff"], data_arguments(CONFIGS / "data/text_gcide.yaml")
    if recipe.stem == "regression":
        pieces = ["data/table_regression", "layer/fff"]
    configs = [f"--config={CONFIGS / piece}.yaml" for piece in pieces]
    result = build(["fit", *configs, f"--config={recipe}", *data])
    recipe_model = model_of(recipe)
    if "optimizer" in recipe_model:
        assert result.params["optimizer.lr"] == recipe_model["optimizer"]["init_args"]["lr"]
        if recipe_model["optimizer"].get("class_path") == "torch.optim.SGD":
            assert result.params["optimizer.weight_decay"] == 0, "plain SGD as the paper prints it"
    for name in recipe_model.get("aux_weights", {}):
        assert f"aux_weights.{name}" in result.params


def test_the_default_optimizer_will_do_without_a_model_config() -> None:
    configs = [f"--config={CONFIGS / piece}.yaml" for piece in ("data/digits", "layer/ff")]
    assert run(["fit", *configs, *SHORT, "--test=false"], Context(quiet=True)) is not None


@pytest.mark.parametrize("model", [[], [f"--config={CONFIGS}/model/one_cycle.yaml"]])
def test_an_optimizer_of_ones_own_takes_nothing_from_the_default(model: list[str]) -> None:
    configs = [f"--config={CONFIGS / piece}.yaml" for piece in ("data/digits", "layer/ff")]
    own = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.2"]
    result = run(["fit", *configs, *model, *own, *SHORT, "--test=false"], Context(quiet=True))
    assert result is not None
    assert (result.params["optimizer"], result.params["optimizer.lr"]) == ("SGD", 0.2)
    assert result.params["optimizer.weight_decay"] == 0, "AdamW's weight decay of 0.01 is not SGD's"


@pytest.mark.parametrize("data", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_data_config_is_accepted_without_a_network(
    data: Path, data_arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    if data.stem == "text_tinystories":
        pytest.skip("its text is on the hub, and its length is known only there")
    recipe = "text" if data.stem.startswith("text") else "regression" if "regression" in data.stem else "common"
    pieces = (f"recipe/{recipe}", "layer/fff")
    configs = [f"--config={path}" for path in (data, *(CONFIGS / f"{piece}.yaml" for piece in pieces))]
    build(["fit", *configs, *data_arguments(data)])


def test_every_config_is_run_here() -> None:
    known = {
        *EXPERIMENTS,
        *LAYERS,
        CONFIGS / "layer/none.yaml",
        *RECIPES,
        *(CONFIGS / "recipe" / "weights").glob("*.yaml"),
        *(CONFIGS / "data").glob("*.yaml"),
    }
    known |= {CONFIGS / f"{piece}.yaml" for piece in ("model/gpt", "model/one_cycle", "model/vit", "trainer/averaged")}
    assert set(CONFIGS.rglob("*.yaml")) == known
    assert STUDIES


@pytest.mark.parametrize("path", STUDIES_IN_TIERS, ids=lambda path: path.stem)
def test_a_study_is_sound_to_the_corners_of_its_space(path: Path, data_arguments: Arguments) -> None:
    spec = load(path)
    assert spec.name == path.stem
    assert spec.text == path.read_text()
    extra = [arg for config in spec.configs for arg in data_arguments(spec.folder / config)]
    for layer, part in spec.layers.items():
        corners = spec.corners(layer)
        assert len(corners) > 1
        for values in (corners[0], corners[-1]):
            assert set(values) == set(part.space)
            build([*spec.arguments(layer, values, spec.seeds[0], test=False), *extra])


def test_the_layers_of_a_study_are_those_of_its_configs() -> None:
    for path in STUDIES:
        spec = load(path)
        for layer, part in spec.layers.items():
            (config, *_) = part.files
            found = model_of(spec.folder / config)["layer"]
            if layer in fffexp.layers.__all__:  # another label says more than the class
                assert found["class_path"] == f"fffexp.layers.{layer}"
