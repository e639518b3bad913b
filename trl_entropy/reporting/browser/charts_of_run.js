// Which charts a run has: each is a title with the keys of metrics.jsonl that it draws.

/**
 * @typedef {{key: string, name: string, points?: boolean}} Line
 * @typedef {{
 *   title: string, unit: string, lines: Line[], zero?: boolean, hint?: string,
 *   heldOut?: {source: string, metric: string, name: string, unless?: string}[],
 * }} Plan `heldOut` are lines of what was evaluated, left out where the metric `unless` has the same values
 */

const EVALUATED = "evaluated checkpoints, ± half of the 95 % interval";

/** @type {Plan[]} */
export const PLANS = [
  {
    title: "Entropy",
    unit: "nats/token",
    hint: "The policy's entropy: of the step's own completions, and of the probe batch before the step.",
    lines: [
      { key: "entropy/policy", name: "step's own completions" },
      { key: "entropy/probe_batch", name: "probe batch", points: true },
      { key: "entropy_control/target", name: "target of the control" },
    ],
  },
  {
    title: "Entropy change of a step",
    unit: "nats/token",
    zero: true,
    hint: "Measured on completions that the step was not trained on, and predicted from its update. Bars are standard errors.",
    lines: [
      { key: "entropy/delta_measured", name: "measured", points: true },
      { key: "entropy/delta_linear", name: "first order", points: true },
      { key: "entropy/delta_second_order", name: "second order", points: true },
      { key: "entropy/delta_trapezoid", name: "trapezoid rule", points: true },
    ],
  },
  {
    title: "Parts of the predicted change",
    unit: "nats/token",
    zero: true,
    hint: "The first-order change is the sum of these parts.",
    lines: [
      { key: "entropy/delta_momentum", name: "momentum", points: true },
      { key: "entropy/delta_gradient", name: "gradient", points: true },
      { key: "entropy/delta_weight_decay", name: "weight decay", points: true },
      { key: "entropy/delta_kl", name: "KL", points: true },
      { key: "entropy/delta_entropy_bonus", name: "entropy bonus", points: true },
      { key: "entropy/delta_router_aux_loss", name: "balance of experts", points: true },
      { key: "entropy/delta_entropy_control", name: "entropy control", points: true },
    ],
  },
  {
    title: "Integrated change",
    unit: "nats/token",
    hint: "The entropy at the first measured step plus all changes since, measured and predicted. It follows the entropy only where every step is measured.",
    lines: [
      { key: "entropy/integral_measured", name: "measured" },
      { key: "entropy/integral_linear", name: "first order" },
      { key: "entropy/integral_second_order", name: "second order" },
      { key: "entropy/integral_trapezoid", name: "trapezoid rule" },
    ],
  },
  { title: "Reward", unit: "", lines: [{ key: "reward", name: "mean of the step's completions" }] },
  {
    title: "Held-out pass@1",
    unit: "",
    hint: "On prompts that are not trained on: by training's own evaluations, and by trl-entropy evaluate.",
    lines: [],
    heldOut: [
      { source: "training", metric: "rewards/tag_pref/mean", name: "during training" },
      { source: "evaluate", metric: "pass@1", name: EVALUATED },
    ],
  },
  {
    title: "Held-out reward",
    unit: "",
    hint: "Mean reward on prompts that are not trained on, by training's own evaluations.",
    lines: [],
    heldOut: [{ source: "training", metric: "reward", name: "during training", unless: "rewards/tag_pref/mean" }],
  },
  {
    title: "Held-out entropy",
    unit: "nats/token",
    hint: "The policy's entropy on prompts that are not trained on.",
    lines: [],
    heldOut: [
      { source: "training", metric: "entropy", name: "during training" },
      { source: "evaluate", metric: "entropy_mean", name: EVALUATED },
    ],
  },
  {
    title: "Reward change of a step",
    unit: "",
    zero: true,
    hint: "What the step did to the expected reward, measured on the same completions as the entropy's change, and predicted from its update. Bars are standard errors.",
    lines: [
      { key: "reward/delta_measured", name: "measured", points: true },
      { key: "reward/delta_linear", name: "first order", points: true },
      { key: "reward/delta_trapezoid", name: "trapezoid rule", points: true },
    ],
  },
  {
    title: "Integrated change of the reward",
    unit: "",
    hint: "The expected reward at the first measured step plus all changes since. It follows the reward only where every step is measured.",
    lines: [
      { key: "reward/integral_measured", name: "measured" },
      { key: "reward/integral_linear", name: "first order" },
      { key: "reward/integral_trapezoid", name: "trapezoid rule" },
    ],
  },
  {
    title: "Parts of the predicted change of the reward",
    unit: "",
    zero: true,
    hint: "The first-order change is the sum of these parts.",
    lines: [
      { key: "reward/delta_momentum", name: "momentum", points: true },
      { key: "reward/delta_gradient", name: "gradient", points: true },
      { key: "reward/delta_weight_decay", name: "weight decay", points: true },
      { key: "reward/delta_kl", name: "KL", points: true },
      { key: "reward/delta_entropy_bonus", name: "entropy bonus", points: true },
      { key: "reward/delta_router_aux_loss", name: "balance of experts", points: true },
    ],
  },
  {
    title: "Do completions depend on their prompts?",
    unit: "nats",
    zero: true,
    hint: "Mutual information of prompt and completion, between its two bounds. Where it falls and the entropy does not, the policy says the same to every prompt. Bars are standard errors.",
    lines: [
      { key: "mutual_information/lower", name: "lower bound", points: true },
      { key: "mutual_information/upper", name: "upper bound", points: true },
      { key: "mutual_information/limit", name: "most that the lower bound can be" },
    ],
  },
  { title: "KL to the start policy", unit: "nats/token", zero: true, lines: [{ key: "kl", name: "k3 estimator" }] },
  {
    title: "Length of completions",
    unit: "tokens",
    lines: [
      { key: "completions/mean_length", name: "mean" },
      { key: "completions/max_length", name: "longest" },
      { key: "completions/min_length", name: "shortest" },
    ],
  },
  {
    title: "Gradient noise scale",
    unit: "prompts",
    hint: "The number of prompts at which the gradient's noise equals its signal, over the steps so far.",
    lines: [
      { key: "noise_scale/simple", name: "plain", points: true },
      { key: "noise_scale/adam", name: "in Adam's metric", points: true },
    ],
  },
  {
    title: "Entropy control",
    unit: "nats/token",
    zero: true,
    lines: [
      { key: "entropy_control/target_change", name: "change that was wanted" },
      { key: "entropy_control/delta_optimizer", name: "by the optimizer alone" },
      { key: "entropy_control/delta_predicted", name: "by the corrected step" },
    ],
  },
  { title: "Norm of the gradient", unit: "", zero: true, lines: [{ key: "grad_norm", name: "before clipping" }] },
];

