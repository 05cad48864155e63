from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pgrealtime.config.load import _parse_document, load_config, read_config
from pgrealtime.config.model import Config, Section
from pgrealtime.config.sources import parse_yaml
from pgrealtime.errors import ConfigError, ConfigProblem
from tests.config_values import parse_config, refuse_secret_file

EXAMPLES = sorted((Path(__file__).parents[3] / "config").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pgrealtime.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(tmp_path: Path, text: str, environ: Mapping[str, str]) -> tuple[ConfigProblem, ...]:
    return read_config(written(tmp_path, text), environ).problems


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, ""), {}) == Config()


def test_all_problems_are_reported_in_one_run_with_their_lines(tmp_path: Path) -> None:
    """The operator corrects them together, not error by error."""
    text = """\
version: 2
database:
  schema: [public]
server:
  port: 99999
  shutdown_grace: 25
  cors_origins: 5
changelog: {max_size: 64MB}
realtime:
  max_connections: many
collections:
  posts:
    tabel: public.posts
  comments: []
"""
    assert problems_of(tmp_path, text, {}) == (
        ConfigProblem("version", "input should be 1", line=1),
        ConfigProblem("database.schema", 'unknown key "schema"', 'perhaps you meant "schemas"', 3),
        ConfigProblem("server.port", "input should be less than or equal to 65535", line=5),
        ConfigProblem(
            "server.shutdown_grace", "not a duration; write it as 500ms, 25s, 5m, 1h or 5d", line=6
        ),
        ConfigProblem("server.cors_origins", "must be a list", line=7),
        ConfigProblem("changelog.max_size", "not a size; write it as 64KiB, 16MiB or 1GiB", line=8),
        ConfigProblem(
            "realtime.max_connections",
            "input should be a valid integer, unable to parse string as an integer",
            line=10,
        ),
        ConfigProblem("collections.posts.table", "is required", line=12),
        ConfigProblem(
            "collections.posts.tabel", 'unknown key "tabel"', 'perhaps you meant "table"', line=13
        ),
        ConfigProblem("collections.comments", "must be a mapping", line=14),
    )


def test_a_problem_is_printed_with_file_line_path_and_hint(tmp_path: Path) -> None:
    path = written(tmp_path, "server:\n  prot: 1\n")

    with pytest.raises(ConfigError) as caught:
        load_config(path, {})

    assert str(caught.value) == (
        f"config_invalid: {path} has 1 problem\n"
        f'DETAIL: {path}:2: server.prot: unknown key "prot" (perhaps you meant "port")'
    )


def test_what_is_right_can_still_be_checked_further(tmp_path: Path) -> None:
    text = "server: {prot: 1, port: 9}\ncollections: {a: {}, b: {table: t, list_rul: x}}\n"
    reading = read_config(written(tmp_path, text), {})

    assert reading.config == parse_config(
        {"server": {"port": 9}, "collections": {"b": {"table": "t"}}}
    )
    assert reading.dropped_keys == {
        ("server", "prot"),
        ("collections", "a"),
        ("collections", "b", "list_rul"),
    }
    with pytest.raises(ConfigError):
        reading.require_valid()


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 problem") as caught:
        load_config(tmp_path / "none.yaml", {})
    assert (
        "can't read the file: No such file or directory"
        " (pgrealtime init writes one, and --config names another)"
    ) in caught.value.detail


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a:\n  - b: [1\n", "not YAML: expected ',' or ']', but got '<stream end>'", 3),
        ("a: b\nc: d: e\n", "not YAML: mapping values are not allowed here", 2),
        ("- a\n- b\n", "the document must be a mapping of sections", 1),
        ("version: 1\n---\nversion: 1\n", "not YAML: but found another document", 2),
        ("a: !env B\n", "not YAML: could not determine a constructor", 1),
        ("a: \x07\n", "not YAML: it has characters that YAML doesn't allow", None),
        ("database: {url: *nowhere}\n", "not YAML: found undefined alias 'nowhere'", 1),
        ("a: &a {b: *a}\n", "nested too deeply, or a part of itself", None),
        ("[" * 5000, "nested too deeply, or a part of itself", None),
        ("a: 2024-13-01\n", "not YAML: month must be in 1..12", None),
    ],
    ids=[
        "open",
        "colon",
        "list",
        "two documents",
        "tag",
        "control",
        "alias",
        "recursive",
        "deep",
        "date",
    ],
)
def test_what_is_no_yaml_mapping_is_reported_with_its_line(
    tmp_path: Path, text: str, message: str, line: int | None
) -> None:
    (problem,) = problems_of(tmp_path, text, {})
    assert problem.message.startswith(message), problem
    assert problem.line == line


