// The playground: one sentence, what it goes with, and what one model, or two side by side, make of it.
//
// The server is the only judge of what it accepts: nothing here refuses an input, and what the server says about one is
// shown as it said it. The URL's hash holds the ids of what is on the stage, so reload and "back" just work.

import { Admin, isAdminUrl } from "./admin.js";
import { RequestError, here, key, onLocked, request } from "./api.js";
import { $, el, fact, lessMotion, say, seconds, setText } from "./dom.js";
import { Gallery } from "./gallery.js";
import { PHASES, Pane, isActive } from "./pane.js";
import { Duet } from "./player.js";
import { PromptField } from "./prompt.js";
import * as snippets from "./snippets.js";

const READY_POLL_MS = { ready: 20_000, notReady: 2_000 };
const MAX_NAME = 120; // of a file, in the notes that go with a request
const FIELDS = ["image", "video", "strength", "prompt", "seed", "model"];
const TAKES = { t2v: ["none", "video"], v2v: ["video"] }; // by the model's task; the others animate an image
const STRENGTH = 0.7; // of a video, to begin with

const state = {
  models: [], // what GET /models says, each under the name that it is asked for by
  image: null, // File for the next request
  video: null, // likewise, to start from
  asked: new Map(), // generation id -> the model that it was asked of, for this visit
  given: new Map(), // generation id -> the File it was made from, for this visit
  panes: [], // one, or two side by side
  duet: null, // plays both videos
  isSending: false,
  waitUntil: 0, // when the server wants to be asked again, in ms of `performance.now`
};

const prompt = new PromptField(() => {
  fieldError("prompt", null);
  drawCode();
});

const admin = new Admin({ report });

const gallery = new Gallery({ shown: () => shownGenerations().map(({ id }) => id), remove });

/** Run an action; what goes wrong is said in the alert area, and stays there until the person does the next thing. */
const attempt = (action) => async (...args) => {
  try {
    return await action(...args);
  } catch (error) {
    report(error);
  }
};

function report(error) {
  if (!(error instanceof RequestError)) throw error;
  if (!error.isLocked) warn(error.message);
}

const warn = (text) => setText($("alert"), text);

const refreshGallery = attempt(() => gallery.refresh());

// --- the key ---------------------------------------------------------------------------------------------------------

function lock(error) {
  if (error.code === "wrong_key") key.value = null;
  keyError(error.code === "wrong_key" ? error.message : null);
  if (!$("lock").hidden) return;
  for (const pane of state.panes) pane.close();
  state.panes = [];
  setLocked(true);
  $("key").focus();
  say("This service asks for an API key.");
}

function setLocked(isLocked) {
  $("lock").hidden = !isLocked;
  $("key-held").hidden = isLocked || !key.value;
  showPart();
}

/** The playground or the administrators' part, as the URL says; neither while the page is locked. */
function showPart() {
  const isLocked = !$("lock").hidden;
  const isAdmin = isAdminUrl();
  $("work").hidden = isLocked || isAdmin;
  $("admin").hidden = isLocked || !isAdmin;
  if ($("admin").hidden) admin.close();
  if (isLocked) $("ways").hidden = true;
  $("to-playground").href = `#${shownGenerations().map(({ id }) => id).join("+")}`;
  $(isAdmin ? "to-admin" : "to-playground").setAttribute("aria-current", "page");
  $(isAdmin ? "to-playground" : "to-admin").removeAttribute("aria-current");
}

function keyError(message) {
  setText($("key-error"), message ?? "");
  $("key-error").hidden = !message;
  $("key").setAttribute("aria-invalid", Boolean(message));
}

async function useKey() {
  const text = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(text)) {
    keyError(text ? "A key is one word of plain letters, digits, - and _." : "Type or paste the key first.");
    $("key").focus();
    return;
  }
  key.value = text;
  keyError(null);
  try {
    await request("/models");
  } catch (error) {
    if (error.isLocked) return $("key").select();
    if (error.status !== 403) return keyError(error.message);
  }
  $("key").value = "";
  setLocked(false);
  $("stage-title").focus({ preventScroll: true });
  say("The key works.");
  await begin();
}

