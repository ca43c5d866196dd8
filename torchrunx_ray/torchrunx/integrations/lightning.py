"""torchrunx's ClusterEnvironment for PyTorch Lightning."""

from torchrunx_ray.integrations.lightning import TorchrunxClusterEnvironment

__all__ = ["TorchrunxClusterEnvironment"]