@pytest.mark.parametrize(
    "rule",
    ['@request.auth.id != ""', '"public" = status', "'public' = status"],
    ids=["at sign", "text first", "single quotes"],
)
def test_a_rule_that_needs_quotes_in_yaml_is_reported_so(tmp_path: Path, rule: str) -> None:
    """YAML's own message is about tokens and blocks."""
    text = f"collections:\n  posts:\n    table: posts\n    list_rule: {rule}\n"
    (problem,) = problems_of(tmp_path, text, {})
    assert problem.line == 4
    assert problem.hint == "put the whole value in quotes, as in '@request.auth.id != \"\"'"


@pytest.mark.parametrize("text", ["a: b\nc: d: e\n", "a:\n\tb: 1\n", "a: [1\n"])
def test_what_quotes_would_not_mend_has_no_such_hint(tmp_path: Path, text: str) -> None:
    (problem,) = problems_of(tmp_path, text, {})
    assert problem.hint == ""


def test_a_repeated_key_is_a_problem(tmp_path: Path) -> None:
    """YAML readers silently use the last one: a rule would be replaced unseen."""
    text = "collections:\n  posts: {table: a}\n  users: {table: b}\n  posts: {table: c}\n"
    assert problems_of(tmp_path, text, {}) == (
        ConfigProblem("collections.posts", "given twice, first in line 2", line=4),
    )


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    text = """\
collections:
  posts: &posts {table: posts, list_rule: ""}
  drafts:
    <<: *posts
    table: drafts
"""
    drafts = load_config(written(tmp_path, text), {}).collections["drafts"]
    assert (drafts.table, drafts.list_rule) == ("drafts", "")


# -- ${VAR}


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("${A}", {"A": "x"}, "x"),
        ("${A}", {"A": ""}, ""),
        ("a${A}b${B}c", {"A": "1", "B": "2"}, "a1b2c"),
        ("${A:-x}", {}, "x"),
        ("${A:-x}", {"A": ""}, "x"),
        ("${A:-x}", {"A": "y"}, "y"),
        ("${A:-}", {}, ""),
        ("${A:-a:-b}", {}, "a:-b"),
        ("${A:?must be set}", {"A": "y"}, "y"),
        ("$${A}", {"A": "y"}, "${A}"),
        ("$A $ {A} A$", {"A": "y"}, "$A $ {A} A$"),
        ("${A}", {"A": "${B}", "B": "z"}, "${B}"),
    ],
)
def test_variables_are_filled_in(text: str, environ: Mapping[str, str], expected: str) -> None:
    rule = parse_config({"collections": {"c": {"table": "t", "list_rule": text}}}, environ)
    assert rule.collections["c"].list_rule == expected


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        ("${A}", {}, "environment variable A is not set"),
        ("${A:?ask the operator}", {}, "ask the operator"),
        ("${A:?ask the operator}", {"A": ""}, "ask the operator"),
        ("${A:?}", {"A": ""}, "environment variable A is not set"),
        ("${A-b}", {}, 'a "${" that isn\'t ${VAR}; write "$${" for the text'),
        ("${1}", {}, 'a "${" that isn\'t ${VAR}; write "$${" for the text'),
        ("${", {}, 'a "${" that isn\'t ${VAR}; write "$${" for the text'),
    ],
)
def test_a_missing_variable_is_reported_once(
    text: str, environ: Mapping[str, str], message: str
) -> None:
    """Also where the key is required, or validated otherwise: one fault, one problem."""
    with pytest.raises(ConfigError) as caught:
        parse_config({"auth": {"issuers": [{"name": "a", "secret": text}]}}, environ)
    assert caught.value.problems == (ConfigProblem("auth.issuers.0.secret", message),)


