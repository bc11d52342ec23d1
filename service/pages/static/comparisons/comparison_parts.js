/** What the pages about comparisons share: how states and modes are written, planned votes, and lines of plots. */

import { h } from "../shell.js";

/** @param {any} comparison */
export function stateTag({ state }) {
  const looks = { running: "active", paused: "warn", closed: "good", cancelled: "bad" };
  return h("span", { class: `tag ${looks[/** @type {keyof typeof looks} */ (state)] ?? ""}` }, state);
}

/** @param {any} contender @param {any} other */
export function contenderName({ mode, model }, other) {
  return model === other.model ? mode : `${mode} of ${model}`;
}

/**
 * How many decisive votes show in a share `power` of comparisons, by the exact binomial test at the level `alpha`, that
 * an equal candidate is not worse.
 *
 * @param {number} margin from 0.01 to 0.49
 * @param {number} [alpha] from 0.001 to 0.2
 * @param {number} [power] from 0.5 to 0.99
 */
export function decisiveVotes(margin, alpha = 0.05, power = 0.8) {
  const limit = 0.5 - margin;
  const about = ((deviate(alpha) * Math.sqrt(limit * (1 - limit)) + deviate(1 - power) * 0.5) / margin) ** 2;
  let votes = Math.ceil(about + 4 * Math.sqrt(about) + 30);
  let wins = votes;
  for (; votes > 0; votes -= 1, wins = Math.min(wins, votes)) {
    while (wins > 0 && tail(wins - 1, votes, limit) <= alpha) wins -= 1;
    if (tail(wins, votes, limit) > alpha || tail(wins, votes, 0.5) < power) return votes + 1;
  }
  return 1;
}

/** What a normal deviate exceeds with a probability up to 0.5, to 0.0005 (Abramowitz and Stegun 26.2.23). @param {number} p */
function deviate(p) {
  const t = Math.sqrt(-2 * Math.log(p));
  return t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
}

/** @type {number[]} logarithms of factorials */
const logFactorials = [0];

/** The probability of at least so many wins. @param {number} wins @param {number} votes @param {number} share */
function tail(wins, votes, share) {
  for (let n = logFactorials.length; n <= votes; n += 1) logFactorials.push(logFactorials[n - 1] + Math.log(n));
  let sum = 0;
  for (let k = wins; k <= votes; k += 1) {
    const term = Math.exp(logFactorials[votes] - logFactorials[k] - logFactorials[votes - k]
      + k * Math.log(share) + (votes - k) * Math.log(1 - share));
    sum += term;
    if (k > votes * share && term < 1e-15) break;
  }
  return sum;
}

/** A share as people write it. @param {number | null | undefined} share @param {number} [digits] */
export function percent(share, digits = 0) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)} %`;
}

/** A share that was chosen, not measured: with all of its digits. @param {number} share */
export function exactPercent(share) {
  return `${Number((100 * share).toPrecision(8))} %`;
}

/** An interval of shares. @param {{low: number, high: number} | null | undefined} interval */
export function range(interval) {
  return interval ? `${(100 * interval.low).toFixed(0)} to ${percent(interval.high)}` : "–";
}

/**
 * A drawing one row high: x goes from 0 to 1 over its whole width, y from 0 to 10.
 *
 * Lines keep their thickness however wide the page is; a line without length and with round ends is a dot.
 *
 * @param {string} label what it shows, for people who do not see it
 * @param {{class: string, from: number, to?: number, y?: number, bottom?: number}[]} lines drawn in this order
 */
export function plotRow(label, lines) {
  const drawing = svg("svg", { class: "plot", viewBox: "0 0 1 10", preserveAspectRatio: "none", role: "img", "aria-label": label });
  for (const { from, to = from, y = 5, bottom = y, ...line } of lines) {
    // Rounded ends of a line without length are only drawn if it has a little of it.
    const x2 = from === to && y === bottom ? to + 1e-6 : to;
    drawing.append(svg("line", { class: line.class, x1: from, x2, y1: y, y2: bottom, "vector-effect": "non-scaling-stroke" }));
  }
  return drawing;
}

/** @param {string} tag @param {Record<string, string | number>} attributes */
function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  return element;
}
