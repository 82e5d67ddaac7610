"""The tests' own guard: nothing beyond this machine can be reached from a test."""

import socket

import pytest


def test_a_server_elsewhere_cannot_be_reached():
    with pytest.raises(OSError, match="without a network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    with pytest.raises(OSError, match="without a network"):
        socket.getaddrinfo("example.org", 443)


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
