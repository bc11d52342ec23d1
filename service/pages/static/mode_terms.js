/**
 * What a mode bounds and has by default: its steps and its guidance, which come with each mode of `GET /models`.
 *
 * Where several modes are picked that have different defaults, a field is empty: each mode then has its own.
 */

/**
 * @typedef {{name: string, description: string, workers: number, warning?: string | null, min_steps: number, max_steps: number,
 *   default_steps: number, max_guidance_scale: number, default_guidance_scale: number}} Mode one of `GET /models`
 */

/** The fields of a request that a mode bounds, and what they are called among its terms. @type {[string, string][]} */
const FIELDS = [["num_inference_steps", "steps"], ["guidance_scale", "guidance_scale"]];
const EACH = "each mode's own";

/** Whether a mode always runs without guidance, where a negative prompt has no effect. @param {Mode} mode */
export const unguided = (mode) => mode.max_guidance_scale === 1;

/**
 * What every one of some modes takes of a field. `usual` is undefined where their defaults differ.
 *
 * @param {Mode[]} modes @param {string} name @returns {{min: number, max: number, usual: number | undefined}}
 */
function shared(modes, name) {
  const terms = /** @type {Record<string, any>[]} */ (modes);
  const usual = new Set(terms.map((each) => each[`default_${name}`]));
  return {
    min: Math.max(1, ...terms.map((each) => each[`min_${name}`] ?? 1)),
    max: Math.min(...terms.map((each) => each[`max_${name}`])),
    usual: usual.size === 1 ? [...usual][0] : undefined,
  };
}

/**
 * Give the fields of a form the bounds and defaults of the picked modes. What was typed stays where the modes take it.
 *
 * @param {(name: string) => HTMLInputElement} field @param {Mode[]} modes @param {Mode[]} before those picked until now
 */
export function followModes(field, modes, before) {
  for (const [name, term] of FIELDS) {
    const input = field(name);
    const { min, max, usual } = shared(modes, term);
    const untouched = input.value === String(shared(before, term).usual ?? "");
    const value = Number(input.value);
    Object.assign(input, { min, max, placeholder: usual === undefined ? EACH : "", readOnly: usual !== undefined && min === max });
    if (untouched || value < min || value > max) input.value = String(usual ?? "");
  }
}

/**
 * List what was typed and not every picked mode takes, as the service lists what it refuses: it would see that only after
 * the first mode's video was asked for.
 *
 * @param {(name: string) => HTMLInputElement} field @param {Mode[]} modes @returns {{field: string, bound: string, detail: string}[]}
 */
export function outside(field, modes) {
  return FIELDS.flatMap(([name, term]) => {
    const { value } = field(name);
    const { min, max } = shared(modes, term);
    if (value === "" || (Number(value) >= min && Number(value) <= max)) return [];
    const bound = min < max ? `${min} to ${max}` : min === max ? String(min) : "nothing";
    return [{ field: name, bound, detail: `${name} is ${value}, which not all of these modes take, but ${bound}; leave it empty for ${EACH}.` }];
  });
}

/** A value of a form in words. @param {string} value */
export const said = (value) => value || EACH;

/**
 * The request for the same video in another mode: what was the first mode's default, or is out of the other's bounds, is
 * the other's default.
 *
 * @param {Record<string, any>} request @param {Mode | undefined} from none if it is not served any more @param {Mode} to
 */
export function inMode(request, from, to) {
  /** @type {Record<string, any>} */
  const body = { ...request, mode: to.name };
  for (const [name, term] of FIELDS) {
    const { min, max, usual } = shared([to], term);
    const wasUsual = from !== undefined && request[name] === shared([from], term).usual;
    if (wasUsual || request[name] < min || request[name] > max) body[name] = usual;
  }
  // Without guidance there was none, and with it the model's own is wanted again.
  if (request.guidance_scale === 1 && request.negative_prompt === "") delete body.negative_prompt;
  return body;
}
