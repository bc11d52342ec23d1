/**
 * Copies the frames of one video, each with its number, and finds those that are sought.
 *
 * Under load a browser announces a frame before or after it shows it. So a copy is known by the time that its
 * picture carries, or else taken a moment later, when the video stands still.
 */

/** @typedef {{number: number, pixels: HTMLCanvasElement}} Frame */
/** @typedef {{number: number, announced: boolean, end: () => void}} Sought */

export const KEPT = 4; // frames of a side that wait for those of the other
const LATE_MS = 1000; // after a seek has ended; browsers announce no frame that is shown already
const SETTLE_MS = 30; // until a video that stands still shows the frame that was announced

/** Whether a picture can be had with its time, as a `VideoFrame`; not on plain HTTP. */
const webCodecs = () => "VideoFrame" in window;

export class Side {
  /** @type {Frame[]} the oldest first */
  frames = Array.from({ length: KEPT }, () => ({ number: -1, pixels: document.createElement("canvas") }));
  newest = -1;
  held = false; // while it waits for the other side
  /** @type {Sought | null} */
  #sought = null;

  /**
   * @param {string} url
   * @param {number} fps
   * @param {() => void} changed called after each new frame
   * @param {(message: string) => void} failed
   */
  constructor(url, fps, changed, failed) {
    this.url = url;
    this.fps = fps;
    this.changed = changed;
    const video = (this.video = document.createElement("video"));
    Object.assign(video, { muted: true, playsInline: true, preload: "auto", tabIndex: -1 });
    video.setAttribute("aria-hidden", "true");
    video.addEventListener("error", () => failed("A video cannot be loaded or played."));
    video.addEventListener("seeked", () => {
      const sought = this.#sought;
      setTimeout(() => sought && this.#late(sought), LATE_MS);
    });
    this.#listen();
  }

  /** Resolves to whether the video can be played. */
  load() {
    return new Promise((resolve) => {
      this.video.addEventListener("loadeddata", () => resolve(true), { once: true });
      this.video.addEventListener("error", () => resolve(false), { once: true });
      this.video.src = this.url;
    });
  }

  #listen() {
    this.video.requestVideoFrameCallback((_, { mediaTime }) => {
      this.#announced(Math.round(mediaTime * this.fps));
      this.#listen();
    });
  }

  /** @param {number} number of a frame; the video may show it a moment later, or the next one already */
  #announced(number) {
    const isSought = this.#sought?.number === number;
    if (this.#sought) this.#sought.announced = true;
    if (webCodecs() || !isSought) this.#take(number);
    if (isSought) setTimeout(() => this.#again(number), SETTLE_MS);
  }

  /** @param {number} number of a frame that was announced; at most until the seek for it is late */
  #again(number) {
    if (this.#sought?.number !== number) return;
    this.#take(number);
    setTimeout(() => this.#again(number), SETTLE_MS);
  }

  /** @param {number} announced */
  #take(announced) {
    const still = webCodecs() ? new VideoFrame(this.video) : null;
    const number = still ? Math.round((still.timestamp * this.fps) / 1e6) : announced;
    const frame = /** @type {Frame} */ (this.frames.shift());
    const { videoWidth, videoHeight } = this.video;
    if (frame.pixels.width !== videoWidth || frame.pixels.height !== videoHeight) {
      Object.assign(frame.pixels, { width: videoWidth, height: videoHeight });
    }
    frame.pixels.getContext("2d")?.drawImage(still ?? this.video, 0, 0);
    still?.close();
    frame.number = number;
    this.frames.push(frame);
    this.newest = number;
    if (this.#sought?.number === number) this.#sought.end();
    this.changed();
  }

  /** @param {Sought} sought may be on the screen unannounced, if it was there before the seek */
  #late(sought) {
    if (this.#sought !== sought || this.video.seeking || document.hidden) return;
    if (sought.announced) sought.end(); // another frame came: the video lacks this one
    else this.#take(Math.floor(this.video.currentTime * this.fps));
  }

  find = (/** @type {number} */ number) => this.frames.find((frame) => frame.number === number);

  /** @param {number} number of a frame; resolves when it is copied, or is known not to come */
  async seek(number) {
    // The video need not move for a copy. If it did, its next move could come before the browser
    // announces this one, and a picture would be copied under the number of another.
    if (this.find(number)) return;
    const ended = new Promise((resolve) => {
      const end = () => {
        this.#sought = null;
        resolve(undefined);
      };
      this.#sought = { number, announced: false, end };
    });
    this.#move(number);
    await ended;
  }

  /** @param {number} number of the pair that is shown; the video is behind or ahead after seeks among copies */
  async play(number) {
    if (Math.floor(this.video.currentTime * this.fps) !== number) this.#move(number);
    await this.video.play();
  }

  /** @param {number} number */
  #move(number) {
    this.video.currentTime = (number + 0.5) / this.fps; // the middle: rounding cannot leave the frame
  }
}
