"""Who is believed about whom. Forwarded: RFC 7239; X-Forwarded-For as proxies write it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from roomsock.errors import SetupError
from roomsock.http import Address, MultiMapping
from roomsock.protocol.proxies import TrustedProxies, counted_as, neighbour

PROXY = ("10.0.0.1", 4000)  # connected to us, unless a test says otherwise
TRUSTED = ["10.0.0.0/8", "fd00::/8", "unix"]


def identified(
    lines: list[str], *protos: str, header: str = "x-forwarded-for", peer: Address | None = PROXY
) -> tuple[Address | None, str | None]:
    headers = [(header, line) for line in lines] + [("x-forwarded-proto", each) for each in protos]
    return TrustedProxies(TRUSTED, header).identify(peer, MultiMapping(headers, fold=str.lower))


def client(*lines: str, header: str = "x-forwarded-for") -> str:
    address, _ = identified(list(lines), header=header)
    assert address is not None
    return f"{address[0]} {address[1]}"


# X-Forwarded-For


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(["1.2.3.4"], "1.2.3.4 0", id="one-proxy"),
        pytest.param(["9.9.9.9, 1.2.3.4"], "1.2.3.4 0", id="one-proxy-and-a-liar"),
        pytest.param(["9.9.9.9", "1.2.3.4"], "1.2.3.4 0", id="the-proxy-adds-a-line"),
        pytest.param(["1.2.3.4, 10.0.0.2"], "1.2.3.4 0", id="two-proxies"),
        pytest.param(["9.9.9.9,1.2.3.4", "10.0.0.2,10.0.0.3"], "1.2.3.4 0", id="three-proxies"),
        pytest.param(["1.2.3.4, fd00::2"], "1.2.3.4 0", id="a-proxy-with-ipv6"),
        pytest.param(["9.9.9.9, 11.0.0.1, 10.0.0.2"], "11.0.0.1 0", id="an-unknown-proxy"),
        pytest.param(["10.0.0.3, 10.0.0.2"], "10.0.0.3 0", id="all-are-trusted"),
        pytest.param([], "10.0.0.1 4000", id="no-header"),
        pytest.param([""], "10.0.0.1 4000", id="empty"),
        pytest.param(["1.2.3.4:5678"], "1.2.3.4 5678", id="a-port"),
        pytest.param(["1.2.3.4, 10.0.0.2:80"], "1.2.3.4 0", id="a-proxys-port"),
        pytest.param(["[2001:db8::1]"], "2001:db8::1 0", id="brackets"),
        pytest.param(["[2001:db8::1]:80"], "2001:db8::1 80", id="brackets-and-port"),
        pytest.param(["2001:db8::1"], "2001:db8::1 0", id="no-brackets"),
        pytest.param(["2001:DB8:0::0:1"], "2001:db8::1 0", id="in-its-normal-form"),
        pytest.param(["::ffff:1.2.3.4"], "1.2.3.4 0", id="mapped"),
        pytest.param(["[::FFFF:102:304]:80"], "1.2.3.4 80", id="mapped-in-hexadecimal"),
        pytest.param(["1.2.3.4, ::ffff:10.0.0.2"], "1.2.3.4 0", id="a-mapped-proxy"),
        pytest.param(["fe80::1%eth0"], "fe80::1 0", id="the-zone-is-the-proxys-own"),
        pytest.param(["[fe80::1%25eth0]:80"], "fe80::1 80", id="a-zone-in-brackets"),
        pytest.param(["fe80::1%\x1b[31m"], "fe80::1 0", id="what-no-log-should-show"),
        pytest.param([" \t1.2.3.4 \t"], "1.2.3.4 0", id="blanks"),
    ],
)
def test_the_first_from_the_right_that_is_no_proxy_is_the_client(
    lines: list[str], expected: str
) -> None:
    assert client(*lines) == expected


@pytest.mark.parametrize(
    "entry",
    [
        *("", "unknown", "_hidden", "localhost", "1.2.3", "1.2.3.4.5", "01.2.3.4", "1.2.3.256"),
        *(
            "1.2.3.4:",
            "1.2.3.4:65536",
            "1.2.3.4:123456",
            "1.2.3.4:-1",
            "1.2.3.4:80:80",
            "1.2.3.4 5",
        ),
        *("[::1", "::1]", "[::1]80", "[]", "[]:80", ":80", "[[::1]]", "1:2", "::1::", "[::1]:"),
        *('"1.2.3.4"', "for=1.2.3.4", "1.2.3.4;5", "0x1020304", "16909060", "1.2.3.4/8"),
        *("\xb9.2.3.4", "1.2.3.4:\xb2", "\xa01.2.3.4", "1.2.3.4\x00", "1.2.3.4%eth0"),
        *("1.2.3.4 5", "fe80::1%", "fe80::1%a%b", "::ffff:1.2.3.4.5", "[1.2.3.4"),
    ],
)
def test_what_cannot_be_read_ends_the_search_at_the_proxy_that_wrote_it(entry: str) -> None:
    assert client(entry) == "10.0.0.1 4000"
    assert client(f"9.9.9.9, {entry}") == "10.0.0.1 4000"
    assert client(f"9.9.9.9, {entry}, 10.0.0.2:7") == "10.0.0.2 7"
    assert client("9.9.9.9", entry) == "10.0.0.1 4000"


@pytest.mark.parametrize(
    ("protos", "expected"),
    [
        ([], None),
        (["https"], "https"),
        (["http"], "http"),
        ([" WSS\t"], "https"),
        (["ws"], "http"),
        (["http, https"], "https"),
        (["http", "https"], "https"),
        (["https, "], None),
        (["ftp"], None),
        (["https;"], None),
        (["on"], None),
    ],
)
def test_the_scheme_is_what_the_proxy_says_last(protos: list[str], expected: str | None) -> None:
    assert identified(["1.2.3.4"], *protos)[1] == expected
    assert identified(["unknown"], *protos)[1] == expected
    assert identified([], *protos)[1] == expected


# Forwarded


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(["for=1.2.3.4"], "1.2.3.4 0", id="4-one-proxy"),
        pytest.param(["for=9.9.9.9, for=1.2.3.4"], "1.2.3.4 0", id="4-one-proxy-and-a-liar"),
        pytest.param(["for=9.9.9.9", "for=1.2.3.4"], "1.2.3.4 0", id="4-the-proxy-adds-a-line"),
        pytest.param(["for=1.2.3.4, for=10.0.0.2"], "1.2.3.4 0", id="4-two-proxies"),
        pytest.param(["for=10.0.0.3, for=10.0.0.2"], "10.0.0.3 0", id="4-all-are-trusted"),
        pytest.param(["FOR=1.2.3.4"], "1.2.3.4 0", id="4-case"),
        pytest.param(["by=10.0.0.1;for=1.2.3.4;host=a"], "1.2.3.4 0", id="4-among-others"),
        pytest.param(["; for=1.2.3.4 ;; by=_x"], "1.2.3.4 0", id="4-blanks-and-empty-pairs"),
        pytest.param(['for="1.2.3.4"'], "1.2.3.4 0", id="4-quoted"),
        pytest.param(['for="1.2.3.4:80"'], "1.2.3.4 80", id="6-port"),
        pytest.param(['for="1.2.3.4:_p.0-t"'], "1.2.3.4 0", id="6-obfuscated-port"),
        pytest.param(['for="[2001:db8::1]"'], "2001:db8::1 0", id="6.1-ipv6"),
        pytest.param(['for="[2001:db8::1]:4711"'], "2001:db8::1 4711", id="6.1-ipv6-port"),
        pytest.param(["for=9.9.9.9, for=unknown"], "10.0.0.1 4000", id="6.2-unknown"),
        pytest.param(["for=9.9.9.9, for=_hidden"], "10.0.0.1 4000", id="6.3-obfuscated"),
        pytest.param(["for=9.9.9.9, for=unknown, for=10.0.0.2"], "10.0.0.2 0", id="6.2-further"),
        pytest.param(["for=9.9.9.9, proto=https"], "10.0.0.1 4000", id="nobody-named"),
        pytest.param(["for=9.9.9.9, "], "10.0.0.1 4000", id="empty-element"),
        pytest.param([], "10.0.0.1 4000", id="no-header"),
        pytest.param(["1.2.3.4"], "10.0.0.1 4000", id="no-pair"),
        pytest.param([r'for="\1.2.3.4"'], "10.0.0.1 4000", id="escapes-are-not-read"),
        pytest.param(["for=9.9.9.9;for=1.2.3.4"], "1.2.3.4 0", id="the-last-of-two"),
        pytest.param(['for=1.2.3.4;host="a,for=9.9.9.9"'], "1.2.3.4 0", id="quoted-comma"),
        pytest.param(['for=1.2.3.4;host="a;for=9.9.9.9"'], "1.2.3.4 0", id="quoted-semicolon"),
        pytest.param(['for="9.9.9.9, for=1.2.3.4'], "1.2.3.4 0", id="a-quote-left-open"),
        pytest.param(['for=9.9.9.9;a=", for="[::2]"'], "::2 0", id="a-quote-that-would-swallow"),
        pytest.param(['a="', 'for="[::2]";b=", for=9.9.9.9"'], "::2 0", id="both"),
    ],
)
def test_forwarded_is_read_from_the_right(lines: list[str], expected: str) -> None:
    assert client(*lines, header="forwarded") == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("for=1.2.3.4;proto=https", "https"),
        ('proto="WSS";for=1.2.3.4', "https"),
        ("for=1.2.3.4", None),
        ("for=1.2.3.4;proto=gopher", None),
        ("for=_hidden;proto=https", "https"),
        ("for=9.9.9.9;proto=https, for=1.2.3.4;proto=http", "http"),
        ("for=9.9.9.9;proto=https, for=1.2.3.4", None),
        ("for=1.2.3.4;proto=https, for=10.0.0.2;proto=http", "https"),
        ("for=1.2.3.4, for=10.0.0.2;proto=https", "https"),
    ],
)
def test_the_scheme_is_that_of_the_element_furthest_from_us_that_is_believed(
    line: str, expected: str | None
) -> None:
    assert identified([line], header="forwarded")[1] == expected


def test_one_header_is_believed() -> None:
    both = MultiMapping(
        [
            ("forwarded", "for=1.1.1.1;proto=https"),
            ("x-forwarded-for", "2.2.2.2"),
            ("x-forwarded-proto", "http"),
            ("x-real-ip", "3.3.3.3"),
        ]
    )
    assert TrustedProxies(TRUSTED).identify(PROXY, both) == (("2.2.2.2", 0), "http")
    assert TrustedProxies(TRUSTED, "X-Forwarded-For").identify(PROXY, both)[0] == ("2.2.2.2", 0)
    one = TrustedProxies(TRUSTED, "Forwarded")
    assert one.identify(PROXY, both) == (("1.1.1.1", 0), "https")


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
def test_the_search_ends_after_32_proxies(header: str) -> None:
    name = "for=" if header == "forwarded" else ""
    proxies = [f"{name}10.0.0.{n}" for n in range(32, 0, -1)]
    assert client(",".join([f"{name}1.2.3.4", *proxies[1:]]), header=header) == "1.2.3.4 0"
    assert client(",".join([f"{name}1.2.3.4", *proxies]), header=header) == "10.0.0.32 0"


# Who is trusted


@pytest.mark.parametrize(
    ("proxies", "peer", "trusted"),
    [
        ([], "127.0.0.1", False),
        ([], None, False),
        (["unix"], None, True),
        (["unix"], "127.0.0.1", False),
        (["127.0.0.1"], None, False),
        (["127.0.0.1"], "127.0.0.1", True),
        (["127.0.0.1"], "127.0.0.2", False),
        (["127.0.0.1"], "::1", False),
        (["127.0.0.1"], "::ffff:127.0.0.1", True),
        (["192.0.2.0/24"], "192.0.2.255", True),
        (["192.0.2.0/24"], "192.0.3.0", False),
        (["::1"], "::1", True),
        (["fd00::/8"], "fdff::1", True),
        (["fd00::/8"], "fe80::1", False),
        (["fe80::1"], "fe80::1%eth0", True),
        (["192.0.2.1", "2001:db8::/32"], "2001:db8::5", True),
        (["0.0.0.3"], "3", False),  # an AF_VSOCK peer is a number
    ],
)
def test_who_is_trusted(proxies: list[str], peer: str | None, trusted: bool) -> None:
    address = None if peer is None else (peer, 4000)
    assert TrustedProxies(proxies).trusts(address) is trusted
    headers = MultiMapping([("x-forwarded-for", "1.2.3.4"), ("x-forwarded-proto", "https")])
    expected = (("1.2.3.4", 0), "https") if trusted else (address, None)
    assert TrustedProxies(proxies).identify(address, headers) == expected


@pytest.mark.parametrize(
    ("proxies", "text"),
    [
        ("127.0.0.1", r"is a list such as .*, not '127\.0\.0\.1'"),
        (None, "is a list such as .*, not None"),
        (["*"], r"'\*' would let any client choose its address"),
        (["0.0.0.0/0"], "would let any client"),
        (["::/0"], "would let any client"),
        (["nginx"], "'nginx' does not appear to be"),
        ([""], "does not appear to be"),
        (["10.0.0.1/8"], "host bits set"),
        (["10.0.0.0/33"], "does not appear to be"),
        (["127.0.0.1:80"], "does not appear to be"),
        (["::ffff:127.0.0.1"], "as IPv4"),
        (["::ffff:0:0/96"], "as IPv4"),
        (["fe80::1%eth0"], "addresses, networks"),
        ([2130706433], "not 2130706433"),
        ([b"\x7f\0\0\1"], "addresses, networks"),
        ([None], "not None"),
    ],
)
def test_proxies_that_are_none_are_a_setup_error(proxies: Any, text: str) -> None:
    with pytest.raises(SetupError, match=f"trusted_proxies.*{text}"):
        TrustedProxies(proxies)


@pytest.mark.parametrize("header", ["x-real-ip", "", None, b"forwarded", ["forwarded"]])
def test_another_header_is_a_setup_error(header: Any) -> None:
    with pytest.raises(SetupError, match='"x-forwarded-for" or "forwarded", not'):
        TrustedProxies([], header)


# What a client counts with


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("3", "3"),
    ],
)
def test_an_ipv6_address_counts_with_its_network(host: str, expected: str) -> None:
    assert counted_as(host) == expected


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (None, "unix"),
        ("127.0.0.1", "127.0.0.1"),
        ("127.9.9.9", "127.9.9.9"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("10.0.0.1", None),
        ("3", None),
    ],
)
def test_a_neighbour_is_named_as_trusted_proxies_takes_it(
    host: str | None, name: str | None
) -> None:
    peer = None if host is None else (host, 4000)
    assert neighbour(peer) == name
    assert name is None or TrustedProxies([name]).trusts(peer)


# Whatever a client sends

# What h11 lets pass in a value, and what it is decoded from.
ANY_TEXT = st.text(st.characters(min_codepoint=0, max_codepoint=255, exclude_characters="\r\n"))
ODD_TEXT = st.lists(
    st.sampled_from(
        [*'",;=:[]% \\', "for", "proto", "https", "unknown", "_x", "10.0.0.2", "9.9.9.9", "::1"]
    )
).map("".join)
TEXT = ANY_TEXT | ODD_TEXT
ADDRESSES = (st.ip_addresses(v=4) | st.ip_addresses(v=6)).filter(
    lambda address: not TrustedProxies(TRUSTED).trusts((str(address), 0))
)


@given(st.lists(TEXT, max_size=4), st.lists(TEXT, max_size=2), st.sampled_from([None, PROXY]))
@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
def test_whatever_the_header_says_is_an_address_in_its_normal_form_or_nothing(
    header: str, lines: list[str], protos: list[str], peer: Address | None
) -> None:
    found, scheme = identified(lines, *protos, header=header, peer=peer)
    assert scheme in (None, "http", "https")
    if found is not None and found != peer:
        host, port = found
        assert str(IPv6Address(host) if ":" in host else IPv4Address(host)) == host
        assert "%" not in host
        assert 0 <= port <= 65535


@given(st.lists(TEXT, max_size=3), ADDRESSES, st.integers(1, 65535), st.booleans(), st.booleans())
@example(['for=9.9.9.9;x="'], IPv6Address("::2"), 80, False, True)
@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
def test_a_client_cannot_stand_behind_the_address_that_its_proxy_wrote(
    header: str,
    sent: list[str],
    address: IPv4Address | IPv6Address,
    port: int,
    with_port: bool,
    own_line: bool,
) -> None:
    host = str(address)
    expected = address
    if isinstance(address, IPv6Address):
        host = f"[{address}]"
        expected = address.ipv4_mapped or address  # type: ignore[assignment]
    node = f"{host}:{port}" if with_port else host
    written = node if header == "x-forwarded-for" else f'for="{node}";proto=https'
    if sent and not own_line:
        written = f"{sent.pop()}, {written}"
    found, scheme = identified([*sent, written], header=header)
    assert found == (str(expected), port if with_port else 0)
    assert scheme == (None if header == "x-forwarded-for" else "https")


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
@pytest.mark.parametrize(
    "unit", ["10.0.0.2,", "for=10.0.0.2,", '"', "[", '",', ";", "1:", "%", "9"]
)
def test_a_header_as_long_as_may_be_is_read(header: str, unit: str) -> None:
    text = unit * (16_384 // len(unit))
    for line in text, text + "!", f'{text}for="', text + "10.0.0.2":
        identified([line], header=header)
