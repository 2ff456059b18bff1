"""What addresses, paths, sockets, descriptors and TLS files become, and which of them are refused.

Serving on them is tested in test_server.py.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from roomsock import SetupError
from roomsock.listening import Address, address_of, close_all, listen, shown, tls_context

from .client import PATIENCE


@asynccontextmanager
async def listening(
    host: Any = "127.0.0.1", port: int = 0, *, unix: Any = None, sock: Any = None
) -> AsyncIterator[list[socket.socket]]:
    listeners = await listen(host, port, unix, sock)
    try:
        yield listeners
    finally:
        close_all(listeners)


async def is_reached(listener: socket.socket, address: Any = None) -> bool:
    with socket.socket(listener.family) as client:
        client.connect(address or listener.getsockname())
        with anyio.fail_after(PATIENCE):
            await anyio.wait_readable(listener)
        accepted, _ = listener.accept()
        accepted.close()
        assert (accepted.family, accepted.type) == (client.family, client.type)
    return not listener.getblocking()


# Hosts and ports


async def test_host_none_listens_on_all_interfaces() -> None:
    async with listening(None) as listeners:
        places = {address_of(listener)[0]: listener for listener in listeners}
        assert set(places) == {"0.0.0.0", "::"}
        for there, host in ("0.0.0.0", "127.0.0.1"), ("::", "::1"):
            assert await is_reached(places[there], (host, address_of(places[there])[1]))


async def test_a_host_twice_listens_once() -> None:
    async with listening(["127.0.0.1", "127.0.0.1"]) as listeners:
        assert len(listeners) == 1


async def test_a_name_that_does_not_resolve_is_an_oserror() -> None:
    with pytest.raises(socket.gaierror):
        await listen("no-such-host.invalid", 0, None, None)


@pytest.mark.parametrize("arguments", [{"host": []}, {"sock": []}])
async def test_nothing_at_all_is_a_setup_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match="host or sock is empty"):
        async with listening(**arguments):
            pytest.fail("never entered")


async def test_an_address_that_is_not_this_machines_is_an_oserror() -> None:
    # RFC 5737: for documentation, nobody's
    with pytest.raises(OSError, match=r"assign.*'203\.0\.113\.7:"):
        await listen(["127.0.0.1", "203.0.113.7"], 0, None, None)


async def test_a_name_listens_on_those_of_its_addresses_that_are_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def found(*_: object, **__: object) -> list[Any]:
        places = ("203.0.113.7", 0), ("127.0.0.1", 0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", place) for place in places]

    monkeypatch.setattr(anyio, "getaddrinfo", found)
    async with listening("some.name") as (listener,):
        assert await is_reached(listener)


async def test_what_cannot_be_listened_on_is_named(tmp_path: Path) -> None:
    for name, arguments in {
        "nobody.invalid": {"host": "nobody.invalid"},  # RFC 6761, section 6.4
        "no/such": {"unix": tmp_path / "no" / "such"},
    }.items():
        with pytest.raises(OSError, match=name):
            async with listening(**arguments):
                pytest.fail("never entered")


@pytest.mark.parametrize(
    ("address", "scheme", "text"),
    [
        (("127.0.0.1", 80), "", "127.0.0.1:80"),
        (("::1", 80), "https://", "https://[::1]:80"),
        ("/run/socket", "https://", "unix:/run/socket"),
    ],
)
def test_an_address_is_shown_as_people_read_it(address: Address, scheme: str, text: str) -> None:
    assert shown(address, scheme) == text


# Unix sockets


async def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    assert path.exists()
    async with listening(unix=str(path)) as (listener,):
        assert await is_reached(listener)


@pytest.mark.parametrize("backlog", [5, 0])
async def test_a_living_unix_socket_is_refused(tmp_path: Path, backlog: int) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as living, socket.socket(socket.AF_UNIX) as waiting:
        living.bind(str(path))
        living.listen(backlog)
        # Where the queue holds one, this fills it: a blocking probe would wait for ever.
        waiting.connect(str(path))
        with pytest.raises(OSError, match="in use"):
            await listen(None, 0, path, None)
    assert path.exists()


async def test_a_file_in_the_way_of_a_unix_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        await listen(None, 0, path, None)
    assert path.read_text() == "precious"


async def test_a_unix_socket_that_took_its_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with listening(unix=path):
        path.unlink()
        successor = socket.socket(socket.AF_UNIX)
        successor.bind(str(path))
    assert path.exists()
    successor.close()


async def test_a_unix_socket_that_somebody_removed_is_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with listening(unix=path):
        path.unlink()


# Inherited sockets


async def test_one_inherited_descriptor() -> None:
    inherited = socket.socket()
    inherited.bind(("127.0.0.1", 0))  # neither listening nor non-blocking, as systemd may pass it
    async with listening(sock=inherited.detach()) as (listener,):
        assert await is_reached(listener)


async def test_an_inherited_unix_socket_keeps_its_path(tmp_path: Path) -> None:
    """It is its maker's: systemd listens on it again after us."""
    path = tmp_path / "socket"
    inherited = socket.socket(socket.AF_UNIX)
    inherited.bind(str(path))
    async with listening(sock=inherited) as (listener,):
        assert await is_reached(listener)
    assert inherited.fileno() == -1
    assert path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="abstract names exist on Linux")
async def test_an_inherited_abstract_socket_has_a_name() -> None:
    inherited = socket.socket(socket.AF_UNIX)
    inherited.bind("")
    name = inherited.getsockname()
    async with listening(sock=inherited) as (listener,):
        assert address_of(listener) == name.decode()
        assert await is_reached(listener)


async def test_a_descriptor_that_is_no_socket_is_an_oserror_and_leaks_nothing() -> None:
    inherited = socket.create_server(("127.0.0.1", 0))
    read_end, write_end = os.pipe()
    os.close(write_end)
    with pytest.raises(OSError, match="socket"):
        await listen(None, 0, None, [inherited, read_end])
    os.close(read_end)
    assert inherited.fileno() == -1


async def test_unix_and_sock_exclude_each_other(tmp_path: Path) -> None:
    with socket.socket() as sock, pytest.raises(SetupError, match="exclude"):
        await listen(None, 0, tmp_path / "socket", sock)


# TLS


def test_no_tls_is_no_context() -> None:
    assert tls_context(None) is None


def test_tls_files_that_are_missing_are_an_oserror(tmp_path: Path) -> None:
    chain, key = tmp_path / "chain", tmp_path / "key"
    for missing in chain, key:
        with pytest.raises(FileNotFoundError) as caught:
            tls_context((chain, key))
        assert caught.value.filename == str(missing)
        missing.write_text("no certificate")
    with pytest.raises(SetupError, match=r"/chain and .*/key are no certificate chain"):
        tls_context((chain, key))


def test_a_context_for_clients_is_refused_at_once() -> None:
    with pytest.raises(SetupError, match="server"):
        tls_context(ssl.create_default_context())


def test_tls_is_no_single_file() -> None:
    file: Any = "cert.pem"
    with pytest.raises(SetupError, match="certificate file, key file"):
        tls_context(file)
