// The dashboard. It builds on the admin API alone; see docs/dashboard.md.

import { ApiError, call, key, modelPath } from "./api.js";
import { $, attr, choices, show, text } from "./dom.js";
import { count, duration, list } from "./format.js";
import { History } from "./history.js";
import { Models, errors } from "./models.js";
import { notices, prepare, update } from "./overview.js";
import { Stream } from "./stream.js";
import { Timeline } from "./timeline.js";

const STALE = 30; // seconds without a status, after which one is asked for: shares grow while nothing happens
const TICK = 200; // milliseconds

const history = new History();
let stream = null;
let status = null;
let ahead = null; // the gateway's clock less this one's, in seconds
let waits = null; // {why, until} of the next try to connect
let live = false;
let asked = 0; // when a status was last asked for
let drawing = false;
let fading = 0; // timer of a good message
const busy = new Map(); // model, or "" for all -> action that runs

/** The gateway's clock, in unix seconds. */
const now = () => Date.now() / 1000 + (ahead ?? 0);

prepare();
const timeline = new Timeline(history, now);
const models = new Models(act);

// --- the key ---------------------------------------------------------------------------------------------------------

function ask(problem = "") {
  stream?.stop();
  stream = null;
  status = null;
  live = false;
  waits = null;
  link("off", "Not connected");
  show($("board"), false);
  show($("forget"), false);
  show($("gate"), true);
  text($("gate-error"), problem);
  attr($("key"), "aria-invalid", problem ? "true" : null);
  $("key").value = "";
  $("key").focus();
}

function enter() {
  show($("gate"), false);
  text($("gate-error"), "");
  show($("forget"), true);
  stream?.stop();
  stream = new Stream({ event: receive, link: linked, refused });
}

function refused(message) {
  key.forget();
  ask(`This key was not accepted. ${message}`);
}

$("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) return ask("A key has letters, digits and signs only, without spaces.");
  key.set(value);
  return enter();
});

$("forget").addEventListener("click", () => {
  key.forget();
  location.reload(); // nothing of what was shown stays in the page
});

// --- the connection --------------------------------------------------------------------------------------------------

function link(state, words) {
  attr($("link"), "data-link", state);
  text($("link-text"), words);
  show($("retry"), state === "waiting");
}

function linked(state, more) {
  const before = live;
  live = state === "live";
  waits = state === "waiting" ? more : null;
  if (live) link("live", "Live");
  else if (state === "connecting" && !status) link("connecting", "Connecting…");
  if (before && !live) say("", `The connection is lost: ${more.why ?? "it has ended"}. It is tried again by itself.`);
  else if (!before && live && $("said-box").dataset.lost) say("good", "Connected again.");
  if (before !== live) $("said-box").dataset.lost = live ? "" : "1";
  attr($("board"), "data-stale", live || !status ? null : "");
}

$("retry").addEventListener("click", () => stream?.hurry());
addEventListener("online", () => stream?.hurry());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  stream?.hurry();
  timeline.draw(true);
});

/** An event of the stream. */
function receive({ event, data, id }) {
  if (event === "reset") return; // what follows says by its id which process it is of
  let content;
  try {
    content = JSON.parse(data);
  } catch {
    return; // one line that is not JSON does not end the stream
  }
  if (event === "status") take(content);
  else if (id) history.add(id, event, content);
  soon();
}

function take(next) {
  const difference = next.time - Date.now() / 1000;
  // the least delayed status tells the clock's difference best; a jump of a clock is followed
  ahead = ahead === null || difference > ahead || ahead - difference > 5 ? difference : ahead - 0.02 * (ahead - difference);
  status = next;
  asked = Date.now();
  history.observe(status);
  soon();
}

// --- showing ---------------------------------------------------------------------------------------------------------

function render() {
  if (!status) return;
  const first = $("board").hidden;
  if (first) show($("board"), true);
  const at = live ? now() : Math.min(now(), history.heard ?? now());
  update(status, history, at);
  notices(status, act);
  models.update(status, at, busy);
  errors(status, at);
  text($("drain"), busy.get("") === "drain" ? "Draining…" : busy.get("") === "resume" ? "Resuming…" : status.draining ? "Resume" : "Drain all");
  text($("reload"), busy.get("") === "reload" ? "Reloading…" : "Reload configuration");
  timeline.models(status.models.map((model) => model.name));
  timeline.draw(first);
}

/** Shows news at the next frame; time itself moves on with the ticks. */
function soon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    render();
  });
}

setInterval(() => {
  if (waits) link("waiting", `Not connected (${waits.why}): next try in ${Math.max(0, Math.ceil((waits.until - Date.now()) / 1000))} s`);
  if (document.hidden || !status) return;
  if (live && Date.now() - asked > STALE * 1000) {
    asked = Date.now();
    call("GET", "status").then(take, () => {}); // the stream says what is wrong with the connection
  }
  render();
}, TICK);