function forgetKey() {
  key.value = null;
  // Nothing of what the key has opened may stay on the page.
  history.replaceState(null, "", location.pathname);
  location.reload();
}

// --- the models ------------------------------------------------------------------------------------------------------

const cardOf = (name) => state.models.find((card) => card.name === name);

/** The name of the model that made it, or is to. */
const modelOf = ({ id, model, model_sha256: sha256 }) =>
  state.models.find((card) => card.sha256 === sha256)?.name ?? state.asked.get(id) ?? model;

const takes = (card, source) => (TAKES[card?.task] ?? ["image"]).includes(source);

/** The models that the next request goes to. */
const chosenCards = () => {
  const cards = chosenModels().map(cardOf);
  return cards.length ? cards : state.models.slice(0, 1);
};

const details = (card) => {
  const { num_inference_steps: steps, kind } = card;
  return [...(kind ? [kind] : []), steps === 1 ? "1 step" : `${steps} steps`].join(", ");
};

/** The names of the models that the next request goes to. */
function chosenModels() {
  if (state.models.length < 2) return [];
  return $("compare").checked ? [$("model").value, $("other").value] : [$("model").value];
}

async function loadModels() {
  const { data } = await request("/models");
  const print = (models) => models.map(({ sha256 }) => sha256).join();
  if (!data.length || print(data) === print(state.models)) return;
  // Of several with one name the first answers to it.
  const answers = (card) => data.find(({ name }) => name === card.name) === card;
  state.models = data.map((card) => (answers(card) ? card : { ...card, name: card.id }));
  gallery.showsModels = data.length > 1;
  $("model-field").hidden = data.length < 2;
  for (const select of [$("model"), $("other")]) {
    const before = select.value;
    select.replaceChildren(...state.models.map((card) => el("option", { value: card.name }, `${card.name}, ${details(card)}`)));
    select.value = cardOf(before) ? before : state.models[select === $("other") && data.length > 1 ? 1 : 0].name;
  }
  modelChanged();
}

/** `moved` is the select that was changed: the other one gives way to it. */
function modelChanged(moved = $("model")) {
  const other = moved === $("model") ? $("other") : $("model");
  if (moved.value === other.value) other.value = state.models.find(({ name }) => name !== moved.value)?.name ?? "";
  fieldError("model", null);
  const isTwo = $("compare").checked && state.models.length > 1;
  $("work").dataset.compare = isTwo;
  const [card, second] = isTwo ? chosenModels().map(cardOf) : [cardOf($("model").value) ?? state.models[0]];
  const { width, height, num_frames, fps } = card.video;
  const names = second ? `${card.name} and ${second.name}` : `${card.name} · ${details(card)}`;
  setText($("makes"), `${names} · ${width} × ${height} · ${seconds(num_frames / fps)}`);
  document.documentElement.style.setProperty("--ratio", width / height);
  if (!shownGenerations().length) state.panes[0]?.setLabel("", "", card.video);
  prompt.load(card.prompt);
  drawSources();
}

/** The fields for what the chosen models take beside the sentence. */
function drawSources() {
  const cards = chosenCards();
  const ofVideos = cards.find((card) => takes(card, "video"));
  const before = $("image-field").hidden;
  $("image-field").hidden = !cards.some((card) => takes(card, "image"));
  $("video-field").hidden = !ofVideos;
  if (ofVideos) {
    $("video-optional").hidden = !takes(ofVideos, "none");
    if ($("strength").dataset.model !== ofVideos.name) setStrength(STRENGTH, ofVideos.sigmas ?? []);
    $("strength").dataset.model = ofVideos.name;
  }
  drawVideo();
  if (before !== $("image-field").hidden && !shownGenerations().length && state.panes.length) showStill();
}

function setModels(names) {
  if (state.models.length < 2 || !names.every(cardOf)) return;
  $("compare").checked = names.length > 1;
  $("model").value = names[0];
  if (names.length > 1) $("other").value = names[1];
  modelChanged();
}

// --- the image -------------------------------------------------------------------------------------------------------

const isImageUsed = () => chosenCards().some((card) => takes(card, "image"));

