// Numbers as texts.

/**
 * A number with this many significant digits; a dash where there is none.
 *
 * @param {number | null | undefined} value
 * @param {number} [digits]
 */
export function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return minus(String(value));
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return minus(value.toExponential(Math.min(digits, 3) - 1));
  return minus(String(Number(value.toPrecision(digits))));
}

/**
 * A number with its sign.
 *
 * @param {number | null | undefined} value
 * @param {number} [digits]
 */
export function signed(value, digits = 3) {
  return value !== null && value !== undefined && value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

/**
 * A value with its standard error, of which two digits say something.
 *
 * @param {number | null | undefined} value
 * @param {number | null | undefined} error
 */
export function withError(value, error) {
  if (value === null || value === undefined) return "–";
  return error === null || error === undefined ? signed(value, 4) : `${signed(value, 3)} ± ${number(error, 2)}`;
}

/** @param {string} text */
function minus(text) {
  return text.replace(/^-/, "−").replace("e-", "e−").replace("e+", "e");
}

/**
 * @param {number} count
 * @param {string} noun
 */
export function counted(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/**
 * Rows as a table of comma-separated values.
 *
 * @param {string[]} heads
 * @param {any[][]} rows
 */
export function csv(heads, rows) {
  const cell = (/** @type {any} */ value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [heads, ...rows].map((row) => row.map(cell).join(",") + "\r\n").join("");
}
