"""Caches of what clients submitted: bounded in weight."""

from __future__ import annotations

import gc
from weakref import ref

from pgrealtime.auth.principal import AuthRecord
from pgrealtime.caches import WeightedCache, cached_per_object
from pgrealtime.rules.engine.compiler import RuleCompiler
from pgrealtime.rules.language.request import RuleRequest
from tests.unit.rules.schema import COLLECTIONS


def test_what_was_not_used_for_longest_goes_first() -> None:
    kept: WeightedCache[str, str] = WeightedCache(10)
    made = []

    def get(key: str, weight: int) -> str:
        def make() -> tuple[str, int]:
            made.append(key)
            return key.upper(), weight

        return kept.get(key, make)

    assert [get(key, 4) for key in "aba"] == ["A", "B", "A"]
    get("c", 4)
    for key in "acb":
        get(key, 4)

    assert made == ["a", "b", "c", "b"]
    assert get("heavy", 100) == "HEAVY"
    assert len(kept) == 1
    get("light", 1)
    assert len(kept) == 1
    assert made.count("heavy") == 1


def test_what_is_kept_with_something_goes_with_it() -> None:
    class Thing:
        pass

    calls = []

    @cached_per_object
    def name(of: Thing) -> str:
        calls.append(1)
        return str(type(of))

    thing = Thing()
    assert name(thing) == name(thing)
    gone = ref(thing)
    del thing
    gc.collect()

    assert len(calls) == 1
    assert gone() is None


def test_filters_that_nobody_uses_any_more_are_bounded_in_size() -> None:
    """One client could otherwise fill the memory with what it once subscribed to."""
    planner = RuleCompiler(COLLECTIONS)
    me = AuthRecord(collection_id="x", collection_name="users", id="u1")
    for n in range(200):
        # Another shape each time: "=" or "~" by the bits of the number.
        ops = ["=~"[n >> bit & 1] for bit in range(50)]
        text = " && ".join(f"title {op} '{n}'" for op in ops)
        planner.bind_caller(
            COLLECTIONS["posts"], "", RuleRequest(principal=me, query={"filter": text})
        )

    assert len(planner._cached_filter_plans) <= 4096 // 50
    assert len(planner._filters_by_text) <= 200


def test_rules_are_kept_however_many_filters_come() -> None:
    planner = RuleCompiler(COLLECTIONS)
    posts = COLLECTIONS["posts"]
    for n in range(300):
        planner.bind_caller(posts, f"title = '{n}'", RuleRequest())

    assert planner._cached_rule_plan.cache_info().currsize == 300
