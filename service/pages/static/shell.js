/**
 * What all pages share: who is signed in, the links one may follow, the line that says that the service is away, and
 * small helpers to build elements and to write numbers.
 */

import { Problem, request } from "./api.js";

/** @typedef {import("./api.js").Session} Session */
/** @typedef {Node | string | number | null | undefined | false} Child */

/**
 * Make an element: `h("a", { href: "x", class: "y", onclick: f }, "text")`.
 *
 * Values that are functions become listeners, true an empty attribute; null, undefined and false are left out. Texts
 * are never read as HTML. A `style` is refused by the page's policy; use classes or `element.style.setProperty`.
 *
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, any>} [attributes]
 * @param {...(Child | Child[])} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.replace(/^on/, ""), value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...kept(children));
  return element;
}

/**
 * Replace the children of an element.
 *
 * @param {Element} element
 * @param {...(Child | Child[])} children
 */
export function fill(element, ...children) {
  element.replaceChildren(...kept(children));
}

/** @param {(Child | Child[])[]} children @returns {(Node | string)[]} */
function kept(children) {
  return children.flat().filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : String(child)));
}

/**
 * Find an element that the page must have.
 *
 * @template {HTMLElement} [Found=HTMLElement]
 * @param {string} selector
 * @param {ParentNode} [within]
 * @returns {Found}
 */
export function find(selector, within = document) {
  const found = within.querySelector(selector);
  if (found === null) throw new Error(`the page has no ${selector}`);
  return /** @type {Found} */ (found);
}

/** Make a table whose rows are stacked where the screen is narrow. @param {string[]} titles @param {(Node | null)[]} rows */
export function table(titles, rows) {
  const heads = titles.map((title) => h("th", { scope: "col" }, title || h("span", { class: "visually-hidden" }, "Actions")));
  return h("div", { class: "table" }, h("table", { class: "stacked" }, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows)));
}

/** Make a cell of such a table. @param {string} title of its column @param {...(Child | Child[])} children */
export function cell(title, ...children) {
  return h("td", { "data-title": title }, h("div", {}, ...children));
}

/** Say something to people who listen to the page. @param {string} text */
export function say(text) {
  find("#status").textContent = text;
}

/** Write seconds as people say them, such as "1 min 5 s". @param {number} seconds */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** Write bytes in the unit that fits. @param {number} bytes */
export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = bytes < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(bytes) / 3));
  return `${(bytes / 1000 ** power).toFixed(power === 0 ? 0 : 1)} ${units[power]}`;
}

/** An element with a moment as "12 s ago" or a date, and its whole time as a title. @param {string} iso */
export function moment(iso) {
  const at = new Date(iso);
  const ago = (Date.now() - at.getTime()) / 1000;
  const text = ago < 0 || ago > 12 * 3600
    ? at.toLocaleString([], { dateStyle: "medium", timeStyle: "short" })
    : ago < 5 ? "just now" : `${duration(ago < 90 ? ago : Math.round(ago / 60) * 60)} ago`.replace(" 0 s", "").replace(" 0 min", "");
  return h("time", { datetime: iso, title: at.toLocaleString() }, text);
}

/** A line that shows why something did not succeed, field by field. @param {unknown} error */
export function problemLine(error) {
  if (!(error instanceof Problem)) throw error;
  const lines = error.errors.map((each) => h("li", {}, each.detail));
  return h("div", { class: "problem", role: "alert" }, h("p", {}, error.message), lines.length > 0 && h("ul", {}, lines));
}

/**
 * A listener for a button that copies a text, also where browsers give pages no clipboard (plain HTTP).
 *
 * @param {() => string} text
 * @returns {(event: Event) => Promise<void>}
 */
export function copying(text) {
  return async (event) => {
    const button = /** @type {HTMLButtonElement} */ (event.currentTarget);
    const name = button.textContent;
    if (!await navigator.clipboard?.writeText(text()).then(() => true, () => false) && !copyBySelection(text())) {
      prompt("Copy this:", text());
      return;
    }
    button.textContent = "Copied";
    say("Copied");
    setTimeout(() => { button.textContent = name; }, 2000);
  };
}

/** @param {string} text */
function copyBySelection(text) {
  const area = h("textarea", { class: "visually-hidden" });
  area.value = text;
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (before instanceof HTMLElement) before.focus();
  return copied;
}

/** @type {Session | null} */
let session = null;

/** Who is signed in, once that is known; null if nobody is. */
export const whoAmI = load();

/** @returns {Promise<Session | null>} */
async function load() {
  try {
    session = await request("session");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    session = null;
    if (error.status !== 401) setTimeout(reload, 3000);
  }
  show();
  return session;
}

async function reload() {
  if (await load() !== null) document.dispatchEvent(new CustomEvent("signed-in", { detail: session }));
}

function show() {
  for (const link of document.querySelectorAll("#nav a")) {
    if (!(link instanceof HTMLAnchorElement)) continue;
    const role = link.dataset.role;
    link.hidden = session?.role === "rater" || (role !== undefined && session?.role !== role);
    if (link.dataset.page === document.body.className) link.setAttribute("aria-current", "page");
  }
  if (session === null) fill(find("#who"), h("button", { type: "button", onclick: askForKey }, "Sign in"));
  else if (session.open) fill(find("#who"), h("span", { class: "quiet" }, "open service"));
  else fill(find("#who"), h("span", { class: "name" }, session.name), h("button", { type: "button", onclick: signOut }, "Sign out"));
}

/** Show the dialog that asks for a key, unless it is open. */
export function askForKey() {
  const dialog = /** @type {HTMLDialogElement} */ (find("#sign-in"));
  if (!dialog.open) dialog.showModal();
}

async function signOut() {
  await request("session", { method: "DELETE" });
  location.reload();
}

find("#sign-in form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = /** @type {HTMLInputElement} */ (find("#sign-in-key"));
  const line = find("#sign-in .problem");
  line.hidden = true;
  try {
    session = await request("session", { method: "POST", body: { key: field.value.trim() } });
    field.value = "";
    /** @type {HTMLDialogElement} */ (find("#sign-in")).close();
    show();
    document.dispatchEvent(new CustomEvent("signed-in", { detail: session }));
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    line.textContent = error.status === 401 ? "This key does not open the service. Check that it is whole and not revoked." : error.message;
    line.hidden = false;
    field.select();
  }
});

// The page of raters signs them in by a link and does not ask for a key.
document.addEventListener("signed-out", () => {
  session = null;
  show();
  if (document.body.className !== "rate") askForKey();
});

document.addEventListener("connection", (event) => {
  const line = find("#connection");
  const answers = /** @type {CustomEvent<boolean>} */ (event).detail;
  line.hidden = answers;
  line.textContent = answers ? "" : "The service does not answer. This page tries again by itself; nothing is lost.";
});
