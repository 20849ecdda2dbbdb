// The table of models: a row for each, updated in place.

import { $, attr, h, show, text } from "./dom.js";
import { clock, duration, moment, ticking } from "./format.js";

const FILTER_FROM = 8; // models
const COLUMNS = ["State", "Running", "Waiting", "Frozen", "Sleep takes", "Wake takes", "Last error"];

export class Models {
  #rows = new Map();
  #act;

  /** `act(action, model)` is called for a button. */
  constructor(act) {
    this.#act = act;
    $("filter").addEventListener("input", () => this.#filter());
  }

  /** Shows the models of a status; `now` is the gateway's clock, `busy` maps a model to the action that runs. */
  update(status, now, busy) {
    const body = $("models");
    const names = new Set(status.models.map((model) => model.name));
    for (const [name, row] of this.#rows) {
      if (names.has(name)) continue;
      row.element.remove();
      this.#rows.delete(name);
    }
    status.models.forEach((model, i) => {
      let row = this.#rows.get(model.name);
      if (!row) this.#rows.set(model.name, (row = this.#row(model.name)));
      if (body.children[i] !== row.element) body.insertBefore(row.element, body.children[i] ?? null);
      this.#fill(row, model, status, now, busy.get(model.name));
    });
    show($("filter"), status.models.length >= FILTER_FROM);
    this.#filter();
  }

  #filter() {
    const wanted = $("filter").hidden ? "" : $("filter").value.trim().toLowerCase();
    for (const [name, row] of this.#rows) show(row.element, name.toLowerCase().includes(wanted));
  }

  #row(name) {
    const cells = COLUMNS.map((label, i) => h("td", { role: "cell", "data-label": label, class: i > 0 && i < 6 ? "num" : null }));
    const [title, about] = [h("strong", {}, name), h("small")];
    const state = h("span", { class: "state" });
    const since = h("small");
    cells[0].append(state, since);
    cells[2].append(h("span"), h("small"));
    cells[6].classList.add("why");
    cells[6].append(h("span"), h("small"));
    const buttons = {};
    for (const action of ["wake", "sleep", "stop", "pin"]) {
      const button = h("button", { type: "button", "data-action": action });
      button.addEventListener("click", () => this.#act(button.dataset.action, name, button.getAttribute("aria-disabled") === "true" ? button.title : ""));
      buttons[action] = button;
    }
    const element = h("tr", { role: "row", "data-model": name }, h("th", { scope: "row", role: "rowheader" }, title, about), ...cells,
      h("td", { role: "cell", "data-label": "Actions", class: "do" }, ...Object.values(buttons)));
    return { element, about, state, since, cells, buttons };
  }

  #fill(row, model, status, now, running) {
    attr(row.element, "data-state", model.state);
    attr(row.element, "data-active", model.active);
    const about = [model.server, model.managed ? "managed" : null, `level ${model.sleep_level}`, ...model.aliases.map((alias) => `= ${alias}`)];
    text(row.about, about.filter(Boolean).join(" · "));
    attr(row.state, "data-state", model.state);
    text(row.state, model.state);
    const moves = status.switch && status.mode === "switching" && [status.switch.from, status.switch.to].includes(model.name);
    const role = moves ? (status.switch.to === model.name ? "is next" : "makes way") : model.active ? "serves" : "";
    text(row.since, [role, model.pinned ? "pinned" : ""].filter(Boolean).join(", "));
    const [, running_, waiting, frozen, sleep, wake, why] = row.cells;
    for (const [cell, value] of [[running_, model.in_flight], [frozen, model.frozen]]) {
      text(cell, String(value));
      attr(cell, "data-none", value === 0 ? "" : null);
    }
    text(waiting.firstChild, String(model.waiting));
    attr(waiting, "data-none", model.waiting === 0 ? "" : null);
    text(waiting.lastChild, model.waiting ? `oldest ${ticking((model.oldest_wait ?? 0) + now - status.time)}` : "");
    text(sleep, duration(model.estimates?.sleep));
    text(wake, duration(model.estimates?.wake));
    const retry = model.retry_in === null || model.retry_in === undefined ? null : model.retry_in - (now - status.time);
    const { last_error: error } = model;
    attr(why, "data-none", error || retry !== null ? null : "");
    text(why.firstChild, error ? error.message : retry === null ? "none" : "");
    attr(why.firstChild, "title", error ? `${error.kind}: ${error.message}` : null);
    const parts = [error ? moment(error.time, now) : "", retry === null ? "" : retry > 0 ? `next try in ${ticking(retry)}` : "is tried again"];
    text(why.lastChild, parts.filter(Boolean).join(" · "));

    const { wake: wakes, sleep: sleeps, stop, pin } = row.buttons;
    const asleep = model.state === "asleep" || model.state === "stopped";
    this.#button(wakes, "wake", running === "wake" ? "Waking…" : "Wake", model, running, model.active && !moves ? `${model.name} is awake already.` : "");
    this.#button(sleeps, "sleep", running === "sleep" ? "Going to sleep…" : "Sleep", model, running, asleep ? `${model.name} is ${model.state} already.` : "");
    show(stop, model.managed);
    this.#button(stop, "stop", running === "stop" ? "Stopping…" : "Stop", model, running, model.state === "stopped" ? `${model.name} is stopped already.` : "");
    this.#button(pin, model.pinned ? "unpin" : "pin", running === "pin" ? "Pinning…" : model.pinned ? "Unpin" : "Pin", model, running, "");
  }

  #button(button, action, label, model, running, not) {
    text(button, label);
    attr(button, "data-action", action);
    attr(button, "aria-label", `${label} ${model.name}`);
    const reason = running ? `Something is being done with ${model.name} already.` : not;
    attr(button, "aria-disabled", reason ? "true" : null);
    attr(button, "title", reason || null);
  }
}

/** The list of the last errors, newest first. */
export function errors(status, now) {
  const list = $("errors");
  if (!status.errors.length) {
    if (list.dataset.shown !== "none") list.replaceChildren(h("li", { class: "quiet" }, "None so far."));
    list.dataset.shown = "none";
    return;
  }
  const shown = `${status.epoch}:${status.errors.map((each) => each.time).join()}:${Math.floor(now / 60)}`;
  if (list.dataset.shown === shown) return;
  list.dataset.shown = shown;
  list.replaceChildren(...status.errors.map((each) => h("li", {},
    h("time", { datetime: new Date(each.time * 1000).toISOString(), title: clock(each.time) }, moment(each.time, now)),
    h("span", { class: "who" }, each.model ?? "gateway"), h("span", { class: "kind" }, each.kind), h("span", { class: "msg" }, each.message))));
}