def test_variables_are_filled_into_values_and_not_into_keys() -> None:
    """Neither names nor structure of a configuration change with the environment."""
    config = parse_config({"collections": {"${A}": {"table": "${A}"}}}, {"A": "t: [u]"})
    assert config.collections["${A}"].table == "t: [u]"


def test_numbers_booleans_and_lists_may_come_from_variables() -> None:
    config = parse_config(
        {
            "server": {"port": "${PORT_}", "cors_origins": "${ORIGINS}"},
            "realtime": {"same_address": "${SAME}"},
        },
        {"PORT_": "99", "ORIGINS": "https://a, https://b", "SAME": "false"},
    )
    assert config.server.port == 99
    assert config.server.cors_origins == ("https://a", "https://b")
    assert config.realtime.same_address is False


# -- the environment's own keys


def test_the_environment_goes_before_the_file_and_the_file_before_defaults() -> None:
    file = {"server": {"port": 1, "host": "file"}, "realtime": {"max_connections": 7}}
    config = parse_config(
        file, {"PGREALTIME_SERVER__PORT": "2", "PGREALTIME_RECORDS__NULLS": "zero"}
    )

    assert (config.server.port, config.server.host) == (2, "file")
    assert config.realtime.max_connections == 7
    assert config.records.nulls == "zero"
    assert config.server.cors_origins == Config().server.cors_origins


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ("postgresql://file/", 1)),
        ({"DATABASE_URL": "", "PORT": ""}, ("postgresql://file/", 1)),
        ({"DATABASE_URL": "postgresql://platform/", "PORT": "2"}, ("postgresql://platform/", 2)),
        (
            {
                "DATABASE_URL": "postgresql://platform/",
                "PORT": "2",
                "PGREALTIME_DATABASE__URL": "postgresql://ours/",
                "PGREALTIME_SERVER__PORT": "3",
            },
            ("postgresql://ours/", 3),
        ),
    ],
    ids=["none", "empty", "platform", "ours"],
)
def test_what_platforms_set_is_honoured(
    environ: Mapping[str, str], expected: tuple[str, int]
) -> None:
    file = {"database": {"url": "postgresql://file/"}, "server": {"port": 1}}
    config = parse_config(file, environ)
    assert (config.database.url, config.server.port) == expected


def test_every_kind_of_key_can_be_set_by_a_variable() -> None:
    file = {
        "collections": {"Posts": {"table": "a"}},
        "auth": {"issuers": [{"name": "app", "secret": "old"}]},
    }
    config = parse_config(
        file,
        {
            "PGREALTIME_DATABASE__SCHEMAS": "app,public",
            "PGREALTIME_SERVER__CORS_ORIGINS": '["https://a"]',
            "PGREALTIME_REPLICATION__SLOT__NAME": "mine",
            "PGREALTIME_REALTIME__HEARTBEAT": "5s",
            "PGREALTIME_REALTIME__SAME_ADDRESS": "no",
            "PGREALTIME_COLLECTIONS__POSTS__LIST_RULE": "[a]",
            "PGREALTIME_AUTH__ISSUERS__0__SECRET": "new",
        },
    )
    assert config.database.schemas == ("app", "public")
    assert config.server.cors_origins == ("https://a",)
    assert config.replication.slot.name == "mine"
    assert config.realtime.heartbeat == 5.0
    assert config.realtime.same_address is False
    assert config.collections["Posts"].list_rule == "[a]"
    assert config.auth.issuers[0].secret == "new"


