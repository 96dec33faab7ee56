// Small things that every part of the page uses.

export const $ = (id) => document.getElementById(id);

export const lessMotion = matchMedia("(prefers-reduced-motion: reduce)");

/** An element with properties; keys with a dash and `role` become attributes. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children);
  return node;
}

/** Only where it differs: a text that is set anew loses its selection, and is read out again where it is live. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Told to screen readers; only whole events, never each percent. */
export const say = (text) => setText($("status"), text);

export const capital = (word) => word[0].toUpperCase() + word.slice(1);

/** A measured duration. */
export const seconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(1)} s`;

/** One `dt`, `dd` pair of a list of facts. */
export const fact = (name, value, className = "") =>
  el("div", { className }, el("dt", {}, name), el("dd", {}, String(value)));

/** The element in `root` that is for this (`data-key`). */
export const keyed = (root, key) => root.querySelector(`[data-key="${CSS.escape(key)}"]`);

const shownIn = new WeakMap();

/** Draw a part anew where what it shows has changed. The keyboard stays on what is for the same thing. */
export function drawPart(root, shown, make) {
  const print = JSON.stringify(shown);
  if (shownIn.get(root) === print) return;
  shownIn.set(root, print);
  const key = root.contains(document.activeElement) && document.activeElement.dataset.key;
  root.replaceChildren(...make());
  if (key) keyed(root, key)?.focus();
}
