// Small plots in SVG: lines that grow while a run goes on, and bars. Each has its numbers as a table beside it.

import { capital, el, setText } from "./dom.js";

const HEIGHT = 220;
const MARGIN = { left: 52, right: 12, top: 12, bottom: 26 };
const LOG_FROM = 10; // largest over smallest, from where a log scale shows more
const MOST_ROWS = 40; // of a line in the table

/** A measured number, short. */
export const figure = (value) => new Intl.NumberFormat("en", { maximumSignificantDigits: 3 }).format(value);

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Where a value stands between the ends, 0 to 1, and the round values to mark. */
class Scale {
  constructor(values, isLog) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    if (isLog) {
      const decades = Math.log10(high / low);
      const parts = decades > 3 ? [1] : decades > 1 ? [1, 3] : [1, 2, 5];
      [this.low, this.high] = [low / 1.15, high * 1.15];
      this.marks = powers(this.low, this.high).flatMap((power) => parts.map((part) => part * power));
    } else {
      const span = high - low || Math.abs(high) || 1;
      const rough = 10 ** Math.floor(Math.log10(span / 3));
      const step = rough * [1, 2, 5, 10].find((part) => span / (part * rough) <= 5);
      [this.low, this.high] = [step * Math.floor(low / step), step * Math.ceil(high / step) || step];
      if (this.low === this.high) this.high += step;
      const first = Math.round(this.low / step);
      const count = Math.round((this.high - this.low) / step) + 1;
      this.marks = Array.from({ length: count }, (_, index) => step * (first + index));
    }
    this.marks = this.marks.filter((mark) => mark >= this.low && mark <= this.high);
    this.isLog = isLog;
  }

  at(value) {
    const [low, high, here] = [this.low, this.high, value].map((one) => (this.isLog ? Math.log10(one) : one));
    return (here - low) / (high - low);
  }
}

function powers(low, high) {
  const [first, last] = [low, high].map((value) => Math.floor(Math.log10(value)));
  return Array.from({ length: last - first + 1 }, (_, index) => 10 ** (first + index));
}

/** What both kinds share: the frame, the scale with its switch, the legend and the table. */
class Chart {
  #switch = el("input", { type: "checkbox", role: "switch" });
  #log = el("label", { className: "switch", hidden: true }, this.#switch, el("i"), "Log scale");
  #isLogChosen = false; // by the person
  #legend = el("ul", { className: "legend" });
  #table = el("table");
  #details = el("details", {}, el("summary", {}, "The same as a table"), this.#table);
  #svg = draw("svg", { role: "img" });
  #width = 0; // that it is painted for
  #title;

  constructor(title) {
    this.#title = title;
    const head = el("div", { className: "row" }, el("h3", {}, title), this.#log);
    this.root = el("section", { className: "plot" }, head, this.#svg, this.#legend, this.#details);
    this.root.hidden = true;
    this.#switch.onchange = () => {
      this.#isLogChosen = true;
      this.paint();
    };
    this.#details.ontoggle = () => this.#fillTable();
    this.#svg.onpointermove = ({ offsetX }) => this.point((offsetX - MARGIN.left) / this.#plotWidth);
    this.#svg.onpointerleave = () => this.point(null);
    // In the next frame: what is painted may change the height of what is observed.
    new ResizeObserver(() => {
      if (this.#svg.clientWidth !== this.#width) requestAnimationFrame(() => this.paint());
    }).observe(this.root);
  }

  get #plotWidth() {
    return this.#width - MARGIN.left - MARGIN.right;
  }

  /** Draw it all anew: after a change, or at another size. */
  paint() {
    const values = this.values();
    this.root.hidden = !values.length;
    if (this.root.hidden || !this.#svg.clientWidth) return;
    const [low, high] = [Math.min(...values), Math.max(...values)];
    this.#log.hidden = low <= 0 || low === high;
    if (!this.#isLogChosen) this.#switch.checked = high / low >= LOG_FROM;
    const isLog = this.#switch.checked && !this.#log.hidden;
    const scale = new Scale(this.fromZero && !isLog ? [0, ...values] : values, isLog);
    const height = HEIGHT - MARGIN.top - MARGIN.bottom;
    this.#width = this.#svg.clientWidth;
    this.#svg.setAttribute("aria-label", `${this.#title}. ${this.summary()}`);
    const x = (share) => MARGIN.left + share * this.#plotWidth;
    const y = (value) => MARGIN.top + (1 - scale.at(value)) * height;
    const grid = scale.marks.flatMap((mark) => [
      draw("line", { class: "grid", x1: x(0), x2: x(1), y1: y(mark), y2: y(mark) }),
      draw("text", { x: MARGIN.left - 8, y: y(mark) + 4, "text-anchor": "end" }, figure(mark)),
    ]);
    const foot = this.marksBelow().map(([share, text]) =>
      draw("text", { x: x(share), y: HEIGHT - 6, "text-anchor": anchor(share) }, text));
    this.#svg.replaceChildren(...grid, ...foot, ...this.shapes(x, y, y(Math.max(scale.low, Math.min(0, scale.high)))));
    this.point(null);
    this.#fillTable();
  }

  /** The legend: [{className, name, value}]. */
  setLegend(entries) {
    while (this.#legend.children.length > entries.length) this.#legend.lastElementChild.remove();
    entries.forEach(({ className, name, value }, index) => {
      const there = this.#legend.children[index];
      const item = there ?? el("li", {}, el("i"), el("span"), el("b"));
      item.className = className;
      setText(item.children[1], name);
      setText(item.children[2], value);
      if (!there) this.#legend.append(item);
    });
  }

  #fillTable() {
    if (!this.#details.open) return;
    const [head, ...rows] = this.rows();
    this.#table.replaceChildren(
      el("caption", { className: "unseen" }, this.#title),
      el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => el("td", {}, String(cell)))))),
    );
  }
}

