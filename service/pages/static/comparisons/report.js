/** The report of a comparison: what the votes show, how far they can be trusted, and the pairs behind it. */

import { Problem, poll, request, root } from "../api.js";
import { contenderName, exactPercent, percent, plotRow, range, stateTag } from "./comparison_parts.js";
import { PairPlayer } from "../player/player.js";
import { fill, find, h, moment, problemLine } from "../shell.js";

/** @typedef {import("../shell.js").Child} Child */

const id = location.pathname.replace(/\/$/, "").split("/").at(-2) ?? "";
const path = `comparisons/${encodeURIComponent(id)}`;
const OUTCOMES = [["win", "wins"], ["tie", "ties"], ["loss", "losses"]];
const LOOKS = /** @type {Record<string, string>} */ ({ "non-inferior": "good", inferior: "bad", inconclusive: "warn" });
const MEASURES = /** @type {Record<string, [string, number]>} */ ({ psnr_db: ["PSNR, dB", 2], ssim: ["SSIM", 4] });

/** @param {string} title @param {...(Child | Child[])} children */
const card = (title, ...children) => h("section", { class: "card" }, h("h2", {}, title), ...children);
/** @param {string} text */
const hint = (text) => h("p", { class: "hint" }, text);
/** @param {string} verdict */
const verdictTag = (verdict) => h("span", { class: `tag ${LOOKS[verdict]}` }, verdict);
/** @param {number | null} p */
const pValue = (p) => (p === null ? "–" : p < 0.001 ? "< 0.001" : p.toFixed(3));
/** @param {number | null} value @param {number} [digits] */
const decimal = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace(/^-(0\.0*)$/, "$1"));

/** A table whose first cell of a row names it. @param {string[]} heads those of numbers begin with # @param {Child[][]} rows */
function table(heads, rows) {
  const look = (/** @type {number} */ column) => (heads[column].startsWith("#") ? "number" : "");
  // Wider than a phone: it scrolls by itself, and so has to take the focus.
  return h("div", { class: "table scrolled", tabindex: 0, role: "group", "aria-label": heads[0] }, h("table", {},
    h("thead", {}, h("tr", {}, heads.map((head, column) => h("th", { scope: "col", class: look(column) }, head.replace("#", ""))))),
    h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, column) =>
      (column === 0 ? h("th", { scope: "row", class: "name" }, cell) : h("td", { class: look(column) }, cell))))))));
}

/** @param {any} report */
function show({ comparison, pairs, answers, raters, prompts, result }) {
  document.title = document.title.replace(/^.*?(?= –)/, `Report: ${comparison.title}`);
  find("#title").textContent = comparison.title;
  const criteria = comparison.criteria.map((/** @type {any} */ each) => ({ ...each, ...result.criteria[each.id] }));
  const name = contenderName(comparison.candidate, comparison.reference);
  fill(find("#report"),
    conclusion(comparison, pairs, answers, raters, result),
    shares(criteria, comparison, name),
    outcomes(criteria, name),
    votesNeeded(criteria, comparison),
    differences(criteria),
    trust(criteria),
    people(raters, answers, criteria, result),
    Object.keys(result.measures).length > 0 && measures(result.measures),
    byPrompt(prompts, comparison, name));
}

/** A number with its noun. @param {number} number @param {string} one @param {string} several */
const count = (number, one, several = `${one}s`) => `${number} ${number === 1 ? one : several}`;

