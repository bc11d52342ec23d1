/**
 * The page for operators: workers, queue, jobs over time and failures. `keys.js` shows the API keys.
 *
 * All of it is asked for again every few seconds while the page is visible. What has the keyboard's focus keeps it.
 */

import { Problem, poll, request, root } from "../api.js";
import { ask, keepingFocus, showKeys } from "./keys.js";
import { cell, duration, fill, find, h, moment, problemLine, say, size, table, whoAmI } from "../shell.js";

const EVERY_MS = 3000;
const SERIES_EVERY_MS = 30_000;
const STAGES = { text_encoder: "encoding the text", denoise: "denoising", vae: "decoding", mp4: "writing the MP4" };
/** @type {Record<string, string>} */
const STATE_TAGS = { idle: "good", busy: "active", draining: "warn", drained: "warn", degraded: "bad", unknown: "bad" };
const AGES = { under_1_min: "under 1 min", under_10_min: "under 10 min", under_1_h: "under 1 h", over_1_h: "over 1 h" };

/** @type {ReturnType<typeof poll> | null} */
let polling = null;
let hours = 24;
let seriesAt = 0;
/** @type {any} */
let series = null;
/** @type {any[]} */
let plots = [];
let shownFailures = "";

async function round() {
  const waiting = /** @type {HTMLDetailsElement} */ (find("#waiting"));
  try {
    const jobs = waiting.open ? request("jobs?state=queued&limit=50") : null;
    const [fleet, failures, queued] = await Promise.all([request("workers"), request("failures"), jobs]);
    if (Date.now() - seriesAt > SERIES_EVERY_MS) {
      series = await request(`series?hours=${hours}`);
      seriesAt = Date.now();
      drawSeries();
    }
    find("#operations").hidden = false;
    fill(find("#fault"));
    keepingFocus(() => {
      showSummary(fleet, failures);
      fill(find("#workers"), fleet.workers.length === 0 ? noWorker() : workersTable(fleet.workers));
      showQueues(fleet.queues);
      if (queued !== null) fill(find("#waiting div"), waitingTable(queued.jobs));
    });
    showFailures(failures);
  } catch (error) {
    // That the service is away, or that nobody is signed in, is said by the frame of the page.
    if (error instanceof Problem && error.status !== 0 && error.status !== 401) fill(find("#fault"), problemLine(error));
    throw error;
  }
}

/** @param {any} fleet @param {any} failures */
function showSummary(fleet, failures) {
  const waiting = fleet.queues.reduce((/** @type {number} */ sum, /** @type {any} */ each) => sum + each.waiting, 0);
  const oldest = Math.max(0, ...fleet.queues.map((/** @type {any} */ each) => each.oldest_age_s));
  const taking = fleet.workers.filter((/** @type {any} */ each) => each.state === "idle" || each.state === "busy");
  const running = fleet.workers.filter((/** @type {any} */ each) => each.job_id !== null);
  const tile = (/** @type {string} */ title, /** @type {number} */ value, /** @type {string} */ note) =>
    h("li", {}, h("span", { class: "quiet small" }, title), h("strong", { class: "number" }, value), h("span", { class: "quiet small" }, note));
  fill(find("#summary"),
    tile("Waiting", waiting, waiting > 0 ? `the oldest for ${duration(oldest)}` : "nothing waits"),
    tile("Running", running.length, `on ${fleet.workers.length} ${fleet.workers.length === 1 ? "worker" : "workers"}`),
    tile("Workers that take jobs", taking.length, taking.length === fleet.workers.length ? "all of them" : `of ${fleet.workers.length}`),
    tile("Failed in 24 h", failures.total, failures.codes.length > 0 ? `most by ${failures.codes[0].code}` : "none"));
}

const noWorker = () => h("p", { class: "empty" }, "No worker is live, so nothing can be generated. Start one with ", h("code", {}, "python -m worker"), ".");

/** @param {any[]} workers */
function workersTable(workers) {
  return table(["Worker", "State", "Modes", "Job", "Memory", "Last sign", ""], workers.map(workerRow));
}

