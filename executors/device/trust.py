"""Whom does a caller take for the master, and may a key go to it?

With https:// whoever shows a certificate that `ca_file` (else REQUESTS_CA_BUNDLE, else this machine) trusts. A command
on the master's own machine, and standalone's worker, reach it by an address that its certificate may not name: for
them it is the one in `ssl_certificate` itself. With http:// only who is in a private network, unless `insecure_http`
says that something else encrypts the way; the address is looked at once the connection stands and before anything is
sent, so that a name cannot lead elsewhere in between.

It must not follow redirects, nor know a path of the API.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import ssl
from pathlib import Path
from typing import Any, Optional, Union
from urllib.parse import urlsplit

import requests
import requests.adapters

from settings import PLAIN_HTTP, Settings, is_loopback, is_private

log = logging.getLogger("worker")

_warned_of: set[str] = set()


class PlainHttp(ValueError):
    """Nothing was sent; str() says what to write instead. No OSError, which urllib3 would take for a broken line."""


class MasterAdapter(requests.adapters.HTTPAdapter):
    """An HTTP adapter for one master; give its `verify` to each request. `settings` None: as if nothing was set."""

    def __init__(self, url: str, settings: Optional[Settings] = None, **options: Any) -> None:
        settings = settings or Settings()
        parts = urlsplit(url)
        self._url, self._host = url, parts.hostname or ""
        self._is_plain = parts.scheme == "http"
        self._insecure_http = settings.insecure_http
        self._fingerprint = "" if self._is_plain else _own_fingerprint(self._host, settings)
        self.verify: Union[bool, str] = not self._fingerprint and (settings.ca_file or bundle_of_environment() or True)
        super().__init__(**options)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        if self._fingerprint:
            options["assert_fingerprint"] = self._fingerprint
        super().init_poolmanager(*arguments, **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if self._fingerprint:
            options["assert_fingerprint"] = self._fingerprint  # of who ends the tunnel
        return super().proxy_manager_for(proxy, **options)

    def get_connection_with_tls_context(self, request: Any, verify: Any, proxies: Any = None, cert: Any = None) -> Any:
        if self._is_plain and requests.utils.select_proxy(str(request.url), proxies):
            self._check_private(self._host)  # what lies behind a proxy can be told from the address alone
        pool: Any = super().get_connection_with_tls_context(request, verify, proxies=proxies, cert=cert)
        if "ConnectionCls" not in vars(pool):
            adapter = self

            class Connection(pool.ConnectionCls):
                def connect(self) -> None:
                    super().connect()
                    adapter.connected(self.sock)

            pool.ConnectionCls = Connection
        return pool

    def connected(self, connection: Any) -> None:
        """A connection stands and nothing was sent on it yet. Raises PlainHttp."""
        if self._is_plain:
            try:
                self._check_private(str(connection.getpeername()[0]))
            except PlainHttp:
                connection.close()
                raise

    def _check_private(self, address: str) -> None:
        if is_private(address):
            return
        if not self._insecure_http:
            raise PlainHttp(f"{self._url} leads to {address}: {PLAIN_HTTP}")
        if self._url not in _warned_of:
            _warned_of.add(self._url)
            log.warning("%s leads to %s without TLS: everybody on the way can read the key", self._url, address)


def bundle_of_environment() -> str:
    """The file of trusted certificates that the environment names, "" for none."""
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or ""


def _own_fingerprint(host: str, settings: Settings) -> str:
    """Of this machine's own master's certificate, where that is who is asked."""
    if settings.ssl_certificate and (is_loopback(host) or host == settings.host.strip("[]")):
        with contextlib.suppress(OSError, ValueError):
            text = Path(settings.ssl_certificate).read_text("latin-1")
            found = re.search("-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----", text)
            if found:
                return hashlib.sha256(ssl.PEM_cert_to_DER_cert(found.group())).hexdigest()
    return ""
