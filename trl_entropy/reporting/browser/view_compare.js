// Several runs over one another: what differs in their settings, their charts, and where two of them part.

import { chart } from "./chart.js";
import { has } from "./charts_of_run.js";
import { meaning, page } from "./data.js";
import { h, plain } from "./dom.js";
import { withError } from "./format.js";
import { address, go, state } from "./state.js";
import { sortable } from "./table.js";
import { charts } from "./view_run.js";

/** @typedef {import("./data.js").Run} Run */

const APART = 2; // standard errors of the difference

/** @returns {(HTMLElement | null)[]} */
export function viewOfRuns() {
  const { runs } = page();
  return [
    h("h2", {}, `${runs.length} runs`),
    h("h3", {}, "Settings that differ"),
    differences(),
    h("h3", {}, "What each did"),
    h(
      "ul",
      {},
      runs.map((run) =>
        h(
          "li",
          {},
          h("a", { href: address({ run: run.number }) }, run.name),
          ": ",
          (run.sentences[0] || ["no numbers"])[0],
        ),
      ),
    ),
    charts(runs),
    difference(runs),
  ];
}

function differences() {
  const { runs, differences } = page();
  if (!differences.length) return h("p", {}, "None that are known.");
  const columns = ["setting", ...runs.map((run) => run.name)].map((head, index) => ({
    head,
    text: true,
    value: (/** @type {any[]} */ row) => (row[index] === null ? "–" : plain(String(row[index]).slice(0, 200))),
  }));
  return sortable(columns, differences, { name: "settings" });
}

/**
 * A key of one run less that of another at the same step, with errors where both have one.
 *
 * @param {Run} first
 * @param {Run} second
 * @param {string} key
 */
export function differenceOf(first, second, key) {
  const at = new Map(second.steps.columns.step.map((step, place) => [step, place]));
  /** @type {{x: number[], y: number[], error: (number | null)[], place: number[]}} */
  const found = { x: [], y: [], error: [], place: [] };
  first.steps.columns.step.forEach((step, place) => {
    const other = at.get(step);
    const [a, b] = [
      first.steps.columns[key]?.[place] ?? null,
      other === undefined ? null : (second.steps.columns[key]?.[other] ?? null),
    ];
    if (a === null || b === null) return;
    const [ea, eb] = [first, second].map(
      (run, index) => run.steps.columns[`${key}_stderr`]?.[index ? /** @type {number} */ (other) : place] ?? null,
    );
    found.x.push(step);
    found.y.push(b - a);
    found.error.push(ea === null || eb === null ? null : Math.hypot(ea, eb));
    found.place.push(place);
  });
  return found;
}

/** @param {Run[]} runs */
function difference(runs) {
  const [from, to] = (state().between || "0,1").split(",").map((text) => runs[Number(text)]);
  if (!from || !to || from === to) return null;
  const keys = Object.keys(from.steps.columns).filter(
    (key) => has(to, key) && has(from, key) && key !== "step" && !key.endsWith("_stderr"),
  );
  const given = state().of;
  const key =
    given && keys.includes(given)
      ? given
      : ["entropy/integral_measured", "entropy/probe_batch", "entropy/policy", "reward"].find(
          (name) => keys.includes(name) && differenceOf(from, to, name).x.length,
        );
  if (!key) return null;
  const found = differenceOf(from, to, key);
  const series = [
    {
      name: `${to.name} less ${from.name}`,
      x: found.x,
      y: found.y,
      error: found.error.some((error) => error !== null) ? found.error : undefined,
      steps: found.x,
      look: 0,
    },
  ];
  const onPick = (/** @type {number} */ step) => go({ pin: step }, true);
  return h(
    "section",
    {},
    h("h3", {}, "Where two runs part"),
    h("div", { class: "controls" }, runs.length > 2 && pairChoice(runs, from, to), keyChoice(keys, key)),
    h("p", { class: "lead" }, sentence(from, to, found)),
    h(
      "div",
      { class: "charts" },
      chart({
        title: `Difference of ${key}`,
        unit: meaning("steps", key)[0],
        series,
        zero: true,
        onPick,
        hint: meaning("steps", key)[1],
      }),
    ),
  );
}

/**
 * @param {Run} from
 * @param {Run} to
 * @param {ReturnType<typeof differenceOf>} found
 */
function sentence(from, to, found) {
  if (!found.x.length) return "They have no step in common at which both have it.";
  const place = found.y.findIndex((value, index) => {
    const error = found.error[index];
    return error !== null && error > 0 && Math.abs(value) > APART * error;
  });
  if (found.error.every((error) => error === null)) {
    const other = found.y.findIndex((value) => value !== 0);
    return other < 0
      ? "They are equal at every step that both have."
      : `They first differ at step ${found.x[other]}; this key has no standard errors, so the page cannot say where that is more than noise.`;
  }
  if (place < 0) return `They are nowhere further apart than ${APART} standard errors of their difference.`;
  return `They are first further apart than ${APART} standard errors of their difference at step ${found.x[place]}: ${withError(found.y[place], found.error[place])}. With many steps one of twenty is so by chance.`;
}

/**
 * @param {string[]} keys
 * @param {string} key
 */
function keyChoice(keys, key) {
  return h(
    "label",
    {},
    "Of ",
    h(
      "select",
      { onchange: (/** @type {any} */ event) => go({ of: event.target.value }, true) },
      keys.map((name) => h("option", { value: name, selected: name === key }, name)),
    ),
  );
}

/**
 * @param {Run[]} runs
 * @param {Run} from
 * @param {Run} to
 */
function pairChoice(runs, from, to) {
  const one = (/** @type {Run} */ chosen, /** @type {(number: string) => string} */ pair) =>
    h(
      "select",
      { onchange: (/** @type {any} */ event) => go({ between: pair(event.target.value) }, true) },
      runs.map((run) => h("option", { value: run.number, selected: run === chosen }, run.name)),
    );
  return h(
    "span",
    {},
    one(to, (value) => `${from.number},${value}`),
    " less ",
    one(from, (value) => `${value},${to.number}`),
  );
}
