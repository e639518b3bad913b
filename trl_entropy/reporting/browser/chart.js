// A chart of lines and points with errors. All charts of a page show the step that the pointer is at.

import { h, save, svg } from "./dom.js";
import { csv, number, withError } from "./format.js";
import { band, extent, line, nearest, ticks, visible } from "./scale.js";

/**
 * One line of a chart; x ascends.
 *
 * @typedef {{
 *   name: string, x: number[], y: (number | null)[], error?: (number | null)[], steps: number[],
 *   look: number, points?: boolean,
 * }} Series
 */

const WIDTH = 460;
const HEIGHT = 230;
const LEFT = 62;
const RIGHT = 12;
const TOP = 10;
const BOTTOM = 36;
/** A series is told by its colour, its dashes and the form of its points. */
const LOOKS = [
  { colour: "var(--series-1)", dash: "", mark: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0" },
  { colour: "var(--series-2)", dash: "7 3", mark: "M-3.5 -3.5L3.5 3.5M-3.5 3.5L3.5 -3.5" },
  { colour: "var(--series-3)", dash: "2 3", mark: "M0 -4.5L4.2 3.2L-4.2 3.2Z" },
  { colour: "var(--series-4)", dash: "9 3 2 3", mark: "M-3.3 -3.3H3.3V3.3H-3.3Z" },
  { colour: "var(--series-5)", dash: "12 4", mark: "M0 -4.6L4.6 0L0 4.6L-4.6 0Z" },
  { colour: "var(--series-6)", dash: "4 2 1 2", mark: "M-4 0H4M0 -4V4" },
];

/** What is told when the pointer is at a step, by every chart that is on the page now. @type {Set<(x: number | null) => void>} */
const listeners = new Set();
/** Where the pointer was last. @type {number | null} */
let pointedAt = null;

/** Forgets the charts of the view that is left. */
export function forgetCharts() {
  listeners.clear();
}

/**
 * Shows the numbers at x on every chart; null shows none.
 *
 * @param {number | null} x
 */
export function pointAt(x) {
  pointedAt = x;
  for (const listener of listeners) listener(x);
}

/** Shows the numbers where the pointer was, on charts that have been drawn again. */
export function pointAgain() {
  pointAt(pointedAt);
}

/**
 * @param {{
 *   title: string, hint?: string, unit: string, series: Series[], xName?: string, zero?: boolean,
 *   onPick?: (step: number, series: Series) => void, pinned?: number | null,
 * }} given `pinned` is the x that is shown while the pointer is elsewhere; `onPick` gets the step that is clicked
 * @returns {HTMLElement}
 */
export function chart(given) {
  const { series, unit } = given;
  const xs = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  const [x0, x1] = xs.length > 1 ? [xs[0], xs[xs.length - 1]] : [xs[0] - 1, xs[0] + 1];
  const [y0, y1] = extent(reach(series, given.zero === true));
  const toX = (/** @type {number} */ x) => LEFT + ((x - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT);
  const toY = (/** @type {number} */ y) => TOP + ((y1 - y) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const drawing = svg(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      role: "img",
      tabindex: 0,
      "aria-label": `${given.title}. Arrow keys move over the steps, Enter keeps one.`,
    },
    axes([x0, x1], [y0, y1], toX, toY, given.xName || "step"),
    series.map((one) => drawn(one, toX, toY)),
    cursor,
  );
  const values = series.map(() => h("span", { class: "value" }));
  const at = h("span", { class: "at" });
  let place = -1;

  /** @param {number | null} x */
  function show(x) {
    const chosen = x ?? given.pinned ?? null;
    place = chosen === null || !xs.length ? -1 : nearest(xs, chosen);
    const there = place < 0 ? null : xs[place];
    cursor.setAttribute("visibility", there === null ? "hidden" : "visible");
    if (there !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, toX(there));
    at.textContent = there === null ? "" : `${given.xName || "step"} ${number(there)}`;
    series.forEach((one, index) => {
      const row = there === null ? -1 : one.x.indexOf(there);
      values[index].textContent =
        row < 0 || one.y[row] === null ? "" : one.error ? withError(one.y[row], one.error[row]) : number(one.y[row]);
    });
  }

  /** @param {number} at */
  function pick(at) {
    const one = series.find((some) => some.x.includes(at));
    if (one && given.onPick) given.onPick(one.steps[one.x.indexOf(at)], one);
  }

  const under = (/** @type {PointerEvent} */ event) => {
    const box = drawing.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) / box.width) * WIDTH;
    return xs[nearest(xs, x0 + ((pixel - LEFT) / (WIDTH - LEFT - RIGHT)) * (x1 - x0))];
  };
  if (xs.length) {
    drawing.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => pointAt(under(event)));
    drawing.addEventListener("pointerleave", () => pointAt(null));
    drawing.addEventListener("click", (/** @type {PointerEvent} */ event) => pick(under(event)));
    drawing.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move) pointAt(xs[Math.min(Math.max(place < 0 ? 0 : place + move, 0), xs.length - 1)]);
      else if (event.key === "Enter" && place >= 0) pick(xs[place]);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }
  listeners.add(show);
  show(null);
  const head = h("figcaption", {}, h("strong", { title: given.hint || "" }, given.title), unit && ` (${unit}) `, at);
  const keys = h(
    "ul",
    { class: "keys" },
    series.map((one, index) => h("li", {}, keyOf(one), one.name, " ", values[index])),
  );
  return h("figure", { class: "chart" }, head, drawing, keys, savers(given, drawing));
}

