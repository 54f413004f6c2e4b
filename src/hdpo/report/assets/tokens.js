// Token by token: what was sampled, how likely engine and trainer held it, and what moves it.
const MEASURES = {
  mask: ["sampled or given", null],
  engine: ["log-prob, engine", "nat"],
  trainer: ["log-prob, trainer", "nat"],
  ratio: ["ratio trainer / engine", "×"],
  step: ["ratio of the update", "×"],
  a_acc: ["accuracy advantage", ""],
  a_tool: ["tool advantage", ""],
};

function measured(found) {
  let place = 0;
  return found.ids.map((id, index) => {
    const given = !found.mask[index];
    const token = {index, id, given, text: found.pieces && found.pieces[id] !== undefined ? found.pieces[id] : `⟨${id}⟩`};
    if (given) return token;
    const order = place++;
    token.engine = found.engine[index];
    if (found.trainer && found.trainer[order] !== undefined) {
      token.trainer = found.trainer[order];
      token.ratio = Math.exp(token.trainer - token.engine);
      token.step = found.updated && found.updated.length ? Math.exp(found.updated[order] - token.trainer) : 1;
    }
    [token.a_acc, token.a_tool] = found.advantages;
    return token;
  });
}

/** Runs of the same given token (a picture's) become one entry with a count. */
function runs(tokens) {
  const out = [];
  for (const token of tokens) {
    const last = out[out.length - 1];
    if (last && token.given && last.given && last.id === token.id) last.count += 1; else out.push({...token, count: 1});
  }
  return out;
}

/** The colour of a value: unlikely is strong; around 1 and 0 two colours part. */
function shade(token, measure) {
  if (token.given) return null;
  if (measure === "mask") return ["var(--c1)", 0.2];
  const value = token[measure];
  if (value === undefined || value === null || !Number.isFinite(value)) return null;
  if (measure === "engine" || measure === "trainer") return ["var(--c2)", Math.min(0.75, -value / 4)];
  if (measure === "ratio" || measure === "step") {
    const away = Math.log(value) / Math.log(1.2);
    return [away < 0 ? "var(--bad)" : "var(--good)", Math.min(0.75, Math.abs(away))];
  }
  return [value < 0 ? "var(--bad)" : "var(--good)", Math.min(0.6, Math.abs(value) / 3)];
}

function tokenView(found) {
  const tokens = measured(found), shown = runs(tokens);
  const has = Object.keys(MEASURES).filter((name) => name === "mask" || tokens.some((token) => token[name] !== undefined && token[name] !== null));
  const panel = el("div.token-facts", {"aria-live": "polite"}, "Point at a token, or move over them with the arrow keys.");
  const strip = el("div.tokens", {role: "list", "aria-label": "tokens"});
  const first = shown.findIndex((token) => !token.given);
  const prompt = first < 0 ? shown.length : first;
  const entries = shown.map((token, index) => el("span.token", {
    role: "listitem", class: token.given ? "given" : "sampled", tabindex: index === prompt ? 0 : -1, "data-index": token.index,
  }, token.text.replace(/\n/g, "⏎\n"), token.count > 1 && el("b", null, ` ×${token.count}`)));
  const tell = (index) => {
    const token = shown[index];
    fill(panel, el("b", null, JSON.stringify(token.text)), el("span", null, `id ${token.id}`), el("span", null, `place ${token.index}`),
      token.given ? el("span", null, "given: no gradient") : has.filter((name) => name !== "mask").map((name) =>
        el("span", null, `${MEASURES[name][0]} `, el("b", null, name.startsWith("a_") ? signed(token[name]) : number(token[name], 4)))));
  };
  const paint = (measure) => entries.forEach((entry, index) => {
    const colour = shade(shown[index], measure);
    entry.style.background = colour ? `color-mix(in srgb, ${colour[0]} ${Math.round(100 * colour[1])}%, transparent)` : "";
  });
  strip.addEventListener("mouseover", (event) => {
    const index = entries.indexOf(event.target.closest(".token"));
    if (index >= 0) tell(index);
  });
  strip.addEventListener("focusin", (event) => {
    const index = entries.indexOf(event.target);
    if (index >= 0) tell(index);
  });
  strip.addEventListener("keydown", (event) => {
    const move = {ArrowRight: 1, ArrowLeft: -1}[event.key], index = entries.indexOf(document.activeElement);
    if (!move || index < 0 || !entries[index + move]) return;
    event.preventDefault();
    if (index + move < prompt) folded.open = true;
    entries[index].tabIndex = -1;
    entries[index + move].tabIndex = 0;
    entries[index + move].focus();
  });
  const folded = el("details.given-prompt", null, el("summary", null, `the prompt, ${plural(found.prompt_length, "token")}, given`), entries.slice(0, prompt));
  add(strip, [prompt > 0 && folded, el("div.response", null, entries.slice(prompt))]);
  const choice = el("div.choice", {role: "radiogroup", "aria-label": "colour by"}, has.map((name, index) => el("label", null,
    el("input", {type: "radio", name: "measure", value: name, checked: index === 0, onchange: () => paint(name)}), MEASURES[name][0])));
  paint(has[0]);
  const missing = !found.trainer && found.advantages.length > 0
    && el("p.note", null, "The trainer has no log-probs of this rollout: without an advantage it is not computed, or the dump is older.");
  const weight = found.advantages.length > 0 && el("p.note", null,
    `Every sampled token has the rollout's advantages: accuracy ${signed(found.advantages[0])}, tool ${signed(found.advantages[1])}.`);
  return el("div.token-view", null, choice, panel, strip, weight, missing,
    el("p.note", null, "Log-probs: the stronger, the less likely. Ratios: green above 1, red below, full at 1.2 and 1/1.2. The ratio of the update is to the weights that sampled, when the row was first trained."));
}
