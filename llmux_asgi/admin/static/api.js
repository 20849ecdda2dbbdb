// The admin API: the key, calls, and what went wrong in plain words. Every address is relative to the page.

const KEY = "llmux-asgi.key";

/** The key, in this tab only. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An answer that is not a success; `status` is 0 if there was none. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const address = (path) => new URL(`api/${path}`, document.baseURI);

export const headers = (extra = {}) => ({ Authorization: `Bearer ${key.get()}`, ...extra });

/** A model's path. Slashes stay as they are, since proxies refuse encoded ones, unless that would change the name. */
export function modelPath(name, action) {
  const parts = name.split("/");
  const plain = parts.every((part) => part !== "" && part !== "." && part !== "..");
  return `models/${plain ? parts.map(encodeURIComponent).join("/") : encodeURIComponent(name)}/${action}`;
}

/** Reads the reason out of an error's answer. */
export async function reason(response) {
  const body = await response.text().catch(() => "");
  try {
    const message = JSON.parse(body)?.error?.message;
    if (typeof message === "string" && message) return message;
  } catch { /* not JSON: something else on the way has answered */ }
  return `The gateway, or a proxy before it, answered with status ${response.status}${response.statusText ? ` ${response.statusText}` : ""}.`;
}

/** Makes a call and returns its JSON. Throws `ApiError`. */
export async function call(method, path, options = {}) {
  let response;
  try {
    response = await fetch(address(path), { method, headers: headers(), cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The gateway cannot be reached.", 0);
  }
  if (!response.ok) throw new ApiError(await reason(response), response.status);
  try {
    return await response.json();
  } catch {
    throw new ApiError("The answer was cut short, or is not JSON.", response.status);
  }
}
