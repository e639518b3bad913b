// What each kind of token paid in entropy for what it earned in reward over the run: a scatter, and its table.

import { h, svg } from "./dom.js";
import { number } from "./format.js";
import { extent, ticks } from "./scale.js";
import { sortable } from "./table.js";

/**
 * A value with the ends of its interval; an end that is not finite is null.
 *
 * @typedef {{value: number, low: number | null, high: number | null}} Ends
 * @typedef {{name: string, lost: Ends, earned: Ends, price: Ends | null}} Priced
 */

const WIDTH = 460;
const HEIGHT = 300;
const [LEFT, RIGHT, TOP, BOTTOM] = [62, 12, 10, 40];
const EARNED = "reward/mean_delta_";

/**
 * The categories of a run's tokens that have a change of reward, at the last step that logged them.
 *
 * @param {import("./data.js").Run} run
 * @returns {Priced[]}
 */
export function pricedOf(run) {
  const { columns } = run.steps;
  const keys = Object.keys(columns).filter((key) => key.startsWith(EARNED) && !/_(low|high)$/.test(key));
  const found = [];
  for (const key of keys) {
    const name = key.slice(EARNED.length);
    const step = columns[key].findLastIndex((/** @type {number | null} */ value) => value !== null);
    const at = (/** @type {string} */ other) => (columns[other] ? columns[other][step] : null);
    const [change, earned, price] = [`entropy/mean_delta_${name}`, key, `reward/price_${name}`].map((one) => ({
      value: at(one),
      low: at(`${one}_low`),
      high: at(`${one}_high`),
    }));
    if (step < 0 || change.value === null) continue;
    const minus = (/** @type {number | null} */ value) => (value === null ? null : -value);
    const lost = { value: -change.value, low: minus(change.high), high: minus(change.low) };
    const bounded = price.value !== null && price.low !== null && price.high !== null;
    found.push({ name: named(name), lost, earned, price: bounded ? price : null });
  }
  return found;
}

/**
 * A category in words that hold whatever the rewards are.
 *
 * @param {string} name
 */
function named(name) {
  const outcome = { correct: "advantage above 0", incorrect: "advantage below 0" };
  return name
    .split("_")
    .map((word) => /** @type {any} */ (outcome)[word] ?? word)
    .join(" ");
}

/**
 * @param {import("./data.js").Run} run
 * @returns {HTMLElement | null}
 */
export function prices(run) {
  const rows = pricedOf(run);
  if (!rows.length) return null;
  const shown = (/** @type {Ends | null} */ ends) =>
    ends === null ? "none" : `${number(ends.value, 3)} [${number(ends.low, 3)}, ${number(ends.high, 3)}]`;
  const column = (/** @type {string} */ head, /** @type {"lost" | "earned" | "price"} */ key) => ({
    head,
    value: (/** @type {Priced} */ row) => (row[key] === null ? null : row[key].value),
    show: (/** @type {Priced} */ row) => shown(row[key]),
  });
  return h(
    "section",
    { "aria-label": "Prices" },
    h("h2", {}, "What was paid in entropy for reward"),
    h(
      "p",
      { class: "quiet" },
      "Over the run, with 95 % intervals; points are numbered as in the table, hollow without a price. The line is the price of all: above it entropy was dearer. A price is none where the change of reward is consistent with 0.",
    ),
    h("figure", { class: "chart", style: { "max-width": "40rem" } }, scatter(rows)),
    sortable(
      [
        { head: "no.", value: (/** @type {Priced} */ row) => rows.indexOf(row) + 1 },
        { head: "tokens", text: true, value: (/** @type {Priced} */ row) => row.name },
        column("nats/token lost a step", "lost"),
        column("reward earned a step", "earned"),
        column("nats/token for a unit of reward", "price"),
      ],
      rows,
      { name: "prices" },
    ),
  );
}

