/** The list of comparisons, and the form that creates one. */

import { Problem, poll, request, root } from "../api.js";
import { contenderName, decisiveVotes, stateTag } from "./comparison_parts.js";
import { followModes } from "../mode_terms.js";
import { cell, fill, find, h, moment, problemLine, say, table } from "../shell.js";

/**
 * @typedef {import("../mode_terms.js").Mode} Mode
 * @typedef {{name: string, modes: Mode[], sizes: string[], default_size: string, min_frames: number, max_frames: number,
 *   default_frames: number, default_negative_prompt: string}} Model
 */

const form = /** @type {HTMLFormElement} */ (find("#create"));
const list = find("#list");
const opener = find("#new");
/** @type {{model: Model, mode: Mode}[]} what can be compared; options are numbers in it */
let contenders = [];
/** The modes that the bounds of steps and guidance are those of. @type {Mode[]} */
let picked = [];
let pages = 1;

/** The control of a name. @param {string} name @returns {HTMLInputElement} */
const field = (name) => find(`[name="${name}"]`, form);

async function showList() {
  const comparisons = [];
  let cursor = "";
  for (let page = 0; page < pages && cursor !== null; page += 1) {
    const answer = await request(`comparisons${cursor && `?cursor=${encodeURIComponent(cursor)}`}`);
    comparisons.push(...answer.comparisons);
    cursor = answer.next_cursor;
  }
  list.removeAttribute("aria-busy");
  if (comparisons.length === 0) {
    fill(list, h("p", { class: "empty" }, "No comparison yet. Make the first one: two modes, some prompts, and people who look."));
    return;
  }
  fill(list, h("div", { class: "card" }, table(["Comparison", "State", "Pairs ready", "Created"], comparisons.map(row))),
    cursor && h("button", { type: "button", onclick: () => { pages += 1; rounds.now(); } }, "Show older ones"));
}

/** @param {any} each */
function row(each) {
  const { counts } = each;
  const failed = counts.failed > 0 && h("span", { class: "tag bad" }, `${counts.failed} failed`);
  return h("tr", {},
    cell("Comparison", h("a", { href: `${root}comparisons/${each.id}` }, each.title), h("div", { class: "quiet small" },
      `${contenderName(each.candidate, each.reference)} against ${contenderName(each.reference, each.candidate)}`)),
    cell("State", stateTag(each)),
    cell("Pairs ready", h("div", { class: "ready" }, h("progress", { max: counts.pairs, value: counts.ready, "aria-label": "Pairs ready" }),
      h("span", { class: "number small" }, `${counts.ready} of ${counts.pairs} `), failed)),
    cell("Created", moment(each.created_at)));
}

/** @param {boolean} open */
async function openForm(open) {
  form.hidden = !open;
  opener.setAttribute("aria-expanded", String(open));
  if (!open) return opener.focus();
  field("title").focus();
  await loadModels();
}

async function loadModels() {
  if (contenders.length > 0) return;
  try {
    /** @type {{models: Model[]}} */
    const { models } = await request("models");
    contenders = models.flatMap((model) => model.modes.map((mode) => ({ model, mode })));
  } catch (error) {
    return fill(find("#refused"), problemLine(error));
  }
  fill(find("#refused"), contenders.length === 0 &&
    h("p", { class: "problem" }, "No worker is live, so there is no mode to compare. Start one, and open this form again."));
  const several = new Set(contenders.map(({ model }) => model.name)).size > 1;
  for (const name of ["reference", "candidate"]) {
    fill(field(name), contenders.map(({ model, mode }, number) =>
      h("option", { value: number }, several ? `${mode.name} · ${model.name}` : mode.name)));
  }
  const reference = Math.max(0, contenders.findIndex(({ mode }) => mode.name === "bf16"));
  field("reference").value = String(reference);
  field("candidate").value = String(contenders.findIndex((_, number) => number !== reference));
  showContenders();
}

/** Offer what the model of the reference has: sizes, bounds and defaults; of steps and guidance those of both modes. */
function showContenders() {
  for (const name of ["reference", "candidate"]) {
    const chosen = contenders[Number(field(name).value)];
    if (chosen) find(`#${name}-hint`).textContent = [chosen.mode.description, chosen.mode.warning].filter(Boolean).join(". ");
  }
  const both = ["reference", "candidate"].flatMap((name) => contenders[Number(field(name).value)]?.mode ?? []);
  if (both.length > 0) followModes(field, both, picked);
  picked = both;
  const model = contenders[Number(field("reference").value)]?.model;
  if (!model || form.dataset.model === model.name) return;
  form.dataset.model = model.name;
  fill(field("size"), model.sizes.map((size) => h("option", { value: size, selected: size === model.default_size }, size)));
  Object.assign(field("num_frames"), { min: model.min_frames, max: model.max_frames, step: 4, value: model.default_frames });
  field("negative_prompt").placeholder = model.default_negative_prompt;
}

/** Show the bounds and defaults of the advanced fields, in percent, as the API's own document has them. */
async function showDefaults() {
  const { schemas } = (await request("openapi.json")).components;
  for (const [name, { properties }] of Object.entries({ alpha: schemas.ComparisonBody, power: schemas.ComparisonBody, least_seen: schemas.RatingBody })) {
    const { minimum, maximum, default: usual } = properties[name];
    Object.assign(field(name), { min: 100 * minimum, max: 100 * maximum, placeholder: String(100 * usual) });
  }
}

