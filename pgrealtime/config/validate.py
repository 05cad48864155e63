"""Validates plain values against the model, and describes problems without showing values.

Pure; called by ``load``.
"""

from copy import deepcopy
from typing import get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pgrealtime.config.model import Config, SecretMarker, Section
from pgrealtime.config.sources import KeyPath
from pgrealtime.spelling import did_you_mean


def validate_tree(
    tree: dict[str, object], reported_paths: set[KeyPath]
) -> tuple[Config | None, list[tuple[KeyPath, str, str]], set[KeyPath]]:
    """Return the configuration, its problems, and the paths of the keys that had to be left out.

    The configuration is None if it isn't valid without those keys either. Problems are path,
    message and hint; those of ``reported_paths`` were reported before, and aren't again.
    """
    try:
        return Config.model_validate(tree), [], set()
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    invalid = [
        (detail["loc"], *_describe_invalid(detail["loc"], detail))
        for detail in details
        if not any(_overlaps(detail["loc"], known) for known in reported_paths)
    ]
    dropped = {_droppable_path(detail) for detail in details}
    remaining = deepcopy(tree)
    for path in dropped:
        remove_key(remaining, path)
    try:
        return Config.model_validate(remaining), invalid, dropped
    except ValidationError:
        return None, invalid, dropped


def _overlaps(first: KeyPath, second: KeyPath) -> bool:
    """Whether one path is the other, or leads into it."""
    shared = min(len(first), len(second))
    return first[:shared] == second[:shared]


def _droppable_path(detail: ErrorDetails) -> KeyPath:
    """Return the path of the key to leave out to solve the problem: never one item of a list."""
    path = detail["loc"][:-1] if detail["type"] == "missing" else detail["loc"]
    lists = (n for n, key in enumerate(path) if isinstance(key, int))
    return path[: next(lists, len(path))]


def remove_key(tree: dict[str, object], path: KeyPath) -> None:
    """Remove the key at a path, if it is there."""
    node: object = tree
    for key in path[:-1]:
        node = node.get(str(key)) if isinstance(node, dict) else None
    if isinstance(node, dict) and path:
        node.pop(str(path[-1]), None)


def _describe_invalid(path: KeyPath, detail: ErrorDetails) -> tuple[str, str]:
    """Return message and hint, without the value, which may be a secret."""
    match detail["type"]:
        case "extra_forbidden":
            return f'unknown key "{path[-1]}"', did_you_mean(str(path[-1]), keys_at(path[:-1]))
        case "missing":
            return "is required", ""
        case "model_type" | "model_attributes_type" | "dict_type":
            return "must be a mapping", ""
        case "tuple_type":
            return "must be a list", ""
        case "value_error":
            return detail["msg"].removeprefix("Value error, "), ""
        case _:
            return detail["msg"][:1].lower() + detail["msg"][1:], ""


def annotation_at(path: KeyPath) -> object:
    """Return the type of the key at a path, or None if there is no such key."""
    annotation: object = Config
    for key in path:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            info = annotation.model_fields.get(str(key))
            annotation = None if info is None else info.annotation
        elif get_origin(annotation) in (tuple, dict):
            annotation = get_args(annotation)[0 if get_origin(annotation) is tuple else 1]
        else:
            return None
    return annotation


def keys_at(path: KeyPath) -> list[str]:
    """Return the keys of the section at a path, ``KEY_file`` of secrets included."""
    annotation = annotation_at(path)
    if not (isinstance(annotation, type) and issubclass(annotation, Section)):
        return []
    keys: list[str] = []
    for name, info in annotation.model_fields.items():
        is_secret = any(isinstance(mark, SecretMarker) for mark in info.metadata)
        keys += [name, f"{name}_file"] if is_secret else [name]
    return keys
