"""The drop-in for torchrunx 0.4 with other libraries, as its documentation uses it.

There the driver builds the model, the data and the Trainer's arguments, and passes them on. The
model here is tiny and made from a config; the scripts ask for gloo, the CPU and localhost.
"""

import json
from collections.abc import Callable

import pytest

import torchrunx_ray.torchrunx as torchrunx

COMMON = """
import json
import os
import pathlib
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import torchrunx_ray.torchrunx as torchrunx

def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    ))

class Counting(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = (torch.arange(8) + index) % 32
        return {"input_ids": ids, "labels": ids}

def changed(model):
    before = make_model().state_dict()
    return any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())

launcher = torchrunx.Launcher(hostnames=["localhost"], workers_per_host=2, backend="gloo")
"""

TRANSFORMERS = """
from transformers import Trainer, TrainingArguments, trainer_utils

def train(model, train_dataset, training_args):
    trainer = Trainer(model=model, train_dataset=train_dataset, args=training_args)
    trainer.train()
    return (
        trainer_utils.get_last_checkpoint(training_args.output_dir),
        trainer.accelerator.num_processes,
        trainer.accelerator.process_index,
        trainer.state.global_step,
    )

if __name__ == "__main__":
    launcher.extra_env_vars = {"ACCELERATE_USE_CPU": "true"}  # as the docs say for CPUs
    arguments = TrainingArguments(
        "output", num_train_epochs=1, per_device_train_batch_size=8, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="epoch", learning_rate=0.01,
    )
    results = launcher.run(train, make_model(), Counting(), arguments)
    trained = LlamaForCausalLM.from_pretrained(results.rank(0)[0])
    print(json.dumps({"ranks": [value[1:] for value in results], "changed": changed(trained)}))
"""

ACCELERATE = """
from accelerate import Accelerator

def train(model, train_dataset, batch_size, output_dir):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.Adam(model.parameters())
    loader = torch.utils.data.DataLoader(train_dataset, batch_size=batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = 0
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        steps += 1
    accelerator.wait_for_everyone()
    accelerator.save_state(output_dir=str(output_dir), safe_serialization=False)
    return output_dir / "pytorch_model.bin", (
        accelerator.num_processes, accelerator.process_index, steps
    )

if __name__ == "__main__":
    results = launcher.run(train, make_model(), Counting(), 8, pathlib.Path("output").resolve())
    trained = make_model()
    trained.load_state_dict(torch.load(results.rank(0)[0]))
    print(json.dumps({"ranks": [value[1] for value in results], "changed": changed(trained)}))
"""

LIGHTNING = """
import lightning as L
from torchrunx_ray.torchrunx.integrations.lightning import TorchrunxClusterEnvironment

class Wrapper(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, *args):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

def train(model, train_dataset):
    trainer = L.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, strategy="ddp", logger=False,
        plugins=[TorchrunxClusterEnvironment()], enable_checkpointing=False,
        enable_progress_bar=False,
    )
    loader = torch.utils.data.DataLoader(train_dataset, batch_size=8)
    trainer.fit(model=Wrapper(model), train_dataloaders=loader)
    trainer.save_checkpoint("final.ckpt")
    return os.path.abspath("final.ckpt"), (
        trainer.world_size, trainer.global_rank, trainer.global_step
    )

if __name__ == "__main__":
    results = launcher.run(train, make_model(), Counting())
    trained = Wrapper(make_model())
    trained.load_state_dict(torch.load(results.rank(0)[0], weights_only=False)["state_dict"])
    print(json.dumps({"ranks": [value[1] for value in results], "changed": changed(trained.model)}))
"""


@pytest.mark.parametrize(
    "script", [TRANSFORMERS, ACCELERATE, LIGHTNING], ids=["transformers", "accelerate", "lightning"]
)
def test_what_the_driver_built_is_trained_by_all_workers_together(
    run_script: Callable[[str], list[str]], script: str
) -> None:
    said = json.loads(run_script(COMMON + script)[-1])

    steps = 64 // (2 * 8)
    assert said == {"ranks": [[2, 0, steps], [2, 1, steps]], "changed": True}


def test_lightning_environment_of_the_drop_in_knows_the_workers(cluster: None) -> None:
    def place() -> tuple[int, int, int]:
        from torchrunx_ray.torchrunx.integrations.lightning import TorchrunxClusterEnvironment

        environment = TorchrunxClusterEnvironment()
        return environment.global_rank(), environment.local_rank(), environment.world_size()

    result = torchrunx.Launcher(["localhost"], 2, backend="gloo").run(place)

    assert list(result) == [(0, 0, 2), (1, 1, 2)]
