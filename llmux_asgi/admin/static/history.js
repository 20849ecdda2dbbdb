// What has happened, for the timeline: built from the events of the journal and from status objects. No DOM in here.

export const WINDOWS = [60, 300, 900, 3600];
export const PHASES = ["cooldown", "drain", "sleep", "wake", "ready"];

const KEEP = WINDOWS.at(-1) + 60; // seconds
const MOST = 5000; // of each kind for each model, and of switches; more than an hour of the quickest switching that can be told apart

export class History {
  /** Id of the last entry, and of which process. */
  epoch = "";
  last = 0;
  /** Since when it is known what happened: in this process of the gateway, and in any. */
  begin = null;
  first = null;
  /** The last moment that was heard of. */
  heard = null;
  switches = [];
  marks = []; // {time, kind, model, text}
  gaps = []; // {start, end, why}
  #rows = new Map(); // model -> {states, phases, waits, open, now, before}
  #phase = null;
  #started = null; // the gateway

  row(model) {
    let row = this.#rows.get(model);
    if (!row) this.#rows.set(model, (row = { states: [], phases: [], waits: [], open: null, now: null, before: null }));
    return row;
  }

  get models() {
    return [...this.#rows.keys()];
  }

  /** Takes an entry of the journal. Says whether it was new. */
  add(id, kind, entry) {
    const dash = id.lastIndexOf("-");
    const [epoch, number] = [id.slice(0, dash), Number(id.slice(dash + 1))];
    if (epoch !== this.epoch) this.#restart(epoch, entry.time);
    else if (number <= this.last) return false;
    else if (number > this.last + 1 && this.last) this.#missed(entry.time);
    this.last = number;
    this.begin ??= number === 1 ? Math.min(this.#started ?? entry.time, entry.time) : entry.time;
    this.first ??= this.begin;
    this.#hear(entry.time);
    const { time } = entry;
    switch (kind) {
      case "switch":
        this.#endPhase(time);
        if (entry.from && !this.row(entry.from).states.some((each) => each.start >= this.begin)) this.row(entry.from).before = "awake";
        push(this.switches, { number: entry.switch, from: entry.from, to: entry.to, start: time, end: null, outcome: null, waiting: entry.waiting,
          inFlight: entry.in_flight, phases: {}, served: 0, longest: null });
        break;
      case "phase":
        this.#endPhase(time);
        this.#phase = { phase: entry.phase, model: entry.model, number: entry.switch, start: time, end: null };
        push(this.row(entry.model).phases, this.#phase);
        break;
      case "switched":
        this.#endPhase(time);
        this.#switched(entry);
        break;
      case "model":
        this.#state(entry.model, entry.state, time);
        break;
      case "error":
        push(this.marks, { time, kind, model: entry.model, text: `${entry.kind}: ${entry.message}` });
        break;
      case "pin":
        push(this.marks, { time, kind, model: entry.model, text: entry.model ? `${entry.model} is pinned` : "no model is pinned any more" });
        break;
      case "drain":
        push(this.marks, { time, kind, model: null, text: entry.draining ? "draining began" : "requests are taken again" });
        break;
      case "config":
        push(this.marks, { time, kind, model: null, text: "the configuration was reloaded" });
        break;
    }
    return true;
  }

  /** Takes a status object. */
  observe(status) {
    if (status.epoch !== this.epoch) this.#restart(status.epoch, status.started);
    this.#started = status.started;
    if (this.begin === null && status.last_event === 0) this.begin = status.started;
    this.first ??= this.begin;
    const known = status.last_event <= this.last;
    for (const model of status.models) {
      const row = this.row(model.name);
      row.now = model.state;
      const state = row.states.at(-1);
      if (known && state && state.end === null && state.state !== model.state) this.#state(model.name, model.state, status.time);
      if (model.waiting > 0) {
        const longest = model.oldest_wait ?? 0;
        row.open ??= { start: status.time - longest, end: null, count: 0, longest: 0 };
        row.open.count = Math.max(row.open.count, model.waiting);
        row.open.longest = Math.max(row.open.longest, longest);
      } else {
        this.#served(row, status.time);
      }
    }
    const there = new Set(status.models.map((model) => model.name));
    for (const [name, row] of this.#rows) if (!there.has(name) && row.now !== null) this.#leave(row, status.time);
    this.#hear(status.time);
    this.#prune(status.time);
  }

  /** States of a model with what can be told of the time before its first entry: [{start, end, state}]. */
  states(model) {
    const row = this.row(model);
    const began = row.states.findIndex((each) => each.start >= this.begin);
    const first = began < 0 ? null : row.states[began];
    const before = first ? row.before : row.now;
    if (before === null || this.begin === null) return row.states;
    const told = { start: this.begin, end: first ? first.start : null, state: before };
    return began < 0 ? [...row.states, told] : row.states.toSpliced(began, 0, told);
  }

  /** Times in which requests waited for a model: [{start, end, count, longest}]; the last one may go on. */
  waits(model) {
    const { waits, open } = this.row(model);
    return open ? [...waits, open] : waits;
  }

  #hear(time) {
    if (this.heard === null || time > this.heard) this.heard = time;
  }

  #state(model, state, time) {
    const row = this.row(model);
    row.now = state;
    const last = row.states.at(-1);
    if (last && last.end === null) {
      if (last.state === state) return;
      last.end = time;
    }
    push(row.states, { start: time, end: null, state });
  }

  #endPhase(time) {
    if (this.#phase) this.#phase.end = time;
    this.#phase = null;
  }

  #switched(entry) {
    let found = this.switches.findLast((each) => each.number === entry.switch && each.end === null);
    if (!found) {
      found = { number: entry.switch, from: entry.from, to: entry.to, start: entry.time - entry.duration, waiting: entry.served, inFlight: null };
      push(this.switches, found);
    }
    Object.assign(found, { end: entry.time, outcome: entry.outcome, phases: entry.phases ?? {}, served: entry.served ?? 0, longest: entry.longest_wait ?? null });
    if (!entry.to || !entry.longest_wait) return;
    const row = this.row(entry.to);
    const start = entry.time - entry.longest_wait;
    if (row.open && row.open.start < entry.time) this.#served(row, entry.time); // a status has told of it before
    const last = row.waits.at(-1);
    if (last && last.end > start + 0.5) {
      last.count = Math.max(last.count, entry.served);
      last.longest = Math.max(last.longest, entry.longest_wait);
      last.start = Math.min(last.start, start);
    } else {
      push(row.waits, { start, end: entry.time, count: entry.served, longest: entry.longest_wait });
    }
  }

  /** Nobody waits for the model any more. */
  #served(row, time) {
    if (row.open) push(row.waits, Object.assign(row.open, { end: time }));
    row.open = null;
  }