/** @param {any} comparison @param {any} pairs @param {any} answers @param {any[]} raters @param {any} result */
function conclusion(comparison, pairs, answers, raters, result) {
  const all = Object.values(pairs).reduce((sum, count) => sum + count, 0);
  const open = ["running", "paused"].includes(comparison.state);
  return h("section", { class: "card conclusion" },
    h("p", { class: "row" }, verdictTag(result.conclusion.verdict), stateTag(comparison)),
    h("p", { class: "sentence" }, result.conclusion.sentence),
    h("p", { class: "quiet small" }, `${count(answers.counted, "vote")} of ${count(raters.filter(({ votes }) => votes > 0).length, "rater")} on ${pairs.ready} of ${all} pairs, `,
      `${contenderName(comparison.candidate, comparison.reference)} against ${contenderName(comparison.reference, comparison.candidate)}, created `, moment(comparison.created_at), "."),
    open && h("p", { class: "notice" }, "Votes are still taken. Whoever looks again and again until the verdict pleases is wrong more often than the level says: close the comparison first."),
    h("p", { class: "actions" }, h("a", { class: "button", href: `${root}${path}/export.csv`, download: "" }, "Votes as CSV"),
      h("a", { class: "button", href: `${root}${path}/export.jsonl`, download: "" }, "as JSON lines"),
      h("button", { type: "button", onclick: () => print() }, "Print")));
}

/** @param {any[]} criteria @param {any} comparison @param {string} name */
function shares(criteria, { alpha, ties, margin }, name) {
  const limit = 0.5 - margin;
  const level = exactPercent(1 - 2 * alpha);
  const rows = criteria.map(({ name: criterion, share, verdict, sentence }) => {
    const { interval, value } = share;
    const lines = [{ class: "even", from: 0.5, y: 0, bottom: 10 }, { class: "limit", from: limit, y: 0, bottom: 10 }];
    if (interval) lines.push(/** @type {any} */ ({ class: `interval ${LOOKS[verdict]}`, from: interval.low, to: interval.high }));
    if (value !== null) lines.push({ class: "dot", from: value, y: 5, bottom: 5 });
    return [h("div", { class: "label" }, criterion), plotRow(sentence, lines),
      h("div", { class: "value" }, h("span", { class: "number" }, `${percent(value)} (${range(interval)}) `), verdictTag(verdict))];
  });
  return card(`How often ${name} won`, h("div", { class: "plots" }, rows.flat(), axis(limit)),
    hint(`The share of ${ties === "half" ? "votes, ties as half" : "decisive votes"}, with its ${level} interval, clustered by rater and prompt. ${name} is non-inferior `
      + `where the whole interval lies to the right of the dashed line, the limit of ${percent(limit, 1)} that was fixed beforehand.`),
    h("details", {}, h("summary", {}, "In words"), h("ul", {}, criteria.map(({ sentence }) => h("li", {}, sentence)))));
}

/** @param {number} [limit] */
function axis(limit) {
  const marks = [0, 0.25, 0.5, 0.75, 1].filter((at) => limit === undefined || Math.abs(at - limit) > 0.06).concat(limit ?? []);
  return h("div", { class: "axis", "aria-hidden": "true" }, marks.map((at) => {
    const mark = h("span", { class: at === limit ? "limit" : "" }, exactPercent(at));
    mark.style.setProperty("--at", String(at));
    return mark;
  }));
}

/** @param {any[]} criteria @param {string} name */
function outcomes(criteria, name) {
  const rows = criteria.map(({ name: criterion, outcomes: of }) => OUTCOMES.map(([outcome, several], number) => {
    const { votes, share, wilson } = of[outcome];
    const lines = [{ class: `bar ${outcome}`, from: 0, to: share ?? 0 }];
    if (wilson) lines.push({ class: "whisker", from: wilson.low, to: wilson.high });
    return [h("div", { class: number === 0 ? "label first" : "label rest" }, number === 0 ? criterion : ""),
      plotRow(`${criterion}: ${count(votes, outcome, several)}, ${percent(share)} (${range(wilson)})`, lines),
      h("div", { class: "value number" }, `${count(votes, outcome, several)}, ${percent(share)} (${range(wilson)})`)];
  }));
  return card(`Wins, ties and losses of ${name}`, h("div", { class: "plots dense" }, rows.flat(2), axis()),
    hint("With Wilson's 95 % intervals, which take votes for independent and so are too narrow; no verdict rests on them."));
}