def test_variables_without_a_double_underscore_are_not_keys() -> None:
    environ = {"PGREALTIME_CONFIG": "x.yaml", "PGREALTIME_TEST_PG_PORT": "1", "SERVER__PORT": "2"}
    assert parse_config({}, environ) == Config()


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (
            "PGREALTIME_SERVER__PROT",
            ConfigProblem(
                "server.prot",
                'unknown key "prot" (set by PGREALTIME_SERVER__PROT)',
                'perhaps you meant "port"',
            ),
        ),
        (
            "PGREALTIME_SERVER__PORT__DEEPER",
            ConfigProblem("server.port.deeper", "PGREALTIME_SERVER__PORT__DEEPER names no key"),
        ),
        (
            "PGREALTIME_AUTH__ISSUERS__0__SECRET",
            ConfigProblem(
                "auth.issuers.0.secret", "PGREALTIME_AUTH__ISSUERS__0__SECRET names no key"
            ),
        ),
        (
            "PGREALTIME_SERVER__",
            ConfigProblem("server.", 'unknown key "" (set by PGREALTIME_SERVER__)'),
        ),
    ],
    ids=["unknown", "too deep", "no such item", "nothing"],
)
def test_a_variable_that_names_no_key_is_a_problem(variable: str, expected: ConfigProblem) -> None:
    """A mistyped variable must not be ignored."""
    with pytest.raises(ConfigError) as caught:
        parse_config({"server": {"port": 1}, "auth": {"issuers": []}}, {variable: "1"})
    assert caught.value.problems == (expected,)


# -- secrets


def test_a_secret_can_be_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://u:p@h/d\n")
    (tmp_path / "jwt").write_text("two\nlines\n")
    text = f"""\
database: {{url_file: {tmp_path}/url}}
auth:
  issuers:
    - name: app
      secret_file: {tmp_path}/jwt
"""
    config = load_config(written(tmp_path, text), {})
    assert config.database.url == "postgresql://u:p@h/d"
    assert config.auth.issuers[0].secret == "two\nlines"


def test_a_variable_may_name_the_file_and_replaces_what_the_yaml_says(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://secret/")
    path = written(tmp_path, "database: {url: postgresql://yaml/}")

    config = load_config(path, {"PGREALTIME_DATABASE__URL_FILE": str(tmp_path / "url")})
    assert config.database.url == "postgresql://secret/"

    path = written(tmp_path, f"database: {{url_file: {tmp_path}/none}}")
    assert (
        load_config(path, {"DATABASE_URL": "postgresql://env/"}).database.url == "postgresql://env/"
    )


def test_a_secret_given_twice_or_in_a_file_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    text = f"""\
database: {{url: postgresql://h/, url_file: {tmp_path}/url}}
auth:
  issuers:
    - name: app
      secret_file: {tmp_path}/none
"""
    assert problems_of(tmp_path, text, {}) == (
        ConfigProblem("database.url_file", 'both "url" and "url_file" are given', line=1),
        ConfigProblem(
            "auth.issuers.0.secret_file", "can't read the file: No such file or directory", line=5
        ),
    )


def test_only_secrets_can_be_read_from_files(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "server: {host_file: /etc/hostname}", {})
    assert problem.message == 'unknown key "host_file"'


@pytest.mark.parametrize(
    "section",
    [{"issuers": [{"name": "app", "secret": "s"}]}, {"login": {"enabled": True, "secret": "s"}}],
)
def test_without_guests_other_callers_must_be_configured(section: Mapping[str, Any]) -> None:
    """A service to which no caller could subscribe is a mistake."""
    assert not parse_config({"auth": {"allow_guests": False, **section}}).auth.allow_guests
    with pytest.raises(ConfigError) as caught:
        parse_config({"auth": {"allow_guests": False}})
    (problem,) = caught.value.problems
    assert (problem.path, "no caller can subscribe" in problem.message) == ("auth", True)


def test_no_secret_is_ever_printed(tmp_path: Path) -> None:
    """Neither in a repr nor in the problems of a faulty file."""
    good = {
        "database": {"url": "postgresql://u:hunter2@h/", "query_url": "postgresql://u:hunter2@q/"},
        "auth": {
            "issuers": [{"name": "app", "secret": "hunter2", "previous_secret": "hunter2"}],
            "login": {"enabled": True, "secret": "hunter2"},
        },
    }
    assert "hunter2" not in repr(parse_config(good))

    bad = {
        "database": {"url": ["hunter2"], "urll": "hunter2"},
        "auth": {"issuers": [{"name": "app", "secret": {"hunter2": "hunter2"}}]},
    }
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, yaml.safe_dump(bad)), {"PGREALTIME_SERVER__PORT": "hunter2"})
    assert len(caught.value.problems) == 4
    assert "hunter2" not in str(caught.value)


