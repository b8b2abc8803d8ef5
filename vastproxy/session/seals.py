"""
Seals: text that leaves the proxy, and comes back unread and unchanged, or not at all.

Rule 1: what is sealed is encrypted and authenticated (Fernet: AES-128-CBC and HMAC-SHA256, with
the time in it), and zipped where that makes it shorter.
Rule 2: each purpose has keys of its own, derived from the operator's secrets (HKDF, RFC 5869): a
token for one thing opens nothing else.
Rule 3: the first secret seals, all of them open; so a secret is changed by putting the new one in
front, and removing the old one when its tokens have expired.
Rule 4: viewers are known by a keyed hash, never by their ids. It hangs on the last secret: the
one that stays longest.
"""

import base64
import hashlib
import hmac
import secrets as random
import zlib
from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vastproxy.errors import TokenError

KEY_BYTES = 32
VIEWER_BYTES = 16
"""Of a viewer's hash: 128 bits, 22 characters."""
ZIP_FROM = 200
"""Bytes from which zipping is tried."""
MAX_TOKEN = 8_000
"""Characters of a token that is looked at: servers take no longer request lines."""
MAX_CONTENT = 16_384
"""Bytes that may come out of a token."""


def new_secret() -> str:
    """Make a secret for one run of the proxy."""
    return random.token_urlsafe(KEY_BYTES)


def derived(secret: str, purpose: str) -> bytes:
    """Derive the key for *purpose* from *secret* (RFC 5869)."""
    info = f"vastproxy {purpose} 1".encode()
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret.encode())


class Seal:
    """Seals and opens tokens for *purpose*; *secrets* are the operator's, at least one."""

    def __init__(self, secrets: Sequence[str], purpose: str) -> None:
        self._purpose = purpose
        keys = [base64.urlsafe_b64encode(derived(each, purpose)) for each in secrets]
        self._fernet = MultiFernet([Fernet(each) for each in keys])

    def close(self, content: bytes, now: float) -> str:
        """Seal *content* at *now*, in Unix seconds: characters that a URL may have."""
        zipped = zlib.compress(content, 6) if len(content) >= ZIP_FROM else content
        body = b"z" + zipped if len(zipped) < len(content) else b"-" + content
        # Padding would have to be percent-encoded; its length is known without it.
        return self._fernet.encrypt_at_time(body, int(now)).rstrip(b"=").decode()

    def open(self, token: str, now: float, ttl: float) -> bytes:
        """
        Give what was sealed into *token* at most *ttl* seconds before *now*, in Unix seconds.

        Raises TokenError.
        """
        if len(token) > MAX_TOKEN or not token.isascii() or "=" in token:
            raise TokenError("this is no token")
        padded = _padded(token)
        try:
            # base64 passes over characters that are none of its own, and over spare bits.
            canonical = base64.urlsafe_b64encode(base64.urlsafe_b64decode(padded)) == padded
            body = self._fernet.decrypt(padded) if canonical else None
        except (InvalidToken, ValueError):
            body = None
        # Not by Fernet's own check: that refuses what a clock a minute ahead of ours has sealed.
        if body is not None and self.age(token, now) > ttl:
            body = None
        if body is None:
            raise TokenError("this token is forged, of somebody else, or expired")
        return _unzipped(body[1:]) if body[:1] == b"z" else body[1:]

    def age(self, token: str, now: float) -> float:
        """Give the seconds from the sealing of a *token*, which was opened before, to *now*."""
        return now - self._fernet.extract_timestamp(_padded(token))

    def __repr__(self) -> str:
        return f"<Seal for {self._purpose}>"


def _padded(token: str) -> bytes:
    return (token + "=" * (-len(token) % 4)).encode()


def _unzipped(body: bytes) -> bytes:
    engine = zlib.decompressobj()
    try:
        content = engine.decompress(body, MAX_CONTENT + 1)
    except zlib.error:
        raise TokenError("this token cannot be unpacked") from None
    if len(content) > MAX_CONTENT:
        raise TokenError("this token is larger than any that is made here")
    if not engine.eof:
        raise TokenError("this token cannot be unpacked")
    return content


class ViewerNames:
    """Gives viewers the names under which their state is kept; *secrets* are the operator's."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._key = derived(secrets[-1], "viewer")

    def name(self, viewer: str) -> str:
        """Give the keyed hash of the id *viewer*: 22 characters; empty for nobody."""
        if not viewer:
            return ""
        digest = hmac.digest(self._key, viewer.encode("utf-8", "replace"), hashlib.sha256)
        return base64.urlsafe_b64encode(digest[:VIEWER_BYTES]).rstrip(b"=").decode()

    def __repr__(self) -> str:
        return "<ViewerNames>"
