/** One comparison: how far its pairs are, who rates them, and what can be done with it. */

import { Problem, poll, request, root } from "../api.js";
import { contenderName, exactPercent, stateTag } from "./comparison_parts.js";
import { cell, copying, fill, find, h, problemLine, say, table } from "../shell.js";

const id = location.pathname.replace(/\/$/, "").split("/").at(-1) ?? "";
const path = `comparisons/${encodeURIComponent(id)}`;
const note = find("#note");

/** What can be done, in which states: name, text, states, and what has to be confirmed. */
const STEPS = /** @type {[string, string, string[], string?][]} */ ([
  ["pause", "Pause", ["running"]],
  ["resume", "Resume", ["paused"]],
  ["close", "Close", ["running", "paused"], "Nobody can vote afterwards, and the result stands. This cannot be undone."],
  ["cancel", "Cancel", ["running", "paused"], "Open jobs are cancelled, and nobody can vote afterwards. This cannot be undone."],
  ["clone", "Clone", ["running", "paused", "closed", "cancelled"]],
  ["delete", "Delete", ["running", "paused", "closed", "cancelled"],
    "The comparison goes with all of its votes and the copies of its videos. This cannot be undone."],
]);

/** What was shown last, so that nothing is drawn again (and loses the focus) without need. @type {Record<string, string>} */
const shown = {};
/** @type {any[]} */
let pairs = [];
/** @type {string | null} */
let cursor = null;
let pages = 1;
const EVERY_MS = 5000;
/** @type {ReturnType<typeof poll>} */
let rounds;

/** @param {string} part @param {unknown} data @param {(part: HTMLElement) => void} draw */
function redraw(part, data, draw) {
  const text = JSON.stringify(data);
  if (shown[part] === text) return;
  shown[part] = text;
  draw(find(`#${part}`));
}

async function round() {
  try {
    show(await request(path));
    const { raters: all } = await request(`${path}/raters`);
    redraw("raters", all, (part) => fill(part, raters(all)));
    await showPairs();
  } catch (error) {
    if (error instanceof Problem && error.status === 404) {
      find("#content").hidden = true;
      fill(note, h("p", { class: "empty" }, "This comparison does not exist, or not any more. ", h("a", { href: `${root}comparisons` }, "See all.")));
    }
    throw error;
  }
}

/** @param {any} comparison */
function show(comparison) {
  document.title = document.title.replace(/^.*?(?= –)/, comparison.title);
  find("#title").textContent = comparison.title;
  find("#content").hidden = false;
  /** @type {HTMLAnchorElement} */ (find("#report")).href = `${root}${path}/report`;
  redraw("state", comparison.state, (part) => fill(part, stateTag(comparison)));
  redraw("note", comparison.problem ?? null, (part) => fill(part, comparison.problem && h("p", { class: "notice warning", role: "status" }, comparison.problem)));
  redraw("counts", comparison.counts, () => showCounts(comparison.counts));
  redraw("steer", [comparison.state, comparison.counts.failed > 0], (part) => fill(part, steps(comparison)));
  redraw("design", [comparison.settings, comparison.margin], (part) => fill(part, design(comparison)));
  find("#add").hidden = ["closed", "cancelled"].includes(comparison.state);
}

/** @param {Record<string, number>} counts */
function showCounts(counts) {
  const kinds = [["ready", "good"], ["running", "active"], ["waiting", ""], ["failed", "bad"]];
  fill(find("#counts"), kinds.map(([kind, look]) => h("span", { class: counts[kind] > 0 ? `tag ${look}` : "tag" }, `${counts[kind]} ${kind}`)),
    h("span", { class: "quiet" }, `of ${counts.pairs} pairs`));
  const bar = find("#bar");
  bar.setAttribute("aria-label", kinds.map(([kind]) => `${counts[kind]} ${kind}`).join(", "));
  fill(bar, kinds.filter(([kind]) => counts[kind] > 0).map(([kind]) => {
    const part = h("span", { class: kind });
    part.style.setProperty("flex-grow", String(counts[kind]));
    return part;
  }));
}