/** Take `file` as the first frame. `tile` is the example it came from, if any. The stage shows it if it is free. */
function setImage(file, tile = null, stageInUse = state.panes.some((pane) => pane.isActive)) {
  state.image = file;
  fieldError("image", null);
  for (const button of $("examples").querySelectorAll("button")) button.setAttribute("aria-pressed", button === tile);
  $("drop").classList.toggle("chosen", !tile);
  $("drop").querySelector("b").textContent = tile ? "Your image" : file.name;
  if (!stageInUse) showStill();
}

/** Take `file` to start from; null: none. */
function setVideo(file) {
  state.video = file;
  fieldError("video", null);
  drawVideo();
  if (!state.panes.some((pane) => pane.isActive)) showStill();
}

function drawVideo() {
  const { video } = state;
  $("video-drop").classList.toggle("chosen", Boolean(video));
  $("video-drop").querySelector("b").textContent = video?.name ?? "Your video";
  $("no-video").hidden = !video;
  $("strength-field").hidden = !video;
  const steps = Number($("strength").value);
  setText($("strength-says"), `${steps} of ${$("strength").max} steps, strength ${Number(strength()).toFixed(2)}`);
}

/** The levels are the model's own, the first step's first; the slider says how many steps are made. */
function setStrength(wanted, levels) {
  const distance = (level) => Math.abs(level - wanted);
  const first = levels.reduce((best, level, step) => (distance(level) < distance(levels[best]) ? step : best), 0);
  $("strength").max = levels.length;
  $("strength").value = levels.length - first;
}

function strength() {
  const levels = chosenCards().find((card) => takes(card, "video"))?.sigmas ?? [];
  return levels[levels.length - Number($("strength").value)] ?? STRENGTH;
}

const pickExample = attempt(async ({ image_url, prompt: sentence }, tile, stageInUse) => {
  prompt.text = sentence;
  const response = await fetch(here(image_url)).catch(() => null);
  if (!response?.ok) throw new RequestError("The example image could not be loaded.");
  const blob = await response.blob();
  setImage(new File([blob], image_url.split("/").pop(), { type: blob.type }), tile, stageInUse);
});

const drawExamples = attempt(async () => {
  if ($("examples").children.length) return;
  const { data } = await request("/examples");
  const tiles = data.map((example) => {
    const picture = el("img", { src: here(example.image_url), alt: `Example: ${example.name.replaceAll("-", " ")}` });
    const properties = { type: "button", className: "tile", title: example.prompt, "aria-pressed": "false" };
    const tile = el("button", properties, picture);
    tile.onclick = () => pickExample(example, tile);
    return tile;
  });
  $("examples").replaceChildren(...tiles.map((tile) => el("li", {}, tile)));
  // Ready to go at once; but a generation that the URL names has the stage.
  if (data.length && !state.image && isImageUsed()) await pickExample(data[0], tiles[0], Boolean(location.hash));
});

/** The first frame of the video on the stage: what to start from again when the input is not at hand any more. */
async function firstFrame() {
  const pane = state.panes.find((one) => one.hasSucceeded);
  if (!pane) throw new RequestError("The picture is not at hand any more: choose it again, then generate.");
  const { video } = pane;
  video.pause();
  await new Promise((resolve) => {
    video.addEventListener("seeked", resolve, { once: true });
    video.currentTime = 0;
  });
  const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], "first-frame.png", { type: "image/png" });
}

function fileFrom(transfer) {
  const [file] = transfer?.files ?? [];
  // The server judges what is in it; this only says which field it is meant for.
  const isVideo = $("image-field").hidden || (!$("video-field").hidden && file?.type.startsWith("video/"));
  if (file && !$("work").hidden) (isVideo ? setVideo : setImage)(file);
  return Boolean(file);
}

// --- the stage -------------------------------------------------------------------------------------------------------

const shownGenerations = () => state.panes.map((pane) => pane.generation).filter(Boolean);

/** Clear the stage for so many. */
function setPanes(count) {
  const held = $("panes").contains(document.activeElement);
  state.duet?.close();
  state.duet = null;
  for (const pane of state.panes) pane.close();
  state.panes = Array.from({ length: count }, () => new Pane({ onChange: paneChanged, onError: followError }));
  $("panes").replaceChildren(...state.panes.map((pane) => pane.root));
  $("panes").dataset.count = count;
  if (held) $("stage-title").focus({ preventScroll: true }); // the focused button has gone: stay near it
}

