// The first card: what the GPU does now, the switch under way, counts and shares.

import { $, attr, h, show, text } from "./dom.js";
import { clock, count, duration, percent, ticking } from "./format.js";
import { PHASES } from "./history.js";

const STEP_NAMES = { cooldown: "Cooldown", drain: "Drain", sleep: "Sleep", wake: "Wake", ready: "Ready" };
const tiles = {};
const steps = {};

/** Makes what stays: tiles and steps. */
export function prepare() {
  for (const [name, label] of [["in_flight", "Running"], ["waiting", "Waiting"], ["frozen", "Frozen"], ["switches", "Switches"], ["failures", "Failed"], ["up", "Up for"]]) {
    const value = h("dd");
    const more = h("dd", { class: "more" });
    tiles[name] = { value, more };
    $("tiles").append(h("div", { "data-tile": name }, h("dt", {}, label), value, more));
  }
  for (const phase of PHASES) {
    const time = h("small", {}, "–");
    steps[phase] = { element: h("li", { "data-phase": phase }, h("span", {}, STEP_NAMES[phase]), time), time };
    $("steps").append(steps[phase].element);
  }
}

/** Shows a status. `now` is the gateway's clock. */
export function update(status, history, now) {
  text($("version"), status.version);
  attr($("mode"), "data-mode", status.mode);
  text($("mode"), { unknown: "not known", idle: "idle", active: "serving", switching: "switching" }[status.mode] ?? status.mode);
  text($("headline"), headline(status));
  document.title = `${status.mode === "switching" ? `→ ${status.switch?.to ?? "asleep"}` : status.active ?? "idle"} · llmux_asgi`;
  theSwitch(status, history, now);

  const oldest = status.models.reduce((most, model) => Math.max(most, model.waiting ? model.oldest_wait ?? 0 : 0), 0);
  for (const name of ["in_flight", "waiting", "frozen"]) text(tiles[name].value, String(status[name]));
  text(tiles.waiting.more, status.waiting ? `oldest ${ticking(oldest + now - status.time)}` : "");
  text(tiles.switches.value, String(status.totals.switches));
  text(tiles.failures.value, String(status.totals.failures));
  text(tiles.failures.more, status.totals.abandoned ? `${status.totals.abandoned} given up` : "");
  text(tiles.up.value, duration(now - status.started));
  text(tiles.up.more, status.policy);
  attr(tiles.failures.value, "data-bad", status.totals.failures ? "" : null);

  const { serving, switching, idle } = status.shares;
  const whole = serving + switching + idle;
  for (const part of $("sharebar").children) part.style.width = whole ? `${(100 * status.shares[part.dataset.share]) / whole}%` : "0";
  text($("shares"), `Since the start: serving ${percent(serving, whole)}, switching ${percent(switching, whole)}, idle ${percent(idle, whole)}.`);
}

function headline(status) {
  if (status.mode === "switching" && status.switch) {
    const { from, to } = status.switch;
    if (!to) return `${from} is put to sleep`;
    return from ? `from ${from} to ${to}` : `to ${to}`;
  }
  if (status.active) return `${status.active} is awake${status.in_flight ? ` and answers ${count(status.in_flight, "request")}` : ", nothing runs"}`;
  return status.mode === "unknown" ? "nothing was asked for yet, so no server was looked at" : "no model is awake; the next request wakes its own";
}

/** The switch under way by its phases; between two switches, the last one. */
function theSwitch(status, history, now) {
  const current = status.mode === "switching" ? status.switch : null;
  const last = current ? null : history.switches.findLast((each) => each.outcome && each.outcome !== "lost");
  const box = $("steps");
  show(box, Boolean(current || last));
  if (!current && !last) return text($("switch-text"), "No switch so far.");
  attr(box, "aria-label", current ? "Phases of the switch under way" : "Phases of the last switch");
  attr(box, "data-live", current ? "" : null);
  const passed = current ? history.models.flatMap((model) => history.row(model).phases.filter((each) => each.number === current.switch && each.start >= current.since - 1)) : [];
  for (const phase of PHASES) {
    const { element, time } = steps[phase];
    let seconds = last?.phases[phase] ?? null;
    let state = seconds === null ? "skipped" : "done";
    if (current?.phase === phase) {
      state = "now";
      seconds = now - current.phase_since;
    } else if (current) {
      const found = passed.findLast((each) => each.phase === phase);
      seconds = found ? (found.end ?? now) - found.start : null;
      state = found ? "done" : PHASES.indexOf(phase) > PHASES.indexOf(current.phase) ? "next" : "skipped";
    }
    attr(element, "data-step", state);
    attr(element, "aria-current", state === "now" ? "step" : null);
    text(time, seconds === null ? (state === "next" ? "…" : "–") : current ? ticking(seconds) : duration(seconds));
  }
  if (current) {
    const costs = status.models.reduce((sum, model) => sum + (model.name === current.from ? model.estimates?.sleep ?? 0 : model.name === current.to ? model.estimates?.wake ?? 0 : 0), 0);
    text($("switch-text"), `Switch ${current.switch}, ${current.phase}: ${ticking(now - current.since)} so far${costs ? `; sleep and wake take about ${duration(costs)}` : ""}.`);
    return undefined;
  }
  const name = last.from && last.to ? `${last.from} → ${last.to}` : last.to ? `to ${last.to}` : `${last.from} put to sleep`;
  const waits = last.longest ? `; ${count(last.served, "request")} waited for it, the longest ${duration(last.longest)}` : "";
  text($("switch-text"), `Last switch: ${name}, ${last.outcome} in ${duration(last.end - last.start)} at ${clock(last.end)}${waits}.`);
  return undefined;
}

/** Draining and pinned, each with the way out of it. `act(action, model)` is called for a button. */
export function notices(status, act) {
  const shown = JSON.stringify([status.draining, status.drained, status.pinned, status.draining && [status.in_flight, status.waiting, status.frozen]]);
  const box = $("notices");
  if (box.dataset.shown === shown) return;
  box.dataset.shown = shown;
  const items = [];
  if (status.draining) {
    const left = status.in_flight + status.waiting + status.frozen;
    const words = status.drained ? "Drained: nothing runs any more, and new requests are refused (503)." : `Draining: new requests are refused (503); ${count(left, "request")} still to end.`;
    items.push(["drain", words, "", null]);
  }
  if (status.pinned !== null) items.push(["pin", `${status.pinned} is pinned: the gateway does not switch away from it.`, "Unpin", () => act("unpin", status.pinned)]);
  const had = box.contains(document.activeElement);
  box.replaceChildren(...items.map(([kind, words, label, run]) => {
    const line = h("p", { class: "notice", "data-notice": kind }, h("span", {}, words));
    if (run) {
      const button = h("button", { type: "button" }, label);
      button.addEventListener("click", run);
      line.append(button);
    }
    return line;
  }));
  if (had && !box.querySelector("button")) $("main").focus({ preventScroll: true });
}
