// One generation on the stage: its picture, its progress as it comes, and its video or how else it ended.

import { RequestError, follow, here, request } from "./api.js";
import { $, capital, el, lessMotion, say, seconds, setText } from "./dom.js";

export const PHASES = ["queued", "encoding", "denoising", "decoding", "saving"];
const ENDED = ["succeeded", "failed", "cancelled", "expired"];
const TICK_MS = 200;
const TITLES = {
  failed: "This one did not work out",
  cancelled: "Cancelled",
  expired: "No longer kept",
  refused: "Not accepted",
};

export const isActive = (generation) => Boolean(generation) && !ENDED.includes(generation.status);

/** Seconds left as they are shown: they follow what the server says, but never go up. */
export class Countdown {
  #shown = null;
  #said = null;
  #at = 0;

  /** The server expects so many from now (`now` in ms). */
  hear(left, now = performance.now()) {
    this.left(now);
    this.#said = left;
    this.#shown ??= left;
    this.#at = now;
  }

  /** Null while nothing has been heard. */
  left(now = performance.now()) {
    if (this.#said === null) return null;
    const passed = Math.max(0, (now - this.#at) / 1000);
    const said = Math.max(0, this.#said - passed);
    const surplus = this.#shown - this.#said;
    // Too much is worn off within a second or two; too little goes slower, so that both are at nothing together.
    if (surplus > 0) this.#shown = said + surplus * Math.exp(-2 * passed);
    else if (this.#said > 0) this.#shown *= said / this.#said;
    [this.#said, this.#at] = [said, now];
    return this.#shown;
  }
}

export class Pane {
  generation = null;
  manifest = null;
  refusal = null; // RequestError, where the server did not take the request
  #parts = {};
  #name = ""; // what screen readers are told it is, where there are two
  #still = null; // address of the picture
  #countdown = new Countdown();
  #firstSeen = null; // {at, progress} of the attempt
  #isUnwanted = false; // cancelled before the server has answered
  #leave = null; // AbortController of its events
  #timer = 0;
  #onChange;
  #onError;

  /** `onChange(pane)` is called after each news; `onError(error)` when its events cannot be followed. */
  constructor({ onChange, onError }) {
    this.root = $("pane").content.firstElementChild.cloneNode(true);
    for (const node of this.root.querySelectorAll("[class]")) this.#parts[[...node.classList].at(-1)] = node;
    this.#onChange = onChange;
    this.#onError = onError;
    const { video, cancel } = this.#parts;
    video.addEventListener("loadeddata", () => this.#videoIsThere());
    video.addEventListener("error", () => {
      if (video.hasAttribute("src")) this.#onError(new RequestError("The video could not be played."));
    });
    cancel.onclick = () => this.#cancel();
  }

  get video() {
    return this.#parts.video;
  }

  get screen() {
    return this.#parts.screen;
  }

  get isActive() {
    return this.root.dataset.mode === "sending" || isActive(this.generation);
  }

  get hasSucceeded() {
    return this.generation?.status === "succeeded";
  }

  /** Say which of two it is: a model's name, and its steps. Without a name it is the only one. */
  setLabel(name, details, { width, height } = {}) {
    const { label, cancel, video, noise } = this.#parts;
    label.hidden = !name;
    label.replaceChildren(name, " ", el("span", {}, details));
    if (width) this.root.style.setProperty("--ratio", width / height);
    if (width) noise.height = Math.round((noise.width * height) / width);
    this.#name = name;
    video.controls = !name; // two have one control
    cancel.ariaLabel = name ? `Cancel ${name}` : null;
    video.ariaLabel = name ? `The video of ${name}` : "The generated video";
    this.root.querySelector("progress").ariaLabel = name ? `Progress of ${name}` : "Progress of the generation";
  }

  /** Take it from the stage. */
  close() {
    this.#stop();
    clearInterval(this.#timer);
    this.video.removeAttribute("src");
    if (this.#still) URL.revokeObjectURL(this.#still);
    this.root.remove();
  }

  // --- what is to be seen ---

  /** Show `file` as the picture; without one the screen is dark and says `otherwise`. `onSize(width, height)` may follow. */
  setStill(file, otherwise = "", onSize = () => {}) {
    const { still, empty, glow } = this.#parts;
    if (this.#still) URL.revokeObjectURL(this.#still);
    this.#still = file ? URL.createObjectURL(file) : null;
    still.hidden = true;
    empty.hidden = false;
    empty.textContent = file?.name ?? otherwise;
    glow.getContext("2d").clearRect(0, 0, 16, 16);
    if (!file) return still.removeAttribute("src");
    still.onload = () => {
      if (!this.video.hidden && this.video.readyState > 1) return;
      still.hidden = false;
      empty.hidden = true;
      onSize(still.naturalWidth, still.naturalHeight);
      this.#glow(still);
    };
    still.onerror = () => onSize(null, null);
    still.src = this.#still;
  }

  /** The request is on its way. */
  showSending() {
    this.#setMode("sending");
    this.#drawProgress("queued", 0);
    setText(this.#parts.doing, "Sending");
  }

  /** The server did not take the request. */
  showRefused(error) {
    this.refusal = error;
    this.#showEnd("refused", error.message);
    this.#onChange(this);
  }

  /** Show a generation as it is now and as it goes on. */
  watch(generation) {
    this.#show(generation);
    if (!isActive(generation)) return;
    if (this.#isUnwanted) this.#cancel();
    this.#leave = new AbortController();
    const { signal } = this.#leave;
    const onEvent = (event, data) => {
      this.#parts.lost.hidden = true;
      if (event === "generation" && !signal.aborted) this.#show(JSON.parse(data));
      return !isActive(this.generation);
    };
    const onLost = () => {
      this.#parts.lost.hidden = false;
      this.#say("The connection was lost; trying again.");
    };
    follow(`/generate/${generation.id}/events`, { signal, onEvent, onLost }).catch(this.#onError);
  }

  #stop() {
    this.#leave?.abort();
    this.#leave = null;
  }

  #show(generation) {
    const before = this.generation;
    this.generation = generation;
    if (isActive(generation)) this.#showProgress(generation, before);
    else {
      this.#stop();
      if (generation.status === "succeeded") this.#showVideo(generation);
      else this.#showEnd(generation.status, endOf(generation));
    }
    this.#onChange(this);
  }

  #setMode(mode) {
    const { video, noise, running, ended, caption, lost } = this.#parts;
    this.root.dataset.mode = mode;
    running.hidden = !["sending", "running"].includes(mode);
    noise.hidden = running.hidden;
    ended.hidden = mode !== "ended";
    video.hidden = mode !== "done";
    caption.hidden = lost.hidden = true;
    clearInterval(this.#timer);
  }

  // --- under way ---

  #showProgress(generation, before) {
    const { status, phase, progress } = generation;
    // Its worker was lost: it starts again, and so does what is left.
    const again = before && before.status !== "queued" && status === "queued";
    if (again) this.#countdown = new Countdown();
    if (again) this.#firstSeen = null;
    const left = this.#expected(generation);
    if (left !== null) this.#countdown.hear(left);
    if (this.root.dataset.mode !== "running") this.#setMode("running");
    clearInterval(this.#timer);
    this.#timer = setInterval(() => this.#drawDoing(), TICK_MS);
    this.#drawProgress(status === "queued" ? "queued" : phase ?? "encoding", progress);
    this.#drawDoing();
    this.#parts.cancel.ariaDisabled = status === "cancelling";
    this.#say(again ? "It is queued again: its worker was lost." : this.#doing());
  }

  /** Seconds left as the server expects; where it has no experience yet, as the pace so far suggests. */
  #expected({ status, progress, eta_seconds: eta }) {
    if (eta !== null || status !== "running") return eta;
    const now = performance.now();
    this.#firstSeen ??= { at: now, progress };
    const done = progress - this.#firstSeen.progress;
    return done < 0.05 ? null : ((1 - progress) / done) * ((now - this.#firstSeen.at) / 1000);
  }

  #drawProgress(phase, progress) {
    const now = PHASES.indexOf(phase);
    this.root.querySelector("progress").value = progress;
    drawNoise(this.#parts.noise, 0.9 * (1 - progress));
    this.#parts.phases.replaceChildren(...PHASES.map((name, index) => {
      if (index === now) return el("li", { className: "now", "aria-current": "step" }, name);
      return el("li", { className: index < now ? "past" : "next" }, name);
    }));
  }

  #doing() {
    const { status, phase, queue_position: position } = this.generation;
    if (status === "cancelling") return "Cancelling at the next step";
    if (status !== "queued") return capital(phase ?? "encoding");
    if (!position) return "Queued";
    return position === 1 ? "Next in line" : `Number ${position} in line`;
  }

  #drawDoing() {
    const left = this.generation.status === "cancelling" ? null : this.#countdown.left();
    setText(this.#parts.doing, left === null ? this.#doing() : `${this.#doing()}, ${about(left)}`);
  }

  async #cancel() {
    const { cancel } = this.#parts;
    if (cancel.ariaDisabled === "true" && !this.#isUnwanted) return;
    cancel.ariaDisabled = true;
    this.#isUnwanted = !this.generation;
    if (this.#isUnwanted) return;
    try {
      const generation = await request(`/generate/${this.generation.id}/cancel`, { method: "POST" });
      // The events may have been faster, and have said more.
      if (isActive(this.generation)) this.#show(generation);
    } catch (error) {
      cancel.ariaDisabled = false;
      this.#onError(error);
    }
  }

  // --- over ---

  #showVideo(generation) {
    this.#setMode("done");
    const { video } = this.#parts;
    // People who asked for less motion start it themselves.
    video.autoplay = video.loop = !lessMotion.matches;
    video.src = here(generation.video_url);
    this.#say("The video is ready.");
    this.#loadManifest(generation);
  }

  async #loadManifest({ id, manifest_url }) {
    // Its link opens it, without the key, which is not for the store that it may lead to. Only figures would be missed.
    const response = await fetch(here(manifest_url)).catch(() => null);
    const manifest = response?.ok ? await response.json().catch(() => null) : null;
    if (this.generation.id !== id) return;
    this.manifest = manifest;
    this.#drawCaption();
    this.#onChange(this);
  }

  /** Beside another one: what it took, and the file. */
  #drawCaption() {
    const { caption } = this.#parts;
    const { id, started_at, finished_at, video_url } = this.generation;
    const { denoising } = this.manifest?.timings_s ?? {};
    const took = (new Date(finished_at) - new Date(started_at)) / 1000;
    const figures = [...(denoising ? [`denoising ${seconds(denoising)}`] : []), `${seconds(took)} in all`];
    const link = { href: here(video_url), download: `${id}.mp4`, "aria-label": `Download the video of ${this.#name}` };
    caption.replaceChildren(el("span", {}, figures.join(" · ")), " ", el("a", link, "Download"));
    caption.hidden = !this.#name;
  }

  #videoIsThere() {
    this.#parts.still.hidden = this.#parts.empty.hidden = true;
    this.#glowWithVideo();
  }

  #showEnd(status, text) {
    this.#setMode("ended");
    const { ended } = this.#parts;
    ended.dataset.status = status;
    setText(this.#parts["ended-title"], TITLES[status]);
    setText(this.#parts["ended-text"], text);
    this.#say(`${TITLES[status]}. ${text}`);
  }

  #say(text) {
    say(this.#name ? `${this.#name}: ${text}` : text);
  }

  // --- light ---

  /** Light the surroundings of the screen with what is on it. */
  #glow(source) {
    this.#parts.glow.getContext("2d").drawImage(source, 0, 0, 16, 16);
  }

  #glowWithVideo() {
    if (this.video.hidden || !this.root.isConnected) return;
    this.#glow(this.video);
    if (!lessMotion.matches) this.video.requestVideoFrameCallback?.(() => this.#glowWithVideo());
  }
}

/** Why there is no video: in the server's words where it has any. */
function endOf({ status, error, expires_at }) {
  if (error) return error.message;
  if (status === "cancelled") return "It was stopped before it was done; nothing of it was kept.";
  const day = new Date(expires_at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  return `Its files were removed on ${day}: this service keeps a video for a while only. Its sentence and seed are still known.`;
}

function about(left) {
  if (left < 0.1) return "any moment now";
  return left > 90 ? `about ${Math.ceil(left / 60)} min left` : `about ${Math.ceil(left)} s left`;
}

/** Noise over the picture that clears as the denoising does. */
function drawNoise(canvas, amount) {
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
