"""Verifies passwords against stored hashes of several schemes. Pure; slow on purpose.

Called in threads by ``auth.password_verifier``. A hash is data of the users table: its parameters
decide how much time and memory a login attempt takes, so they are bounded.
"""

import base64
import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

import argon2
import bcrypt

_BCRYPT_PASSWORD_BYTES = 72
"""bcrypt's limit. Go, PHP and Node cut longer passwords there; Python's library refuses them."""

_BCRYPT = r"\$2[aby]\$(?P<cost>\d\d)\$[./A-Za-z0-9]{22}"
_BCRYPT_DIGEST = r"(?P<digest>[./A-Za-z0-9]{31})"
_ARGON2_COST = r"[mtp]=\d{1,10}"
_ARGON2_COSTS = rf"{_ARGON2_COST},{_ARGON2_COST},{_ARGON2_COST}"


class Scheme(Enum):
    """The hashing schemes, by the form of their hashes.

    Django prefixes the name of its hasher (django/contrib/auth/hashers.py, up to 5.2). Where
    libraries agree, they follow the PHC string format or crypt(3).
    """

    # $2a$, $2b$ and $2y$ (PHP's name) are one algorithm. $2x$ marks hashes of a faulty one and is
    # refused.
    BCRYPT = re.compile(rf"(?P<head>(?:bcrypt\$)?{_BCRYPT}){_BCRYPT_DIGEST}")
    BCRYPT_SHA256 = re.compile(rf"(?P<head>bcrypt_sha256\${_BCRYPT}){_BCRYPT_DIGEST}")
    """Django's: bcrypt of the hexadecimal SHA-256, which has no limit of 72 bytes."""
    ARGON2 = re.compile(
        r"(?P<head>(?:argon2)?\$argon2(?:id|i|d)\$(?:v=\d{1,3}\$)?"
        # In any order: Node's argon2 writes m, p, t.
        r"(?=[^$]*\bm=(?P<memory>\d+))(?=[^$]*\bt=(?P<time>\d+))(?=[^$]*\bp=(?P<lanes>\d+))"
        rf"{_ARGON2_COSTS}\$[+/A-Za-z0-9]+\$)"
        r"(?P<digest>[+/A-Za-z0-9]+)"
    )
    PBKDF2_SHA256 = re.compile(
        r"(?P<head>pbkdf2_sha256\$(?P<rounds>[1-9]\d{0,8})\$(?P<salt>[^$]+)\$)"
        r"(?P<digest>[+/A-Za-z0-9]{43}=)"
    )
    """Django's, since 1.4."""
    PBKDF2_SHA1 = re.compile(
        r"(?P<head>pbkdf2_sha1\$(?P<rounds>[1-9]\d{0,8})\$(?P<salt>[^$]+)\$)"
        r"(?P<digest>[+/A-Za-z0-9]{27}=)"
    )
    SCRYPT = re.compile(
        r"(?P<head>scrypt\$(?P<n>[1-9]\d{0,9})\$(?P<salt>[^$]+)"
        r"\$(?P<r>[1-9]\d{0,5})\$(?P<p>[1-9]\d{0,5})\$)(?P<digest>[+/A-Za-z0-9]{86}==)"
    )
    PHC_SCRYPT = re.compile(
        r"(?P<head>\$scrypt\$(?:ln=(?P<ln>[1-9]\d?)|n=(?P<n>[1-9]\d{0,9}))"
        r",r=(?P<r>[1-9]\d{0,5}),p=(?P<p>[1-9]\d{0,5})"
        r"\$(?P<salt>[+/A-Za-z0-9]*)\$)(?P<digest>[+/A-Za-z0-9]{22,86})"
    )
    """Passlib's, and that of Node's crypto with a PHC formatter; AdonisJS writes N itself."""
    PASSLIB_PBKDF2 = re.compile(
        r"(?P<head>\$pbkdf2(?P<algorithm>-sha256|-sha512|)\$(?P<rounds>[1-9]\d{0,8})"
        r"\$(?P<salt>[./A-Za-z0-9]*)\$)(?P<digest>[./A-Za-z0-9]{27,86})"
    )
    PASSLIB_BCRYPT_SHA256 = re.compile(
        r"(?P<head>\$bcrypt-sha256\$(?P<version>v=2,t=|)2[ab],(?:r=)?(?P<cost>\d\d?)"
        rf"\$(?P<salt>[./A-Za-z0-9]{{22}})\$){_BCRYPT_DIGEST}"
    )
    """bcrypt of a SHA-256 in base64, since version 2 keyed with the salt."""
    WERKZEUG_PBKDF2 = re.compile(
        r"(?P<head>pbkdf2:(?P<algorithm>sha1|sha256|sha512):(?P<rounds>[1-9]\d{0,8})"
        r"\$(?P<salt>[^$]+)\$)(?P<digest>(?:[0-9a-f]{2}){20,64})"
    )
    """Flask's: of werkzeug.security."""
    WERKZEUG_SCRYPT = re.compile(
        r"(?P<head>scrypt:(?P<n>[1-9]\d{0,9}):(?P<r>[1-9]\d{0,5}):(?P<p>[1-9]\d{0,5})"
        r"\$(?P<salt>[^$]+)\$)(?P<digest>[0-9a-f]{128})"
    )


