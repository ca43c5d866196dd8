"""The Lightning part of the drop-in for torchrunx 0.4."""

import torchrunx_ray.torchrunx as torchrunx


def test_lightning_environment_of_the_drop_in_knows_the_workers(cluster: None) -> None:
    def place() -> tuple[int, int, int]:
        from torchrunx_ray.torchrunx.integrations.lightning import TorchrunxClusterEnvironment

        environment = TorchrunxClusterEnvironment()
        return environment.global_rank(), environment.local_rank(), environment.world_size()

    result = torchrunx.Launcher(["localhost"], 2, backend="gloo").run(place)

    assert list(result) == [(0, 0, 2), (1, 1, 2)]
