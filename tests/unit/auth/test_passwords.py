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

PASSLIB_PBKDF2, PASSLIB_BCRYPT_SHA256 = Scheme.PASSLIB_PBKDF2, Scheme.PASSLIB_BCRYPT_SHA256
PHC_SCRYPT = Scheme.PHC_SCRYPT
WERKZEUG_PBKDF2, WERKZEUG_SCRYPT = Scheme.WERKZEUG_PBKDF2, Scheme.WERKZEUG_SCRYPT

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
    # passlib 1.7.4: X.using(rounds=...).hash("lètmein"); bcrypt_sha256 also in its first version.
    ("lètmein", "$pbkdf2$12000$prT2/h.D0DqHUErJee/9Xw$KqwZZdH/5sQXTtfVdCbHfPuyfK0", PASSLIB_PBKDF2),
    (
        "lètmein",
        "$pbkdf2-sha256$12000$L.VcC0Ho/Z.TUgrhnJMyRg$wT9Y0Y.E/YASf2G6y1n/fUlvrQYc.CrzXuXrldgxF8Q",
        PASSLIB_PBKDF2,
    ),
    (
        "lètmein",
        (
            "$pbkdf2-sha512$12000$VMq5V4pRilGqda517l3rHQ$Lx39o5m9WwscXYzvWshvOezv11B6tWB5IJtdEYauSIsb"
            "LE4NXO9kehfFjMi5S4fG1fGxmqzNkm46JOuCYHkuFA"
        ),
        PASSLIB_PBKDF2,
    ),
    (
        "lètmein",
        "$bcrypt-sha256$v=2,t=2b,r=4$/OwPnkHdu1fCe1CXwaORfO$vi7Oa0Nv6vwTl1/k6jkHV5yxbxqSzO.",
        PASSLIB_BCRYPT_SHA256,
    ),
    (
        "x" * 100,
        "$bcrypt-sha256$v=2,t=2b,r=4$LaihzOoB8ix/VK2jOBuOPO$2.K0qs4hyUpV9D8eAdewq1/jBYSo/Ae",
        PASSLIB_BCRYPT_SHA256,
    ),
    (
        "lètmein",
        "$bcrypt-sha256$2b,4$8DWdlN8e.h1OQkC371my.e$r91rq9zW8lNDwFkluMv/ebw7omE84GW",
        PASSLIB_BCRYPT_SHA256,
    ),
    (
        "lètmein",
        "$scrypt$ln=10,r=8,p=1$TSmldI7R2nsPgRACoPQ+Jw$9bLKtMIYCw3iPzYz62J83ZrRtsIzUkRU1WPHniC+uzE",
        PHC_SCRYPT,
    ),
    (
        "lètmein",
        "$scrypt$ln=12,r=4,p=3$QChlDMEYo/Q+J6SUUsqZUw$IC8YJvKcXUigH8TVJBg+S3iPl+DCC5t+wHxvVGLEb1o",
        PHC_SCRYPT,
    ),
    (
        "lètmein",
        (
            "$argon2id$v=19$m=1024,t=1,p=4$yZlzzjmHsJZSqhUCoNS6lw"
            "$wp+VCmnmGiYczGZKWniTtXfe1+N0hR7/UznQsF0vkZs"
        ),
        Scheme.ARGON2,
    ),
    # AdonisJS: @adonisjs/hash 10.1.1.
    (
        "lètmein",
        (
            "$scrypt$n=1024,r=8,p=1$QBWZHiAEP3Jnwz9S6c/d9g$zBSo3eEhOYIQjm+tvw6PbR3oPE+GC4nvCntMEiGv"
            "2snkWiWvCBVrjzlZbo+vfsW1LhdHC4/YP6fCurYjv6oEBQ"
        ),
        PHC_SCRYPT,
    ),
    # Node: crypto.scryptSync with @phc/format 1.0.0, argon2 0.45.1, @node-rs/argon2 2.2.1,
    # bcryptjs 3.0.3.
    (
        "lètmein",
        (
            "$scrypt$ln=10,r=8,p=1$dPqdZQq6S4y1/2aoAOf/ew$pH4Z25PZCtdSxDw5tRArFIXZ/o3/tNhCKSSKr/8tI3j1"
            "n3PBaIBZT2EacJ6SOrTdGSktcnWbEVPzZsBEqtYkuA"
        ),
        PHC_SCRYPT,
    ),
    (
        "lètmein",
        (
            "$argon2id$v=19$m=1024,p=1,t=2$QFmGkkVVVeXViQCiPsypRA"
            "$oQHcfWDHLJm5expWCXnBROxsh9bwvtRK69LEavc/Pb4"
        ),
        Scheme.ARGON2,
    ),
    (
        "lètmein",
        (
            "$argon2id$v=19$m=1024,t=2,p=1$tg4rmg+jH+IPlqD/uz8gxw"
            "$UOHbitK/fVo19RuAwLQcgRUJD+5w1fW6+RInYFuNHpA"
        ),
        Scheme.ARGON2,
    ),
    (
        "lètmein",
        "$2b$04$vOwsyuKqPly.smBXvPv7eeioip6qt9bN50HSNkSE.9ERMJ3D.yVKy",
        Scheme.BCRYPT,
    ),
    # Werkzeug 3.1.9: generate_password_hash("lètmein", "scrypt:1024:8:1") and so on.
    (
        "lètmein",
        (
            "scrypt:1024:8:1$flAxqvJMH9Xx7gZ7$3ed6a3b89a18b150d83f7f33d79e7721df3b9e3a68b25257a573d823c7"
            "7697045504a68309e17aa6080b0bc4a37c742f29c927085ed9e152d116629ff82394f6"
        ),
        WERKZEUG_SCRYPT,
    ),
    (
        "lètmein",
        (
            "pbkdf2:sha256:12000$R9GPR1xSPA9oLzfa"
            "$eb911a57b1759449780a6a14484dfee5478d1bdf0777a1e0ec4acfae6b5810de"
        ),
        WERKZEUG_PBKDF2,
    ),
    (
        "lètmein",
        "pbkdf2:sha1:12000$a0UchuvBjxaZ8Mv2$9d8cb0ad7f26e312c2922bc40b6d6a14af5090df",
        WERKZEUG_PBKDF2,
    ),
    (
        "lètmein",
        (
            "pbkdf2:sha512:12000$RmFgbtfa0LUcwZFD$5e178369b4bc9f58500c59dab27628fab800b7716d6e0b4810ca46"
            "e2e5234d4ef3a40d5b84900035d118f885e1f20ac5cfcbbfb96be5771e12c9cdd6b0061315"
        ),
        WERKZEUG_PBKDF2,
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
        (
            "$argon2id$v=19$m=1048576,p=4,t=4$c29tZXNhbHQ$AAAA",
            "$argon2id$v=19$m=1048576,p=4,t=5$c29tZXNhbHQ$AAAA",
        ),
        (f"$scrypt$ln=19,r=8,p=4$c2FsdA${'A' * 43}", f"$scrypt$ln=19,r=8,p=5$c2FsdA${'A' * 43}"),
        (
            f"$scrypt$n=524288,r=8,p=4$c2FsdA${'A' * 43}",
            f"$scrypt$n=524288,r=8,p=5$c2FsdA${'A' * 43}",
        ),
        (f"$scrypt$ln=1,r=8,p=1$c2FsdA${'A' * 43}", f"$scrypt$ln=99,r=8,p=1$c2FsdA${'A' * 43}"),
        (f"scrypt:524288:8:4$s${'0' * 128}", f"scrypt:524288:8:5$s${'0' * 128}"),
        (
            f"$pbkdf2-sha256$20000000$c2FsdA${'A' * 43}",
            f"$pbkdf2-sha256$20000001$c2FsdA${'A' * 43}",
        ),
        (f"pbkdf2:sha512:20000000$s${'0' * 128}", f"pbkdf2:sha512:20000001$s${'0' * 128}"),
        (
            f"$bcrypt-sha256$v=2,t=2b,r=17${'.' * 22}${'.' * 31}",
            f"$bcrypt-sha256$v=2,t=2b,r=18${'.' * 22}${'.' * 31}",
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
        ("scrypt:1:8:1$salt$aa", "scrypt:"),
        ("$fbscrypt$v=1,n=14,r=8,p=1,ss=Bw==,sk=ou9$c2FsdA==$AAAA", "fbscrypt"),
        ("$argon2id$v=19$m=8,t=1,t=1$c2Fs$AAAA", "argon2id"),
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
    *(text for _, text, _ in VECTORS),
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
