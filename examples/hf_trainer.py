"""Trees in a BERT that the Trainer of Hugging Face trains: is there a token of the first half of the vocabulary?

python examples/hf_trainer.py
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fffexp import FFF, anneal, auxiliary_loss, replace_feedforward


class Sentences(Dataset[dict[str, Tensor]]):
    """Eight tokens of the vocabulary's second half, one of which is of the first half in every other sentence."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(50, 100, (count, 8), generator=generator)
        self.labels = torch.arange(count) % 2
        places = torch.randint(8, (count,), generator=generator)
        rows = self.labels.bool()
        self.tokens[rows, places[rows]] = torch.randint(50, (int(rows.sum()),), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class TreeTrainer(Trainer):
    """Adds the losses of the layers to that of the model."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:  # of a model that takes its own share of a batch, as this does, the Trainer adds up parts
            loss = loss + auxiliary_loss(model) / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class Harden(TrainerCallback):
    """Hardens the trees step by step."""

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        anneal(more["model"], state.global_step / state.max_steps)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = BertForSequenceClassification(config)
    replace_feedforward(model, partial(FFF, depth=3, leaf_width=16))
    arguments = TrainingArguments(
        output_dir="outputs/hf_trainer", num_train_epochs=8, per_device_train_batch_size=64, learning_rate=3e-3,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = TreeTrainer(
        model=model, args=arguments, train_dataset=Sentences(2000, 0), eval_dataset=Sentences(500, 1),
        compute_metrics=accuracy, callbacks=[Harden()],
    )  # fmt: skip
    trainer.train()
    print(f"test accuracy {100 * trainer.evaluate()['eval_accuracy']:.1f}%")


if __name__ == "__main__":
    main()
