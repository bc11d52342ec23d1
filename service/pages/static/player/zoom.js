/**
 * Zooms into and moves two pictures together: by wheel, by dragging, with two fingers, by keys.
 *
 * The stage gets the custom properties --zoom, --x and --y; the stylesheet moves both pictures by them.
 */

const CLOSEST = 16;
const TAP_PX = 6; // a pointer that moves less has tapped

/** @typedef {{x: number, y: number}} Point */

export class Zoom {
  scale = 1;
  x = 0; // shift in per cent of the picture's box
  y = 0;
  /** @type {Map<number, Point>} where the pointers are that are down, in pixels */
  #down = new Map();
  #travelled = 0; // px since the first of them went down

  /**
   * @param {HTMLElement} stage holds the two boxes
   * @param {() => void} tapped
   */
  constructor(stage, tapped) {
    this.stage = stage;
    this.tapped = tapped;
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    stage.addEventListener("pointerdown", (event) => this.#press(event));
    stage.addEventListener("pointermove", (event) => this.#drag(event));
    stage.addEventListener("pointerup", (event) => this.#release(event, true));
    stage.addEventListener("pointercancel", (event) => this.#release(event, false));
    this.#show();
  }

  /**
   * @param {number} factor
   * @param {Point} around stays where it is, in per cent of the box
   */
  by(factor, around = { x: 50, y: 50 }) {
    const scale = Math.min(Math.max(this.scale * factor, 1), CLOSEST);
    this.x = around.x - ((around.x - this.x) * scale) / this.scale;
    this.y = around.y - ((around.y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.#show();
  }

  /**
   * @param {number} x in per cent of the box
   * @param {number} y
   */
  move(x, y) {
    this.x += x;
    this.y += y;
    this.#show();
  }

  #show() {
    const least = (1 - this.scale) * 100;
    this.x = Math.min(Math.max(this.x, least), 0);
    this.y = Math.min(Math.max(this.y, least), 0);
    this.stage.style.setProperty("--zoom", String(this.scale));
    this.stage.style.setProperty("--x", `${this.x}%`);
    this.stage.style.setProperty("--y", `${this.y}%`);
    this.stage.toggleAttribute("data-zoomed", this.scale > 1);
  }

  /** @param {WheelEvent} event */
  #wheel(event) {
    const before = this.scale;
    this.by(Math.exp(-event.deltaY / 400), this.#inBox(event, { x: event.clientX, y: event.clientY }));
    if (this.scale !== before) event.preventDefault(); // else the page scrolls
  }

  /** @param {PointerEvent} event */
  #press(event) {
    if (event.button !== 0) return;
    if (this.#down.size === 0) this.#travelled = 0;
    this.#down.set(event.pointerId, { x: event.clientX, y: event.clientY });
    this.stage.setPointerCapture(event.pointerId);
  }

  /** @param {PointerEvent} event */
  #drag(event) {
    const from = this.#down.get(event.pointerId);
    if (!from) return;
    const to = { x: event.clientX, y: event.clientY };
    this.#down.set(event.pointerId, to);
    this.#travelled += distance(from, to);
    const box = this.#box(event);
    const share = 1 / this.#down.size; // two fingers move it by the mean of both
    this.move(((to.x - from.x) / box.width) * 100 * share, ((to.y - from.y) / box.height) * 100 * share);
    const other = [...this.#down].find(([id]) => id !== event.pointerId)?.[1];
    if (!other) return;
    const middle = { x: (to.x + other.x) / 2, y: (to.y + other.y) / 2 };
    this.by(distance(to, other) / Math.max(distance(from, other), 1), this.#inBox(event, middle));
  }

  /**
   * @param {PointerEvent} event
   * @param {boolean} meant
   */
  #release(event, meant) {
    const alone = this.#down.size === 1;
    if (this.#down.delete(event.pointerId) && alone && meant && this.#travelled < TAP_PX) this.tapped();
  }

  /**
   * The box of the picture that the pointer is over.
   *
   * @param {MouseEvent} event
   */
  #box(event) {
    const { clientX: x, clientY: y } = event;
    const boxes = [...this.stage.querySelectorAll(".player-side")].map((side) => side.getBoundingClientRect());
    return boxes.find((box) => x < box.right && y < box.bottom) ?? boxes[0];
  }

  /**
   * @param {MouseEvent} event
   * @param {Point} point in pixels
   */
  #inBox(event, point) {
    const box = this.#box(event);
    return {
      x: ((point.x - box.left) / box.width) * 100,
      y: ((point.y - box.top) / box.height) * 100,
    };
  }
}

/**
 * @param {Point} one
 * @param {Point} other
 */
function distance(one, other) {
  return Math.hypot(one.x - other.x, one.y - other.y);
}
