// Elements without markup: every text is a text node, so that nothing a model wrote can become part of the page.

/** @typedef {Node | string | number | null | undefined | false} Child */

/**
 * An HTML element.
 *
 * @param {string} tag
 * @param {Record<string, any>} [props] attributes; `class`, `on…` for listeners, `style` as an object, false for none
 * @param {...(Child | Child[])} children
 * @returns {any}
 */
export function h(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

/**
 * An SVG element.
 *
 * @param {string} tag
 * @param {Record<string, any>} [props]
 * @param {...(Child | Child[])} children
 * @returns {any}
 */
export function svg(tag, props = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

/**
 * @param {any} element
 * @param {Record<string, any>} props
 * @param {(Child | Child[])[]} children
 */
function filled(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const key in value) element.style.setProperty(key, value[key]);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

/**
 * A part that a reader opens, made when it is opened first.
 *
 * @param {string} summary
 * @param {() => (Child | Child[])} content
 * @returns {HTMLElement}
 */
export function folded(summary, content) {
  const element = h("details", {}, h("summary", {}, summary));
  const fill = () =>
    element.open && element.childElementCount === 1 && element.append(...[content()].flat().filter(Boolean));
  element.addEventListener("toggle", fill);
  return element;
}

const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/**
 * A text with the characters that cannot be seen, or that turn the direction of others, as their numbers.
 *
 * @param {string} text
 */
export function plain(text) {
  return text.replace(UNSEEN, (mark) => `[U+${mark.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);
}

/**
 * Lets a reader keep a file that the page made.
 *
 * @param {string} name
 * @param {string} type
 * @param {string} text
 */
export function save(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
