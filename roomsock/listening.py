"""Where a server listens: addresses, paths and TLS files in, sockets and an SSL context out.

Knows no server. What `listen` returns belongs to the caller, who gives it to `close_all`.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Union

import anyio

from .errors import SetupError

#: An address that this machine does not have, or of a family that it does not know.
ABSENT = frozenset((errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT))

#: Connections that the kernel keeps until they are accepted (listen(2)).
BACKLOG = 2048

#: Where something listens: ``(host, port)``, or a unix socket's path.
Address = Union[tuple[str, int], str]
Sockets = Union[socket.socket, int, Sequence[Union[socket.socket, int]]]
TLS = Union[ssl.SSLContext, tuple[Union[str, os.PathLike[str]], Union[str, os.PathLike[str]]]]


def tls_context(tls: TLS | None) -> ssl.SSLContext | None:
    """Return the context to serve with; None is for who serves without TLS.

    Raises:
        SetupError: It is no context for a server, or the files are no certificate and its key.
        OSError: A file cannot be read.
    """
    if isinstance(tls, ssl.SSLContext):
        try:  # here, and not at the first client
            tls.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
        except ssl.SSLError as error:
            raise SetupError(f"tls is no context for a server: {error}") from None
    if tls is None or isinstance(tls, ssl.SSLContext):
        return tls
    if isinstance(tls, str):
        raise SetupError(f"tls is an ssl.SSLContext, or (certificate file, key file), not {tls!r}")
    certificate, key = tls
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    for path in (certificate, key):  # else an error says not of which
        with open(path, "rb"):
            pass
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        text = f"{certificate} and {key} are no certificate chain and its private key: {error}"
        raise SetupError(text) from None
    return context


async def listen(
    host: str | Sequence[str] | None,
    port: int,
    unix: str | os.PathLike[str] | None,
    sock: Sockets | None,
) -> list[socket.socket]:
    """Listen where the arguments of `serve` say, without blocking.

    The given sockets are ours from now on: they are closed if anything fails. The file of a unix
    socket that nobody listens on any more is replaced, any other file is left alone.

    Raises:
        SetupError: The arguments contradict each other, or name nothing.
        OSError: An address cannot be listened on; it is the error's ``filename``.
    """
    if unix is not None and sock is not None:
        raise SetupError("unix and sock exclude each other")
    listeners: list[socket.socket] = []
    try:
        if sock is not None:
            given = sock if isinstance(sock, Sequence) else [sock]
            listeners.extend(socket.socket(fileno=s) if isinstance(s, int) else s for s in given)
        elif unix is not None:
            with _named(unix):
                listeners.append(_UnixListener(os.fspath(unix)))
        else:
            await _listen_tcp(host, port, listeners)
        if not listeners:
            raise SetupError("nothing to listen on: host or sock is empty")
        for listener in listeners:
            listener.setblocking(False)
            with _named(shown(address_of(listener))):
                listener.listen(BACKLOG)
    except BaseException:
        close_all(listeners)
        raise
    return listeners


async def _listen_tcp(
    host: str | Sequence[str] | None, port: int, listeners: list[socket.socket]
) -> None:
    bound: set[Any] = set()
    for name in [host] if host is None or isinstance(host, str) else host:
        absent: OSError | None = None
        with _named(name):
            found = await anyio.getaddrinfo(
                name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        for family, _, _, _, address in found:
            if address in bound:  # two names may mean the same
                continue
            # With port 0 all addresses get the port that the system chose for the first.
            chosen = listeners[0].getsockname()[1] if listeners else port
            try:
                with _named(shown((address[0], chosen))):
                    listeners.append(_bound(family, (address[0], chosen, *address[2:])))
                bound.add(address)
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                absent = error
        # "localhost" may have an IPv6 address where the machine (a container) has none.
        if absent is not None and not any(address in bound for *_, address in found):
            raise absent


@contextmanager
def _named(place: object) -> Iterator[None]:
    """An OSError of a socket does not say of which address it speaks."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = place
        raise


def _bound(family: int, address: Any) -> socket.socket:
    listener = _Listener(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


class _Listener(socket.socket):
    """A socket that knows what it is: ``accept`` asks for each connection, and Python's own looks
    up two enumerations then, which is a third of what accepting takes."""

    family = type = proto = None  # type: ignore[assignment]  # of each instance its own

    def __init__(self, family: int, kind: int) -> None:
        super().__init__(family, kind)
        self.family, self.type, self.proto = family, kind, 0


class _UnixListener(_Listener):
    """A unix socket at a path; its file goes with it, but nobody else's that took its place."""

    def __init__(self, path: str) -> None:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                _remove_dead_socket(path)
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = path
        self._file: os.stat_result | None = None
        try:
            self.bind(path)
            self._file = os.stat(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the file first: a server that starts meanwhile finds us living, or nothing, and
        has not yet put a file of its own there."""
        if self._file is not None:
            with suppress(OSError):
                if os.path.samestat(os.stat(self._path), self._file):
                    os.unlink(self._path)
            self._file = None
        super().close()


def _remove_dead_socket(path: str) -> None:
    """Remove what a server that was killed left behind; a living server's socket is not ours."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except BlockingIOError:  # its queue is full (connect(2)), so it lives
            pass


def close_all(listeners: Iterable[socket.socket]) -> None:
    """Close them, and wake who waits for them; those that are closed already are passed over."""
    for listener in listeners:
        if listener.fileno() >= 0:
            anyio.notify_closing(listener)
            listener.close()


def address_of(listener: socket.socket) -> Address:
    """Return where a socket listens."""
    name = listener.getsockname()
    if isinstance(name, bytes):  # an abstract unix socket (unix(7))
        return os.fsdecode(name)
    return (name[0], name[1]) if isinstance(name, tuple) else name


def shown(address: Address, scheme: str = "") -> str:
    """An address as people read it; ``scheme`` such as ``"https://"``."""
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address
    return f"{scheme}[{host}]:{port}" if ":" in host else f"{scheme}{host}:{port}"
