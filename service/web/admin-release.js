// What is served: the active student and what workers do about it, the students that could be, and the history.

import { ask } from "./admin-dialogs.js";
import { post, request } from "./api.js";
import { el, say, seconds } from "./dom.js";

/** A moment, in the reader's own time. */
export const moment = (value) =>
  new Date(typeof value === "number" ? 1000 * value : value).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

/** A state with its colour. */
export const badge = (state, text = state) => el("span", { className: "badge", "data-state": state }, text);

/** Ask, and promote it. `changed()` is called thereafter. */
export function promote(student, changed) {
  ask({
    title: `Promote ${student.model}`,
    text: "Workers fetch it, hold it against PyTorch, warm it up, and switch to it between two jobs.",
    verb: "Promote",
    name: student.name,
    against: objection(student.gate),
    act: async (body) => {
      const release = await post(`/admin/students/${student.sha256}/promote`, body);
      say(`Release ${release.number}: ${student.model} is promoted.`);
      await changed();
    },
  });
}

/** What of the gate's verdict is against a promotion, in words; null where nothing is. */
function objection(gate) {
  if (!gate) return "The gate has not judged it.";
  return gate.passed ? null : `The gate refuses it: ${gate.refusals.join("; ")}.`;
}

/** Ask, and go back to what the active student was promoted over. */
function rollBack(served, changed) {
  const { number, active, rolls_back_to: below } = served.release;
  ask({
    title: `Roll back to ${served.modelOf(below)}`,
    text: `It takes the place of ${served.modelOf(active)}; workers go over to it between two jobs.`,
    verb: "Roll back",
    act: async ({ reason }) => {
      const release = await post("/admin/students/rollback", { reason, number });
      say(`Release ${release.number}: rolled back to ${served.modelOf(release.sha256)}.`);
      await changed();
    },
  });
}

/** What the service says of students and releases, as last looked at. */
export class Served {
  release = null;
  students = [];

  /** Throws a RequestError. */
  async look() {
    const [release, { data }] = await Promise.all([request("/admin/release"), request("/admin/students")]);
    Object.assign(this, { release, students: data });
  }

  studentOf = (sha256) => this.students.find((student) => student.sha256 === sha256);

  /** What requests call it, as far as that is known. */
  modelOf = (sha256) => this.studentOf(sha256)?.model ?? sha256.slice(0, 12);
}

// --- parts of the page -----------------------------------------------------------------------------------------------

/** The active student, and the way back. */
export function drawActive(served, changed) {
  const { number, active, rolls_back_to: below, history } = served.release;
  const since = number
    ? `Release ${number}, ${moment(history[0].at)}.`
    : "Nothing was promoted yet: workers serve what they were started with.";
  const back = below ? `Rolling back leads to ${served.modelOf(below)}.` : "There is nothing to roll back to.";
  const button = el("button", { type: "button", className: "button", "data-key": "back", hidden: !below }, "Roll back");
  button.onclick = () => rollBack(served, changed);
  return [
    ...(active ? [el("p", { className: "lead" }, served.modelOf(active))] : []),
    el("p", { className: "quiet" }, `${since} ${back}`),
    el("div", { className: "actions" }, button),
  ];
}

/** What each worker does about the active student. */
export function drawWorkers(served) {
  const { workers } = served.release;
  if (!workers.length) return [el("p", { className: "quiet" }, "No worker is running.")];
  const items = workers.map((worker) =>
    el("li", {},
      el("div", { className: "row" }, el("b", {}, worker.name), badge(worker.state)),
      el("p", { className: "quiet" }, loading(worker, served)),
      ...(worker.message ? [el("p", { className: "why" }, worker.message)] : [])));
  return [el("ul", { className: "rows" }, ...items)];
}

/** What a worker does about the active student, in a sentence. */
function loading({ state, loaded, how, seconds: took }, served) {
  const serves = loaded ? `It serves ${served.modelOf(loaded)}` : "It serves nothing yet";
  if (state === "staging") return `${serves}, and is getting the active student ready.`;
  if (state === "failed") return `${serves}: it could not load the active student, and tries again.`;
  const engine = { refit: "its engine got the other weights", build: "its engine was built" }[how];
  return `${serves}${took ? `, ready in ${seconds(took)}` : ""}${engine ? `: ${engine}` : ""}.`;
}

/** What the gate said, in a word. */
function gateBadge(gate) {
  if (!gate) return badge("none", "not judged");
  return gate.passed ? badge("passed", "gate passed") : badge("refused", "gate refused");
}

/** Every student, with a button for those that are not active. */
export function drawStudents(served, changed) {
  if (!served.students.length) return [el("p", { className: "quiet" }, "None yet: a distillation that is finished puts its student here.")];
  const items = served.students.map((student) => {
    const { sha256, model, status, gate, workers, distillation, added_at } = student;
    const button = el("button", { type: "button", className: "button", "data-key": sha256, "aria-label": `Promote ${model}` }, "Promote");
    button.hidden = status === "active";
    button.onclick = () => promote(student, changed);
    const run = distillation ? [el("a", { href: `#admin/${distillation}` }, "Its run")] : [];
    const facts = `Added ${moment(added_at)}; ${workers === 1 ? "1 worker has" : `${workers} workers have`} it loaded.`;
    return el("li", {},
      el("div", { className: "row" }, el("b", {}, model), button),
      el("p", {}, ...(status === "available" ? [] : [badge(status), " "]), gateBadge(gate)),
      el("p", { className: "quiet" }, facts, " ", ...run));
  });
  return [el("ul", { className: "rows" }, ...items)];
}

/** The releases, the newest first, with who and why. */
export function drawHistory(served) {
  const { history } = served.release;
  if (!history.length) return [el("p", { className: "quiet" }, "Nothing was promoted yet.")];
  const items = history.map(({ number, at, action, sha256, by, reason, forced }) => {
    const did = action === "promote" ? "promoted" : "rolled back to";
    return el("li", {},
      el("p", {}, el("b", {}, `${number} `), `${did} ${served.modelOf(sha256)} `, ...(forced ? [badge("forced", "against the gate")] : [])),
      el("p", { className: "quiet" }, `${moment(at)}, by ${by}`),
      ...(reason ? [el("p", { className: "why" }, reason)] : []));
  });
  return [el("ol", { className: "rows" }, ...items)];
}
