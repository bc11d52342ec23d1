/**
 * Shows two videos for a comparison by eye: both always on the same frame, zoomed and moved together.
 *
 * It fills an element with a stage, controls and keys, and knows nothing of what the videos are.
 */

import { h } from "../shell.js";
import { KeyMap } from "./key_map.js";
import { PairGate } from "./pair_gate.js";
import { Controls, SPEEDS, keyActions } from "./controls.js";
import { Zoom } from "./zoom.js";

/** @typedef {"side" | "wipe" | "flicker" | "single" | "difference"} View */
/**
 * @typedef {{type: "ready"} | {type: "framechange", frame: number} | {type: "error", message: string}
 *   | {type: "playing", playing: boolean} | {type: "view", view: View}} PlayerEvent
 */
/**
 * @typedef {object} PlayerOptions
 * @property {string} leftUrl
 * @property {string} rightUrl
 * @property {number} fps
 * @property {number} numFrames of each video
 * @property {number} width of a frame, in pixels
 * @property {number} height of a frame, in pixels
 * @property {(event: PlayerEvent) => void} [onEvent]
 * @property {boolean} [autoplay] play once loaded, except for people who want reduced motion
 */

const FLICKER_MS = 350; // under three changes a second (WCAG 2.3.1)
const PHONE = "(max-width: 640px)";

export class PairPlayer {
  /** @type {View} */
  view = "side";
  speed = 1;
  front = 0; // the side on top where one is seen at a time: 0 left, 1 right
  #allowDifference = false;
  #flicker = 0; // its timer
  #seconds = 0;
  #paintedAt = 0; // ms; 0 after anything but playing
  #dropped = 0;
  #slowest = 1;
  #seen = [new Set(), new Set()]; // frames

  /**
   * @param {HTMLElement} root is emptied
   * @param {PlayerOptions} options
   */
  constructor(root, options) {
    this.root = root;
    this.options = options;
    const { fps, numFrames, width, height } = options;
    this.gate = new PairGate([options.leftUrl, options.rightUrl], {
      fps,
      numFrames,
      paint: (frame, ...pair) => this.#paint(frame, pair),
      failed: (message) => this.#tell({ type: "error", message }),
      changed: () => this.#playingChanged(),
    });
    this.canvases = ["Left video", "Right video"].map((label) =>
      h("canvas", { width, height, role: "img", "aria-label": label }),
    );
    this.sides = ["left", "right"].map((name, side) =>
      h("div", { class: "player-side", "data-side": name }, this.canvases[side]),
    );
    const videos = this.gate.sides.map(({ video }) => video);
    this.stage = h("div", { class: "player-stage" }, ...videos, ...this.sides);
    this.stage.style.setProperty("--ratio", `${width} / ${height}`);
    this.zoom = new Zoom(this.stage, () => this.#tap());
    this.keys = new KeyMap("player-keys");
    this.keys.add(...keyActions(this));
    this.controls = new Controls(this);
    root.classList.add("player");
    root.replaceChildren(this.stage, this.controls.bar);
    document.addEventListener("visibilitychange", this.#pauseIfHidden);
    this.setView(matchMedia(PHONE).matches ? "single" : "side");
    this.#playingChanged();
  }

  get playing() {
    return this.gate.playing;
  }

  get frame() {
    return this.gate.shown;
  }

  get loop() {
    return this.gate.loop;
  }

  set loop(loop) {
    this.gate.loop = loop;
    this.controls.show();
  }

  /** Whether the difference may be seen: it shows what a blind vote must not know. */
  get allowDifference() {
    return this.#allowDifference;
  }

  set allowDifference(allowed) {
    this.#allowDifference = allowed;
    if (!allowed && this.view === "difference") this.setView("side");
    this.controls.show();
  }

  /** Resolves to whether the first pair is shown; if not, there was an event "error". */
  async load() {
    if (!(await this.gate.load())) return false;
    this.#tell({ type: "ready" });
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (this.options.autoplay && !still) await this.play();
    return true;
  }

  play() {
    return this.gate.play();
  }

  pause() {
    return this.gate.pause();
  }

  toggle() {
    return this.playing ? this.pause() : this.play();
  }

  /** @param {number} frame from 0; resolves when the pair is shown */
  seek(frame) {
    this.#paintedAt = 0;
    return this.gate.seek(frame);
  }

  /** @param {number} frames how many to go on, or back if negative; pauses first */
  step(frames) {
    this.pause();
    return this.seek(this.gate.aim + frames);
  }

  /** @param {number} speed from 0.25 to 1 */
  setSpeed(speed) {
    this.speed = Math.min(Math.max(speed, SPEEDS[0]), 1);
    this.#slowest = Math.min(this.speed, this.#slowest);
    this.gate.setSpeed(this.speed);
    this.controls.show();
  }

  /** @param {View} view */
  setView(view) {
    if (view === "difference" && !this.#allowDifference) return;
    this.view = view;
    this.root.dataset.view = view;
    clearInterval(this.#flicker);
    if (view === "flicker") this.#flicker = setInterval(() => this.#setFront(1 - this.front), FLICKER_MS);
    this.#setFront(this.front);
    this.controls.show();
    this.#tell({ type: "view", view });
  }

  /** Shows one side, and the other if that is done already. */
  swap() {
    if (this.view === "single") this.#setFront(1 - this.front);
    else this.setView("single");
  }

  /** What was seen until now, as a vote keeps it. */
  provenance() {
    return {
      seconds_watched: Math.round(this.#seconds * 100) / 100,
      frames_seen: this.#seen.map((frames) => frames.size),
      replays: this.gate.replays,
      dropped_frames: this.#dropped,
      speed: this.#slowest,
      viewport: [window.innerWidth, window.innerHeight],
    };
  }

  destroy() {
    clearInterval(this.#flicker);
    document.removeEventListener("visibilitychange", this.#pauseIfHidden);
    this.keys.destroy();
    this.gate.destroy();
    this.root.replaceChildren();
  }

  /**
   * @param {number} frame
   * @param {CanvasImageSource[]} pictures
   */
  #paint(frame, pictures) {
    for (const [side, canvas] of this.canvases.entries()) {
      canvas.getContext("2d")?.drawImage(pictures[side], 0, 0, canvas.width, canvas.height);
    }
    const now = performance.now();
    if (this.playing && this.#paintedAt) {
      this.#seconds += Math.min(now - this.#paintedAt, 1000) / 1000;
      this.#dropped += Math.max(frame - this.controls.frame - 1, 0);
    }
    this.#paintedAt = this.playing ? now : 0;
    this.#see();
    this.controls.showFrame(frame);
    this.#tell({ type: "framechange", frame });
  }

  #see() {
    const one = this.view === "single" || this.view === "flicker";
    for (const [side, frames] of this.#seen.entries()) {
      if (this.frame >= 0 && (!one || side === this.front)) frames.add(this.frame);
    }
  }

  /** @param {number} side */
  #setFront(side) {
    this.front = side;
    this.root.dataset.front = side === 0 ? "left" : "right";
    this.#see();
    this.controls.show();
  }

  #tap() {
    if (this.view === "single") this.swap();
    else this.toggle();
  }

  #playingChanged() {
    if (!this.playing) this.#paintedAt = 0;
    this.controls?.show();
    this.#tell({ type: "playing", playing: this.playing });
  }

  #pauseIfHidden = () => {
    if (document.hidden) this.pause();
  };

  /** @param {PlayerEvent} event */
  #tell(event) {
    this.options.onEvent?.(event);
  }
}
