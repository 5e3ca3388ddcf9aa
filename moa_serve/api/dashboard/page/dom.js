// Elements from plain calls. Text becomes text nodes and nothing else, so what a server, a model or a file name says is never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

/** An HTML element: attributes by name (`onclick` listens), then children, nodes or texts. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function byId(id) {
  return document.getElementById(id);
}

/** Sets a text only where it is another one, so that selections and readers are left in peace. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Fills a select with [value, label] pairs, or {group, options}; keeps what is chosen where it is still there. */
export function setOptions(select, entries) {
  const signature = JSON.stringify(entries);
  if (select.dataset.signature === signature) return;
  const chosen = select.value;
  const option = ([value, label]) => h("option", { value }, label);
  select.replaceChildren(
    ...entries.map((entry) => (Array.isArray(entry) ? option(entry) : h("optgroup", { label: entry.group }, ...entry.options.map(option)))),
  );
  select.dataset.signature = signature;
  if ([...select.options].some((each) => each.value === chosen)) select.value = chosen;
}
