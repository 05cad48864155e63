"""Configurations from plain values instead of files."""

from collections.abc import Mapping

from pgrealtime.config.load import _parse_document
from pgrealtime.config.model import Config
from pgrealtime.config.sources import Document


def parse_config(mapping: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Config:
    """Return the configuration of plain values, as YAML gives them.

    ``KEY_file`` is a problem, because this reads no file. Nor is the environment read by default.
    """
    document = Document(value=dict(mapping), lines={})
    return _parse_document(document, environ or {}, refuse_secret_file, "text").require_valid()


def refuse_secret_file(_name: str) -> str:
    raise OSError("files are not read here")