/** @param {Priced[]} rows */
function scatter(rows) {
  const reach = (/** @type {"lost" | "earned"} */ key) =>
    extent([0, ...rows.flatMap((row) => [row[key].value, row[key].low, row[key].high])]);
  const [x0, x1] = reach("earned");
  const [y0, y1] = reach("lost");
  const toX = (/** @type {number} */ x) => LEFT + ((x - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT);
  const toY = (/** @type {number} */ y) => TOP + ((y1 - y) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const all = rows.find((row) => row.name === "all" && row.price !== null);
  const slope = all && all.price ? all.price.value : null;
  return svg(
    "svg",
    {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      role: "img",
      "aria-label": "Entropy lost over reward earned, by kind of token",
    },
    axes([x0, x1], [y0, y1], toX, toY),
    slope !== null && svg("path", { d: through(slope, [x0, x1], [y0, y1], toX, toY), style: LINE }),
    rows.map((row, place) => point(row, place, toX, toY)),
  );
}

const LINE = { stroke: "var(--quiet)", "stroke-dasharray": "5 4", fill: "none" };

/**
 * @param {[number, number]} xEnds
 * @param {[number, number]} yEnds
 * @param {(x: number) => number} toX
 * @param {(y: number) => number} toY
 */
function axes(xEnds, yEnds, toX, toY) {
  const bottom = HEIGHT - BOTTOM;
  return svg(
    "g",
    { class: "axes" },
    ticks(yEnds[0], yEnds[1], 5).flatMap((y) => [
      svg("line", { class: y === 0 ? "zero" : "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: toY(y), y2: toY(y) }),
      svg("text", { x: LEFT - 6, y: toY(y) + 4, "text-anchor": "end" }, number(y, 3)),
    ]),
    ticks(xEnds[0], xEnds[1], 7).flatMap((x) => [
      svg("line", { class: x === 0 ? "zero" : "grid", x1: toX(x), x2: toX(x), y1: TOP, y2: bottom }),
      svg("text", { x: toX(x), y: bottom + 16, "text-anchor": "middle" }, number(x, 3)),
    ]),
    svg(
      "text",
      { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle", class: "name" },
      "reward earned a step; upwards: nats/token lost a step",
    ),
  );
}

/**
 * The part within the axes of a line through 0.
 *
 * @param {number} slope
 * @param {[number, number]} xEnds
 * @param {[number, number]} yEnds
 * @param {(x: number) => number} toX
 * @param {(y: number) => number} toY
 */
function through(slope, xEnds, yEnds, toX, toY) {
  const ends = slope === 0 ? xEnds : yEnds.map((y) => y / slope).sort((a, b) => a - b);
  const [from, to] = [Math.max(xEnds[0], ends[0]), Math.min(xEnds[1], ends[1])];
  return `M${toX(from).toFixed(1)} ${toY(slope * from).toFixed(1)}L${toX(to).toFixed(1)} ${toY(slope * to).toFixed(1)}`;
}

/**
 * @param {Priced} row
 * @param {number} place
 * @param {(x: number) => number} toX
 * @param {(y: number) => number} toY
 */
function point(row, place, toX, toY) {
  const [x, y] = [toX(row.earned.value), toY(row.lost.value)];
  const colour = `var(--series-${(place % 6) + 1})`;
  const across =
    row.earned.low === null || row.earned.high === null ? "" : `M${toX(row.earned.low)} ${y}H${toX(row.earned.high)}`;
  const up = row.lost.low === null || row.lost.high === null ? "" : `M${x} ${toY(row.lost.low)}V${toY(row.lost.high)}`;
  return svg(
    "g",
    { class: "series" },
    svg("path", { d: across + up, style: { stroke: colour, fill: "none", opacity: "0.7" } }),
    svg("circle", {
      cx: x,
      cy: y,
      r: 3.5,
      style: { fill: row.price === null ? "var(--paper)" : colour, stroke: colour },
    }),
    svg("text", { x: x + 6, y: y - 5 }, place + 1),
    svg("title", {}, `${row.name}: ${row.price === null ? "no price" : number(row.price.value, 3)}`),
  );
}
