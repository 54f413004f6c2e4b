// What every rank did in a step, and when.
const timeline = (() => {
  const COLOURS = {rollout: 1, update: 2, score: 6, sync: 5, old_log_prob: 4, evaluation: 7, save: 8, pack: 3, data: 3, log: 3, spool: 3, sleep: 3};
  const PARTS = {generation: ["generation", "var(--c1)"], tools: ["waiting for tools", "color-mix(in srgb, var(--ink) 85%, transparent)"], ranks: ["waiting for other ranks", "color-mix(in srgb, var(--ink) 40%, transparent)"], other: ["other", "var(--line)"]};
  const NAMES = {score: "judge (verdicts not there yet)", old_log_prob: "log-probs before the update", rollout: "rollout", other: "between phases"};
  const name = (phase) => NAMES[phase] || phase.replace(/_/g, " ");
  const colour = (phase) => `var(--c${COLOURS[phase] || 3})`;

  async function show(root, query) {
    const run = query.run && DATA.runs[query.run] ? query.run : "0";
    let lines;
    try { lines = await source.timeline(run); } catch (error) { fill(root, el("p.empty", null, error.message)); return; }
    if (!lines.length) { fill(root, el("p.empty", null, "No timeline.jsonl: the run is older, or its first step is not done. The overview's last chart has the mean over ranks.")); return; }
    const index = Math.max(0, lines.findIndex((line) => String(line.step) === query.step)), at = query.step ? index : lines.length - 1, line = lines[at];
    const go = (by) => () => lines[at + by] && state.change({step: lines[at + by].step}, true);
    const controls = el("div.controls", null, el("div.line", null,
      DATA.runs.length > 1 && el("label.field", null, el("span", null, "run"), el("select", {onchange: (event) => state.change({run: event.target.value, step: ""})}, DATA.runs.map((label, number) => el("option", {value: number, selected: String(number) === run}, label)))),
      el("label.field.slider", null, el("span", null, `step ${line.step}`), el("input", {type: "range", min: 0, max: lines.length - 1, value: at, "aria-label": "step", oninput: (event) => state.change({step: lines[event.target.value].step}, true)})),
      el("div.steps", null, el("button", {onclick: go(-1), "aria-label": "the step before"}, "‹"), el("button", {onclick: go(1), "aria-label": "the next step"}, "›")),
      rolloutsOf(Number(run), line.step)));
    const end = Math.max(line.seconds, ...line.ranks.flatMap((rank) => rank.spans.map(([, start, took]) => start + took)));
    fill(root, controls, el("p.count", {role: "status"}, `${number(line.seconds)} s on ${plural(line.ranks.length, "rank")}`),
      el("div.gantt", null, axis(end), line.ranks.map((rank, number) => lane(rank, number, end))), keyOf(line), tableOf(line));
    const slider = root.querySelector("input[type=range]");
    if (query.step && document.activeElement === document.body) slider.focus({preventScroll: true});
  }

  const rolloutsOf = (run, step) => {
    const dump = source.dumps.find((one) => one.run === run && one.step === step);
    return dump && el("a.button", {href: state.link("rollouts", {dump: dump.id})}, "its rollouts");
  };

  function axis(end) {
    const rough = end / 6, unit = 10 ** Math.floor(Math.log10(rough || 1)), every = [1, 2, 5, 10].map((factor) => factor * unit).find((one) => one >= rough) || 1;
    return el("div.axis", {"aria-hidden": true}, Array.from({length: Math.floor(end / every) + 1}, (_, index) => el("span", {style: {left: `${100 * index * every / end}%`}}, `${number(index * every)} s`)));
  }

  function lane(rank, index, end) {
    const bars = rank.spans.map(([phase, start, took]) => el("i", {class: "bar", title: `${name(phase)}: ${number(took)} s, from ${number(start)} s`,
      style: {left: `${100 * start / end}%`, width: `${100 * took / end}%`, background: colour(phase)}}));
    const rollouts = rank.spans.filter(([phase]) => phase === "rollout"), parts = rank.parts.rollout;
    const under = parts && rollouts.length > 0 && divided(rollouts, parts, end);
    return el("div.lane", null, el("span.rank", null, `rank ${index}`), el("div.bars", null, bars), under);
  }

  /** The shares of the rollout phase under its bar: how much of each, not when. */
  function divided(rollouts, parts, end) {
    const total = rollouts.reduce((sum, [, , took]) => sum + took, 0), known = Object.entries(parts);
    const rest = Math.max(0, total - known.reduce((sum, [, seconds]) => sum + seconds, 0));
    let left = rollouts[0][1];
    return el("div.bars.parts", null, [...known, ["other", rest]].map(([part, seconds]) => {
      const bar = el("i", {title: `rollout, ${PARTS[part] ? PARTS[part][0] : part}: ${number(seconds)} s`, style: {left: `${100 * left / end}%`, width: `${100 * seconds / end}%`, background: PARTS[part] ? PARTS[part][1] : "var(--soft)"}});
      left += seconds;
      return bar;
    }));
  }

  function keyOf(line) {
    const phases = [...new Set(line.ranks.flatMap((rank) => rank.spans.map(([phase]) => phase)))];
    return el("div.legend", null, phases.map((phase) => el("span", null, el("i", {style: {background: colour(phase)}}), name(phase))),
      el("span.under", null, "below, shares of the rollout: ", Object.entries(PARTS).map(([, [label, shade]]) => el("span", null, el("i", {style: {background: shade}}), label, " "))));
  }

  function tableOf(line) {
    const phases = [...new Set(line.ranks.flatMap((rank) => rank.spans.map(([phase]) => phase)))];
    const sum = (rank, phase) => rank.spans.filter(([one]) => one === phase).reduce((total, [, , took]) => total + took, 0);
    const parts = [...new Set(line.ranks.flatMap((rank) => Object.keys(rank.parts.rollout || {})))];
    return el("details.seconds", null, el("summary", null, "in seconds"), el("div.scroll", null, el("table", null,
      el("thead", null, el("tr", null, el("th", null, "phase"), line.ranks.map((_, rank) => el("th", null, `rank ${rank}`)))),
      el("tbody", null, phases.map((phase) => [el("tr", null, el("th", null, name(phase)), line.ranks.map((rank) => el("td", null, number(sum(rank, phase))))),
        phase === "rollout" && parts.map((part) => el("tr.sub", null, el("th", null, `– ${PARTS[part] ? PARTS[part][0] : part}`), line.ranks.map((rank) => el("td", null, number((rank.parts.rollout || {})[part])))))])))));
  }

  return {show};
})();
