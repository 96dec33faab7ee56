// What has been generated, newest first. The two of a comparison open together.

import { here, request } from "./api.js";
import { $, el, say } from "./dom.js";
import { isActive } from "./pane.js";

const POLL_MS = 3_000;
const MOST = 24;

export class Gallery {
  #shown; // () -> ids on the stage
  #showsModels = false;
  #remove;
  #timer = 0;

  /** `shown()`: the ids on the stage. `remove(generation)`: asks, and removes it; false when it was not to be. */
  constructor({ shown, remove }) {
    this.#shown = shown;
    this.#remove = remove;
  }

  /** Whether each is to say which model made it. */
  set showsModels(value) {
    this.#showsModels = value;
  }

  async refresh() {
    const { data } = await request(`/generate?limit=${MOST}`);
    const focused = document.activeElement?.closest("#gallery li")?.dataset.id;
    $("gallery").replaceChildren(...data.map((one) => this.#item(one, data)));
    if (focused) $("gallery").querySelector(`[data-id=${focused}] a`)?.focus();
    $("gallery-empty").hidden = data.length > 0;
    this.mark();
    // Those on the stage report by themselves; others that are still under way are looked at now and then.
    clearTimeout(this.#timer);
    const others = data.some((one) => isActive(one) && !this.#shown().includes(one.id));
    if (others) this.#timer = setTimeout(() => this.refresh().catch(() => {}), POLL_MS);
  }

  /** Mark those on the stage. */
  mark() {
    for (const item of $("gallery").children) {
      const link = item.querySelector("a");
      if (this.#shown().includes(item.dataset.id)) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }

  #item(generation, all) {
    const { id, prompt, status, model, thumbnail_url } = generation;
    const picture = thumbnail_url ? el("img", { src: here(thumbnail_url), alt: "" }) : status;
    const by = this.#showsModels ? [el("span", { className: "by" }, model)] : [];
    const frame = el("span", { className: "frame" }, picture);
    const link = el("a", { href: `#${pairOf(generation, all).join("+")}` }, frame, ...by, el("span", { className: "name" }, prompt));
    const remove = { type: "button", className: "remove", title: "Delete", "aria-label": `Delete: ${prompt}` };
    remove.onclick = () => this.#removeItem(generation);
    return el("li", { "data-id": id }, link, el("button", remove, "×"));
  }

  async #removeItem(generation) {
    const index = [...$("gallery").children].findIndex((item) => item.dataset.id === generation.id);
    if (!(await this.#remove(generation))) return;
    // Keep the keyboard where it was.
    ($("gallery").children[index] ?? $("gallery").lastElementChild)?.querySelector("a").focus();
    say("Deleted.");
  }
}

/** The ids to open for this one: its own, or both of a comparison. The second one's notes name the first. */
function pairOf({ id, metadata }, all) {
  const first = all.find((one) => one.id === metadata.beside);
  if (first) return [first.id, id];
  const second = all.find((one) => one.metadata.beside === id);
  return second ? [id, second.id] : [id];
}
