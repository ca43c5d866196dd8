"""Explanations of errors about the token that a Ray cluster requires of its drivers."""

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError

from torchrunx_ray.errors import LaunchError
from torchrunx_ray.wire import foreign_errors

_HOW_TO_GIVE_IT = (
    "Set RAY_AUTH_MODE=token, and give the cluster's token: in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH "
    "names, or in ~/.ray/auth_token. `ray get-auth-token` on a node of the cluster prints the token."
)


def refusal(error: Exception) -> LaunchError | None:
    """Return the error to raise if ray.init() failed because of a missing or wrong token, else None."""
    reason = next((said for each in _chain(error) if (said := _reason(each))), "")
    address = foreign_errors.address_of_cluster(str(error)) or os.environ.get("RAY_ADDRESS", "")
    if not reason and isinstance(error, ConnectionError) and address.startswith("ray://"):
        reason = _reason_of_client_server(urlsplit(address).netloc)
    if not reason:
        return None
    return LaunchError(
        f"The Ray cluster{f' at {address}' * bool(address)} {_what_was_sent()}. Ray says: {reason}. {_HOW_TO_GIVE_IT}"
    )


def doubt(evidence: str) -> str:
    """Return an explanation if an actor never ran because only the driver has a token, else "".

    A cluster without a token lets a driver with a token join, and then cancels the driver's actors.
    """
    sends_one = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    source = _source() if sends_one and foreign_errors.has_never_run(evidence) else None
    if source is None:
        return ""
    return (
        f"This driver has a token (from {source}), and the cluster may have been started without a token. Restart the "
        "cluster with the token, or set RAY_AUTH_MODE=disabled for this script."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException) -> str:
    if isinstance(error, AuthenticationError):
        return str(error.message).rstrip(".")
    return foreign_errors.refused_token(str(error))


def _what_was_sent() -> str:
    """Return a clause that names the source of the token, in Ray's search order, or says that there is none."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() != "token":
        said = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set"
        return f"wants a token, and this process sent none: {said}"
    source = _source()
    if source is not None:
        return f"refused the token of this process, which is from {source}"
    return (
        "cannot be joined without a token, and this process has none: RAY_AUTH_TOKEN and "
        "RAY_AUTH_TOKEN_PATH are not set, and there is no ~/.ray/auth_token"
    )


def _source() -> str | None:
    """Return the name of the variable or file in which Ray finds this process's token, or None if there is none."""
    named = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    if named:
        return named[0]
    return "~/.ray/auth_token" if os.path.exists(os.path.expanduser("~/.ray/auth_token")) else None


def _reason_of_client_server(address: str) -> str:
    """Ask the server behind ray:// with the same token, since Ray's error only says that it did not connect."""
    # These private names of Ray may disappear. Ray's own error is then the only explanation.
    try:
        import grpc
        import ray._private.grpc_utils
        from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc
    except ImportError:
        return ""
    untyped_grpc: Any = grpc
    utils: Any = ray._private.grpc_utils
    pb2: Any = ray_client_pb2
    stubs: Any = ray_client_pb2_grpc
    try:
        with utils.init_grpc_channel(address) as channel:
            ping = pb2.ClusterInfoRequest(type=pb2.ClusterInfoType.PING)
            stubs.RayletDriverStub(channel).ClusterInfo(ping, timeout=5)
    except untyped_grpc.RpcError as error:
        if error.code() is untyped_grpc.StatusCode.UNAUTHENTICATED:
            return str(error.details()).rstrip(".")
    return ""
