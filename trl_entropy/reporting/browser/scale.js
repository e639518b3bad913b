// Axes and lines: pure functions from numbers to numbers and to paths.

/**
 * Round numbers between two ends, about `most` of them.
 *
 * @param {number} low
 * @param {number} high
 * @param {number} most
 * @returns {number[]}
 */
export function ticks(low, high, most) {
  const rough = (high - low) / most;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].map((times) => times * power).find((step) => step >= rough) || 10 * power;
  const found = [];
  for (let count = Math.ceil(low / stride - 1e-9); count * stride <= high + 1e-9 * stride; count++) {
    found.push(Number((count * stride).toPrecision(12)));
  }
  return found;
}

/**
 * The lowest and the highest of these numbers, with a margin; 0 and 1 if there is none.
 *
 * @param {Iterable<number | null>} values
 * @returns {[number, number]}
 */
export function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value === null || !Number.isFinite(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return [0, 1];
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - margin, high + margin];
}

/**
 * The places of the points that are drawn: of those that fall into one pixel only the first, the last, the lowest and
 * the highest, so that a line of any length looks as it would with all of them.
 *
 * @param {number[]} x ascending pixels
 * @param {(number | null)[]} y
 * @returns {number[]}
 */
export function visible(x, y) {
  const places = [];
  for (let start = 0; start < x.length;) {
    let end = start;
    let low = start;
    let high = start;
    while (end < x.length && Math.floor(x[end]) === Math.floor(x[start])) {
      if ((y[end] ?? Infinity) < (y[low] ?? Infinity)) low = end;
      if ((y[end] ?? -Infinity) > (y[high] ?? -Infinity)) high = end;
      end++;
    }
    places.push(...new Set([start, low, high, end - 1].sort((a, b) => a - b)));
    start = end;
  }
  return places;
}

/**
 * The path of a line through points; where one has no value the line is interrupted, but for `joined`.
 *
 * @param {number[]} x
 * @param {(number | null)[]} y
 * @param {boolean} [joined]
 */
export function line(x, y, joined = false) {
  let path = "";
  let draws = false;
  for (let place = 0; place < x.length; place++) {
    const value = y[place];
    if (value === null || !Number.isFinite(value)) {
      draws = draws && joined;
      continue;
    }
    path += `${draws ? "L" : "M"}${x[place].toFixed(1)} ${value.toFixed(1)}`;
    draws = true;
  }
  return path;
}

/**
 * The path of the area between two lines.
 *
 * @param {number[]} x
 * @param {(number | null)[]} low
 * @param {(number | null)[]} high
 */
export function band(x, low, high) {
  const known = [...x.keys()].filter((place) => low[place] !== null && high[place] !== null);
  if (known.length < 2) return "";
  const there = known.map((place) => `${x[place].toFixed(1)} ${/** @type {number} */ (high[place]).toFixed(1)}`);
  const back = known
    .reverse()
    .map((place) => `${x[place].toFixed(1)} ${/** @type {number} */ (low[place]).toFixed(1)}`);
  return `M${there.join("L")}L${back.join("L")}Z`;
}

/**
 * The place of the number in an ascending list that is nearest to a value.
 *
 * @param {number[]} sorted
 * @param {number} value
 */
export function nearest(sorted, value) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}
