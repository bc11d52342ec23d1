/**
 * The form of the first page. What can be asked for comes from `GET /models`, and what is refused from the service.
 *
 * The address keeps what is shown: `#ID,ID` are the jobs beside the form, `?from=ID` fills the form as that job was
 * asked for.
 */

import { Problem, poll, request } from "../api.js";
import { offerModes } from "./gallery.js";
import { JobCard, playTogether } from "./job_view.js";
import { unknownWords } from "./words.js";
import { followModes, outside, said, unguided } from "../mode_terms.js";
import { fill, find, h, problemLine } from "../shell.js";

/** @typedef {Record<string, any>} Model one of `GET /models` @typedef {import("../mode_terms.js").Mode} Mode */
/** @typedef {HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement} Field */

const ALL = "*";
const FIELDS = ["prompt", "size", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt", "seed"];
const form = find("#ask");
const submit = /** @type {HTMLButtonElement} */ (find("#generate"));
const chooser = /** @type {HTMLSelectElement} */ (find("#model"));
/** @type {Model[]} */
let models = [];
/** @type {Model | undefined} */
let model;
/** The modes to ask for, whose bounds the form has. @type {Mode[]} */
let picked = [];
let asking = false;
/** @type {JobCard[]} */
let cards = [];
/** What was sent last and not answered: sent again, it makes no second job. @type {{text: string, seed: number, keys: string[]} | null} */
let unanswered = null;

/** @param {string} name */
const field = (name) => /** @type {Field} */ (find(`#${name}`));
const modes = () => /** @type {Mode[]} */ (model?.modes ?? []);
const bounded = (/** @type {string} */ name) => /** @type {HTMLInputElement} */ (field(name));
/** @param {string} name */
const radio = (name) => /** @type {HTMLInputElement | null} */ (form.querySelector(`input[name="${name}"]:checked`))?.value ?? "";

async function readOffers() {
  const answer = await request("models");
  const known = JSON.stringify(models.map(offered));
  if (answer.models.length > 0 && JSON.stringify(answer.models.map(offered)) !== known) {
    models = answer.models;
    fill(chooser, models.map((each) => h("option", { value: each.name }, each.name)));
    find('[data-field="model"]').hidden = models.length < 2;
    showModel(models.find((each) => each.name === model?.name) ?? models[0]);
  }
  const none = answer.models.length === 0;
  find("#no-worker").hidden = !none;
  find("#no-worker").textContent = none ? "No worker is ready, so nothing can be made now. This page looks again every few seconds." : "";
  submit.disabled = none;
}

/** What of an offer the form depends on. @param {Model} offer */
const offered = ({ workers: _, ...offer }) => [offer, offer.modes.map((/** @type {Model} */ mode) => mode.name)];

/** Fill the form for a model; what is in it stays where the model allows it. @param {Model} chosen */
function showModel(chosen) {
  const first = model === undefined;
  const before = first || model?.name !== chosen.name ? null : values();
  const mode = radio("mode");
  model = chosen;
  chooser.value = chosen.name;
  fill(field("size"), chosen.sizes.map((/** @type {string} */ each) => h("option", {}, each)));
  const counts = [];
  for (let count = 4 * Math.ceil((chosen.min_frames - 1) / 4) + 1; count <= chosen.max_frames; count += 4) counts.push(count);
  fill(field("num_frames"), counts.map((count) => h("option", { value: count }, `${count} (${(count / chosen.fps).toFixed(1)} s)`)));
  find("#advanced").inert = false; // before, its values would be overwritten
  const names = modes().map(({ name }) => name);
  const choice = (/** @type {string} */ value, /** @type {string} */ text) => h("label", {}, h("input", { type: "radio", name: "mode", value }), text);
  fill(find("#modes"), names.map((/** @type {string} */ name) => choice(name, name)),
    names.length > 1 && choice(ALL, `${names.length === 2 ? "Both" : `All ${names.length}`}, side by side`));
  offerModes(names);
  setValues(before ?? {
    prompt: field("prompt").value || chosen.example_prompts[0] || "", size: chosen.default_size, num_frames: chosen.default_frames,
    num_inference_steps: "", guidance_scale: "", negative_prompt: chosen.default_negative_prompt,
  });
  setMode([...names, ALL].includes(mode) ? mode : chosen.default_mode);
  fill(find("#examples"), chosen.example_prompts.map((/** @type {string} */ prompt) => h("button", {
    type: "button", onclick: () => { setValues({ prompt }); clearRefusals(); },
  }, prompt)));
  find("#examples-title").hidden = chosen.example_prompts.length === 0;
  find("#vocabulary").hidden = chosen.vocabulary.length === 0;
  find("#prompt-template").textContent = chosen.prompt_template ? `Write: ${chosen.prompt_template}` : "";
  fill(find("#words"), chosen.vocabulary.flatMap((/** @type {{kind: string, phrases: string[]}} */ group) =>
    [h("dt", {}, group.kind), h("dd", {}, group.phrases.join(", "))]));
}

/** @returns {Record<string, string>} */
const values = () => Object.fromEntries(FIELDS.map((name) => [name, field(name).value]));

/** @param {Record<string, unknown>} wanted */
function setValues(wanted) {
  for (const name of FIELDS) if (wanted[name] !== undefined) field(name).value = String(wanted[name]);
  describe();
}

/** @param {string} mode */
function setMode(mode) {
  const input = form.querySelector(`input[name="mode"][value="${CSS.escape(mode)}"]`);
  if (input instanceof HTMLInputElement) input.checked = true;
  followMode();
}

/** Bound the form by the mode that is picked, or by all of them. */
function followMode() {
  const now = modes().filter(({ name }) => [name, ALL].includes(radio("mode")));
  followModes(bounded, now, picked);
  picked = now;
  field("negative_prompt").disabled = now.every(unguided);
  describe();
}

/** Say what the form's values mean: limits, words that the model does not know, settings. */
function describe() {
  if (model === undefined) return;
  const { prompt, size, num_frames: frames, num_inference_steps: steps, guidance_scale: guidance, seed } = values();
  const length = [...prompt].length;
  const tokens = model.max_prompt_tokens ? `, at most ${model.max_prompt_tokens} tokens` : "";
  find("#prompt-limit").textContent = `${length} of ${model.max_prompt_chars} characters${tokens}`;
  find("#prompt-limit").classList.toggle("over", length > model.max_prompt_chars);
  const unknown = unknownWords(prompt, model);
  find("#prompt-words").textContent = unknown.length === 0 ? ""
    : `Not among the words that this model was trained on: ${unknown.join(", ")}. It will draw something of its own world.`;
  const mode = radio("mode");
  find("#mode-hint").textContent = mode === ALL ? "The same seed in each mode, played next to each other."
    : model.modes.find((/** @type {Model} */ each) => each.name === mode)?.description ?? "";
  const fixed = radio("seed-kind") === "fixed";
  field("seed").disabled = !fixed;
  find("#settings").textContent = `${size}, ${frames} frames, ${said(steps)} steps, guidance ${said(guidance)}, ${fixed ? `seed ${seed}` : "random seed"}`;
  find("#negative-hint").hidden = Number(guidance) !== 1 || field("negative_prompt").value === "";
}

/** A number if it is one; the service says what is wrong with anything else. @param {string} text */
function number(text) {
  if (text.trim() === "") return undefined;
  return Number.isFinite(Number(text)) && !/^\d{16,}$/.test(text.trim()) ? Number(text) : text.trim();
}

/** @param {number} count */
const drawn = (count) => [...crypto.getRandomValues(new Uint32Array(count))];

/** @param {Event} event */
async function ask(event) {
  event.preventDefault();
  if (asking) return; // not by disabling the button, which would lose the focus
  clearRefusals();
  const { prompt, size, negative_prompt, ...numbers } = values();
  const refused = picked.length > 1 ? outside(bounded, picked) : [];
  if (refused.length > 0) return refuse(new Problem(422, "", { errors: refused }));
  const fixed = radio("seed-kind") === "fixed";
  const text = JSON.stringify([values(), picked.map(({ name }) => name), fixed, chooser.value]);
  if (unanswered?.text !== text) {
    unanswered = { text, seed: drawn(1)[0], keys: picked.map(() => drawn(4).map((each) => each.toString(16).padStart(8, "0")).join("")) };
  }
  const seed = fixed ? number(numbers.seed) ?? "" : unanswered.seed;
  const body = {
    model: chooser.value, prompt, size, seed, num_frames: number(numbers.num_frames),
    num_inference_steps: number(numbers.num_inference_steps), guidance_scale: number(numbers.guidance_scale),
  };
  asking = true;
  const made = [];
  try {
    for (const [index, mode] of picked.entries()) {
      const headers = { "Idempotency-Key": unanswered.keys[index] };
      const own = { mode: mode.name, negative_prompt: unguided(mode) ? undefined : negative_prompt };
      made.push((await request("generate", { method: "POST", body: { ...body, ...own }, headers })).id);
    }
    unanswered = null;
  } catch (error) {
    refuse(error);
  } finally {
    asking = false;
  }
  if (made.length > 0) show(made);
}

/** Show what was refused next to the fields that it is about. @param {unknown} error */
function refuse(error) {
  if (!(error instanceof Problem)) throw error;
  const rest = [];
  for (const each of error.errors) {
    const place = form.querySelector(`[data-field="${CSS.escape(each.field)}"]`);
    const input = place?.querySelector("input:not([type=radio]), select, textarea") ?? place?.querySelector("input");
    if (!place || !input) { rest.push(each.detail); continue; }
    const id = `refused-${each.field}`;
    place.append(h("p", { class: "field-error", id }, each.detail.replace(`${each.field} is `, "This is ")));
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-errormessage", id);
    const around = place.closest("details");
    if (around) around.open = true;
  }
  const refused = /** @type {HTMLElement | null} */ (form.querySelector('[aria-invalid="true"]'));
  refused?.focus();
  if (refused && rest.length === 0) return;
  const again = error.retryAfterS ? ` Try again in ${error.retryAfterS} s.` : "";
  const shown = new Problem(error.status, (rest.join(" ") || error.message) + again);
  fill(find("#refusal"), problemLine(shown));
}

function clearRefusals() {
  for (const each of form.querySelectorAll(".field-error")) each.remove();
  for (const each of form.querySelectorAll("[aria-invalid]")) {
    each.removeAttribute("aria-invalid");
    each.removeAttribute("aria-errormessage");
  }
  fill(find("#refusal"));
}

/** Show these jobs beside the form, in place of those before. @param {string[]} ids */
function show(ids) {
  history.replaceState(null, "", `${location.pathname}#${ids.join(",")}`);
  for (const card of cards) card.remove();
  cards = ids.map((id) => new JobCard(id, { modes: ids.length > 1 ? () => [] : modes, onTwin: (twin) => show([...ids, twin]) }));
  fill(find("#cards"), cards.map((card) => card.element));
  find("#cards").classList.toggle("several", cards.length > 1);
  fill(find("#pair-tools"), cards.length > 1 && playTogether(find("#cards")));
  if (find("#cards").getBoundingClientRect().top > innerHeight * 0.7) cards[0].element.scrollIntoView({ block: "start" });
}

/** Fill the form as a job was asked for. @param {string} id @param {boolean} fix whether its seed is to be used again */
async function fillFrom(id, fix) {
  const job = await request(`jobs/${id}`).catch((error) => { if (error.status !== 404) throw error; });
  if (!job) return;
  const offer = models.find((each) => each.name === job.request.model);
  if (offer && offer !== model) showModel(offer);
  setMode(job.request.mode);
  if (fix) /** @type {HTMLInputElement} */ (find('input[name="seed-kind"][value="fixed"]')).checked = true;
  const was = job.request, unguided = was.guidance_scale === 1 && was.negative_prompt === "";
  // A video without guidance has no negative prompt; in a mode with guidance the model's is wanted again.
  setValues(unguided ? { ...was, negative_prompt: model?.default_negative_prompt ?? "" } : was);
}

form.addEventListener("submit", (event) => void ask(event));
form.addEventListener("input", ({ target }) => (target instanceof HTMLInputElement && target.name === "mode" ? followMode() : describe()));
chooser.addEventListener("change", () => showModel(models.find((each) => each.name === chooser.value) ?? models[0]));
const shownFirst = location.hash.slice(1).split(",").filter((id) => /^[0-9a-f]{32}$/.test(id));
if (shownFirst.length > 0) show(shownFirst);
const from = new URLSearchParams(location.search).get("from");
let filled = false;
poll(async () => {
  await readOffers();
  if (filled || models.length === 0) return;
  if (from !== null) await fillFrom(from, true);
  else if (shownFirst.length > 0) await fillFrom(shownFirst[0], false);
  filled = true;
}, 5000);
