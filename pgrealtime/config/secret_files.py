"""Replaces each ``KEY_file`` of a configuration by ``KEY`` with the file's content."""

from collections.abc import Callable
from pathlib import Path

from pgrealtime.config.sources import KeyPath
from pgrealtime.config.validate import keys_at


def read_secret_file(name: str) -> str:
    """Return the content of a file without line breaks at its end."""
    return Path(name).read_text(encoding="utf-8").rstrip("\r\n")


def refuse_secret_file(_name: str) -> str:
    """Raise OSError, for configurations that may read no file."""
    raise OSError("files are not read here")


def replace_secret_files(
    tree: object,
    path: KeyPath,
    read_file: Callable[[str], str],
    problems: list[tuple[KeyPath, str]],
) -> None:
    """Replace secret files through the whole tree, in place.

    Args:
        tree: Plain values.
        path: Of the tree in the document.
        read_file: Returns the content of a file.
        problems: Receives path and message of each file that can't be read.
    """
    match tree:
        case dict():
            for key in keys_at(path):
                if key.endswith("_file") and key in tree:
                    _replace_secret_file(tree, (*path, key), read_file, problems)
            for key, inner in tree.items():
                replace_secret_files(inner, (*path, key), read_file, problems)
        case list():
            for n, inner in enumerate(tree):
                replace_secret_files(inner, (*path, n), read_file, problems)
        case _:
            pass


def _replace_secret_file(
    section: dict[str, object],
    path: KeyPath,
    read_file: Callable[[str], str],
    problems: list[tuple[KeyPath, str]],
) -> None:
    file_key = str(path[-1])
    key = file_key.removesuffix("_file")
    name = section.pop(file_key)
    if not name:
        return
    if section.get(key):
        problems.append((path, f'both "{key}" and "{file_key}" are given'))
        return
    section[key] = ""
    try:
        section[key] = read_file(str(name))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8"
        problems.append((path, f"can't read the file: {reason}"))
