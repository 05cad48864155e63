"""Passwords against hashes from other sources: published test vectors, node's crypto."""

from __future__ import annotations

import shutil
import subprocess

import argon2
import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.auth.passwords import (
    Scheme,
    StoredHash,
    dummy_hash_for,
    dummy_hash_like,
    parse_hash,
    scheme_name_of,
    verify_password,
)

VECTORS = [
    # Openwall's crypt_blowfish.
    ("U*U", "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW", Scheme.BCRYPT),
    ("", "$2a$05$CCCCCCCCCCCCCCCCCCCCC.7uG0VCzI2bS7j6ymqJi9CdcdxiRTWNy", Scheme.BCRYPT),
    # The reference implementation of Argon2.
    (
        "password",
        "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
        Scheme.ARGON2,
    ),
    (
        "password",
        "$argon2i$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$wWKIMhR9lyDFvRz9YTZweHKfbftvj+qf+YFY4NeBbtA",
        Scheme.ARGON2,
    ),
    # Django 5.2.19: hashers.X().encode("lètmein", "seasalt", ...), those of bcrypt with 4 rounds.
    (
        "lètmein",
        "pbkdf2_sha256$12000$seasalt$Ybw8zsFxqja97tY/o6G+Fy1ksY4U/Hw3DRrGED6Up4s=",
        Scheme.PBKDF2_SHA256,
    ),
    ("lètmein", "pbkdf2_sha1$12000$seasalt$RAzowyPatHQocn6USyo2fI984CU=", Scheme.PBKDF2_SHA1),
    (
        "lètmein",
        (
            "argon2$argon2id$v=19$m=102400,t=2,p=8$c2Vhc2FsdHNlYXNhbHQ"
            "$5X8M3A6KY2o98xsl1DnfJpaxc9OdBrgUbl3HjifV1qo"
        ),
        Scheme.ARGON2,
    ),
    (
        "lètmein",
        "bcrypt_sha256$$2b$04$TN6IieuaojdvZeBpYQI0BOMOYSoutt50noqavHTVwtioVZbauWFYO",
        Scheme.BCRYPT_SHA256,
    ),
    (
        "x" * 100,
        "bcrypt_sha256$$2b$04$aia8B7uyn9TCTuadS084AOXz9I5PgvRVwVDnWtE88VVKRsa9Tu2my",
        Scheme.BCRYPT_SHA256,
    ),
    (
        "lètmein",
        "bcrypt$$2b$04$Ik8jDnKHXdWdS7W4CzqlUeNsaBZld6i5hnJJBKcoKDSaiqc8..poC",
        Scheme.BCRYPT,
    ),
    (
        "lètmein",
        (
            "scrypt$1024$seasalt$8$5$ozpUt/qDR/QLBzi9csaWJofO252yHC+Oxl5cycNUQkna"
            "/BBjumDq5KMXPAq1Xi3sxxGWxqtAlQmEE+DSWNl+FQ=="
        ),
        Scheme.SCRYPT,
    ),
    (
        "lètmein",
        (
            "scrypt$16384$seasalt$8$5$ECMIUp+LMxMSK8xB/IVyba+KYGTI7FTnet025q/1f"
            "/vBAVnnP3hdYqJuRi+mJn6ji6ze3Fbb7JEFPKGpuEf5vw=="
        ),
        Scheme.SCRYPT,
    ),
]


def known(text: str) -> StoredHash:
    stored = parse_hash(text)
    assert stored is not None
    return stored


@pytest.mark.parametrize(("password", "text", "scheme"), VECTORS)
def test_published_hashes_are_understood(password: str, text: str, scheme: Scheme) -> None:
    stored = known(text)

    assert stored.scheme is scheme
    assert verify_password(password, stored) is True
    assert verify_password(password + "x", stored) is False


@pytest.mark.skipif(shutil.which("node") is None, reason="node isn't installed")
def test_djangos_hashes_are_understood() -> None:
    script = (
        "const { pbkdf2Sync } = require('node:crypto');"
        "const d = pbkdf2Sync('lètmein', 'seasalt', 12000, 32, 'sha256');"
        "process.stdout.write('pbkdf2_sha256$12000$seasalt$'+d.toString('base64'))"
    )
    made = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    stored = known(made.stdout)

    assert stored.scheme is Scheme.PBKDF2_SHA256
    assert verify_password("lètmein", stored) is True
    assert verify_password("letmein", stored) is False


@pytest.mark.parametrize("prefix", ["$2a$", "$2b$", "$2y$"])
def test_bcrypt_has_three_prefixes_in_the_wild(prefix: str) -> None:
    """Of Go and Python, newer libraries, and PHP."""
    text = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()

    assert verify_password("secret", known(prefix + text[4:])) is True


