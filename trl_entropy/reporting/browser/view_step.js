// A step: what it did, the parts of its change, its prompt groups, and the completions on which it was measured.

import { meaning, numbersOf, rowsWith, stepOf } from "./data.js";
import { folded, h, plain } from "./dom.js";
import { counted, number, signed, withError } from "./format.js";
import { address } from "./state.js";
import { sortable, sorted } from "./table.js";
import { named, spanOf, textOf } from "./tokens.js";
import { resampled } from "./view_dropped.js";

/**
 * @typedef {import("./data.js").Run} Run
 * @typedef {import("./data.js").Step} Step
 */

/**
 * @param {Run} run
 * @param {number} step
 * @returns {HTMLElement[]}
 */
export function viewOfStep(run, step) {
  const numbers = numbersOf(run, step);
  const shown = stepOf(run, step);
  return [
    h("h2", {}, `Step ${step}`),
    h("section", { class: "sentences" }, sentencesOf(numbers)),
    bars(run, step, numbers),
    shown && extremes(run, shown),
    resampled(numbers, shown),
    h("h3", {}, "Prompt groups"),
    shown
      ? tableOfGroups(run, shown)
      : h(
          "p",
          {},
          "The completions of this step are not on this page: the run keeps no file of them, or they had no room.",
        ),
    shown && shown.measuredCompletions && measured(shown),
    folded("Every number of this step", () => everyNumber(numbers)),
  ];
}

/** @param {Record<string, number | null>} numbers */
function sentencesOf(numbers) {
  const [change, error] = [numbers["entropy/delta_measured"], numbers["entropy/delta_measured_stderr"]];
  const reward = numbers.reward;
  const found = [];
  if (change !== null && change !== undefined) {
    const sure = error ? `, ${(Math.abs(change) / error).toFixed(1)} standard errors from 0` : "";
    found.push(
      `It ${change < 0 ? "lowered" : "raised"} the entropy: ${withError(change, error)} nats per token, measured${sure}.`,
    );
    const linear = numbers["entropy/delta_linear"];
    if (linear !== null && linear !== undefined) {
      found.push(
        `First order said ${withError(linear, numbers["entropy/delta_linear_stderr"])}${momentumOf(numbers, linear)}.`,
      );
    }
  } else found.push("The change of the entropy was not measured at this step.");
  for (const kind of ["measured", "linear"]) {
    const value = numbers[`reward/delta_${kind}`];
    if (value !== null && value !== undefined) {
      found.push(
        `The reward's change, ${kind === "linear" ? "to first order" : kind}: ${withError(value, numbers[`reward/delta_${kind}_stderr`])}.`,
      );
    }
  }
  if (reward !== null && reward !== undefined)
    found.push(`The mean reward of its completions, drawn before it, is ${number(reward)}.`);
  return found.map((text, index) => h("p", { class: index ? "" : "lead" }, text));
}

/**
 * @param {Record<string, number | null>} numbers
 * @param {number} linear
 */
function momentumOf(numbers, linear) {
  const momentum = numbers["entropy/delta_momentum"];
  if (momentum === null || momentum === undefined || !linear) return "";
  const error = numbers["entropy/delta_linear_stderr"] ?? 0;
  const share = Math.abs(linear) > 4 * error ? ` (${((100 * momentum) / linear).toFixed(0)} % of it)` : "";
  return `; momentum made ${signed(momentum)}${share}, the step's own gradient ${signed(numbers["entropy/delta_gradient"])}`;
}

/** @type {Record<string, string>} */
const NAMES = {
  momentum: "momentum of earlier steps",
  weight_decay: "weight decay",
  gradient: "this step's completions",
  kl: "KL term",
  entropy_bonus: "entropy bonus",
  router_aux_loss: "balance of experts",
  entropy_control: "entropy control",
  rounding: "rounding",
  curvature: "curvature (higher orders)",
};

/**
 * The parts of the change as bars, each from where the one above it ends, so that the last ends at the sum.
 *
 * @param {Run} run
 * @param {number} step
 * @param {Record<string, number | null>} numbers
 */
function bars(run, step, numbers) {
  const { columns } = run.parts;
  if (!run.parts.rows) return null;
  const places = rowsWith(run.parts, "step", step);
  if (!places.length) return null;
  const sum = places.reduce((total, place) => total + columns.change[place], 0);
  const shown = places.filter((place) => columns.part[place] !== "rounding" && columns.change[place] !== 0);
  /** @type {{name: string, from: number, to: number, value: string, kind: string}[]} */
  const lines = [];
  let at = 0;
  for (const place of shown) {
    const [part, change] = [columns.part[place], columns.change[place]];
    if (part === "curvature") lines.push(whole("first order", at, numbers, "linear"));
    const kind = part === "curvature" ? "curved" : change < 0 ? "lowered" : "raised";
    lines.push({
      name: NAMES[part] || part,
      from: at,
      to: at + change,
      value: signed(change),
      kind,
    });
    at += change;
  }
  const last = numbers["entropy/delta_measured"] === null ? "linear" : "measured";
  lines.push(whole(last === "linear" ? "first order" : "measured", sum, numbers, last));
  return h(
    "section",
    {},
    h("h3", {}, "What made the change"),
    drawnBars(lines),
    h("p", { class: "quiet" }, "Each bar begins where the one above it ends. ", meaning("parts", "change")[1]),
  );
}

