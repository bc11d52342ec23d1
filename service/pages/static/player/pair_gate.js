/**
 * Plays two videos as one: only frames of equal number are ever shown together.
 *
 * Two <video> elements drift: their clocks agree within milliseconds, and yet their frames differ.
 * So each new frame is copied aside with its number, and a pair is painted once both sides have it.
 */

import { KEPT, Side } from "./side.js";

/** @typedef {(number: number, ...pair: CanvasImageSource[]) => void} Paint */

export class PairGate {
  playing = false;
  loop = true;
  shown = -1;
  replays = 0;
  /** @type {number | null} */
  #target = null;
  /** @type {Promise<void> | null} */
  #seeking = null;

  /**
   * @param {[string, string]} urls
   * @param {{fps: number, numFrames: number, paint: Paint, failed: (message: string) => void,
   *   changed: () => void}} options changed: called when it starts or stops playing
   */
  constructor(urls, { fps, numFrames, paint, failed, changed }) {
    this.last = numFrames - 1;
    this.paint = paint;
    this.failed = failed;
    this.changed = changed;
    this.sides = urls.map((url) => new Side(url, fps, () => this.#pair(), failed));
    for (const { video } of this.sides) video.addEventListener("ended", () => this.#ended());
  }

  /** The pair that is shown, or that a seek is on its way to. */
  get aim() {
    return this.#target ?? this.shown;
  }

  /** Resolves to whether both videos can be played; the first pair is shown then. */
  async load() {
    const loaded = await Promise.all(this.sides.map((side) => side.load()));
    if (!loaded.every(Boolean)) return false;
    await this.seek(0);
    return this.shown === 0;
  }

  async play() {
    if (this.playing) return;
    this.playing = true;
    this.changed();
    if (this.#seeking) return; // the seek starts the videos when it ends
    if (this.shown < this.last) return this.#start();
    this.replays += 1;
    await this.seek(0);
  }

  async pause() {
    if (!this.playing) return;
    this.#stop();
    await this.seek(this.shown); // both stand on the pair that is shown
  }

  /**
   * Shows a pair, and plays on from there if it was playing.
   *
   * @param {number} number the last of those asked for while a seek runs is the one made
   */
  async seek(number) {
    this.#target = Math.min(Math.max(Math.round(number), 0), this.last);
    this.#seeking ??= this.#seekOn();
    await this.#seeking;
  }

  /** @param {number} rate */
  setSpeed(rate) {
    for (const { video } of this.sides) video.playbackRate = video.defaultPlaybackRate = rate;
  }

  destroy() {
    this.playing = false;
    for (const { video } of this.sides) {
      video.pause();
      video.removeAttribute("src");
      video.load();
      video.remove();
    }
  }

  async #seekOn() {
    for (const { video } of this.sides) video.pause();
    for (let number = null; number !== this.#target; ) {
      number = /** @type {number} */ (this.#target);
      await Promise.all(this.sides.map((side) => side.seek(/** @type {number} */ (number))));
      this.#show(number);
    }
    this.#target = this.#seeking = null;
    if (this.playing) this.#start();
  }

  #start() {
    for (const side of this.sides) {
      side.held = false;
      for (const frame of side.frames) if (frame.number > this.shown) frame.number = -1; // before a loop
      side.play(this.shown).catch((/** @type {DOMException} */ error) => {
        if (error.name === "AbortError") return; // paused before it began
        this.#stop();
        this.failed(`the browser does not play: ${error.message}`);
      });
    }
  }

  #stop() {
    this.playing = false;
    for (const { video } of this.sides) video.pause();
    this.changed();
  }

  /** Shows the newest pair while playing; a seek shows its own. */
  #pair() {
    if (!this.playing || this.#target !== null) return;
    const [left, right] = this.sides;
    const common = left.frames.filter(({ number }) => right.find(number)).map(({ number }) => number);
    const newest = Math.max(...common, -1);
    if (newest > this.shown) this.#show(newest);
    this.#holdBack(left, right);
    this.#holdBack(right, left);
  }

  /** @type {(side: Side, other: Side) => void} a side waits whose frames would be lost, as when the other stalls */
  #holdBack(side, other) {
    const ahead = other.video.ended ? 0 : side.newest - other.newest;
    if (!side.held && ahead >= KEPT - 1) {
      side.held = true;
      side.video.pause();
    } else if (side.held && ahead <= 0) {
      side.held = false;
      side.video.play().catch(() => {}); // paused again at once
    }
  }

  /** @param {number} number */
  #show(number) {
    const [left, right] = this.sides.map((side) => side.find(number));
    if (!left || !right) return;
    this.shown = number;
    this.paint(number, left.pixels, right.pixels);
  }

  #ended() {
    if (!this.playing || this.#target !== null || !this.sides.every(({ video }) => video.ended)) return;
    if (this.loop) {
      this.replays += 1;
      this.seek(0);
    } else {
      this.#stop();
      this.seek(this.last);
    }
  }
}
