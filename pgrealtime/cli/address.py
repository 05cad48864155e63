"""Where commands reach a service that runs on this machine."""

from pgrealtime.config.load import load_config

_REACHABLE_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}  # noqa: S104 (looked up)
"""Address that the service listens on -> host of a URL that reaches it."""


def configured_url(path: str) -> str:
    """Return where the configured service is reached from this machine."""
    server = load_config(path).server
    host = _REACHABLE_HOSTS.get(server.host, server.host)
    return f"http://{host}:{server.port}{server.base_path}"
