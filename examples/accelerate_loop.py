"""A training loop with Hugging Face Accelerate: a tiny BERT, made from a config, learns to classify sequences."""

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import torchrunx_ray as trx


def make_data(samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return sequences of 6 tokens; the label is 1 if any token is token 1."""
    ids = torch.randint(8, (samples, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": i, "labels": (i == 1).any().long()} for i in ids]


def make_model() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=8,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def train(epochs: int, batch_size: int) -> tuple[list[float], int, int]:
    """Return the mean loss of each epoch, the number of correctly classified new sequences, and their total."""
    set_seed(0)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without this, CPU workers would train alone
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    model = make_model()
    loader = DataLoader(make_data(512, 0), batch_size // accelerator.num_processes, shuffle=True)
    model, optimizer, loader, new_sequences = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.003),
        loader,
        DataLoader(make_data(101, 1), batch_size),
    )
    losses: list[float] = []
    for _ in range(epochs):
        seen: list[torch.Tensor] = []
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(accelerator.reduce(loss.detach(), "mean"))
        losses.append(torch.stack(seen).mean().item())

    right: list[torch.Tensor] = []
    for batch in new_sequences:
        with torch.no_grad():
            said = model(**batch).logits.argmax(dim=1)
        right.append(accelerator.gather_for_metrics(said == batch["labels"]))
    answers = torch.cat(right)
    return losses, int(answers.sum()), len(answers)


if __name__ == "__main__":
    result = trx.launch(
        train,
        func_kwargs={"epochs": 8, "batch_size": 32},
        hostnames=1,
        workers_per_host=2,
        preload=("torch", "torch.distributed", "accelerate", "transformers.modeling_utils"),
    )
    losses, right, sequences = result.rank(0)
    print("losses:", *(f"{loss:.6f}" for loss in losses))
    print(f"correct: {right} of {sequences}")
