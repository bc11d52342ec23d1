/**
 * The session of a rater: opens by a link, shows one pair after the other, and sends the votes.
 *
 * It knows nothing of modes. What is answered is with the service, so that another device goes on where this one
 * stopped; what is not sent yet stays in the browser, so that a closed tab or an absent service loses nothing.
 */

import { Problem, insist } from "../api.js";
import { PairPlayer } from "../player/player.js";
import { VoteForm, keepDraft, readDraft, together } from "./rate_form.js";
import { askForKey, fill, find, h, say, whoAmI } from "../shell.js";

/**
 * @typedef {{done: number, items: number, training_left: number, break_due: boolean, waiting: boolean, undo: boolean}} Progress
 * @typedef {{url: string, width: number, height: number, fps: number, num_frames: number}} Side
 * @typedef {{item: string, number: number, kind: "training" | "rated", prompt: string, left: Side, right: Side, undo: boolean}} Item
 * @typedef {import("./rate_form.js").Draft} Draft
 * @typedef {import("../api.js").Session} Session
 */

const AGAIN_MS = 5000;
const USUAL = `You see two videos that were made for the same prompt. For each question, say which of them is better, or that there is no difference.
Watch both to the end. Play them as often as you like, slower, closer, or one at a time. Trust your eyes; nobody expects a certain answer.`;

const token = location.hash.slice(1);
let instructions = USUAL;
/** @type {import("./rate_form.js").Criterion[]} */
let criteria = [];
/** @type {Progress} */
let progress;
/** @type {Item | null} */
let item = null;
/** @type {PairPlayer | null} */
let player = null;
/** @type {Draft | null} the pair as it was before the page was loaded again */
let earlier = null;
/** @type {Draft | null} what was sent last, to start from if it is taken back */
let sent = null;
let joined = false;
let busy = false;

const form = new VoteForm(keep);

/** Show a text instead of a pair. @param {string} title @param {string} text @param {...HTMLElement} buttons */
function tell(title, text, ...buttons) {
  player?.destroy();
  player = item = null;
  find("#pair").hidden = true;
  const message = find("#message");
  message.hidden = false;
  fill(message, h("h2", {}, title), text.split("\n").map((each) => h("p", {}, each)), h("div", { class: "actions" }, buttons));
  (buttons[0] ?? message).focus();
}

/** @param {string} text @param {() => void} run @param {string} [look] */
const button = (text, run, look = "primary") => h("button", { type: "button", class: look, onclick: run }, text);

/** Ask until there is an answer. @param {string} path @param {{method?: string, body?: unknown}} [options] */
function ask(path, options = {}) {
  const then = options.method === "POST" ? "Your answer is kept, and sent again by itself." : "This page tries again by itself.";
  return insist(path, options, (why) => fill(find("#note"), why && h("p", { class: "notice warning" }, why, " ", then)));
}

/** Run what asks the service, and say what a rater can do if it refuses. @param {() => Promise<void>} run */
async function guarded(run) {
  if (busy) return;
  busy = true;
  form.enable(false, false);
  try {
    await run();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    recover(error);
  } finally {
    busy = false;
    form.enable(true, item?.undo ?? false);
  }
}

/** @param {Problem} error */
function recover(error) {
  if (error.status === 401 && token && joined) {
    joined = false; // the session has ended, and the link may open another
    setTimeout(open);
  } else if ([401, 403].includes(error.status) || (error.status === 404 && error.code !== "item_not_found")) {
    tell("This link does not open anything", "It was withdrawn, or it is not whole. Ask whoever sent it for another one. Votes that you have sent are kept.");
  } else if (error.status === 409 && error.body.state) setTimeout(() => void guarded(async () => void await look()));
  else if (error.status === 409 || error.status === 404) setTimeout(() => void guarded(next));
  else fill(find("#note"), h("p", { class: "problem", role: "alert" }, error.message));
}

/** @param {Session | null} session */
function start(session) {
  if (token && session && session.role !== "rater" && !session.open) {
    tell("Open this link as a rater?", `You are signed in as ${session.name}. That session of this browser ends if you rate.`, button("Rate with this link", open));
  } else if (!token && session?.role !== "rater") {
    tell("This page is opened by a link", "Ask whoever runs the comparison for a link of your own, or sign in with a rater's key.", button("Sign in", askForKey));
  } else open();
}

function open() {
  void guarded(async () => {
    if (token) await ask("rating/join", { method: "POST", body: { token } });
    joined = true;
    find("#who").hidden = token !== ""; // it says who had been signed in before
    if (!(await look())) return;
    if (progress.done > 0) await next();
    else showInstructions("Start");
  });
}

/** Read how the comparison stands; false, and told, if nothing can be rated now. */
async function look() {
  const rating = await ask("rating");
  ({ criteria } = rating.comparison);
  instructions = rating.comparison.instructions ?? USUAL;
  showProgress(rating.progress);
  if (rating.state === "open") return true;
  if (rating.state === "paused") {
    tell("Paused", "The comparison is paused; what you have answered is kept. This page goes on when the comparison does.");
    setTimeout(open, AGAIN_MS);
  } else tell("The comparison has ended", "It takes no more answers. Thank you for yours.");
  return false;
}

