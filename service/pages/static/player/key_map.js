/**
 * Single keys that do something, which can be changed or switched off one by one (WCAG 2.1.4).
 *
 * What was changed stays in the browser. A key is named as in KeyboardEvent.key, with "Shift+" before
 * those that write nothing, such as "Shift+ArrowLeft"; "" is no key.
 */

import { h } from "../shell.js";

/** @typedef {{id: string, label: string, key: string, run: () => void}} KeyAction */

const NAMES = new Map([
  [" ", "Space"],
  ["ArrowLeft", "←"],
  ["ArrowRight", "→"],
  ["ArrowUp", "↑"],
  ["ArrowDown", "↓"],
]);
const NOT_KEYS = ["Shift", "Control", "Alt", "Meta", "AltGraph", "CapsLock", "Tab", "Dead"];

export class KeyMap {
  /** @type {KeyAction[]} */
  #actions = [];
  /** @type {Record<string, string>} changed keys by the id of their action */
  #changed = {};
  /** @type {string | null} the action that waits for its new key */
  #waiting = null;

  /** @param {string} storageName */
  constructor(storageName) {
    this.storageName = storageName;
    try {
      this.#changed = JSON.parse(localStorage.getItem(storageName) ?? "{}");
    } catch {
      // storage is switched off or holds something else: the keys are those that they are by default
    }
    this.rows = h("tbody");
    this.note = h("p", { role: "status" }, "");
    this.dialog = h("dialog", { class: "keys", "aria-label": "Keys" },
      h("h2", {}, "Keys"),
      h("div", { class: "table" }, h("table", {}, this.rows)),
      this.note,
      h("div", { class: "actions" },
        h("button", { type: "button", onclick: () => this.#change({}) }, "All as they were"),
        h("button", { type: "button", class: "primary", onclick: () => this.dialog.close() }, "Close"),
      ),
    );
    this.dialog.addEventListener("close", () => this.#await(null));
    document.body.append(this.dialog);
    this.listener = (/** @type {KeyboardEvent} */ event) => this.#press(event);
    document.addEventListener("keydown", this.listener);
  }

  /** @param {KeyAction[]} actions */
  add(...actions) {
    this.#actions.push(...actions);
    this.#draw();
  }

  /**
   * The key of an action as people read it; "" if it has none.
   *
   * @param {string} id
   */
  name(id) {
    const action = this.#actions.find((each) => each.id === id);
    return action ? readable(this.#key(action)) : "";
  }

  help() {
    this.note.textContent = "";
    this.dialog.showModal();
  }

  destroy() {
    document.removeEventListener("keydown", this.listener);
    this.dialog.remove();
  }

  /** @param {KeyAction} action */
  #key(action) {
    return this.#changed[action.id] ?? action.key;
  }

  /** @param {KeyboardEvent} event */
  #press(event) {
    if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.isComposing || NOT_KEYS.includes(event.key)) return;
    const key = event.shiftKey && event.key.length > 1 ? `Shift+${event.key}` : event.key;
    if (this.#waiting !== null) {
      if (key === "Escape") return this.#await(null);
      event.preventDefault();
      this.#assign(this.#waiting, key);
    } else if (!document.querySelector("dialog[open]") && !isUsed(event)) {
      const action = this.#actions.find((each) => this.#key(each) === key);
      if (!action) return;
      event.preventDefault();
      action.run();
    }
  }

  /**
   * @param {string} id
   * @param {string} key
   */
  #assign(id, key) {
    const other = this.#actions.find((each) => each.id !== id && key && this.#key(each) === key);
    if (other) {
      this.note.textContent = `${readable(key)} is taken: ${other.label}. Press another key, or Escape.`;
      return;
    }
    this.#change({ ...this.#changed, [id]: key });
    this.dialog.querySelector("button")?.focus();
  }

  /** @param {Record<string, string>} changed */
  #change(changed) {
    this.#changed = changed;
    try {
      localStorage.setItem(this.storageName, JSON.stringify(changed));
    } catch {
      // the change lasts as long as the page
    }
    this.#await(null);
  }

  /** @param {string | null} id */
  #await(id) {
    this.#waiting = id;
    this.note.textContent = id === null ? "" : "Press the new key, or Escape.";
    if (id === null) this.#draw();
  }

  #draw() {
    this.rows.replaceChildren(...this.#actions.map((action) => this.#row(action)));
  }

  /** @param {KeyAction} action */
  #row(action) {
    const key = this.#key(action);
    const change = (/** @type {string} */ text, /** @type {string} */ label, /** @type {() => void} */ onclick) =>
      h("button", { type: "button", "aria-label": `${label}: ${action.label}`, onclick }, text);
    return h("tr", {},
      h("th", { scope: "row" }, action.label),
      h("td", {}, key ? h("kbd", {}, readable(key)) : "off"),
      h("td", {},
        change("Change", "Change the key of", () => this.#await(action.id)),
        change("Off", "Switch off the key of", () => this.#assign(action.id, "")),
      ),
    );
  }
}

/** @param {string} key */
function readable(key) {
  const shift = key.startsWith("Shift+");
  const name = shift ? key.slice(6) : key;
  return (shift ? "Shift + " : "") + (NAMES.get(name) ?? name);
}

/**
 * Whether the control that has the focus takes the key itself.
 *
 * @param {KeyboardEvent} event
 */
function isUsed({ target, key }) {
  if (!(target instanceof HTMLElement)) return false;
  if (target.isContentEditable || target.matches("textarea, select")) return true;
  if (target instanceof HTMLInputElement) {
    const writes = !["range", "checkbox", "radio", "button", "submit"].includes(target.type);
    return writes || key === " " || /^(Arrow|Home|End|Page)/.test(key);
  }
  return target.matches("button, a[href], summary") && (key === " " || key === "Enter");
}