# -- values


def test_durations_that_can_not_be_nothing_are_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"realtime": {"heartbeat": "0s"}, "database": {"statement_timeout": 0}})
    assert {problem.path for problem in caught.value.problems} == {
        "realtime.heartbeat",
        "database.statement_timeout",
    }
    assert parse_config({"changelog": {"max_age": 0}}).changelog.max_age == 0


def test_the_word_null_needs_no_quotes() -> None:
    """YAML reads ``nulls: null`` as no value at all."""
    assert parse_config({"records": {"nulls": None}}).records.nulls == "null"


def test_a_missing_rule_is_null_and_an_empty_one_is_not() -> None:
    """Null is for superusers only, the empty text for every caller: they must not be confused."""
    config = parse_config(
        {"collections": {"a": {"table": "t", "list_rule": "", "view_rule": None}}}
    )
    assert config.collections["a"].list_rule == ""
    assert config.collections["a"].view_rule is None


def test_a_manage_rule_is_never_empty() -> None:
    """PocketBase refuses an empty manage rule: it would show every address to every caller."""
    with pytest.raises(ConfigError) as caught:
        parse_config({"collections": {"a": {"table": "t", "type": "auth", "manage_rule": ""}}})
    assert [problem.path for problem in caught.value.problems] == ["collections.a.manage_rule"]


def test_the_configuration_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config({}).server.port = 1


@given(st.text(alphabet=st.sampled_from("abc:-[]{}&*!|>'\"%@`$?,#~<. \n\t0\x00é"), max_size=60))
def test_any_text_is_a_configuration_or_a_list_of_problems(text: str) -> None:
    """A typing error never causes a traceback."""
    reading = _parse_document(parse_yaml(text), {}, refuse_secret_file, "text")
    assert reading.problems or reading.config is not None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    environ = {
        "APP_JWT_SECRET": "x" * 32,
        "LOGIN_SECRET": "y" * 32,
        "DEMO_SECRET": "z" * 32,
        "DATABASE_URL": "postgresql://127.0.0.1/app",
    }
    assert load_config(path, environ).collections


def test_the_annotated_example_has_every_key_and_the_defaults_it_claims() -> None:
    """It is the reference of the configuration."""
    text = (Path(__file__).parents[3] / "config" / "pgrealtime.yaml").read_text(encoding="utf-8")
    example = parse_yaml(text).value
    assert isinstance(example, dict)

    assert keys_of(Config) - keys_in(Config, example) == set()
    environ = {"APP_JWT_SECRET": "x" * 32}
    assert parse_config(example, environ).model_copy(
        update={"collections": {}, "auth": parse_config({}).auth, "tests": ()}
    ) == parse_config({})


def keys_of(section: type[Section], prefix: str = "") -> set[str]:
    """Return every possible key, with ``*`` for names that the operator chooses."""
    found: set[str] = set()
    for name, info in section.model_fields.items():
        inner, star = below(info.annotation)
        found.add(f"{prefix}{name}")
        found |= keys_of(inner, f"{prefix}{name}{star}.") if inner is not None else set()
    return found


