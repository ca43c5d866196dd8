"""Exceptions that need care to travel."""

import threading


class TwoArguments(Exception):
    """Cannot be unpickled the usual way."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what} ({code})")
        self.code = code


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class ShardError(Exception):
    def __init__(self, shard: str) -> None:
        super().__init__(f"{shard} is truncated")


class FrozenError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("frozen")


class DecodeError(UnicodeDecodeError):
    def __init__(self) -> None:
        super().__init__("utf-8", b"\xff", 0, 1, "bad start")


class DiskError(OSError):
    def __init__(self, where: str) -> None:
        super().__init__(5, f"{where} is broken")
