"""The workers' output, where torch's LogsSpecs want it."""

from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing import LogsDest

from torchrunx_ray.driver.output.to_destinations import Destinations
from torchrunx_ray.driver.terminal.console import TextStream


def destinations_of(
    logs: LogsDest,
    prefixes: Mapping[int, str],
    filters: Mapping[TextStream, Sequence[str]],
    first_rank: int,
) -> Destinations:
    """Return the places that a LogsSpecs has chosen. Workers are known by their index in the attempt."""
    return Destinations(
        files={"stdout": logs.stdouts, "stderr": logs.stderrs},
        tees={"stdout": list(logs.tee_stdouts), "stderr": list(logs.tee_stderrs)},
        prefixes=prefixes,
        filters=filters,
        filtered={
            "stdout": dict.fromkeys(prefixes, logs.filtered_stdout),
            "stderr": dict.fromkeys(prefixes, logs.filtered_stderr),
        },
        first_rank=first_rank,
    )
