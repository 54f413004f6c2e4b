"""timeline.jsonl: each step once, however often the run was interrupted."""
from __future__ import annotations

from hdpo.train.timeline import Spans, Timeline, read_timeline


def test_a_run_that_goes_back_replaces_its_lines_and_a_torn_one_is_left_out(tmp_path):
    path, spans = tmp_path / "run" / "timeline.jsonl", Spans()
    spans.note("rollout", 0.5, 2.0)
    spans.divide("rollout", {"generation": 1.5, "tools": 0.25, "ranks": -0.01})
    spans.divide("rollout", {"generation": 0.5})
    taken = spans.take()
    assert taken == {"spans": [("rollout", 0.5, 2.0)], "parts": {"rollout": {"generation": 2.0, "tools": 0.25, "ranks": 0.0}}}
    assert spans.take() == {"spans": [], "parts": {}}
    first = Timeline(path)
    for step in (1, 2, 3):
        first.write(step, 4.0, [taken])
    with path.open("a") as file:
        file.write('{"step": 4, "sec')
    again = Timeline(path)
    again.write(2, 5.0, [taken, taken])
    assert [(line["step"], line["seconds"], len(line["ranks"])) for line in read_timeline(path)] == [(1, 4.0, 1), (2, 5.0, 2)]