class StoredHash(NamedTuple):
    """A hash of a known scheme, whose cost is within the limits."""

    scheme: Scheme
    text: str


_DEFAULT_DUMMY_HASH = StoredHash(Scheme.BCRYPT, "$2b$10$" + "." * 53)
"""PocketBase's scheme and cost."""

_MAX_BCRYPT_COST = 17
"""About 6 seconds of one processor."""
_MAX_PBKDF2_ROUNDS = 20_000_000
"""About 4 seconds. Django 5.2 uses 1,000,000."""
_MAX_MEMORY_BYTES = 2**30
"""Of one check: half of RFC 9106's first recommendation, ten times Django's."""
_MAX_ARGON2_BYTES = 4 * 2**30
"""Memory times passes, about 6 seconds."""
_MAX_ARGON2_LANES = 64
"""Each lane takes a further thread. RFC 9106 and Django use 1 to 8."""
_MAX_SCRYPT_BYTES = 2 * 2**30
"""Of all blocks, about 6 seconds; Django's scrypt fills 80 MiB."""


def parse_hash(text: str) -> StoredHash | None:
    """Return the hash; None if its scheme is unknown or its cost exceeds the limits."""
    for scheme in Scheme:
        match = scheme.value.fullmatch(text)
        if match is not None:
            return StoredHash(scheme, text) if _is_within_cost_limits(scheme, match) else None
    return None


def _is_within_cost_limits(scheme: Scheme, match: re.Match[str]) -> bool:
    match scheme:
        case Scheme.BCRYPT | Scheme.BCRYPT_SHA256 | Scheme.PASSLIB_BCRYPT_SHA256:
            return int(match["cost"]) <= _MAX_BCRYPT_COST
        case Scheme.ARGON2:
            # m is in KiB (RFC 9106, section 3.1).
            memory, lanes = int(match["memory"]) * 1024, int(match["lanes"])
            is_small = memory <= _MAX_MEMORY_BYTES and lanes <= _MAX_ARGON2_LANES
            return is_small and memory * int(match["time"]) <= _MAX_ARGON2_BYTES
        case (
            Scheme.PBKDF2_SHA256
            | Scheme.PBKDF2_SHA1
            | Scheme.PASSLIB_PBKDF2
            | Scheme.WERKZEUG_PBKDF2
        ):
            return int(match["rounds"]) <= _MAX_PBKDF2_ROUNDS
        case Scheme.SCRYPT | Scheme.PHC_SCRYPT | Scheme.WERKZEUG_SCRYPT:
            n, r, p = _scrypt_costs(match)
            is_small = _scrypt_memory_bytes(n, r, p) <= _MAX_MEMORY_BYTES
            return is_small and 128 * n * r * p <= _MAX_SCRYPT_BYTES


def _scrypt_costs(match: re.Match[str]) -> tuple[int, int, int]:
    """Return N, r and p; the PHC format may have the logarithm of N."""
    costs = match.groupdict()
    n = 1 << int(costs["ln"]) if costs.get("ln") else int(costs["n"])
    return n, int(costs["r"]), int(costs["p"])


