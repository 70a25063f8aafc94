"""A port is found out to be free before anything heavy starts."""

from __future__ import annotations

import socket

import pytest

from qtoolkit.errors import RequestError
from qtoolkit.serve.address import choose_port, url


def test_port_0_becomes_a_free_port() -> None:
    port = choose_port("127.0.0.1", 0)
    assert port > 0
    assert choose_port("127.0.0.1", port) == port


def test_a_port_in_use_is_refused_with_its_number() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RequestError, match=f"Port {port} on 127.0.0.1 is in use"):
            choose_port("127.0.0.1", port)


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(RequestError, match="is not a port"):
        choose_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(RequestError, match="not an address of this machine"):
        choose_port("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80")],
)
def test_the_url_is_one_that_a_client_here_can_dial(host: str, expected: str) -> None:
    assert url(host, 80) == expected
