"""Integration with PyTorch Lightning (`lightning`, or `pytorch_lightning` alone) in the workers of a launch."""

import os
from importlib import import_module
from importlib.util import find_spec
from types import new_class
from typing import Any

from torchrunx_ray.wire.environment import MARK

_FABRICS = {"lightning": "lightning.fabric", "lightning_fabric": "lightning_fabric"}
"""Modules that define a ClusterEnvironment, by package. The two classes are unrelated."""


def _base() -> Any:
    """Return a base class that is a ClusterEnvironment of every installed package."""
    kinds = tuple(
        import_module(f"{fabric}.plugins.environments").ClusterEnvironment
        for package, fabric in _FABRICS.items()
        if find_spec(package)
    )
    if not kinds:
        raise ImportError(
            "torchrunx_ray.integrations.lightning needs lightning or pytorch_lightning, and neither is "
            "installed here: pip install lightning",
            name="lightning",
        )
    return new_class("ClusterEnvironment", kinds)


_ClusterEnvironment = _base()


class TorchrunxClusterEnvironment(_ClusterEnvironment):
    """A plugin that makes a Trainer, or Fabric, use the workers of the launch as its processes.

    Pass it in `plugins`, with the workers per host as `devices` and the number of hosts as `num_nodes`. If created
    before any other object of Lightning, it also sets the rank for Lightning's rank-zero-only functions.
    """

    def __init__(self) -> None:
        if not self.detect():
            raise RuntimeError(
                "TorchrunxClusterEnvironment() was called outside of a launch: this process has no RANK. "
                "Call it in the function that torchrunx_ray launches."
            )
        super().__init__()  # pyright: ignore[reportUnknownMemberType]  # of a class made at run time
        # Lightning reads RANK when it is imported. In a template, where preload imports it, there is no RANK.
        rank_zero: Any = import_module("lightning_utilities.core.rank_zero")
        rank_zero.rank_zero_only.rank = self.global_rank()

    @staticmethod
    def detect() -> bool:
        return MARK in os.environ and "RANK" in os.environ

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    def world_size(self) -> int:
        return int(os.environ["WORLD_SIZE"])

    def global_rank(self) -> int:
        return int(os.environ["RANK"])

    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"])

    def node_rank(self) -> int:
        return int(os.environ["GROUP_RANK"])

    def set_world_size(self, size: int) -> None:
        """Do nothing: the launch has set the size, and `validate_settings` compares it."""

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the launch has set the rank."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise ValueError if Lightning would expect another number of processes than the launch has."""
        world_size = self.world_size()
        if num_devices * num_nodes == world_size:
            return
        hosts, workers = (
            int(os.environ[name]) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE")
        )
        said = (
            f"devices={num_devices}, num_nodes={num_nodes} make {num_devices * num_nodes} processes, "
            f"but this launch has {world_size} on {hosts} hosts, {workers} of them on this host."
        )
        advice = (
            f"Pass devices={workers}, num_nodes={hosts} to the Trainer."
            if workers * hosts == world_size
            else "Lightning needs the same number of workers on every host: give workers_per_host one number."
        )
        raise ValueError(f"{said} {advice}")
