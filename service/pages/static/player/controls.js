/** The buttons and the keys of the player of pairs. */

import { h } from "../shell.js";

/** @typedef {import("./player.js").PairPlayer} PairPlayer */
/** @typedef {import("./player.js").View} View */

export const SPEEDS = [0.25, 0.5, 0.75, 1];
/** @type {Record<View, string>} */
const VIEWS = {
  side: "Side by side",
  single: "One at a time",
  wipe: "Wipe",
  flicker: "Flicker",
  difference: "Difference",
};
const PAN = 10; // per cent of the picture
const CLOSER = 1.5;

export class Controls {
  frame = -1;

  /** @param {PairPlayer} player */
  constructor(player) {
    this.player = player;
    this.playButton = button("", () => player.toggle());
    this.scrub = h("input", { type: "range", min: 0, value: 0, "aria-label": "Frame" });
    this.scrub.max = String(player.options.numFrames - 1);
    this.scrub.addEventListener("input", () => player.seek(this.scrub.valueAsNumber));
    this.count = h("span", { class: "player-count" }, "Loading…");
    this.speed = choice("Speed", SPEEDS.map((speed) => [String(speed), `${speed}×`]), (value) =>
      player.setSpeed(Number(value)),
    );
    this.view = choice("View", Object.entries(VIEWS), (value) => player.setView(/** @type {View} */ (value)));
    this.wipe = h("input", { class: "player-wipe", type: "range", value: 50, "aria-label": "Wipe" });
    this.wipe.addEventListener("input", () => this.#wipeTo());
    this.front = h("span", { class: "player-front" });
    this.loop = button("Loop", () => (player.loop = !player.loop));
    this.bar = h(
      "div",
      { class: "player-bar", role: "group", "aria-label": "Player" },
      this.wipe,
      h("div", { class: "player-time" }, this.playButton, this.scrub, this.count),
      button("‹", () => player.step(-1), "One frame back"),
      button("›", () => player.step(1), "One frame on"),
      this.loop,
      this.speed,
      this.view,
      button("⇄", () => player.swap(), "One at a time, the other one"),
      button("−", () => player.zoom.by(1 / CLOSER), "Zoom out"),
      button("+", () => player.zoom.by(CLOSER), "Zoom in"),
      button("?", () => player.keys.help(), "Keys"),
      this.front,
    );
    this.#wipeTo();
  }

  /** Shows the state of the player. */
  show() {
    const { player } = this;
    this.playButton.textContent = player.playing ? "Pause" : "Play";
    this.loop.setAttribute("aria-pressed", String(player.loop));
    this.speed.value = String(player.speed);
    this.view.value = player.view;
    for (const option of this.view.options) {
      option.disabled = option.hidden = option.value === "difference" && !player.allowDifference;
    }
    this.wipe.hidden = player.view !== "wipe";
    const one = player.view === "single" || player.view === "flicker";
    this.front.textContent = one ? ["Left", "Right"][player.front] : "";
  }

  /** @param {number} frame */
  showFrame(frame) {
    this.frame = frame;
    this.scrub.value = String(frame);
    this.count.textContent = `${frame + 1} / ${this.player.options.numFrames}`;
  }

  #wipeTo() {
    this.player.stage.style.setProperty("--wipe", `${this.wipe.value}%`);
  }
}

/**
 * What keys do; arrows without Shift and digits but 0 are left to the page.
 *
 * @param {PairPlayer} player
 * @returns {import("./key_map.js").KeyAction[]}
 */
export function keyActions(player) {
  /** @type {(id: string, label: string, key: string, run: () => unknown) => import("./key_map.js").KeyAction} */
  const action = (id, label, key, run) => ({ id, label, key, run });
  const speed = (/** @type {number} */ by) => () => {
    const next = SPEEDS[SPEEDS.indexOf(player.speed) + by];
    if (next) player.setSpeed(next);
  };
  return [
    action("play", "Play or pause", " ", () => player.toggle()),
    action("back", "One frame back", ",", () => player.step(-1)),
    action("on", "One frame on", ".", () => player.step(1)),
    action("first", "First frame", "Home", () => player.seek(0)),
    action("last", "Last frame", "End", () => player.step(player.options.numFrames)),
    action("loop", "Loop on or off", "l", () => (player.loop = !player.loop)),
    action("slower", "Slower", "[", speed(-1)),
    action("faster", "Faster", "]", speed(1)),
    action("side", "View: side by side", "s", () => player.setView("side")),
    action("swap", "View: one at a time, the other one", "x", () => player.swap()),
    action("wipe", "View: wipe", "w", () => player.setView("wipe")),
    action("flicker", "View: flicker", "f", () => player.setView("flicker")),
    action("difference", "View: difference, where allowed", "d", () => player.setView("difference")),
    action("closer", "Zoom in", "+", () => player.zoom.by(CLOSER)),
    action("wider", "Zoom out", "-", () => player.zoom.by(1 / CLOSER)),
    action("whole", "Zoom out to the whole picture", "0", () => player.zoom.by(0)),
    action("leftwards", "Move to the left", "Shift+ArrowLeft", () => player.zoom.move(PAN, 0)),
    action("rightwards", "Move to the right", "Shift+ArrowRight", () => player.zoom.move(-PAN, 0)),
    action("upwards", "Move up", "Shift+ArrowUp", () => player.zoom.move(0, PAN)),
    action("downwards", "Move down", "Shift+ArrowDown", () => player.zoom.move(0, -PAN)),
    action("help", "These keys", "?", () => player.keys.help()),
  ];
}

/**
 * @param {string} label
 * @param {string[][]} options value and text of each
 * @param {(value: string) => void} chosen
 */
function choice(label, options, chosen) {
  const elements = options.map(([value, text]) => h("option", { value }, text));
  const select = h("select", { "aria-label": label, onchange: () => chosen(select.value) }, elements);
  return select;
}

/**
 * @param {string} text
 * @param {() => unknown} onclick
 * @param {string} [label] what it is called where the text alone does not say
 */
function button(text, onclick, label) {
  return h("button", { type: "button", "aria-label": label, title: label, onclick }, text);
}
