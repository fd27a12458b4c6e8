// Making and finding elements, and what a browser lets the page store.

export const byId = (id) => document.getElementById(id);

/** Make an element. A name with a hyphen is an attribute, `on...` a listener, all else a property. Text stays text. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick) {
  return el("button", { type: "button", className: "icon", title: label, "aria-label": label, onclick }, icon(name));
}

export const button = (text, onclick, className = "") => el("button", { type: "button", className, onclick }, text);

/** Tell a screen reader. */
export function announce(text) {
  byId("live").textContent = text;
}

/** A browser may forbid the page to store anything; then it forgets. */
export function stored(storage, key) {
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

export function store(storage, key, value) {
  try {
    if (value === null) window[storage].removeItem(key);
    else window[storage].setItem(key, value);
  } catch {
    // Forgotten.
  }
}
