/**
 * Single keys that do something, which can be changed or switched off one by one (WCAG 2.1.4).
 *
 * What was changed stays in the browser. A key is named as in KeyboardEvent.key, with "Shift+" before
 * those that write nothing, such as "Shift+ArrowLeft"; "" is no key.
 */

import { button, make } from "./elements.js";

/** @typedef {{id: string, label: string, key: string, run: () => void}} KeyAction */

const NAMES = new Map([
  [" ", "Space"],
  ["ArrowLeft", "←"],
  ["ArrowRight", "→"],
  ["ArrowUp", "↑"],
  ["ArrowDown", "↓"],
]);
const NOT_KEYS = ["Shift", "Control", "Alt", "Meta", "AltGraph", "CapsLock", "Tab", "Dead"];

export class Keys {
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
    this.rows = make("tbody");
    this.note = make("p", { role: "status" });
    this.dialog = make(
      "dialog",
      { class: "keys", "aria-label": "Keys" },
      make("h2", {}, "Keys"),
      make("table", {}, this.rows),
      this.note,
      button("All as they were", () => this.#change({})),
      button("Close", () => this.dialog.close()),
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
    this.rows.replaceChildren(
      ...this.#actions.map((action) => {
        const key = this.#key(action);
        return make(
          "tr",
          {},
          make("th", { scope: "row" }, action.label),
          make("td", {}, key ? make("kbd", {}, readable(key)) : "off"),
          make(
            "td",
            {},
            button("Change", () => this.#await(action.id), `Change the key of: ${action.label}`),
            button("Off", () => this.#assign(action.id, ""), `Switch off the key of: ${action.label}`),
          ),
        );
      }),
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
