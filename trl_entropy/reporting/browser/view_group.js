// A prompt group: its completions side by side, and why some of them, or all, add nothing.

import { meaning, page, rowsWith, stepOf } from "./data.js";
import { h, plain } from "./dom.js";
import { counted, number, signed, withError } from "./format.js";
import { reading } from "./live.js";
import { address, go, state } from "./state.js";
import { sortable } from "./table.js";
import { chosenQuantity, isOwn, largest, legend, quantitiesOf, spanOf, tokenElement } from "./tokens.js";

/**
 * @typedef {import("./data.js").Run} Run
 * @typedef {import("./data.js").Step} Step
 */

const MOST_TOKENS = 400;
const MOST_TEXT = 1500;

/**
 * @param {Run} run
 * @param {Step} shown
 * @param {number} group
 * @returns {(HTMLElement | null)[]}
 */
export function viewOfGroup(run, shown, group) {
  const { columns } = shown.groups;
  const place = columns.prompt_index.indexOf(group);
  if (place < 0) return [h("p", {}, `Step ${shown.step} has no group ${group}.`)];
  const rows = rowsWith(shown.completions, "prompt_index", group);
  return [
    h("h2", {}, `Group ${group} of step ${shown.step}`),
    h("section", { class: "sentences" }, facts(run, shown, place), rules(run, shown, rows)),
    prompt(shown, place),
    h("h3", {}, counted(rows.length, "completion")),
    tableOfCompletions(run, shown, rows),
    sideBySide(shown, rows),
    samePrompt(run, shown, place),
  ];
}

/**
 * @param {Run} run
 * @param {Step} shown
 * @param {number} place
 */
function facts(run, shown, place) {
  const { columns } = shown.groups;
  const about = `${run.binary ? "Pass rate" : "Mean reward"} ${number(columns.reward_mean[place])}`;
  const change =
    columns.change &&
    `. It added ${withError(columns.change[place], columns.change_stderr[place])} nats per token to the step's entropy change, to first order`;
  return h("p", { class: "lead" }, about, change, ".");
}

/**
 * Which completions add nothing, and by what rule.
 *
 * @param {Run} run
 * @param {Step} shown
 * @param {number[]} rows
 */
export function rules(run, shown, rows) {
  const { columns } = shown.completions;
  const found = [];
  if (rows.every((row) => columns.advantage[row] === 0)) {
    const [first] = rows.map((row) => columns.reward[row]);
    const equal = rows.every((row) => columns.reward[row] === first);
    found.push(
      `Dropped from the gradient: ${equal ? `all ${rows.length} rewards are ${number(first)}, so` : ""} every advantage is 0, and the group adds nothing to this step's policy gradient.`,
    );
    found.push(
      run.settings.resample_uninformative_groups
        ? `resample_uninformative_groups replaces such groups; this one stays, since ${number(run.settings.max_resample_rounds)} rounds found too few others.`
        : "With resample_uninformative_groups another prompt would have taken its place.",
    );
  }
  const round = columns.round?.[rows[0]];
  if (round) {
    found.push(
      `Drawn in round ${round}, in the place of a group whose rewards were all equal (resample_uninformative_groups).`,
    );
  }
  const cut = rows.filter((row) => columns.end[row] === "truncated").length;
  if (cut) {
    found.push(
      `${counted(cut, "completion")} reached max_completion_length (${number(run.settings.max_completion_length)} tokens) without an end token: truncated` +
        (run.settings.mask_truncated_completions
          ? ", and masked out of the loss by mask_truncated_completions."
          : "; they count in the loss."),
    );
  }
  const masked = rows.filter((row) => columns.end[row] === "masked").length;
  if (masked) {
    const rule = run.settings.mask_truncated_completions ? " (mask_truncated_completions)" : "";
    found.push(`${counted(masked, "completion")} without a token that counts in the loss: masked${rule}.`);
  }
  return found.map((text) => h("p", { class: "rule" }, text));
}

