/** Fills the page of a job: the job, its twins in other modes beside it, and everything that makes it again. */

import { poll, request, root, written } from "../api.js";
import { ended } from "./job_stream.js";
import { JobCard, playTogether } from "./job_view.js";
import { inMode } from "../mode_terms.js";
import { copying, duration, fill, find, h, moment, size } from "../shell.js";

/** @typedef {import("./job_stream.js").Job} Job */

/** So many of the newest jobs in the other mode are looked through for a twin. */
const LOOKED_AT = 200;
const id = decodeURIComponent(location.pathname.split("/").at(-1) ?? "");
const cards = find("#cards");
const tools = find("#pair-tools");
/** @type {any} what is served now of the job's model */
let model = null;
let drawn = "";
/** @type {Set<string>} */
const shown = new Set();

/** Show another job beside this one. @param {string} twin */
function beside(twin) {
  if (shown.has(twin)) return;
  shown.add(twin);
  const card = new JobCard(twin, { modes: () => [], onTwin: () => {} });
  cards.append(card.element);
  cards.classList.add("several");
  tools.querySelector(`[data-twin="${twin}"]`)?.remove();
  tools.querySelector("[data-together]")?.remove();
  tools.prepend(playTogether(cards));
  card.element.focus({ preventScroll: true });
}

/** Offer the newest video of each other mode that was made by the same request, as far as modes allow. @param {Job} job */
async function offerTwins(job) {
  const own = modes().find(({ name }) => name === job.request.mode);
  for (const mode of modes().filter((each) => each.name !== job.request.mode)) {
    const wanted = Object.entries(inMode(job.request, own, mode));
    const isTwin = (/** @type {Job} */ each) => each.state === "succeeded" && !each.video.deleted_at
      && wanted.every(([name, value]) => each.request[name] === value || (name === "negative_prompt" && each.request.guidance_scale === 1));
    const query = new URLSearchParams({ mode: mode.name, owner: job.owner, limit: String(LOOKED_AT) });
    const twin = (await request(`jobs?${query}`)).jobs.find(isTwin);
    if (!twin || shown.has(twin.id) || tools.querySelector(`[data-twin="${twin.id}"]`)) continue;
    tools.append(h("button", { type: "button", "data-twin": twin.id, onclick: () => beside(twin.id) }, `Next to its twin in ${mode.name}`));
  }
}

/** @returns {import("../mode_terms.js").Mode[]} */
const modes = () => model?.modes ?? [];

/** @param {Job} job */
function curl(job) {
  const body = written(job.request).replaceAll("'", "'\\''");
  const address = new URL(`${root}generate`, location.href).href;
  return `curl -sS ${address} \\\n  -H "Authorization: Bearer $WAN_KEY" \\\n  -H 'Content-Type: application/json' \\\n  -d '${body}'`;
}

/** @param {Job} job @returns {[string, any][]} names and values; those without a value are left out */
function facts(job) {
  const { request: asked, video, timings, webhook } = job;
  const served = model?.modes.find((/** @type {{name: string}} */ each) => each.name === asked.mode);
  const seconds = (/** @type {number} */ value) => `${value.toFixed(2)} s`;
  const code = (/** @type {string | null | undefined} */ value) => value && h("code", {}, value);
  return [
    ["Prompt", asked.prompt],
    ["Negative prompt", asked.negative_prompt || "none"],
    ["Mode", served ? `${asked.mode}: ${served.description}` : asked.mode],
    ["Model", asked.model],
    ["Model as served now", code(model?.fingerprint)],
    ["Recipe as served now", code(served?.recipe_fingerprint)],
    ["Variant as served now", served?.variant],
    ["Size", asked.size],
    ["Frames", video ? `${asked.num_frames}, ${video.fps} a second` : asked.num_frames],
    ["Steps", asked.num_inference_steps],
    ["Guidance", asked.guidance_scale],
    ["Seed", code(String(asked.seed))],
    ["Job", code(job.id)],
    ["Owner", job.owner],
    ["Asked for", moment(job.created_at)],
    ["Started", job.started_at && moment(job.started_at)],
    ["Ended", job.finished_at && moment(job.finished_at)],
    ["Attempts", job.lost ? `${job.attempts}, of which ${job.lost} were lost with their worker` : job.attempts],
    ["Longest attempt allowed", duration(job.deadline_s)],
    ["Seconds", timings && `${seconds(timings.queue_s)} waiting, ${seconds(timings.text_encoder_s)} prompt, `
      + `${seconds(timings.denoise_s)} denoising, ${seconds(timings.vae_s)} decoding, ${seconds(timings.mp4_s)} saving`],
    ["File", video && `${video.width}x${video.height}, ${size(video.bytes)}`],
    ["SHA-256 of the file", code(video?.sha256)],
    ["SHA-256 of the frames", code(video?.frames_sha256)],
    ["Kept until", video && !video.deleted_at && moment(video.expires_at)],
    ["Deleted", video?.deleted_at && moment(video.deleted_at)],
    ...Object.entries(job.metadata).map(([name, value]) => /** @type {[string, string]} */ ([`Metadata: ${name}`, value])),
    ["Group", code(job.group)],
    ["Webhook", webhook && `${webhook.url}: ${webhook.state}`],
  ];
}

/** @param {Job} job */
function showFacts(job) {
  const text = JSON.stringify([job.state, job.attempts, model]);
  if (text === drawn) return;
  if (drawn === "") offers.now();
  drawn = text;
  find("#facts-card").hidden = false;
  fill(find("#facts"), facts(job).filter(([, value]) => value !== null && value !== undefined && value !== false && value !== "")
    .flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  find("#curl").textContent = curl(job);
  if (job.state === "succeeded") void offerTwins(job);
}

const card = new JobCard(id, { modes, onTwin: beside, onShow: showFacts });
shown.add(id);
cards.append(card.element);
find("#copy-curl").addEventListener("click", copying(() => find("#curl").textContent ?? ""));
const offers = poll(async () => {
  if (card.job === undefined) return;
  const name = card.job.request.model;
  const { models } = await request("models");
  model = models.find((/** @type {{name: string}} */ each) => each.name === name) ?? model;
  showFacts(card.job);
  card.redraw();
  if (model !== null && ended(card.job)) offers.stop();
}, 5000);
