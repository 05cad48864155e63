"""Passwords against hashes that others made: published test vectors, node's crypto."""

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
    decoy_like,
    first_decoy,
    is_correct,
    read_hash,
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
]


def known(text: str) -> StoredHash:
    stored = read_hash(text)
    assert stored is not None
    return stored


@pytest.mark.parametrize(("password", "text", "scheme"), VECTORS)
def test_published_hashes_are_understood(password: str, text: str, scheme: Scheme) -> None:
    stored = known(text)

    assert stored.scheme is scheme
    assert is_correct(password, stored) is True
    assert is_correct(password + "x", stored) is False


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
    assert is_correct("lètmein", stored) is True
    assert is_correct("letmein", stored) is False


@pytest.mark.parametrize("prefix", ["$2a$", "$2b$", "$2y$"])
def test_bcrypt_has_three_prefixes_in_the_wild(prefix: str) -> None:
    """Go and Python, newer libraries, PHP."""
    text = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()

    assert is_correct("secret", known(prefix + text[4:])) is True


def test_bcrypt_sees_72_bytes() -> None:
    """Applications whose library cuts longer passwords have stored hashes of the beginning."""
    text = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()

    assert is_correct("x" * 200, known(text)) is True
    assert is_correct("x" * 71, known(text)) is False


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
        "pbkdf2_sha256$0$salt$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "$argon2id$",
        "!",
    ],
)
def test_what_is_no_known_hash_lets_nobody_in(text: str) -> None:
    """Least of all a password stored as it is. Django marks unusable ones by "!"."""
    assert read_hash(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "$2a$99$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW",
        "$argon2id$v=19$m=65536$c29tc2FsdA$CTFhFdXPJO1a",
        "$argon2id$v=19$m=8,t=1,p=1$c2FsdA$A",
    ],
)
def test_a_hash_that_looks_right_and_is_not_is_unusable(text: str) -> None:
    """Not wrong but nothing: the time it didn't take must be made up for."""
    assert is_correct("secret", known(text)) is None


@given(
    st.text(alphabet="$2ab.y0123456789argon2idpbkdf2_sha256,=ABC+/\n", max_size=90),
    st.text(max_size=9),
)
def test_no_stored_text_raises(text: str, password: str) -> None:
    stored = read_hash(text)
    if stored is not None and len(text) < 70:
        assert is_correct(password, stored) is not True


MADE = [
    bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode(),
    argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash("secret"),
    "pbkdf2_sha256$10$salt$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=",
]


@pytest.mark.parametrize("text", MADE, ids=["bcrypt", "argon2", "pbkdf2"])
def test_a_decoy_costs_the_same_and_opens_nothing(text: str) -> None:
    decoy = decoy_like(known(text))

    assert read_hash(decoy.text) == decoy
    assert decoy.text.rsplit("$", 1)[0] == text.rsplit("$", 1)[0]
    assert len(decoy.text) == len(text)
    assert is_correct("secret", decoy) is False


def test_there_is_a_decoy_from_the_start() -> None:
    assert read_hash(first_decoy().text) == first_decoy()
    assert is_correct("", first_decoy()) is False
