"""How is a compressed body unpacked without ever holding more than a piece of it?

gzip and deflate, the two that are asked for, by zlib with a bound on each step: 64 KiB come out at a time, and whoever
reads stops when it has enough. br and zstd are not asked for: where their libraries are installed, old versions of them
unpack without a bound (CVE-2025-66471, CVE-2026-44432).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from executors.task_executor import DoNotRetry, Retry

PIECE_BYTES = 64 * 1024
ACCEPT_ENCODING = "gzip, deflate"
GZIP_MAGIC = b"\x1f\x8b"
MAX_LAYERS = 3
_GZIP_BITS, _ZLIB_BITS, _RAW_BITS = 31, 15, -15


def unpacked(pieces: Iterator[bytes], content_encoding: str, url: str) -> Iterator[bytes]:
    """The body without its Content-Encoding. Raises DoNotRetry for one that was not asked for."""
    layers = [name.strip().lower() for name in content_encoding.split(",")]
    layers = [name for name in layers if name not in ("", "identity", "none")]
    if len(layers) > MAX_LAYERS:
        raise DoNotRetry(f"{url} is packed {len(layers)} times: at most {MAX_LAYERS} are unpacked")
    for name in reversed(layers):
        if name not in ("gzip", "x-gzip", "deflate"):
            raise DoNotRetry(
                f"{url} has Content-Encoding {name:.40}, which was not asked for: only gzip and deflate are"
            )
        pieces = inflated(pieces, url, is_gzip=name != "deflate")
    return pieces


def inflated(pieces: Iterator[bytes], url: str, *, is_gzip: bool) -> Iterator[bytes]:
    """Unpacks in pieces of at most 64 KiB; gzip members one after the other, deflate with or without zlib's frame.

    What follows the end and is no further member is padding, as in every browser: it is read and dropped."""
    bits = _GZIP_BITS if is_gzip else _ZLIB_BITS
    inflate = zlib.decompressobj(bits)
    is_inside, is_over, members = False, False, 0
    for piece in pieces:
        rest, is_more = b"" if is_over else piece, False
        while rest or is_more:
            if not is_inside and members and not rest.startswith(GZIP_MAGIC[:1]):
                is_over = True
                break
            try:
                out = inflate.decompress(rest, PIECE_BYTES)
            except zlib.error as error:
                if is_inside or is_gzip or bits == _RAW_BITS:
                    raise Retry(f"{url} cannot be unpacked: {error}") from None
                bits = _RAW_BITS
                inflate = zlib.decompressobj(bits)
                continue
            is_inside = True
            if out:
                yield out
            # A full piece may have more behind it, even where all input is taken.
            rest, is_more = inflate.unconsumed_tail, len(out) == PIECE_BYTES
            if inflate.eof:
                rest, is_more, is_inside = inflate.unused_data, False, False
                members += 1
                is_over = not is_gzip
                inflate = zlib.decompressobj(bits)
                if is_over:
                    break
    if is_inside:
        raise Retry(f"{url} ended before its compressed body did")
