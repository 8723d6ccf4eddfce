// Elements. Text goes in as text nodes and attributes by name, never as markup: what a model wrote is data.

const SVG = "http://www.w3.org/2000/svg";

function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// A value that the object itself holds: names of data may be those of every object ("constructor")
function own(object, name) {
  return Object.hasOwn(object, name) ? object[name] : undefined;
}

function byId(id) {
  return document.getElementById(id);
}

// What a screen reader is told
function say(text) {
  byId("status").textContent = text;
}

// A hint beside the pointer or the focused element
function showHint(near, content) {
  const hint = byId("hint");
  hint.replaceChildren(content);
  hint.hidden = false;
  const box = near.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - hint.offsetWidth - 8));
  const below = box.bottom + 6 + hint.offsetHeight <= innerHeight;
  hint.style.left = `${left}px`;
  hint.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - hint.offsetHeight - 6)}px`;
}

function hideHint() {
  byId("hint").hidden = true;
}
