// Small helpers around the DOM. Text is set as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** Makes an element. `attributes` are set as attributes, `children` are nodes or strings. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children);
  return element;
}

/** Sets the text if it differs: a page that stands still costs nothing. */
export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

/** Sets an attribute if it differs; `null` takes it away. */
export function attr(element, name, value) {
  if (value === null || value === undefined) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) {
    element.setAttribute(name, String(value));
  }
}

/** Shows or hides. */
export function show(element, visible) {
  if (element.hidden === visible) element.hidden = !visible;
}

/** What the user has chosen for this browser. Never the key. */
export const choices = {
  get(name, otherwise) {
    try { return localStorage.getItem(`llmux-asgi.${name}`) ?? otherwise; } catch { return otherwise; }
  },
  set(name, value) {
    try { localStorage.setItem(`llmux-asgi.${name}`, value); } catch { /* storage is turned off: the choice lasts as long as the page */ }
  },
};
