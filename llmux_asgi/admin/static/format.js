// Numbers and times for people.

/** Seconds as "0.42 s", "4.2 s", "42 s", "3 min 05 s", "2 h 05 min"; "–" for none. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  const s = Math.max(0, seconds);
  if (s < 0.995) return `${s.toFixed(2)} s`;
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 59.5) return `${Math.round(s)} s`;
  const whole = Math.round(s);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.round(minutes / 1440)} days`;
}

/** A moment that ticks on: tenths only below ten seconds, so that digits do not flicker. */
export function ticking(seconds) {
  const s = Math.max(0, seconds);
  return s < 10 ? `${s.toFixed(1)} s` : duration(s);
}

const clocks = { second: "2-digit", minute: "2-digit", hour: "2-digit", hourCycle: "h23" };
const withSeconds = new Intl.DateTimeFormat(undefined, clocks);
const withoutSeconds = new Intl.DateTimeFormat(undefined, { minute: "2-digit", hour: "2-digit", hourCycle: "h23" });
const withDate = new Intl.DateTimeFormat(undefined, { ...clocks, month: "short", day: "numeric" });

/** Unix seconds as the local time of day. */
export const clock = (time, seconds = true) => (seconds ? withSeconds : withoutSeconds).format(new Date(time * 1000));

/** The same, with the date if it is not today. */
export function moment(time, now) {
  return new Date(time * 1000).toDateString() === new Date(now * 1000).toDateString() ? clock(time) : withDate.format(new Date(time * 1000));
}

export const percent = (part, whole) => (whole > 0 ? `${((100 * part) / whole).toFixed(part / whole < 0.0995 ? 1 : 0)} %` : "–");

export const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

/** Names, joined for a sentence. */
export const list = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);