/** @param {any[]} criteria @param {any} comparison */
function votesNeeded(criteria, { margin, power }) {
  return card("Votes needed", table(["Criterion", "#Votes", "#Decisive", "#Needed if independent", "#Design effect", "#Needed", "#Missing"],
    criteria.map(({ name, votes, decisive, votes_needed: needed }) => [name, votes, decisive, needed.independent,
      decimal(needed.design_effect), needed.clustered, needed.missing])),
  hint(`Decisive votes that find an equal candidate non-inferior within ${Math.round(1000 * margin) / 10} points in ${exactPercent(power)} of comparisons. The design effect says how much less `
    + "votes say because those of one rater, and those on one prompt, are alike; more raters lower it, more votes of the same raters do not."));
}

/** @param {any[]} criteria */
function differences(criteria) {
  return card("Is there a difference at all?", table(["Criterion", "#Clustered, Holm", "#Sign flip, Holm", "#Clustered", "#Sign flip", "#Binomial"],
    criteria.map(({ name, difference: p }) => [name, ...[p.clustered_holm, p.sign_flip_holm, p.clustered, p.sign_flip, p.binomial].map(pValue)])),
  hint("Two-sided p-values; Holm's correct for the number of criteria. Clustered holds for raters and prompts like these; sign flip for prompts like these, with these raters; "
    + "binomial would hold if votes were independent. A large p-value does not show that the modes are alike: the verdict above does, or does not."));
}

/** @param {any[]} criteria */
function trust(criteria) {
  return card("How far the votes can be trusted", table(["Criterion", "#Alpha, nominal", "#Alpha, ordinal", "#Left chosen", "#p", "#Repeats alike", "#Reversed"],
    criteria.map(({ name, reliability: { alpha_nominal: nominal, alpha_ordinal: ordinal, side_bias: bias, repeats } }) => [name, decimal(nominal), decimal(ordinal),
      `${bias.left} of ${bias.decisive} (${range(bias.interval)})`, pValue(bias.p_value),
      `${repeats.same} of ${repeats.repeats} (${range(repeats.interval)})`, repeats.reversed])),
  hint("Krippendorff's alpha: 1 if raters agree, 0 if they agree as by chance, which is expected of two modes that look alike. Left chosen: near half, unless raters prefer a side. "
    + "Repeats: the same pair again with its sides swapped."));
}

/** @param {any[]} raters @param {any} answers @param {any[]} criteria @param {any} result */
function people(raters, answers, criteria, result) {
  const all = result.with_all_raters.criteria;
  return card("Raters", table(["Rater", "#Votes", "#Skips", "#Seconds watched, median", "Counted"], raters.map((each) => [each.name, each.votes, each.skips,
    decimal(each.seconds_watched_median, 0), each.excluded ? h("span", { class: "reasons" }, h("span", { class: "tag bad" }, "left out"), " ", each.reasons.join("; ")) : each.votes > 0 ? "yes" : "–"])),
  answers.left_out.length > 0 && h("p", {}, "Not counted: ", answers.left_out.map((/** @type {any} */ each) => `${each.votes} ${each.reason}`).join(", "), "."),
  result.exclusions.length === 0 ? hint("Nobody is left out. The rules look at gold, identical and repeated pairs only, never at which mode somebody prefers.")
    : [h("h3", {}, "The result if nobody were left out"), h("p", {}, result.with_all_raters.conclusion.sentence),
      table(["Criterion", "#As above", "", "#With all raters", ""], criteria.map(({ id: criterion, name, share, verdict }) => [name,
        `${percent(share.value)} (${range(share.interval)})`, verdictTag(verdict),
        `${percent(all[criterion].share.value)} (${range(all[criterion].share.interval)})`, verdictTag(all[criterion].verdict)]))]);
}

