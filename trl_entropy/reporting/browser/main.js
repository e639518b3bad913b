// The page: which view is shown, the way to it, keys, colours.

import { forgetCharts, pointAgain } from "./chart.js";
import { numbersOf, page, stepOf } from "./data.js";
import { h } from "./dom.js";
import { follow, isLive, reading } from "./live.js";
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
let answers = true; // whether the server of a page that follows its runs has answered the last question

/** How far the run is, where the page follows it. */
function liveStatus() {
  if (!isLive()) return null;
  const run = currentRun();
  const of = (/** @type {Run} */ one) => (run ? "" : `${one.name}: `) + (one.progress || "");
  const text = (run ? [run] : page().runs).map(of).join("; ");
  return h("p", { class: `live ${answers ? "" : "silent"}`, role: "status" }, text, !answers && SILENT);
}

const SILENT = " – the server does not answer; the page keeps what it has, and asks again.";

/** The steps whose completions this view needs. */
function needed() {
  const [run, step] = [currentRun(), numberOf("step")];
  if (!run) return null;
  if (step !== null) return reading(run, [step]);
  return state().find ? reading(run, run.known) : null;
}

function draw() {
  const [here, waiting] = [addressed(), needed()];
  if (waiting) {
    if (here !== shownPlace) shown(here, () => [h("p", { role: "status" }, "Reading the completions …")]);
    const say = (/** @type {Error} */ error) => shown(here, () => [h("p", { class: "rule" }, `${error.message}.`)]);
    waiting.then(() => here === addressed() && draw(), say);
  } else shown(here, view);
}

/** The place that is shown, but for its token and how it is shown. */
function addressed() {
  const { run, step, group, row, find } = state();
  return [run, step, group, row, find].join("/");
}

/**
 * Shows a view; where it is that of before, what a reader had opened stays open.
 *
 * @param {string} here
 * @param {() => (HTMLElement | null)[]} content
 */
function shown(here, content) {
  const same = here === shownPlace;
  const [height, open] = [scrollY, same ? unfolded() : new Map()];
  forgetCharts();
  place.replaceChildren(
    h("header", { class: "bar-top" }, way(), neighbours(), finder(), themeButton(), liveStatus()),
    h("main", {}, ...content().filter(Boolean)),
  );
  for (const details of place.querySelectorAll("details")) details.open = open.get(nameOf(details)) ?? details.open;
  if (same) pointAgain();
  scrollTo(0, same ? height : 0);
  if (same && [...open.values()].includes(true)) requestAnimationFrame(() => scrollTo(0, height)); // they are filled
  shownPlace = here;
  const { step, find } = state();
  document.body.classList.toggle("inside", Boolean(step || find));
  place.querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
}

/** Which folded parts are open, by their names. @returns {Map<string, boolean>} */
function unfolded() {
  return new Map([...place.querySelectorAll("details")].map((details) => [nameOf(details), details.open]));
}

/** @param {HTMLDetailsElement} details */
function nameOf(details) {
  return (details.querySelector("summary")?.textContent || "").replace(/\d+/g, "");
}

/**
 * Draws the view again where something in it has changed, unless the reader is in the middle of something.
 *
 * @param {Run[] | null} runs
 * @param {Run[]} before
 */
function onNews(runs, before) {
  answers = runs !== null;
  place.querySelector(".live")?.replaceWith(liveStatus());
  const busy = place.querySelector("select:focus, input:focus") || String(getSelection());
  if (!runs || busy) return;
  const step = numberOf("step");
  const differs = runs.some((run, number) => {
    const was = before[number];
    if (step === null || state().find) return run !== was && !state().find;
    const sign = (/** @type {Run} */ one) => JSON.stringify([one.shown[step], numbersOf(one, step)]);
    return run !== was && sign(run) !== sign(was);
  });
  if (differs) draw();
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

const figures = document.getElementById("static");
if (figures instanceof HTMLDetailsElement) figures.open = false;
window.addEventListener("hashchange", draw);
document.addEventListener("keydown", onKey);
draw();
if (isLive()) follow(page().every || 2, onNews);
