// Server-sent events over fetch(), since EventSource cannot send an Authorization header.

import { ApiError, address, headers, reason } from "./api.js";

const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 15_000;
const SILENCE = 25_000; // the gateway sends a comment every 10 s
const LONGEST_LINE = 4_000_000; // characters without a line's end: not this API

/** Splits chunks of text into events {event, data, id}, by the rules of the HTML standard. */
export class Parser {
  #rest = "";
  #event = "";
  #data = [];
  #id = null;

  *feed(chunk) {
    this.#rest += chunk;
    if (this.#rest.length > LONGEST_LINE) throw new Error("a line without an end");
    for (;;) {
      const end = this.#rest.search(/\r\n|\n|\r(?!$)/);
      if (end < 0) return;
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + (this.#rest.startsWith("\r\n", end) ? 2 : 1));
      if (line === "") {
        if (this.#data.length) yield { event: this.#event || "message", data: this.#data.join("\n"), id: this.#id };
        this.#event = "";
        this.#data = [];
        this.#id = null;
        continue;
      }
      const colon = line.indexOf(":");
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "event") this.#event = value;
      else if (field === "data") this.#data.push(value);
      else if (field === "id") this.#id = value;
    }
  }
}

/**
 * Follows the events until `stop()`: connects again with growing pauses, from the last event on.
 *
 * `on.event({event, data, id})`, `on.link("connecting" | "live" | "waiting", {why, until})`, `on.refused(message)`: the key is wrong,
 * and nothing more is tried.
 */
export class Stream {
  #on;
  #last = "";
  #abort = null;
  #pause = FIRST_PAUSE;
  #wake = null;
  #stopped = false;

  constructor(on) {
    this.#on = on;
    this.#run();
  }

  stop() {
    this.#stopped = true;
    this.#abort?.abort();
    this.#wake?.();
  }

  /** Tries again at once instead of after the pause. */
  hurry() {
    this.#wake?.();
  }

  async #run() {
    while (!this.#stopped) {
      this.#on.link("connecting", {});
      let why;
      try {
        await this.#follow();
        why = "the connection was closed";
      } catch (error) {
        if (this.#stopped) return;
        if (error instanceof ApiError && (error.status === 401 || error.status === 403)) {
          this.#stopped = true;
          this.#on.refused(error.message);
          return;
        }
        why = error instanceof ApiError ? error.message : error.name === "AbortError" ? "nothing was heard for 25 s" : "the gateway cannot be reached";
      }
      if (this.#stopped) return;
      const pause = this.#pause * (0.8 + 0.4 * Math.random());
      this.#pause = Math.min(this.#pause * 2, LONGEST_PAUSE);
      this.#on.link("waiting", { why, until: Date.now() + pause });
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, pause);
        this.#wake = () => { clearTimeout(timer); resolve(); };
      });
      this.#wake = null;
    }
  }

  async #follow() {
    const abort = new AbortController();
    this.#abort = abort;
    let watchdog = setTimeout(() => abort.abort(), SILENCE);
    try {
      const extra = { Accept: "text/event-stream", ...(this.#last ? { "Last-Event-ID": this.#last } : {}) };
      const response = await fetch(address("events"), { headers: headers(extra), cache: "no-store", credentials: "omit", signal: abort.signal });
      if (!response.ok) throw new ApiError(await reason(response), response.status);
      if (!(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
        throw new ApiError("Something else than the gateway has answered.", response.status);
      }
      const parser = new Parser();
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        clearTimeout(watchdog);
        watchdog = setTimeout(() => abort.abort(), SILENCE);
        for (const event of parser.feed(value)) {
          if (this.#stopped) return;
          if (event.id) this.#last = event.id;
          if (event.event === "status") {
            this.#pause = FIRST_PAUSE; // only what has said something sensible counts as a connection
            this.#on.link("live", {});
          }
          this.#on.event(event);
        }
      }
    } finally {
      clearTimeout(watchdog);
      abort.abort();
    }
  }
}
