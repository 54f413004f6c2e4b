// Two dumps task by task: what changed from one to the other, in one run or between two.
const pairs = (() => {
  let request = 0;

  function defaults() {
    const last = (run, kind) => source.dumps.filter((dump) => dump.run === run && dump.kind === kind);
    const [evals, steps] = [last(0, "eval"), last(0, "step")];
    if (DATA.runs.length > 1) {
      const [a, b] = [0, 1].map((run) => { const e = last(run, "eval"); return (e.length ? e : last(run, "step")).at(-1); });
      return [a, b];
    }
    return evals.length > 1 ? [evals[0], evals.at(-1)] : evals.length && steps.length ? [evals[0], steps.at(-1)] : [steps[0], steps.at(-1)];
  }

  const OUTCOMES = ["stays correct", "becomes correct", "becomes wrong", "stays wrong", "unscored in one"];

  function outcome(a, b) {
    if (a.verdict === "unscored" || b.verdict === "unscored") return OUTCOMES[4];
    const was = a.verdict === "correct", is = b.verdict === "correct";
    return was ? OUTCOMES[is ? 0 : 2] : OUTCOMES[is ? 1 : 3];
  }

  const calling = (a, b) => a.calls && !b.calls ? "call dropped" : !a.calls && b.calls ? "call added" : !a.calls ? "no call in either"
    : a.calls === b.calls ? "calls as often" : a.calls > b.calls ? "fewer calls" : "more calls";

  function joined(one, other) {
    const there = new Map();
    for (const item of other) if (!there.has(item.task)) there.set(item.task, item);
    const seen = new Set();
    return one.filter((item) => there.has(item.task) && !seen.has(item.task) && seen.add(item.task)).map((a) => {
      const b = there.get(a.task);
      return {row: a.row, task: a.task, title: a.title, source: a.source, need: a.need, outcome: outcome(a, b), change: calling(a, b), a, b};
    });
  }

  const FACETS = [["outcome", "verdict"], ["change", "tool use"], ["source", "source"], ["need", "need"]];

  function chooser(name, label, chosen) {
    return el("label.field", null, el("span", null, label), el("select", {"data-facet": name, onchange: (event) => state.change({[name]: event.target.value, task: ""})},
      source.dumps.filter((dump) => dump.kind !== "curation").map((dump) => el("option", {value: dump.id, selected: dump.id === chosen.id}, source.label(dump)))));
  }

  async function show(root, query) {
    const [first, second] = defaults(), mine = ++request;
    const a = source.find(query.a) || first, b = source.find(query.b) || second;
    if (!a || !b) { fill(root, el("p.empty", null, "There are no rollouts to compare.")); return; }
    let items;
    try {
      const [one, other] = await Promise.all([source.sheet(a.id), source.sheet(b.id)]);
      items = joined(listed(one), listed(other));
    } catch (error) { fill(root, el("p.empty", null, error.message)); return; }
    if (mine !== request) return;
    const shown = items.filter((item) => passes(item, query, FACETS));
    const bar = filterBar({facets: FACETS, sorts: []}, items, query, null);
    const open = items.find((item) => item.task === query.task);
    const beside = el("div.beside", {tabindex: -1});
    fill(root, el("div.pairs", null, el("div.controls", null, el("div.line", null, chooser("a", "before", a), chooser("b", "after", b)), el("div.filters", null, bar)),
      items.length ? counts(items) : el("p.empty", null, "These two hold no common task."),
      open && el("section.opened", null, el("h2", null, open.title), el("p.meta", null, `${open.source}, ${open.need}, ${open.task}`), beside),
      el("p.count", {role: "status"}, `${shown.length.toLocaleString("en")} of ${plural(items.length, "common task")}`),
      el("ol.rows", null, shown.slice(0, 400).map((item) => line(item)), shown.length > 400 && el("li.empty", null, "The first 400 are shown; filter for others."))));
    if (open) await openPair(beside, open, a, b, mine);
  }

  async function openPair(beside, open, a, b, mine) {
    const at = [{dump: a.id, row: open.a.row}, {dump: b.id, row: open.b.row}];
    try {
      const found = await Promise.all(at.map((where) => source.row(where.dump, where.row)));
      if (mine !== request) return;
      const question = found[0].blocks.find((block) => block.kind === "prompt");
      fill(beside, [a, b].map((dump, index) => columnOf(at[index], found[index], source.label(dump))));
      beside.before(el("div.shared", null, el("p.question", null, question && question.short), pictures(at[0], question && question.pictures)));
    } catch (error) { fill(beside, el("p.empty", null, error.message)); }
  }

  function counts(items) {
    return el("div.counts", null, OUTCOMES.map((name) => [name, items.filter((item) => item.outcome === name).length]).filter(([, count]) => count)
      .map(([name, count]) => el("button.countcard", {onclick: () => state.change({outcome: name, task: ""})}, el("b", null, count.toLocaleString("en")), name)),
    ["call dropped", "call added"].map((name) => [name, items.filter((item) => item.change === name).length]).filter(([, count]) => count)
      .map(([name, count]) => el("button.countcard", {onclick: () => state.change({change: name, task: ""})}, el("b", null, count.toLocaleString("en")), name)));
  }

  function line(item) {
    const side = (one) => el("span.side", {class: one.verdict}, el("b", null, one.answer === null ? "no answer" : one.answer), el("span", null, one.calls ? plural(one.calls, "call") : "no call"));
    return el("li", null, el("button.row.pair-row", {"data-task": item.task, onclick: () => { state.change({task: item.task}); scrollTo({top: 0}); }},
      el("span.words", null, el("span.title", null, item.title), el("span.sub", null, el("span", null, item.source), el("span", null, item.need), el("span", null, item.outcome), el("span", null, item.change))),
      side(item.a), el("span.arrow", {"aria-hidden": true}, "→"), side(item.b)));
  }

  return {show};
})();
