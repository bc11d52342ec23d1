/**
 * Asks the service's public API, which is all that the pages use.
 *
 * Failures are `Problem`s with the sentence that the service gave, or one of our own where it gave none. Whether the
 * service answers at all is told to the whole page by `connection` events on `document`.
 */

/** The way from this page to the service's first page, such as "../"; relative, as a proxy may add a prefix. */
export const root = document.documentElement.dataset.root ?? "./";

/** @typedef {{name: string, role: "user" | "ops" | "rater", open: boolean}} Session */

/**
 * Why a request did not succeed.
 *
 * `status` is 0 if there was no answer. `code` is the problem's, such as "quota_exceeded". `errors` are refused fields.
 */
export class Problem extends Error {
  /**
   * @param {number} status
   * @param {string} detail a sentence to show
   * @param {Record<string, any>} [body] the problem document
   */
  constructor(status, detail, body = {}) {
    super(detail);
    this.status = status;
    this.body = body;
    this.code = String(body.code ?? "");
    /** @type {{field: string, bound: string, detail: string}[]} */
    this.errors = Array.isArray(body.errors) ? body.errors : [];
    /** @type {number | null} */
    this.retryAfterS = null;
  }
}

/**
 * Ask for JSON.
 *
 * @param {string} path from the service's root, without a slash in front, such as "jobs?limit=20"
 * @param {{method?: string, body?: unknown, headers?: Record<string, string>, signal?: AbortSignal}} [options]
 * @returns {Promise<any>} the JSON of the answer, or null if it has none
 * @throws {Problem}
 */
export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  /** @type {Response} */
  let answer;
  try {
    answer = await fetch(root + path, {
      method,
      signal,
      headers: { Accept: "application/json", ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...headers },
      body: body === undefined ? undefined : written(body),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    tell(false);
    throw new Problem(0, "The service does not answer. This page tries again by itself.");
  }
  tell(answer.status !== 502 && answer.status !== 504);
  if (answer.status === 401) document.dispatchEvent(new CustomEvent("signed-out"));
  if (answer.ok) return answer.status === 204 ? null : read(await answer.text());
  const problem = await answer.json().catch(() => ({}));
  const failed = new Problem(answer.status, problem.detail ?? problem.title ?? `The service answered ${answer.status}.`, problem);
  const wait = Number(answer.headers.get("Retry-After"));
  failed.retryAfterS = Number.isFinite(wait) && wait > 0 ? wait : null;
  throw failed;
}

/**
 * Ask until there is an answer. What waiting does not mend is thrown.
 *
 * @param {string} path
 * @param {{method?: string, body?: unknown}} options
 * @param {(why: string) => void} wait is told before each pause; with "" once there is an answer
 */
export async function insist(path, options, wait) {
  for (let pauseMs = 1000; ; pauseMs = Math.min(2 * pauseMs, 15_000)) {
    try {
      const answer = await request(path, options);
      wait("");
      return answer;
    } catch (error) {
      if (!(error instanceof Problem) || ![0, 429, 502, 503, 504].includes(error.status)) throw error;
      wait(error.status === 429 ? "Too many requests at once." : "The service does not answer.");
      await new Promise((done) => setTimeout(done, error.retryAfterS ? error.retryAfterS * 1000 : pauseMs));
    }
  }
}

/**
 * Read JSON. Seeds of 16 and more digits become texts, as JavaScript's numbers would round them.
 *
 * @param {string} text
 */
export function read(text) {
  return JSON.parse(text.replace(/("seed":\s*)(\d{16,})/g, '$1"$2"'));
}

/** Write JSON, with such seeds as numbers again. @param {unknown} body */
export function written(body) {
  return JSON.stringify(body).replace(/("seed":)"(\d{16,})"/g, "$1$2");
}

/**
 * Ask again and again while the page is visible, and until `stop` is called. Failures are told and outlived.
 *
 * @param {() => Promise<void>} round
 * @param {number} everyMs
 * @returns {{stop: () => void, now: () => void}} `now` asks at once
 */
export function poll(round, everyMs) {
  let stopped = false;
  let timer = 0;
  let failures = 0;
  const run = async () => {
    clearTimeout(timer);
    if (stopped || document.hidden) return;
    try {
      await round();
      failures = 0;
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      failures += 1;
    } finally {
      clearTimeout(timer);
      if (!stopped) timer = setTimeout(run, Math.min(everyMs * 2 ** failures, 30_000));
    }
  };
  const shown = () => { if (!document.hidden) void run(); };
  document.addEventListener("visibilitychange", shown);
  document.addEventListener("signed-in", shown);
  void run();
  return {
    stop: () => {
      stopped = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", shown);
      document.removeEventListener("signed-in", shown);
    },
    now: () => void run(),
  };
}

/** @param {boolean} answers */
export function tell(answers) {
  document.dispatchEvent(new CustomEvent("connection", { detail: answers }));
}
