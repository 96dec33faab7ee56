// One distillation: how far it is, what it measures, its pictures, its log, and what the gate says of its student.

import { BarChart, LineChart, figure } from "./admin-charts.js";
import { showPicture, showReport } from "./admin-dialogs.js";
import { Served, badge, drawWorkers, moment, promote } from "./admin-release.js";
import { fetchBlob, follow, here, poll, post, request } from "./api.js";
import { capital, drawPart, el, fact, say, setText } from "./dom.js";

const POLL_MS = 2_000;
const KEPT_LINES = 1_000; // of the log, in the page
const AFTER_STAGES = ["gate", "publishing"];
const QUARTERS = ["0 to 25 % noise", "25 to 50 %", "50 to 75 %", "75 to 100 %"];
const GATE_FILES = { "gate.md": "Report", "gate.png": "Plot", "sheet.png": "Clips side by side" };

export const isUnderWay = ({ status }) => ["queued", "running", "cancelling"].includes(status);

/** What it is doing, or how it ended, in a few words. */
export function doing({ status, phase, progress, gate }) {
  if (status === "succeeded") return gate ? (gate.passed ? "Passed the gate" : "Refused by the gate") : "Done";
  if (status !== "running") return capital(status);
  if (phase !== "training") return capital(phase ?? "running");
  if (!progress) return "Starting";
  const { stage, step, steps } = progress;
  return steps ? `${capital(stage)}, step ${step} of ${steps}` : capital(stage);
}

/** Share of the present stage, where it is known. */
export function shareOf({ status, phase, progress }) {
  if (status === "succeeded") return 1;
  return phase === "training" && progress?.steps ? progress.step / progress.steps : null;
}

export class RunView {
  root;
  #id;
  #recipes;
  #report;
  #run = null;
  #served = new Served();
  #leave = new AbortController();
  #parts = {};
  #loss = new LineChart("Loss");
  #gap = new LineChart("The critic's error, by noise level");
  #blocks = new BarChart("Importance of the blocks: drop of the ELBO", { one: "block", marked: "pruned", others: "kept" });
  #lines = new Map(); // "pruning loss" -> [{step, steps, value}]
  #metricsAfter = null;
  #logLines = [];
  #logAfter = null;
  #files = new Map(); // name -> {created_at, url, source}: the source of a picture is its address in this page
  #isRead = false; // whole, and it is over

  /** `recipes`: what can be distilled. `report(error)` says what goes wrong. */
  constructor(id, recipes, report) {
    this.#id = id;
    this.#recipes = recipes;
    this.#report = report;
    this.#build();
  }

