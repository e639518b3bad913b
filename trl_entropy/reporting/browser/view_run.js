// The first view: what the run did, in sentences; charts; and its steps.

import { chart } from "./chart.js";
import { AXES, PLANS, has, heldOutOf, seriesOf } from "./charts_of_run.js";
import { meaning, page } from "./data.js";
import { folded, h, plain } from "./dom.js";
import { counted, number, signed, withError } from "./format.js";
import { address, go, state } from "./state.js";
import { sortable } from "./table.js";
import { prices } from "./view_prices.js";

/** @typedef {import("./data.js").Run} Run */

/**
 * @param {Run} run
 * @returns {(HTMLElement | null)[]}
 */
export function viewOfRun(run) {
  return [
    h("section", { class: "sentences" }, sentences(run)),
    warnings(run),
    settings(run),
    charts([run]),
    prices(run),
    h("h2", {}, "Steps"),
    h(
      "p",
      { class: "quiet" },
      "A row leads to the step. Numbers after ± are standard errors. ",
      counted(run.known.length, "step"),
      " of this run have their completions on this page",
      run.tokens_known.length ? `, ${run.tokens_known.length} of the run with what each completion added.` : ".",
      run.cut.map((sentence) => [" ", sentence]).flat(),
    ),
    tableOfSteps(run),
    whichToBelieve(run),
  ];
}

/** @param {Run} run */
function sentences(run) {
  return run.sentences.map(([text, step], index) =>
    h(
      "p",
      { class: index ? "" : "lead" },
      text,
      " ",
      step !== null && h("a", { href: address({ run: run.number, step }) }, `Open step ${step}`),
    ),
  );
}

/** @param {Run} run */
function warnings(run) {
  if (!run.warnings.length) return h("p", { class: "quiet" }, "No warnings.");
  return h(
    "section",
    { "aria-label": "Warnings" },
    run.warnings.map(([title, text, steps, isNote]) =>
      h(
        "details",
        { class: isNote ? "note" : "warning" },
        h(
          "summary",
          {},
          h("strong", {}, `${isNote ? "Note" : "Warning"}: ${title}`),
          ` (${counted(steps.length, "step")})`,
        ),
        h("p", {}, plain(text)),
        h(
          "p",
          {},
          "At ",
          steps
            .slice(0, 40)
            .map((step) => [h("a", { href: address({ run: run.number, step }) }, `step ${step}`), " "])
            .flat(),
          steps.length > 40 && "…",
        ),
      ),
    ),
  );
}

/** @param {Run} run */
function settings(run) {
  if (!run.changed.length) return null;
  const columns = ["setting", "default", "this run"].map((head, index) => ({
    head,
    text: true,
    value: (/** @type {string[]} */ row) => plain(row[index]),
  }));
  return h(
    "details",
    {},
    h("summary", {}, `${counted(run.changed.length, "setting")} that differ from the defaults`),
    sortable(columns, run.changed, { name: "settings" }),
  );
}

/**
 * The charts of one run, or of several over one another.
 *
 * @param {Run[]} runs
 */
export function charts(runs) {
  const { axis = "step", pin, more } = state();
  const named = runs.length > 1;
  const plans =
    more && runs.some((run) => has(run, more))
      ? [...PLANS, { title: more, unit: meaning("steps", more)[0], lines: [{ key: more, name: more, points: true }] }]
      : PLANS;
  const drawn = plans.map((plan) => {
    const series = runs.flatMap((run, place) =>
      plan.lines
        .map((line, index) => ({ line, look: named ? place : index }))
        .filter(({ line }, index) => has(run, line.key) && (!named || index === 0))
        .map(({ line, look }) => seriesOf(run, line, look, axis, named ? `${run.name}: ` : "")),
    );
    series.push(
      ...runs.flatMap((run, place) =>
        heldOutOf(run, plan, axis, named ? place : null, named ? `${run.name}: ` : "").slice(0, named ? 1 : undefined),
      ),
    );
    if (!series.length) return null;
    if (named && plan.lines.length && axis === "step") series.push(...meanOf(plan.lines[0].key, runs.length));
    const onPick = (/** @type {number} */ step) => go({ pin: step }, true);
    return chart({
      ...plan,
      series,
      xName: AXES[axis].name,
      onPick,
      pinned: pinnedX(runs, axis, pin),
    });
  });
  return h(
    "section",
    { "aria-label": "Charts" },
    h(
      "div",
      { class: "controls" },
      named && axisChoice(axis),
      keyChoice(runs, more),
      pin && pinned(runs, Number(pin)),
    ),
    h("div", { class: "charts" }, drawn),
  );
}