/**
 * All numbers that an axis must reach.
 *
 * @param {Series[]} series
 * @param {boolean} zero
 */
function* reach(series, zero) {
  if (zero) yield 0;
  for (const { y, error } of series) {
    for (let place = 0; place < y.length; place++) {
      const value = y[place];
      if (value === null) continue;
      const half = (error && error[place]) || 0;
      yield value - half;
      yield value + half;
    }
  }
}

/**
 * @param {[number, number]} xEnds
 * @param {[number, number]} yEnds
 * @param {(x: number) => number} toX
 * @param {(y: number) => number} toY
 * @param {string} name
 */
function axes(xEnds, yEnds, toX, toY, name) {
  const bottom = HEIGHT - BOTTOM;
  const whole = ticks(xEnds[0], xEnds[1], 6).filter((x) => name !== "step" || Number.isInteger(x));
  return svg(
    "g",
    { class: "axes" },
    ticks(yEnds[0], yEnds[1], 5)
      .map((y) => [
        svg("line", { class: y === 0 ? "zero" : "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: toY(y), y2: toY(y) }),
        svg("text", { x: LEFT - 6, y: toY(y) + 4, "text-anchor": "end" }, number(y, 3)),
      ])
      .flat(),
    whole.map((x) => svg("text", { x: toX(x), y: bottom + 16, "text-anchor": "middle" }, number(x, 3))),
    svg("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle", class: "name" }, name),
  );
}

/**
 * @param {Series} one
 * @param {(x: number) => number} toX
 * @param {(y: number) => number} toY
 */
function drawn(one, toX, toY) {
  const look = LOOKS[one.look % LOOKS.length];
  const x = one.x.map(toX);
  const y = one.y.map((value) => (value === null ? null : toY(value)));
  const places = visible(x, y);
  const known = places.filter((place) => y[place] !== null);
  const paint = { stroke: look.colour, fill: "none" };
  const ends = (/** @type {number} */ sign) =>
    places.map((place) => {
      const [value, half] = [one.y[place], one.error?.[place] ?? null];
      return value === null || half === null ? null : toY(value + sign * half);
    });
  const [low, high] = one.error ? [ends(-1), ends(1)] : [[], []];
  const pick = (/** @type {any[]} */ values) => places.map((place) => values[place]);
  const parts = [];
  if (one.error && !one.points) {
    parts.push(svg("path", { d: band(pick(x), low, high), style: { fill: look.colour, opacity: "0.18" } }));
  } else if (one.error) {
    const bars = places.map((place, number) => bar(x[place], low[number], high[number]));
    if (known.length <= 400) parts.push(svg("path", { d: bars.join(""), style: paint }));
  }
  if (!one.points || known.length > 400) {
    parts.push(
      svg("path", {
        class: "line",
        d: line(pick(x), pick(y), true),
        style: { ...paint, "stroke-dasharray": look.dash || "none" },
      }),
    );
  }
  if (known.length <= (one.points ? 400 : 1)) {
    for (const place of known) {
      parts.push(
        svg("path", {
          d: look.mark,
          transform: `translate(${x[place].toFixed(1)} ${/** @type {number} */ (y[place]).toFixed(1)})`,
          style: { ...paint, fill: one.look % 2 ? "none" : look.colour },
        }),
      );
    }
  }
  return svg("g", { class: "series" }, parts);
}

/**
 * @param {number} x
 * @param {number | null} low
 * @param {number | null} high
 */
function bar(x, low, high) {
  return low === null || high === null ? "" : `M${x.toFixed(1)} ${low.toFixed(1)}V${high.toFixed(1)}`;
}

/** @param {Series} one */
function keyOf(one) {
  const look = LOOKS[one.look % LOOKS.length];
  const style = { stroke: look.colour, fill: one.look % 2 ? "none" : look.colour };
  return svg(
    "svg",
    { viewBox: "-13 -6 26 12", class: "key", "aria-hidden": "true" },
    !one.points && svg("path", { d: "M-12 0H12", style: { ...style, "stroke-dasharray": look.dash || "none" } }),
    one.points && svg("path", { d: look.mark, style }),
  );
}

/**
 * @param {{title: string, unit: string, series: Series[], xName?: string}} given
 * @param {SVGElement} drawing
 */
function savers(given, drawing) {
  const name = given.title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  const button = (/** @type {string} */ kind, /** @type {() => string} */ text, /** @type {string} */ type) =>
    h(
      "button",
      { class: "save", title: `Save as ${kind}`, onclick: () => save(`${name}.${kind}`, type, text()) },
      kind.toUpperCase(),
    );
  return h(
    "div",
    { class: "savers" },
    button(
      "csv",
      () => csv(["series", given.xName || "step", given.unit || "value", "stderr"], rowsOf(given.series)),
      "text/csv",
    ),
    button("svg", () => standalone(drawing, given), "image/svg+xml"),
  );
}

/** @param {Series[]} series */
function rowsOf(series) {
  return series.flatMap((one) => one.x.map((x, place) => [one.name, x, one.y[place], one.error?.[place] ?? null]));
}

/**
 * The drawing as a file of its own: the page's colours stand in it, and a legend.
 *
 * @param {SVGElement} drawing
 * @param {{title: string, unit: string, series: Series[]}} given
 */
export function standalone(drawing, given) {
  const copy = /** @type {any} */ (drawing.cloneNode(true));
  copy.querySelector(".cursor").remove();
  const height = HEIGHT + 22 + 16 * given.series.length;
  const attributes = {
    xmlns: "http://www.w3.org/2000/svg",
    viewBox: `0 -22 ${WIDTH} ${height}`,
    width: WIDTH,
    height,
  };
  for (const [key, value] of Object.entries(attributes)) copy.setAttribute(key, value);
  copy.append(
    svg(
      "text",
      { x: 8, y: -8, style: { "font-weight": "bold" } },
      `${given.title}${given.unit ? ` (${given.unit})` : ""}`,
    ),
  );
  given.series.forEach((one, index) => {
    const key = keyOf(one);
    const place = { x: 8, y: HEIGHT + 6 + 16 * index, width: 26, height: 12 };
    for (const [name, value] of Object.entries(place)) key.setAttribute(name, String(value));
    copy.append(key, svg("text", { x: 40, y: HEIGHT + 16 + 16 * index }, one.name));
  });
  const values = getComputedStyle(document.documentElement);
  const rules = `text{font:11px system-ui,sans-serif;fill:var(--ink)}.grid{stroke:var(--line)}.zero{stroke:var(--quiet)}path{stroke-width:1.5}`;
  copy.prepend(
    svg("style", {}, rules),
    svg("rect", { y: -22, width: WIDTH, height, style: { fill: "var(--paper)" } }),
  );
  const text = new XMLSerializer().serializeToString(copy);
  return text.replace(/var\((--[\w-]+)\)/g, (_, name) => values.getPropertyValue(name).trim());
}
