"""The Ray of one node that most tests share."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

_HOLD = """
import sys, ray
ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def shared_ray() -> Iterator[str]:
    """Hold a Ray in a process of its own; yields its address.

    A test can leave this Ray for another cluster and join it again. A Ray that the test's own process had
    started would end, and the next test would pay for a new one.
    """
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [sys.executable, "-c", _HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as holder,
    ):
        assert holder.stdin is not None
        assert holder.stdout is not None
        address = holder.stdout.readline().strip()
        said.seek(0)
        assert address, said.read()
        yield address
        holder.stdin.close()
        holder.wait(60)