/**
 * @param {Step} shown
 * @param {number} place
 */
function prompt(shown, place) {
  const [before, after] = shown.promptEnds;
  return h(
    "details",
    { open: true },
    h("summary", {}, "Prompt"),
    h(
      "pre",
      { class: "prompt" },
      before && h("span", { class: "quiet" }, plain(before)),
      plain(shown.groups.columns.prompt[place]),
      after && h("span", { class: "quiet" }, plain(after)),
    ),
  );
}

/**
 * @param {Run} run
 * @param {Step} shown
 * @param {number[]} rows
 */
function tableOfCompletions(run, shown, rows) {
  const { columns } = shown.completions;
  const functions = Object.keys(columns).filter((name) => name.startsWith("reward/"));
  /** @type {Record<string, string>} */
  const heads = {
    row: "completion",
    change: "part of the change",
    reward: "reward",
    advantage: "advantage",
    entropy: "entropy",
    surprisal: "surprisal",
    logp_change: "change of its log-probability",
    entropy_change: "change of its entropy",
    length: "length",
    context_length: "context",
    turns: "turns",
    end: "end",
  };
  const signs = ["change", "advantage", "logp_change", "entropy_change"];
  const shownColumns = [...Object.keys(heads).slice(0, 3), ...functions, ...Object.keys(heads).slice(3)]
    .filter((name) => name in columns)
    .map((name) => ({
      head: heads[name] || name.replace("reward/", ""),
      hint: meaning("completions", name)[1],
      unit: meaning("completions", name)[0],
      text: name === "end",
      value: (/** @type {number} */ row) => columns[name][row],
      show: (/** @type {number} */ row) =>
        name === "end"
          ? endOf(columns, row)
          : signs.includes(name)
            ? signed(columns[name][row])
            : number(columns[name][row]),
    }));
  return sortable(shownColumns, rows, {
    name: `${run.name}-step-${shown.step}-group-${columns.prompt_index[rows[0]]}`,
    sort: columns.change ? 1 : undefined,
    down: false,
    link: (row) => address({ step: shown.step, group: columns.prompt_index[row], row: columns.row[row] }),
  });
}

/**
 * @param {Record<string, any[]>} columns
 * @param {number} row
 */
function endOf(columns, row) {
  return columns.advantage[row] === 0 ? `${columns.end[row]}, advantage 0` : columns.end[row];
}

/**
 * @param {Step} shown
 * @param {number[]} rows
 */
function sideBySide(shown, rows) {
  const { tokens } = shown;
  const { columns } = shown.completions;
  const quantity = chosenQuantity(tokens, state().colour);
  const places = tokens
    ? /** @type {[number, number][]} */ (rows.map((row) => spanOf(tokens, columns.row[row])).filter(Boolean))
    : [];
  const most = tokens ? largest(tokens, quantity, places) : 0;
  return h(
    "section",
    {},
    quantity && h("div", { class: "controls" }, colourChoice(tokens, quantity)),
    tokens && legend("tokens", quantity, most, Boolean(tokens.columns.own)),
    h(
      "div",
      { class: "cards" },
      rows.map((row) => card(shown, row, quantity, most)),
    ),
  );
}

/**
 * What colours tokens.
 *
 * @param {import("./data.js").Table | null} tokens
 * @param {import("./tokens.js").Quantity} quantity
 */
export function colourChoice(tokens, quantity) {
  return h(
    "label",
    {},
    "Colour tokens by ",
    h(
      "select",
      { name: "colour", onchange: (/** @type {any} */ event) => go({ colour: event.target.value }, true) },
      quantitiesOf(tokens).map(({ name, label }) =>
        h("option", { value: name, selected: name === quantity.name }, label),
      ),
    ),
  );
}

/**
 * @param {Step} shown
 * @param {number} row
 * @param {import("./tokens.js").Quantity | null} quantity
 * @param {number} most
 */