/**
 * The mean over the runs with its 95 % interval, where they differ in their seed alone.
 *
 * @param {string} key
 * @param {number} look
 * @returns {import("./chart.js").Series[]}
 */
function meanOf(key, look) {
  const mean = page().means[key];
  if (!mean || !mean.rows) return [];
  const { step, half } = mean.columns;
  return [
    {
      name: "mean of the runs, ± half of its 95 % interval",
      x: step,
      y: mean.columns.mean,
      error: half,
      steps: step,
      look,
    },
  ];
}

/**
 * @param {Run[]} runs
 * @param {string} axis
 * @param {string | undefined} pin
 */
function pinnedX(runs, axis, pin) {
  return pin && axis === "step" ? Number(pin) : null;
}

/** @param {string} axis */
function axisChoice(axis) {
  return h(
    "label",
    {},
    "Over ",
    h(
      "select",
      { onchange: (/** @type {any} */ event) => go({ axis: event.target.value, pin: null }, true) },
      Object.entries(AXES).map(([name, { name: shown, hint }]) =>
        h("option", { value: name, selected: name === axis, title: hint }, shown),
      ),
    ),
  );
}

/**
 * @param {Run[]} runs
 * @param {string | undefined} more
 */
function keyChoice(runs, more) {
  const keys = [
    ...new Set(runs.flatMap((run) => Object.keys(run.steps.columns).filter((key) => key !== "step"))),
  ].sort();
  return h(
    "label",
    {},
    "A chart of ",
    h(
      "select",
      { onchange: (/** @type {any} */ event) => go({ more: event.target.value || null }, true) },
      h("option", { value: "" }, "any key …"),
      keys.map((key) => h("option", { value: key, selected: key === more, title: meaning("steps", key)[1] }, key)),
    ),
  );
}

/**
 * @param {Run[]} runs
 * @param {number} step
 */
function pinned(runs, step) {
  return h(
    "span",
    { class: "pinned" },
    `Step ${step} is pinned. `,
    runs
      .map((run) => [
        h("a", { href: address({ run: run.number, step }) }, `Open it${runs.length > 1 ? ` in ${run.name}` : ""}`),
        " ",
      ])
      .flat(),
    h("button", { onclick: () => go({ pin: null }, true) }, "Unpin"),
  );
}

/** @param {Run} run */
export function tableOfSteps(run) {
  const { columns, rows } = run.steps;
  const measured = has(run, "entropy/delta_measured");
  const only = measured && state().all !== "1";
  const places = [...Array(rows).keys()].filter((place) => !only || columns["entropy/delta_measured"][place] !== null);
  const shown = STEP_COLUMNS.filter(({ key }) => key === "step" || has(run, key)).map(
    ({ key, head, error, momentum }) => ({
      head,
      hint: key === "step" ? "The number of the optimizer step." : meaning("steps", key)[1],
      unit: meaning("steps", key)[0],
      value: (/** @type {number} */ place) => columns[key][place],
      show: (/** @type {number} */ place) => {
        const errors = error && columns[`${key}_stderr`];
        if (key === "step") return String(columns[key][place]);
        if (error) return withError(columns[key][place], errors ? errors[place] : null);
        return momentum ? signed(columns[key][place]) : number(columns[key][place]);
      },
    }),
  );
  return h(
    "div",
    {},
    measured &&
      h(
        "label",
        {},
        h("input", {
          type: "checkbox",
          checked: !only,
          onchange: (/** @type {any} */ event) => go({ all: event.target.checked ? 1 : null }, true),
        }),
        ` all ${rows} steps, not those alone whose change was measured`,
      ),
    sortable(shown, places, {
      name: `${run.name}-steps`,
      link: (place) => address({ run: run.number, step: columns.step[place] }),
      marked: (place) => String(columns.step[place]) === state().pin,
    }),
  );
}