/** What a field in percent holds, as a share. @param {string} name @returns {number | undefined} nothing for an empty field */
const share = (name) => (field(name).value === "" ? undefined : Math.round(field(name).valueAsNumber * 1000) / 100_000);

const lines = () => field("prompts").value.split(/\r?\n/).map((line) => line.trim()).filter(Boolean);
const isFile = () => field("source").checked === false;

/** A count of seeds, or the seeds. @returns {number | number[]} */
function seeds() {
  const numbers = field("seeds").value.split(/[\s,;]+/).filter(Boolean).map(Number);
  return field("seeds").value.includes(",") || numbers.length > 1 ? numbers : numbers[0] ?? 1;
}

function showPlan() {
  for (const part of form.querySelectorAll("[data-source]")) {
    if (part instanceof HTMLElement) part.hidden = (part.dataset.source === "file") !== isFile();
  }
  const given = seeds();
  const each = Array.isArray(given) ? given.length : given;
  const pairs = lines().length * each;
  find("#plan").textContent = isFile() ? "The prompts of the file are counted when it is read by the service."
    : Number.isFinite(pairs) && pairs > 0 ? `${lines().length} prompts × ${each} seeds = ${pairs} pairs, ${2 * pairs} videos.` : "No prompt yet.";
  const margin = field("margin").valueAsNumber / 100;
  const [alpha, power] = ["alpha", "power"].map((name) => (field(name).checkValidity() ? share(name) : undefined));
  find("#margin-hint").textContent = margin >= 0.01 && margin <= 0.49
    ? `The candidate may win ${(50 - 100 * margin).toFixed(1).replace(".0", "")} % and no less. Takes about ${decisiveVotes(margin, alpha, power).toLocaleString("en")} `
      + "decisive votes on each criterion if they were independent; twice to four times as many from real raters."
    : "From 1 to 49 points.";
}

/** The bytes of a file in base64, which keeps its encoding. @param {File} file */
async function base64(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 32_768) text += String.fromCharCode(...bytes.subarray(at, at + 32_768));
  return btoa(text);
}

/** @param {string} name @returns {number | undefined} nothing for an empty field */
const number = (name) => (field(name).value === "" ? undefined : field(name).valueAsNumber);

/** What is posted; the service checks it. */
async function body() {
  const [reference, candidate] = ["reference", "candidate"].map((name) => {
    const { mode, model } = contenders[Number(field(name).value)];
    return { mode: mode.name, model: model.name };
  });
  const file = field("file").files?.[0];
  return {
    title: field("title").value,
    reference,
    candidate,
    ...(isFile() ? { prompts_file: { name: file?.name ?? "", text_base64: file ? await base64(file) : "" } } : { prompts: lines() }),
    seeds: seeds(),
    settings: {
      size: field("size").value, num_frames: number("num_frames"), num_inference_steps: number("num_inference_steps"),
      guidance_scale: number("guidance_scale"), negative_prompt: field("negative_prompt").value || undefined,
    },
    criteria: [...form.querySelectorAll("[name=criteria]:checked")].map((box) => /** @type {HTMLInputElement} */ (box).value),
    margin: Math.round(field("margin").valueAsNumber * 10) / 1000,
    ties: field("ties").checked ? "half" : "left_out",
    alpha: share("alpha"),
    power: share("power"),
    rating: {
      training: number("training"), repeat_share: (number("repeats") ?? 0) / 100, identical: number("identical"), gold: number("gold"),
      per_rater: number("per_rater") ?? null, break_every: number("break_every"), least_seen: share("least_seen"), instructions: field("instructions").value.trim() || null,
    },
    pixel_measures: field("pixel_measures").checked,
  };
}

/** @param {SubmitEvent} event */
async function create(event) {
  event.preventDefault();
  const button = /** @type {HTMLButtonElement} */ (find("button[type=submit]", form));
  const refused = find("#refused");
  if (contenders.length === 0) return loadModels();
  if (isFile() && !field("file").files?.length) {
    return fill(refused, h("p", { class: "problem", role: "alert" }, "No file is chosen; choose one, or type the prompts."));
  }
  button.disabled = true;
  fill(refused);
  try {
    const { id } = await request("comparisons", { method: "POST", body: await body() });
    say("Created.");
    location.href = `${root}comparisons/${id}`;
  } catch (error) {
    const errors = error instanceof Problem ? error.errors : [];
    fill(refused, errors.length === 0 ? problemLine(error) : h("div", { class: "problem", role: "alert" },
      h("p", {}, "Nothing was created:"), h("ul", {}, errors.map(({ detail }) => h("li", {}, detail)))));
    for (const control of form.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
    for (const { field: name } of errors) {
      const control = form.querySelector(`[name="${name.startsWith("prompts_file") ? "file" : name.split(".").findLast((part) => isNaN(Number(part)))}"]`);
      control?.setAttribute("aria-invalid", "true");
    }
    refused.focus();
  } finally {
    button.disabled = false;
  }
}

opener.addEventListener("click", () => void openForm(form.hidden !== false));
find("#statistics").addEventListener("toggle", () => void showDefaults().catch((error) => fill(find("#refused"), problemLine(error))), { once: true });
find("#give-up").addEventListener("click", () => void openForm(false));
form.addEventListener("submit", create);
form.addEventListener("input", showPlan);
for (const name of ["reference", "candidate"]) field(name).addEventListener("change", showContenders);
showPlan();
const rounds = poll(async () => {
  try {
    await showList();
  } catch (error) {
    if (error instanceof Problem && error.status !== 0) fill(list, problemLine(error));
    throw error;
  }
}, 10_000);