def keys_in(section: type[Section], value: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, held in value.items():
        inner, star = below(section.model_fields[name].annotation)
        found.add(f"{prefix}{name}")
        if inner is not None:
            items = held.values() if isinstance(held, dict) else held
            for one in items if star else [held]:
                found |= keys_in(inner, one, f"{prefix}{name}{star}.")
    return found


def below(annotation: object) -> tuple[type[Section] | None, str]:
    """Return the section that a key holds, and ``.*`` if it holds several."""
    candidates = [annotation, *get_args(annotation)]
    sections = [one for one in candidates if isinstance(one, type) and issubclass(one, Section)]
    return (sections[0] if sections else None), ("" if annotation in sections else ".*")


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"id": 7, "deny": ["nobody"]}, "a caller is guest, superuser or COLLECTION/ID"),
        ({"id": 7, "deny": ["users/"]}, "a caller is guest, superuser or COLLECTION/ID"),
        ({"id": 7}, "name callers to allow or to deny"),
        ({"deny": ["guest"]}, "give one of id, of a record that exists, and record"),
        ({"id": 7, "record": {"id": 7}, "deny": ["guest"]}, "give one of id"),
    ],
)
def test_a_rule_test_has_one_record_and_callers(test: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as failed:
        parse_config({"tests": [{"collection": "posts", **test}]})
    assert message in failed.value.detail


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "metrics.internal"])
def test_metrics_that_others_reach_need_a_token(host: str) -> None:
    """Metrics reveal names and load of collections."""
    with pytest.raises(ConfigError, match="need a token"):
        parse_config({"admin": {"host": host, "port": 8091}}, {})

    assert (
        parse_config({"admin": {"host": host, "port": 8091, "token": "t"}}, {}).admin.token == "t"
    )
    assert parse_config({"admin": {"host": host}}, {}).admin.port == 0
    assert parse_config({"admin": {"host": "::1", "port": 8091}}, {}).admin.port == 8091


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replication": {"slot": {"durable": False}}}, "replication.slot.durable"),
        ({"cluster": {"bus": "postgres", "secret": "x" * 32}}, "cluster.bus: nats"),
        ({"log": {}}, "needs log.nats"),
        ({"cluster": {"bus": "nats", "secret": "x"}}, "a bus needs a secret"),
    ],
    ids=["temporary slot", "another bus", "no servers", "short secret"],
)
def test_a_log_needs_a_durable_slot_and_its_bus(change: dict[str, Any], message: str) -> None:
    """Else each owner would begin at the end of the WAL, and calls would reach nobody."""
    complete = {
        "replication": {"slot": {"durable": True}},
        "cluster": {"bus": "nats", "secret": "x" * 32},
        "log": {"nats": "nats://127.0.0.1"},
    }
    assert parse_config(complete, {}).log.lag == 10.0
    with pytest.raises(ConfigError, match=message):
        parse_config(complete | change, {})


@pytest.mark.parametrize("secret", ["", "x" * 31])
def test_a_bus_needs_a_secret(secret: str) -> None:
    """What is passed on has tokens, and any role of the database may listen."""
    with pytest.raises(ConfigError, match="a bus needs a secret of at least 32 characters"):
        parse_config({"cluster": {"bus": "postgres", "secret": secret}}, {})

    assert parse_config({"cluster": {"secret": secret}}, {}).cluster.bus == "none"
    assert parse_config({"cluster": {"bus": "postgres", "secret": "x" * 32}}, {}).cluster.bus


@pytest.mark.parametrize("name", ["", "App", "a-b", "a" * 33, "a\n", "ä"])
def test_a_cluster_has_a_name_that_channels_can_have(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.name"):
        parse_config({"cluster": {"name": name}}, {})
