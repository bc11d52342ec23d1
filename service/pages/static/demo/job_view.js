/** Shows a job: how far it is, live, then its video or why there is none, and what can be done with it. */

import { Problem, request, root } from "../api.js";
import { ended, follow, STAGES, standing } from "./job_stream.js";
import { inMode } from "../mode_terms.js";
import { copying, fill, h, problemLine, say } from "../shell.js";

/** @typedef {import("./job_stream.js").Job} Job */
/** @typedef {{modes: () => import("../mode_terms.js").Mode[], onTwin: (id: string) => void, onShow?: (job: Job) => void}} Place where a card is:
 * the modes that a job of its model may have, and who is told of a job made from it in another mode, and of changes */

/** @type {Record<string, [string, string]>} what each code of a job's `failure` means, and what to do about it */
const FAILURES = {
  generation_failed: ["The model could not make this video", "Try another seed. If that fails too, give the operators the job's id."],
  artifact_not_stored: ["The video was made, but could not be stored", "Generate it again: this seed gives the same video."],
  worker_lost: ["The workers that ran it stopped or crashed", "Generate it again. If it is lost again, ask for less and tell the operators."],
  worker_unfit: ["The workers that ran it were at fault", "Nothing is wrong with the request. Tell the operators; try again later."],
  out_of_device_memory: ["The device ran out of memory", "Fewer steps do not help: they take as much memory."],
  generation_timed_out: ["It took too long", "Ask for fewer steps, fewer frames or a smaller size."],
  prompt_too_long: ["The prompt is too long", "Shorten the prompt, or the negative prompt if that is the long one."],
  record_unreadable: ["The job cannot be read", "Another version of the service wrote it. Generate it again."],
  internal_error: ["Something went wrong inside the service", "Generate it again. If that fails too, give the operators the job's id."],
};
/** @type {Record<string, string>} */
const ON_SCREEN = { queued: "Waiting for a worker", running: "Making your video", failed: "No video", cancelled: "Cancelled" };
const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** One job on a page. `onTwin` is told the id of a job that was made from it in another mode. */
export class JobCard {
  /** @param {string} id @param {Place} place */
  constructor(id, place) {
    this.id = id;
    this.place = place;
    this.drawn = "";
    this.endsAt = 0;
    this.tries = 0;
    /** @type {Job | undefined} */ this.job = undefined;
    /** @type {unknown} */ this.previewed = null;
    this.offered = "";
    this.cancelled = false;
    this.screen = h("div", { class: "screen" }, h("p", { class: "screen-text" }, "Loading…"));
    this.title = h("p", { class: "job-title" }, " ");
    this.line = h("p", { class: "job-line number" }, " ");
    this.stages = h("ol", { class: "stages", "aria-hidden": "true" });
    this.bar = h("progress", { "aria-label": "Steps of this stage", max: 1, value: 0 });
    this.note = h("div", { class: "job-note" });
    this.actions = h("div", { class: "actions" });
    this.element = h("article", { class: "card job-card", "aria-label": "Job", tabindex: -1 },
      this.screen, this.title, this.line, this.stages, this.bar, this.note, this.actions);
    this.clock = setInterval(() => this.showLine(), 1000);
    this.stop = follow(id, (job) => this.show(job), (problem) => this.lose(problem));
  }

  remove() {
    this.stop();
    clearInterval(this.clock);
    this.element.remove();
  }

  /** @param {Problem} problem */
  lose(problem) {
    fill(this.screen, h("p", { class: "screen-text" }, problem.status === 404 ? "There is no such job" : "This job cannot be shown"));
    fill(this.note, problemLine(problem));
    for (const part of [this.title, this.line, this.stages, this.bar, this.actions]) part.hidden = true;
  }

