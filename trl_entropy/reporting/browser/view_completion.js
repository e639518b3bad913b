// A completion: every token coloured by a chosen quantity, the numbers of the token that is pointed at or chosen, turns.

import { meaning } from "./data.js";
import { h, plain } from "./dom.js";
import { counted, number, signed } from "./format.js";
import { address, go, state } from "./state.js";
import { chosenQuantity, factsOf, isOwn, largest, legend, named, spanOf, tokenElement } from "./tokens.js";
import { LACKING, colourChoice, hasContext, rules } from "./view_group.js";

/**
 * @typedef {import("./data.js").Run} Run
 * @typedef {import("./data.js").Step} Step
 * @typedef {import("./data.js").Table} Table
 */

const MOST_LISTED = 12;

/**
 * @param {Run} run
 * @param {Step} shown
 * @param {number} row
 * @param {boolean} measured whether it is one of the probe batch
 * @returns {(HTMLElement | null)[]}
 */
export function viewOfCompletion(run, shown, row, measured) {
  const table = measured ? shown.measuredCompletions : shown.completions;
  const place = table ? table.columns.row.indexOf(row) : -1;
  if (!table || place < 0) return [h("p", {}, `Step ${shown.step} has no completion ${row} here.`)];
  const tokens = measured ? shown.measuredTokens : shown.tokens;
  const name = `Completion ${row} of step ${shown.step}${measured ? ", on which it was measured" : ""}`;
  return [
    h("h2", {}, name),
    factsOfCompletion(measured ? "measured_completions" : "completions", table, place),
    measured
      ? h("p", { class: "quiet" }, "The step was not trained on this completion.")
      : h("section", {}, rules(run, shown, [place])),
    measured ? prompt(table, place) : null,
    tokens && spanOf(tokens, row) ? tokensOf(run, tokens, row, measured) : textOnly(table, place),
  ];
}

/**
 * @param {string} view
 * @param {Table} table
 * @param {number} place
 */
function factsOfCompletion(view, table, place) {
  const names = Object.keys(table.columns).filter((name) => !["row", "prompt_index", "prompt", "text"].includes(name));
  /** @type {Record<string, string>} */
  const labels = {
    change: "part of the change",
    logp_change: "change of its log-probability",
    entropy_change: "change of its entropy",
    context_length: "context",
  };
  return h(
    "dl",
    { class: "facts" },
    names.map((name) => {
      const value = table.columns[name][place];
      const [unit, help] = meaning(view, name);
      const text =
        typeof value === "string"
          ? value
          : ["change", "advantage", "logp_change", "entropy_change"].includes(name)
            ? signed(value)
            : number(value);
      const label = labels[name] || name.replace("reward/", "").replace("_", " ");
      return h(
        "div",
        { title: help, "data-name": name },
        h("dt", {}, label),
        h("dd", {}, text, unit && value !== null ? ` ${unit}` : ""),
      );
    }),
  );
}

/**
 * @param {Table} table
 * @param {number} place
 */
function prompt(table, place) {
  return h(
    "details",
    {},
    h("summary", {}, "Prompt"),
    h("pre", { class: "prompt" }, plain(table.columns.prompt[place])),
  );
}

/**
 * @param {Table} table
 * @param {number} place
 */
function textOnly(table, place) {
  const text = table.columns.text && table.columns.text[place];
  return text ? h("p", { class: "tokens large" }, plain(text)) : h("p", { class: "quiet" }, LACKING);
}

/**
 * @param {Run} run
 * @param {Table} tokens
 * @param {number} row
 * @param {boolean} measured
 */
