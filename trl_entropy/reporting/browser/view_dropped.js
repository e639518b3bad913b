// The groups that were drawn for a step and not trained on, and by what rule.

import { meaning } from "./data.js";
import { folded, h, plain } from "./dom.js";
import { counted, number } from "./format.js";

/** @typedef {import("./data.js").Step} Step */

/**
 * How many groups were dropped for others, and which.
 *
 * @param {Record<string, number | null>} numbers
 * @param {Step | null} shown
 */
export function resampled(numbers, shown) {
  const first = numbers["resampling/num_uninformative"];
  if (first === null || first === undefined) return null;
  const kept = numbers["resampling/num_kept_uninformative"] ?? 0;
  const rounds = numbers["resampling/num_rounds"] ?? 0;
  const stay = kept ? ` ${counted(kept, "group")} of them stay, since no more were found.` : "";
  return h(
    "section",
    {},
    h(
      "p",
      {},
      `${counted(first, "group")} of those first drawn had equal rewards; ${number(first - kept)} ${first - kept === 1 ? "was" : "were"} dropped and replaced by `,
      `other prompts in ${counted(rounds, "further round")} (resample_uninformative_groups).${stay} `,
      shown && !shown.dropped && first > kept && "The run keeps no table of what was dropped at this step.",
    ),
    shown && shown.dropped && droppedGroups(shown.dropped, shown.promptEnds),
  );
}

/**
 * The groups that were drawn and not trained on, each with its completions.
 *
 * @param {import("./data.js").Table} table
 * @param {[string, string]} ends what the prompts of the step begin and end with
 */
function droppedGroups(table, ends) {
  const { columns, rows } = table;
  const groups = [...new Set(columns.group)];
  return folded(`The ${counted(groups.length, "group")} that were dropped, and why`, () => [
    h("p", { class: "quiet" }, meaning("dropped", "rule")[1]),
    ...groups.map((group) => {
      const own = [...Array(rows).keys()].filter((row) => columns.group[row] === group);
      const rewards = own.map((row) => columns.reward[row]);
      const equal = columns.rule[own[0]] === "equal rewards";
      const why = equal ? `all rewards are ${number(rewards[0])}` : "enough other groups had come before it";
      const round = columns.round[own[0]] ? `round ${columns.round[own[0]]}` : "first draw";
      const prompt = columns.prompt[own[0]];
      const shared = prompt.startsWith(ends[0]) && prompt.endsWith(ends[1]);
      const short = shared ? prompt.slice(ends[0].length, prompt.length - ends[1].length) : prompt;
      return h(
        "details",
        { class: "dropped" },
        h(
          "summary",
          {},
          `Dropped (${round}): ${why}. `,
          h("span", { class: "quiet" }, plain(short.trim().slice(-200))),
        ),
        h("pre", { class: "prompt" }, plain(prompt.trim())),
        columns.text &&
          h(
            "ol",
            {},
            own.map((row) =>
              h("li", {}, `reward ${number(columns.reward[row])}: `, h("code", {}, plain(columns.text[row] ?? ""))),
            ),
          ),
      );
    }),
  ]);
}
