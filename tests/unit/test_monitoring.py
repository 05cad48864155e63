"""The alerts and the board of ``config/monitoring`` fit the metrics, by Prometheus's own tool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pgrealtime.observe.metrics import LogValues, Metrics, MetricValues
from tests.lacking import lacking

_ROOT = Path(__file__).parents[2]
_FOLDER = _ROOT / "config" / "monitoring"
_ALERTS = _FOLDER / "alerts.yaml"
_METRIC = re.compile(r"\b(?:pgrealtime|process)_\w+")


def _promtool(*arguments: str) -> str:
    program = shutil.which("promtool") or lacking("there is no promtool")
    done = subprocess.run([program, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(_ALERTS.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def _board_expressions() -> Iterator[str]:
    board = json.loads((_FOLDER / "grafana.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def _exposed() -> set[str]:
    """Return the names of the samples of a service that has counted something of each kind."""
    one, pair = {"a": 1}, {("a", "b"): 1}
    values = MetricValues(
        open_connections=1,
        subscription_counts=one,
        events_sent=1,
        closed_connections=one,
        gaps_notified=one,
        mirror_frames=one,
        mirror_resyncs=one,
        resume_outcomes=one,
        refused_subscribe_calls=1,
        incomplete_records=one,
        rule_query_errors=pair,
        auth_checks=one,
        login_results=one,
        read_outcomes=pair,
        forwarded_calls=one,
        ignored_bus_messages=one,
        changes_received=1,
        stream_breaks=one,
        changelog_bytes=1,
        is_replication_connected=True,
        log=LogValues(
            is_owner=True,
            taken_count=1,
            term=1,
            lag_messages=1,
            lag_seconds=1,
            append_seconds=1,
            void_count=1,
            fetched_count=1,
            replicas=one,
        ),
        lag_bytes=1,
        retained_bytes=1,
    )
    text = Metrics().exposition(values).decode()
    return {re.split("[{ ]", line)[0] for line in text.splitlines() if line[0] != "#"}


def test_the_tool_accepts_the_alerts() -> None:
    assert f"{len(_rules())} rules found" in _promtool("check", "rules", str(_ALERTS))


def test_the_tool_accepts_the_board_s_expressions(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(_board_expressions())
    ]
    file = tmp_path / "board.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    assert f"{len(rules)} rules found" in _promtool("check", "rules", str(file))


def test_every_metric_exists() -> None:
    """A renamed one would never alert, and show an empty panel."""
    used = {
        name
        for text in (*(rule["expr"] for rule in _rules()), *_board_expressions())
        for name in _METRIC.findall(text)
    }
    assert len(used) > 15
    assert used - _exposed() == set()


def test_every_panel_has_a_place_of_its_own() -> None:
    panels = json.loads((_FOLDER / "grafana.json").read_text())["panels"]
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in panels}) == len(panels)


class Case(NamedTuple):
    """An alert, and a series that sets it off."""

    alert: str
    series: str
    values: str
    """One a minute."""
    well: str
    """A time at which nothing is wrong yet, or not for long enough."""
    fires: str


CASES = [
    Case("PgrealtimeDown", 'up{job="pgrealtime", instance="a"}', "1x4 0x9", "6m", "8m"),
    Case(
        "PgrealtimeStreamAway",
        'pgrealtime_replication_connected{instance="a"}',
        "1x4 0x9",
        "5m",
        "7m",
    ),
    Case(
        "PgrealtimeSlotRetainsWal",
        'pgrealtime_slot_retained_bytes{instance="a"}',
        "1x4 9000000000x9",
        "5m",
        "12m",
    ),
    Case(
        "PgrealtimeSlotLost",
        'pgrealtime_replication_breaks_total{instance="a", code="slot_lost"}',
        "_x4 1x20",
        "3m",
        "6m",
    ),
    Case(
        "PgrealtimeStreamBreaksOften",
        'pgrealtime_replication_breaks_total{instance="a", code="server_gone"}',
        "0x9 0+1x20",
        "9m",
        "18m",
    ),
    Case(
        "PgrealtimeRuleErrors",
        'pgrealtime_rule_query_errors_total{instance="a", collection="c", reason="timeout"}',
        "1x20 2x20",
        "15m",
        "23m",
    ),
    Case(
        "PgrealtimeMessagesIgnored",
        'pgrealtime_bus_messages_ignored_total{instance="a", code="call_unsealed"}',
        "_x4 1x20",
        "3m",
        "6m",
    ),
    Case("PgrealtimeNoOwner", 'pgrealtime_owner{instance="a"}', "1x4 0x9", "4m", "7m"),
    Case(
        "PgrealtimeConfigurationsDiffer",
        'pgrealtime_replicas{instance="a", configuration="two"}',
        "0x4 1x99",
        "20m",
        "70m",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.alert for case in CASES])
def test_each_alert_fires_for_what_it_is_about_and_not_before(case: Case, tmp_path: Path) -> None:
    always = 'pgrealtime_replicas{instance="a", configuration="one"}'
    inputs = [{"series": case.series, "values": case.values}, {"series": always, "values": "3x99"}]
    firing = (
        f'ALERTS{{alertname="{case.alert}", alertstate="firing"}}',
        [{"labels": "{}", "value": 1}],
    )
    test = {
        "interval": "1m",
        "input_series": inputs,
        "promql_expr_test": [
            {"expr": f"count({firing[0]})", "eval_time": case.well, "exp_samples": []},
            {"expr": f"count({firing[0]})", "eval_time": case.fires, "exp_samples": firing[1]},
            # And nothing else.
            {
                "expr": 'count(ALERTS{alertstate="firing"})',
                "eval_time": case.fires,
                "exp_samples": firing[1],
            },
        ],
    }
    file = tmp_path / "test.yaml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(_ALERTS)], "evaluation_interval": "1m", "tests": [test]})
    )
    _promtool("test", "rules", str(file))


def test_every_alert_is_tried() -> None:
    assert [rule["alert"] for rule in _rules()] == [case.alert for case in CASES]
