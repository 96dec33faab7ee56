// The sentence and its chips. distill/prompt.py is the same grammar, and the one that decides.

import { $, el } from "./dom.js";

/** The prompt's field, and the chips that stand for its parts; one changes the other. */
export class PromptField {
  #prompt = null; // what the model says of its prompts
  #sentence = {}; // values of the last text that parsed, to fall back on when a chip meets half a sentence
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    $("prompt").oninput = () => this.#changed();
  }

  get text() {
    return $("prompt").value;
  }

  set text(text) {
    $("prompt").value = text;
    this.#changed();
  }

  /** Draw the chips of a model: the parts of its grammar, or sentences to start from. */
  load(prompt) {
    this.#prompt = prompt;
    const { kind, grammar, examples, help } = prompt;
    $("prompt-help").textContent = help;
    $("prompt").placeholder = examples[0] ?? "";
    const free = kind === "free" || !grammar;
    const groups = free ? [this.#exampleChips(examples)] : grammar.parts.map((part) => this.#partChips(part));
    $("chips").replaceChildren(...groups);
    this.#changed();
  }

  #changed() {
    this.#onChange();
    const grammar = this.#prompt?.grammar;
    if (!grammar) return;
    const { values, whole } = parse(grammar, this.text);
    if (whole) this.#sentence = values;
    for (const group of $("chips").querySelectorAll("[role=radiogroup]")) markChoices(group, grammar, values, whole);
  }

  #choose(name, choice) {
    const { grammar } = this.#prompt;
    const { values, whole } = parse(grammar, this.text);
    const wanted = { ...(whole ? {} : this.#sentence), ...values };
    if (choice) wanted[name] = choice;
    else delete wanted[name];
    this.text = compose(grammar, wanted, name);
  }

  #exampleChips(examples) {
    const onclick = (text) => () => (this.text = text);
    const chip = (text) => el("button", { type: "button", className: "chip", onclick: onclick(text) }, text);
    const choices = el("div", { className: "choices" }, ...examples.map(chip));
    return el("div", { className: "group", role: "group", "aria-label": "Sentences to start from" }, choices);
  }

  #partChips(part) {
    const id = `part-${part.name}`;
    const choices = part.optional ? ["", ...part.choices] : part.choices;
    const chips = choices.map((choice) => this.#choiceChip(part.name, choice));
    return el("div", { className: "group", role: "radiogroup", "aria-labelledby": id, "data-part": part.name },
      el("span", { id, className: "part" }, part.name),
      el("div", { className: "choices" }, ...chips, el("p", { className: "reason" })));
  }

  #choiceChip(name, choice) {
    const radio = el("input", { type: "radio", name: `part-${name}`, value: choice });
    radio.onchange = () => this.#choose(name, choice);
    const chip = el("label", { className: choice ? "chip" : "chip open" }, radio, choice || "leave open");
    if (CSS.supports("color", choice)) {
      const dot = el("i", { className: "dot" });
      dot.style.background = choice;
      radio.after(dot);
    }
    return chip;
  }
}

/** Check what the sentence says, and take away what it rules out, saying why. */
function markChoices(group, grammar, values, whole) {
  const name = group.dataset.part;
  let reason;
  for (const radio of group.querySelectorAll("input")) {
    const why = clash(grammar, values, name, radio.value);
    radio.checked = radio.value ? values[name] === radio.value : whole && !(name in values);
    radio.disabled = Boolean(why) && !radio.checked;
    reason ??= radio.disabled ? why : undefined;
  }
  group.querySelector(".reason").textContent = reason ?? "";
}

/** {values, whole}: the parts that `text` has, up to where it stops fitting. */
function parse(grammar, text) {
  const words = text.toLowerCase().trim().split(/\s+/).map((word) => grammar.aliases[word] ?? word);
  let rest = words.join(" ").replace(/\s+,/g, ",").replace(/\.$/, "").trimEnd();
  const values = {};
  const begins = (phrase) => rest.startsWith(phrase) && !/^[\p{L}\p{N}]/u.test(rest.slice(phrase.length));
  for (const part of grammar.parts) {
    const prefix = Object.keys(values).length ? part.prefix : part.prefix.trimStart();
    const longestFirst = [...part.choices].sort((a, b) => b.length - a.length);
    const choice = longestFirst.find((one) => begins(prefix + one));
    if (choice) {
      values[part.name] = choice;
      rest = rest.slice((prefix + choice).length);
    } else if (!part.optional) return { values, whole: false };
  }
  const whole = !rest && !Object.entries(values).some(([name, choice]) => clash(grammar, values, name, choice));
  return { values, whole };
}

/** Why `choice` does not go together with the other values, or undefined. */
function clash(grammar, values, name, choice) {
  const all = { ...values, [name]: choice };
  const holds = ({ when }) => Object.entries(when).every(([part, choices]) => choices.includes(all[part]));
  return grammar.exclusions.find((exclusion) => name in exclusion.when && holds(exclusion))?.reason;
}

/** The sentence of `values`, with what must be there filled in. `name` is the part just chosen: the others give way. */
function compose(grammar, values, name) {
  for (const part of grammar.parts) {
    const choice = values[part.name];
    const keep = part.name === name || (choice ? !clash(grammar, values, part.name, choice) : part.optional);
    if (keep) continue;
    if (part.optional) delete values[part.name];
    else values[part.name] = part.choices.find((other) => !clash(grammar, values, part.name, other));
  }
  const said = grammar.parts.filter((part) => values[part.name]);
  return said.map((part) => part.prefix + values[part.name]).join("").trimStart();
}