def _scrypt_memory_bytes(n: int, r: int, p: int) -> int:
    """Return the memory of scrypt as OpenSSL computes it for ``maxmem``."""
    # 128 r bytes a block: n for the table, p for the input, two to work in.
    return 128 * r * (n + p + 2)


def scheme_name_of(text: str) -> str:
    """Return the scheme's name in a hash that can't be checked, for the log, or "unknown".

    Only known names are returned, because the text may be a password in the clear.
    """
    match = _SCHEME_NAMES.match(text)
    return "unknown" if match is None else match[0].strip("$")


_SCHEME_NAMES = re.compile(
    r"(?:unsalted_)?(?:md5|sha1)\$|(?:crypt|bcrypt|bcrypt_sha256|argon2|scrypt)\$"
    r"|pbkdf2(?:_sha1|_sha256|_sha512)?\$|pbkdf2:sha(?:1|256|512):"
    r"|scrypt:|\$(?:1|2[abxy]?|5|6|7|y|gy|P|H|S|apr1|argon2(?:id|i|d)|bcrypt-sha256|(?:fb)?scrypt"
    r"|pbkdf2(?:-sha256|-sha512)?)\$"
    r"|\{(?:SSHA|SHA|MD5|SMD5|CRYPT|SSHA256|SSHA512|PBKDF2)\}"
)


def verify_password(password: str, stored: StoredHash) -> bool | None:
    """Whether the password matches; None if the library can't use the hash.

    Takes tens to hundreds of milliseconds of a processor, without the interpreter's lock. Digests
    are compared in constant time.
    """
    secret = password.encode()
    try:
        match stored.scheme:
            case Scheme.BCRYPT:
                text = stored.text.removeprefix("bcrypt$")
                # In bytes, so perhaps within a character, as the libraries that made the hashes
                # cut.
                return bcrypt.checkpw(secret[:_BCRYPT_PASSWORD_BYTES], text.encode())
            case Scheme.BCRYPT_SHA256:
                text = stored.text.removeprefix("bcrypt_sha256$")
                return bcrypt.checkpw(hashlib.sha256(secret).hexdigest().encode(), text.encode())
            case Scheme.ARGON2:
                # The parameters are those of the hash; the hasher's own matter for new hashes only.
                return argon2.PasswordHasher().verify(_argon2_text(stored.text), secret)
            case Scheme.PASSLIB_BCRYPT_SHA256:
                return _verify_passlib_bcrypt(secret, _match_of(stored))
            case (
                Scheme.PBKDF2_SHA256
                | Scheme.PBKDF2_SHA1
                | Scheme.PASSLIB_PBKDF2
                | Scheme.WERKZEUG_PBKDF2
            ):
                return _verify_pbkdf2(secret, stored)
            case Scheme.SCRYPT | Scheme.PHC_SCRYPT | Scheme.WERKZEUG_SCRYPT:
                return _verify_scrypt(secret, stored)
    except argon2.exceptions.VerifyMismatchError:
        return False
    # A hash of the right form may still be refused, such as argon2 with less than 8 KiB a lane.
    except (ValueError, MemoryError, argon2.exceptions.Argon2Error):
        return None


def _match_of(stored: StoredHash) -> re.Match[str]:
    match = stored.scheme.value.fullmatch(stored.text)
    assert match is not None  # parse_hash made it
    return match


def _argon2_text(text: str) -> str:
    """Return the hash as the library reads it: without Django's prefix, costs as m, t, p."""
    return re.sub(
        _ARGON2_COSTS,
        lambda costs: ",".join(sorted(costs[0].split(","), key=lambda cost: "mtp".index(cost[0]))),
        text.removeprefix("argon2"),
        count=1,
    )


def _verify_passlib_bcrypt(secret: bytes, match: re.Match[str]) -> bool:
    salt = match["salt"].encode()
    # passlib.handlers.bcrypt: version 2 exists because version 1 let plain SHA-256s be tried.
    made = (
        hmac.digest(salt, secret, "sha256") if match["version"] else hashlib.sha256(secret).digest()
    )
    text = f"$2b${int(match['cost']):02}${match['salt']}{match['digest']}"
    return bcrypt.checkpw(base64.b64encode(made), text.encode())