/** Back to composing. What was on the stage is one step back, unless it is gone. */
function showStill({ gone = false } = {}) {
  if (location.hash) history[gone ? "replaceState" : "pushState"](null, "", location.pathname);
  setPanes(1);
  const [pane] = state.panes;
  const card = cardOf($("model").value) ?? state.models[0];
  if (card) pane.setLabel("", "", card.video);
  const lead = isImageUsed() ? "This picture is where the video starts. Say what happens next."
    : state.video ? "The video is made anew from this one. Say what it is to show." : "Say what the video is to show.";
  setText($("still-lead"), lead);
  setText($("crop"), "");
  if (!isImageUsed()) pane.setStill(null, state.video?.name ?? "");
  else pane.setStill(state.image, "Drop an image here", (width, height) => describeImage(width, height, card));
  drawStage();
}

function describeImage(width, height, card) {
  const { name } = state.image;
  if (width === null) return setText($("crop"), `${name} cannot be shown here.`); // the server is asked all the same
  const { width: w, height: h } = card?.video ?? { width, height };
  const cropped = width * h === height * w ? "" : " The middle of it is used.";
  setText($("crop"), `${name}, ${width} × ${height}.${cropped}`);
}

/** Show generations, one or two, as they are now and as they go on. */
function watch(generations) {
  setPanes(generations.length);
  generations.forEach((generation, index) => watchIn(state.panes[index], generation, generations.length > 1));
  $("panes").scrollIntoView({ block: "nearest", behavior: lessMotion.matches ? "auto" : "smooth" });
}

function watchIn(pane, generation, isOneOfTwo) {
  const name = modelOf(generation);
  const card = cardOf(name);
  pane.setLabel(isOneOfTwo ? name : "", card ? details(card) : "", card?.video);
  pane.setStill(generation.source === "video" ? null : state.given.get(generation.id));
  pane.watch(generation);
}

const underWay = new WeakSet(); // panes

function paneChanged(pane) {
  drawStage();
  if (pane.isActive) underWay.add(pane);
  else if (underWay.delete(pane)) refreshGallery();
}

function followError(error) {
  if (error.status === 404) showStill({ gone: true });
  report(error);
}

/** Everything about the stage that is not in its panes. */
function drawStage() {
  const held = document.activeElement?.closest(".result") ? document.activeElement : null;
  const { panes } = state;
  const isShown = panes.some((pane) => pane.generation || pane.refusal);
  $("still-panel").hidden = isShown;
  $("shown-panel").hidden = !isShown;
  if (isShown) drawShown(panes);
  drawPlayer(panes);
  drawGenerate();
  drawCode();
  gallery.mark();
  if (held && !held.checkVisibility()) $("stage-title").focus({ preventScroll: true });
}

function drawShown(panes) {
  const active = panes.some((pane) => pane.isActive);
  const successes = panes.filter((pane) => pane.hasSucceeded);
  const [generation] = shownGenerations();
  $("shown-panel").dataset.active = active;
  setText($("shown-prompt"), generation?.prompt ?? prompt.text);
  drawFacts(panes, active);
  drawVerdict(panes);
  drawCharts(active ? [] : panes);
  $("again").hidden = active || !successes.length;
  $("retry").hidden = active || successes.length === panes.length || generation?.status === "expired";
  $("keep").hidden = active || !generation;
  $("edit").hidden = active || successes.length === panes.length;
  $("download").hidden = panes.length > 1 || !successes.length;
  if (successes.length) {
    $("download").href = here(successes[0].generation.video_url);
    $("download").download = `${successes[0].generation.id}.mp4`;
  }
}

