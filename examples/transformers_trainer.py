"""A Hugging Face Trainer: a tiny Llama, made from a config, learns to count."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import torchrunx_ray as trx

NUMBERS = 32


class Counting(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that count up from any number, and continue with 0 after the last number."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) + index) % NUMBERS
        return {"input_ids": ids, "labels": ids}


def train(output_dir: str, batch_size: int) -> list[float]:
    """Return the losses that the Trainer logged; `batch_size` is the batch size of each worker."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=NUMBERS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    arguments = TrainingArguments(
        output_dir,
        per_device_train_batch_size=batch_size,
        num_train_epochs=5,
        learning_rate=0.01,
        logging_steps=16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # without this, CPU workers would train alone
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=Counting())
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def next_number(model_dir: str, numbers: list[int]) -> int:
    model = LlamaForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        return int(model(torch.tensor([numbers])).logits[0, -1].argmax())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as output_dir:
        result = trx.launch(
            train,
            (output_dir, 8),
            hostnames=1,
            workers_per_host=2,
            preload=(
                "torch",
                "torch.distributed",
                "transformers.trainer",
            ),  # imported once per host
        )
        print("losses:", *(f"{loss:.6f}" for loss in result.rank(0)))
        print("29 30 31 ->", next_number(output_dir, [29, 30, 31]))
