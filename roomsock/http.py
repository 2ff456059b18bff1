"""The HTTP values a user meets: the request that opened a connection, and plain responses.

No I/O and no protocol here: ``protocol/handshake.py`` makes requests and writes responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from mimetypes import guess_type
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from .errors import Headers, header_pairs

Address = tuple[str, int]


class MultiMapping(Mapping[str, str]):
    """A read-only mapping in which a name may have several values; ``[name]`` is the first."""

    __slots__ = ("_fold", "_values")

    def __init__(
        self, pairs: Iterable[tuple[str, str]], *, fold: Callable[[str], str] = str
    ) -> None:
        self._fold = fold
        # A dictionary, because the client decides how many names there are to look through.
        self._values: dict[str, list[str]] = {}
        for name, value in pairs:
            self._values.setdefault(fold(name), []).append(value)

    def __getitem__(self, name: str) -> str:
        return self._values[self._fold(name)][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def getall(self, name: str) -> list[str]:
        """All values of a name, in the order they came; empty when there are none."""
        return list(self._values.get(self._fold(name), ()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._values!r})"


class Request:
    """The HTTP request that opened a connection, parsed as it is used.

    The headers are kept as one block of bytes until somebody asks: an idle connection holds
    0.6 KiB for them instead of 2.6.

    Attributes:
        method: ``"GET"``, ``"HEAD"`` or ``"POST"``.
        target: The request target as it was sent.
        path: The decoded path, without the query.
        client: ``(host, port)`` of the client; None on a unix socket. That is who is connected to
            the server, or who a trusted proxy says it acts for: then the port may be 0, unknown
            (``trusted_proxies`` of `serve`).
        scheme: ``"http"`` or ``"https"`` (for WebSockets they mean ws and wss), of the connection
            or as a trusted proxy says.
        body: The body, of whatever method; empty when there is none.
    """

    __slots__ = ("_header_block", "body", "client", "method", "path", "scheme", "target")

    # The header block holds "name:value" lines joined by newlines; h11 has checked that neither
    # holds one, and has lower-cased the names.
    def __init__(
        self,
        method: str,
        target: str,
        path: str,
        header_block: bytes,
        *,
        client: Address | None = None,
        scheme: str = "http",
        body: bytes = b"",
    ) -> None:
        self.method = method
        self.target = target
        self.path = path
        self.client = client
        self.scheme = scheme
        self.body = body
        self._header_block = header_block

    @property
    def headers(self) -> MultiMapping:
        """The headers: names in any case, ``[name]`` the first value, ``getall`` every one."""
        lines = self._header_block.decode("latin-1").split("\n") if self._header_block else []
        return MultiMapping(
            ((name, value) for name, _, value in (line.partition(":") for line in lines)),
            fold=str.lower,
        )

    def _getall(self, start: bytes) -> list[str]:
        """``headers.getall`` of a name, in lower case and with the colon behind it, without taking
        the other headers apart."""
        if start not in self._header_block:
            return []
        lines = self._header_block.split(b"\n")
        return [line[len(start) :].decode("latin-1") for line in lines if line.startswith(start)]

    @property
    def subprotocols(self) -> tuple[str, ...]:
        """The WebSocket sub-protocols the client offered, in its order."""
        offers = self._getall(b"sec-websocket-protocol:")
        return tuple(token for token in map(str.strip, ",".join(offers).split(",")) if token)

    @property
    def query(self) -> MultiMapping:
        """The values behind ``?`` in the target, percent-decoded."""
        # No bound on the fields, which would raise in the handler: the target's own limit is one.
        return MultiMapping(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def cookies(self) -> MultiMapping:
        """The cookies the client sent, each as it is but for quotes around it; of equal names
        ``[name]`` is the one with the longest path (RFC 6265, section 5.4)."""
        # Not by http.cookies: it gives up at the first cookie outside its grammar, so that somebody
        # else's on the same domain would hide ours, and takes 1.2 s for 16 KiB of backslashes.
        cookies = ";".join(self._getall(b"cookie:")).split(";")
        pairs = (cookie.partition("=") for cookie in cookies)
        return MultiMapping(
            (name.strip(), value.strip(' \t"')) for name, equals, value in pairs if equals
        )

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.target!r} from {self.client}>"


@dataclass(frozen=True)
class Response:
    """What an HTTP handler may return for full control.

    Attributes:
        body: Bytes, or text that is sent as UTF-8.
        status: The HTTP status, 200 to 599.
        headers: ``(name, value)`` pairs, also given as a mapping; ``content-type`` among them
            replaces the default, which is plain text.

    Raises:
        ValueError: The status is outside 200-599.
        TypeError: The body is neither text nor bytes, or the headers are no such pairs.
    """

    body: str | bytes = b""
    status: int = 200
    headers: Headers = ()

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599:
            raise ValueError(f"a response has a status from 200 to 599, not {self.status}")
        if not isinstance(self.body, str | bytes):
            raise TypeError(f"a response's body is str or bytes, not {type(self.body).__name__}")
        object.__setattr__(self, "headers", header_pairs(self.headers))

    @cached_property
    def content(self) -> bytes:
        """The body as bytes."""
        return self.body.encode() if isinstance(self.body, str) else self.body

    @classmethod
    def of(cls, value: Any, to_json: Callable[[Any], bytes] = msgspec.json.encode) -> Response:
        """Turn what an HTTP handler returned into a response.

        A str is HTML, a dict JSON, a Path the content of that file, read here and now.

        Raises:
            TypeError: The value is no str, bytes, dict, Path or Response, or a dict that JSON has
                no form for.
            OSError: A Path that is there but cannot be read; one that is not gives 404.
        """
        match value:
            case Response():
                return value
            case str():
                return cls(value, headers=(("content-type", "text/html; charset=utf-8"),))
            case bytes():
                return cls(value, headers=(("content-type", "application/octet-stream"),))
            case dict():
                json = to_json(value)
                return cls(json, headers=(("content-type", "application/json"),))
            case Path():
                kind, encoding = guess_type(value.name)
                if kind is None or encoding is not None:  # what is in a .tar.gz is not what it is
                    kind = "application/octet-stream"
                if kind.startswith("text/"):
                    kind += "; charset=utf-8"
                try:
                    return cls(value.read_bytes(), headers=(("content-type", kind),))
                except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                    return cls("no such file\n", 404)  # which file is asked for may be the peer's
        raise TypeError(
            f"an HTTP handler returns str, bytes, dict, Path or Response, not {type(value)!r}"
        )
