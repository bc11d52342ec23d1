/** Shows the jobs of who is signed in, newest first: pictures that lead to the pages of the jobs. */

import { poll, request, root } from "../api.js";
import { fill, find, h, moment, problemLine, whoAmI } from "../shell.js";

/** @typedef {import("./job_stream.js").Job} Job */

const PAGE = 24;
const STATES = ["queued", "running", "succeeded", "failed", "cancelled"];
/** @type {Record<string, string>} */
const COLOURS = { succeeded: "good", failed: "bad", running: "active", queued: "", cancelled: "" };

const list = find("#gallery-list");
const more = /** @type {HTMLButtonElement} */ (find("#gallery-more"));
const empty = find("#gallery-empty");
const state = /** @type {HTMLSelectElement} */ (find("#gallery-state"));
const mode = /** @type {HTMLSelectElement} */ (find("#gallery-mode"));

/** @type {Map<string, Job>} the jobs that are shown, by id */
const shown = new Map();
/** @type {Map<string, {element: HTMLElement, drawn: string}>} */
const tiles = new Map();
/** @type {string | null} */
let cursor = null;
let filtered = "";
let owner = "";

fill(state, h("option", { value: "" }, "All states"), STATES.map((each) => h("option", { value: each }, each)));

/** Offer modes to filter by. @param {string[]} modes */
export function offerModes(modes) {
  const chosen = mode.value;
  fill(mode, h("option", { value: "" }, "All modes"), modes.map((each) => h("option", { value: each }, each)));
  mode.value = modes.includes(chosen) ? chosen : "";
}

/** @param {string | null} from @returns {Promise<{jobs: Job[], next_cursor: string | null}>} */
async function page(from) {
  owner ||= ((await whoAmI) ?? await request("session")).name;
  const query = new URLSearchParams({ limit: String(PAGE), owner });
  if (state.value) query.set("state", state.value);
  if (mode.value) query.set("mode", mode.value);
  if (from) query.set("cursor", from);
  return request(`jobs?${query}`);
}

async function refresh() {
  const wanted = `${state.value} ${mode.value}`;
  const answer = await page(null);
  if (wanted !== `${state.value} ${mode.value}`) return; // asked again meanwhile
  // What was fetched by "Show more" stays; jobs that left the first page by a filter go.
  const oldest = answer.jobs.at(-1)?.created_at ?? "";
  const kept = wanted === filtered && answer.next_cursor ? [...shown.values()].filter((job) => job.created_at < oldest) : [];
  if (kept.length === 0) cursor = answer.next_cursor;
  filtered = wanted;
  shown.clear();
  for (const job of [...answer.jobs, ...kept]) shown.set(job.id, job);
  draw();
}

async function fetchMore() {
  more.disabled = true;
  try {
    const answer = await page(cursor);
    cursor = answer.next_cursor;
    for (const job of answer.jobs) shown.set(job.id, job);
    draw();
  } catch (error) {
    fill(empty, problemLine(error));
    empty.hidden = false;
  } finally {
    more.disabled = false;
  }
}

function draw() {
  for (const [id, tile] of tiles) {
    if (!shown.has(id)) {
      tile.element.remove();
      tiles.delete(id);
    }
  }
  let before = null;
  for (const job of shown.values()) {
    const drawn = JSON.stringify([job.state, job.video?.deleted_at, moment(job.created_at).textContent]);
    let tile = tiles.get(job.id);
    if (tile === undefined) tiles.set(job.id, tile = { element: h("li"), drawn: "" });
    if (tile.drawn !== drawn) {
      drawTile(tile.element, job);
      tile.drawn = drawn;
    }
    // Moved only if it is elsewhere: moving takes the focus away.
    const next = /** @type {Element | null} */ (before === null ? list.firstElementChild : before.nextElementSibling);
    if (next !== tile.element) list.insertBefore(tile.element, next);
    before = tile.element;
  }
  const none = shown.size === 0 && cursor === null;
  empty.hidden = !none;
  if (none) fill(empty, filtered.trim() ? "No video of yours is like this." : "Your videos will be listed here, also after you have closed this page.");
  more.hidden = cursor === null;
}

/** @param {HTMLElement} element @param {Job} job */
function drawTile(element, job) {
  const src = job.video?.thumbnail_url && !job.video.deleted_at ? `${root}jobs/${job.id}/thumbnail.webp` : null;
  const [width, height] = job.request.size.split("x");
  const instead = job.state === "succeeded" ? (job.video.deleted_at ? "expired" : "no picture") : job.state;
  const blank = () => h("span", { class: "thumb-text" }, instead);
  const picture = src === null ? blank() : h("img", { src, alt: "", loading: "lazy", width, height });
  picture.addEventListener("error", () => picture.replaceWith(blank()));
  const prompt = h("span", { class: "thumb-prompt" }, job.request.prompt);
  const link = element.querySelector("a");
  if (link) fill(link, h("span", { class: "thumb" }, picture), prompt);
  else element.append(h("a", { href: `${root}jobs/${job.id}` }, h("span", { class: "thumb" }, picture), prompt), h("p", { class: "row small" }));
  fill(find("p", element), h("span", { class: "tag" }, job.request.mode),
    job.state !== "succeeded" && h("span", { class: `tag ${COLOURS[job.state]}` }, job.state),
    h("span", { class: "quiet" }, moment(job.created_at)));
}

document.addEventListener("signed-in", (event) => {
  owner = /** @type {CustomEvent<{name: string}>} */ (event).detail.name; // before the next round, which listens, too
});
document.addEventListener("signed-out", () => {
  shown.clear();
  draw();
  fill(empty, "Sign in to see your videos.");
});
const polling = poll(refresh, 10_000);
for (const filter of [state, mode]) filter.addEventListener("change", () => polling.now());
more.addEventListener("click", () => void fetchMore());
document.addEventListener("job", () => polling.now());