  /** @param {Job} job */
  show(job) {
    if (this.cancelled) job = { ...job, cancel_requested: true }; // events know it only later
    this.job = job;
    const { mode, seed, prompt } = job.request;
    const [width, height] = job.request.size.split("x");
    this.screen.style.setProperty("aspect-ratio", `${width} / ${height}`);
    fill(this.title, h("span", { class: "tag active" }, mode), " ", prompt);
    this.element.setAttribute("aria-label", `${mode}, seed ${seed}: ${prompt}`);
    this.endsAt = Date.now() + (job.progress?.seconds_left ?? job.queue?.starts_in_s ?? 0) * 1000;
    const at = STAGES.findIndex(([name]) => name === job.progress?.stage);
    fill(this.stages, STAGES.map(([, name], index) => h("li", { class: index < at ? "done" : index === at ? "now" : "" }, name)));
    this.bar.value = job.progress ? job.progress.step / job.progress.steps : 0;
    this.stages.hidden = this.bar.hidden = ended(job);
    if (job.state === "running") this.preview(job);
    this.showLine();
    const drawn = `${job.state} ${job.cancel_requested} ${job.progress?.stage ?? ""}`;
    if (drawn !== this.drawn) {
      this.showState(job);
      this.drawn = drawn;
      say(`${mode}: ${this.line.textContent}`);
      document.dispatchEvent(new CustomEvent("job", { detail: job }));
    }
    this.place.onShow?.(job);
  }

  modeNames() {
    return this.place.modes().map(({ name }) => name).join();
  }

  /** Show the buttons anew, once it is known which modes there are. */
  redraw() {
    if (this.job === undefined || this.modeNames() === this.offered) return;
    fill(this.actions, this.buttons(this.job));
  }

  showLine() {
    const job = this.job;
    if (job === undefined) return;
    this.line.textContent = standing(job, Math.round((this.endsAt - Date.now()) / 1000));
  }

  /** @param {Job} job */
  preview(job) {
    const number = job.preview ?? (job.preview_url ? Number(new URL(job.preview_url).searchParams.get("number")) : null);
    if (number === null || number === this.previewed) return;
    this.previewed = number;
    const picture = new Image();
    picture.alt = "Preview: what the model has so far";
    picture.className = "preview";
    picture.addEventListener("load", () => {
      if (this.job?.state !== "running") return;
      fill(this.screen, calm.matches ? still(picture) : picture, h("span", { class: "screen-tag" }, "Preview"));
    });
    picture.src = `${root}jobs/${this.id}/preview.webp?number=${number}`;
  }

  /** @param {Job} job */
  showState(job) {
    const focused = this.actions.contains(document.activeElement);
    const failure = job.failure;
    if (job.state === "succeeded") {
      if (job.video.deleted_at) this.gone();
      else if (this.screen.querySelector("video") === null) this.play(job);
    } else if (this.screen.querySelector(".preview") === null || ended(job)) {
      fill(this.screen, h("p", { class: "screen-text" }, ON_SCREEN[job.state]));
    }
    const [what, remedy] = FAILURES[failure?.code] ?? FAILURES.internal_error;
    fill(this.note, failure && h("div", { class: "problem" }, h("p", {}, h("strong", {}, what), ` (${failure.code})`),
      h("p", {}, failure.detail), h("p", {}, remedy)),
    job.notes.map((/** @type {string} */ note) => h("p", { class: "hint" }, note)));
    fill(this.actions, this.buttons(job));
    const next = this.actions.querySelector("a, button:not(:disabled)");
    if (focused) (next instanceof HTMLElement ? next : this.element).focus();
  }