def test_bcrypt_sees_72_bytes() -> None:
    """Applications whose library truncates passwords have stored hashes of the first 72 bytes."""
    text = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()

    assert verify_password("x" * 200, known(text)) is True
    assert verify_password("x" * 71, known(text)) is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "secret",
        "5f4dcc3b5aa765d61d8327deb882cf99",
        "$2x$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW",
        "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOe",
        "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\n",
        "pbkdf2_sha1$1$salt$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "bcrypt_sha256$2b$04$TN6IieuaojdvZeBpYQI0BOMOYSoutt50noqavHTVwtioVZbauWFYO",
        "argon2$$argon2id$v=19$m=8,t=1,p=1$c2Vhc2FsdHNlYXNhbHQ$AAAA",
        "$argon2id$v=19$m=65536$c29tc2FsdA$CTFhFdXPJO1a",
        "pbkdf2_sha256$0$salt$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "$argon2id$",
        "!",
    ],
)
def test_an_unknown_hash_admits_no_password(text: str) -> None:
    """In particular no password stored in clear text. Django marks unusable ones by "!"."""
    assert parse_hash(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "$2a$03$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW",
        f"scrypt$1000$salt$8$1${'A' * 86}==",
        "$argon2id$v=19$m=8,t=1,p=1$c2FsdA$A",
    ],
)
def test_a_hash_that_looks_right_and_is_not_is_unusable(text: str) -> None:
    """The result is "unusable", not "wrong".

    The caller must compensate for the time it didn't take.
    """
    assert verify_password("secret", known(text)) is None


@pytest.mark.parametrize(
    ("bearable", "absurd"),
    [
        ("$2b$17$" + "." * 53, "$2b$18$" + "." * 53),
        ("bcrypt_sha256$$2b$17$" + "." * 53, "bcrypt_sha256$$2b$31$" + "." * 53),
        (f"pbkdf2_sha256$20000000$s${'A' * 43}=", f"pbkdf2_sha256$20000001$s${'A' * 43}="),
        (f"pbkdf2_sha1$20000000$s${'A' * 27}=", f"pbkdf2_sha1$999999999$s${'A' * 27}="),
        (f"scrypt$524288$s$8$4${'A' * 86}==", f"scrypt$524288$s$8$5${'A' * 86}=="),
        (f"scrypt$1048576$s$7$2${'A' * 86}==", f"scrypt$16777216$s$8$1${'A' * 86}=="),
        (
            "$argon2id$v=19$m=1048576,t=4,p=4$c29tZXNhbHQ$AAAA",
            "$argon2id$v=19$m=1048577,t=1,p=4$c29tZXNhbHQ$AAAA",
        ),
        (
            "$argon2id$v=19$m=1048576,t=1,p=64$c29tZXNhbHQ$AAAA",
            "$argon2id$v=19$m=1048576,t=1,p=65$c29tZXNhbHQ$AAAA",
        ),
        (
            "argon2$argon2id$v=19$m=1048576,t=4,p=4$c29tZXNhbHQ$AAAA",
            "argon2$argon2id$v=19$m=1048576,t=5,p=4$c29tZXNhbHQ$AAAA",
        ),
    ],
)
def test_a_hash_that_costs_too_much_is_not_checked(bearable: str, absurd: str) -> None:
    """Every login attempt on that account would cost as much, with any password."""
    assert parse_hash(bearable) is not None
    assert parse_hash(absurd) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("md5$salt$5f4dcc3b5aa765d61d8327deb882cf99", "md5"),
        ("$6$salt$AAAA", "6"),
        ("$P$B12345678", "P"),
        ("pbkdf2:sha256:600000$salt$aa", "pbkdf2:sha256:"),
        ("{SSHA}AAAA", "{SSHA}"),
        ("$2b$31$" + "." * 53, "2b"),
        ("secret$word", "unknown"),
        ("md5", "unknown"),
        ("5f4dcc3b5aa765d61d8327deb882cf99", "unknown"),
    ],
)
def test_of_an_unreadable_hash_only_the_scheme_is_logged(text: str, name: str) -> None:
    assert parse_hash(text) is None
    assert scheme_name_of(text) == name


@given(
    st.text(alphabet="$2ab.y0123456789argon2idpbkdf2_sha256,=ABC+/\n", max_size=90),
    st.text(max_size=9),
)
def test_no_stored_text_raises(text: str, password: str) -> None:
    stored = parse_hash(text)
    if stored is not None and len(text) < 70:
        assert verify_password(password, stored) is not True


MADE = [
    bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode(),
    argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash("secret"),
    "pbkdf2_sha256$10$salt$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=",
    *(text for _, text, _ in VECTORS if text[0] != "$"),
]


@pytest.mark.parametrize("text", MADE, ids=lambda text: text[:14])
def test_a_decoy_costs_the_same_and_opens_nothing(text: str) -> None:
    dummy = dummy_hash_like(known(text))

    assert parse_hash(dummy.text) == dummy
    assert dummy.text.rsplit("$", 1)[0] == text.rsplit("$", 1)[0]
    assert len(dummy.text) == len(text)
    assert verify_password("secret", dummy) is False


def test_there_is_a_decoy_where_no_hash_can_be_read() -> None:
    for texts in ([], ["", "secret", "md5$salt$5f4dcc3b5aa765d61d8327deb882cf99"]):
        dummy = dummy_hash_for(texts)
        assert parse_hash(dummy.text) == dummy
        assert verify_password("", dummy) is False


def test_a_decoy_is_like_most_hashes() -> None:
    """It has their cost parameters, which determine the time, and ignores what differs per user."""
    hashes = [
        *("$2b$04$" + letter * 53 for letter in "ab"),
        *(f"pbkdf2_sha256$20${salt}${'A' * 42}E=" for salt in ("one", "two", "three")),
        *(f"pbkdf2_sha256${rounds}$salt${'A' * 43}=" for rounds in (21, 22, 23, 24)),
        *(["unreadable"] * 9),
    ]

    assert dummy_hash_for(hashes) == dummy_hash_like(known(f"pbkdf2_sha256$20$one${'A' * 43}="))
