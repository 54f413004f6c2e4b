// The list of a dump's rows beside the one that is open.
const CHUNK = 100;
const browser = (() => {
  let drawn = "", sheet = null, items = [], shown = [], request = 0;
  const parts = {};

  function frame(root) {
    parts.list = el("ol.rows", {"aria-label": "rows"});
    parts.count = el("p.count", {role: "status"});
    parts.detail = el("section.detail", {tabindex: -1, "aria-label": "the open row"});
    parts.bar = el("div.filters");
    parts.dumps = el("div.dumps");
    parts.more = el("button.more", {onclick: () => grow()}, "more");
    parts.search = el("input", {type: "search", placeholder: "search all text  ( / )", "aria-label": "search all text",
      oninput: debounced((event) => state.change({text: event.target.value.trim(), row: ""}, true), 250)});
    new IntersectionObserver((seen) => seen[0].isIntersecting && grow()).observe(parts.more);
    fill(root, el("div.browser", null,
      el("div.pane", null, el("div.controls", null, el("div.line", null, parts.dumps, el("label.field.search", null, el("span", null, "search"), parts.search)), parts.bar), parts.count, el("div.scrolling", null, parts.list, parts.more)),
      parts.detail));
  }

  function chooser(query) {
    const step = (by) => () => {
      const index = source.dumps.findIndex((dump) => dump.id === current(query).id) + by;
      if (source.dumps[index]) state.change({dump: source.dumps[index].id, row: ""});
    };
    const kinds = [["eval", "evaluations"], ["step", "training steps"], ["curation", "curation"]];
    const groups = kinds.flatMap(([kind, title]) => DATA.runs.map((run, number) => [
      source.dumps.filter((dump) => dump.kind === kind && dump.run === number), DATA.runs.length > 1 ? `${run}: ${title}` : title]));
    return [el("label.field", null, el("span", null, "of"), el("select", {"data-facet": "dump", onchange: (event) => state.change({dump: event.target.value, row: ""})},
      groups.filter(([dumps]) => dumps.length).map(([dumps, title]) => el("optgroup", {label: title}, dumps.map((dump) =>
        el("option", {value: dump.id, selected: dump.id === current(query).id}, dump.label)))))),
    el("div.steps", null, el("button", {onclick: step(-1), "aria-label": "the one before", title: "the one before  ( [ )", id: "before"}, "‹"),
      el("button", {onclick: step(1), "aria-label": "the next one", title: "the next one  ( ] )", id: "after"}, "›"))];
  }

  /** A link may lead to a step that is not in the file, or was never dumped. */
  function absent(query) {
    const name = query.dump.replace(/^\d+\//, "").replace(/^step_0*(?=\d)/, "step ");
    drawn = "";
    fill(parts.dumps, chooser({}));
    fill(parts.bar);
    fill(parts.list);
    fill(parts.count);
    parts.more.hidden = true;
    parts.dumps.querySelector("select").prepend(el("option", {value: query.dump, selected: true}, name));
    document.body.classList.remove("row-open");
    fill(parts.list, el("li.empty", null, DATA.served ? `${name} is not in the run's folder.` : `${name} is not in this file; hdpo report RUN --serve shows every step.`));
    fill(parts.detail, el("p.empty", null, "Choose another one on the left."));
  }

  const current = (query) => source.find(query.dump) || source.dumps[0];

  async function show(root, query) {
    if (!source.dumps.length) { fill(root, el("p.empty", null, "No rollouts were dumped (log.rollouts_every).")); return; }
    if (!parts.list || !root.contains(parts.list)) frame(root);
    const dump = current(query), mine = ++request;
    if (query.dump && dump.id !== query.dump) { absent(query); return; }
    if (document.activeElement !== parts.search) parts.search.value = query.text || "";
    fill(parts.dumps, chooser(query));
    const key = JSON.stringify({...query, row: "", tab: "", view: ""});
    if (key !== drawn) {
      parts.list.classList.add("waiting");
      let found;
      try {
        sheet = await source.sheet(dump.id);
        found = query.text ? await source.search(dump.id, query.text) : null;
      } catch (error) { fill(parts.list, el("li.empty", null, error.message)); fill(parts.count); return; }
      finally { parts.list.classList.remove("waiting"); }
      if (mine !== request) return;
      items = listed(sheet);
      shown = sorted(items.filter((item) => (!found || found.has(item.row)) && passes(item, query, sheet.facets)), query.sort);
      fill(parts.bar, filterBar(sheet, items, query, found));
      drawList(query);
      drawn = key;
    }
    const row = query.row || (matchMedia("(min-width: 901px)").matches && shown.length ? String(shown[0].row) : "");
    mark(query, row);
    await open(dump, {...query, row}, mine);
  }

  function drawList(query) {
    fill(parts.list);
    const part = sheet.all > sheet.n ? ` in this file (${sheet.all.toLocaleString("en")} in the run: hdpo report RUN --serve)` : "";
    fill(parts.count, (shown.length === items.length ? plural(items.length, "row") : `${shown.length.toLocaleString("en")} of ${plural(items.length, "row")}`) + part,
      Object.keys(query).some((name) => sheet.facets.some(([facet]) => facet === name) || name === "text") && el("button.clear", {onclick: () => state.go("rollouts", {dump: query.dump, sort: query.sort})}, "show all"));
    parts.more.hidden = false;
    grow();
    if (!shown.length) add(parts.list, [el("li.empty", null, "Nothing fits these filters.")]);
  }

  function grow() {
    const have = parts.list.children.length;
    const most = Math.max(1e-6, ...items.map((item) => Math.max(Math.abs(item.a_acc || 0), Math.abs(item.a_tool || 0))));
    const sizes = new Map();
    for (const item of items) sizes.set(item.prompt, (sizes.get(item.prompt) || 0) + 1);
    add(parts.list, shown.slice(have, have + CHUNK).map((item, index) => line(item, most, sizes.get(item.prompt), have + index)));
    parts.more.hidden = parts.list.children.length >= shown.length;
  }

  function line(item, most, size, index) {
    const {dump} = state.read(), at = dump && source.find(dump) ? dump : source.dumps[0].id;
    const src = item.thumb === null || item.thumb === undefined ? "" : source.picture(at, item.thumb, 0, "thumb");
    const kinds = item.tools.filter((kind) => kind !== "called");
    const trained = item.a_acc !== null && item.a_acc !== undefined;
    return el("li", null, el("button.row", {"data-row": item.row, class: item.verdict || (item.reason === "kept" ? "correct" : "dropped"), tabindex: index ? -1 : 0, onclick: () => state.change({row: item.row})},
      el("span.thumb", null, src && el("img", {src, alt: "", loading: "lazy"})),
      el("span.words", null, el("span.title", null, item.title || item.task),
        el("span.sub", null, size > 1 && el("span", null, `#${item.sample + 1}`), el("span", null, item.source), el("span", {class: kinds.includes("no call") ? "quiet" : "called"}, kinds.join(", ")),
          item.end && item.end !== "answered" && el("span.bad", null, item.end), item.reason && el("span", null, item.reason))),
      el("span.result", null, el("span.answer", null, item.answer === null ? "no answer" : item.answer),
        trained && el("span.pair", null, balance(item.a_acc, most, "accuracy advantage"), balance(item.a_tool, most, "tool advantage")))));
  }

  function mark(query, row) {
    for (const button of parts.list.querySelectorAll(".row")) {
      const here = button.dataset.row === row;
      button.setAttribute("aria-current", here);
      if (here && query.row) button.scrollIntoView({block: "nearest"});
    }
    document.body.classList.toggle("row-open", Boolean(query.row));
  }

  const TABS = [["", "conversation"], ["group", "its group"], ["history", "same task elsewhere"], ["tokens", "tokens"]];

  async function open(dump, query, mine) {
    if (!query.row) { fill(parts.detail, el("p.empty", null, "Choose a row. Arrow keys move through the list; / searches; [ and ] change the step.")); return; }
    const at = {dump: dump.id, row: Number(query.row)};
    try {
      const detail = await source.row(at.dump, at.row);
      if (!detail) throw new Error("This row is not in the file; hdpo report RUN --serve shows it.");
      const tab = detail.kind === "curation" ? "" : query.tab || "";
      const body = tab === "group" ? await group(at) : tab === "history" ? await elsewhere(at, detail)
        : tab === "tokens" ? tokenView(await source.tokens(at.dump, at.row)) : [factsOf(detail), conversation(at, detail)];
      if (mine !== request) return;
      const tabs = detail.kind !== "curation" && el("div.row-tabs", {role: "tablist"}, TABS.map(([name, label]) => el("button", {
        role: "tab", "aria-selected": name === tab, "data-tab": name, onclick: () => state.change({tab: name})}, label)));
      fill(parts.detail, el("header", null, el("button.back", {onclick: () => state.change({row: "", tab: ""})}, "‹ list"),
        el("h2", null, detail.title), el("p.meta", null, `${source.label(dump)}, row ${at.row}`)), tabs, body);
      parts.detail.scrollTop = 0;
    } catch (error) {
      if (mine === request) fill(parts.detail, el("button.back", {onclick: () => state.change({row: "", tab: ""})}, "‹ list"), el("p.empty", null, error.message));
    }
  }

  /** The G rollouts of a prompt beside one another, those with the highest accuracy advantage first. */
  async function group(at) {
    const all = listed(await source.sheet(at.dump)), own = all.find((item) => item.row === at.row);
    const mates = all.filter((item) => item.prompt === own.prompt);
    const details = await Promise.all(mates.map((item) => source.row(at.dump, item.row)));
    const most = Math.max(1e-6, ...mates.flatMap((item) => [Math.abs(item.a_acc || 0), Math.abs(item.a_tool || 0)]));
    const head = el("tr", null, ["", "answer", "verdict", "tools", "accuracy reward", "tool reward", "in Q", "accuracy advantage", "tool advantage"].map((name) => el("th", null, name)));
    const lines = mates.map((item) => el("tr", {class: item.row === at.row && "current"},
      el("th", null, el("button.link", {onclick: () => state.change({row: item.row})}, `#${item.sample + 1}`)),
      el("td", null, item.answer === null ? "–" : item.answer), el("td", {class: item.verdict}, item.verdict),
      el("td", null, item.tools.filter((kind) => kind !== "called").join(", ")), el("td.n", null, number(item.reward)), el("td.n", null, number(item.tool_reward)),
      el("td", null, item.qualifies ? "yes" : ""), el("td.n", null, balance(item.a_acc, most, "accuracy advantage"), " ", signed(item.a_acc)),
      el("td.n", null, balance(item.a_tool, most, "tool advantage"), " ", signed(item.a_tool))));
    return [el("p.note", null, "Accuracy is compared over the whole group, tool use over Q alone, the rollouts that are correct."),
      el("div.scroll", null, el("table.group", null, el("thead", null, head), el("tbody", null, lines))),
      el("div.beside", {tabindex: 0, "aria-label": "rollouts beside one another"}, mates.map((item, index) => columnOf({dump: at.dump, row: item.row}, details[index],
        [`#${item.sample + 1} `, el("span.tag", null, `accuracy ${signed(item.a_acc)}`), " ", el("span.tag", null, `tool ${signed(item.a_tool)}`)], item.row === at.row)))];
  }

  /** The same task in other dumps: choose one, and see both. */
  async function elsewhere(at, detail) {
    const places = (await source.history(detail.task)).filter((place) => !(place.dump === at.dump && place.row === at.row));
    if (!places.length) return el("p.empty", null, DATA.served ? "This task is in no other dump." : "This task is in no other dump that the file holds; hdpo report RUN --serve looks at all.");
    const beside = el("div.beside");
    const choose = async (index) => {
      const place = places[index], other = {dump: place.dump, row: place.row};
      const found = await source.row(other.dump, other.row), here = source.find(at.dump);
      const pair = [[at, detail, source.label(here)], [other, found, source.label(place)]];
      const order = source.dumps.findIndex((dump) => dump.id === at.dump) <= source.dumps.findIndex((dump) => dump.id === place.dump) ? pair : pair.reverse();
      fill(beside, order.map(([where, row, label]) => columnOf(where, row, label, where === at)));
    };
    const last = places.length - 1;
    await choose(last);
    return [el("label.field", null, el("span", null, "beside"), el("select", {"data-facet": "other", onchange: (event) => choose(Number(event.target.value))},
      places.map((place, index) => el("option", {value: index, selected: index === last}, `${source.label(place)}, row ${place.row}: ${place.verdict}, ${plural(place.calls, "call")}`)))), beside];
  }

  function keys(event) {
    if (event.key === "/") { parts.search.focus(); event.preventDefault(); return; }
    if (event.key === "[" || event.key === "]") { byId(event.key === "[" ? "before" : "after").click(); return; }
    if (event.key === "Escape" && state.read().row) { state.change({row: "", tab: ""}); return; }
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    if (event.target.closest(".detail, select")) return;
    const buttons = [...parts.list.querySelectorAll(".row")];
    const here = buttons.findIndex((button) => button.getAttribute("aria-current") === "true");
    const next = buttons[here + (event.key === "ArrowDown" ? 1 : -1)] || (here < 0 && buttons[0]);
    if (!next) return;
    event.preventDefault();
    next.focus();
    state.change({row: next.dataset.row}, true);
  }

  return {show, keys, sheets: () => shown};
})();
