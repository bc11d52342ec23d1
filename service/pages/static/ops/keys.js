/**
 * The API keys on the page for operators: list, make, change, rotate, revoke.
 *
 * A secret is in one dialog, once, and nowhere else in the page.
 */

import { poll, request } from "../api.js";
import { cell, fill, find, h, moment, problemLine, say, table } from "../shell.js";

/** @typedef {import("../shell.js").Child} Child */

const EVERY_MS = 15_000;
/** @type {Record<string, string>} */
const STATE_TAGS = { usable: "good", expired: "warn", revoked: "" };

/** @type {{keys: any[], roles: string[], default_quota: number, default_rate: string}} */
let known = { keys: [], roles: [], default_quota: 0, default_rate: "" };
/** @type {{stop: () => void, now: () => void} | null} */
let polling = null;

let pressed = false;
addEventListener("pointerdown", () => { pressed = true; });
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => setTimeout(() => { pressed = false; }));

/**
 * Render while what has the keyboard's focus keeps it, by its `data-key`, and not between press and release: a click on
 * what was replaced meanwhile would be lost.
 *
 * @param {() => void} render
 */
export function keepingFocus(render) {
  if (pressed) {
    setTimeout(() => keepingFocus(render), 100);
    return;
  }
  const key = document.activeElement instanceof HTMLElement ? document.activeElement.dataset.key : undefined;
  render();
  if (key === undefined) return;
  for (const element of document.querySelectorAll("[data-key]")) {
    if (element instanceof HTMLElement && element.dataset.key === key) element.focus({ preventScroll: true });
  }
}

/**
 * Ask in a dialog; it stays open and shows why if `run` fails.
 *
 * @param {string} title
 * @param {Child[]} content
 * @param {string} label of the button that does it
 * @param {(fields: FormData) => Promise<void>} run
 * @param {boolean} [danger]
 */
export function ask(title, content, label, run, danger = false) {
  const opener = document.activeElement;
  const trouble = h("div");
  const submit = h("button", { type: "submit", class: danger ? "danger" : "primary" }, label);
  const close = h("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const form = h("form", {}, h("h2", { id: "ask-title" }, title), content, trouble, h("div", { class: "actions" }, submit, close));
  const dialog = h("dialog", { "aria-labelledby": "ask-title", onclose: () => {
    dialog.remove();
    if (opener instanceof HTMLElement) opener.focus();
  } }, form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    submit.disabled = true;
    try {
      await run(new FormData(form));
      dialog.close();
    } catch (error) {
      fill(trouble, problemLine(error));
    } finally {
      submit.disabled = false;
    }
  });
  document.body.append(dialog);
  dialog.showModal();
}

/** Show the keys, and keep them fresh. */
export function showKeys() {
  find("#add-key").addEventListener("click", addKey);
  polling = poll(async () => {
    known = await request("keys");
    keepingFocus(() => fill(find("#keys"), known.keys.length === 0 ? nobody() : keysTable()));
  }, EVERY_MS);
}

const nobody = () => h("p", { class: "empty" }, "No key was ever made, so this service is open to everybody who reaches it. The first key closes it; it has to be one of the role ops.");

function keysTable() {
  const usable = known.keys.filter((key) => key.state !== "revoked");
  const revoked = known.keys.filter((key) => key.state === "revoked");
  const titles = ["Key", "Role", "Quota", "Rate", "Last used", "Expires", ""];
  const wasOpen = document.querySelector("#revoked[open]") !== null;
  return [
    table(titles, usable.map(keyRow)),
    revoked.length > 0 && h("details", { id: "revoked", open: wasOpen }, h("summary", {}, `Revoked (${revoked.length})`), h("ul", {}, revoked.map((key) => h("li", {}, key.name, h("span", { class: "quiet" }, ` of ${key.owner}, revoked `), moment(key.revoked_at))))),
  ];
}

/** @param {any} key */
function keyRow(key) {
  const action = (/** @type {string} */ label, /** @type {(key: any) => void} */ run, danger = false) =>
    h("button", { type: "button", class: danger ? "small-button danger" : "small-button", "data-key": `${label} ${key.id}`, "aria-label": `${label} ${key.name}`, onclick: () => run(key) }, label);
  const quiet = (/** @type {string} */ text) => h("span", { class: "quiet" }, text);
  return h("tr", {},
    cell("Key", h("strong", {}, key.name), key.own && h("span", { class: "tag active" }, "yours"), key.owner !== key.name && h("div", { class: "quiet small" }, `jobs of ${key.owner}`), h("div", { class: "quiet small mono" }, key.id)),
    cell("Role", h("span", { class: `tag ${key.role === "ops" ? "active" : ""}` }, key.role), key.state !== "usable" && h("span", { class: `tag ${STATE_TAGS[key.state]}` }, key.state)),
    cell("Quota", key.quota ?? quiet(key.role === "ops" ? "none" : `default, ${known.default_quota}`)),
    cell("Rate", key.rate ?? quiet(`default, ${known.default_rate}`)),
    cell("Last used", key.last_used_at === null ? quiet("never") : moment(key.last_used_at)),
    cell("Expires", key.expires_at === null ? quiet("never") : moment(key.expires_at), key.old_secret_until && h("div", { class: "small warn-text" }, "old secret until ", moment(key.old_secret_until))),
    cell("", h("div", { class: "row" }, action("Change", changeKey), action("Rotate", rotateKey), !key.own && action("Revoke", revokeKey, true))));
}

