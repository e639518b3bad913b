// Tables that sort by any column, whose heads say what the columns mean.

import { h, save } from "./dom.js";
import { csv } from "./format.js";

/**
 * One column: how a cell is shown, and by what rows are sorted.
 *
 * @typedef {{
 *   head: string, hint?: string, unit?: string, text?: boolean,
 *   value: (row: any) => any, show?: (row: any) => any,
 * }} Column
 */

const MOST_ROWS = 100;

/** By what a table is sorted, and how many rows it shows, by its name: a view that is drawn again keeps them. @type {Map<string, [number, boolean, number]>} */
const chosen = new Map();

/**
 * @param {Column[]} columns
 * @param {any[]} rows
 * @param {{sort?: number, down?: boolean, name: string, link?: (row: any) => string, marked?: (row: any) => boolean}} given
 *   `link` is where a row leads; `marked` rows stand out
 * @returns {HTMLElement}
 */
export function sortable(columns, rows, given) {
  let [by, down, most] = chosen.get(given.name) || [given.sort ?? -1, given.down ?? true, MOST_ROWS];
  const body = h("tbody");
  const more = h("p", { class: "quiet" });
  const heads = columns.map((column, index) =>
    h(
      "th",
      { class: column.text && "text", scope: "col" },
      h(
        "button",
        {
          title: [column.hint, column.unit && `Unit: ${column.unit}.`].filter(Boolean).join(" "),
          onclick: () => {
            [by, down] = [index, by === index ? !down : !column.text];
            chosen.set(given.name, [by, down, most]);
            fill();
          },
        },
        column.head,
      ),
    ),
  );

  function fill() {
    const all = by < 0 ? rows : sorted(rows, columns[by].value, down);
    heads.forEach((head, index) => {
      head.setAttribute("aria-sort", index !== by ? "none" : down ? "descending" : "ascending");
    });
    body.replaceChildren(...all.slice(0, most).map((row) => line(columns, row, given)));
    more.replaceChildren();
    if (all.length > most) {
      const showAll = () => {
        most = Infinity;
        chosen.set(given.name, [by, down, most]);
        fill();
      };
      more.append(`${most} of ${all.length} rows. `, h("button", { onclick: showAll }, "Show all"));
    }
  }

  fill();
  const keep = () =>
    save(
      `${given.name}.csv`,
      "text/csv",
      csv(
        columns.map((one) => one.head),
        rows.map((row) => columns.map((one) => one.value(row))),
      ),
    );
  return h(
    "div",
    {},
    h("div", { class: "wide" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body)),
    more,
    h(
      "div",
      { class: "savers" },
      h("button", { class: "save", title: "Save this table as CSV", onclick: keep }, "CSV"),
    ),
  );
}

/**
 * @param {Column[]} columns
 * @param {any} row
 * @param {{link?: (row: any) => string, marked?: (row: any) => boolean}} given
 */
function line(columns, row, given) {
  const cells = columns.map((column, index) => {
    const shown = column.show ? column.show(row) : column.value(row);
    const content = index === 0 && given.link ? h("a", { href: given.link(row) }, shown) : shown;
    return h("td", { class: column.text && "text" }, content);
  });
  const target = given.link && given.link(row);
  const open = (/** @type {MouseEvent} */ event) => {
    const inside = /** @type {Element} */ (event.target).closest("a, button");
    if (!inside && target && !String(getSelection())) location.hash = target;
  };
  return h(
    "tr",
    {
      class: [target && "leads", given.marked && given.marked(row) && "marked"].filter(Boolean).join(" "),
      onclick: open,
    },
    cells,
  );
}

/**
 * Rows by a value; those without one are last either way.
 *
 * @param {any[]} rows
 * @param {(row: any) => any} value
 * @param {boolean} down
 */
export function sorted(rows, value, down) {
  const lacks = (/** @type {any} */ given) => given === null || given === undefined || Number.isNaN(given);
  return [...rows].sort((first, second) => {
    const [a, b] = [value(first), value(second)];
    if (lacks(a) || lacks(b)) return Number(lacks(a)) - Number(lacks(b));
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return down ? -order : order;
  });
}