/** @param {string} text of the button */
function showInstructions(text) {
  const training = progress.training_left;
  tell("How it goes", instructions, button(text, () => void guarded(next)));
  find("#message .actions").before(
    h("ul", { class: "definitions" }, criteria.map(({ name, definition }) => h("li", {}, h("b", {}, name), " ", definition))),
    training > 0 ? h("p", {}, `Practice comes first: ${training === 1 ? "one pair that does" : `${training} pairs that do`} not count.`) : "");
}

/** @param {Progress} now */
function showProgress(now) {
  progress = now;
  Object.assign(find("#progress"), { hidden: false, max: Math.max(now.items, 1), value: now.done });
  find("#count").textContent = `${now.done} of ${now.items} rated`;
}

async function next() {
  const found = /** @type {Item | null} */ (await ask("rating/next"));
  if (found) return show(found);
  if (!(await look())) return;
  const undo = progress.undo ? [button("Undo the last", () => void guarded(undoLast), "")] : [];
  if (!progress.waiting) return tell("Thank you, that was all", `You have rated ${progress.done} pairs. You can close this page.`, ...undo);
  tell("More pairs are being made", "You have rated all that are ready. This page goes on by itself, or you come back later by your link.", ...undo);
  setTimeout(() => { if (!item) void guarded(next); }, AGAIN_MS);
}

/** @param {Item} found */
function show(found) {
  player?.destroy();
  item = found;
  const draft = readDraft();
  earlier = draft?.item === found.item ? draft : null;
  const answers = earlier ?? (sent?.item === found.item ? sent : null);
  find("#message").hidden = true;
  find("#pair").hidden = false;
  find("#pair").style.setProperty("--ratio", `${found.left.width} / ${found.left.height}`);
  fill(find("#prompt"), found.kind === "training" && h("span", { class: "tag active" }, "Practice, does not count"), " ", found.prompt);
  const { fps, num_frames: numFrames, width, height } = found.left;
  const own = player = new PairPlayer(find("#player"), {
    leftUrl: found.left.url, rightUrl: found.right.url, fps, numFrames, width, height, autoplay: true,
    onEvent: (event) => {
      if (event.type === "view") find("#pair").dataset.view = event.view;
      if (event.type === "error") showAgain(own);
    },
  });
  player.loop = true;
  form.begin(criteria, answers?.answers ?? {});
  player.keys.add(...form.keys(),
    { id: "send", label: "Send the vote", key: "Enter", run: () => void vote() },
    { id: "skip", label: "Skip this pair", key: "k", run: () => void send("skip", {}) },
    { id: "undo", label: "Undo the last vote or skip", key: "u", run: () => { if (item?.undo) void guarded(undoLast); } });
  form.hint(player.keys);
  if (find("#pair").getBoundingClientRect().top < 0) find("#pair").scrollIntoView();
  say(found.kind === "training" ? "Practice pair." : `Pair ${found.number}.`);
  void own.load().then((loaded) => { if (loaded && own === player) fill(find("#note")); });
}

/** @param {PairPlayer} own whose videos did not load, or broke off while they played */
function showAgain(own) {
  if (own !== player) return;
  fill(find("#note"), h("p", { class: "notice warning" }, "The videos do not play. This page tries again by itself."));
  setTimeout(() => {
    if (own !== player || !item) return;
    keep();
    show(item);
  }, AGAIN_MS);
}

const seen = () => together(/** @type {PairPlayer} */ (player).provenance(), earlier?.seen);

function keep() {
  if (item && player) keepDraft({ item: item.item, answers: form.answers, seen: seen() });
}

async function vote() {
  if (!item || form.open > 0) return;
  const unseen = seen().frames_seen.indexOf(0);
  if (unseen >= 0) return form.say(`Look at the ${["left", "right"][unseen]} video before you vote.`);
  await send("vote", { answers: form.answers, provenance: seen() });
}

/** @param {"vote" | "skip"} what @param {unknown} body */
async function send(what, body) {
  await guarded(async () => {
    if (!item) return;
    void player?.pause();
    keep();
    const draft = { item: item.item, answers: form.answers, seen: null };
    showProgress(await ask(`rating/items/${draft.item}/${what}`, { method: "POST", body }));
    sent = draft;
    forget();
    if (!progress.break_due) return next();
    tell("Time for a break", `You have rated ${progress.done} of ${progress.items} pairs. Look away for a few minutes: tired eyes miss things.`,
      button("Go on", () => void guarded(next)));
  });
}

async function undoLast() {
  showProgress(await ask("rating/undo", { method: "POST" }));
  forget();
  await next();
}

function forget() {
  item = null;
  keepDraft(null);
}

find("#vote").addEventListener("submit", (event) => {
  event.preventDefault();
  void vote();
});
find("#skip").addEventListener("click", () => void send("skip", {}));
find("#undo").addEventListener("click", () => void guarded(undoLast));
find("#help").addEventListener("click", () => player?.keys.help());
find("#read").addEventListener("click", () => { keep(); showInstructions("Back to the pair"); });
addEventListener("pagehide", keep);
addEventListener("hashchange", () => location.reload());
document.addEventListener("signed-in", (event) => start(/** @type {CustomEvent<Session>} */ (event).detail));
void whoAmI.then(start);