const anchor = (share) => (share === 0 ? "start" : share === 1 ? "end" : "middle");

/** A line for each series over its share of the steps. */
export class LineChart extends Chart {
  #series = [];
  #heads = []; // the circles that mark a value
  #place = null; // (share, value) -> [x, y]

  /** `series`: [{name, points: [{step, steps, value}]}]. */
  set(series) {
    this.#series = series.map((one, index) => ({ ...one, className: `line-${index}` })).filter(({ points }) => points.length);
    this.paint();
  }

  values() {
    return this.#series.flatMap(({ points }) => points.map(({ value }) => value));
  }

  summary() {
    return this.#series.map(({ name, points }) => `${name}: ${this.#say(points[0])}, then ${this.#say(points.at(-1))}`).join("; ");
  }

  marksBelow() {
    return [[0, "begin"], [0.5, "half-way"], [1, "all steps"]];
  }

  shapes(x, y) {
    this.#place = ({ step, steps, value }) => [x(share(step, steps)), y(value)];
    this.#heads = this.#series.map(({ className }) => draw("circle", { class: className, r: 4 }));
    const lines = this.#series.map(({ points, className }) => {
      const corners = points.map((point) => this.#place(point).map((at) => at.toFixed(1)).join(" "));
      return draw("path", { class: className, d: `M${corners.join("L")}` });
    });
    return [...lines, ...this.#heads];
  }

  /** Say the values there; null: the latest. */
  point(at) {
    const shown = this.#series.map(({ points }) => (at === null ? points.at(-1) : nearest(points, at)));
    shown.forEach((point, index) => {
      const [cx, cy] = this.#place(point);
      this.#heads[index].setAttribute("cx", cx);
      this.#heads[index].setAttribute("cy", cy);
    });
    this.setLegend(this.#series.map(({ name, className }, index) => ({ name, className, value: this.#say(shown[index]) })));
  }

  #say({ step, value }) {
    return `${figure(value)} at step ${step}`;
  }

  rows() {
    const rows = this.#series.flatMap(({ name, points }) =>
      thinned(points).map(({ step, value }) => [name, step, figure(value)]));
    return [["Line", "Step", "Value"], ...rows];
  }
}

const share = (step, steps) => Math.min(1, step / steps);

function nearest(points, at) {
  const distance = ({ step, steps }) => Math.abs(share(step, steps) - at);
  return points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
}

/** Some of them, evenly, with the last one. */
function thinned(points) {
  const every = Math.ceil(points.length / MOST_ROWS);
  return points.filter((_, index) => (points.length - 1 - index) % every === 0);
}

/** A bar for each value; some are marked. */
export class BarChart extends Chart {
  #values = [];
  #marked = new Set();
  #names;
  fromZero = true;

  /** `names`: {one, marked, others}: what a bar is, and how both kinds are called. */
  constructor(title, names) {
    super(title);
    this.#names = names;
  }

  /** `marked`: indices. */
  set(values, marked) {
    this.#values = values;
    this.#marked = new Set(marked);
    this.paint();
  }

  values() {
    return this.#values;
  }

  summary() {
    return `${this.#names.marked}: ${[...this.#marked].join(", ") || "none"} of ${this.#values.length}`;
  }

  marksBelow() {
    const every = Math.ceil(this.#values.length / 20);
    return this.#values.map((_, index) => [(index + 0.5) / this.#values.length, index]).filter(([, index]) => index % every === 0);
  }

  shapes(x, y, ground) {
    const width = Math.max(1, 0.7 * (x(1 / this.#values.length) - x(0)));
    return this.#values.map((value, index) => {
      const top = Math.min(y(value), ground);
      const left = x((index + 0.5) / this.#values.length) - width / 2;
      const size = { x: left, y: top, width, height: Math.max(1, Math.abs(ground - y(value))), rx: 2 };
      return draw("rect", { class: this.#marked.has(index) ? "marked" : "other", ...size });
    });
  }

  /** Say the value of the bar there; null: which colour is which. */
  point(at) {
    const index = at === null ? -1 : Math.floor(at * this.#values.length);
    const value = this.#values[index];
    const said = value === undefined ? "" : `${this.#names.one} ${index}: ${figure(value)}`;
    const isMarked = this.#marked.has(index);
    this.setLegend([
      { className: "marked", name: this.#names.marked, value: isMarked ? said : "" },
      { className: "other", name: this.#names.others, value: isMarked ? "" : said },
    ]);
  }

  rows() {
    const { marked, others } = this.#names;
    const rows = this.#values.map((value, index) => [index, figure(value), this.#marked.has(index) ? marked : others]);
    return [[capital(this.#names.one), "Value", "What becomes of it"], ...rows];
  }
}