/** @type {{key: string, head: string, error?: boolean, momentum?: boolean}[]} */
const STEP_COLUMNS = [
  { key: "step", head: "step" },
  { key: "entropy/delta_measured", head: "entropy change, measured", error: true },
  { key: "entropy/delta_linear", head: "first order", error: true },
  { key: "entropy/delta_momentum", head: "of it momentum", momentum: true },
  { key: "entropy/delta_gradient", head: "of it gradient", momentum: true },
  { key: "reward/delta_measured", head: "reward change, measured", error: true },
  { key: "reward/delta_linear", head: "reward change, first order", error: true },
  { key: "reward", head: "reward" },
  { key: "entropy/policy", head: "entropy" },
  { key: "kl", head: "KL" },
  { key: "completions/mean_length", head: "length" },
];

const AGREEMENT = [
  ["cross", "Predicted and measured on different prompts. This is prediction: believe this one."],
  [
    "same_sample",
    "Predicted and measured on the same completions. This is calculus: it shows the step's curvature, and agrees even where neither says much of other prompts.",
  ],
  ["placebo", "Control: predicted from an earlier step's update. What it explains is what successive steps share."],
];

/**
 * How well predictions agree with measurements, with what each row means.
 *
 * @param {Run} run
 */
function whichToBelieve(run) {
  const { columns } = run.steps;
  const last = (/** @type {string} */ key) => (columns[key] || []).filter((value) => value !== null).at(-1) ?? null;
  const rows = AGREEMENT.flatMap(([kind, help]) =>
    ["linear", "second_order", "trapezoid", "measured", ""].map((name) => ({
      name: [kind, name].filter(Boolean).join("_"),
      order: name,
      kind,
      help,
    })),
  ).filter(({ name }) => last(`entropy/${name}_slope`) !== null);
  if (!rows.length) return null;
  const cell = (/** @type {string} */ what, /** @type {string} */ hint) => ({
    head: what.replace("_", " "),
    hint,
    value: (/** @type {any} */ row) => last(`entropy/${row.name}_${what}`),
    show: (/** @type {any} */ row) => {
      const error = last(`entropy/${row.name}_${what}_stderr`);
      return error === null
        ? number(last(`entropy/${row.name}_${what}`))
        : withError(last(`entropy/${row.name}_${what}`), error).replace("+", "");
    },
  });
  /** @type {Record<string, string>} */
  const names = {
    linear: "first order",
    second_order: "second order",
    trapezoid: "trapezoid rule",
    measured: "measured",
    "": "",
  };
  const columnsOf = [
    {
      head: "measured on predicted",
      text: true,
      value: (/** @type {any} */ row) => row.name,
      show: (/** @type {any} */ row) => [row.kind.replace("_", " "), names[row.order]].filter(Boolean).join(", "),
    },
    cell("slope", "Regression slope, not corrected: noise of the prediction pulls it towards 0."),
    cell(
      "corrected_slope",
      "The slope corrected for the noise of the prediction: believe this one where the two differ.",
    ),
    cell("correlation", "Correlation of measured and predicted change over the steps so far."),
    cell("r_squared", "Squared correlation."),
    cell("ceiling_r_squared", "The largest squared correlation that the noise allows."),
    { head: "what it says", text: true, value: (/** @type {any} */ row) => row.help },
  ];
  return folded("How well predictions agree with measurements, and which number to believe", () =>
    sortable(columnsOf, rows, { name: `${run.name}-agreement` }),
  );
}

/** The runs of the page. */
export function allRuns() {
  return page().runs;
}
