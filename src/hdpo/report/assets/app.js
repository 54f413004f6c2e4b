// Which view is shown, and the keys.
const VIEWS = {rollouts: browser, pairs, timeline};

function draw() {
  const query = state.read(), known = byId(`view-${query.view}`) ? query.view : "overview";
  for (const view of document.querySelectorAll(".view")) view.hidden = view.dataset.view !== known;
  for (const tab of document.querySelectorAll("[data-tab]")) if (tab.closest("nav")) tab.setAttribute("aria-current", tab.dataset.tab === known ? "page" : "false");
  document.body.dataset.view = known;
  if (known !== "rollouts") document.body.classList.remove("row-open");
  if (VIEWS[known]) VIEWS[known].show(byId(`view-${known}`), query).catch((error) => fill(byId(`view-${known}`), el("p.empty", null, error.message)));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input:not([type=range]):not([type=radio]), textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (byId("lightbox").open) return;
  if (state.read().view === "rollouts") browser.keys(event);
});

document.body.append(el("dialog#lightbox", {onclick: (event) => { if (event.target === event.currentTarget) event.currentTarget.close(); }}));
document.documentElement.classList.add("live");
window.addEventListener("hashchange", draw);
window.addEventListener("popstate", draw);
draw();
