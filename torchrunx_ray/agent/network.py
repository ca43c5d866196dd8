"""Which network interface a host is known by."""

import array
import fcntl
import socket
import struct

_SIOCGIFCONF = 0x8912
_NAME_BYTES, _ADDRESS_AT = 16, 20
_ENTRY = struct.Struct("16s24s")
"""An ifreq: the name, and the address in a union of this size."""

_MOST = 1024
"""Addresses of one host."""


def interface_of(ip: str) -> str | None:
    """The interface that has this IPv4 address, as its first or a further one; None where none has."""
    buffer = array.array("B", bytes(_MOST * _ENTRY.size))
    address, _ = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("iP", len(buffer), address)
        filled, _ = struct.unpack("iP", fcntl.ioctl(sock.fileno(), _SIOCGIFCONF, request))
    for start in range(0, filled, _ENTRY.size):
        entry = buffer[start : start + _ENTRY.size].tobytes()
        if socket.inet_ntoa(entry[_ADDRESS_AT : _ADDRESS_AT + 4]) == ip:
            label = entry[:_NAME_BYTES].rstrip(b"\0").decode()
            return label.partition(":")[0]  # as in eth0:1
    return None
