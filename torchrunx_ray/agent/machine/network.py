"""The network interface that has a host's address."""

import array
import fcntl
import socket
import struct

_SIOCGIFCONF = 0x8912
_NAME_BYTES, _ADDRESS_AT = 16, 20
_ENTRY = struct.Struct("16s24s")
"""An ifreq: the name, then the address in a union of this size."""

_MOST = 1024
"""Addresses of one host that are read at most."""


def interface_of(ip: str) -> str | None:
    """Return the interface with this IPv4 address, primary or secondary; None if no interface has it."""
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