/** @param {any} comparison */
function steps({ state, counts }) {
  const buttons = STEPS.filter(([, , states]) => states.includes(state)).map(([name, text, , warning]) =>
    h("button", { type: "button", class: name === "delete" || name === "cancel" ? "danger" : "", onclick: () => void take(name, `${text} this comparison?`, text, warning) }, text));
  if (counts.failed > 0 && (state === "running" || state === "paused")) {
    buttons.unshift(h("button", { type: "button", onclick: () => void take("retry") }, "Retry what failed"));
  }
  return buttons;
}

/** @param {string} name @param {string} [question] @param {string} [text] @param {string} [warning] */
async function take(name, question = "", text = "", warning) {
  if (warning !== undefined && !(await confirmed(question, warning, text))) return;
  rounds.stop(); // or it would ask for what is being deleted
  try {
    const answer = await request(name === "delete" ? path : `${path}/${name}`, { method: name === "delete" ? "DELETE" : "POST" });
    if (name === "delete") return location.assign(`${root}comparisons`);
    if (name === "clone") return location.assign(`${root}comparisons/${answer.id}`);
    say(`Done: ${name}.`);
    delete shown.note; // what was refused before is over
  } catch (error) {
    fill(note, problemLine(error));
  }
  rounds = poll(round, EVERY_MS);
}

/** @param {string} question @param {string} warning @param {string} yes @returns {Promise<boolean>} */
function confirmed(question, warning, yes) {
  const dialog = /** @type {HTMLDialogElement} */ (find("#confirm"));
  find("h2", dialog).textContent = question;
  find("p", dialog).textContent = warning;
  find("button[value=yes]", dialog).textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

/** @param {any[]} all */
function raters(all) {
  if (all.length === 0) return h("p", { class: "quiet" }, "Nobody yet. Each rater gets a link that opens this comparison and nothing else.");
  return h("table", {},
    h("thead", {}, h("tr", {}, ["Name", "Rated", ""].map((name) => h("th", { scope: "col" }, name || h("span", { class: "visually-hidden" }, "Remove"))))),
    h("tbody", {}, all.map((rater) => h("tr", {},
      h("td", {}, rater.name, " ", rater.removed && h("span", { class: "tag" }, "removed"), rater.done && h("span", { class: "tag good" }, "done")),
      h("td", { class: "ready" }, h("progress", { max: rater.items || 1, value: rater.votes + rater.skipped, "aria-label": `Rated by ${rater.name}` }),
        h("span", { class: "number small" }, `${rater.votes} of ${rater.items}`, rater.skipped > 0 && `, ${rater.skipped} skipped`)),
      h("td", { class: "number" }, !rater.removed && h("button", { type: "button", class: "link", "aria-label": `Remove ${rater.name}`, onclick: () => void remove(rater) }, "Remove"))))));
}

/** @param {any} rater */
async function remove(rater) {
  const warning = "The link stops to work at once. Votes given until now stay.";
  if (!(await confirmed(`Remove ${rater.name}?`, warning, "Remove"))) return;
  try {
    await request(`${path}/raters/${rater.id}`, { method: "DELETE" });
  } catch (error) {
    fill(find("#link"), problemLine(error));
  }
  rounds.now();
}

/** @param {SubmitEvent} event */
async function addRater(event) {
  event.preventDefault();
  const name = /** @type {HTMLInputElement} */ (find("#rater-name"));
  try {
    showLink(await request(`${path}/raters`, { method: "POST", body: { name: name.value } }));
    name.value = "";
  } catch (error) {
    fill(find("#link"), problemLine(error));
  }
  rounds.now();
}

/** @param {{name: string, url: string}} rater */
function showLink({ name, url }) {
  const field = h("input", { id: "rater-link", readonly: true, value: new URL(url, document.baseURI).href, onfocus: () => field.select() });
  const copy = h("button", { type: "button", onclick: copying(() => field.value) }, "Copy");
  fill(find("#link"), h("div", { class: "notice" }, h("label", { for: "rater-link" }, `Link for ${name}`), h("div", { class: "row" }, field, copy),
    h("p", { class: "hint" }, "It is shown this once. Whoever has it votes as this person.")));
  field.focus();
}

/** @param {any} comparison */
function design(comparison) {
  const { settings, rating, candidate } = comparison;
  const own = { ...settings, ...Object.fromEntries(Object.entries(candidate).filter(([, value]) => value !== null)) };
  const run = (/** @type {any} */ each) => `${each.num_inference_steps} steps, guidance ${each.guidance_scale}`;
  const differs = run(own) !== run(settings) && `; the candidate's ${run(own)}`;
  const facts = {
    Reference: contenderName(comparison.reference, comparison.candidate),
    Candidate: contenderName(comparison.candidate, comparison.reference),
    Videos: `${settings.size}, ${settings.num_frames} frames, ${run(settings)}${differs || ""}`,
    Criteria: comparison.criteria.map((/** @type {string} */ each) => each.replaceAll("_", " ")).join(", "),
    Margin: `${Math.round(1000 * comparison.margin) / 10} points, ties ${comparison.ties === "half" ? "count half" : "are left out"}`,
    Level: `${exactPercent(comparison.alpha)} one-sided, power ${exactPercent(comparison.power)}`,
    Raters: `${rating.training} training, ${rating.gold} gold and ${rating.identical} identical pairs, ${exactPercent(rating.repeat_share)} shown twice, `
      + (rating.per_rater ? `${rating.per_rater} pairs each` : "all pairs each")
      + (rating.least_seen > 0 ? `; a vote counts from ${exactPercent(rating.least_seen)} of both videos' frames seen` : ""),
  };
  return Object.entries(facts).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);
}

