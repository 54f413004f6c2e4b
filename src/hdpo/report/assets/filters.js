// The state of the page is in its address, so that what is seen can be linked to and goes back.
const state = {
  read() {
    const [view, query] = location.hash.slice(1).split("?");
    return {view: view || "overview", ...Object.fromEntries(new URLSearchParams(query || ""))};
  },
  link(view, query) {
    const given = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined));
    return `#${view}${String(given) && "?" + given}`;
  },
  go(view, query, replace) {
    const link = state.link(view, query);
    if (link === location.hash) return;
    if (replace) history.replaceState(null, "", link); else history.pushState(null, "", link);
    window.dispatchEvent(new Event("hashchange"));
  },
  change(changes, replace) {
    const {view, ...query} = state.read();
    state.go(view, {...query, ...changes}, replace);
  },
};

const facetValue = (item, name) => [].concat(item[name]);

function passes(item, query, facets, except) {
  return facets.every(([name]) => name === except || !query[name] || facetValue(item, name).includes(query[name]));
}

/** <select>s of every facet with the count each value would leave, a search field, and the order. */
function filterBar(sheet, items, query, found) {
  const chosen = sheet.facets.map(([name, label]) => {
    const counts = new Map();
    for (const item of items) {
      if (found && !found.has(item.row) || !passes(item, query, sheet.facets, name)) continue;
      for (const value of facetValue(item, name)) counts.set(value, (counts.get(value) || 0) + 1);
    }
    if (query[name] && !counts.has(query[name])) counts.set(query[name], 0);
    const options = [...counts].sort((a, b) => String(a[0]).localeCompare(String(b[0])));
    return el("label.field", {class: query[name] && "active"}, el("span", null, label),
      el("select", {"data-facet": name, onchange: (event) => state.change({[name]: event.target.value, row: ""})},
        el("option", {value: ""}, "all"),
        options.map(([value, count]) => el("option", {value, selected: value === query[name]}, `${value} (${count.toLocaleString("en")})`))));
  });
  const orders = [["", "as dumped"], ...sheet.sorts.flatMap(([name, label]) => [[`-${name}`, `${label}, high first`], [name, `${label}, low first`]])];
  const order = sheet.sorts.length > 0 && el("label.field", {class: query.sort && "active"}, el("span", null, "order"),
    el("select", {"data-facet": "sort", onchange: (event) => state.change({sort: event.target.value})},
      orders.map(([value, label]) => el("option", {value, selected: value === (query.sort || "")}, label))));
  return [...chosen, order];
}

function sorted(items, sort) {
  if (!sort) return items;
  const name = sort.replace(/^-/, ""), sign = sort.startsWith("-") ? -1 : 1;
  const value = (item) => item[name] === null || item[name] === undefined ? -Infinity * sign : item[name];
  return [...items].sort((a, b) => sign * (value(a) - value(b)) || a.row - b.row);
}