  #leave(row, time) {
    row.now = null;
    this.#served(row, time);
    const state = row.states.at(-1);
    if (state && state.end === null) state.end = time;
  }

  /** Entries of another process begin: what was open ended when the old one was last heard of. */
  #restart(epoch, began) {
    if (this.epoch) {
      const end = this.heard ?? began;
      for (const [name, row] of this.#rows) {
        row.states = this.states(name).map((each) => (each.end === null ? { ...each, end } : each));
        row.before = null;
        this.#leave(row, end);
      }
      this.#endPhase(end);
      for (const each of this.switches) if (each.end === null) Object.assign(each, { end, outcome: "lost" });
      push(this.gaps, { start: end, end: Math.max(began, end), why: "the gateway was restarted" });
      push(this.marks, { time: Math.max(began, end), kind: "restart", model: null, text: "the gateway was restarted" });
    }
    this.epoch = epoch;
    this.last = 0;
    this.begin = null;
  }

  /** Entries are gone that were never seen. */
  #missed(time) {
    push(this.gaps, { start: this.heard, end: time, why: "more happened than the gateway keeps" });
    this.#endPhase(this.heard);
  }

  #prune(now) {
    const oldest = now - KEEP;
    const drop = (items, end = (each) => each.end) => {
      let gone = Math.max(0, items.length - MOST);
      while (gone < items.length && (end(items[gone]) ?? now) < oldest) gone += 1;
      if (gone) items.splice(0, gone);
      return gone;
    };
    for (const [name, row] of this.#rows) {
      if (drop(row.states)) row.before = null; // that time is over
      drop(row.phases);
      drop(row.waits);
      if (row.now === null && !row.states.length && !row.phases.length && !row.waits.length && !row.open) this.#rows.delete(name);
    }
    drop(this.switches);
    drop(this.gaps);
    drop(this.marks, (each) => each.time);
  }
}

function push(items, item) {
  items.push(item);
  if (items.length > MOST * 1.1) items.splice(0, items.length - MOST); // some at a time: it moves all others
}
