// Finding a text in the prompts and completions that are on the page.

import { stepOf } from "./data.js";
import { h, plain } from "./dom.js";
import { address } from "./state.js";
import { spanOf, textOf } from "./tokens.js";
import { promptOf } from "./view_group.js";

/**
 * @typedef {import("./data.js").Run} Run
 * @typedef {import("./data.js").Step} Step
 */

const MOST_FOUND = 200;
const AROUND = 60;

/**
 * @param {Run} run
 * @param {number | null} step only there; null: in all steps
 * @param {string} wanted
 * @returns {HTMLElement[]}
 */
export function viewOfFind(run, step, wanted) {
  const found = [];
  for (const number of step === null ? run.known : [step]) {
    const shown = stepOf(run, number);
    if (shown) found.push(...within(shown, wanted.toLowerCase(), MOST_FOUND - found.length));
    if (found.length >= MOST_FOUND) break;
  }
  const where = step === null ? "the steps on this page" : `step ${step}`;
  const all =
    step !== null && h("p", {}, h("a", { href: address({ run: run.number, find: wanted }) }, "Look in all steps"));
  const most = found.length >= MOST_FOUND ? "the first " : "";
  return [
    h("h2", {}, `“${plain(wanted)}” in ${where}: ${most}${found.length} found`),
    all || h("span"),
    h("ul", { class: "found" }, found),
  ];
}

/**
 * @param {Step} shown
 * @param {string} wanted
 * @param {number} most
 */
function within(shown, wanted, most) {
  /** @type {HTMLElement[]} */
  const found = [];
  const take = (
    /** @type {string} */ name,
    /** @type {string} */ text,
    /** @type {Record<string, number>} */ there,
  ) => {
    const at = found.length < most ? text.toLowerCase().indexOf(wanted) : -1;
    if (at < 0) return;
    const parts = [
      text.slice(Math.max(0, at - AROUND), at),
      text.slice(at, at + wanted.length),
      text.slice(at + wanted.length, at + wanted.length + AROUND),
    ];
    const [before, match, after] = parts.map(plain);
    found.push(
      h(
        "li",
        {},
        h("a", { href: address({ step: shown.step, ...there }) }, name),
        " ",
        h("code", {}, before, h("mark", {}, match), after),
      ),
    );
  };
  const { groups, completions, tokens } = shown;
  groups.columns.prompt_index.forEach((group, place) => {
    take(`step ${shown.step}, prompt of group ${group}`, promptOf(shown, place).slice(shown.promptEnds[0].length), {
      group,
    });
  });
  completions.columns.row.forEach((row, place) => {
    const span = tokens && spanOf(tokens, row);
    const text = tokens && span ? textOf(tokens, span) : completions.columns.text?.[place];
    if (text)
      take(`step ${shown.step}, completion ${row}`, text, { group: completions.columns.prompt_index[place], row });
  });
  return found;
}
