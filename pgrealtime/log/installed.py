"""Whether the client library of NATS is installed, which is an extra."""

from importlib.util import find_spec

from pgrealtime.errors import SetupError


def require_client() -> None:
    """Check that the client library can be imported.

    Raises:
        SetupError: It isn't installed (``nats_missing``).
    """
    if find_spec("nats") is None:
        raise SetupError(
            "the client library of NATS is not installed",
            hint="pip install 'pgrealtime[nats]'; or leave log.nats empty.",
            code="nats_missing",
        )
