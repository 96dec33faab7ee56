// Two videos as one: the same start, the same end, one control.

import { lessMotion, setText } from "./dom.js";

const DRIFT_S = 0.06; // half a frame of what the small models make

export class Duet {
  #videos;
  #controls;
  #frame = 0;

  /** `controls`: {button, slider, clock}. The videos start as soon as both can, unless less motion is wanted. */
  constructor(videos, controls) {
    this.#videos = videos;
    this.#controls = controls;
    for (const video of videos) {
      video.loop = video.autoplay = false;
      video.onended = () => this.#again();
      video.oncanplay = () => this.#begin();
    }
    controls.button.onclick = () => this.toggle();
    controls.slider.oninput = () => this.seek(controls.slider.value * this.#length);
    this.#draw();
    this.#begin();
  }

  get isPlaying() {
    return this.#videos.some((video) => !video.paused && !video.ended);
  }

  /** Of the longer one, in seconds; the shorter waits at its end. */
  get #length() {
    return Math.max(...this.#videos.map((video) => video.duration || 0));
  }

  get #time() {
    return Math.max(...this.#videos.map((video) => video.currentTime));
  }

  toggle() {
    if (this.isPlaying) {
      for (const video of this.#videos) video.pause();
      this.seek(Math.min(...this.#videos.map((video) => video.currentTime)));
    } else if (this.#videos.every((video) => video.ended)) this.#restart();
    else this.#play();
    this.#draw();
  }

  seek(time) {
    for (const video of this.#videos) video.currentTime = Math.min(time, video.duration || 0);
    this.#draw();
  }

  close() {
    cancelAnimationFrame(this.#frame);
    for (const video of this.#videos) video.onended = video.oncanplay = null;
    this.#videos = [];
  }

  #begin() {
    if (!this.#videos.every((video) => video.readyState >= HTMLMediaElement.HAVE_FUTURE_DATA)) return;
    for (const video of this.#videos) video.oncanplay = null;
    if (lessMotion.matches) this.#draw();
    else this.#restart();
  }

  #again() {
    if (this.#videos.length && this.#videos.every((video) => video.ended)) this.#restart();
  }

  #restart() {
    for (const video of this.#videos) video.currentTime = 0;
    this.#play();
  }

  #play() {
    // Refused only where the browser lets nothing play by itself; then the button is there.
    for (const video of this.#videos) if (video.currentTime < video.duration) video.play().catch(() => {});
    cancelAnimationFrame(this.#frame);
    this.#follow();
  }

  #follow() {
    if (!this.#videos.length) return;
    const [first, second] = this.#videos;
    const both = this.#videos.every((video) => !video.paused && !video.ended && !video.seeking);
    if (both && Math.abs(first.currentTime - second.currentTime) > DRIFT_S) second.currentTime = first.currentTime;
    this.#draw();
    if (this.isPlaying) this.#frame = requestAnimationFrame(() => this.#follow());
  }

  #draw() {
    const { button, slider, clock } = this.#controls;
    const { isPlaying } = this;
    const time = `${this.#time.toFixed(1)} of ${this.#length.toFixed(1)} s`;
    if (button.dataset.does !== String(isPlaying)) {
      button.dataset.does = isPlaying;
      button.ariaLabel = isPlaying ? "Pause both videos" : "Play both videos";
    }
    slider.value = this.#length ? this.#time / this.#length : 0;
    slider.style.setProperty("--at", slider.value);
    slider.setAttribute("aria-valuetext", time);
    setText(clock, time);
  }
}
