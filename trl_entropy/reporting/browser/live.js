// A page that follows its runs: asks the server for what is new, joins it to what is there, and reads steps when asked.

import { keepStep, lacking, opened, page, replacePage } from "./data.js";

/**
 * @typedef {import("./data.js").Run} Run
 * @typedef {import("./data.js").Table} Table
 * @typedef {import("./data.js").Page} Page
 */

const PATIENCE = 5; // times as long as the last answer took is waited before the next question

/** Whether this page follows its runs. */
export function isLive() {
  return page().version !== undefined;
}

/**
 * The two tables of the same columns as one, by step; rows of `next` take the place of those with their steps.
 *
 * @param {Table} before
 * @param {Table} next
 * @returns {Table}
 */
export function joined(before, next) {
  const gone = new Set(next.columns.step);
  const kept = [...Array(before.rows).keys()].filter((place) => !gone.has(before.columns.step[place]));
  const rows = kept.length + next.rows;
  const steps = [...kept.map((place) => before.columns.step[place]), ...(next.columns.step || [])];
  const order = [...steps.keys()].sort((a, b) => steps[a] - steps[b] || a - b);
  /** @type {Record<string, any[]>} */
  const columns = {};
  for (const name of new Set([...Object.keys(before.columns), ...Object.keys(next.columns)])) {
    const [old, added] = [before.columns[name], next.columns[name]];
    const values = [...kept.map((place) => (old ? old[place] : null)), ...(added || new Array(next.rows).fill(null))];
    columns[name] = order.map((place) => values[place]);
  }
  return { rows, columns };
}

/**
 * What the server has sent, joined to what the page had.
 *
 * @param {Page} before
 * @param {Page} next
 * @returns {Page}
 */
export function merged(before, next) {
  if (!next.reset) {
    next.runs.forEach((run, number) => {
      const { steps, parts } = before.runs[number];
      const changed = new Set(run.steps.columns.step);
      const rest = [...Array(parts.rows).keys()].filter((place) => !changed.has(parts.columns.step[place]));
      /** @type {Table} */
      const others = { rows: rest.length, columns: {} };
      for (const name in parts.columns) others.columns[name] = rest.map((place) => parts.columns[name][place]);
      run.steps = joined(steps, run.steps);
      run.parts = joined(others, run.parts);
    });
  }
  return next;
}

/**
 * Reads the completions of these steps from the server, if the page has not got them.
 *
 * @param {Run} run
 * @param {number[]} steps
 * @returns {Promise<unknown> | null} null if nothing is to be read
 */
export function reading(run, steps) {
  const names = isLive() ? steps.map((step) => lacking(run, step)).filter(Boolean) : [];
  if (!names.length) return null;
  return names.reduce(async (before, name) => {
    await before;
    const answer = await fetch(`step?name=${name}`);
    if (!answer.ok && answer.status !== 404) throw new Error(`The server did not answer (${answer.status})`);
    keepStep(/** @type {string} */ (name), answer.ok ? await answer.json() : null);
  }, Promise.resolve());
}

/**
 * Asks for what is new, again and again.
 *
 * @param {number} every seconds
 * @param {(runs: Run[] | null, before: Run[]) => void} changed gets the runs as they are now and as they were; null
 *   where the server does not answer
 */
export async function follow(every, changed) {
  const asked = performance.now();
  try {
    const answer = await fetch(`new?version=${page().version}`);
    if (answer.status === 200) {
      const before = page();
      replacePage(merged(before, opened(await answer.json())));
      changed(page().runs, before.runs);
    } else if (answer.status !== 204) throw new Error(String(answer.status));
    else changed(page().runs, page().runs);
  } catch {
    changed(null, page().runs);
  }
  setTimeout(() => follow(every, changed), Math.max(1000 * every, PATIENCE * (performance.now() - asked)));
}