/**
 * @param {string} name
 * @param {number} to
 * @param {Record<string, number | null>} numbers
 * @param {string} key
 */
function whole(name, to, numbers, key) {
  const value = numbers[`entropy/delta_${key}`] ?? to;
  return {
    name: `= ${name}`,
    from: 0,
    to,
    value: withError(value, numbers[`entropy/delta_${key}_stderr`]),
    kind: "whole",
  };
}

/** @param {{name: string, from: number, to: number, value: string, kind: string}[]} lines */
function drawnBars(lines) {
  const ends = [0, ...lines.flatMap(({ from, to }) => [from, to])];
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const percent = (/** @type {number} */ value) => (100 * (value - low)) / (high - low || 1);
  const row = (/** @type {typeof lines[0]} */ { name, from, to, value, kind }) => {
    const [left, right] = [percent(Math.min(from, to)), percent(Math.max(from, to))];
    const bar = h("span", { class: `bar ${kind}`, style: { left: `${left}%`, width: `max(${right - left}%, 2px)` } });
    return h(
      "div",
      { class: "row" },
      h("span", { class: "name" }, name),
      h("span", { class: "track" }, h("span", { class: "zero", style: { left: `${percent(0)}%` } }), bar),
      h("span", { class: "value" }, value),
    );
  };
  return h("div", { class: "bars" }, lines.map(row));
}

/**
 * The completions and tokens that lowered and raised the entropy most.
 *
 * @param {Run} run
 * @param {Step} shown
 */
function extremes(run, shown) {
  const { completions, groups, tokens } = shown;
  if (!completions.columns.change) return null;
  const line = (/** @type {string} */ verb, /** @type {boolean} */ down) => {
    const best = (/** @type {any[]} */ values) => {
      let found = -1;
      values.forEach((value, place) => {
        if (
          value !== null &&
          (down ? value < 0 : value > 0) &&
          (found < 0 || (down ? value < values[found] : value > values[found]))
        )
          found = place;
      });
      return found;
    };
    const [group, row] = [best(groups.columns.change), best(completions.columns.change)];
    const token = tokens && tokens.columns.change ? best(tokens.columns.change) : -1;
    if (row < 0) return null;
    const { columns } = completions;
    return h(
      "li",
      {},
      `${verb} most: `,
      group >= 0 &&
        h(
          "a",
          { href: address({ step: shown.step, group: groups.columns.prompt_index[group] }) },
          `group ${groups.columns.prompt_index[group]}`,
        ),
      group >= 0 && ` (${withError(groups.columns.change[group], groups.columns.change_stderr[group])}), `,
      h(
        "a",
        { href: address({ step: shown.step, group: columns.prompt_index[row], row: columns.row[row] }) },
        `completion ${columns.row[row]}`,
      ),
      ` (${signed(columns.change[row])})`,
      token >= 0 &&
        tokens && [", token ", tokenLink(shown, tokens, token), ` (${signed(tokens.columns.change[token])})`],
      ".",
    );
  };
  return h("ul", { class: "extremes" }, line("Lowered", true), line("Raised", false));
}

/**
 * @param {Step} shown
 * @param {import("./data.js").Table} tokens
 * @param {number} place
 */
function tokenLink(shown, tokens, place) {
  const row = tokens.columns.row[place];
  const span = spanOf(tokens, row);
  const group = shown.completions.columns.prompt_index[shown.completions.columns.row.indexOf(row)];
  const text = named(tokens.columns.token[place]);
  return h("a", { href: address({ step: shown.step, group, row, token: place - (span ? span[0] : 0) }) }, `“${text}”`);
}

const ERRORS =
  "After ± is the standard error over other completions of the same prompt, taken as independent; they share the mean " +
  "reward that their advantages subtract, which is not in it. Shares are given where the sum over prompts is well away from 0.";

/**
 * @param {Run} run
 * @param {Step} shown
 */