/**
 * What a run's x can be, beside the number of the step: sums over the steps so far.
 *
 * @type {Record<string, {name: string, hint: string}>}
 */
export const AXES = {
  step: { name: "step", hint: "" },
  num_tokens: { name: "tokens", hint: "num_tokens: tokens of prompts and completions so far" },
  step_time: { name: "seconds", hint: "step_time, summed over the steps so far" },
};

/**
 * Whether a column of the steps has a finite number anywhere.
 *
 * @param {import("./data.js").Run} run
 * @param {string} key
 */
export function has(run, key) {
  const values = run.steps.columns[key];
  return Boolean(values) && values.some((value) => value !== null);
}

/**
 * The x of each step of a run.
 *
 * @param {import("./data.js").Run} run
 * @param {string} axis a name of `AXES`
 * @returns {number[]}
 */
export function xOf(run, axis) {
  const { step, num_tokens, step_time } = run.steps.columns;
  if (axis === "num_tokens" && num_tokens) return num_tokens;
  if (axis !== "step_time" || !step_time) return step;
  let sum = 0;
  return step_time.map((seconds) => (sum += seconds ?? 0));
}

/**
 * The lines of a plan that show what was evaluated of a run, a line for each set if there are several.
 *
 * @param {import("./data.js").Run} run
 * @param {Plan} plan
 * @param {string} axis
 * @param {number | null} look null: each line has its own
 * @param {string} [prefix] of their names
 * @returns {import("./chart.js").Series[]}
 */
export function heldOutOf(run, plan, axis, look, prefix = "") {
  const { columns } = run.evaluation;
  /** @type {import("./chart.js").Series[]} */
  const found = [];
  const valuesOf = (/** @type {string | undefined} */ metric) =>
    JSON.stringify(columns.value.filter((_, at) => columns.metric[at] === metric));
  for (const { source, metric, name, unless } of plan.heldOut || []) {
    if (!columns.metric || (unless && valuesOf(unless) === valuesOf(metric))) continue;
    const places = [...Array(run.evaluation.rows).keys()].filter((at) => columns.metric[at] === metric);
    const sources = [...new Set(places.map((at) => columns.source[at]))];
    for (const one of sources.filter((other) => other === source || other.startsWith(`${source}, `))) {
      const own = places.filter((at) => columns.source[at] === one && columns.value[at] !== null);
      own.sort((a, b) => columns.step[a] - columns.step[b]);
      const x = xOf(run, axis);
      const at = (/** @type {number} */ step) =>
        axis === "step" ? step : (x[run.steps.columns.step.indexOf(step)] ?? 0);
      const half = own.map((place) =>
        columns.low[place] === null ? null : (columns.high[place] - columns.low[place]) / 2,
      );
      found.push({
        name: prefix + (one === source ? name : `${name}, ${one.slice(source.length + 2)}`),
        x: own.map((place) => at(columns.step[place])),
        y: own.map((place) => columns.value[place]),
        error: half.some((value) => value !== null) ? half : undefined,
        steps: own.map((place) => columns.step[place]),
        points: source === "evaluate",
        look: look ?? found.length,
      });
    }
  }
  return found.filter((series) => series.x.length);
}

/**
 * The points of a key of a run.
 *
 * @param {import("./data.js").Run} run
 * @param {Line} line
 * @param {number} look
 * @param {string} axis
 * @param {string} [prefix] of its name
 * @returns {import("./chart.js").Series}
 */
export function seriesOf(run, line, look, axis, prefix = "") {
  const { columns } = run.steps;
  const values = columns[line.key];
  const errors = columns[`${line.key}_stderr`];
  const places = [...values.keys()].filter((place) => values[place] !== null);
  const x = xOf(run, axis);
  const take = (/** @type {any[]} */ given) => places.map((place) => given[place]);
  return {
    name: prefix + line.name,
    x: take(x),
    y: take(values),
    error: errors && errors.some((error) => error !== null) ? take(errors) : undefined,
    steps: take(columns.step),
    points: line.points,
    look,
  };
}
