"""Who a request comes from, when it comes through proxies.

Sans-IO: addresses and the text of headers in, an address and a scheme out. May import the standard
library, and roomsock's errors and http.

Forwarded: RFC 7239. X-Forwarded-For has no standard; what it is, is what proxies write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import islice

from roomsock.errors import SetupError
from roomsock.http import Address, MultiMapping

HEADERS = ("x-forwarded-for", "forwarded")

# Nobody has so many proxies in a row; 2,000 trusted entries took 40 ms to look at (measured).
_MAX_HOPS = 32

_SCHEMES = {"http": "http", "ws": "http", "https": "https", "wss": "https"}

# RFC 7239, section 6, and "::1" without brackets, as X-Forwarded-For has it, which is the rest. A
# port may be a pseudonym.
_NODE = re.compile(r"(?:\[([^]]+)\]|([^:[]+))(?::(?:([0-9]{1,5})|_[A-Za-z0-9._-]+))?")

_BLANKS = " \t"
_QUOTED = str.maketrans(",;", "__")


class TrustedProxies:
    """The proxies that are believed when they say whom they act for.

    Each proxy appends the address of its own client to what that client sent. So the header is
    read from the right, and only as far as who wrote it is trusted: nothing that a client sends
    can stand to the right of what the first trusted proxy wrote about it.

    Args:
        proxies: Addresses and networks of proxies; ``"unix"`` for whoever connects to a unix
            socket.
        header: The one header that is believed: ``"x-forwarded-for"`` or ``"forwarded"``.

    Raises:
        SetupError: One of them is none of these, or trusts everybody.
    """

    def __init__(self, proxies: Iterable[str] = (), header: str = HEADERS[0]) -> None:
        self._header = str(header).lower()
        if self._header not in HEADERS:
            names = " or ".join(f'"{name}"' for name in HEADERS)
            raise SetupError(f"forwarded_header is {names}, not {header!r}")
        if isinstance(proxies, str) or not isinstance(proxies, Iterable):
            raise SetupError(f'trusted_proxies is a list such as ["127.0.0.1"], not {proxies!r}')
        self._unix = False
        self._networks: list[IPv4Network | IPv6Network] = []
        for proxy in proxies:
            if proxy == "unix":
                self._unix = True
            else:
                self._networks.append(_network(proxy))

    def trusts(self, client: Address | None) -> bool:
        """Whether this is the address of a trusted proxy; None is who comes by a unix socket."""
        if client is None:
            return self._unix
        if not self._networks:
            return False
        address = _parse(client[0])
        return address is not None and any(address in network for network in self._networks)

    def identify(
        self, peer: Address | None, headers: MultiMapping
    ) -> tuple[Address | None, str | None]:
        """Find out who sent a request, and by which scheme.

        What cannot be read (a pseudonym, ``unknown``, nothing, nonsense) ends the search at the
        trusted proxy that wrote it: whatever is left of it may be the client's own invention. So
        do 32 proxies in a row.

        Args:
            peer: Who is connected to us.
            headers: The request's.

        Returns:
            The first address from the right that is no trusted proxy's, in its normal form, the
            leftmost if all are, or the peer if it is none itself; a port that is not known is 0.
            And ``"http"`` or ``"https"``, or None if no trusted proxy said.
        """
        client, scheme = peer, None
        if self.trusts(peer):
            value = ",".join(headers.getall(self._header))
            if self._header == "forwarded":
                hops = _forwarded(value)
            else:
                # Our peer wrote the last one, if its client sent some as well.
                proto = ",".join(headers.getall("x-forwarded-proto")).rpartition(",")[2]
                hops = ((node, proto) for node in reversed(value.split(",")))
            for node, proto in islice(hops, _MAX_HOPS):
                scheme = _SCHEMES.get(proto.strip(_BLANKS).lower(), scheme)
                hop = _address(node.strip(_BLANKS))
                if hop is None:
                    break
                client = hop
                if not self.trusts(hop):
                    break
        return client, scheme


def counted_as(host: str) -> str:
    """Return what one client may change at will in its address, and so counts as one with it: an
    IPv4 address is alone, an IPv6 one counts with its /64 network, the least a subscriber gets
    (RFC 6177; RFC 4291, section 2.5.4)."""
    address = _parse(host)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((int(address) >> 64 << 64, 64)))
    return host if address is None else str(address)


def neighbour(peer: Address | None) -> str | None:
    """Return how ``trusted_proxies`` names a peer on this machine; None for one that is not."""
    if peer is None:
        return "unix"
    address = _parse(peer[0])
    return str(address) if address is not None and address.is_loopback else None


def _network(proxy: str) -> IPv4Network | IPv6Network:
    if not isinstance(proxy, str) or "%" in proxy:  # ipaddress takes numbers, and drops zones
        raise SetupError(f'trusted_proxies has addresses, networks and "unix", not {proxy!r}')
    try:
        network = ip_network("::/0" if proxy == "*" else proxy)
    except ValueError as error:
        raise SetupError(f"trusted_proxies: {error}") from None
    if not network.prefixlen:
        raise SetupError(f"trusted_proxies: {proxy!r} would let any client choose its address")
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise SetupError(f"trusted_proxies: write {proxy!r} as IPv4")
    return network


def _parse(host: str) -> IPv4Address | IPv6Address | None:
    """Read an address, without its zone; what is mapped into IPv6 is IPv4 (RFC 4291, 2.5.5.2)."""
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        return address.ipv4_mapped or IPv6Address(int(address))
    return address


def _address(node: str) -> Address | None:
    match = _NODE.fullmatch(node)
    host, port = (match[1] or match[2], int(match[3] or 0)) if match else (node, 0)
    address = _parse(host)
    return None if address is None or port > 65535 else (str(address), port)


def _forwarded(value: str) -> Iterator[tuple[str, str]]:
    """Walk over the elements of Forwarded from the right: their ``for`` and ``proto``."""
    # Between quotes a comma or semicolon separates nothing. Quotes are paired from the right, too,
    # or one that a client leaves open would swallow what the proxy wrote behind it.
    parts = value.split('"')
    parts[-2::-2] = [part.translate(_QUOTED) for part in parts[-2::-2]]
    for element in reversed('"'.join(parts).split(",")):
        pairs = (pair.partition("=") for pair in element.split(";"))
        values = {name.strip(_BLANKS).lower(): each.strip(_BLANKS) for name, _, each in pairs}
        yield values.get("for", "").strip('"'), values.get("proto", "").strip('"')