function tableOfGroups(run, shown) {
  const { columns, rows } = shown.groups;
  /** @type {Record<string, (row: number) => any>} */
  const show = {
    change: (/** @type {number} */ row) => withError(columns.change[row], columns.change_stderr[row]),
    share: (/** @type {number} */ row) =>
      columns.share[row] === null ? "–" : `${(100 * columns.share[row]).toFixed(0)} %`,
    prompt: (/** @type {number} */ row) =>
      h("span", { class: "clipped" }, plain(columns.prompt[row].trim().slice(0, 300))),
  };
  /** @type {Record<string, string>} */
  const heads = {
    prompt_index: "group", num_completions: "completions", reward_mean: run.binary ? "pass rate" : "mean reward",
    reward_std: "reward's deviation", length_mean: "length", entropy: "entropy", change: "part of the change", share: "share",
    num_truncated: "truncated", signal: "signal", round: "round", prompt: "prompt",
  }; // prettier-ignore
  const order = [
    "prompt_index",
    "prompt",
    "change",
    "share",
    "reward_mean",
    "entropy",
    "signal",
    "round",
    "length_mean",
    "num_truncated",
    "reward_std",
    "num_completions",
  ];
  const shownColumns = order
    .filter((name) => name in columns && columns[name].some((value) => value !== null))
    .map((name) => ({
      head: heads[name],
      hint: meaning("groups", name)[1],
      unit: meaning("groups", name)[0],
      text: name === "prompt" || name === "signal",
      value: (/** @type {number} */ row) => columns[name][row],
      show:
        show[name] ||
        ((/** @type {number} */ row) =>
          typeof columns[name][row] === "string" ? columns[name][row] : number(columns[name][row])),
    }));
  const by = columns.change ? order.indexOf("change") : -1;
  return h(
    "div",
    {},
    shown.promptEnds[0].trim() &&
      h(
        "details",
        { class: "quiet" },
        h("summary", {}, "All prompts begin with the same text"),
        h("pre", {}, plain(shown.promptEnds[0])),
      ),
    columns.change && h("p", { class: "quiet" }, ERRORS),
    sortable(shownColumns, [...Array(rows).keys()], {
      name: `${run.name}-step-${shown.step}-groups`,
      sort: by < 0 ? undefined : shownColumns.findIndex((one) => one.head === heads.change),
      down: false,
      link: (row) => address({ step: shown.step, group: columns.prompt_index[row] }),
    }),
  );
}

/** @param {Step} shown */
function measured(shown) {
  const table = /** @type {import("./data.js").Table} */ (shown.measuredCompletions);
  const tokens = shown.measuredTokens;
  const { columns, rows } = table;
  const names = ["row", "text", "entropy", "entropy_change", "logp_change", "length"].filter(
    (name) => name in columns || name === "text",
  );
  /** @type {Record<string, string>} */
  const heads = {
    row: "completion",
    text: "text",
    entropy: "entropy",
    entropy_change: "its change",
    logp_change: "change of its log-probability",
    length: "length",
  };
  const text = (/** @type {number} */ row) => {
    const span = tokens && spanOf(tokens, columns.row[row]);
    return tokens && span ? plain(textOf(tokens, span).trim().slice(0, 200)) : "";
  };
  const shownColumns = names.map((name) => ({
    head: heads[name],
    hint: meaning("measured_completions", name)[1],
    unit: meaning("measured_completions", name)[0],
    text: name === "text",
    value: name === "text" ? text : (/** @type {number} */ row) => columns[name][row],
    show:
      name === "text"
        ? (/** @type {number} */ row) => h("span", { class: "clipped" }, text(row))
        : name.endsWith("change")
          ? (/** @type {number} */ row) => signed(columns[name][row])
          : (/** @type {number} */ row) => number(columns[name][row]),
  }));
  return folded(`The completions on which it was measured (${rows} on this page)`, () => [
    h("p", { class: "quiet" }, "The probe batch: the step was not trained on these completions."),
    sortable(shownColumns, [...Array(rows).keys()], {
      name: `step-${shown.step}-measured`,
      link: (row) => address({ step: shown.step, row: columns.row[row], set: "measured" }),
    }),
  ]);
}

/** @param {Record<string, number | null>} numbers */
function everyNumber(numbers) {
  const rows = sorted(
    Object.keys(numbers).filter((key) => numbers[key] !== null && key !== "step"),
    (key) => key,
    false,
  );
  const columns = [
    { head: "key", text: true, value: (/** @type {string} */ key) => key },
    {
      head: "value",
      value: (/** @type {string} */ key) => numbers[key],
      show: (/** @type {string} */ key) => number(numbers[key]),
    },
    { head: "unit", text: true, value: (/** @type {string} */ key) => meaning("steps", key)[0] },
    { head: "meaning", text: true, value: (/** @type {string} */ key) => meaning("steps", key)[1] },
  ];
  return sortable(columns, rows, { name: "numbers" });
}
