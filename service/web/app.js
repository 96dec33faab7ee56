// The playground: one person, one image, one sentence, one video at a time.
//
// The server is the only judge of what it accepts: nothing here refuses an input, and what the server says about one is
// shown as it said it. The URL's hash holds the id of the generation on the stage, so reload and "back" just work.

const PHASES = ["queued", "encoding", "denoising", "decoding", "saving"];
const ENDED = ["succeeded", "failed", "cancelled", "expired"];
const READY_POLL_MS = { ready: 20_000, notReady: 2_000 };
const GALLERY_POLL_MS = 3_000;
const RETRY_MS = 2_000;

const $ = (id) => document.getElementById(id);
const lessMotion = matchMedia("(prefers-reduced-motion: reduce)");

const state = {
  model: null, // what GET /models says of the model being served
  image: null, // File for the next request
  sentence: {}, // values of the last prompt that parsed, to fall back on when a chip meets half a sentence
  shown: null, // the generation on the stage
  events: null, // its EventSource
  images: new Map(), // generation id -> the File it was made from, for this visit
};

// --- small things ----------------------------------------------------------------------------------------------------

/** An element with properties; keys with a dash and `role` become attributes. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children);
  return node;
}

class RequestError extends Error {
  constructor(message, param = null, status = 0) {
    super(message);
    Object.assign(this, { param, status });
  }
}

/** JSON of a successful answer; everything else is a RequestError with the server's own sentence. */
async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new RequestError("The server does not answer. Is it still running?");
  }
  const body = await response.json().catch(() => null);
  if (response.ok) return body;
  const { message = `The server answered ${response.status} ${response.statusText}.`, param } = body?.error ?? {};
  throw new RequestError(message, param, response.status);
}

/** Run an action; what goes wrong is said in the alert area, and stays there until the person does the next thing. */
const attempt = (action) => async (...args) => {
  try {
    await action(...args);
  } catch (error) {
    if (!(error instanceof RequestError)) throw error;
    warn(error.message);
  }
};

function warn(text) {
  if ($("alert").textContent !== text) $("alert").textContent = text;
}

/** Told to screen readers; only whole events, never each percent. */
function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

/** The server may be reached under another name than the one it puts in its URLs: stay on the page's origin. */
function here(url) {
  const { pathname, search } = new URL(url, location.href);
  return pathname + search;
}

const seconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(1)} s`;

// --- the sentence and its chips (distill/prompt.py is the same grammar, and the one that decides) ---------------

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

function choose(name, choice) {
  const { grammar } = state.model.prompt;
  const { values, whole } = parse(grammar, $("prompt").value);
  const wanted = { ...(whole ? {} : state.sentence), ...values };
  if (choice) wanted[name] = choice;
  else delete wanted[name];
  setPrompt(compose(grammar, wanted, name));
}

function setPrompt(text) {
  $("prompt").value = text;
  promptChanged();
}

function promptChanged() {
  fieldError("prompt", null);
  const grammar = state.model?.prompt.grammar;
  if (!grammar) return;
  const { values, whole } = parse(grammar, $("prompt").value);
  if (whole) state.sentence = values;
  for (const group of $("chips").querySelectorAll("[role=radiogroup]")) {
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
}

function drawChips({ kind, grammar, examples }) {
  const free = kind === "free" || !grammar;
  $("chips").replaceChildren(...(free ? [exampleChips(examples)] : grammar.parts.map(partChips)));
}

function exampleChips(examples) {
  const chip = (text) => el("button", { type: "button", className: "chip", onclick: () => setPrompt(text) }, text);
  const choices = el("div", { className: "choices" }, ...examples.map(chip));
  return el("div", { className: "group", role: "group", "aria-label": "Sentences to start from" }, choices);
}

function partChips(part) {
  const id = `part-${part.name}`;
  const chips = (part.optional ? ["", ...part.choices] : part.choices).map((choice) => choiceChip(part.name, choice));
  return el("div", { className: "group", role: "radiogroup", "aria-labelledby": id, "data-part": part.name },
    el("span", { id, className: "part" }, part.name),
    el("div", { className: "choices" }, ...chips, el("p", { className: "reason" })));
}

function choiceChip(name, choice) {
  const radio = el("input", { type: "radio", name: `part-${name}`, value: choice });
  radio.onchange = () => choose(name, choice);
  const chip = el("label", { className: choice ? "chip" : "chip open" }, radio, choice || "leave open");
  if (CSS.supports("color", choice)) {
    const dot = el("i", { className: "dot" });
    dot.style.background = choice;
    radio.after(dot);
  }
  return chip;
}

// --- the image -------------------------------------------------------------------------------------------------------

/** Take `file` as the first frame. `tile` is the example it came from, if any. The stage shows it if it is free. */
function setImage(file, tile = null, stageInUse = isActive(state.shown)) {
  state.image = file;
  fieldError("image", null);
  for (const button of $("examples").querySelectorAll("button")) button.setAttribute("aria-pressed", button === tile);
  $("drop").classList.toggle("chosen", !tile);
  $("drop").querySelector("b").textContent = tile ? "Your image" : file.name;
  if (!stageInUse) showStill();
}

const pickExample = attempt(async ({ image_url, prompt }, tile, stageInUse) => {
  setPrompt(prompt);
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
  if (data.length && !state.image) await pickExample(data[0], tiles[0], Boolean(location.hash));
});

/** The first frame of the video on the stage: what to start from again when the input is not at hand any more. */
async function firstFrame() {
  const video = $("video");
  video.pause();
  await new Promise((resolve) => {
    video.onseeked = resolve;
    video.currentTime = 0;
  });
  const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new File([blob], "first-frame.png", { type: "image/png" });
}

function fileFrom(transfer) {
  const [file] = transfer?.files ?? [];
  if (file) setImage(file);
  return Boolean(file);
}

// --- the stage -------------------------------------------------------------------------------------------------------

function setMode(mode) {
  const held = document.activeElement?.closest(".panel");
  for (const panel of document.querySelectorAll(".panel")) panel.hidden = panel.dataset.mode !== mode;
  if (held?.hidden) $("stage-title").focus({ preventScroll: true }); // the focused button has gone: stay near it
  $("video").hidden = mode !== "done";
  $("noise").hidden = mode !== "running";
  $("generate").ariaDisabled = mode === "running"; // not `disabled`: that would throw the keyboard out
  if (mode !== "done") $("video").removeAttribute("src");
}

/** Show `file` as the picture on the stage; without one the screen is dark and says `otherwise`. */
function setStill(file, otherwise = "") {
  const still = $("still");
  if (still.src) URL.revokeObjectURL(still.src);
  still.hidden = true;
  $("empty").hidden = false;
  $("empty").textContent = file?.name ?? otherwise;
  $("glow").getContext("2d").clearRect(0, 0, 16, 16);
  if (!file) return still.removeAttribute("src");
  still.onload = () => {
    still.hidden = false;
    $("empty").hidden = true;
    const { naturalWidth: width, naturalHeight: height } = still;
    const { width: w, height: h } = state.model?.video ?? { width, height };
    const cropped = width * h === height * w ? "" : " The middle of it is used.";
    $("crop").textContent = `${file.name}, ${width} × ${height}.${cropped}`;
    glow(still);
  };
  // Not a picture as far as this browser knows; the server is asked all the same.
  still.onerror = () => {
    $("crop").textContent = `${file.name} cannot be shown here.`;
  };
  still.src = URL.createObjectURL(file);
}

/** Back to composing. What was on the stage is one step back, unless it is gone. */
function showStill({ gone = false } = {}) {
  leave();
  state.shown = null;
  if (location.hash) history[gone ? "replaceState" : "pushState"](null, "", location.pathname);
  setMode("still");
  setStill(state.image, "Drop an image here");
  markGallery();
}

/** Light the surroundings of the stage with what is on it. */
function glow(source) {
  $("glow").getContext("2d").drawImage(source, 0, 0, 16, 16);
}

function glowWithVideo() {
  const video = $("video");
  if (video.hidden) return;
  glow(video);
  if (!lessMotion.matches) video.requestVideoFrameCallback?.(glowWithVideo);
}

/** Noise over the picture that clears as the denoising does. */
function drawNoise(amount) {
  const canvas = $("noise");
  canvas.style.opacity = amount;
  if (lessMotion.matches && canvas.dataset.drawn) return;
  canvas.dataset.drawn = "yes";
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const grey = 200 * Math.random();
    for (let channel = 0; channel < 3; channel++) pixels.data[i + channel] = grey + 56 * Math.random();
    pixels.data[i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}

// --- a generation ----------------------------------------------------------------------------------------------------

const isActive = (generation) => Boolean(generation) && !ENDED.includes(generation.status);

const generate = attempt(async () => {
  if ($("generate").ariaDisabled === "true") return;
  $("generate").ariaDisabled = true;
  warn("");
  for (const name of ["image", "prompt", "seed"]) fieldError(name, null);
  const form = new FormData();
  if (state.image) form.append("image", state.image, state.image.name);
  form.append("prompt", $("prompt").value);
  if ($("seed").value.trim()) form.append("seed", $("seed").value.trim());
  const { image } = state;
  try {
    const generation = await request("/generate", { method: "POST", body: form });
    state.images.set(generation.id, image);
    history.pushState(null, "", `#${generation.id}`);
    watch(generation);
    refreshGallery();
  } catch (error) {
    if (error.status === 503) watchReadiness();
    if (!fieldError(error.param, error.message)) throw error;
    $(error.param).focus();
  } finally {
    $("generate").ariaDisabled = isActive(state.shown);
  }
});

