"""A cluster that grows: Ray's fake autoscaler, which starts raylets on this machine."""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from tests.clusters.started import ray_start

_HEAD_NODE_ID = "f" * 51 + "00000"
_LISTS = (
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "initialization_commands",
    "cluster_synced_files",
)


@contextlib.contextmanager
def growing(
    folder: Path, node_types: dict[str, dict[str, float]], most: int, *, v2: bool
) -> Iterator[str]:
    """The address of a head with one CPU that may start up to `most` nodes of each type."""
    with socket.socket() as free:
        free.bind(("", 0))
        address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    config = folder / "autoscaler.yaml"
    config.write_text(json.dumps(_config(address, node_types, most)))  # JSON is YAML
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": str(int(v2)),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_NODE_ID,
        "RAY_CLOUD_INSTANCE_ID": _HEAD_NODE_ID,
    }
    arguments = ["--head", "--num-cpus=1", "--include-dashboard=false"]
    arguments += [f"--port={address.rpartition(':')[2]}", f"--autoscaling-config={config}"]
    with ray_start(*arguments, environment=environment):
        yield address


def _config(address: str, node_types: dict[str, dict[str, float]], most: int) -> dict[str, Any]:
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    head = "ray.head.default"  # the provider knows no other
    kinds = {head: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}}
    for name, resources in node_types.items():
        kinds[name] = {"resources": resources, "node_config": {}, "max_workers": most}
    return {
        "cluster_name": "fake",
        "max_workers": most * len(node_types),
        "idle_timeout_minutes": 5,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": module,
            "gcs_address": address,
            "launch_multiple": True,
        },
        "available_node_types": kinds,
        "head_node_type": head,
        "file_mounts": {},
        "auth": {},
        "docker": {},
        **{name: [] for name in _LISTS},
    }
