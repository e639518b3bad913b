// The tokens of completions, coloured by a chosen quantity; signs and strengths are also told by lines below them.

import { meaning } from "./data.js";
import { h, plain } from "./dom.js";
import { number, signed } from "./format.js";

/** @typedef {import("./data.js").Table} Table */

/** What a token can be coloured by, in order; `signed` ones are orange above 0 and blue below it. */
const QUANTITIES = [
  { name: "change", label: "part of the entropy change", signed: true },
  { name: "entropy_change", label: "change of the entropy", signed: true },
  { name: "entropy", label: "entropy", signed: false },
  { name: "logp", label: "log-probability", signed: true },
  { name: "logp_change", label: "change of the log-probability", signed: true },
  { name: "weight", label: "weight in the loss (advantage × clip)", signed: true },
];
const WORDS = [
  { name: "turn", label: "turn of the policy" },
  { name: "kind", label: "prose, call or arguments" },
  { name: "own", label: "written by the policy, or by a tool or an environment" },
];

/** @typedef {{name: string, label: string, signed?: boolean}} Quantity */

/**
 * The quantities that these tokens have.
 *
 * @param {Table | null} tokens
 * @returns {Quantity[]}
 */
export function quantitiesOf(tokens) {
  return tokens ? [...QUANTITIES, ...WORDS].filter(({ name }) => name in tokens.columns) : [];
}

/**
 * The quantity that is called so, else the first one.
 *
 * @param {Table | null} tokens
 * @param {string | undefined} name
 * @returns {Quantity | null}
 */
export function chosenQuantity(tokens, name) {
  const known = quantitiesOf(tokens);
  return known.find((one) => one.name === name) || known[0] || null;
}

/** @type {WeakMap<Table, Map<number, [number, number]>>} */
const spans = new WeakMap();

/**
 * The first place of a completion's tokens, and the one after its last.
 *
 * @param {Table} tokens
 * @param {number} row
 * @returns {[number, number] | null} null where the page does not hold them
 */
export function spanOf(tokens, row) {
  let known = spans.get(tokens);
  if (!known) {
    known = new Map();
    const rows = tokens.columns.row;
    for (let start = 0; start < rows.length;) {
      let end = start;
      while (end < rows.length && rows[end] === rows[start]) end++;
      known.set(rows[start], [start, end]);
      start = end;
    }
    spans.set(tokens, known);
  }
  return known.get(row) || null;
}

/**
 * The text of a completion.
 *
 * @param {Table} tokens
 * @param {[number, number]} span
 */
export function textOf(tokens, span) {
  return tokens.columns.token.slice(...span).join("");
}

/**
 * The text of a token by itself, in which spaces and ends of lines can be seen.
 *
 * @param {string | null} text
 */
export function named(text) {
  const shown = plain((text ?? "").replaceAll("\n", "⏎").replaceAll("\t", "⇥"));
  return shown.trim() || shown.replaceAll(" ", "␣") || "∅";
}

/**
 * Whether the policy wrote the token at a place.
 *
 * @param {Table} tokens
 * @param {number} place
 */
export function isOwn(tokens, place) {
  return !tokens.columns.own || Boolean(tokens.columns.own[place]);
}

/**
 * The largest size of a quantity among these tokens, by which colours are scaled.
 *
 * @param {Table} tokens
 * @param {Quantity | null} quantity
 * @param {[number, number][]} among
 */
export function largest(tokens, quantity, among) {
  let found = 0;
  if (!quantity || quantity.signed === undefined) return found;
  const values = tokens.columns[quantity.name];
  for (const [start, end] of among) {
    for (let place = start; place < end; place++) found = Math.max(found, Math.abs(values[place] ?? 0));
  }
  return found;
}

/**
 * One token.
 *
 * @param {Table} tokens
 * @param {number} place
 * @param {Quantity | null} quantity
 * @param {number} most the value of the strongest colour
 * @param {Record<string, any>} [props]
 */
export function tokenElement(tokens, place, quantity, most, props = {}) {
  const text = plain(tokens.columns.token[place] ?? "");
  const { kind, strength } = lookOf(tokens, place, quantity, most);
  const style = { "--strength": strength.toFixed(3), "--line-width": `${(1 + 3 * strength).toFixed(1)}px` };
  return h("span", { ...props, class: `token ${kind} ${props.class || ""}`, style }, text || "∅");
}

/**
 * @param {Table} tokens
 * @param {number} place
 * @param {Quantity | null} quantity
 * @param {number} most
 */
function lookOf(tokens, place, quantity, most) {
  if (!isOwn(tokens, place)) return { kind: "context", strength: 0 };
  if (!quantity) return { kind: "", strength: 0 };
  const value = tokens.columns[quantity.name][place];
  if (quantity.name === "turn") return { kind: value % 2 ? "odd" : "even", strength: 0.5 };
  if (quantity.name === "kind") return { kind: `kind-${value}`, strength: 0.5 };
  if (quantity.name === "own" || value === null || !most) return { kind: "", strength: 0 };
  const strength = Math.sqrt(Math.min(Math.abs(value) / most, 1));
  return { kind: value < 0 ? "lowered" : "raised", strength };
}

/**
 * What the colours mean.
 *
 * @param {string} view
 * @param {Quantity | null} quantity
 * @param {number} most
 * @param {boolean} hasContext
 */
export function legend(view, quantity, most, hasContext) {
  const context = hasContext && h("span", { class: "token context" }, "tool or environment");
  if (!quantity) return h("p", { class: "legend" }, context);
  const [unit, help] = meaning(view, quantity.name);
  const sample = (/** @type {string} */ kind, /** @type {string} */ text) =>
    h("span", { class: `token ${kind}`, style: { "--strength": "1", "--line-width": "4px" } }, text);
  const size = `${number(most, 3)} ${unit}`;
  const marks = {
    turn: [sample("odd", "odd turns"), sample("even", "even turns")],
    kind: ["prose", "call", "arguments"].map((kind) => sample(`kind-${kind}`, kind)),
    own: [sample("", "the policy")],
  }[quantity.name] || [
    quantity.name !== "logp" && sample("raised", `+${size}`),
    quantity.signed && sample("lowered", `−${size}`),
  ];
  return h("p", { class: "legend" }, marks, context, h("span", { class: "quiet" }, help));
}

/**
 * A token's numbers as a list of names and values.
 *
 * @param {string} view
 * @param {Table} tokens
 * @param {number} place
 */
export function factsOf(view, tokens, place) {
  const facts = quantitiesOf(tokens).map(({ name, label }) => {
    const value = tokens.columns[name][place];
    const [unit, help] = meaning(view, name);
    const sign = QUANTITIES.some((one) => one.name === name && one.signed);
    const shown =
      name === "own"
        ? value
          ? "the policy"
          : "a tool or an environment"
        : typeof value === "string"
          ? value
          : sign
            ? signed(value)
            : number(value);
    return [label, `${shown}${typeof value === "number" && unit && unit !== "1" ? ` ${unit}` : ""}`, help, name];
  });
  if (tokens.columns.logp && tokens.columns.logp[place] !== null) {
    facts.push([
      "probability",
      number(Math.exp(tokens.columns.logp[place]), 3),
      "exp of the log-probability.",
      "probability",
    ]);
  }
  return h(
    "dl",
    { class: "facts" },
    facts.map(([label, shown, help, name]) =>
      h("div", { title: help, "data-name": name }, h("dt", {}, label), h("dd", {}, shown)),
    ),
  );
}