/** Put the server's sentence beside the field it is about (null takes it away). False when there is no such field. */
function fieldError(name, message) {
  const place = name && $(`${name}-error`);
  if (!place) return false;
  place.textContent = message ?? "";
  place.hidden = !message;
  $(name).setAttribute("aria-invalid", Boolean(message));
  if (message && name === "seed") $("options").open = true;
  return true;
}

/** Show the generation of this id, as it is now and as it goes on. */
const openGeneration = attempt(async (id) => {
  try {
    const generation = await request(`/generate/${id}`);
    if (location.hash === `#${id}`) watch(generation); // else the person has gone on meanwhile
  } catch (error) {
    if (error.status === 404) showStill({ gone: true });
    throw error;
  }
});

function leave() {
  state.events?.close();
  state.events = null;
}

function watch(generation) {
  leave();
  setStill(state.images.get(generation.id));
  show(generation);
  $("screen").scrollIntoView({ block: "nearest", behavior: lessMotion.matches ? "auto" : "smooth" });
  if (!isActive(generation)) return;
  const events = new EventSource(`/generate/${generation.id}/events`);
  state.events = events;
  events.addEventListener("generation", ({ data }) => {
    show(JSON.parse(data));
    if (isActive(state.shown)) return;
    leave();
    refreshGallery();
  });
  // It reconnects by itself after a broken connection, but not after an answer that is no stream: then start anew.
  const retry = async () => {
    if (state.events === events) await openGeneration(generation.id);
    if (state.events === events) setTimeout(retry, RETRY_MS);
  };
  events.onerror = () => {
    say("Connection lost, trying again.");
    if (events.readyState === EventSource.CLOSED) setTimeout(retry, RETRY_MS);
  };
}

function show(generation) {
  state.shown = generation;
  markGallery();
  if (isActive(generation)) showProgress(generation);
  else if (generation.status === "succeeded") showVideo(generation);
  else showEnd(generation);
}

function showProgress({ status, phase, progress, prompt, queue_position, eta_seconds }) {
  setMode("running");
  const current = status === "queued" ? "queued" : phase ?? "encoding";
  const position = status === "queued" && queue_position ? `Queued, number ${queue_position} in line` : null;
  const what = status === "cancelling" ? "Cancelling" : position ?? current[0].toUpperCase() + current.slice(1);
  say(what);
  const left = eta_seconds ? `, about ${Math.ceil(eta_seconds)} s left` : "";
  $("progress-text").textContent = status === "cancelling" ? "Cancelling at the next step" : what + left;
  $("running-prompt").textContent = prompt;
  $("progress").value = progress;
  $("cancel").ariaDisabled = status === "cancelling";
  drawNoise(0.9 * (1 - progress));
  const now = PHASES.indexOf(current);
  $("phases").replaceChildren(...PHASES.map((name, index) => {
    if (index === now) return el("li", { className: "now", "aria-current": "step" }, name);
    return el("li", { className: index < now ? "past" : "next" }, name);
  }));
}