// --- actions ---------------------------------------------------------------------------------------------------------

/** Says what happened, for eyes and for screen readers. `kind` is "good", "bad" or "". */
function say(kind, words) {
  clearTimeout(fading);
  if (kind === "good") fading = setTimeout(say, 12_000, "", "");
  attr($("said-box"), "data-kind", kind);
  text($("said"), words);
  show($("said-close"), Boolean(words));
}

$("said-close").addEventListener("click", () => say("", ""));

const confirmations = {
  stop: (model) => [`Stop ${model}?`, `Its process is ended when its running answers are done. The next request for ${model} starts it anew, which takes far longer than a wake from sleep.`, "Stop it"],
  drain: () => ["Drain all?", "New requests are refused with a 503 until you resume. What runs or waits already is still answered.", "Drain"],
};

function confirmed(action, model) {
  const words = confirmations[action]?.(model);
  if (!words) return Promise.resolve(true);
  const dialog = $("ask");
  text($("ask-title"), words[0]);
  text($("ask-text"), words[1]);
  text($("ask-yes"), words[2]);
  dialog.returnValue = "no";
  dialog.showModal();
  $("ask-no").focus();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

const actions = {
  wake: ["POST", "wake", (m) => `Waking ${m}: it becomes active as soon as its turn comes.`, (m, s) => `${m} is awake. It took ${s}.`],
  sleep: ["POST", "sleep", (m) => `${m} goes to sleep when its running answers are done.`, (m, s) => `${m} is asleep. It took ${s}.`],
  stop: ["POST", "stop", (m) => `${m} is stopped when its running answers are done.`, (m, s) => `${m} is stopped. It took ${s}.`],
  pin: ["POST", "pin", (m) => `Pinning ${m}: it is woken first if it sleeps.`, (m) => `${m} is pinned: the gateway does not switch away from it.`],
  unpin: ["DELETE", "pin", () => "", (m) => `${m} is not pinned any more.`],
};

/** Does what a button of a model says. `not` is the reason why it makes no sense now. */
async function act(action, model, not = "") {
  if (not) return say("", not);
  if (!(await confirmed(action, model))) return undefined;
  const [method, path, before, after] = actions[action];
  const began = performance.now();
  busy.set(model, action);
  say("", before(model));
  render();
  try {
    await call(method, modelPath(model, path));
    say("good", after(model, duration((performance.now() - began) / 1000)));
  } catch (error) {
    failed(`${{ wake: "Waking", sleep: "Putting to sleep", stop: "Stopping", pin: "Pinning", unpin: "Unpinning" }[action]} ${model}`, error);
  } finally {
    busy.delete(model);
    soon();
  }
  return undefined;
}

async function global(action, after) {
  if (busy.has("") || !(await confirmed(action))) return;
  busy.set("", action);
  render();
  try {
    say("good", after(await call("POST", action)));
  } catch (error) {
    failed({ drain: "Draining", resume: "Resuming", reload: "Reloading the configuration" }[action], error);
  } finally {
    busy.delete("");
    soon();
  }
}

function failed(what, error) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) return refused(error.message);
  const then = error.status === 0 ? " Whether it was done is not known." : "";
  return say("bad", `${what} failed${error.status ? ` (${error.status})` : ""}: ${error.message}${then}`);
}

$("drain").addEventListener("click", () => {
  if (status?.draining) return global("resume", () => "Requests are taken again.");
  return global("drain", (s) => (s.drained ? "Drained: nothing runs any more." : `Draining: ${count(s.in_flight + s.waiting + s.frozen, "request")} still to end.`));
});

$("reload").addEventListener("click", () => global("reload", ({ added, changed, removed, settings }) => {
  const parts = [["added", added], ["changed", changed], ["removed", removed], ["other settings:", settings]].filter(([, names]) => names?.length).map(([word, names]) => `${word} ${list(names)}`);
  return parts.length ? `The configuration was reloaded: ${parts.join("; ")}.` : "The configuration was reloaded; nothing has changed.";
}));

// --- theme -----------------------------------------------------------------------------------------------------------

const THEMES = { auto: "automatic", dark: "dark", light: "light" };

function theme(name) {
  const known = name in THEMES ? name : "auto";
  attr(document.documentElement, "data-theme", known);
  text($("theme"), `Theme: ${THEMES[known]}`);
  choices.set("theme", known);
  timeline.recolor();
}

$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => timeline.recolor());
theme(choices.get("theme", "auto"));

if (key.get()) enter();
else ask();
