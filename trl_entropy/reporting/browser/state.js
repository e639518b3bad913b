// Where the reader is, which is the address's hash: `#step=15&group=470&row=40&token=3`.

/** @typedef {Record<string, string>} State */

/** Names from the widest to the narrowest: leaving one leaves those after it. */
const DEPTH = ["run", "step", "group", "row", "token"];

/** @returns {State} */
export function state() {
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

/**
 * The address of the place that differs from this one in these names; what lies deeper than they is left.
 *
 * @param {Record<string, string | number | null>} changes
 * @returns {string}
 */
export function address(changes) {
  const next = state();
  const widest = Math.min(...Object.keys(changes).map((name) => (DEPTH.includes(name) ? DEPTH.indexOf(name) : 99)));
  for (const name of DEPTH.slice(widest + 1)) delete next[name];
  if (widest < 99) for (const name of ["find", "set"]) delete next[name];
  if (widest < 3) delete next.sort;
  for (const [name, value] of Object.entries(changes)) {
    if (value === null) delete next[name];
    else next[name] = String(value);
  }
  return `#${new URLSearchParams(next)}`;
}

/**
 * Goes there.
 *
 * @param {Record<string, string | number | null>} changes
 * @param {boolean} [replacing] without a step for the browser's button "back"
 */
export function go(changes, replacing = false) {
  const there = address(changes);
  if (there === location.hash) return;
  if (!replacing) location.hash = there;
  else {
    history.replaceState(null, "", there);
    window.dispatchEvent(new Event("hashchange"));
  }
}
