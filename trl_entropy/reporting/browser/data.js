// The data of the page: JSON in elements of the document, decoded when they are first asked for.

/**
 * A table: its number of rows and its columns.
 *
 * @typedef {{rows: number, columns: Record<string, any[]>}} Table
 *
 * @typedef {{
 *   number: number, name: string, sentences: [string, number | null][], cut: string[], binary: boolean,
 *   warnings: [string, string, number[], boolean][], settings: Record<string, any>, changed: [string, string, string][],
 *   steps: Table, parts: Table, evaluation: Table, shown: Record<string, string>, known: number[], tokens_known: number[],
 *   progress?: string,
 * }} Run
 *
 * @typedef {{
 *   step: number, promptEnds: [string, string], groups: Table, completions: Table, tokens: Table | null,
 *   measuredCompletions: Table | null, measuredTokens: Table | null, dropped: Table | null,
 * }} Step
 */

/** @type {Map<string, any>} */
const known = new Map();

/** @param {string} name */
function block(name) {
  const element = document.getElementById(`data-${name}`);
  return element ? JSON.parse(element.textContent || "null") : null;
}

/**
 * A column as it was written (see `trl_entropy/reporting/columns.py`), as an array.
 *
 * @param {any} given
 * @param {number} rows
 * @returns {any[]}
 */
export function decoded(given, rows) {
  if (Array.isArray(given)) return given;
  if ("constant" in given) return new Array(rows).fill(given.constant);
  if ("counts" in given) {
    /** @type {any[]} */
    const values = [];
    given.counts.forEach((/** @type {number} */ count, /** @type {number} */ place) => {
      for (let number = 0; number < count; number++) values.push(given.values[place]);
    });
    return values;
  }
  return decoded(given.index, rows).map((number) => (number < 0 ? null : given.texts[number]));
}

/**
 * @param {any} given
 * @returns {Table}
 */
function table(given) {
  /** @type {Record<string, any[]>} */
  const columns = {};
  /** @type {Record<string, any[]>} */
  const made = {};
  for (const name in given.columns) {
    const get = () => (made[name] ??= decoded(given.columns[name], given.rows));
    Object.defineProperty(columns, name, { enumerable: true, get });
  }
  return { rows: given.rows, columns };
}

/**
 * `version` is that of a page that follows its runs, and asks for what is new `every` so many seconds.
 *
 * @typedef {{
 *   runs: Run[], differences: any[][], means: Record<string, Table>, columns: any,
 *   metrics: Record<string, [string, string]>, version?: number, reset?: boolean, every?: number,
 * }} Page
 */

/** @returns {Page} */
export function page() {
  if (!known.has("page")) known.set("page", opened(block("page")));
  return known.get("page");
}

/**
 * The block of all runs with its tables, as it is written on the page or sent by the server.
 *
 * @param {any} given
 * @returns {Page}
 */
export function opened(given) {
  given.runs.forEach((/** @type {any} */ run, /** @type {number} */ number) => {
    Object.assign(run, { number, ...tablesOf(run, ["steps", "parts", "evaluation"]) });
    run.known = Object.keys(run.shown).map(Number);
    run.known.sort((/** @type {number} */ a, /** @type {number} */ b) => a - b);
  });
  for (const key in given.means) given.means[key] = table(given.means[key]);
  return given;
}

/**
 * @param {any} given
 * @param {string[]} names
 */
function tablesOf(given, names) {
  return Object.fromEntries(names.map((name) => [name, table(given[name])]));
}

/**
 * Puts what the server has sent in the place of what the page had.
 *
 * @param {Page} next
 */
export function replacePage(next) {
  known.set("page", next);
}

/**
 * The name of a step's block, if the server has it and the page not yet.
 *
 * @param {Run} run
 * @param {number} step
 * @returns {string | null}
 */
export function lacking(run, step) {
  const name = run.shown[step];
  return name && !known.has(name) && !document.getElementById(`data-${name}`) ? name : null;
}

/**
 * What the page holds of a step's completions; null if it holds none.
 *
 * @param {Run} run
 * @param {number} step
 * @returns {Step | null}
 */
export function stepOf(run, step) {
  const name = run.shown[step];
  if (!name) return null;
  if (!known.has(name)) {
    const given = block(name);
    if (!given) return null;
    keepStep(name, given);
  }
  return known.get(name);
}

/**
 * Keeps the block of a step, as it is written on the page or sent by the server.
 *
 * @param {string} name
 * @param {any} given null: the run has no completions of the step any more
 */
export function keepStep(name, given) {
  if (!given) {
    known.set(name, null);
    return;
  }
  const some = (/** @type {string} */ key) => (given[key] ? table(given[key]) : null);
  known.set(name, {
    step: given.step,
    promptEnds: given.prompt_ends,
    groups: some("groups"),
    completions: some("completions"),
    tokens: some("tokens"),
    measuredCompletions: some("measured_completions"),
    measuredTokens: some("measured_tokens"),
    dropped: some("dropped"),
  });
}

/**
 * The numbers of a step by their keys.
 *
 * @param {Run} run
 * @param {number} step
 * @returns {Record<string, number | null>}
 */
export function numbersOf(run, step) {
  const place = run.steps.columns.step.indexOf(step);
  /** @type {Record<string, number | null>} */
  const found = {};
  if (place < 0) return found;
  for (const key in run.steps.columns) found[key] = run.steps.columns[key][place];
  return found;
}

/**
 * The places of the rows of a table in which a column has a value.
 *
 * @param {Table} given
 * @param {string} name
 * @param {any} value
 */
export function rowsWith(given, name, value) {
  /** @type {number[]} */
  const found = [];
  given.columns[name].forEach((other, place) => {
    if (other === value) found.push(place);
  });
  return found;
}

/**
 * Unit and meaning of a column of a view, or of a key of the steps.
 *
 * @param {string} view
 * @param {string} name
 * @returns {[string, string]}
 */
export function meaning(view, name) {
  const { columns, metrics } = page();
  if (view === "steps" && metrics[name]) return metrics[name];
  if (view === "steps" && name.endsWith("_stderr") && metrics[name.slice(0, -7)]) {
    return [metrics[name.slice(0, -7)][0], `Standard error of ${name.slice(0, -7)}.`];
  }
  if (name.startsWith("reward/")) return ["", `What the reward function ${name.slice(7)} gave.`];
  const found = (columns[view] || {})[name];
  return found ? [found[0], found[1]] : ["", ""];
}
