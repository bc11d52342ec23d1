/** The form of a vote: one question for each criterion, answered by pointer or keys, and kept in the browser until sent. */

import { fill, find, h } from "../shell.js";

/**
 * @typedef {"left" | "tie" | "right"} Choice
 * @typedef {{id: string, name: string, definition: string}} Criterion
 * @typedef {Record<string, Choice>} Answers by criterion
 * @typedef {{item: string, answers: Answers, seen: any}} Draft what was answered and seen of a pair that is not sent yet
 */

const DRAFT = "rate-draft";
const CHOICES = /** @type {[Choice, string][]} */ ([["left", "Left"], ["tie", "No difference"], ["right", "Right"]]);

export class VoteForm {
  /** @type {Criterion[]} */
  criteria = [];
  /** @type {Answers} */
  answers = {};
  #current = 0; // the question that keys answer
  #can = true;
  #send = /** @type {HTMLButtonElement} */ (find("#send"));

  /** @param {() => void} changed called after each answer */
  constructor(changed) {
    this.changed = changed;
  }

  get open() {
    return this.criteria.filter(({ id }) => !this.answers[id]).length;
  }

  /**
   * Begin a pair.
   *
   * @param {Criterion[]} criteria
   * @param {Answers} answers to start from
   */
  begin(criteria, answers) {
    this.criteria = criteria;
    this.answers = { ...answers };
    this.#current = 0;
    fill(find("#criteria"), criteria.map(({ id, name, definition }, number) => h("div", { class: "question", role: "radiogroup", "aria-labelledby": `question-${number}` },
      h("p", { id: `question-${number}` }, h("b", {}, name), " ", h("span", { class: "quiet small" }, definition)),
      h("div", { class: "choices" }, CHOICES.map(([choice, text]) => h("label", { onclick: release },
        h("input", { type: "radio", name: id, value: choice, onchange: () => this.choose(number, choice) }), text))))));
    this.#show();
    find("#vote").focus({ preventScroll: true });
  }

  /**
   * The keys that answer; the player has the others.
   *
   * @returns {import("../player/key_map.js").KeyAction[]}
   */
  keys() {
    const pick = (/** @type {Choice} */ choice) => () => this.choose(this.#current, choice);
    return [
      { id: "left", label: "Vote: left is better, next question", key: "ArrowLeft", run: pick("left") },
      { id: "tie", label: "Vote: no difference, next question", key: "ArrowDown", run: pick("tie") },
      { id: "right", label: "Vote: right is better, next question", key: "ArrowRight", run: pick("right") },
      { id: "question", label: "Question before", key: "ArrowUp", run: () => this.goTo(this.#current - 1) },
      ...this.criteria.map(({ name }, number) =>
        ({ id: `question-${number + 1}`, label: `Question: ${name}`, key: `${number + 1}`, run: () => this.goTo(number) })),
    ];
  }

  /** Write which keys do what, as they are now. @param {import("../player/key_map.js").KeyMap} keys */
  hint(keys) {
    const parts = [["left", "left"], ["tie", "no difference"], ["right", "right"], ["question", "question before"], ["send", "send"], ["skip", "skip"], ["undo", "undo"]];
    fill(find("#keys"), parts.filter(([id]) => keys.name(id)).map(([id, text]) => h("span", {}, h("kbd", {}, keys.name(id)), ` ${text}`)));
  }

  /** @param {number} number of the question @param {Choice} choice */
  choose(number, choice) {
    if (!this.#can) return;
    this.answers[this.criteria[number].id] = choice;
    this.goTo(number + 1);
    this.changed();
  }

  /** @param {number} number of the question that keys answer from now on */
  goTo(number) {
    this.#current = Math.min(Math.max(number, 0), this.criteria.length - 1);
    this.#show();
  }

  /** Say what is missing. @param {string} [text] instead of the number of open questions */
  say(text) {
    const { open } = this;
    find("#missing").textContent = text ?? (open > 0 ? `${open} of ${this.criteria.length} questions are open.` : "All answered: send the vote, or change it.");
  }

  /** Whether answers may be given now; not while one is being sent. @param {boolean} can @param {boolean} undo */
  enable(can, undo) {
    this.#can = can;
    find("#criteria").toggleAttribute("inert", !can);
    this.#send.disabled = !can || this.open > 0;
    /** @type {HTMLButtonElement} */ (find("#skip")).disabled = !can;
    /** @type {HTMLButtonElement} */ (find("#undo")).disabled = !can || !undo;
  }

  #show() {
    for (const [number, question] of [...find("#criteria").children].entries()) {
      question.classList.toggle("current", number === this.#current);
      for (const radio of question.querySelectorAll("input")) radio.checked = this.answers[this.criteria[number].id] === radio.value;
    }
    this.#send.disabled = this.open > 0;
    this.say();
  }
}

/** A pointer leaves the focus on a choice, where arrows would move it instead of answering the next question. @param {MouseEvent} event */
function release(event) {
  if (event.detail > 0) setTimeout(() => find("#vote").focus({ preventScroll: true }));
}

/** What was seen of a pair in all, if the page was loaded again meanwhile. @param {any} now @param {any} before as provenance() gives them */
export function together(now, before) {
  if (!before) return now;
  const sum = (/** @type {string} */ name) => Math.round((now[name] + before[name]) * 100) / 100;
  return { ...now, seconds_watched: sum("seconds_watched"), replays: sum("replays"), dropped_frames: sum("dropped_frames"),
    frames_seen: now.frames_seen.map((/** @type {number} */ count, /** @type {number} */ side) => Math.max(count, before.frames_seen[side])) };
}

/** The draft that this browser keeps. @returns {Draft | null} */
export function readDraft() {
  try {
    return JSON.parse(localStorage.getItem(DRAFT) ?? "null");
  } catch {
    return null;
  }
}

/** Keep a draft, also when the tab is closed. @param {Draft | null} draft null: there is none */
export function keepDraft(draft) {
  try {
    if (draft) localStorage.setItem(DRAFT, JSON.stringify(draft));
    else localStorage.removeItem(DRAFT);
  } catch {
    // storage is switched off: the answers last as long as the page
  }
}
