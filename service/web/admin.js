// The administrators' part of the page: distillations, students, releases. For keys with the scope `admin`.
//
// The URL's hash says what is open: #admin, #admin/new, or #admin/dist_...

import { RunForm } from "./admin-form.js";
import { Served, badge, drawActive, drawHistory, drawStudents, drawWorkers, moment } from "./admin-release.js";
import { RunView, doing, isUnderWay, shareOf } from "./admin-run.js";
import { poll, request } from "./api.js";
import { $, drawPart, el, say } from "./dom.js";

const POLL_MS = 2_000;
const RUNS = { first: 20, most: 100 };

export const isAdminUrl = () => /^#admin(\/|$)/.test(location.hash);

export class Admin {
  #report;
  #view = null;
  #shownHash = null;

  /** `report(error)` says what goes wrong. */
  constructor({ report }) {
    this.#report = report;
  }

  /** What can be distilled; null where this key, or none, may not know. The way in is shown to those who may. */
  async knock() {
    let offer = null;
    try {
      offer = await request("/admin/recipes");
    } catch (error) {
      if (error.status !== 403) throw error;
      this.#bar(error.message);
    }
    $("ways").hidden = !offer;
    return offer;
  }

  #bar(message) {
    $("admin").replaceChildren(el("h2", {}, "This part is for administrators"), el("p", {}, message));
  }

  /** Show what the URL names. Throws a RequestError. */
  async open() {
    const { hash } = location;
    if (this.#shownHash === hash) return;
    this.close();
    this.#shownHash = hash;
    try {
      const offer = await this.knock();
      if (!offer || this.#shownHash !== hash) return; // or the person has gone on meanwhile
      this.#view = this.#viewOf(hash.split("/")[1] ?? "", offer);
      $("admin").replaceChildren(this.#view.root);
      this.#view.title.focus({ preventScroll: true });
      scrollTo(0, 0);
      await this.#view.open();
    } catch (error) {
      if (this.#shownHash === hash) {
        this.close();
        $("admin").replaceChildren(wayBack());
      }
      throw error;
    }
  }

  #viewOf(name, offer) {
    if (name.startsWith("dist_")) return new RunView(name, offer.data, this.#report);
    return name === "new" ? new FormPage(offer) : new Overview(this.#report);
  }

  /** Leave it. */
  close() {
    this.#view?.close();
    this.#view = this.#shownHash = null;
    $("admin").replaceChildren();
  }
}

const wayBack = () => el("a", { href: "#admin", className: "back" }, "All distillations");

// --- a new distillation ----------------------------------------------------------------------------------------------

class FormPage {
  title = el("h2", { tabIndex: -1 }, "New distillation");
  root;

  constructor(offer) {
    const form = new RunForm(offer, ({ id }) => {
      say("It is queued.");
      location.hash = `#admin/${id}`;
    });
    this.root = el("div", {}, this.title, el("p", { className: "quiet" }, whenItTrains(offer)), form.root);
  }

  async open() {}

  close() {}
}

function whenItTrains({ trainer, gpu }) {
  if (!trainer) return "No trainer has started here yet: what is asked for waits until one does.";
  const when = {
    share: "The trainer takes it as soon as it is free.",
    "serve-first": "The trainer works on it while nobody waits for a video.",
    window: `The trainer works on it from ${trainer.window?.replace("-", " to ")}.`,
  };
  return `${when[trainer.policy]}${gpu ? ` It has the GPU for itself until ${moment(gpu.until)}.` : ""}`;
}

// --- all there is ----------------------------------------------------------------------------------------------------

class Overview {
  title = el("h2", { tabIndex: -1, className: "unseen" }, "Administration");
  root;
  #report;
  #served = new Served();
  #leave = new AbortController();
  #most = RUNS.first;
  #parts = {};

  constructor(report) {
    this.#report = report;
    const box = (name, title, ...beside) => {
      this.#parts[name] = el("div");
      const head = el("div", { className: "row" }, el("h3", { id: `${name}-title` }, title), ...beside);
      return el("section", { className: "box", "aria-labelledby": `${name}-title` }, head, this.#parts[name]);
    };
    const add = el("a", { href: "#admin/new", className: "button" }, "New distillation");
    this.root = el("div", { className: "overview" }, this.title,
      el("div", { className: "column" }, box("active", "Served now"), box("workers", "Workers")),
      el("div", { className: "column" }, box("runs", "Distillations", add), box("students", "Students"), box("history", "History")));
  }

  async open() {
    await poll(() => this.#look(), POLL_MS, this.#leave.signal);
  }

  close() {
    this.#leave.abort();
  }

  #look = async () => {
    const [runs] = await Promise.all([request(`/admin/distillations?limit=${this.#most}`), this.#served.look()]);
    const { release, students } = this.#served;
    const { runs: list, active, workers, students: all, history } = this.#parts;
    drawPart(list, runs, () => this.#drawRuns(runs));
    drawPart(active, [release, students], () => drawActive(this.#served, this.#look));
    drawPart(workers, [release.workers, students], () => drawWorkers(this.#served));
    drawPart(all, students, () => drawStudents(this.#served, this.#look));
    drawPart(history, [release.history, students], () => drawHistory(this.#served));
  };

  #drawRuns({ data, has_more: hasMore }) {
    if (!data.length) return [el("p", { className: "quiet" }, "None yet.")];
    const more = el("button", { type: "button", className: "button", hidden: !hasMore || this.#most >= RUNS.most }, "More");
    more.onclick = () => {
      this.#most = RUNS.most;
      this.#look().catch(this.#report);
    };
    return [el("ul", { className: "rows runs" }, ...data.map(drawRun)), more];
  }
}

function drawRun(run) {
  const { id, recipe, preset, status, created_at } = run;
  const share = shareOf(run);
  const bar = el("progress", { max: 1, hidden: status !== "running", "aria-label": `Progress of the stage of ${id}` });
  if (share !== null) bar.value = share;
  const link = el("a", { href: `#admin/${id}`, "data-key": id },
    el("span", { className: "row" }, el("b", {}, `${recipe}, ${preset}`), badge(status)),
    el("span", { className: "row quiet" }, el("span", {}, isUnderWay(run) || status === "succeeded" ? doing(run) : ""), moment(created_at)),
  );
  return el("li", {}, link, bar);
}
