"""Hugging Face models with replaced MLPs, saved and loaded."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from fffexp import FF, FFF, convert_feedforward, load_pretrained, replace_feedforward

D, H = 16, 24
TREE = partial(FFF, depth=2, leaf_width=3)
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": H,
    "vocab_size": 50,
}
TOKENS = torch.arange(12).view(2, 6) + 3


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=D, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1))


def t5() -> PreTrainedModel:
    config = T5Config(vocab_size=50, d_model=D, d_kv=4, d_ff=H, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(config)


def logits(model: nn.Module) -> Tensor:
    given = {"input_ids": TOKENS} | (
        {"decoder_input_ids": TOKENS} if isinstance(model, T5ForConditionalGeneration) else {}
    )
    with torch.no_grad():
        return model.eval()(**given).logits


@pytest.mark.parametrize("make", [bert, gpt2, t5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_loaded(make: Callable[[], PreTrainedModel], dtype: torch.dtype, tmp_path: Path) -> None:
    model = make()
    nn.Module.to(model, dtype)
    replace_feedforward(model, TREE)
    before = logits(model)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    loaded = load_pretrained(tmp_path, TREE)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(logits(loaded), before)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_pretrained(tmp_path / "again", TREE)), before)
    if make is bert:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("how", [type(bert()), AutoModel])
def test_a_plain_from_pretrained_refuses(how: type[PreTrainedModel], tmp_path: Path) -> None:
    model = bert()
    replace_feedforward(model, TREE, select=lambda name, module: name.endswith("1"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quant"):
        how.from_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["fffexp"]
    assert entry["load"] == "fffexp.load_pretrained"
    assert list(entry["layers"]) == ["bert.encoder.layer.1"]
    assert "depth=2, leaf_width=3" in entry["layers"]["bert.encoder.layer.1"]


def test_several_replacements_and_conversions_are_saved(tmp_path: Path) -> None:
    model = bert()
    replace_feedforward(model, TREE, select=lambda name, module: name.endswith("1"))
    convert_feedforward(model, [TOKENS] * 10, TREE, steps=0)
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path, TREE)), before)


def test_a_part_of_what_was_replaced_is_saved(tmp_path: Path) -> None:
    model = gpt2()
    replace_feedforward(nn.ModuleDict({"outer": model}), TREE)
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path, TREE)), before)
    inner = model.base_model
    inner.save_pretrained(tmp_path / "inner")
    with pytest.raises(ValueError, match="quant"):
        AutoModel.from_pretrained(tmp_path / "inner")
    found = load_pretrained(tmp_path / "inner", TREE)
    assert type(found) is type(inner)
    with torch.no_grad():
        assert torch.equal(found(TOKENS)[0], inner.eval()(TOKENS)[0])


def test_a_part_that_was_replaced_is_saved_with_the_rest(tmp_path: Path) -> None:
    model: Any = bert()
    replace_feedforward(model.bert, TREE)
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path, TREE)), before)


def test_the_trainer_trains_and_resumes(tmp_path: Path) -> None:
    model = bert()
    replace_feedforward(model, TREE)
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    more: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    Trainer(model, TrainingArguments(max_steps=2, **more), train_dataset=data).train()
    loaded = load_pretrained(tmp_path / "checkpoint-2", TREE)
    assert torch.equal(logits(loaded), logits(model))
    Trainer(loaded, TrainingArguments(max_steps=4, **more), train_dataset=data).train(resume_from_checkpoint=True)
    assert not torch.equal(logits(loaded), logits(model))


def test_mistakes(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="names no replaced MLPs: load the model with from_pretrained"):
        load_pretrained(tmp_path / "plain", TREE)
    replace_feedforward(model, partial(FF, width=8))
    model.save_pretrained(tmp_path / "ours")
    for other in (TREE, partial(FF, width=9), partial(FF, width=8, activation=nn.GELU)):
        with pytest.raises(ValueError, match=r"the layer for bert\.encoder\.layer\.0 is .*; saved was FF.*width=8"):
            load_pretrained(tmp_path / "ours", other)
    (tmp_path / "ours" / "model.safetensors").rename(tmp_path / "ours" / "model.other")
    with pytest.raises(ValueError, match="not those of this model"):
        load_pretrained(tmp_path / "ours", partial(FF, width=8))


def test_a_model_that_was_not_changed_is_not_marked(tmp_path: Path) -> None:
    model = bert()
    with pytest.raises(ValueError, match="select takes none"):
        replace_feedforward(model, TREE, select=lambda name, module: False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(BertForMaskedLM.from_pretrained(tmp_path)), logits(model))