/** One `dt`, `dd` pair of a list of facts. */
const fact = (name, value, className = "") => el("div", { className }, el("dt", {}, name), el("dd", {}, String(value)));


function showVideo(generation) {
  setMode("done");
  const video = $("video");
  // People who asked for less motion start it themselves.
  video.autoplay = video.loop = !lessMotion.matches;
  video.src = here(generation.video_url);
  $("done-prompt").textContent = generation.prompt;
  $("download").href = here(generation.video_url);
  $("download").download = `${generation.id}.mp4`;
  $("bar").replaceChildren();
  $("timings").replaceChildren();
  showFacts(generation);
  showTimings(generation);
  say("The video is ready.");
}

function showFacts({ seed, model, created_at, finished_at, expires_at }) {
  const took = (new Date(finished_at) - new Date(created_at)) / 1000;
  const until = new Date(expires_at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const facts = { Seed: seed, Model: model, Took: seconds(took), "Kept until": until };
  $("facts").replaceChildren(...Object.entries(facts).map(([name, value]) => fact(name, value)));
}

/** A bar cut in proportion to the phases, and their seconds in words. */
async function showTimings({ id, manifest_url }) {
  const { timings_s } = await request(here(manifest_url)).catch(() => ({}));
  if (!timings_s || state.shown?.id !== id) return;
  const phases = PHASES.filter((name) => timings_s[name] > 0);
  $("bar").replaceChildren(...phases.map((name) => {
    const piece = el("span", { className: name });
    piece.style.flexGrow = timings_s[name];
    return piece;
  }));
  $("timings").replaceChildren(...phases.map((name) => fact(name, seconds(timings_s[name]), name)));
}

function showEnd({ status, error, prompt }) {
  setMode("ended");
  const titles = { failed: "This one did not work out", cancelled: "Cancelled", expired: "No longer kept" };
  $("ended-title").textContent = titles[status];
  $("ended-text").textContent = error?.message ?? prompt;
  say(`${titles[status]}. ${error?.message ?? ""}`);
}

const cancel = attempt(async () => {
  if ($("cancel").ariaDisabled === "true") return;
  const generation = await request(`/generate/${state.shown.id}/cancel`, { method: "POST" });
  // The stream may have been faster, and have said more.
  if (isActive(state.shown) && state.shown.id === generation.id) show(generation);
});

const again = attempt(async () => {
  const { id, prompt } = state.shown;
  const image = state.images.get(id) ?? (await firstFrame());
  $("seed").value = "";
  setPrompt(prompt);
  if (image !== state.image) setImage(image, null, true);
  await generate();
});

async function copyCurl() {
  const { id, prompt, seed } = state.shown;
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const fields = [`image=@${state.images.get(id)?.name ?? "image.png"}`, `prompt=${prompt}`, `seed=${seed}`];
  const form = fields.map((field) => `-F ${quote(field)}`).join(" ");
  const command = `curl ${form} -H 'Prefer: wait=60' ${location.origin}/generate`;
  try {
    await navigator.clipboard.writeText(command);
  } catch {
    window.prompt("Copy this command:", command); // the clipboard is only there on https and localhost
    return;
  }
  $("curl").textContent = "Copied";
  say("The curl command is on the clipboard.");
  setTimeout(() => ($("curl").textContent = "Copy curl"), 1_500);
}

// --- the gallery -----------------------------------------------------------------------------------------------------

let galleryTimer;

const refreshGallery = attempt(async () => {
  const { data } = await request("/generate?limit=24");
  const focused = document.activeElement?.closest("#gallery li")?.dataset.id;
  $("gallery").replaceChildren(...data.map(galleryItem));
  if (focused) $("gallery").querySelector(`[data-id=${focused}] a`)?.focus();
  $("gallery-empty").hidden = data.length > 0;
  markGallery();
  // The one on the stage reports by itself; others that are still under way are looked at now and then.
  clearTimeout(galleryTimer);
  const others = data.some((one) => isActive(one) && one.id !== state.shown?.id);
  if (others) galleryTimer = setTimeout(refreshGallery, GALLERY_POLL_MS);
});

function galleryItem(generation) {
  const { id, prompt, status, thumbnail_url } = generation;
  const picture = thumbnail_url ? el("img", { src: here(thumbnail_url), alt: "" }) : status;
  const frame = el("span", { className: "frame" }, picture);
  const link = el("a", { href: `#${id}` }, frame, el("span", { className: "name" }, prompt));
  const button = { type: "button", className: "remove", title: "Delete", "aria-label": `Delete: ${prompt}` };
  return el("li", { "data-id": id }, link, el("button", { ...button, onclick: () => removeItem(generation) }, "×"));
}

/** Mark the one on the stage. */
function markGallery() {
  for (const item of $("gallery").children) {
    const link = item.querySelector("a");
    if (item.dataset.id === state.shown?.id) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

const removeItem = attempt(async ({ id, prompt }) => {
  if (!confirm(`Delete “${prompt}” and its video?`)) return;
  await request(`/generate/${id}`, { method: "DELETE" });
  const index = [...$("gallery").children].findIndex((item) => item.dataset.id === id);
  if (state.shown?.id === id) showStill({ gone: true });
  await refreshGallery();
  // Keep the keyboard where it was.
  ($("gallery").children[index] ?? $("gallery").lastElementChild)?.querySelector("a").focus();
  say("Deleted.");
});

// --- readiness and the model -----------------------------------------------------------------------------------------

let readyTimer;

/** Say what is missing while the service is not ready, and look again. Another model may be serving by then. */
async function watchReadiness() {
  clearTimeout(readyTimer);
  const answer = await fetch("/readyz").then((response) => response.json()).catch(() => null);
  const ready = answer?.status === "ready";
  const causes = answer?.causes?.join("; ") ?? "the server does not answer";
  const text = ready ? "" : `Not ready yet: ${causes}. This page keeps looking.`;
  const recovered = ready && !$("banner").hidden;
  $("banner").hidden = ready;
  if ($("banner").textContent !== text) $("banner").textContent = text;
  if (recovered) {
    warn("");
    drawExamples();
    refreshGallery();
  }
  if (answer) await loadModel().catch(() => {});
  readyTimer = setTimeout(watchReadiness, ready ? READY_POLL_MS.ready : READY_POLL_MS.notReady);
}

async function loadModel() {
  const { data } = await request("/models");
  const [model] = data;
  if (!model || model.sha256 === state.model?.sha256) return;
  state.model = model;
  const { width, height, num_frames, fps } = model.video;
  const makes = `${width} × ${height} · ${seconds(num_frames / fps)}`;
  $("model").textContent = `${model.name} · ${model.num_inference_steps} steps · ${makes}`;
  document.documentElement.style.setProperty("--ratio", width / height);
  $("noise").height = Math.round(($("noise").width * height) / width);
  $("prompt-help").textContent = model.prompt.help;
  $("prompt").placeholder = model.prompt.examples[0] ?? "";
  drawChips(model.prompt);
  promptChanged();
}

// --- start -----------------------------------------------------------------------------------------------------------

function openFromUrl() {
  const id = location.hash.slice(1);
  if (!id.startsWith("vid_")) showStill();
  else if (id !== state.shown?.id) openGeneration(id);
}

function listen() {
  for (const type of ["click", "input", "drop", "paste"]) document.addEventListener(type, () => warn(""), true);
  $("form").onsubmit = (event) => {
    event.preventDefault();
    generate();
  };
  $("prompt").oninput = promptChanged;
  $("seed").oninput = () => fieldError("seed", null);
  $("image").onclick = () => ($("image").value = ""); // so that the same file can be chosen again
  $("image").onchange = () => fileFrom($("image"));
  $("cancel").onclick = cancel;
  $("again").onclick = again;
  $("curl").onclick = copyCurl;
  $("video").onloadeddata = () => {
    $("still").hidden = $("empty").hidden = true;
    glowWithVideo();
  };
  $("video").onerror = () => {
    if ($("video").hasAttribute("src")) warn("The video could not be played.");
  };
  document.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  };
  // Anywhere on the page: a file that misses the zone must not replace the page.
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
  window.onhashchange = openFromUrl;
  $("generate").querySelector("kbd").textContent = navigator.platform.startsWith("Mac") ? "⌘ ↵" : "Ctrl ↵";
}

listen();
watchReadiness();
drawExamples();
refreshGallery();
if (location.hash) openFromUrl();
