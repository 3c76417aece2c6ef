"""Which addresses and ports may a crawl connect to?

A task's URL comes from somebody else, or from a page that somebody else wrote. Without a rule it could make a device
read what only the device can reach: its own services, the router, a cloud's metadata. The rule:

    ports      80, 443, and those from 1024 but the ones that browsers refuse (HTTP sent there steers other services)
    addresses  public ones. Of a name all addresses must be: a name with one private address is refused whole
    exception  the device's own setting crawl_allow_networks; a task cannot widen it

The name is looked up once, and the connection goes to the addresses that were checked here: a name that changes
between check and connection (DNS rebinding) changes nothing. What an IPv6 address carries is unwrapped: IPv4-mapped and
NAT64 addresses are judged by the IPv4 address in them; 6to4, Teredo, ISATAP and IPv4-compatible ones are refused, for
no public site lives there.

The list below is explicit, and `is_global` is asked on top of it: older Pythons take 64:ff9b::7f00:1, 2002:7f00:1::,
224.0.0.1 and 192.0.0.8 for global (CVE-2024-4032).
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Iterable
from typing import Any, Optional, Union

from executors.task_executor import DoNotRetry, Retry

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

MAX_LOOKUPS = 64
MAX_ADDRESSES = 16

# https://fetch.spec.whatwg.org/#bad-port, as far as it reaches past 1023; those below are refused anyway.
REFUSED_PORTS = frozenset(
    (1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080)
)

_V4 = (
    ("0.0.0.0/8", "unspecified"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "shared by a provider (CGNAT)"),
    ("127.0.0.0/8", "loopback"),
    ("168.63.129.16/32", "a cloud's metadata"),
    ("169.254.0.0/16", "link-local"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "reserved"),
    ("192.0.2.0/24", "reserved for documents"),
    ("192.88.99.0/24", "a 6to4 relay"),
    ("192.168.0.0/16", "private"),
    ("198.18.0.0/15", "reserved for measurements"),
    ("198.51.100.0/24", "reserved for documents"),
    ("203.0.113.0/24", "reserved for documents"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
)
_V6 = (
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    ("::/96", "IPv4-compatible"),
    ("::ffff:0:0:0/96", "IPv4-translated"),
    ("64:ff9b:1::/48", "a local NAT64"),
    ("100::/64", "discarded"),
    ("2001::/32", "Teredo"),
    ("2001::/23", "reserved"),
    ("2001:db8::/32", "reserved for documents"),
    ("2002::/16", "6to4"),
    ("3fff::/20", "reserved for documents"),
    ("5f00::/16", "reserved"),
    ("fc00::/7", "private"),
    ("fe80::/10", "link-local"),
    ("fec0::/10", "site-local"),
    ("ff00::/8", "multicast"),
)
REFUSED: tuple[tuple[Network, str], ...] = tuple((ipaddress.ip_network(net), why) for net, why in (*_V4, *_V6))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_ISATAP = (0x00005EFE, 0x02005EFE)
# Names of this machine or this network that a resolver may answer without asking anybody.
_LOCAL_NAMES = ("localhost", "localdomain", "local", "internal", "intranet", "lan", "home.arpa")


class Refused(DoNotRetry):
    """This device may not connect there; nothing was sent."""


def why_not_public(address: Address) -> Optional[str]:
    """What kind of address it is where it is not a public one, such as "loopback"; None for a public one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            inner = why_not_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
            return f"NAT64 of an address that is {inner}" if inner else None
        if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
            return "ISATAP"
    for network, why in REFUSED:
        if address.version == network.version and address in network:
            return why
    if not address.is_global or (address.version == 6 and address not in _PUBLIC_V6):
        return "not public"
    return None


def parse_address(text: str) -> Address:
    """An address as the resolver writes it, without its scope; an IPv4-mapped one as the IPv4 address that it is."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def literal_address(host: str) -> Optional[Address]:
    """The address that a host is, in any spelling that connects: 127.0.0.1, [::1], 127.1, 0x7f.1, 2130706433."""
    bare = host.strip("[]").rstrip(".")
    try:
        return parse_address(bare)
    except ValueError:
        pass
    try:
        # A name may begin with digits, but inet_aton takes numbers and dots alone.
        return ipaddress.IPv4Address(socket.inet_aton(bare)) if bare[:1].isdigit() else None
    except (OSError, UnicodeError):
        return None


class Guard:
    """The rule of one device."""

    def __init__(self, allow_networks: Iterable[str] = (), *, uses_proxy: bool = False):
        self._allowed = tuple(ipaddress.ip_network(network, strict=False) for network in allow_networks)
        self._uses_proxy = uses_proxy

    def check_target(self, scheme: str, host: str, port: int) -> None:
        """What can be judged before a look-up. Raises Refused."""
        if scheme not in ("http", "https"):
            raise Refused(f"{scheme}: is not fetched: write an http or https URL")
        if port not in (80, 443) and (port < 1024 or port in REFUSED_PORTS):
            raise Refused(f"port {port} of {host} is not fetched: 80, 443 and those from 1024 that browsers take are")
        address = literal_address(host)
        if address is not None:
            self.check_address(host, address)
        elif self._uses_proxy:
            # The proxy looks names up; what can be told from the name itself is told here.
            name = host.lower().rstrip(".")
            if "." not in name or any(name == local or name.endswith("." + local) for local in _LOCAL_NAMES):
                raise Refused(f"{host} is a name of the proxy's own network: crawl_proxy is for public sites")

    def check_address(self, host: str, address: Address) -> None:
        """Raises Refused for an address that is neither public nor listed."""
        if any(address.version == network.version and address in network for network in self._allowed):
            return
        why = why_not_public(address)
        if why:
            shown = f"{host} is" if str(address) == host.strip("[]") else f"{host} has the address {address}, which is"
            advice = "is not fetched; the device's setting crawl_allow_networks may list its network"
            raise Refused(f"{shown} {why}: it {advice}")

    def addresses(self, host: str, port: int, seconds: float) -> list[tuple[int, Any]]:
        """(family, socket address) of a host, all of them allowed. Raises Refused, and Retry where there are none."""
        found = []
        for family, _, _, _, where in look_up(host, port, seconds):
            if family not in (socket.AF_INET, socket.AF_INET6):
                continue
            self.check_address(host, parse_address(str(where[0])))
            found.append((int(family), where))
        if not found:
            raise Retry(f"the name {host} has no address")
        return found[:MAX_ADDRESSES]


# ---------------------------------------------------------------------------------------------------------------------
# Looking a name up, with an end to it

_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)


def look_up(host: str, port: int, seconds: float) -> list[Any]:
    """getaddrinfo, which itself may take minutes, within `seconds`."""
    try:
        ipaddress.ip_address(host)
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError:
        pass
    if not _lookups.acquire(timeout=seconds):
        raise Retry(f"{MAX_LOOKUPS} names are being looked up, none of them answers: check this device's DNS")
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.append(error)
        finally:
            _lookups.release()

    asking = threading.Thread(target=ask, name="look up", daemon=True)
    asking.start()
    asking.join(seconds)
    if not answer:
        raise Retry(f"looking up the name {host} took longer than {seconds:.3g} s: check this device's DNS")
    if isinstance(answer[0], Exception):
        detail = getattr(answer[0], "strerror", None) or answer[0]
        raise Retry(f"the name {host} was not found ({detail}): check the URL, or this device's DNS")
    return list(answer[0])