/** @param {any} worker */
function workerRow(worker) {
  const warnings = Object.entries(worker.modes).filter(([, mode]) => mode.warning !== null);
  const ends = worker.state === "draining" && worker.drain === null;
  const order = worker.drain === null ? "drain" : "resume";
  return h("tr", {},
    cell("Worker", h("strong", { class: "mono", title: worker.id }, worker.id.slice(-6)), h("div", { class: "small" }, worker.model), h("div", { class: "quiet small line" }, worker.device ?? "device unknown"), worker.jobs_done !== null && h("div", { class: "quiet small" }, `${worker.jobs_done} videos`)),
    cell("State", h("span", { class: `tag ${STATE_TAGS[worker.state]}` }, worker.state),
      worker.drain && h("div", { class: "quiet small" }, `by ${worker.drain.by}, `, moment(worker.drain.at)),
      ends && h("div", { class: "quiet small" }, "told to stop"),
      worker.fault && h("div", { class: "small bad-text" }, worker.fault),
      warnings.map(([name, mode]) => h("div", { class: "small warn-text" }, `${name}: ${mode.warning}`))),
    cell("Modes", Object.entries(worker.modes).map(([name, mode]) => h("div", { class: "line" }, name, mode.step_s === null ? null : h("span", { class: "quiet small" }, ` ${mode.step_s.toFixed(2)} s a step`)))),
    cell("Job", worker.job_id === null ? h("span", { class: "quiet" }, "none") : runningJob(worker)),
    cell("Memory", memory(worker)),
    cell("Last sign", worker.seen_at === null ? "unknown" : moment(worker.seen_at)),
    cell("", ends ? null : h("button", { type: "button", "data-key": `${order} ${worker.id}`, "aria-label": `${order} ${worker.id}`, onclick: (/** @type {Event} */ event) => act(event, `workers/${encodeURIComponent(worker.id)}/${order}`, "POST", `${worker.id}: ${order} ordered`) }, order === "drain" ? "Drain" : "Resume")));
}

/** @param {any} worker */
function runningJob(worker) {
  const job = worker.job;
  const link = jobLink(worker.job_id);
  if (job === null) return [link];
  const { progress } = job;
  const bar = progress && h("progress", { max: progress.steps, value: progress.step, "aria-label": `step of ${progress.stage}` });
  const stage = progress ? `${STAGES[/** @type {keyof typeof STAGES} */ (progress.stage)] ?? progress.stage} ${progress.step}/${progress.steps}` : "starting";
  const left = progress?.seconds_left == null ? "" : ` · ${duration(progress.seconds_left)} left`;
  return [
    h("div", { class: "row spread" }, h("span", { class: "line" }, link, ` of ${job.owner}`), cancelButton(worker.job_id)),
    h("div", { class: "quiet small" }, job.shape ? shapeText(job.shape) : ""),
    bar ?? h("progress", { max: 1, value: 0, "aria-label": "starting" }),
    h("div", { class: "quiet small number" }, stage + left),
  ];
}

/** @param {any} worker */
function memory(worker) {
  if (worker.memory_total_bytes === null) return h("span", { class: "quiet" }, "host memory");
  const { memory_allocated_bytes: used, memory_peak_bytes: peak, memory_total_bytes: total } = worker;
  return [
    h("meter", { min: 0, max: total, high: total * 0.95, value: used ?? 0, "aria-label": "memory in use" }),
    h("div", { class: "quiet small number" }, `${size(used ?? 0)} of ${size(total)}`, peak === null ? null : `, peak ${size(peak)}`),
  ];
}

/** @param {string} id */
const jobLink = (id) => h("a", { href: `${root}jobs/${id}`, class: "mono", title: id, "data-key": `job ${id}` }, id.slice(-8));

/** @param {any} shape */
const shapeText = (shape) => `${shape.mode} · ${shape.size}, ${shape.num_frames} frames${shape.guided ? "" : ", no guidance"}`;

