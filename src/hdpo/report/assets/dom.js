// Elements are built, never parsed: text of a model can only ever become text.
"use strict";
const SVG = "http://www.w3.org/2000/svg";

/** el("p.note#id", {title: "…", onclick: f}, child, "text", [more]) */
function el(spec, attributes, ...children) {
  const [, tag, rest] = /^([a-z0-9]*)(.*)$/.exec(spec);
  const node = ["svg", "rect", "line", "path", "g", "title"].includes(tag) && attributes && attributes.svg
    ? document.createElementNS(SVG, tag) : document.createElement(tag || "div");
  for (const [, kind, name] of rest.matchAll(/([.#])([^.#]+)/g)) {
    if (kind === "#") node.id = name; else node.classList.add(name);
  }
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("aria-") && typeof value === "boolean") { node.setAttribute(name, String(value)); continue; }
    if (name === "svg" || value === null || value === undefined || value === false) continue;
    if (name === "class") node.classList.add(...String(value).split(" ").filter(Boolean));
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  add(node, children);
  return node;
}

function add(node, children) {
  for (const child of children.flat(9)) {
    if (child === null || child === undefined || child === false || child === "") continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

function fill(node, ...children) {
  node.replaceChildren();
  return add(node, children);
}

const byId = (id) => document.getElementById(id);

function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? String(+value.toPrecision(digits)) : value.toExponential(digits - 2);
}

const signed = (value) => value === null || value === undefined ? "–"
  : value === 0 ? "0" : (value > 0 ? "+" : "−") + Math.abs(value).toFixed(2);

const plural = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many || one + "s"}`;

/** A bar from the middle: negative to the left. `most` is the value that fills a half. */
function balance(value, most, label) {
  const share = value ? Math.min(1, Math.abs(value) / (most || 1)) * 50 : 0;
  return el("span.balance", {title: label, role: "img", "aria-label": `${label} ${signed(value)}`},
    el("i", {class: value < 0 ? "minus" : "plus", style: {width: `${share}%`, left: value < 0 ? `${50 - share}%` : "50%"}}));
}

function debounced(call, milliseconds) {
  let timer = 0;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => call(...given), milliseconds); };
}
