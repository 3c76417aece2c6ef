"""Whose address is it, and may it come in?

The address is that of the socket. Only a peer in `trusted_proxies` is believed what it says in X-Forwarded-For, which
is read from the right: each proxy adds whom it heard it from, so the first entry that is no proxy of ours is the one
who asks, and what stands left of it anybody could have written. An IPv4 address that is written as an IPv6 one
(::ffff:192.0.2.1) counts as the IPv4 address. `allowed_ips` never locks this machine itself out.

It must not look at keys, nor keep anything: how often somebody may ask is rates.py's question.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable, MutableMapping
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PEER = "af.peer"
"""Where the environ keeps the socket's own address, once REMOTE_ADDR is the client's."""

_FORWARDED = re.compile(r"\[([0-9A-Fa-f:.%]+)\](?::[0-9]{1,5})?|([0-9.]+)(?::[0-9]{1,5})?|([0-9A-Fa-f:.]+)")


class NotAnAddress(ValueError):
    """A trusted proxy said something else than an address."""


class Addresses:
    """The rules of one configuration."""

    def __init__(self, allowed_ips: Iterable[str] = (), trusted_proxies: Iterable[str] = ()) -> None:
        self._allowed = tuple(map(ipaddress.ip_network, allowed_ips))
        self._proxies = tuple(map(ipaddress.ip_network, trusted_proxies))

    def recognize(self, environ: MutableMapping[str, Any]) -> None:
        """Makes REMOTE_ADDR the client's address and wsgi.url_scheme the client's scheme; raises NotAnAddress."""
        peer = str(environ.get("REMOTE_ADDR", ""))
        environ[PEER] = peer
        address = parse(peer)
        if self._proxies and address is not None and _is_in(address, self._proxies):
            address = self._behind(address, str(environ.get("HTTP_X_FORWARDED_FOR", "")))
            scheme = str(environ.get("HTTP_X_FORWARDED_PROTO", "")).rpartition(",")[2].strip().lower()
            if scheme in ("http", "https"):
                environ["wsgi.url_scheme"] = scheme
        if address is not None:
            environ["REMOTE_ADDR"] = str(address)

    def may_come_in(self, client: str) -> bool:
        """Whether an address that recognize() wrote is let in."""
        if not self._allowed:
            return True
        address = parse(client)
        return address is not None and (address.is_loopback or _is_in(address, self._allowed))

    def _behind(self, proxy: Address, forwarded: str) -> Address:
        client = proxy
        for entry in reversed(forwarded.split(",") if forwarded.strip() else ()):
            found = _FORWARDED.fullmatch(entry.strip())
            address = parse(next(filter(None, found.groups()))) if found else None
            if address is None:
                raise NotAnAddress("X-Forwarded-For")
            client = address
            if not _is_in(address, self._proxies):
                break
        return client


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Address | None:
    """An address as a socket names it, without its scope and out of IPv6 clothes; None for what is none."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address


@functools.lru_cache(maxsize=4096)
def neighbourhood(client: str) -> str:
    """What counts as one asker: an IPv4 address, or an IPv6 network of 64 bits, since a home has a whole one."""
    address = parse(client)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return client[:64] if address is None else str(address)


def is_this_machine(client: str) -> bool:
    """Whether it is a loopback address."""
    address = parse(client)
    return address is not None and address.is_loopback


def _is_in(address: Address, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)