/** @param {Record<string, any>} found */
function measures(found) {
  return card("Measured, not seen", table(["Measure", "#Mean", "#95 % interval", "#Pairs", "#Prompts"], Object.entries(found).map(([key, measure]) => {
    const [name, digits] = MEASURES[key] ?? [key, 3];
    const { mean, interval, values, clusters } = measure;
    return [name, decimal(mean, digits), interval ? `${decimal(interval.low, digits)} to ${decimal(interval.high, digits)}` : "–", values, clusters];
  })), hint("Between the two videos of a pair, clustered by prompt. They say how alike the videos are, not which is better."));
}

/** @param {any[]} prompts @param {any} comparison @param {string} name */
function byPrompt(prompts, comparison, name) {
  const rows = prompts.flatMap((prompt) => prompt.pairs.map((/** @type {any} */ pair) => [
    h("span", {}, prompt.prompt, h("span", { class: "quiet small" }, ` seed ${pair.seed}`)), percent(pair.share), pair.votes,
    OUTCOMES.map(([outcome]) => Object.values(pair.criteria).reduce((sum, counts) => sum + /** @type {any} */ (counts)[outcome], 0)).join(" / "),
    decimal(pair.measures?.psnr_db ?? null), pair.state !== "ready" ? h("span", { class: `tag ${pair.state === "failed" ? "bad" : ""}` }, pair.state)
      : h("button", { type: "button", "aria-label": `Watch the pair of: ${prompt.prompt}`, onclick: () => void watch(prompt, pair, comparison) }, "Watch")]));
  return card("By prompt, the worst first", table([`Prompt`, `#Share of ${name}`, "#Answers", "#Win / tie / loss", "#PSNR, dB", ""], rows));
}

/** @type {PairPlayer | null} */
let player = null;
const panel = find("#watch");
/** @type {HTMLElement | null} the button that opened it */
let opener = null;

/** @param {any} prompt @param {any} pair @param {any} comparison */
async function watch({ prompt }, { jobs }, comparison) {
  fill(find("#watch-prompt"), prompt);
  const sides = ["reference", "candidate"];
  fill(find("#watch-sides"), sides.map((arm) => h("a", { href: `${root}jobs/${jobs[arm]}` }, `${arm}: ${comparison[arm].mode}`)));
  fill(find("#watch-note"));
  opener = /** @type {HTMLElement | null} */ (document.activeElement);
  close();
  panel.hidden = false;
  find("#watch-title").focus();
  try {
    const { video } = await request(`jobs/${jobs.reference}`);
    const [leftUrl, rightUrl] = sides.map((arm) => `${root}jobs/${jobs[arm]}/video.mp4`);
    const { fps, num_frames: numFrames, width, height } = video;
    panel.style.setProperty("--ratio", `${width} / ${height}`);
    const failed = (/** @type {import("../player/player.js").PlayerEvent} */ event) => {
      if (event.type === "error") fill(find("#watch-note"), h("p", { class: "problem" }, event.message));
    };
    player = new PairPlayer(find("#watch-player"), { leftUrl, rightUrl, fps, numFrames, width, height, autoplay: true, onEvent: failed });
    player.allowDifference = player.loop = true;
    panel.scrollIntoView();
    await player.load();
  } catch (error) {
    fill(find("#watch-note"), error instanceof Problem && error.status === 404
      ? h("p", { class: "problem" }, "The videos of these jobs were deleted, as jobs are after a while. The votes stay.") : problemLine(error));
  }
}

function close() {
  player?.destroy();
  player = null;
  panel.hidden = true;
}

find("#watch-close").addEventListener("click", () => {
  close();
  opener?.focus();
});

/** @type {HTMLAnchorElement} */ (find("#back")).href = `${root}${path}`;
const rounds = poll(async () => {
  try {
    show(await request(`${path}/report`));
    rounds.stop(); // a report that changes while it is read would be no report; loading it again asks again
  } catch (error) {
    if (error instanceof Problem && error.status !== 0) fill(find("#report"), problemLine(error));
    throw error;
  } finally {
    find("#report").removeAttribute("aria-busy");
  }
}, 3000);
