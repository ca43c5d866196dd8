"""A driver that has not the token of its Ray cluster is told so, and how to give it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

_LAUNCH = """
import torchrunx_ray as trx
try:
    trx.launch(print, hostnames=1, workers_per_host=1)
except trx.LaunchError as error:
    print(error)
"""

_HOW_TO_GIVE_IT = (
    "Set RAY_AUTH_MODE=token, and give the cluster's token: in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH "
    "names, or in ~/.ray/auth_token. `ray get-auth-token` on a node of the cluster prints the token."
)


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("RAY_AUTH_MODE") == "disabled", reason="the shared cluster asks for no token"
)
def test_driver_without_the_clusters_token_is_told_how_to_give_it(
    address: str, tmp_path: Path
) -> None:
    """Ray said after 20 s that it had failed to connect."""
    sent = {
        "this process sent none: RAY_AUTH_MODE is not set": {},
        "this process sent none: RAY_AUTH_MODE=disabled": {"RAY_AUTH_MODE": "disabled"},
        "this process has none: RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH are not set, and there is no "
        "~/.ray/auth_token": {"RAY_AUTH_MODE": "token"},
        "refused the token of this process, which is from RAY_AUTH_TOKEN": {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0" * 64,
        },
    }
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(lambda each: _launch(address, each, tmp_path), sent.values()))

    for words, text in zip(sent, said, strict=True):
        assert text.startswith(f"The Ray cluster at {address} "), text
        assert words in text
        assert text.strip().endswith(_HOW_TO_GIVE_IT)


def _launch(address: str, variables: Mapping[str, str], home: Path) -> str:
    others = {name: each for name, each in os.environ.items() if not name.startswith("RAY_AUTH_")}
    # Ray asks 20 times, once a second.
    ours = {"RAY_ADDRESS": address, "HOME": str(home), "RAY_NUM_REDIS_GET_RETRIES": "1"}
    return subprocess.run(
        [sys.executable, "-c", _LAUNCH],
        env={**others, **ours, **variables},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=100,
        check=False,
    ).stdout
