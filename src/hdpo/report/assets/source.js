// Where rows come from: the page's own data, or the server that the page was opened from.
const DATA = JSON.parse(byId("data").textContent);

const source = (() => {
  const kept = new Map();
  const once = (key, make) => {
    if (!kept.has(key)) {
      if (kept.size > 400) kept.delete(kept.keys().next().value);
      kept.set(key, make().catch((error) => { kept.delete(key); throw error; }));
    }
    return kept.get(key);
  };
  const ask = (path, query) => once(path + JSON.stringify(query), async () => {
    const found = await fetch(`${path}?${new URLSearchParams(query)}`);
    if (!found.ok) throw new Error((await found.text()).trim() || `status ${found.status}`);
    return found.json();
  });
  const dumps = DATA.dumps;
  const label = (dump) => DATA.runs.length > 1 ? `${DATA.runs[dump.run]}: ${dump.label}` : dump.label;
  const common = {dumps, label, find: (id) => dumps.find((dump) => dump.id === id)};
  if (DATA.served) {
    return {...common,
      sheet: (dump) => ask("sheet", {dump}),
      row: (dump, row) => ask("row", {dump, row}),
      tokens: (dump, row) => ask("tokens", {dump, row}),
      search: async (dump, text) => new Set(await ask("search", {dump, text})),
      history: (task) => ask("history", {task}),
      timeline: (run) => ask("timeline", {run}),
      picture: (dump, row, place, size) => `picture?${new URLSearchParams({dump, row, place, ...(size && {size})})}`,
    };
  }
  const folded = new Map();
  const words = (dump, row) => {
    const key = `${dump} ${row}`;
    if (!folded.has(key)) folded.set(key, texts(DATA.rows[dump][row]).join("\n").toLowerCase());
    return folded.get(key);
  };
  const texts = (value) => typeof value === "string" ? [value]
    : value && typeof value === "object" ? Object.entries(value).flatMap(([key, one]) => key === "pictures" ? [] : texts(one)) : [];
  return {...common,
    sheet: async (dump) => DATA.sheets[dump],
    row: async (dump, row) => DATA.rows[dump][row],
    tokens: async (dump, row) => {
      const found = (DATA.tokens[dump] || {})[row];
      if (!found) throw new Error("This row's tokens are not in the file; hdpo report RUN --serve shows them.");
      return found;
    },
    search: async (dump, text) => new Set(DATA.sheets[dump].rows.filter((row) => words(dump, row).includes(text.toLowerCase()))),
    history: async (task) => dumps.filter((dump) => dump.kind !== "curation").flatMap((dump) => {
      const {rows, columns} = DATA.sheets[dump.id];
      return rows.flatMap((row, index) => columns.task[index] === task
        ? [{dump: dump.id, label: dump.label, run: dump.run, row, verdict: columns.verdict[index], calls: columns.calls[index]}] : []);
    }),
    timeline: async (run) => (DATA.timelines || [])[run] || [],
    picture: (dump, row, place) => {
      const detail = (DATA.rows[dump] || {})[row];
      const key = typeof place === "string" ? place : detail && detail.blocks.flatMap((block) => block.pictures || [])[place];
      return key && DATA.pictures[key] || "";
    },
  };
})();

/** A dump's rows as objects: {row, title, task, …}; `row` is the number in the dump. */
function listed(sheet) {
  const names = Object.keys(sheet.columns);
  return Array.from({length: sheet.n}, (_, index) => {
    const item = {row: sheet.rows ? sheet.rows[index] : index};
    for (const name of names) item[name] = sheet.columns[name][index];
    return item;
  });
}