/** @param {string} id */
function cancelButton(id) {
  const cancel = () => ask(`Cancel job ${id.slice(-8)}?`, [h("p", {}, "It ends without a video. Its record stays.")], "Cancel the job", async () => {
    await request(`jobs/${id}`, { method: "DELETE" });
    say(`Job ${id.slice(-8)} is cancelled`);
    polling?.now();
  }, true);
  return h("button", { type: "button", class: "danger small-button", "data-key": `cancel ${id}`, "aria-label": `Cancel job ${id.slice(-8)}`, onclick: cancel }, "Cancel");
}

/** @param {any[]} queues */
function showQueues(queues) {
  const rows = queues.flatMap((queue) => queue.shapes.map((/** @type {any} */ shape) => h("tr", {},
    cell("Mode", h("strong", {}, shape.mode), h("div", { class: "quiet small" }, shape.model, queue.workers === 0 && h("span", { class: "bad-text" }, " · no worker takes these"))),
    cell("Shape", `${shape.size}, ${shape.num_frames} frames`, !shape.guided && h("div", { class: "quiet small" }, "no guidance")),
    cell("Waiting", h("span", { class: "number" }, shape.waiting)),
    cell("Oldest", h("span", { class: "number" }, duration(shape.oldest_age_s))),
    cell("By age", h("div", { class: "ages" }, Object.entries(AGES).map(([name, text]) => shape.ages[name] > 0 && h("span", { class: `tag ${name === "over_1_h" ? "bad" : name === "under_1_h" ? "warn" : ""}` }, `${shape.ages[name]} ${text}`)))))));
  fill(find("#queues"), rows.length === 0 ? h("p", { class: "empty" }, "Nothing waits.") : table(["Mode", "Shape", "Waiting", "Oldest", "By age"], rows));
}

/** @param {any[]} jobs */
function waitingTable(jobs) {
  if (jobs.length === 0) return h("p", { class: "quiet" }, "None.");
  const place = (/** @type {any} */ job) => job.queue?.position ?? Infinity;
  const rows = jobs.sort((one, other) => place(one) - place(other)).map((job) => h("tr", {},
    cell("Place", h("span", { class: "number" }, job.queue?.position == null ? "–" : job.queue.position + 1)),
    cell("Job", jobLink(job.id), ` of ${job.owner}`),
    cell("Asked for", `${job.request.mode} · ${job.request.size}, ${job.request.num_frames} frames, ${job.request.num_inference_steps} steps`),
    cell("Created", moment(job.created_at)),
    cell("", cancelButton(job.id))));
  return [table(["Place", "Job", "Asked for", "Created", ""], rows), jobs.length === 50 && h("p", { class: "hint" }, "The newest 50 are shown.")];
}

/** @param {any} failures */
function showFailures(failures) {
  const text = JSON.stringify(failures.codes);
  if (text === shownFailures) return;
  shownFailures = text;
  const item = (/** @type {any} */ job) => h("li", {}, jobLink(job.id), ` of ${job.owner}, `, moment(job.failed_at), job.shape && h("span", { class: "quiet" }, ` · ${shapeText(job.shape)}`), h("div", { class: "quiet small" }, job.detail));
  fill(find("#failures"), failures.codes.length === 0 ? h("p", { class: "empty" }, "No job has failed.") : failures.codes.map((/** @type {any} */ each, /** @type {number} */ index) => h("details", { open: index === 0 },
    h("summary", {}, h("span", { class: "tag bad" }, `${each.number}`), ` ${each.code}`),
    h("ul", { class: "failed" }, each.jobs.slice(0, 20).map(item)), each.jobs.length > 20 && h("p", { class: "hint" }, `And ${each.jobs.length - 20} before them.`))));
}

/** @param {Event} event @param {string} path @param {string} method @param {string} done */
async function act(event, path, method, done) {
  const button = /** @type {HTMLButtonElement} */ (event.currentTarget);
  button.disabled = true;
  try {
    await request(path, { method });
    say(done);
  } catch (error) {
    fill(find("#fault"), problemLine(error));
  }
  polling?.now();
}

const Plot = /** @type {any} */ (globalThis).uPlot;