function card(shown, row, quantity, most) {
  const { columns } = shown.completions;
  const there = address({ step: shown.step, group: columns.prompt_index[row], row: columns.row[row] });
  const about = [
    `reward ${number(columns.reward[row])}`,
    `advantage ${signed(columns.advantage[row])}`,
    columns.change && `${signed(columns.change[row])} nats/token`,
  ];
  return h(
    "article",
    { class: "card" },
    h("h4", {}, h("a", { href: there }, `Completion ${columns.row[row]}`)),
    h("p", { class: "quiet" }, about.filter(Boolean).join(", ")),
    body(shown, row, quantity, most),
  );
}

/**
 * @param {Step} shown
 * @param {number} row
 * @param {import("./tokens.js").Quantity | null} quantity
 * @param {number} most
 */
function body(shown, row, quantity, most) {
  const { columns } = shown.completions;
  if (columns.text) {
    const text = columns.text[row];
    return h(
      "p",
      { class: "tokens" },
      text === null ? LACKING : plain(text.slice(0, MOST_TEXT)),
      text && text.length > MOST_TEXT && " …",
    );
  }
  const span = shown.tokens && spanOf(shown.tokens, columns.row[row]);
  if (!shown.tokens || !span) return h("p", { class: "quiet" }, LACKING);
  const places = [...Array(Math.min(span[1] - span[0], MOST_TOKENS)).keys()].map((place) => span[0] + place);
  const { tokens } = shown;
  return h(
    "p",
    { class: "tokens" },
    places.map((place) => tokenElement(tokens, place, quantity, most)),
    span[1] - span[0] > MOST_TOKENS && " …",
  );
}

export const LACKING = "Its tokens had no room on this page; a notebook reads them from the run directory.";

/**
 * Where else the prompt was trained on, in this run and in others; looked for when asked.
 *
 * @param {Run} run
 * @param {Step} shown
 * @param {number} place
 */
function samePrompt(run, shown, place) {
  const list = h("ul");
  const text = promptOf(shown, place);
  const look = async () => {
    for (const other of page().runs) await reading(other, other.known);
    const found = page().runs.flatMap((other) =>
      other.known.flatMap((step) => {
        const there = /** @type {Step} */ (stepOf(other, step));
        return [...Array(there.groups.rows).keys()]
          .filter((row) => promptOf(there, row) === text && (other !== run || step !== shown.step || row !== place))
          .map((row) => ({ other, there, row }));
      }),
    );
    list.replaceChildren(
      ...(found.length
        ? found.slice(0, 100).map(({ other, there, row }) => elsewhere(other, there, row))
        : [h("li", {}, "Nowhere else on this page.")]),
    );
  };
  return h(
    "section",
    {},
    h("h3", {}, "The same prompt"),
    h("button", { onclick: look }, "Find it in other steps and runs"),
    list,
  );
}

/**
 * @param {Step} shown
 * @param {number} place
 */
export function promptOf(shown, place) {
  return shown.promptEnds[0] + shown.groups.columns.prompt[place] + shown.promptEnds[1];
}

/**
 * @param {Run} run
 * @param {Step} shown
 * @param {number} row
 */
function elsewhere(run, shown, row) {
  const { columns } = shown.groups;
  const group = columns.prompt_index[row];
  return h(
    "li",
    {},
    h(
      "a",
      { href: address({ run: run.number, step: shown.step, group }) },
      `${run.name}, step ${shown.step}, group ${group}`,
    ),
    `: ${run.binary ? "pass rate" : "mean reward"} ${number(columns.reward_mean[row])}`,
    columns.change && `, ${withError(columns.change[row], columns.change_stderr[row])} nats/token`,
  );
}

/**
 * Whether any token of a completion is a tool's or an environment's.
 *
 * @param {import("./data.js").Table} tokens
 * @param {[number, number]} span
 */
export function hasContext(tokens, span) {
  for (let place = span[0]; place < span[1]; place++) if (!isOwn(tokens, place)) return true;
  return false;
}