  /** @param {Job} job @returns {(Node | false)[]} */
  buttons(job) {
    const onPage = document.body.className === "job";
    if (!ended(job)) {
      return [h("button", { type: "button", class: "danger", disabled: job.cancel_requested, onclick: () => this.cancel() }, "Cancel"),
        !onPage && h("a", { class: "button", href: `${root}jobs/${job.id}` }, "Details")];
    }
    const has = job.state === "succeeded" && !job.video.deleted_at;
    this.offered = this.modeNames();
    const others = this.place.modes().map(({ name }) => name).filter((name) => name !== job.request.mode);
    return [
      has && h("a", { class: "button primary of-video", href: `${root}jobs/${job.id}/video.mp4`, download: `${job.id}.mp4` }, "Download"),
      has && h("button", {
        type: "button", class: "of-video", title: "It opens the video without a key until it expires", onclick: copying(() => job.video.url),
      }, "Copy link"),
      h("a", { class: "button", href: `${root}?from=${job.id}` }, "Again with this seed"),
      ...others.map((mode) => h("button", { type: "button", onclick: () => this.make(mode) }, `The same in ${mode}`)),
      !onPage && h("a", { class: "button", href: `${root}jobs/${job.id}` }, "Details"),
    ];
  }
  /** @param {Job} job */
  play(job) {
    const src = `${root}jobs/${job.id}/video.mp4`;
    const video = h("video", {
      src, controls: true, loop: true, playsinline: true, preload: "auto", "aria-label": job.request.prompt,
      poster: job.video.thumbnail_url && `${root}jobs/${job.id}/thumbnail.webp`,
    });
    video.muted = true;
    video.autoplay = !calm.matches;
    video.addEventListener("loadeddata", () => {
      const all = this.element.parentElement?.querySelectorAll("video") ?? [];
      if (all.length > 1 && !calm.matches) restart(all); // so that they run side by side
    });
    video.addEventListener("error", () => this.explain(src, job));
    fill(this.screen, video);
  }

  /** Say why a video does not load, and load it again once that is over. @param {string} src @param {Job} job */
  async explain(src, job) {
    const text = h("p", {}, "The video does not load. This page tries again by itself.");
    fill(this.screen, h("div", { class: "screen-text" }, text));
    const answer = await fetch(src, { headers: { Range: "bytes=0-0", Accept: "video/mp4, application/json" } }).catch(() => null);
    if (answer?.status === 410) return this.gone();
    if (answer?.status === 401) document.dispatchEvent(new CustomEvent("signed-out"));
    if (answer && !answer.ok) text.textContent = `${(await answer.json().catch(() => ({}))).detail ?? ""} This page tries again by itself.`;
    if (answer?.ok && this.tries++ > 2) { // what kept it away may just have ended, so not at once
      text.textContent = "This browser cannot play the video; download it instead.";
      return;
    }
    const again = () => { if (this.element.isConnected) this.play(job); };
    if (answer?.status === 401) document.addEventListener("signed-in", again, { once: true });
    else setTimeout(again, 4000);
  }

  gone() {
    fill(this.screen, h("p", { class: "screen-text" }, "The video is no longer stored. The same seed makes it again."));
    for (const each of this.actions.querySelectorAll(".of-video")) each.remove();
  }

  async cancel() {
    this.cancelled = await this.ask(() => request(`jobs/${this.id}`, { method: "DELETE" })) !== undefined;
  }

  /** Make the same in another mode. @param {string} mode */
  async make(mode) {
    const served = (/** @type {string} */ name) => this.place.modes().find((each) => each.name === name);
    const [asked, to] = [this.job?.request, served(mode)];
    if (!asked || !to) return;
    const made = await this.ask(() => request("generate", { method: "POST", body: inMode(asked, served(asked.mode), to) }));
    if (made) this.place.onTwin(made.id);
  }

  /** @param {() => Promise<Job>} change @returns {Promise<Job | undefined>} */
  async ask(change) {
    this.note.querySelector(".refusal")?.remove();
    try {
      const job = await change();
      if (job.id === this.id) this.show({ ...this.job, ...job });
      return job;
    } catch (error) {
      this.note.append(h("div", { class: "refusal" }, problemLine(error)));
      return undefined;
    }
  }
}

/** The first picture of a moving one. @param {HTMLImageElement} picture */
function still(picture) {
  const canvas = h("canvas", { class: "preview", role: "img", "aria-label": picture.alt, width: picture.naturalWidth, height: picture.naturalHeight });
  canvas.getContext("2d")?.drawImage(picture, 0, 0);
  return canvas;
}

/** Play videos from their start. @param {Iterable<HTMLVideoElement>} videos */
function restart(videos) {
  for (const video of videos) {
    video.currentTime = 0;
    video.play().catch(() => {}); // it was taken away meanwhile
  }
}

/** A button that plays all videos of a place from their start, so that they run side by side. @param {ParentNode} place */
export function playTogether(place) {
  const onclick = () => restart(place.querySelectorAll("video"));
  return h("button", { type: "button", "data-together": true, onclick }, "Play together from the start");
}