  #build() {
    const part = (name, tag, properties = {}, ...children) => (this.#parts[name] = el(tag, properties, ...children));
    const cancel = part("cancel", "button", { type: "button", className: "button", hidden: true }, "Cancel the run");
    const resume = part("resume", "button", { type: "button", className: "button", hidden: true }, "Resume");
    cancel.onclick = () => this.#act("cancel");
    resume.onclick = () => this.#act("resume");
    part("isFollowed", "input", { type: "checkbox", role: "switch", checked: true });
    part("log", "pre", { tabIndex: 0, role: "region", "aria-label": "Lines of the log" });
    this.root = el("div", { className: "run" },
      el("a", { href: "#admin", className: "back" }, "All distillations"),
      el("div", { className: "row" }, part("title", "h2", { tabIndex: -1 }), el("div", { className: "actions" }, cancel, resume)),
      el("div", { className: "running" },
        part("doing", "p", { className: "lead doing" }),
        part("bar", "progress", { max: 1, "aria-label": "Progress of the stage" }),
        part("stages", "ol", { className: "phases stages" }),
        part("lost", "p", { className: "quiet", hidden: true }, "The connection was lost; trying again.")),
      part("error", "p", { className: "refused" }),
      part("facts", "dl", { className: "facts" }),
      part("gate", "section", { className: "box", "aria-labelledby": "gate-title", hidden: true }),
      el("div", { className: "plots" }, this.#loss.root, this.#gap.root, this.#blocks.root),
      part("samples", "section", { className: "box", "aria-labelledby": "samples-title", hidden: true },
        el("h3", { id: "samples-title" }, "Pictures and reports"), part("thumbnails", "ul", { className: "samples" })),
      el("section", { className: "box", "aria-labelledby": "log-title" },
        el("div", { className: "row" }, el("h3", { id: "log-title" }, "Log"),
          el("label", { className: "switch" }, this.#parts.isFollowed, el("i"), "Follow")),
        this.#parts.log));
  }

  get title() {
    return this.#parts.title;
  }

  /** Follow it until `close`. Throws a RequestError where there is none. */
  async open() {
    this.#show(await request(`/admin/distillations/${this.#id}`));
    this.#follow();
    const { signal } = this.#leave;
    await Promise.all([poll(() => this.#read(), POLL_MS, signal), poll(this.#look, POLL_MS, signal)]);
  }

  close() {
    this.#leave.abort();
    for (const { source } of this.#files.values()) URL.revokeObjectURL(source);
  }

  /** At what is served: that says what becomes of its student. */
  #look = async () => {
    await this.#served.look();
    this.#drawGate();
  };

  get #stages() {
    const { stages = [] } = this.#recipes.find(({ name }) => name === this.#run.recipe) ?? {};
    return [...stages, ...AFTER_STAGES];
  }

  // --- what it says ---

  #follow() {
    if (!isUnderWay(this.#run)) return;
    const { signal } = this.#leave;
    const onEvent = (event, data) => {
      this.#parts.lost.hidden = true;
      if (event === "distillation" && !signal.aborted) this.#show(JSON.parse(data));
      return !isUnderWay(this.#run);
    };
    const onLost = () => (this.#parts.lost.hidden = false);
    follow(`/admin/distillations/${this.#id}/events`, { signal, onEvent, onLost }).catch(this.#report);
  }

  async #act(verb) {
    try {
      this.#show(await post(`/admin/distillations/${this.#id}/${verb}`));
      if (verb === "resume") this.#follow();
    } catch (error) {
      this.#report(error);
    }
  }

  #show(run) {
    const before = this.#run;
    this.#run = run;
    const { title, error, cancel, resume } = this.#parts;
    if (before && before.status !== run.status) say(doing(run));
    title.replaceChildren(`${run.recipe}, ${run.preset} `, badge(run.status));
    setText(error, [run.error?.message, run.note].filter(Boolean).join(" "));
    const held = [cancel, resume].find((button) => button === document.activeElement);
    cancel.hidden = !["queued", "running"].includes(run.status);
    resume.hidden = !["failed", "cancelled"].includes(run.status);
    if (held?.hidden) title.focus({ preventScroll: true });
    this.#drawProgress();
    this.#drawFacts();
    this.#drawGate();
    if (run.importance) this.#blocks.set(run.importance.drop, run.importance.pruned);
  }

  #drawProgress() {
    const { bar, stages, doing: words } = this.#parts;
    const run = this.#run;
    setText(words, doing(run));
    const share = shareOf(run);
    if (share === null) bar.removeAttribute("value");
    else bar.value = share;
    bar.hidden = run.status !== "running";
    const now = this.#stages.indexOf(run.status !== "running" ? "" : run.phase === "training" ? run.progress?.stage : run.phase);
    stages.hidden = now < 0;
    stages.replaceChildren(...this.#stages.map((name, index) => {
      if (index === now) return el("li", { className: "now", "aria-current": "step" }, name);
      return el("li", { className: index < now ? "past" : "next" }, name);
    }));
  }

  #drawFacts() {
    const run = this.#run;
    const { steps_per_s: rate, memory_mb: memory } = run.progress?.values ?? {};
    const facts = {
      ...(rate && { Rate: `${figure(rate)} steps/s` }),
      ...(memory && { Memory: memory < 1024 ? `${Math.round(memory)} MB` : `${figure(memory / 1024)} GB` }),
      Id: run.id,
      Asked: moment(run.created_at),
      ...(run.started_at && { Started: moment(run.started_at) }),
      ...(run.finished_at && { Ended: moment(run.finished_at) }),
      ...(run.attempt > 1 && { Attempt: run.attempt }),
      ...(run.teacher && { Teacher: run.teacher }),
      ...(run.dataset && { Dataset: run.dataset }),
      Promotion: run.promote === "auto" ? "at once, if it passes the gate" : "by hand",
      ...run.overrides,
      ...Object.fromEntries(Object.entries(run.limits).map(([path, value]) => [`gate.${path}`, value])),
    };
    drawPart(this.#parts.facts, facts, () =>
      Object.entries(facts).map(([name, value]) => fact(name, [value].flat().join(" to "))));
  }

  // --- the verdict ---

  #drawGate() {
    const { gate, student_sha256: sha256 } = this.#run;
    this.#parts.gate.hidden = !gate;
    if (!gate) return;
    const student = this.#served.studentOf(sha256);
    const files = Object.keys(GATE_FILES).filter((name) => this.#files.has(name));
    drawPart(this.#parts.gate, [gate, student, files, this.#served.release?.workers], () => this.#verdict(gate, student, files));
  }

  #verdict(gate, student, files) {
    const against = this.#served.modelOf(gate.against);
    const links = files.map((name) => {
      const button = el("button", { type: "button", className: "button", "data-key": name }, GATE_FILES[name]);
      button.onclick = () => this.#openFile(name);
      return button;
    });
    const button = el("button", { type: "button", className: "button primary", "data-key": "promote" },
      gate.passed ? "Promote" : "Promote against the gate's verdict");
    button.hidden = !student || student.status === "active";
    button.onclick = () => promote(student, this.#look);
    return [
      el("div", { className: "row" }, el("h3", { id: "gate-title" }, "The gate's verdict"), badge(gate.passed ? "passed" : "refused")),
      el("p", { className: "quiet" }, `Held against ${against}, ${moment(gate.at)}.`),
      ...(gate.refusals.length ? [el("ul", { className: "refusals" }, ...gate.refusals.map((line) => el("li", {}, line)))] : []),
      ...(student?.status === "active" ? [el("p", {}, `${student.model} is the active student.`)] : []),
      el("div", { className: "actions" }, button, ...links),
      ...(student?.status === "active" ? drawWorkers(this.#served) : []),
    ];
  }

  // --- what is asked for again and again ---

  /** All that is new; nothing comes any more once it is over. */
  async #read() {
    const isLast = !isUnderWay(this.#run);
    if (isLast && this.#isRead) return;
    await Promise.all([this.#readMetrics(), this.#readLog(), this.#readFiles()]);
    this.#isRead = isLast;
  }

  async #readMetrics() {
    let isNew = false;
    for (;;) {
      const { data, last_id } = await this.#after("metrics", this.#metricsAfter);
      if (!data.length) break;
      this.#metricsAfter = last_id;
      for (const metric of data) this.#add(metric);
      isNew = true;
    }
    if (!isNew) return;
    const withLoss = this.#stages.filter((stage) => this.#lines.has(`${stage} loss`));
    this.#loss.set(withLoss.map((stage) => ({ name: stage, points: this.#lines.get(`${stage} loss`) })));
    this.#gap.set(QUARTERS.map((name, index) => ({ name, points: this.#lines.get(`matching critic_gap_s${index}`) ?? [] })));
  }

  #add({ stage, step, steps, values }) {
    for (const [name, value] of Object.entries(values)) {
      const line = `${stage} ${name}`;
      const points = this.#lines.get(line) ?? [];
      while (points.at(-1)?.step >= step) points.pop(); // it has gone back to a checkpoint
      points.push({ step, steps: steps ?? points.at(-1)?.steps ?? step, value });
      this.#lines.set(line, points);
    }
  }

  async #readLog() {
    const { log, isFollowed } = this.#parts;
    const lines = [];
    for (;;) {
      const answer = await this.#after("log", this.#logAfter);
      if (!answer.lines.length) break;
      this.#logAfter = answer.last_id;
      lines.push(...answer.lines);
    }
    if (!lines.length) return;
    this.#logLines = [...this.#logLines, ...lines].slice(-KEPT_LINES);
    log.textContent = this.#logLines.join("\n");
    if (isFollowed.checked) log.scrollTop = log.scrollHeight;
  }

  /** What a run has said after that; all that there is for null. */
  #after(what, last) {
    return request(`/admin/distillations/${this.#id}/${what}${last ? `?after=${last}` : ""}`);
  }

  async #readFiles() {
    const { data } = await request(`/admin/distillations/${this.#id}/samples`);
    for (const { name, url, kind, created_at } of data) {
      const known = this.#files.get(name);
      if (known?.created_at === created_at) continue;
      const source = kind === "report" ? null : URL.createObjectURL(await fetchBlob(here(url)));
      if (known?.source) URL.revokeObjectURL(known.source);
      this.#files.set(name, { created_at, url, source });
    }
    if (this.#leave.signal.aborted) return this.close();
    const shown = data.map(({ name, created_at }) => [name, created_at]).reverse();
    this.#parts.samples.hidden = !shown.length;
    drawPart(this.#parts.thumbnails, shown, () => shown.map(([name]) => this.#thumbnail(name)));
    this.#drawGate();
  }

  #thumbnail(name) {
    const { source } = this.#files.get(name);
    const picture = source ? el("img", { src: source, alt: "" }) : el("span", { className: "sheet" }, name.split(".").pop());
    const button = el("button", { type: "button", "data-key": name }, picture, el("span", {}, name));
    button.onclick = () => this.#openFile(name);
    return el("li", {}, button);
  }

  #openFile(name) {
    const { source, url } = this.#files.get(name);
    if (source) showPicture(name, source);
    else showReport(name, url).catch(this.#report);
  }
}
