"""Passwords against stored hashes, whichever of three schemes made them. Pure, slow on purpose."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from enum import Enum
from typing import NamedTuple

import argon2
import bcrypt

_BCRYPT_BYTES = 72
"""What bcrypt looks at. Go, PHP and Node cut longer passwords there; Python's library refuses."""


class Scheme(Enum):
    """How a hash was made; its beginning tells."""

    BCRYPT = re.compile(r"(?P<head>\$2[aby]\$\d\d\$[./A-Za-z0-9]{22})(?P<digest>[./A-Za-z0-9]{31})")
    ARGON2 = re.compile(r"(?P<head>\$argon2(?:id|i|d)\$.+\$)(?P<digest>[+/A-Za-z0-9]+)")
    PBKDF2_SHA256 = re.compile(
        r"(?P<head>pbkdf2_sha256\$(?P<rounds>[1-9]\d{0,8})\$(?P<salt>[^$]+)\$)"
        r"(?P<digest>[+/A-Za-z0-9]{43}=)"
    )
    """Django's, since 1.4."""


class StoredHash(NamedTuple):
    """A hash taken apart."""

    scheme: Scheme
    text: str


_FIRST_DECOY = StoredHash(Scheme.BCRYPT, f"$2b$10${'.' * 53}")
"""PocketBase's scheme and cost."""


def read_hash(text: str) -> StoredHash | None:
    """The hash, or None if it is of no scheme that is known here."""
    return next((StoredHash(s, text) for s in Scheme if s.value.fullmatch(text)), None)


def is_correct(password: str, stored: StoredHash) -> bool | None:
    """Whether the password makes the hash; None if the hash turns out to be unusable.

    Takes tens to hundreds of milliseconds of one processor, without the interpreter's lock.
    """
    secret = password.encode()
    try:
        match stored.scheme:
            case Scheme.BCRYPT:
                return bcrypt.checkpw(secret[:_BCRYPT_BYTES], stored.text.encode())
            case Scheme.ARGON2:
                return argon2.PasswordHasher().verify(stored.text, secret)
            case Scheme.PBKDF2_SHA256:
                return _is_pbkdf2(secret, stored.text)
    except argon2.exceptions.VerifyMismatchError:
        return False
    except (ValueError, argon2.exceptions.Argon2Error):
        return None


def _is_pbkdf2(secret: bytes, text: str) -> bool:
    _, rounds, salt, digest = text.split("$")
    made = hashlib.pbkdf2_hmac("sha256", secret, salt.encode(), int(rounds))
    return hmac.compare_digest(base64.b64encode(made).decode(), digest)


def decoy_like(stored: StoredHash) -> StoredHash:
    """A hash of the same scheme and cost that no password is known for.

    Checked where there is no hash to check, so that the answer takes as long.
    """
    found = stored.scheme.value.fullmatch(stored.text)
    assert found is not None  # read_hash made it
    padding = "=" if found["digest"].endswith("=") else ""
    blank = "." if stored.scheme is Scheme.BCRYPT else "A"
    return StoredHash(
        stored.scheme, found["head"] + blank * (len(found["digest"]) - len(padding)) + padding
    )


def first_decoy() -> StoredHash:
    """The decoy before anybody logged in."""
    return _FIRST_DECOY
