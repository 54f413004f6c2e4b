"""The report in a real browser, as a file and served: filter, search, sort, open, compare; nothing leaves; text is text."""
from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import urllib.error
import urllib.request

import pytest
from browser import open_browser
from synthetic_run import make_task, make_trajectory, score, write_run

from hdpo.report.page import page_of, write_report
from hdpo.report.server import Server, Site
from hdpo.report.shelf import Shelf
from hdpo.state.dump import write_rollouts
from hdpo.state.trained import TrainedRow, write_trained
from hdpo.train.timeline import Timeline
from hdpo.types import Judgement, Verdict

NASTY = "</script></pre><script>window.pwned=1</script><img src=//evil.example/x onerror=window.pwned=2>"
NASTY += "\u2028${`'\"&amp;" + "W" * 400


@pytest.fixture(scope="module")
def chromium():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "first")


def make_run(folder, right: int = 2):
    """Two steps of three prompts with four rollouts, evaluations, log-probs of the trainer and a timeline."""
    write_run(folder, steps=2)
    for step in (1, 2):
        groups, advantages, trained = [], [], []
        for prompt in range(3):
            task = make_task(prompt, needed=prompt % 2 == 0)
            group = score(tuple(make_trajectory(task, n, call=n % 2 == 0, right=n < right + step - 1) for n in range(4)), prompt)
            groups.append(group)
            advantages += [(1.5 - n, 0.7 * (-1) ** n) for n in range(4)]
            trained += [TrainedRow(prompt, n, [-0.2] * group.trajectories[n].num_sampled,
                                   [-0.1] * group.trajectories[n].num_sampled) for n in range(4) if n != 3]
        write_rollouts(folder / "rollouts" / f"step_{step:06d}.parquet", groups, step=step, advantages=advantages)
        write_trained(folder / "rollouts", step, trained, 0, 1)
        Timeline(folder / "timeline.jsonl").write(step, 10.0, [
            {"spans": [["sync", 0.0, 1.0], ["rollout", 1.0, 6.0 - rank], ["score", 7.0, 0.5]],
             "parts": {"rollout": {"generation": 4.0, "tools": 0.5, "ranks": float(rank)}}} for rank in range(2)])
    return folder


@pytest.fixture(scope="module")
def site(run):
    with serving(run) as url:
        yield url