/** @param {string} name */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawSeries() {
  plots.forEach((plot) => plot.destroy());
  const { at, modes, step_s: stepS } = series;
  const sum = (/** @type {string} */ what) => at.map((/** @type {number} */ _, /** @type {number} */ index) => modes.reduce((/** @type {number} */ all, /** @type {any} */ mode) => all + mode[what][index], 0));
  const lastS = Math.min(stepS, Math.max(60, Date.now() / 1000 - at[at.length - 1])); // that step is under way
  const perMinute = (/** @type {number[]} */ values) => values.map((value, index) => (value * 60) / (index === at.length - 1 ? lastS : stepS));
  const total = (/** @type {string} */ what) => sum(what).reduce((/** @type {number} */ all, /** @type {number} */ one) => all + one, 0);
  find("#series-text").textContent = `In the last ${hours === 168 ? "7 days" : hours === 1 ? "hour" : `${hours} hours`}: ${total("succeeded")} succeeded, ${total("failed")} failed, ${total("cancelled")} cancelled.`;
  const ink = (/** @type {number} */ index) => colour(`--series-${(index % 2) + 1}`);
  const line = (/** @type {string} */ label, /** @type {string} */ stroke, more = {}) => ({ label, stroke, width: 2, points: { show: false }, ...more });
  const stepped = { paths: Plot.paths.stepped({ align: 1 }) };
  const dots = { spanGaps: true, points: undefined };
  plots = [
    plot("#throughput", at, [
      ...modes.map((/** @type {any} */ mode, /** @type {number} */ index) => [line(mode.mode, ink(index), { ...stepped, fill: index === 0 ? colour("--accent-soft") : undefined }), perMinute(mode.succeeded)]),
      [line("failed", colour("--bad"), stepped), perMinute(sum("failed"))],
      [line("cancelled", colour("--series-3"), { ...stepped, dash: [3, 3] }), perMinute(sum("cancelled"))],
    ]),
    plot("#times", at, modes.flatMap((/** @type {any} */ mode, /** @type {number} */ index) => [
      [line(`${mode.mode} run`, ink(index), dots), mode.run_s],
      [line(`${mode.mode} wait`, ink(index), { ...dots, dash: [4, 4] }), mode.wait_s],
    ])),
  ];
}

/** @param {string} where @param {number[]} at @param {any[][]} lines each with its options and values */
function plot(where, at, lines) {
  const box = find(where);
  fill(box);
  const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  const scales = { y: { range: (/** @type {any} */ _, /** @type {number} */ __, /** @type {number} */ most) => [0, Math.max(most || 0, 0.1) * 1.1] } };
  const clock = (/** @type {number} */ second) => new Date(second * 1000).toLocaleString([], hours > 24 ? { month: "short", day: "numeric" } : { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  const time = { ...axis, values: (/** @type {any} */ _, /** @type {number[]} */ ticks) => ticks.map(clock) };
  const when = { label: "Time", value: (/** @type {any} */ _, /** @type {number | null} */ at) => (at === null ? "–" : new Date(at * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" })) };
  const options = { width: box.clientWidth, height: 220, scales, axes: [time, { ...axis, size: 48 }], series: [when, ...lines.map(([each]) => each)], cursor: { drag: { x: false, y: false } } };
  return new Plot(options, [at, ...lines.map(([, values]) => values)], box);
}

const redraw = () => { if (series !== null) drawSeries(); };
find("#hours").addEventListener("click", (event) => {
  const button = /** @type {HTMLElement} */ (event.target).closest("button");
  if (button === null) return;
  hours = Number(button.dataset.hours);
  for (const each of document.querySelectorAll("#hours button")) each.setAttribute("aria-pressed", String(each === button));
  seriesAt = 0;
  polling?.now();
});
find("#waiting").addEventListener("toggle", () => polling?.now());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
new ResizeObserver(() => {
  if (plots.some((plot) => plot.width !== find("#throughput").clientWidth)) redraw();
}).observe(find("#throughput"));

const start = () => {
  polling = poll(round, EVERY_MS);
  showKeys();
};
if ((await whoAmI) === null) document.addEventListener("signed-in", start, { once: true });
else start();
