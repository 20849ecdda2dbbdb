// The timeline: a lane for each model on a canvas, with an axis, a tip under the pointer, a legend and a table.

import { $, attr, choices, h, show, text } from "./dom.js";
import { clock, count, duration, moment } from "./format.js";
import { PHASES, WINDOWS } from "./history.js";

const NAMES = {
  awake: "Awake", cooldown: "Cooldown: waits for its shortest stay", drain: "Drain: running answers end", sleep: "Going to sleep", wake: "Waking",
  ready: "Ready check", asleep: "Asleep", stopped: "Stopped", unreachable: "Unreachable", waiting: "Requests wait", error: "Error", gap: "Not known",
};
const TITLES = { 60: "1 min", 300: "5 min", 900: "15 min", 3600: "60 min" };
const STEPS = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1200];
const ROWS = 100; // of the table
const MANY = 8; // lanes, from which on quiet ones can be left out

export class Timeline {
  #history;
  #now;
  #window = Number(choices.get("window", "300"));
  #paused = null; // the moment that is shown while it is paused
  #colors = {};
  #patterns = new Map();
  #order = [];
  #lane = 28;
  #drawn = 0;
  #pointer = null;
  #calm = matchMedia("(prefers-reduced-motion: reduce)");

  /** `now()` is the gateway's clock in unix seconds. */
  constructor(history, now) {
    this.#history = history;
    this.#now = now;
    if (!WINDOWS.includes(this.#window)) this.#window = 300;
    for (const seconds of WINDOWS) {
      const input = h("input", { type: "radio", name: "window", value: seconds, id: `window-${seconds}` });
      input.checked = seconds === this.#window;
      input.addEventListener("change", () => {
        this.#window = seconds;
        choices.set("window", String(seconds));
        this.draw(true);
      });
      $("windows").append(input, h("label", { for: `window-${seconds}` }, TITLES[seconds]));
    }
    $("pause").addEventListener("click", () => {
      this.#paused = this.#paused === null ? this.#now() : null;
      attr($("pause"), "aria-pressed", this.#paused !== null);
      text($("pause"), this.#paused === null ? "Pause" : "Paused: go on");
      this.draw(true);
    });
    for (const name of Object.keys(NAMES)) $("legend").append(h("li", {}, h("canvas", { "data-swatch": name, "aria-hidden": "true" }), NAMES[name]));
    const chart = $("chart");
    chart.addEventListener("pointermove", (event) => { this.#pointer = [event.offsetX, event.offsetY]; this.#tip(); });
    chart.addEventListener("pointerdown", (event) => { this.#pointer = [event.offsetX, event.offsetY]; this.#tip(); });
    chart.addEventListener("pointerleave", () => { this.#pointer = null; this.#tip(); });
    $("quiet").checked = choices.get("quiet", "hide") === "hide";
    $("quiet").addEventListener("change", () => {
      choices.set("quiet", $("quiet").checked ? "hide" : "show");
      this.draw(true);
    });
    $("table-box").addEventListener("toggle", () => this.draw(true));
    new ResizeObserver(() => this.draw(true)).observe($("gantt"));
    this.recolor();
  }

  /** Milliseconds between two drawings: about one for each pixel that the lanes move, within reason. */
  get pace() {
    const pixel = (1000 * this.#window) / Math.max(200, $("chart").clientWidth);
    return Math.min(2000, Math.max(this.#calm.matches ? 1000 : 200, pixel));
  }

  /** The lanes, from the top: the order of the configuration, then models that are gone but seen in the window. */
  models(names) {
    this.#order = names;
  }

  /** Reads the colours anew: the theme has changed. */
  recolor() {
    const probe = h("i", { hidden: true });
    document.body.append(probe);
    for (const name of [...Object.keys(NAMES), "ink", "soft", "line", "card", "bad"]) {
      probe.style.color = `var(--${name})`;
      this.#colors[name] = getComputedStyle(probe).color;
    }
    probe.remove();
    this.#patterns.clear();
    for (const swatch of document.querySelectorAll("[data-swatch]")) {
      const { swatch: name } = swatch.dataset;
      const context = fit(swatch, 28, 14);
      if (name === "error") this.#flag(context, 14, 0, 14);
      else if (name === "waiting") this.#paint(context, name, 0, 6, 28, 3);
      else this.#paint(context, name, 0, 0, 28, 14);
    }
    this.draw(true);
  }

  draw(force = false) {
    const at = performance.now();
    if (document.hidden || $("board").hidden || (!force && at - this.#drawn < this.pace)) return;
    this.#drawn = at;
    const end = this.#paused ?? this.#now();
    const start = end - this.#window;
    const history = this.#history;
    const stirs = (name) => {
      const row = history.row(name);
      return history.states(name).some((each) => each.state === "awake" && (each.end ?? end) > start && each.start < end)
        || [row.phases, history.waits(name)].some((items) => items.some((each) => (each.end ?? end) > start && each.start < end));
    };
    const many = this.#order.length > MANY;
    show($("quiet-box"), many);
    const gone = history.models.filter((name) => !this.#order.includes(name) && stirs(name));
    let lanes = [...this.#order, ...gone];
    if (many && $("quiet").checked) lanes = lanes.filter(stirs);
    if (!lanes.length) lanes = this.#order;
    this.#lane = lanes.length > 24 ? 20 : lanes.length > 6 ? 28 : 44;
    this.#label(lanes);
    const scrolls = $("lanes").scrollHeight > $("lanes").clientHeight + 1;
    attr($("lanes"), "tabindex", scrolls ? "0" : null);
    attr($("lanes"), "role", scrolls ? "region" : null);
    attr($("lanes"), "aria-label", scrolls ? "Lanes of the timeline" : null);
    this.#canvas(lanes, start, end);
    this.#axis(start, end);
    this.#tell(lanes, start, end);
    this.#tip();
  }

  #label(lanes) {
    const names = $("names");
    while (names.children.length > lanes.length) names.lastChild.remove();
    lanes.forEach((name, i) => {
      const label = names.children[i] ?? names.appendChild(h("span"));
      text(label, name);
      attr(label, "title", name);
    });
    const height = `${this.#lane}px`;
    if (names.style.getPropertyValue("--lane") !== height) names.style.setProperty("--lane", height);
  }

  #canvas(lanes, start, end) {
    const canvas = $("chart");
    const width = canvas.parentElement.clientWidth - $("names").offsetWidth;
    const context = fit(canvas, width, Math.max(1, lanes.length) * this.#lane);
    const x = (time) => ((time - start) / (end - start)) * width;
    const history = this.#history;
    const { line } = this.#colors;
    const [pad, wait] = { 44: [4, 13], 28: [3, 5], 20: [2, 3] }[this.#lane];
    const height = this.#lane - 2 * pad - wait - 2;
    const each = (items, paint) => {
      for (const item of items) {
        const to = item.end ?? end;
        if (to < start || item.start > end) continue;
        const left = x(Math.max(item.start, start - 5));
        paint(item, left, Math.max(1.5, x(Math.min(to, end + 5)) - left), to);
      }
    };
    context.fillStyle = line;
    for (const tick of this.#ticks(start, end)) context.fillRect(Math.round(x(tick)), 0, 1, lanes.length * this.#lane);
    lanes.forEach((name, i) => {
      const top = i * this.#lane + pad;
      context.fillStyle = line;
      context.fillRect(0, (i + 1) * this.#lane - 1, width, 1);
      const row = history.row(name);
      each(history.states(name), (item, left, wide) => {
        if (item.state !== "unknown") this.#paint(context, item.state, left, top, wide, height);
      });
      each(row.phases, (item, left, wide, to) => {
        this.#paint(context, item.phase, left, top, wide, height);
        if (height < 15 || left < 0) return;
        this.#write(context, [`${item.phase} ${duration(Math.min(to, end) - item.start)}`, item.phase], item.phase, left, top + 2, wide, height - 4);
      });
      each(history.waits(name), (item, left, wide, to) => {
        if (wait < 12) return this.#paint(context, "waiting", left, top + height + 1, wide, wait);
        context.globalAlpha = 0.25;
        this.#paint(context, "waiting", left, top + height + 2, wide, wait);
        context.globalAlpha = 1;
        this.#paint(context, "waiting", left, top + height + wait, wide, 2);
        const longest = duration(item.end === null ? Math.min(to, end) - item.start : item.longest);
        const words = [`${item.count} waited, ${longest}`, `${item.count} · ${longest}`, String(item.count)];
        return this.#write(context, words, null, Math.max(left, 0), top + height + 1, wide + Math.min(0, left), wait);
      });
    });
    for (const gap of history.gaps) each([gap], (item, left, wide) => this.#paint(context, "gap", left, 0, wide, lanes.length * this.#lane));
    if (history.first !== null && history.first > start) {
      this.#paint(context, "gap", 0, 0, Math.min(width, x(history.first)), lanes.length * this.#lane);
    }
    for (const mark of history.marks) {
      if (mark.time < start || mark.time > end) continue;
      const lane = mark.model ? lanes.indexOf(mark.model) : -1;
      const left = Math.round(x(mark.time));
      const top = Math.max(lane, 0) * this.#lane;
      const tall = lane < 0 ? lanes.length * this.#lane : this.#lane;
      if (mark.kind === "error") {
        this.#flag(context, left, top, tall - 1);
      } else {
        context.fillStyle = this.#colors.soft;
        context.fillRect(left - 0.75, top, 1.5, tall);
      }
    }
  }

  /** A mark for an error. */
  #flag(context, x, top, height) {
    context.fillStyle = this.#colors.bad;
    context.fillRect(x - 0.75, top, 1.5, height);
    context.beginPath();
    context.moveTo(x - 5, top);
    context.lineTo(x + 5, top);
    context.lineTo(x, top + 8);
    context.fill();
  }

  /** The first of `choices` that has room in a bar: on a plate of its colour, or plain. */
  #write(context, choices, name, left, top, wide, height) {
    context.font = `600 ${Math.min(11, height - 2)}px Inter, system-ui, sans-serif`;
    const words = choices.find((each) => context.measureText(each).width + 10 < wide);
    if (!words) return;
    if (name) {
      context.fillStyle = this.#colors[name];
      context.fillRect(left + 2, top, context.measureText(words).width + 6, height);
    }
    context.fillStyle = name ? this.#colors.card : this.#colors.ink;
    context.textBaseline = "middle";
    context.fillText(words, left + 5, top + height / 2 + 0.5);
  }

  /** Fills a part of a lane: a colour, and a pattern of its own for each phase. */
  #paint(context, name, left, top, wide, height) {
    const color = this.#colors[name];
    if (name === "gap" || name === "unreachable") {
      context.fillStyle = this.#pattern(context, name, color);
      context.fillRect(left, top, wide, height);
      if (name === "unreachable") {
        context.strokeStyle = color;
        context.strokeRect(left + 0.5, top + 0.5, Math.max(0, wide - 1), height - 1);
      }
      return;
    }
    context.fillStyle = color;
    if (name === "asleep" || name === "stopped") {
      const middle = Math.round(top + height / 2);
      if (name === "asleep") context.fillRect(left, middle, wide, 1);
      else for (let dot = left - (left % 7) + 7; dot < left + wide - 1; dot += 7) context.fillRect(dot, middle - 1, 2, 2);
      return;
    }
    context.beginPath();
    context.roundRect(left, top, wide, height, Math.min(3, wide / 2));
    context.fill();
    if (!PHASES.includes(name) || wide < 4) return;
    context.fillStyle = this.#pattern(context, name, this.#colors.card);
    context.fill();
  }

  #pattern(context, name, color) {
    const known = this.#patterns.get(name);
    if (known) return known;
    const size = 8;
    const tile = h("canvas", { width: size, height: size });
    const pen = tile.getContext("2d");
    pen.strokeStyle = pen.fillStyle = color;
    pen.globalAlpha = name === "gap" ? 0.35 : name === "unreachable" ? 0.8 : 0.42;
    pen.lineWidth = 1.5;
    const stroke = (...points) => {
      pen.beginPath();
      for (const [x0, y0, x1, y1] of points) { pen.moveTo(x0, y0); pen.lineTo(x1, y1); }
      pen.stroke();
    };
    if (name === "cooldown") for (const [x, y] of [[1, 1], [5, 5]]) pen.fillRect(x, y, 2, 2);
    else if (name === "drain" || name === "gap") stroke([-2, 10, 10, -2], [-2, 2, 2, -2], [6, 10, 10, 6]);
    else if (name === "wake") stroke([-2, -2, 10, 10], [6, -2, 10, 2], [-2, 6, 2, 10]);
    else if (name === "sleep") stroke([0, 2, 8, 2], [0, 6, 8, 6]);
    else if (name === "ready") stroke([2, 0, 2, 8], [6, 0, 6, 8]);
    else stroke([0, 0, 8, 8], [8, 0, 0, 8]);
    const pattern = context.createPattern(tile, "repeat");
    this.#patterns.set(name, pattern);
    return pattern;
  }

  #ticks(start, end) {
    const width = $("chart").clientWidth || 600;
    const step = STEPS.find((seconds) => (seconds / (end - start)) * width >= 84) ?? STEPS.at(-1);
    const offset = new Date(end * 1000).getTimezoneOffset() * 60;
    const ticks = [];
    for (let tick = Math.ceil((start - offset) / step) * step + offset; tick <= end; tick += step) ticks.push(tick);
    return ticks;
  }

  #axis(start, end) {
    const canvas = $("axis");
    const left = $("names").offsetWidth;
    const width = $("chart").clientWidth;
    const context = fit(canvas, left + width, 22);
    context.font = "11px Inter, system-ui, sans-serif";
    context.textBaseline = "middle";
    context.fillStyle = this.#colors.soft;
    const now = this.#paused === null ? "now" : clock(end);
    const room = left + width - context.measureText(now).width - 8;
    const ticks = this.#ticks(start, end);
    const seconds = ticks.length > 1 && ticks[1] - ticks[0] < 60;
    for (const tick of ticks) {
      const words = clock(tick, seconds);
      const half = context.measureText(words).width / 2;
      const at = Math.max(half, left + ((tick - start) / (end - start)) * width);
      if (at + half < room) context.fillText(words, at - half, 11);
    }
    context.fillStyle = this.#colors.ink;
    context.fillText(now, left + width - context.measureText(now).width, 11);
  }

  /** The same in words, and as a table. */
  #tell(lanes, start, end) {
    const seen = this.#history.switches.filter((each) => (each.end ?? end) >= start && each.start <= end);
    const done = seen.filter((each) => each.outcome === "completed");
    const longest = Math.max(0, ...seen.map((each) => each.longest ?? 0));
    const share = lanes.map((name) => {
      let awake = 0;
      for (const each of this.#history.states(name)) {
        if (each.state === "awake") awake += Math.max(0, Math.min(each.end ?? end, end) - Math.max(each.start, start));
      }
      return [name, awake];
    }).filter(([, awake]) => awake > 0).sort((a, b) => b[1] - a[1]);
    const awake = share.slice(0, 5).map(([name, seconds]) => `${name} ${Math.round((100 * seconds) / this.#window)} %`).join(", ");
    const parts = [
      `${count(done.length, "switch", "switches")} in ${TITLES[this.#window]}${seen.length > done.length ? `, ${seen.length - done.length} more failed, given up or under way` : ""}`,
      longest ? `longest wait ${duration(longest)}` : "nobody waited for one",
      awake ? `awake: ${awake}` : "no model was awake",
    ];
    text($("timeline-text"), `${parts.join(" · ")}.`);
    attr($("chart"), "aria-label", `Timeline of ${count(lanes.length, "model")} over the last ${TITLES[this.#window]}`);
    if (!$("table-box").open) return;
    const rows = seen.slice(-ROWS).reverse();
    const body = $("switches");
    while (body.children.length > Math.max(1, rows.length)) body.lastChild.remove();
    if (!rows.length) {
      body.replaceChildren(h("tr", {}, h("td", { colspan: 11 }, "No switch in this window.")));
      return;
    }
    rows.forEach((each, i) => {
      const cells = [
        moment(each.start, end), `${each.from ?? "nothing"} → ${each.to ?? "nothing"}`, each.outcome ?? "under way",
        ...PHASES.map((phase) => duration(each.phases[phase])), duration((each.end ?? end) - each.start), String(each.outcome ? each.served : each.waiting),
        duration(each.longest),
      ];
      let row = body.children[i];
      if (row?.children.length !== cells.length) {
        const fresh = h("tr", {}, ...cells.map(() => h("td")));
        row ? row.replaceWith(fresh) : body.append(fresh);
        row = fresh;
      }
      cells.forEach((cell, n) => text(row.children[n], cell));
    });
  }

  /** What is under the pointer. */
  #tip() {
    const tip = $("tip");
    const names = [...$("names").children].map((each) => each.textContent);
    const name = this.#pointer && names[Math.floor(this.#pointer[1] / this.#lane)];
    if (!name) return show(tip, false);
    const canvas = $("chart");
    const end = this.#paused ?? this.#now();
    const time = end - this.#window * (1 - this.#pointer[0] / canvas.clientWidth);
    const slack = (3 * this.#window) / canvas.clientWidth;
    const at = (items) => items.findLast((each) => each.start - slack <= time && (each.end ?? end) + slack >= time);
    const row = this.#history.row(name);
    const exact = (items) => items.findLast((each) => each.start <= time && (each.end ?? end) >= time);
    const phase = exact(row.phases) ?? at(row.phases);
    const state = exact(this.#history.states(name));
    const wait = at(this.#history.waits(name));
    const mark = this.#history.marks.findLast((each) => Math.abs(each.time - time) <= slack && (!each.model || each.model === name));
    const lines = [`${name} · ${clock(time)}`];
    if (phase) lines.push(`${phase.phase}: ${duration((phase.end ?? end) - phase.start)}`);
    if (phase) {
      const within = this.#history.switches.findLast((each) => each.number === phase.number && each.start <= phase.start + 0.001);
      if (within) lines.push(`switch ${within.from ?? "nothing"} → ${within.to ?? "nothing"}${within.outcome ? `, ${within.outcome}, ${duration(within.end - within.start)}` : ""}`);
    } else if (state) {
      lines.push(`${state.state} for ${duration((state.end ?? end) - state.start)}${state.end === null ? " so far" : ""}`);
    }
    if (wait) lines.push(`${wait.count} waited, the longest ${duration(wait.end === null ? end - wait.start : wait.longest)}`);
    if (mark) lines.push(mark.text.length > 160 ? `${mark.text.slice(0, 160)}…` : mark.text);
    tip.replaceChildren(...lines.map((words) => h("p", {}, words)));
    show(tip, true);
    const left = canvas.offsetLeft + this.#pointer[0];
    const room = $("gantt").clientWidth;
    const x = Math.max(0, Math.min(left + 12, room - tip.offsetWidth - 4));
    const y = canvas.offsetTop + this.#pointer[1] + 16 - $("lanes").scrollTop;
    tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
  }
}

/** Sizes a canvas for this screen's pixels and clears it. */
function fit(canvas, width, height) {
  const ratio = Math.min(3, devicePixelRatio || 1);
  const [w, tall] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== tall) canvas.height = tall;
  if (canvas.style.width !== `${width}px`) canvas.style.width = `${width}px`;
  if (canvas.style.height !== `${height}px`) canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