async function showPairs() {
  const failed = /** @type {HTMLInputElement} */ (find("#only-failed")).checked;
  pairs = [];
  cursor = null;
  for (let page = 0; page < pages; page += 1) {
    const answer = await request(`${path}/pairs${cursor ? `?cursor=${encodeURIComponent(cursor)}` : ""}`);
    pairs.push(...answer.pairs);
    cursor = answer.next_cursor;
    if (!cursor) break;
  }
  find("#more").hidden = !cursor;
  const rows = pairs.filter((pair) => !failed || pair.state === "failed");
  redraw("pairs", rows, (part) => fill(part, rows.length === 0 ? h("p", { class: "quiet" }, failed ? "No pair failed." : "No pair yet.")
    : table(["#", "Prompt", "Seed", "Reference", "Candidate", "State"], rows.map(pairRow))));
}

/** @param {any} pair */
function pairRow(pair) {
  const looks = { ready: "good", running: "active", failed: "bad" };
  const half = (/** @type {string} */ title, /** @type {any} */ { job_id: job, state, failure }) => cell(title,
    job ? h("a", { href: `${root}jobs/${job}` }, state) : state, failure && h("div", { class: "small failure" }, failure.detail));
  return h("tr", {}, cell("#", pair.number), cell("Prompt", pair.kind !== "test" && h("span", { class: "tag" }, pair.kind), " ", pair.prompt),
    cell("Seed", pair.seed), half("Reference", pair.reference), half("Candidate", pair.candidate),
    cell("State", h("span", { class: `tag ${looks[/** @type {keyof typeof looks} */ (pair.state)] ?? ""}` }, pair.state),
      pair.failure && h("div", { class: "small failure" }, pair.failure.detail)));
}

find("#add").addEventListener("submit", addRater);
find("#only-failed").addEventListener("change", () => rounds.now());
find("#more").addEventListener("click", () => {
  pages += 1;
  rounds.now();
});
rounds = poll(round, EVERY_MS);