class serving:
    def __init__(self, *folders):
        shelves = [Shelf(folder) for folder in folders]
        self.server = Server(Site(shelves, lambda: page_of(folders, served=True)), "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self.server.url

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture(params=["file", "served"])
def address(request, run):
    return write_report(run).as_uri() if request.param == "file" else request.getfixturevalue("site")


@pytest.fixture
def tab(chromium, address):
    page = chromium.page()
    yield page
    assert [url for url in page.requests() if not url.startswith(address)] == [], "nothing leaves the page's origin"
    assert page.errors() == []
    page.close()


STEP = "#rollouts?dump=0/step_000001"
ROWS = "[...document.querySelectorAll('.browser .row')].map((row) => Number(row.dataset.row))"


def rows_once(tab, expected):
    tab.until(f"JSON.stringify({ROWS}) === '{json.dumps(expected, separators=(',', ':'))}'")


def test_rows_are_filtered_by_what_tells_them_apart_and_the_address_says_so(tab, address):
    tab.open(address + STEP)
    rows_once(tab, list(range(12)))
    facets = tab.js("[...document.querySelectorAll('.filters [data-facet]')].map((s) => s.dataset.facet)")
    assert facets == ["source", "need", "verdict", "tools", "sort"]
    tab.choose("verdict", "wrong")
    rows_once(tab, [2, 3, 6, 7, 10, 11])
    tab.choose("tools", "python")
    rows_once(tab, [2, 6, 10])
    tab.choose("need", "tool needed")
    rows_once(tab, [2, 10])
    assert "verdict=wrong" in tab.js("location.hash") and "2 of 12 rows" in tab.texts(".count")[0]
    tab.js("history.back()")
    rows_once(tab, [2, 6, 10])
    tab.click(".clear")
    rows_once(tab, list(range(12)))


def test_text_is_searched_in_turns_and_observations_and_rows_are_sorted_by_advantage(tab, address):
    tab.open(address + STEP)
    rows_once(tab, list(range(12)))
    tab.key("/")
    tab.type("ENLARGE it")
    rows_once(tab, [0, 2, 4, 6, 8, 10])
    tab.key("Escape")
    tab.choose("sort", "-a_acc")
    rows_once(tab, [0, 4, 8, 2, 6, 10])
    tab.choose("sort", "a_acc")
    rows_once(tab, [2, 6, 10, 0, 4, 8])


def test_a_row_is_a_conversation_with_pictures_call_observation_verdict_and_rewards(tab, address):
    tab.open(address + STEP + "&row=4")
    text = tab.until("document.querySelector('.detail .verdict') && document.querySelector('.detail').innerText")
    for wanted in ("Which digit is printed on the large sign?", "calls python", "image_1.crop", "Code execution result",
                   "correct, by rule", "accuracy advantage", "+1.50", "tool advantage", "+0.70", "in Q"):
        assert wanted in text, wanted
    kinds = tab.js("[...document.querySelectorAll('.detail [data-kind]')].map((n) => n.dataset.kind)")
    assert kinds == ["prompt", "turn", "observation", "turn"]
    sizes = tab.until("(() => { const all = [...document.querySelectorAll('.detail img')]; return all.length === 2 && "
                      "all.every((i) => i.complete && i.naturalWidth) && all.map((i) => [i.naturalWidth, i.width]); })()")
    assert [size[0] for size in sizes] == [448, 320] and all(size[1] >= 160 for size in sizes)
    tab.click(".picture")
    assert tab.until("document.querySelector('dialog').open && document.querySelector('dialog img').naturalWidth") == 448


def test_the_tokens_of_a_row_show_mask_log_probs_ratio_and_advantages(tab, address):
    tab.open(address + STEP + "&row=0&tab=tokens")
    tab.until("document.querySelector('.token.sampled')")
    counts = tab.js("['.sampled', '.given'].map((c) => document.querySelectorAll('.response ' + c).length)")
    assert counts[0] == 60 and counts[1] > 0
    choices = tab.js("[...document.querySelectorAll('.choice input')].map((i) => i.value)")
    assert choices == ["mask", "engine", "trainer", "ratio", "step", "a_acc", "a_tool"]
    tab.js("document.querySelector('.token.sampled').focus()")
    facts = tab.until("document.querySelector('.token-facts').innerText")
    for wanted in ("engine -0.25", "trainer -0.2", "ratio trainer / engine 1.051", "ratio of the update 1.105",
                   "accuracy advantage +1.50"):
        assert wanted in facts, facts
    tab.key("ArrowRight")
    tab.until("document.activeElement.dataset.index === '141'")
    tab.js("document.querySelector('.choice input[value=ratio]').click()")
    assert tab.js("getComputedStyle(document.querySelector('.token.sampled')).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_the_rollouts_of_a_prompt_stand_side_by_side_with_both_advantages(tab, address):
    tab.open(address + STEP + "&row=5&tab=group")
    tab.until("document.querySelectorAll('.beside .rollout').length === 4")
    cells = tab.js("[...document.querySelectorAll('table.group tbody tr')]"
                   ".map((r) => [...r.children].map((c) => c.innerText.trim()))")
    assert [row[-2:] for row in cells] == [["+1.50", "+0.70"], ["+0.50", "−0.70"], ["−0.50", "+0.70"], ["−1.50", "−0.70"]]
    assert [row[6] for row in cells] == ["yes", "yes", "", ""], "membership of Q"
    assert tab.js("new Set([...document.querySelectorAll('.beside .rollout')]"
                  ".map((n) => n.getBoundingClientRect().top)).size") == 1


def test_the_same_task_is_found_in_another_step(tab, address):
    tab.open(address + STEP + "&row=2&tab=history")
    tab.until("document.querySelectorAll('.beside .rollout').length === 2")
    assert tab.texts(".beside h4") == ["step 1", "step 2"]
    others = tab.js("[...document.querySelectorAll('[data-facet=other] option')].map((o) => o.textContent)")
    assert len(others) == 7 and others[-1].startswith("step 2, row 3: wrong")


def test_before_and_after_lists_what_changed_and_opens_both(tab, address):
    tab.open(address + "#pairs")
    tab.until("document.querySelectorAll('.pair-row').length > 5")
    tab.choose("change", "call dropped")
    tab.until("[...document.querySelectorAll('.pair-row')].every((r) => r.innerText.includes('call dropped'))")
    tab.click(".pair-row")
    tab.until("document.querySelectorAll('.opened .rollout').length === 2")
    first, second = tab.texts(".opened .rollout")
    assert "calls python" in first and "calls python" not in second
    assert tab.texts(".opened h4") == ["held out, after SFT", "held out, after RL"]


def test_the_timeline_of_a_step_shows_every_rank_and_what_the_rollout_waited_for(tab, address):
    tab.open(address + "#timeline?step=2")
    tab.until("document.querySelectorAll('.lane').length === 2")
    titles = tab.js("[...document.querySelectorAll('.lane:nth-of-type(3) i, .lane i')].map((n) => n.title)")
    assert "rollout: 6 s, from 1 s" in titles and "rollout, waiting for tools: 0.5 s" in titles
    assert any(title.startswith("judge") for title in titles)
    assert tab.js("document.querySelector('.slider input').value") == "1"
    assert tab.js("document.querySelector('a.button').getAttribute('href')") == "#rollouts?dump=0%2Fstep_000002"


def test_a_link_to_a_step_that_is_not_there_says_so_and_leads_on(tab, address):
    tab.open(address + "#rollouts?dump=0%2Fstep_000099&row=3")
    assert "step 99 is not in" in tab.until("document.querySelector('.rows .empty')?.innerText")
    assert tab.js("document.querySelectorAll('.rows .row').length") == 0
    tab.choose("dump", "0/step_000001")
    tab.until("document.querySelectorAll('.rows .row').length > 0 && !document.querySelector('.rows .empty')")
    assert tab.errors() == []


def test_keys_alone_move_through_rows_and_steps(tab, address):
    tab.open(address + STEP)
    rows_once(tab, list(range(12)))
    tab.until("document.querySelector('.row[aria-current=true]').dataset.row === '0'")     # the first is open
    tab.key("ArrowDown")
    tab.until("document.querySelector('.row[aria-current=true]').dataset.row === '1'")
    assert tab.js("document.activeElement.dataset.row") == "1"
    tab.key("]")
    tab.until("location.hash.includes('step_000002')")
    tab.until(f"document.querySelector('.detail .meta')?.innerText.startsWith('step 2') && {ROWS}.length === 12")


@pytest.mark.parametrize("width", [1400, 390])
def test_no_view_is_wider_than_the_window(chromium, run, width):
    page, address = chromium.page(width, 844), write_report(run).as_uri()
    for view in ("", STEP, STEP + "&row=4", STEP + "&row=4&tab=group", STEP + "&row=4&tab=tokens", "#pairs", "#timeline",
                 "#settings"):
        page.open("about:blank")
        page.open(address + view)
        page.until("document.querySelector('.view:not([hidden])').innerText.length > 20")
        assert page.js("document.documentElement.scrollWidth") <= width, view
    page.close()


@pytest.mark.parametrize("width", [1400, 390])
def test_bars_of_a_tile_lie_one_below_the_other_and_no_word_of_a_table_is_broken(chromium, run, width):
    page, address = chromium.page(width, 844), write_report(run).as_uri()
    bars = page.open(address).js("[...document.querySelectorAll('.tile')].map((t) => [...t.querySelectorAll('.bars i')]"
                                 ".map((i) => i.getBoundingClientRect()).map((box) => [box.top, box.bottom]))")
    assert bars and all(before[1] <= after[0] for before, after in bars)
    page.open("about:blank")
    page.open(address + STEP + "&row=5&tab=group").until("document.querySelector('table.group')")
    heights = page.js("[...document.querySelectorAll('table.group :is(th, td)')].map((cell) => "
                      "cell.getBoundingClientRect().height)")
    assert max(heights) < 70, "two lines at most"
    page.close()


def test_two_runs_are_compared_in_curves_settings_and_tasks(chromium, run, tmp_path):
    other = make_run(tmp_path / "second", right=3)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("w_tool: 0.15", "w_tool: 0.3"))
    with serving(run, other) as url:
        for address in (write_report(run, other).as_uri(), url):
            page = chromium.page().open(address)
            text = page.until("document.querySelector('.view:not([hidden])').innerText")
            assert "first → second" in text and "hdpo.w_tool" in text and "0.3" in text
            assert page.js("document.querySelectorAll('path[stroke-dasharray]').length") > 5
            page.open("about:blank")
            page.open(address + "#pairs?a=0/step_000001&b=1/step_000001")
            page.until("document.querySelectorAll('.pair-row').length === 3")
            page.click(".pair-row")
            page.until("document.querySelectorAll('.opened .rollout').length === 2")
            assert page.texts(".opened h4") == ["first: step 1", "second: step 1"]
            assert page.errors() == []
            page.close()


def hostile_run(folder):
    made = make_trajectory(make_task(0, True), 0, call=True, right=True)
    task = dataclasses.replace(make_task(0, True), id=NASTY, data_source=NASTY, ground_truth=NASTY,
                               messages=[{"role": "user", "content": "<image>" + NASTY}])
    calls = tuple(dataclasses.replace(c, name=NASTY, arguments={NASTY: NASTY, "b": 1}, observation=NASTY) for c in made.calls)
    turns = (f"<reason>{NASTY}</reason>{NASTY}<tool_call>{NASTY}</tool_call>", f"{NASTY}<answer>{NASTY}</answer>{NASTY}")
    one = dataclasses.replace(made, task=task, calls=calls, turns=turns, error=NASTY)
    group = dataclasses.replace(score((one,)), task=task, trajectories=(one,),
                                judgements=(Judgement(Verdict.WRONG, NASTY, NASTY),))
    plain = score((make_trajectory(make_task(1, False), 0, call=False, right=True),), 1)
    for path in (folder / "eval" / "sft.parquet", folder / "eval" / "<b>rl.parquet", folder / "rollouts" / "step_000001.parquet"):
        write_rollouts(path, [group, plain], step=1, advantages=[(1.0, 0.5), (0.0, 0.0)])
    (folder / "metrics.jsonl").write_text('{"step": 1, "tool/rate": 0.5, "time/<script>x": 2}\n')
    (folder / "config.yaml").write_text(NASTY)
    Timeline(folder / "timeline.jsonl").write(1, 2.0, [{"spans": [[NASTY, 0.0, 1.0]], "parts": {"rollout": {NASTY: 1.0}}}])
    return folder


@pytest.mark.parametrize("width", [1400, 390])
def test_hostile_text_in_every_field_runs_nothing_breaks_nothing_and_asks_for_nothing(chromium, tmp_path, width):
    run = hostile_run(tmp_path / "run<script>window.pwned=3<")
    with serving(run) as url:
        for address in (write_report(run).as_uri(), url):
            page = chromium.page(width, 844)
            for view, tab in itertools.product(("", "#settings", "#timeline", "#pairs", "#rollouts?dump=0/step_000001&row=0"),
                                               ("", "group", "tokens", "history")):
                if tab and not view.startswith("#rollouts"):
                    continue
                page.open("about:blank")
                page.open(address + view + (tab and f"&tab={tab}"))
                page.until("document.querySelector('.view:not([hidden])').innerText.length > 20")
                assert page.js("document.documentElement.scrollWidth") <= width, (view, tab)
            page.until("document.body.innerText.includes('window.pwned')")
            assert page.js("window.pwned === undefined && document.scripts.length === 2")
            assert [asked for asked in page.requests() if not asked.startswith((address, "about:"))] == []
            assert page.errors() == []
            page.close()


def test_the_server_answers_its_own_address_alone(site):
    def status(url, host=None, method="GET"):
        request = urllib.request.Request(url, method=method, headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status
        except urllib.error.HTTPError as exc:
            return exc.code
    root = site.rsplit("/", 2)[0]
    assert status(site) == 200 and status(site, "localhost:9") == 200
    assert status(site, "evil.example") == 403, "a name that somebody else points here"
    assert status(root + "/") == status(root + "/guess/") == status(root + "/guess/sheet?dump=0/step_000001") == 404
    step = "dump=0/step_000001"
    for path in ("row?dump=0/../../config&row=0", f"row?{step}&row=99", "row?dump=9/step_000001&row=0", f"row?{step}&row=-1",
                 f"row?{step}&row=x", "sheet", "..%2f..%2fconfig.yaml", f"picture?{step}&row=0&place=7", "_shelf?name=1"):
        assert status(site + path) == 404, path
    assert status(site, method="POST") == status(site, method="PUT") == status(site, method="DELETE") == 501


def test_a_curations_rows_are_browsed_by_stage_and_reason(chromium, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hdpo.curation.result import DROPPED_SCHEMA

    task = make_task(0, True)
    messages = [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "<image>" + task.question},
                {"role": "assistant", "content": "<reason>a</reason><tool_call>{}</tool_call>"},
                {"role": "user", "content": "seen<image>"}, {"role": "assistant", "content": "<answer>3</answer>"}]
    rows = [{"source": "thyme", "source_file": "a.json", "source_row": n, "stage": "1" if n < 3 else "2",
             "reason": f"reason_{n % 2}", "detail": "why", "messages": messages,
             "images": [{"bytes": task.images[0]}] * 2, "extra_info": "{}"} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows, schema=DROPPED_SCHEMA), tmp_path / "dropped.parquet")
    counts = {"in": 5, "kept": 0, "dropped": {"reason_0": 3, "reason_1": 2}, "unreadable": {}, "waiting": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({"thyme": {"1": counts}, "about": {"stages": ["1"]}}))
    with serving(tmp_path) as url:
        for address in (write_report(tmp_path).as_uri(), url):
            page = chromium.page().open(address + "#rollouts")
            rows_once(page, list(range(5)))
            assert page.js("document.querySelectorAll('.rows .thumb img').length") == 5
            page.choose("stage", "stage 1")
            page.choose("reason", "reason 1")
            rows_once(page, [1])
            text = page.until("(document.querySelector('.detail .verdict.wrong')?.innerText || '').includes('reason 1') && "
                              "document.querySelector('.detail').innerText")
            assert "Which digit" in text and "seen" in text and "a.json row 1" in text
            page.until("document.querySelectorAll('.detail img').length === 2")
            assert page.errors() == []
            page.close()