function drawFacts(panes, active) {
  const [generation] = shownGenerations();
  $("facts").hidden = active || !generation;
  if ($("facts").hidden) return;
  const { seed, status, created_at, finished_at, expires_at } = generation;
  const facts = { Seed: seed };
  if (panes.length === 1) {
    const name = modelOf(generation);
    const card = cardOf(name);
    facts.Model = card ? `${name}, ${details(card)}` : name;
    const first = generation.first_step;
    if (first !== null && card) facts["From a video"] = `steps ${first + 1} to ${card.num_inference_steps}`;
    if (status === "succeeded") facts.Took = seconds((new Date(finished_at) - new Date(created_at)) / 1000);
  }
  const until = new Date(expires_at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  if (status === "succeeded") facts["Kept until"] = until;
  $("facts").replaceChildren(...Object.entries(facts).map(([name, value]) => fact(name, value)));
}

/** How much longer one took than the other, said of these two runs and no more. */
function drawVerdict(panes) {
  const runs = panes.map(({ generation, manifest }) => ({ name: generation && modelOf(generation), ...manifest }));
  const times = runs.map(({ timings_s }) => timings_s?.denoising).filter(Boolean);
  $("verdict").hidden = times.length < 2;
  if (times.length < 2) return;
  const [fast, slow] = times[0] <= times[1] ? runs : [runs[1], runs[0]];
  const [least, most] = [Math.min(...times), Math.max(...times)];
  const ratio = most / least;
  const figure = ratio >= 10 ? Math.round(ratio) : ratio.toFixed(1);
  const engines = [...new Set([slow.engine, fast.engine].filter(Boolean))].join(" and ");
  $("verdict").replaceChildren(
    el("strong", {}, `${figure} ×`),
    el("span", {}, ` as long in denoising: ${slow.name} took ${seconds(most)}, ${fast.name} ${seconds(least)}. `),
    el("small", {}, `One run of each${engines ? ` on ${engines}` : ""}, as busy as this machine was then; no benchmark.`),
  );
}

/** For each video a bar cut in proportion to its phases, on one scale, and the seconds in words. */
function drawCharts(panes) {
  const charts = panes.filter((pane) => pane.hasSucceeded && pane.manifest?.timings_s);
  const total = ({ manifest }) => Object.values(manifest.timings_s).reduce((sum, value) => sum + value, 0);
  const longest = Math.max(...charts.map(total));
  $("charts").replaceChildren(...charts.map((pane) => chart(pane, total(pane) / longest, panes.length > 1)));
}

function chart({ generation, manifest: { timings_s: timings } }, share, isOneOfTwo) {
  const phases = PHASES.filter((name) => timings[name] > 0);
  const bar = el("div", { className: "bar", "aria-hidden": "true" }, ...phases.map((name) => {
    const piece = el("span", { className: name });
    piece.style.flexGrow = timings[name];
    return piece;
  }));
  bar.style.width = `${100 * share}%`;
  const words = el("dl", { className: "timings" }, ...phases.map((name) => fact(name, seconds(timings[name]), name)));
  const title = isOneOfTwo ? modelOf(generation) : "Seconds in each phase";
  return el("section", { className: "chart" }, el("h3", { className: isOneOfTwo ? "quiet" : "unseen" }, title), bar, words);
}

function drawPlayer(panes) {
  const isPair = panes.length > 1 && panes.every((pane) => pane.hasSucceeded);
  $("player").hidden = !isPair;
  if (!isPair || state.duet) return;
  const controls = { button: $("play"), slider: $("position"), clock: $("clock") };
  state.duet = new Duet(panes.map(({ video }) => video), controls);
}

// --- the request as code ---------------------------------------------------------------------------------------------

/** What is on the stage as a request; while composing, what would be sent. */
function currentAsk() {
  const [generation] = shownGenerations();
  const rest = { origin: location.origin, hasKey: Boolean(key.value) };
  if (!generation) {
    const seed = $("seed").value.trim();
    const [card] = chosenCards();
    const file = takes(card, "image") ? state.image?.name ?? "image.png" : state.video?.name;
    const source = takes(card, "image") ? "image" : state.video ? "video" : "none";
    const of = { source, file, strength: source === "video" ? strength() : null };
    return { ...of, prompt: prompt.text, seed: seed && /^\d+$/.test(seed) ? seed : null, models: chosenModels(), ...rest };
  }
  const { id, metadata, prompt: sentence, seed, source, strength: asked } = generation;
  const file = state.given.get(id)?.name ?? metadata[source] ?? { image: "image.png", video: "video.mp4" }[source];
  return { source, file, strength: asked, prompt: sentence, seed, models: shownGenerations().map(modelOf), ...rest };
}

const language = () => $("code").querySelector("input:checked").value;

function drawCode() {
  const ask = currentAsk();
  setText($("snippet"), snippets[language()](ask));
  const keyHelp = ask.hasKey ? " The key is taken from the variable FASTLIGHTGEN_KEY." : "";
  const beside = ask.file ? ` beside ${ask.file}` : "";
  const help = {
    curl: `Run it${beside}. The answer is the job; its video_url is the video.`,
    python: `Run it${beside}, with httpx installed. It waits, and keeps the video beside itself.`,
  };
  setText($("code-help"), help[language()] + keyHelp);
}

async function copyCode() {
  const { textContent } = $("snippet");
  try {
    await navigator.clipboard.writeText(textContent);
  } catch {
    getSelection().selectAllChildren($("snippet")); // the clipboard is only there on https and localhost
    setText($("code-help"), "This browser lets no page on http copy: the code is selected, so copy it yourself.");
    return;
  }
  setText($("copy"), "Copied");
  say("The code is on the clipboard.");
  setTimeout(() => setText($("copy"), "Copy"), 1_500);
}

// --- a request -------------------------------------------------------------------------------------------------------

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

async function generate() {
  if ($("generate").ariaDisabled === "true") return;
  warn("");
  setText($("refused"), "");
  for (const name of FIELDS) fieldError(name, null);
  const models = chosenModels();
  const ask = { image: state.image, video: state.video, strength: strength(), prompt: prompt.text, seed: $("seed").value.trim(), model: models[0] };
  if (models.length > 1 && !ask.seed) ask.seed = randomSeed(); // of both
  state.isSending = true;
  drawGenerate();
  try {
    const first = await submit(ask);
    history.pushState(null, "", `#${first.id}`);
    if (models.length > 1) await generateBeside(first, { ...ask, model: models[1] });
    else watch([first]);
    refreshGallery();
  } catch (error) {
    refused(error);
  } finally {
    state.isSending = false;
    drawGenerate();
  }
}

/** Ask the second model the same. When it is refused, the first one goes on alone beside what the server said. */
async function generateBeside(first, ask) {
  setPanes(2);
  const [one, two] = state.panes;
  two.setLabel(ask.model, details(cardOf(ask.model)), cardOf(ask.model).video);
  two.setStill(takes(cardOf(ask.model), "image") ? ask.image : null);
  two.showSending();
  watchIn(one, first, true);
  try {
    const second = await submit({ ...ask, seed: first.seed, beside: first.id });
    if (state.panes[1] !== two) return; // the person has gone on meanwhile
    history.replaceState(null, "", `#${first.id}+${second.id}`);
    watchIn(two, second, true);
  } catch (error) {
    if (!(error instanceof RequestError)) throw error;
    two.showRefused(error);
    if (error.retryAfter) waitToRetry(error);
  }
}

async function submit({ image, video, strength: much, prompt: sentence, seed, model, beside }) {
  const form = new FormData();
  const card = cardOf(model) ?? state.models[0];
  const name = takes(card, "video") ? "video" : "image";
  const file = name === "video" ? video : image;
  if (file) form.append(name, file, file.name);
  if (file && name === "video") form.append("strength", much);
  form.append("prompt", sentence);
  if (seed !== "") form.append("seed", seed);
  if (model) form.append("model", model);
  // For whoever opens it later: the code names the file, and the gallery knows what belongs together.
  const notes = { ...(file && file.name.length <= MAX_NAME && { [name]: file.name }), ...(beside && { beside }) };
  form.append("metadata", JSON.stringify(notes));
  const generation = await request("/generate", { method: "POST", body: form });
  if (file) state.given.set(generation.id, file);
  if (model) state.asked.set(generation.id, model);
  return generation;
}

/** Say why the server did not take a request: beside the field it is about, else beside the button. */
function refused(error) {
  if (!(error instanceof RequestError)) throw error;
  if (error.isLocked) return;
  if (error.status === 503) watchReadiness();
  if (fieldError(error.param, error.message)) return $(error.param).focus();
  setText($("refused"), error.message);
  if (error.retryAfter) waitToRetry(error);
}

let waitTimer;

/** The button counts down to when the server wants to be asked again. */
function waitToRetry({ message, retryAfter }) {
  setText($("refused"), message);
  state.waitUntil = performance.now() + 1000 * retryAfter;
  clearInterval(waitTimer);
  waitTimer = setInterval(() => {
    drawGenerate();
    if (performance.now() < state.waitUntil) return;
    clearInterval(waitTimer);
    setText($("refused"), "");
    say("You can try again now.");
  }, 250);
  drawGenerate();
}

function drawGenerate() {
  const left = Math.ceil((state.waitUntil - performance.now()) / 1000);
  const text = left > 0 ? `Try again in ${left} s` : state.isSending ? "Sending" : "Generate";
  setText($("generate-text"), text);
  // Not `disabled`: that would throw the keyboard out.
  $("generate").ariaDisabled = left > 0 || state.isSending || state.panes.some((pane) => pane.isActive);
}

/** Put the server's sentence beside the field it is about (null takes it away). False when there is no such field. */
function fieldError(name, message) {
  const place = FIELDS.includes(name) && $(`${name}-error`);
  if (!place) return false;
  setText(place, message ?? "");
  place.hidden = !message;
  $(name).setAttribute("aria-invalid", Boolean(message));
  return true;
}

/** Put what is on the stage back into the form. */
function restore() {
  const generations = shownGenerations();
  if (!generations.length) return;
  const [{ id, prompt: sentence, seed, source, strength: much }] = generations;
  setModels(state.panes.map(({ generation }) => (generation ? modelOf(generation) : $("other").value)));
  prompt.text = sentence;
  $("seed").value = seed;
  const file = state.given.get(id);
  if (source === "image" && file && file !== state.image) setImage(file, null, true);
  if (source === "video" && file) state.video = file;
  if (source === "video") setStrength(much, chosenCards().find((card) => takes(card, "video"))?.sigmas ?? []);
  if (source === "none") state.video = null;
  drawVideo();
}

/** Once more, from the same picture or video. */
const repeat = attempt(async ({ keepSeed }) => {
  const [generation] = shownGenerations();
  restore();
  if (!keepSeed) $("seed").value = "";
  const isAtHand = !generation || generation.source === "none" || state.given.has(generation.id);
  if (!isAtHand && generation.source === "video") {
    throw new RequestError("The video that it was made from is not at hand any more: choose it again, then generate.");
  }
  if (!isAtHand) setImage(await firstFrame(), null, true);
  await generate();
});

function keepSeed() {
  $("seed").value = shownGenerations()[0].seed;
  fieldError("seed", null);
  flash($("seed"));
  say("The next one uses this seed too.");
}

function drawSeed() {
  $("seed").value = randomSeed();
  fieldError("seed", null);
  drawCode();
  say(`Seed ${$("seed").value}`);
}

/** Show where something has come to be. */
function flash(node) {
  node.classList.remove("flash");
  requestAnimationFrame(() => node.classList.add("flash"));
}

async function remove(generation) {
  if (!confirm(`Delete “${generation.prompt}” and its video?`)) return false;
  try {
    await request(`/generate/${generation.id}`, { method: "DELETE" });
    if (shownGenerations().some(({ id }) => id === generation.id)) showStill({ gone: true });
    await gallery.refresh();
    return true;
  } catch (error) {
    report(error);
    return false;
  }
}

// --- readiness -------------------------------------------------------------------------------------------------------

let readyTimer;

/** Say what is missing while the service is not ready, and look again. Other models may be serving by then. */
async function watchReadiness() {
  clearTimeout(readyTimer);
  const answer = await fetch("/readyz").then((response) => response.json()).catch(() => null);
  const ready = answer?.status === "ready";
  const causes = answer?.causes?.join("; ") ?? "the server does not answer";
  const text = ready ? "" : `Not ready yet: ${causes}. This page keeps looking.`;
  const recovered = ready && !$("banner").hidden;
  $("banner").hidden = ready;
  setText($("banner"), text);
  if ($("lock").hidden) {
    if (recovered) {
      warn("");
      drawExamples();
      refreshGallery();
      if (!shownGenerations().length) attempt(openFromUrl)();
    }
    if (answer) await loadModels().catch(() => {});
  }
  clearTimeout(readyTimer);
  readyTimer = setTimeout(watchReadiness, ready ? READY_POLL_MS.ready : READY_POLL_MS.notReady);
}

// --- start -----------------------------------------------------------------------------------------------------------

const idsInUrl = () => location.hash.slice(1).split("+").filter((id) => id.startsWith("vid_")).slice(0, 2);

/** Show what the URL names. */
async function openFromUrl() {
  showPart();
  if (isAdminUrl()) return admin.open();
  const ids = idsInUrl();
  if (!ids.length) return showStill();
  if (ids.join() === shownGenerations().map(({ id }) => id).join()) return;
  const answers = await Promise.allSettled(ids.map((id) => request(`/generate/${id}`)));
  if (ids.join() !== idsInUrl().join()) return; // the person has gone on meanwhile
  const found = answers.filter(({ status }) => status === "fulfilled").map(({ value }) => value);
  const errors = answers.filter(({ status }) => status === "rejected").map(({ reason }) => reason);
  if (found.length) {
    history.replaceState(null, "", `#${found.map(({ id }) => id).join("+")}`);
    watch(found);
    if (found.length > 1) setModels(found.map(modelOf));
  } else if (errors[0].status === 404) showStill({ gone: true });
  if (errors.length) report(errors[0]);
}

function listenToForm() {
  $("form").onsubmit = (event) => {
    event.preventDefault();
    generate();
  };
  $("lock").onsubmit = (event) => {
    event.preventDefault();
    useKey();
  };
  $("forget").onclick = forgetKey;
  $("model").onchange = () => modelChanged($("model"));
  $("other").onchange = () => modelChanged($("other"));
  $("compare").onchange = () => modelChanged();
  $("seed").oninput = () => {
    fieldError("seed", null);
    drawCode();
  };
  $("die").onclick = drawSeed;
  $("image").onclick = () => ($("image").value = ""); // so that the same file can be chosen again
  $("image").onchange = () => $("image").files.length && setImage($("image").files[0]);
  $("video").onclick = () => ($("video").value = "");
  $("video").onchange = () => $("video").files.length && setVideo($("video").files[0]);
  $("no-video").onclick = () => {
    setVideo(null);
    $("video").focus();
  };
  $("strength").oninput = () => {
    fieldError("strength", null);
    drawVideo();
    drawCode();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("work").hidden) generate();
  });
}