function tokensOf(run, tokens, row, measured) {
  const view = measured ? "measured_tokens" : "tokens";
  const span = /** @type {[number, number]} */ (spanOf(tokens, row));
  const quantity = chosenQuantity(tokens, state().colour);
  const most = largest(tokens, quantity, [span]);
  const panel = h("aside", { class: "panel", "aria-live": "polite" });
  const chosen = state().token === undefined ? -1 : Number(state().token);

  /** @param {number} place */
  const show = (place) => {
    const text = named(tokens.columns.token[span[0] + place]);
    panel.replaceChildren(
      h("h3", {}, `Token ${place}: `, h("code", {}, text)),
      factsOf(view, tokens, span[0] + place),
    );
  };
  /** @param {number} place */
  const element = (place) =>
    tokenElement(tokens, span[0] + place, quantity, most, {
      class: place === chosen ? "chosen" : "",
      "data-place": place,
      role: "button",
      tabindex: place === Math.max(chosen, 0) ? 0 : -1,
      "aria-pressed": place === chosen,
    });
  const text = h(
    "div",
    { class: "tokens large" },
    turnsOf(tokens, span).map((turn) => folded(turn, element)),
  );
  const under = (/** @type {Event} */ event) =>
    /** @type {HTMLElement | null} */ (/** @type {Element} */ (event.target).closest("[data-place]"));
  const found = (/** @type {Event} */ event, /** @type {(place: number) => void} */ then) => {
    const token = under(event);
    if (token) then(Number(token.dataset.place));
  };
  text.addEventListener("pointerover", (/** @type {Event} */ event) => found(event, show));
  text.addEventListener("pointerleave", () => (chosen < 0 ? undefined : show(chosen)));
  text.addEventListener("click", (/** @type {Event} */ event) =>
    found(event, (place) => go({ token: place === chosen ? null : place }, true)),
  );
  if (chosen >= 0 && chosen < span[1] - span[0]) show(chosen);
  else
    panel.append(
      h("p", { class: "quiet" }, "Point at a token to see its numbers; click it, or use the arrow keys, to keep it."),
    );
  return h(
    "section",
    {},
    h("div", { class: "controls" }, quantity && colourChoice(tokens, quantity)),
    legend(view, quantity, most, hasContext(tokens, span)),
    text,
    panel,
    ranking(tokens, span, quantity),
  );
}

/**
 * The stretches of a completion that the policy, and tools or an environment, wrote in turn.
 *
 * @param {Table} tokens
 * @param {[number, number]} span
 * @returns {{own: boolean, number: number, from: number, to: number}[]}
 */
function turnsOf(tokens, span) {
  const found = [];
  let number = 0;
  for (let start = span[0]; start < span[1];) {
    let end = start;
    while (end < span[1] && isOwn(tokens, end) === isOwn(tokens, start)) end++;
    const own = isOwn(tokens, start);
    if (own) number++;
    found.push({ own, number, from: start - span[0], to: end - span[0] });
    start = end;
  }
  return found;
}

/**
 * @param {{own: boolean, number: number, from: number, to: number}} turn
 * @param {(place: number) => HTMLElement} element
 */
function folded(turn, element) {
  const inside = [...Array(turn.to - turn.from).keys()].map((place) => element(turn.from + place));
  if (turn.own && turn.number === 1 && turn.from === 0) return h("span", {}, inside);
  const name = turn.own ? `Turn ${turn.number}` : "A tool or the environment wrote";
  return h(
    "details",
    { open: turn.own, class: "turn" },
    h("summary", {}, `${name}: ${counted(inside.length, "token")}`),
    inside,
  );
}

/**
 * The tokens with the largest values, as links.
 *
 * @param {Table} tokens
 * @param {[number, number]} span
 * @param {import("./tokens.js").Quantity | null} quantity
 */
function ranking(tokens, span, quantity) {
  if (!quantity || quantity.signed === undefined) return null;
  const values = tokens.columns[quantity.name];
  const places = [...Array(span[1] - span[0]).keys()].filter((place) => values[span[0] + place] !== null);
  places.sort((a, b) => Math.abs(values[span[0] + b]) - Math.abs(values[span[0] + a]));
  const item = (/** @type {number} */ place) => {
    const start = Math.max(span[0], span[0] + place - 6);
    const around = (/** @type {number} */ from, /** @type {number} */ to) =>
      plain(tokens.columns.token.slice(from, to).join(""));
    const at = span[0] + place;
    return h(
      "li",
      {},
      h("a", { href: address({ token: place }) }, (quantity.signed ? signed : number)(values[at], 3)),
      " ",
      h(
        "code",
        {},
        around(start, at),
        h("mark", {}, around(at, at + 1) || "∅"),
        around(at + 1, Math.min(at + 7, span[1])),
      ),
    );
  };
  return h(
    "details",
    {},
    h("summary", {}, `The tokens with the largest ${quantity.label}`),
    h("ol", {}, places.slice(0, MOST_LISTED).map(item)),
  );
}
