// The page: which view is shown, the way to it, keys, colours.

import { forgetCharts } from "./chart.js";
import { page, stepOf } from "./data.js";
import { h } from "./dom.js";
import { address, go, state } from "./state.js";
import { viewOfRuns } from "./view_compare.js";
import { viewOfCompletion } from "./view_completion.js";
import { viewOfFind } from "./view_find.js";
import { viewOfGroup } from "./view_group.js";
import { viewOfRun } from "./view_run.js";
import { viewOfStep } from "./view_step.js";

/** @typedef {import("./data.js").Run} Run */

const place = /** @type {HTMLElement} */ (document.getElementById("app"));

/** The run that the reader is in; null: all of them. @returns {Run | null} */
function currentRun() {
  const { runs } = page();
  const given = state().run;
  if (given !== undefined && runs[Number(given)]) return runs[Number(given)];
  return runs.length > 1 && state().step === undefined ? null : runs[0];
}

/** @param {string} name */
function numberOf(name) {
  const given = state()[name];
  return given !== undefined && /^\d+$/.test(given) ? Number(given) : null;
}

function view() {
  const run = currentRun();
  if (!run) return viewOfRuns();
  const [step, group, row] = ["step", "group", "row"].map(numberOf);
  const { find, set } = state();
  if (find) return viewOfFind(run, step, find);
  if (step === null) return viewOfRun(run);
  const shown = stepOf(run, step);
  if (shown && row !== null) return viewOfCompletion(run, shown, row, set === "measured");
  if (shown && group !== null) return viewOfGroup(run, shown, group);
  return viewOfStep(run, step);
}

/** The way from the widest view to this one. */
function way() {
  const run = currentRun();
  const { runs } = page();
  const [step, group, row, token] = ["step", "group", "row", "token"].map(numberOf);
  /** @type {any[]} */
  const links = [];
  const add = (/** @type {string} */ name, /** @type {Record<string, any>} */ there) =>
    links.push(h("li", {}, h("a", { href: address(there) }, name)));
  if (runs.length > 1) add("All runs", { run: null });
  if (run) add(run.name, runs.length > 1 ? { run: run.number } : { run: null });
  if (run && step !== null) add(`Step ${step}`, { step });
  if (run && group !== null) add(`Group ${group}`, { group });
  if (run && row !== null) add(`Completion ${row}`, { row, set: state().set || null });
  if (run && token !== null) add(`Token ${token}`, { token });
  links[links.length - 1]?.firstChild.setAttribute("aria-current", "page");
  return h("nav", { "aria-label": "Where this is" }, h("ol", { class: "way" }, links));
}

/**
 * The step, group, completion or token beside this one.
 *
 * @param {number} by
 * @returns {Record<string, number | string | null> | null}
 */
function beside(by) {
  const run = currentRun();
  const [step, group, row, token] = ["step", "group", "row", "token"].map(numberOf);
  if (!run || step === null) return null;
  const next = (/** @type {number[]} */ all, /** @type {number} */ one) => all[all.indexOf(one) + by];
  const shown = stepOf(run, step);
  if (shown && row !== null && token !== null) return token + by < 0 ? null : { token: token + by };
  if (shown && row !== null) {
    const measured = state().set === "measured" && shown.measuredCompletions;
    const { columns } = measured || shown.completions;
    const rows = columns.row.filter((_, at) => group === null || columns.prompt_index[at] === group);
    const found = next(rows, row);
    return found === undefined ? null : { row: found, set: state().set || null };
  }
  if (shown && group !== null) {
    const found = next(shown.groups.columns.prompt_index, group);
    return found === undefined ? null : { group: found };
  }
  const known = [...new Set([...run.tokens_known, ...run.known])].sort((a, b) => a - b);
  const found = known.includes(step)
    ? next(known, step)
    : known.filter((other) => (other - step) * by > 0).at(by > 0 ? 0 : -1);
  return found === undefined ? null : { step: found };
}

function neighbours() {
  const step = numberOf("step");
  if (step === null || state().find) return null;
  const button = (/** @type {number} */ by, /** @type {string} */ text, /** @type {string} */ name) => {
    const there = beside(by);
    return h(
      "a",
      { class: "step-by", href: there && address(there), "aria-label": name, "aria-disabled": !there, title: name },
      text,
    );
  };
  return h(
    "span",
    { class: "neighbours" },
    button(-1, "←", "The one before (left arrow)"),
    button(1, "→", "The next one (right arrow)"),
  );
}

function finder() {
  const run = currentRun();
  if (!run || !run.known.length) return null;
  const field = h("input", {
    type: "search",
    id: "find",
    placeholder: "Find a text",
    "aria-label": "Find a text in prompts and completions",
    value: state().find || "",
  });
  return h(
    "form",
    {
      role: "search",
      onsubmit: (/** @type {Event} */ event) => {
        event.preventDefault();
        const changes = { run: run.number, step: numberOf("step"), find: field.value.trim() || null };
        go(changes);
      },
    },
    field,
  );
}

/** @param {string} [theme] */
function themeButton(theme) {
  const isDark = () =>
    (document.documentElement.dataset.theme ||
      (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const turn = () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  };
  return h(
    "button",
    { id: "theme", onclick: turn, title: "Light or dark (t)", "aria-label": "Light or dark" },
    theme || "◐",
  );
}

let shownPlace = "";

function draw() {
  forgetCharts();
  const { run, step, group, row, find } = state();
  const here = [run, step, group, row, find].join("/");
  const height = scrollY;
  place.replaceChildren(
    h("header", { class: "bar-top" }, way(), neighbours(), finder(), themeButton()),
    h("main", {}, ...view().filter(Boolean)),
  );
  scrollTo(0, here === shownPlace ? height : 0);
  shownPlace = here;
  document.body.classList.toggle("inside", Boolean(step || find));
  place.querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  const target = /** @type {HTMLElement} */ (event.target);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.matches("input, select, textarea")) {
    if (event.key === "Escape") target.blur();
    return;
  }
  const focused = target.matches?.("[data-place]") ? Number(target.dataset.place) : null;
  if (event.key === "/") document.getElementById("find")?.focus();
  else if (event.key === "t") document.getElementById("theme")?.click();
  else if (event.key === "Escape") goUp();
  else if ((event.key === "Enter" || event.key === " ") && focused !== null) go({ token: focused }, true);
  else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    const there = beside(event.key === "ArrowRight" ? 1 : -1);
    if (!there) return;
    go(there, "token" in there);
    /** @type {HTMLElement | null} */ (place.querySelector(".chosen"))?.focus({ preventScroll: true });
  } else return;
  event.preventDefault();
}

function goUp() {
  const links = [...place.querySelectorAll(".way a")];
  if (state().find) go({ find: null });
  else if (links.length > 1) location.hash = links[links.length - 2].getAttribute("href") || "";
}

/** @type {HTMLDetailsElement} */ (document.getElementById("static")).open = false;
window.addEventListener("hashchange", draw);
document.addEventListener("keydown", onKey);
draw();