def _verify_pbkdf2(secret: bytes, stored: StoredHash) -> bool:
    match = _match_of(stored)
    rounds, salt = int(match["rounds"]), match["salt"].encode()
    if stored.scheme is Scheme.PASSLIB_PBKDF2:
        algorithm = match["algorithm"].removeprefix("-") or "sha1"
        salt = _decode_base64(match["salt"])
    elif stored.scheme is Scheme.WERKZEUG_PBKDF2:
        algorithm = match["algorithm"]
    else:
        algorithm = "sha1" if stored.scheme is Scheme.PBKDF2_SHA1 else "sha256"
    made = hashlib.pbkdf2_hmac(algorithm, secret, salt, rounds)
    return hmac.compare_digest(made, _digest_of(stored.scheme, match))


def _verify_scrypt(secret: bytes, stored: StoredHash) -> bool:
    match = _match_of(stored)
    n, r, p = _scrypt_costs(match)
    is_phc = stored.scheme is Scheme.PHC_SCRYPT
    salt = _decode_base64(match["salt"]) if is_phc else match["salt"].encode()
    digest = _digest_of(stored.scheme, match)
    # OpenSSL refuses to use more than ``maxmem``, by default 32 MiB.
    memory = _scrypt_memory_bytes(n, r, p) + 4096
    made = hashlib.scrypt(secret, salt=salt, n=n, r=r, p=p, maxmem=memory, dklen=len(digest))
    return hmac.compare_digest(made, digest)


_HEX_DIGESTS = frozenset({Scheme.WERKZEUG_PBKDF2, Scheme.WERKZEUG_SCRYPT})


def _digest_of(scheme: Scheme, match: re.Match[str]) -> bytes:
    text = match["digest"]
    return bytes.fromhex(text) if scheme in _HEX_DIGESTS else _decode_base64(text)


def _decode_base64(text: str) -> bytes:
    """Decode base64 that may lack its padding, or have passlib's "." for "+"."""
    padded = text.rstrip("=").replace(".", "+")
    return base64.b64decode(padded + "=" * (-len(padded) % 4))


_BCRYPTS = frozenset({Scheme.BCRYPT, Scheme.BCRYPT_SHA256, Scheme.PASSLIB_BCRYPT_SHA256})


def dummy_hash_like(stored: StoredHash) -> StoredHash:
    """Return a hash of the same scheme and cost that matches no known password."""
    match = _match_of(stored)
    # The digest becomes zero bits, which no password that anybody knows has. Salt and costs stay,
    # so that a check takes exactly as long.
    blank = "0" if stored.scheme in _HEX_DIGESTS else "." if stored.scheme in _BCRYPTS else "A"
    digest = re.sub("[^=]", blank, match["digest"])  # "=" is padding
    return StoredHash(stored.scheme, match["head"] + digest)


def dummy_hash_for(texts: Iterable[str]) -> StoredHash:
    """Return a dummy hash with the commonest scheme and cost of some stored hashes.

    It is checked where an account or hash is missing, so that the response takes as long as with
    most accounts. If none can be parsed, it has PocketBase's scheme and cost.
    """
    known = [stored for text in texts if (stored := parse_hash(text)) is not None]
    if not known:
        return _DEFAULT_DUMMY_HASH
    most = Counter(map(_cost_parameters, known)).most_common(1)[0][0]
    return dummy_hash_like(next(stored for stored in known if _cost_parameters(stored) == most))


def has_cost_of(text: str, other: StoredHash) -> bool:
    """Whether the hash can be checked and has the same scheme and cost as the other."""
    known = parse_hash(text)
    return known is not None and _cost_parameters(known) == _cost_parameters(other)


def _cost_parameters(stored: StoredHash) -> tuple[object, ...]:
    """Return what determines the time of a check."""
    groups = _match_of(stored).groupdict().items()
    return stored.scheme, *(item for item in groups if item[0] not in {"head", "salt", "digest"})
