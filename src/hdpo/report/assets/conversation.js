// One row as a conversation: question and pictures, each turn, call and observation, verdict and rewards.
const SEGMENT = /<(reason|answer|tool_call)>([\s\S]*?)<\/\1>/g;

function pictures(at, places) {
  return places && places.length > 0 && el("div.pictures", null, places.map((place, index) => {
    const src = place === null ? "" : source.picture(at.dump, at.row, place);
    return src ? el("button.picture", {title: "larger", "aria-label": `picture ${index + 1}, larger`, onclick: () => enlarge(src)},
      el("img", {src, alt: "", loading: "lazy", decoding: "async"})) : el("span.note", null, "a picture that can't be shown");
  }));
}

function enlarge(src) {
  const box = byId("lightbox");
  fill(box, el("button", {class: "close", "aria-label": "close", onclick: () => box.close()}, "✕"), el("img", {src, alt: ""}));
  box.showModal();
}

function turnBody(text, call, executed) {
  const parts = [];
  let position = 0;
  for (const found of text.matchAll(SEGMENT)) {
    parts.push(plain(text.slice(position, found.index)));
    position = found.index + found[0].length;
    const inner = found[2].trim();
    if (found[1] === "tool_call") parts.push(callBody(inner, call, executed));
    else if (found[1] === "reason") parts.push(el("p.reason", null, inner));
    else parts.push(el("p.answer", null, inner));
  }
  parts.push(plain(text.slice(position)));
  return parts;
}

/** Without the markers of the pictures that stand below. */
const shownHere = (block) => block.pictures && block.pictures.length ? block.text.replaceAll("<image>", "") : block.text;

const plain = (text) => text.trim() && el("pre.text", null, text.trim());

function callBody(action, call, executed) {
  if (!call && !executed) return [el("h5", null, "call, not executed"), el("pre.code", null, action)];
  let name = call && call.name, given = call && call.arguments;
  if (!call) {
    try { ({name, arguments: given} = JSON.parse(action)); } catch { /* shown as it is spelled */ }
  }
  const values = given && typeof given === "object" ? Object.values(given) : [];
  const shown = values.length === 1 && typeof values[0] === "string" ? values[0] : values.length ? JSON.stringify(given, null, 1) : action;
  return [el("h5", null, "calls ", el("b", null, name || "nothing usable")), el("pre.code", null, shown)];
}

function blockOf(at, block) {
  if (block.kind === "prompt") {
    const more = block.text && block.text !== block.short && el("details.prompt", null, el("summary", null, "the whole prompt"), el("pre.text", null, block.text));
    return el("li.prompt", {"data-kind": "prompt"}, block.role && el("h5", null, block.role), el("p.question", null, block.short), pictures(at, block.pictures), more);
  }
  if (block.kind === "turn") {
    return el("li.turn", {"data-kind": "turn"}, turnBody(block.text, block.call, block.recorded), pictures(at, block.pictures));
  }
  if (block.kind === "observation") {
    const how = block.ours ? " failed, for our own reasons" : block.ok ? " returned" : " returned an error";
    return el("li.observation", {"data-kind": "observation", class: (block.ours || !block.ok) && "failed"},
      el("h5", null, block.name || "tool", how, block.seconds !== undefined && `, ${number(block.seconds)} s`), plain(shownHere(block)), pictures(at, block.pictures));
  }
  return el("li.observation.failed", {"data-kind": "error"}, el("h5", null, "ended for our own reasons"), plain(block.text));
}

function conversation(at, detail, without) {
  const blocks = detail.blocks.filter((block) => !(without && without.includes(block.kind)));
  return el("article.conversation", null, el("ol", null, blocks.map((block) => blockOf(at, block))), verdictOf(detail));
}

function verdictOf(detail) {
  const answer = detail.answer === null ? "no answer" : detail.answer || "empty answer";
  if (detail.kind === "curation") {
    return el("div.verdict", {class: detail.reason === "kept" ? "correct" : "wrong"}, el("b", null, detail.reason),
      el("span", null, detail.stage), detail.detail && el("span.why", null, detail.detail));
  }
  return el("div.verdict", {class: ["correct", "wrong"].includes(detail.verdict) ? detail.verdict : "unscored"},
    el("b", null, answer), el("span", null, `${detail.verdict}, by ${detail.by}`), el("span", null, detail.end),
    detail.detail && detail.by !== "rule" && el("details.why", null, el("summary", null, "the judge's reply"), el("pre.text", null, detail.detail)),
    detail.detail && detail.by === "rule" && el("span", null, `rule ${detail.detail}`));
}

/** Numbers of a rollout, as a definition list. */
function factsOf(detail) {
  const facts = detail.kind === "curation"
    ? [["source", detail.source], ["row", detail.task], ["truth", detail.truth.join(" or ")], ...Object.entries(detail.extra).map(([k, v]) => [k, typeof v === "object" ? JSON.stringify(v) : String(v)])]
    : [["truth", detail.truth.join(" or ")], ["need", detail.need], ["source", detail.source], ["task", detail.task],
      ["accuracy reward", number(detail.reward)], ["tool reward", number(detail.tool_reward)],
      ...(detail.advantages.length ? [["accuracy advantage", signed(detail.advantages[0])], ["tool advantage", signed(detail.advantages[1])], ["in Q", detail.qualifies ? "yes" : "no"]] : []),
      ...(detail.length ? [["sampled", plural(detail.sampled, "token")], ["whole", plural(detail.length, "token")]] : []),
      ...(detail.seconds ? [["time", `${number(detail.seconds)} s, tools ${number(detail.tool_seconds)} s`]] : [])];
  return el("dl.facts", null, facts.filter(([, value]) => value !== "").map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value))));
}

/** A short column: what a rollout did, for several beside one another. */
function columnOf(at, detail, heading, current) {
  return el("section.rollout", {class: current && "current", "data-row": at.row},
    el("h4", null, heading), conversation(at, detail, ["prompt"]));
}