function listenToStage() {
  $("again").onclick = () => repeat({ keepSeed: false });
  $("retry").onclick = () => repeat({ keepSeed: true });
  $("keep").onclick = keepSeed;
  $("edit").onclick = () => {
    restore();
    showStill();
  };
  $("copy").onclick = copyCode;
  for (const radio of $("code").querySelectorAll("input")) radio.onchange = drawCode;
}

/** Anywhere on the page: a file that misses the zone must not replace the page. */
function listenToFiles() {
  document.ondragover = (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  };
  document.ondragleave = (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  };
  document.ondrop = (event) => {
    document.body.classList.remove("dragging");
    if (fileFrom(event.dataTransfer)) event.preventDefault();
  };
  document.onpaste = (event) => {
    if (fileFrom(event.clipboardData)) event.preventDefault();
  };
}

function listen() {
  const forget = () => {
    warn("");
    if (performance.now() >= state.waitUntil) setText($("refused"), "");
  };
  for (const type of ["click", "input", "drop", "paste"]) document.addEventListener(type, forget, true);
  listenToForm();
  listenToStage();
  listenToFiles();
  onLocked(lock);
  window.onhashchange = attempt(openFromUrl);
  // A page that comes back out of the browser's memory has no connection any more.
  window.onpageshow = ({ persisted }) => persisted && location.reload();
  $("generate").querySelector("kbd").textContent = navigator.platform.startsWith("Mac") ? "⌘ ↵" : "Ctrl ↵";
}

/** With what the service says, once it may be asked. */
const begin = attempt(async () => {
  await attempt(loadModels)();
  if (!$("lock").hidden) return;
  setLocked(false);
  refreshGallery();
  drawExamples();
  if (!isAdminUrl()) attempt(() => admin.knock())();
  await openFromUrl();
});

listen();
showPart();
begin().finally(watchReadiness);
