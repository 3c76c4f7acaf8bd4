"""The benchmark of speculative decoding runs, and finds the texts the same."""

import json

import pytest

from benchmarks import _results
from benchmarks import _speculative_runs as runs
from benchmarks import speculative as bench


def test_smoke(tmp_path):
    parts = ["plain", "speed", "batch", "equality"]
    folder = str(tmp_path)
    bench.main(
        [
            *("--smoke", "--tag", "test", "--out", folder, "--threads", "1"),
            *("--loop", "launched", "--parts", *parts),
        ]
    )
    rows = _results.read(tmp_path / "speculative.test.json")["rows"]
    same = {
        (row.case["dtype"], row.case["sampling"], row.case["exact"], row.case["batch"])
        for row in rows
        if row.metric == "texts that differ" and not row.value
    }
    fast = {("float32", s, "fast", b) for s in ("greedy", "coupled") for b in (1, 2)}
    assert fast <= same
    assert {("bfloat16", "greedy", "same_width", b) for b in (1, 2)} <= same
    tasks = {r.case["task"] for r in rows if r.metric == "tau"}
    assert tasks == {"chat", "code", "mixed", "all"}
    for row in rows:
        if row.metric == "tau" and row.case["drafter"] == "plain":
            assert row.value == 1.0


def test_compilation_does_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    clock = runs.Clock(10.0, until=150.0)
    now[0] += 4
    with clock.paused():
        now[0] += 30
    assert clock.spent == 4 and not clock.over
    now[0] += 7
    assert clock.over and not runs.Clock(10.0, until=150.0).over
    now[0] += 10
    assert runs.Clock(10.0, until=150.0).over


def test_tasks_come_in_turn_and_two_kinds_of_summaries_are_one(tmp_path):
    file = tmp_path / "prompts.jsonl"
    names = ["chat", "chat", "summarise_news", "qa", "summarise_textbook"]
    lines = [{"category": n, "turns": ["x" * (i + 1)]} for i, n in enumerate(names)]
    file.write_text("\n".join(map(json.dumps, lines)))
    found = bench.read_prompts(file, lambda text: [7] * len(text), 4)
    assert [(task, len(ids)) for task, ids in found] == [
        *(("chat", 1), ("summaries", 3), ("qa", 4), ("chat", 2)),
    ]
    assert [len(ids) for _, ids in bench.first_of(found, 1)] == [1, 3, 4]
    with pytest.raises(ValueError, match="no prompt of at most 4 tokens"):
        bench.read_prompts(file, lambda text: [7] * 5, 4)


def test_break_even_is_where_tau_is_the_cost():
    found = bench.break_even(1.75, 2)
    assert 1 + found + found**2 == pytest.approx(1.75)
    assert bench.break_even(9.0, 2) == 1.0


def test_kernels_are_counted_in_the_outermost_loop():
    text = """HloModule m

%inner (p: s32[]) -> s32[] {
  %f.1 = s32[] fusion(%p), kind=kLoop, calls=%c
  ROOT %f.2 = s32[] fusion(%f.1), kind=kLoop, calls=%c
}

%narrow (p: s32[]) -> s32[] {
  ROOT %f.3 = s32[] fusion(%p), kind=kLoop, calls=%c
}

%wide (p: s32[]) -> s32[] {
  %c.1 = (f32[2]{0}, /*index=1*/s32[]) custom-call(%p), custom_call_target="x"
  ROOT %f.4 = s32[] fusion(%c.1), kind=kLoop, calls=%c
}

%body (p: s32[]) -> s32[] {
  %copy.1 = s32[] copy(%p)
  %b.1 = s32[] bitcast(%copy.1)
  %w.1 = s32[] while(%b.1), condition=%k, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %d.1 = s32[] conditional(%q, %w.1, %w.1), true_computation=%wide, \
false_computation=%narrow
}

ENTRY %main (p: s32[]) -> s32[] {
  %copy.2 = s32[] copy(%p)
  ROOT %w.2 = s32[] while(%copy.2), condition=%k, body=%body
}
"""
    assert runs.kernels_of_round(text) == 1 + 3 * 2 + 2


def test_time_in_which_a_kernel_runs_counts_once():
    assert runs.union([(5, 9), (0, 2), (1, 3), (6, 7)]) == 3 + 4