/** @param {string} name @param {string} label @param {string} hint @param {Record<string, any>} [more] */
function field(name, label, hint, more = {}) {
  return h("div", { class: "field" },
    h("label", { for: `key-${name}` }, label),
    h("input", { id: `key-${name}`, name, autocomplete: "off", spellcheck: "false", "aria-describedby": `key-${name}-hint`, ...more }),
    h("p", { class: "hint", id: `key-${name}-hint` }, hint));
}

/** @param {string} chosen */
function roleField(chosen) {
  const option = (/** @type {string} */ role) => h("option", { value: role, selected: role === chosen }, role);
  return h("div", { class: "field" }, h("label", { for: "key-role" }, "Role"), h("select", { id: "key-role", name: "role" }, known.roles.map(option)));
}

/** @param {any} [key] */
const limitFields = (key) => [
  field("quota", "Quota", `Most jobs waiting and running. Empty: ${known.default_quota} for the role user, none for ops.`, { type: "number", min: 1, value: key?.quota }),
  field("rate", "Rate", `Like 600/minute or 5/second. Empty: ${known.default_rate}.`, { value: key?.rate }),
];

/** The limits in a form, as the API takes them. @param {FormData} form */
function limits(form) {
  const quota = text(form, "quota");
  return { role: text(form, "role"), quota: quota === null ? null : Number(quota), rate: text(form, "rate") };
}

/** @param {FormData} form @param {string} name */
function text(form, name) {
  return String(form.get(name) ?? "").trim() || null;
}

function addKey() {
  const content = [
    field("name", "Name", "Given once: letters, digits, dots, hyphens and underscores.", { required: true, maxlength: 64 }),
    roleField(known.keys.length === 0 ? "ops" : "user"),
    ...limitFields(),
    field("expires", "Expires", "Like 30d, 12h, 2027-01-31. Empty: never."),
    field("owner", "Owner", "Whose jobs it sees and gets, if not its own. Empty: its name."),
  ];
  ask("Make a key", content, "Make the key", async (form) => {
    const body = { name: text(form, "name"), expires: text(form, "expires"), owner: text(form, "owner"), ...limits(form) };
    showSecret(await request("keys", { method: "POST", body }), "is made");
  });
}

/** @param {any} key */
function changeKey(key) {
  const until = key.expires_at === null ? "It never expires." : `It expires ${new Date(key.expires_at).toLocaleString()}.`;
  const content = [
    roleField(key.role),
    ...limitFields(key),
    field("expires", "Expires", `${until} Like 30d, 12h, 2027-01-31 or never. Empty: as it is.`),
  ];
  ask(`Change the key of ${key.name}`, content, "Change the key", async (form) => {
    const expires = text(form, "expires");
    const body = { ...limits(form), ...(expires === null ? {} : { expires }) };
    await request(`keys/${key.id}`, { method: "PATCH", body });
    done(`The key of ${key.name} is changed`);
  });
}

/** @param {any} key */
function rotateKey(key) {
  const own = key.own && h("p", { class: "problem" }, "This is the key you signed in with. Without a grace you are signed out.");
  const content = [
    h("p", {}, "It gets another secret, shown once. Its name, owner and jobs stay."), own || null,
    field("grace", "Grace", "How long the old secret stays valid: like 24h or 7d, 30d at most. Empty: it stops at once.", { value: key.own ? "24h" : null }),
  ];
  ask(`Rotate the key of ${key.name}`, content, "Rotate the key", async (form) => {
    const body = { grace: text(form, "grace") ?? "0m" };
    showSecret(await request(`keys/${key.id}/rotate`, { method: "POST", body }), "has another secret");
  });
}

/** @param {any} key */
function revokeKey(key) {
  const content = [h("p", {}, "For good: it stops working within two seconds, and its sessions end. Its jobs stay.")];
  ask(`Revoke the key of ${key.name}?`, content, "Revoke the key", async () => {
    await request(`keys/${key.id}/revoke`, { method: "POST" });
    done(`The key of ${key.name} is revoked`);
  }, true);
}

/** Show a secret, which is shown only here and now. @param {any} made @param {string} what */
function showSecret(made, what) {
  const shown = h("textarea", { id: "secret", class: "mono", readonly: true, rows: 3, spellcheck: "false", "aria-label": "the key", onfocus: () => shown.select() }, made.key);
  const copied = h("span", { class: "quiet small", role: "status" });
  const copy = async () => {
    shown.select();
    // Without TLS browsers have no clipboard for pages, but still this.
    const isCopied = navigator.clipboard ? await navigator.clipboard.writeText(made.key).then(() => true, () => false) : document.execCommand("copy");
    copied.textContent = isCopied ? "Copied." : "Copy it with Ctrl+C.";
  };
  const dialog = h("dialog", { "aria-labelledby": "secret-title", oncancel: (/** @type {Event} */ event) => event.preventDefault(), onclose: () => {
    dialog.remove();
    find("#add-key").focus();
  } },
    h("h2", { id: "secret-title" }, `The key of ${made.name} ${what}`),
    h("p", {}, "This is the only time that it is shown. Store it where only its owner reads it."),
    shown,
    h("div", { class: "actions" }, h("button", { type: "button", class: "primary", onclick: copy }, "Copy"), h("button", { type: "button", onclick: () => dialog.close() }, "I have stored it"), copied));
  document.body.append(dialog);
  dialog.showModal();
  done(`The key of ${made.name} ${what}`);
}

/** @param {string} what */
function done(what) {
  say(what);
  polling?.now();
}
