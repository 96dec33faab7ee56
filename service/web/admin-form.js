// A distillation is asked for: the recipe's own form. Only what was changed is sent, and the server judges it.

import { RequestError, post } from "./api.js";
import { capital, el, setText } from "./dom.js";

const GATE = "gate"; // a group beside those of the stages
const OWN = "the recipe's own";

/** One value: its control, what the server says against it, and what it means. */
class Field {
  #inputs;
  #error = el("p", { className: "error", hidden: true });
  #help = el("p", { className: "quiet" });
  #default;
  #spec;

  /**
   * `name`: what a refusal calls it. `spec`: {type, default, choices?, minimum?, above?, maximum?, below?, description}.
   * A choice may be [value, text].
   */
  constructor(name, label, spec, onChange = () => {}) {
    this.name = name;
    this.#spec = spec;
    const id = `field-${name}`;
    this.#error.id = `${id}-error`;
    this.#help.id = `${id}-help`;
    this.#inputs = this.#controls(id);
    for (const input of this.#inputs) {
      input.setAttribute("aria-describedby", `${this.#error.id} ${this.#help.id}`);
      input.oninput = () => {
        this.say(null);
        this.#mark();
        onChange();
      };
    }
    const isPair = this.#inputs.length > 1;
    const title = isPair ? el("span", { className: "title" }, label) : el("label", { htmlFor: id }, label);
    this.root = el("div", { className: "setting" }, title, el("div", { className: "inputs" }, ...this.#inputs), this.#error, this.#help);
    if (isPair) for (const [index, end] of ["from", "to"].entries()) this.#inputs[index].ariaLabel = `${label}, ${end}`;
    this.setDefault(spec.default);
  }

  #controls(id) {
    const { type, choices } = this.#spec;
    const options = type === "boolean" ? [["true", "yes"], ["false", "no"]] : choices;
    if (options) {
      const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
      return [el("select", { id }, ...pairs.map(([value, text]) => el("option", { value }, text)))];
    }
    if (type === "string") return [el("input", { id, autocomplete: "off" })];
    const { minimum, above, maximum, below } = this.#spec;
    const number = { type: "number", step: type === "integer" ? 1 : "any", min: minimum ?? above ?? "", max: maximum ?? below ?? "" };
    const ids = type === "pair" ? [id, `${id}-to`] : [id];
    return ids.map((one) => el("input", { id: one, ...number }));
  }

  /** As it is unless it is changed; a control that was not touched follows. */
  setDefault(value) {
    const wasChanged = this.#default !== undefined && this.isChanged;
    this.#default = value;
    if (!wasChanged) [value].flat().forEach((part, index) => (this.#inputs[index].value = String(part ?? "")));
    const texts = [this.#spec.description, bounds(this.#spec)].filter(Boolean);
    setText(this.#help, texts.join("; "));
    this.#mark();
  }

  /** What is in the control, of its type. What is no number is null, for the server to refuse. */
  get value() {
    const { type } = this.#spec;
    const values = this.#inputs.map((input, index) => {
      if (type === "boolean") return input.value === "true";
      if (type === "string") return input.value;
      const isLeftEmpty = input.value === "" && !input.validity.badInput;
      return isLeftEmpty ? [this.#default].flat()[index] : input.value === "" ? null : Number(input.value);
    });
    return type === "pair" ? values : values[0];
  }

  get isChanged() {
    return JSON.stringify(this.value) !== JSON.stringify(this.#default);
  }

  #mark() {
    this.root.dataset.changed = this.isChanged;
  }

  /** Put the server's sentence beside it; null takes it away. */
  say(message) {
    setText(this.#error, message ?? "");
    this.#error.hidden = !message;
    for (const input of this.#inputs) input.ariaInvalid = Boolean(message);
  }

  focus() {
    const group = this.root.closest("details");
    if (group) group.open = true;
    this.#inputs[0].focus();
  }
}

/** The bounds of a value in words. */
function bounds({ type, minimum, above, maximum, below }) {
  if (!["integer", "number"].includes(type)) return "";
  const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 20 });
  const low = minimum != null ? `at least ${number(minimum)}` : above != null ? `above ${number(above)}` : "";
  const high = maximum != null ? `at most ${number(maximum)}` : below != null ? `below ${number(below)}` : "";
  return [low, high].filter(Boolean).join(", ");
}

export class RunForm {
  root = el("form", { className: "run-form", noValidate: true, autocomplete: "off" });
  #offer;
  #recipe;
  #top = []; // Field: recipe, preset, ...
  #values = []; // {field, spec}: what is tunable
  #groups = el("div", { className: "groups" });
  #refused = el("p", { className: "refused", role: "alert" });
  #button = el("button", { className: "button primary" }, "Start");
  #onStarted;

  /** `offer`: what `/admin/recipes` says. `onStarted(distillation)` is called once the server has taken it. */
  constructor(offer, onStarted) {
    this.#offer = offer;
    this.#onStarted = onStarted;
    const { data, teachers, datasets } = offer;
    const chosen = (name, label, choices, description, onChange) =>
      new Field(name, label, { type: "string", choices, default: [choices[0]].flat()[0], description }, onChange);
    const own = ["", OWN];
    this.#top = [
      chosen("recipe", "Recipe", data.map(({ name }) => name), "", () => this.#setRecipe()),
      chosen("preset", "Preset", data[0].presets, "How much of it to run", () => this.#setPreset()),
      chosen("teacher", "Teacher", [own, ...teachers.map(({ name }) => name)], "What the student learns from"),
      chosen("dataset", "Dataset", [own, ...datasets], "What the clips are of"),
      chosen("promote", "When it has passed the gate", [["manual", "Wait for somebody to promote it"], ["auto", "Promote it at once"]], ""),
    ];
    this.root.append(
      el("div", { className: "settings" }, ...this.#top.map(({ root }) => root)),
      this.#groups, this.#refused,
      el("div", { className: "actions" }, this.#button, el("a", { className: "button", href: "#admin" }, "Cancel")));
    this.root.onsubmit = (event) => {
      event.preventDefault();
      this.#start();
    };
    this.#setRecipe();
  }

  #chosen(name) {
    return this.#top.find((field) => field.name === name).value;
  }

  #setRecipe() {
    this.#recipe = this.#offer.data.find(({ name }) => name === this.#chosen("recipe"));
    const { fields, gate_fields: limits, stages } = this.#recipe;
    this.#values = [
      ...fields.map((spec) => this.#value(`overrides.${spec.path}`, spec, groupOf(spec.path))),
      ...limits.map((spec) => this.#value(`gate.${spec.path}`, spec, GATE)),
    ];
    const common = el("div", { className: "settings" }, ...this.#rootsOf(""));
    const names = [...stages, GATE].filter((group) => this.#rootsOf(group).length);
    this.#groups.replaceChildren(common, ...names.map((group) =>
      el("details", { className: "group-of-settings" }, el("summary", {}, capital(group), " ", el("span", { className: "count" })),
        el("div", { className: "settings" }, ...this.#rootsOf(group)))));
    this.#setPreset();
  }

  #value(name, spec, group) {
    const label = group && group !== GATE ? spec.path.slice(group.length + 1) : spec.path;
    return { field: new Field(name, label, spec, () => this.#count()), spec, group };
  }

  #rootsOf(group) {
    return this.#values.filter((value) => value.group === group).map(({ field }) => field.root);
  }

  #setPreset() {
    const preset = this.#chosen("preset");
    for (const { field, spec } of this.#values) field.setDefault(spec.by_preset?.[preset] ?? spec.default);
    this.#count();
  }

  /** Say of each group how many of its values are changed. */
  #count() {
    for (const details of this.#groups.querySelectorAll("details")) {
      const count = details.querySelectorAll("[data-changed=true]").length;
      setText(details.querySelector(".count"), count ? `${count} changed` : "");
    }
  }

  #ask() {
    const changed = (prefix) => Object.fromEntries(this.#values
      .filter(({ field }) => field.name.startsWith(prefix) && field.isChanged)
      .map(({ field, spec }) => [spec.path, field.value]));
    const top = Object.fromEntries(this.#top.map(({ name, value }) => [name, value]).filter(([, value]) => value));
    return { ...top, overrides: changed("overrides."), gate: changed("gate.") };
  }

  async #start() {
    if (this.#button.ariaDisabled === "true") return;
    const fields = [...this.#top, ...this.#values.map(({ field }) => field)];
    for (const field of fields) field.say(null);
    setText(this.#refused, "");
    this.#button.ariaDisabled = true;
    try {
      this.#onStarted(await post("/admin/distillations", this.#ask()));
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      if (error.isLocked) return;
      const field = fields.find(({ name }) => name === error.param);
      if (!field) return setText(this.#refused, error.message);
      field.say(error.message);
      field.focus();
    } finally {
      this.#button.ariaDisabled = false;
    }
  }
}

/** The stage whose details a value belongs to; "" for those that come first: the whole run's, and how long stages are. */
function groupOf(path) {
  const [stage, ...rest] = path.split(".");
  return rest.length && rest.join(".") !== "fit.steps" ? stage : "";
}
