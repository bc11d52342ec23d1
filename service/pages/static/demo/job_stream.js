/** Follows jobs to their end by the one event stream that a page has, and says in a line how far they are. */

import { Problem, read, request, root, tell } from "../api.js";
import { duration, size } from "../shell.js";

/** @typedef {Record<string, any>} Job what `GET /jobs/{id}` answers; `preview` is the number of its newest preview */

/** @type {[string, string, string][]} the stages in their order, as a short name and as a sentence */
export const STAGES = [
  ["text_encoder", "Prompt", "Reading the prompt"],
  ["denoise", "Denoise", "Denoising"],
  ["vae", "Decode", "Decoding the frames"],
  ["mp4", "Save", "Saving the video"],
];

/** @param {Job} job */
export const ended = (job) => ["succeeded", "failed", "cancelled"].includes(job.state);

/** @type {EventSource | null} the one stream of this page; jobs without it are asked for every two seconds */
let stream = null;

/**
 * Follow a job to its end, across losses of the connection, of the service and of the session.
 *
 * @param {string} id
 * @param {(job: Job) => void} show called with the job, and again whenever something in it has changed
 * @param {(problem: Problem) => void} lose called if there is no such job
 * @returns {() => void} stops
 */
export function follow(id, show, lose) {
  /** @type {Job | null} */ let job = null;
  /** @type {EventSource | null} */ let source = null;
  let timer = 0, drawing = 0, failures = 0, heard = 0, over = false;

  const draw = () => {
    // Past events come all at once: shown is what they lead to.
    drawing ||= setTimeout(() => { drawing = 0; if (job !== null) show(job); }, 40);
  };
  const close = () => {
    source?.close();
    if (stream === source) stream = null;
    source = null;
  };
  const pause = () => { clearTimeout(timer); close(); };
  /** @param {PageTransitionEvent} event */
  const resume = (event) => { if (event.persisted) void ask(); };
  const stop = () => {
    over = true;
    pause();
    document.removeEventListener("signed-in", ask);
    removeEventListener("pagehide", pause);
    removeEventListener("pageshow", resume);
  };
  async function ask() {
    clearTimeout(timer);
    if (over) return;
    let waitS = 2;
    try {
      const before = heard;
      const found = await request(`jobs/${id}`);
      if (over) return;
      // What came by the stream meanwhile is newer.
      job = heard === before || job === null ? found : { ...job, cancel_requested: found.cancel_requested };
      failures = 0;
      draw();
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      if (error.status === 404 || error.status === 422) { stop(); lose(error); return; }
      if (error.status === 401) return close(); // goes on with "signed-in"
      waitS = error.retryAfterS ?? Math.min(2 ** ++failures, 15);
    }
    if (job !== null && ended(job)) return stop();
    if (job !== null && failures === 0 && stream === null) open();
    if (source === null || failures > 0) timer = setTimeout(ask, waitS * 1000);
  }
  function open() {
    const opened = stream = source = new EventSource(`${root}jobs/${id}/events`);
    for (const kind of ["state", "progress", "queue", "preview"]) {
      opened.addEventListener(kind, (event) => { if (source === opened) hear(kind, read(event.data)); });
    }
    opened.addEventListener("open", () => tell(true));
    opened.addEventListener("error", () => {
      // The browser connects again by itself, unless the service refused; asking says what is wrong.
      if (opened.readyState === EventSource.CLOSED && source === opened) close();
      clearTimeout(timer);
      timer = setTimeout(ask, 500);
    });
  }
  /** @param {string} kind @param {Record<string, any>} event */
  function hear(kind, event) {
    heard += 1;
    if (kind === "queue") job = { ...job, queue: event };
    else if (event.job) job = event.job;
    else job = { ...job, state: event.state, attempts: event.attempts, progress: event.progress };
    if (kind === "preview" && event.preview) job = { ...job, preview: event.preview };
    draw();
    if (kind === "state" && !event.job) { // which does not say whether it is to be cancelled
      clearTimeout(timer);
      timer = setTimeout(ask, 200);
    }
    if (job !== null && ended(job)) stop();
  }
  document.addEventListener("signed-in", ask);
  addEventListener("pagehide", pause);
  addEventListener("pageshow", resume);
  void ask();
  return stop;
}

/**
 * Say where a job stands.
 *
 * @param {Job} job
 * @param {number} left the seconds until it starts or ends, if that is known
 */
export function standing(job, left) {
  if (job.state === "queued") {
    const before = job.queue?.position ?? null;
    const place = before === null ? "Waiting" : before === 0 ? "Next in line" : `Waiting: ${before} ${before === 1 ? "job" : "jobs"} before it`;
    return place + (job.queue?.starts_in_s != null && left > 0 ? `, starts in about ${duration(left)}` : "");
  }
  if (job.state === "running") {
    if (job.cancel_requested) return "Stopping after this step…";
    const { stage, step, steps, seconds_left: known } = job.progress ?? {};
    const name = STAGES.find(([each]) => each === stage)?.[2] ?? "Starting";
    const count = stage === "denoise" ? `, step ${step} of ${steps}` : "";
    const again = job.attempts > 1 ? ` (attempt ${job.attempts})` : "";
    const end = known == null ? "" : left > 0 ? ` · about ${duration(left)} left` : " · almost done";
    return name + count + again + end;
  }
  if (job.state !== "succeeded") return job.state === "cancelled" ? "Cancelled" : "Failed";
  const { width, height, num_frames: frames, fps, bytes } = job.video;
  return `Ready in ${duration(job.timings?.total_s ?? 0)} · ${width}x${height}, ${(frames / fps).toFixed(1)} s, ${size(bytes)}`;
}
