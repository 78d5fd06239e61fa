// The page of `make report`: compares the runs whose data lie in #data (scripts/bridge/tools/report.py) and shows them.
// Every text of a run goes in through textContent.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main"), nav = document.getElementById("nav");
data.stages = { sft: {}, ppo: {}, eval: {} };
for (const [stage, run, recorded] of data.records) data.stages[stage][run] = recorded;
const STAGES = ["sft", "ppo"].filter(stage => Object.keys(data.stages[stage]).length);
const TITLE = { sft: "SFT", ppo: "PPO", eval: "Evaluation", base: "base", ckpt: "checkpoint" };
const COLOURS = 6;
// Problems that are shown at once; a line of fewer points has them marked.
const RENDER = 50, FEW = 25;
// A smaller difference in speed than this is not worth a sentence, and a smaller phase not a line.
const LEAST_SHARE = 0.05, LEAST_PHASE = 0.005;

// The charts that are always shown: title, metric.
const CHARTS = {
  sft: [["Loss", /^train\/loss$/], ["Validation loss", /^val\/loss$/], ["Tokens/s per GPU", /^perf\/throughput$/],
    ["Seconds per step", /^timing_s\/step$/]],
  ppo: [["Reward", /^critic\/score\/mean$/], ["Accuracy in validation", /^val-core\//],
    ["Answer length, tokens", /^response_length\/mean$/], ["KL", /^actor\/(ppo_kl|kl_loss|reward_kl_penalty)$/],
    ["Entropy", /^actor\/entropy$/], ["Actor's loss", /^actor\/pg_loss$/],
    ["Critic's loss", /^critic\/vf_loss$/], ["Tokens/s per GPU", /^perf\/throughput$/], ["Seconds per step", /^timing_s\/step$/]],
};
// Phases that are a part of another one, and what else tells why a step takes its time.
const INSIDE = { generate_sequences: "gen", reshard: "gen" };
const WORK = [["Answer length, tokens", "response_length/mean"], ["Prompt length, tokens", "prompt_length/mean"],
  ["Tokens of a step", "perf/total_num_tokens"], ["Tokens/s per GPU", "perf/throughput"],
  ["GPU memory reserved, GiB", "perf/max_memory_reserved_gb"]];
const KINDS = [["up", "newly right", "higher score"], ["down", "newly wrong", "lower score"],
  ["right", "right in both", "same, above 0"], ["wrong", "wrong in both", "same, 0 or below"]];
const PAIRS = [["base", "sft"], ["sft", "ppo"], ["base", "ppo"]];


// ---- small helpers

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick" || name === "onchange" || name === "ontoggle") made[name] = value;
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    // A string goes in as text.
    if (child !== null && child !== undefined) made.append(child instanceof Node ? child : String(child));
  }
  return made;
}

function section(id, title, called, ...children) {
  const made = el("section", { id }, el("h2", {}, title), ...children);
  main.append(made);
  nav.append(el("a", { href: `#${id}` }, called));
  return made;
}

// Cells: a text, a node, or {n: a text to align as a number}. `stack`: on a phone a row becomes a block.
function table(head, rows, stack = false, classes = []) {
  const cell = (tag, content, place) => {
    const number = content && typeof content === "object" && "n" in content && !(content instanceof Node);
    const inside = tag === "td", kind = number ? "n" : inside && place ? "text" : null;
    return el(tag, { class: kind, "data-name": inside ? nameOf(head[place]) : null }, number ? content.n : content);
  };
  return el("div", { class: "wide" }, el("table", { class: stack ? "stack" : null },
    el("thead", {}, el("tr", {}, head.map((content, place) => cell("th", content, place)))),
    el("tbody", {}, rows.map((row, number) =>
      el("tr", { class: classes[number] || null }, row.map((content, place) => cell("td", content, place)))))));
}

const nameOf = content => content && content.n !== undefined ? content.n : content;
const note = (...words) => el("p", { class: "soft" }, words);
const judged = (score, ...words) => el("span", { class: score > 0 ? "better" : "worse" }, words);
const mean = values => values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
const signed = (value, digits) => (value > 0 ? "+" : value < 0 ? "\u2212" : "\u00b1") + Math.abs(value).toFixed(digits);
const digitsFor = value => Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : Math.abs(value) >= 1 ? 2 : 3;
const fixed = value => value.toFixed(digitsFor(value));
function short(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: digitsFor(value) });
}
const percent = value => `${(100 * value).toFixed(1)} %`;
const span = seconds => seconds < 90 ? `${seconds.toFixed(0)} s` : seconds < 5400 ? `${(seconds / 60).toFixed(0)} min` :
  `${(seconds / 3600).toFixed(1)} h`;
const when = stamp => String(stamp).replace("T", " ").replace(/(:\d\d)\+00:00$/, "$1 UTC");
const text = value => typeof value === "string" ? value : JSON.stringify(value);
const variable = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const colour = number => `c${number % COLOURS}`;


// ---- what the runs are

// Nested settings as {"a.b.c": value}.
function flat(settings, above = "") {
  if (settings === null || typeof settings !== "object" || Array.isArray(settings)) return { [above]: settings };
  return Object.assign({}, ...Object.entries(settings).map(([key, value]) => flat(value, above ? `${above}.${key}` : key)));
}

// What a run's stage was told, as it reads with any WORK_DIR and any name; without names and housekeeping.
function settingsOf(stage, run) {
  const { config, inputs, work_dir: workDir } = data.stages[stage][run], plain = {};
  const all = { ...(config ? flat(config) : {}), ...(inputs ? flat(inputs, "inputs") : {}) };
  for (const [key, value] of Object.entries(all)) {
    if (data.housekeeping.includes(key)) continue;
    const shown = workDir ? text(value).split(workDir).join("WORK_DIR") : text(value);
    plain[key] = shown.split(`/runs/${run}/`).join("/runs/RUN/");
  }
  return plain;
}

const isSeed = key => key.split(".").pop() === "seed";

// Runs that differ by their seed alone are one group.
function groupsOf(stage) {
  const groups = new Map();
  for (const run of runsOf(stage)) {
    const own = Object.entries(settingsOf(stage, run)).filter(([key]) => !isSeed(key)).sort();
    const key = own.length ? JSON.stringify(own) : run;
    groups.set(key, [...(groups.get(key) || []), run]);
  }
  return [...groups.values()].map((runs, number) => ({
    runs, number, label: runs.length > 1 ? `${runs.join(", ")} (${runs.length} seeds)` : runs[0] }));
}

const runsOf = stage => data.runs.filter(run => data.stages[stage][run]);
const stepsOf = stage => (data.curves[stage][0] || ["step", []])[1];
const seriesOf = (stage, key) => ((data.curves[stage] || []).find(([name]) => name === key) || [key, {}])[1];
const metricsOf = stage => data.curves[stage].slice(1).map(([key]) => key).filter(key => key !== "time");

// An attempt that has no end lasts to the last step before the next one.
function secondsOf(stage, run) {
  const attempts = data.stages[stage][run].attempts;
  const times = (seriesOf(stage, "time")[run] || []).filter(time => time !== null);
  return attempts.map((attempt, number) => {
    const start = Date.parse(attempt[0]) / 1000, next = attempts[number + 1];
    const before = next ? Date.parse(next[0]) / 1000 : Infinity;
    const end = attempt[1] ? Date.parse(attempt[1]) / 1000 : Math.max(start, ...times.filter(time => time < before));
    return end - start;
  });
}

function gpusOf(stage, run) {
  const seen = (data.stages[stage][run].facts.gpus || []).length;
  if (!seen || stage === "eval") return Math.min(1, seen);
  const settings = settingsOf(stage, run);
  return Number(settings["trainer.n_gpus_per_node"] || seen) * Number(settings["trainer.nnodes"] || 1);
}

// verl's SFT says nothing of time: its seconds are those between its steps, but where an attempt began.
function addSeconds() {
  for (const stage of STAGES) {
    const steps = stepsOf(stage), known = seriesOf(stage, "timing_s/step"), found = { ...known };
    for (const [run, times] of Object.entries(seriesOf(stage, "time"))) {
      if (known[run]) continue;
      const starts = data.stages[stage][run].attempts.map(([start]) => Date.parse(start) / 1000);
      found[run] = times.map((time, place) => {
        const before = place ? times[place - 1] : null;
        if (time === null || before === null || starts.some(start => before < start && start <= time)) return null;
        return (time - before) / (steps[place] - steps[place - 1]);
      });
    }
    if (!Object.keys(found).length) continue;
    data.curves[stage] = [...data.curves[stage].filter(([key]) => key !== "timing_s/step"), ["timing_s/step", found]];
  }
}

// Mean over the steps but the first, which is slower.
function meanOf(stage, run, key) {
  const values = seriesOf(stage, key)[run] || [];
  const rest = values.slice(1).filter(value => value !== null);
  return mean(rest.length ? rest : values.filter(value => value !== null));
}


// ---- the runs

function showRuns() {
  const first = el("div"), second = el("div");
  section("runs", "Runs", "Runs", el("div", { class: "beside" }, first, second));
  const asked = data.runs.filter(run => data.stages.eval[run] && Object.keys(data.stages.eval[run].models).length);
  if (asked.length) first.append(el("h3", {}, "Accuracy on the test problems"), ...accuracies(asked));
  const rows = data.runs.flatMap(run => ["sft", "ppo", "eval"].filter(stage => data.stages[stage][run]).map(stage => {
    const its = data.stages[stage][run], seconds = secondsOf(stage, run), all = seconds.reduce((sum, one) => sum + one, 0);
    const gpus = gpusOf(stage, run), step = stage === "eval" ? null : meanOf(stage, run, "timing_s/step");
    const came = [its.status === "finished" ? "" : its.status || "no run.json", its.course.replace("->", "\u2192")];
    return [run, TITLE[stage], came.filter(Boolean).join(", "), { n: step === null ? "" : fixed(step) },
      { n: seconds.length ? span(all) : "" },
      { n: !seconds.length ? "" : gpus ? (all * gpus / 3600).toFixed(2) : "0 (CPU)" },
      { n: seconds.length > 1 ? seconds.length : "" }];
  }));
  const head = ["Run", "Stage", "What came out", { n: "s per step" }, { n: "time" }, { n: "GPU-hours" }, { n: "attempts" }];
  const columns = rows.some(row => row[6].n) ? 7 : 6;
  second.append(el("h3", {}, "Stages"), table(head.slice(0, columns), rows.map(row => row.slice(0, columns)), true));
  if (data.runs.length > 1) first.append(el("h3", {}, "Speed"), ...verdicts());
}

// What the evaluations of these runs came to.
function accuracies(runs) {
  const models = [...new Set(runs.flatMap(run => Object.keys(data.stages.eval[run].models)))];
  const counts = new Set(runs.flatMap(run => Object.values(data.stages.eval[run].models).map(figures => figures.rows)));
  return [table(["Run", ...models.map(model => ({ n: TITLE[model] || model }))], runs.map(run => {
    const its = data.stages.eval[run].models;
    return [run, ...models.map(model => ({ n: its[model] ? accuracy(its[model]) : "\u2013" }))];
  }), true), note(`${[...counts].join(" or ")} problems; in brackets the 95 % confidence interval.`)];
}

function accuracy({ accuracy: value, accuracy_interval: interval }) {
  if (value === undefined) return "\u2013";
  // Scores of one's own need not lie between 0 and 1.
  const shares = value >= 0 && value <= 1, shown = shares ? percent(value) : short(value);
  if (!interval || interval[0] === null) return shown;
  return `${shown} [${interval.map(end => shares ? (100 * end).toFixed(1) : short(end)).join(", ")}]`;
}

// Which runs are slower or faster than the first, and by what most, a sentence each.
function verdicts() {
  const found = [];
  for (const stage of STAGES) {
    const [first, ...others] = runsOf(stage), base = meanOf(stage, first, "timing_s/step");
    for (const run of others) {
      const own = meanOf(stage, run, "timing_s/step"), share = own / base - 1;
      if (!base || !own || Math.abs(share) < LEAST_SHARE) continue;
      const [largest] = phasesOf(stage).filter(({ phase }) => !INSIDE[phase])
        .map(({ phase, means }) => [phase, means[run] - means[first]]).sort((a, b) => Math.sign(share) * (b[1] - a[1]));
      const much = share < 1 ? `${signed(100 * share, 0)} %` : `${(1 + share).toFixed(1)} times`;
      found.push(el("p", {}, `A step of ${run}\u2019s ${TITLE[stage]} takes ${fixed(own)} s, `, judged(-share, el("b", {}, much)),
        ` ${share < 1 ? "against" : "that of"} ${first}`,
        largest ? `; the largest difference is ${largest[0]}, ${signed(largest[1], digitsFor(base))} s.` : "."));
    }
  }
  const none = el("p", {}, `No run\u2019s step takes ${100 * LEAST_SHARE} % more or less than the first one\u2019s.`);
  return [...(found.length ? found : [none]), el("p", {}, el("a", { href: "#time" }, "Phase by phase"))];
}


// ---- curves

// Steps of a moving mean.
let smooth = 1;
const drawn = [];

function smoothed(values) {
  if (smooth === 1) return values;
  const half = Math.floor(smooth / 2);
  return values.map((value, place) => value === null ? null :
    mean(values.slice(Math.max(0, place - half), place + half + 1).filter(one => one !== null)));
}

// A line's value at a place, with its band's ends.
function valuesAt({ runs }, [middle, high, low], place, lines) {
  const name = lines > 1 ? `${runs[0]}${runs.length > 1 ? "\u2026" : ""} ` : "", value = short(middle[place]) || "\u2013";
  return name + value + (runs.length > 1 && middle[place] !== null ? ` (${short(low[place])} to ${short(high[place])})` : "");
}

// The range of an axis; a constant is in its middle.
const rangeOf = (_, low, high) => low === high ?
  [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : uPlot.rangeNum(low, high, 0.1, true);

function axes() {
  const stroke = variable("soft"), line = { stroke: variable("line"), width: 1 };
  const both = { stroke, font: "11px system-ui, sans-serif", gap: 3, grid: line, ticks: { ...line, size: 4 } };
  const width = labels => 14 + 6.3 * Math.max(2, ...(labels || []).map(label => label.length));
  return [{ ...both, size: 26, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000, 100000] },
    { ...both, values: (_, ticks) => ticks.map(short), size: (_, labels) => width(labels) }];
}

function chart(stage, groups, title, key) {
  const now = el("div", { class: "key" }, key), place = el("div");
  const box = el("div", { class: "chart" }, title ? el("h3", {}, title) : null, now, place);
  let plot = null;
  const draw = () => {
    if (plot) plot.destroy();
    const steps = stepsOf(stage), columns = [steps], series = [{}], bands = [], shown = [];
    for (const group of groups) {
      const runs = group.runs.map(run => seriesOf(stage, key)[run]).filter(Boolean).map(smoothed);
      if (!runs.length) continue;
      // Where all seeds have a value: a mean of fewer would jump.
      const at = steps.map((_, step) => runs.map(values => values[step])).map(values => values.includes(null) ? [] : values);
      const stroke = variable(colour(group.number)), few = at.filter(values => values.length).length < FEW;
      shown.push([group, columns.length]);
      columns.push(at.map(mean));
      series.push({ label: group.label, stroke, width: 2, spanGaps: true, points: { show: few, size: 5, stroke, fill: stroke } });
      if (runs.length > 1) {
        for (const end of [Math.max, Math.min]) {
          columns.push(at.map(values => values.length ? end(...values) : null));
          series.push({ stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
        }
        bands.push({ series: [columns.length - 2, columns.length - 1], fill: stroke + "30" });
      }
    }
    plot = new uPlot({
      width: Math.max(200, box.clientWidth), height: 190, legend: { show: false }, series, bands,
      scales: { x: { time: false }, y: { range: rangeOf } }, axes: axes(),
      cursor: { sync: { key: stage }, points: { size: 7 }, drag: { x: true, y: false } },
      // What is under the pointer stands in the place of the metric's name.
      hooks: { setCursor: [({ cursor: { idx } }) => {
        const values = () => shown.map(([group, column]) => valuesAt(group, columns.slice(column), idx, shown.length));
        now.textContent = idx === null || idx === undefined ? key : `step ${steps[idx]}: ${values().join(" \u00b7 ")}`;
      }] },
    }, columns, place);
  };
  drawn.push({ box, draw });
  return box;
}

const redraw = () => drawn.filter(({ box }) => box.isConnected).forEach(({ draw }) => draw());

function showCurves() {
  for (const stage of STAGES) {
    const keys = metricsOf(stage), groups = groupsOf(stage);
    const made = section(`curves-${stage}`, `Curves of ${TITLE[stage]}`, TITLE[stage]);
    if (!keys.length) {
      made.append(el("p", {}, "No run has made a step yet."));
      continue;
    }
    const [, before = 0, after = before + 1] = stepsOf(stage), gap = after - before;
    const words = ["Drag to look closer, double-click to go back."];
    if (gap > 1) words.unshift(`Each point is the mean of ${gap} steps.`);
    if (groups.some(group => group.runs.length > 1)) {
      words.unshift("Runs that differ by their seed alone are one line: their mean, in a band from the lowest to the highest.");
    }
    made.append(el("div", { class: "legend" }, groups.map(group =>
      el("span", {}, el("span", { class: "dot", style: `background: var(--${colour(group.number)})` }), group.label))));
    const change = event => {
      smooth = Number(event.target.value);
      document.querySelectorAll(".smooth").forEach(other => { other.value = event.target.value; });
      redraw();
    };
    const options = [1, 5, 15, 45].map(count => el("option", { value: count }, count));
    made.append(note(words.join(" ")), el("label", { class: "controls" }, "Mean over ",
      el("select", { class: "smooth", onchange: change }, options), gap > 1 ? " points" : " steps"));
    const charts = el("div", { class: "charts" }), always = [];
    for (const [title, pattern] of CHARTS[stage]) {
      const matched = keys.filter(key => pattern.test(key));
      always.push(...matched);
      charts.append(...matched.map(key => chart(stage, groups, title, key)));
    }
    const others = keys.filter(key => !always.includes(key));
    if (others.length) {
      const place = el("div", { class: "chart" }), pick = key => place.replaceChildren(chart(stage, groups, "", key));
      const choose = el("select", { onchange: event => {
        pick(event.target.value);
        redraw();
      } }, others.map(key => el("option", { value: key }, key)));
      pick(others[0]);
      charts.append(el("div", { class: "chart" }, el("label", { class: "soft" }, "Any other metric: ", choose), place));
    }
    made.append(charts);
  }
}


// ---- time

// The phases of a step with each run's mean seconds; what is in none of them is "the rest".
function phasesOf(stage) {
  const runs = runsOf(stage), whole = run => meanOf(stage, run, "timing_s/step") || 0;
  const found = metricsOf(stage).filter(key => key.startsWith("timing_s/") && key !== "timing_s/step").map(key => (
    { phase: key.slice(9), means: Object.fromEntries(runs.map(run => [run, meanOf(stage, run, key) || 0])) }
  )).filter(({ means }) => runs.some(run => means[run] >= LEAST_PHASE * whole(run)));
  const parts = found.filter(({ phase }) => !INSIDE[phase]);
  const rest = run => Math.max(0, whole(run) - parts.reduce((sum, { means }) => sum + means[run], 0));
  return parts.length ? [...found, { phase: "the rest", means: Object.fromEntries(runs.map(run => [run, rest(run)])) }] : [];
}

function showTime() {
  const made = section("time", "Where the time goes", "Time");
  for (const stage of STAGES) {
    const runs = runsOf(stage).filter(run => meanOf(stage, run, "timing_s/step") !== null), [first, ...others] = runs;
    if (!runs.length) continue;
    // By the largest difference; of one run by what takes longest. A part of a phase stands below it.
    const apart = means => Math.max(...others.map(run => Math.abs(means[run] - means[first])));
    const size = ({ means }) => others.length ? apart(means) : means[first];
    const sorted = phasesOf(stage).sort((a, b) => size(b) - size(a));
    const partsOf = whole => sorted.filter(({ phase }) => INSIDE[phase] === whole.phase);
    const phases = sorted.filter(({ phase }) => !INSIDE[phase]).flatMap(whole => [whole, ...partsOf(whole)]);
    const totals = Object.fromEntries(runs.map(run => [run, meanOf(stage, run, "timing_s/step")]));
    const most = Math.max(...Object.values(totals)), digits = digitsFor(Math.min(...Object.values(totals)));
    const cells = means => runs.flatMap(run => {
      const bar = el("div", { class: "bar", style: `width: ${(100 * means[run] / most).toFixed(1)}%` });
      const own = { n: [means[run].toFixed(digits), bar] };
      return run === first ? [own] : [own, { n: difference(means[run] - means[first], digits, totals[first]) }];
    });
    made.append(el("h3", {}, `${TITLE[stage]}, seconds per step`), table(
      ["", ...runs.flatMap(run => run === first ? [{ n: run }] : [{ n: run }, { n: "difference" }])],
      [["a whole step", ...cells(totals)], ...phases.map(({ phase, means }) => [phase, ...cells(means)])], false,
      ["sum", ...phases.map(({ phase }) => INSIDE[phase] ? "part" : null)]));
    const work = WORK.filter(([, key]) => runs.some(run => meanOf(stage, run, key) !== null));
    const values = key => runs.map(run => ({ n: short(meanOf(stage, run, key)) || "\u2013" }));
    const head = ["", ...runs.map(run => ({ n: run }))];
    if (work.length) made.append(table(head, work.map(([name, key]) => [name, ...values(key)])));
  }
  made.append(note("Means over the steps but the first. ",
    data.runs.length > 1 ? "Differences are to the first run, the largest first. " : "",
    "What not every step does, such as saving, is spread over all of them."));
}

function difference(value, digits, of) {
  return el("span", { class: Math.abs(value) < 0.01 * of ? "soft" : value > 0 ? "worse" : "better" }, signed(value, digits));
}


// ---- answers

const pairsOf = scores => {
  const found = PAIRS.filter(([a, b]) => a in scores && b in scores);
  return found.length ? found : Object.keys(scores).map(model => [model, model]);
};
const kindOf = (before, after) => after > before ? "up" : after < before ? "down" : after > 0 ? "right" : "wrong";

function showAnswers() {
  const made = section("answers", "Which answers changed", "Answers"), runs = Object.keys(data.scores);
  if (!runs.length) {
    made.append(el("p", {}, "No run has an evaluation yet: make eval."));
    return;
  }
  const binary = runs.flatMap(run => Object.values(data.scores[run])).flat().every(score => [null, 0, 1].includes(score));
  const list = el("div", { id: "list" }, note("A number shows its problems.")), rows = [], classes = [];
  const wordOf = ([, right, higher]) => binary ? right : higher;
  let on = null;
  // A number that shows its problems.
  const number = (run, a, b, kind, places) => {
    const named = `${run} ${a} ${b} ${kind[0]}`;
    const button = el("button", { disabled: places.length ? null : "", "data-pair": named, onclick: () => {
      if (on) on.classList.remove("on");
      on = button;
      button.classList.add("on");
      showList(list, run, a, b, wordOf(kind), places);
    } }, places.length);
    return { n: button };
  };
  for (const run of runs) {
    if (runs.length > 1) {
      rows.push([el("b", {}, run)]);
      classes.push("head");
    }
    for (const [a, b] of pairsOf(data.scores[run])) {
      const before = data.scores[run][a], after = data.scores[run][b];
      const placesOf = kind => [...before.keys()].filter(place =>
        before[place] !== null && after[place] !== null && kindOf(before[place], after[place]) === kind);
      rows.push([titleOf(a, b), ...KINDS.map(kind => number(run, a, b, kind, placesOf(kind[0])))]);
      classes.push(null);
    }
  }
  made.append(
    note(binary ? "\u201cRight\u201d is what the scorer says." : "Not all scores are 0 or 1: told is which rose and which fell."),
    el("div", { class: "beside" }, table(["", ...KINDS.map(kind => ({ n: wordOf(kind) }))], rows, false, classes), list));
}

const titleOf = (a, b) => a === b ? TITLE[a] || a : `${TITLE[a]} \u2192 ${TITLE[b]}`;

function showList(list, run, a, b, words, places) {
  const listed = places.filter(place => place < data.problems.length), items = el("div");
  const all = data.scores[run][a].filter(score => score !== null).length, lacking = places.length - listed.length;
  const more = () => {
    const from = items.childElementCount;
    items.append(...listed.slice(from, from + RENDER).map(place => problem(run, a, b, place)));
    if (items.childElementCount < listed.length) button.textContent = `Show more (${listed.length - items.childElementCount})`;
    else button.remove();
  };
  const button = el("button", { onclick: more });
  list.replaceChildren(el("h3", {}, `${run}, ${titleOf(a, b)}: ${words}, ${places.length} of ${all}`), items, button);
  if (lacking) items.before(note(`${lacking} of them are counted only: this page has no room for their texts.`));
  more();
  // Where it is not beside the numbers.
  if (list.getBoundingClientRect().top > innerHeight / 2) list.scrollIntoView();
}

function problem(run, a, b, place) {
  const [, index, prompt, truth, answers] = data.problems[place], models = a === b ? [a] : [a, b];
  // A scorer of one's own gives a score alone.
  const given = "extracted" in answers[run][models[0]];
  const said = model => given ? answers[run][model].extracted ?? "nothing" : `score ${short(data.scores[run][model][place])}`;
  const answer = model => {
    const its = answers[run][model], score = data.scores[run][model][place];
    const took = given ? `scorer took: ${said(model)} \u00b7 last number: ${its.last_number ?? "none"} \u00b7 ` : "";
    const verdict = judged(score, `${score > 0 ? "\u2713 right" : "\u2717 wrong"} (score ${short(score)})`);
    return el("div", {}, el("h3", {}, `${TITLE[model] || model} `, verdict),
      el("div", { class: "soft" }, took, `${its.response_tokens} tokens${its.cut_off ? ", cut off at the limit" : ""}`),
      el("pre", {}, its.response));
  };
  return unfolding([el("span", { class: "tag" }, `#${index}`), `${models.map(said).join(" \u2192 ")}, truth ${truth} `,
    el("span", { class: "soft" }, firstWords(prompt))], () => [
    el("pre", {}, prompt), el("p", {}, "Truth: ", el("b", {}, truth)), el("div", { class: "pair" }, models.map(answer))]);
}

// A line that unfolds; its content is made when it first does.
function unfolding(summary, content) {
  const made = el("details", { ontoggle: () => {
    if (made.childElementCount === 1) made.append(...content());
  } }, el("summary", {}, summary));
  return made;
}

// The begin of the question, without the words of a chat's format.
function firstWords(prompt) {
  const plain = prompt.replace(/<\|[^|]*\|>(system|user|assistant)?/g, "\n");
  const parts = plain.split("\n").map(part => part.trim()).filter(Boolean);
  const question = parts.find(part => /\?/.test(part)) || parts[parts.length - 1] || "";
  return question.length > 90 ? `${question.slice(0, 90)}\u2026` : question;
}

function showSamples() {
  if (!data.samples.length) return;
  const made = section("samples", "The same problems, step by step", "Samples");
  made.append(note("What PPO's validations wrote down: \u25cf right, \u25cb wrong, from the first validation to the last."));
  for (const run of data.runs) {
    const its = data.samples.filter(([name]) => name === run);
    if (its.length) made.append(el("h3", {}, run));
    for (const [, input, count, kept] of its) {
      const marks = kept.map(([, , score]) => judged(score, score > 0 ? "\u25cf" : "\u25cb"));
      made.append(unfolding([el("span", { class: "marks" }, marks), " ", firstWords(input)], () => [
        el("pre", {}, input),
        ...kept.flatMap(([step, output, score], place) => [
          el("h3", {}, `step ${step} `, judged(score, `score ${short(score)}`)),
          place && output === kept[place - 1][1] ? note("as before") : el("pre", {}, output)]),
        ...(kept.length < count ? [note(`${count - kept.length} of ${count} answers are left out.`)] : [])]));
    }
  }
}


// ---- settings and environment

function showSettings() {
  const made = section("settings", "Settings", "Settings");
  for (const stage of STAGES) {
    const runs = runsOf(stage), all = runs.map(run => settingsOf(stage, run));
    const keys = [...new Set(all.flatMap(Object.keys))].sort();
    const differ = keys.filter(key => new Set(all.map(its => its[key])).size > 1);
    const same = keys.filter(key => !differ.includes(key));
    const rows = (some, from) => some.map(key => [el("code", {}, key), ...from.map(its => its[key] ?? "\u2013")]);
    made.append(el("h3", {}, TITLE[stage]));
    if (differ.length) made.append(table(["Setting", ...runs], rows(differ, all)));
    else if (runs.length > 1) made.append(el("p", {}, "The runs have the same settings."));
    const title = runs.length > 1 ? `The ${same.length} settings that are the same in all` : `All ${same.length} settings`;
    if (same.length) made.append(unfolding(title, () => [table(["Setting", "Value"], rows(same, all.slice(0, 1)))]));
  }
}

function showEnvironment() {
  const made = section("environment", "Environment", "Environment");
  const names = { git_commit: "commit", memory_gib: "memory, GiB", lock_sha256: "requirements.lock" };
  const last = ["command", "environment"];
  const shown = (key, value) => {
    if (value === null || value === undefined) return "\u2013";
    if (key === "command") return el("code", {}, value.join(" "));
    if (key === "environment") return el("code", {}, Object.entries(value).map(([name, its]) => `${name}=${its}\n`));
    return Array.isArray(value) ? counted(value) : text(value);
  };
  for (const stage of ["sft", "ppo", "eval"]) {
    const runs = runsOf(stage).filter(run => Object.keys(data.stages[stage][run].facts).length);
    if (!runs.length) continue;
    const facts = runs.map(run => data.stages[stage][run].facts);
    const keys = [...new Set(facts.flatMap(Object.keys))].sort((a, b) => last.indexOf(a) - last.indexOf(b));
    made.append(unfolding(`${TITLE[stage]}, last attempt`, () => [table(["", ...runs],
      keys.map(key => [names[key] || key.replace(/_/g, " "), ...facts.map(its => shown(key, its[key]))]))]));
  }
}

function counted(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  return [...counts].map(([value, count]) => count > 1 ? `${count} x ${value}` : value).join(", ") || "none";
}

function showLeftOut() {
  const lines = [];
  for (const run of data.runs) {
    for (const stage of ["sft", "ppo", "eval"]) {
      const its = data.stages[stage][run], name = stage === "eval" ? "evaluation" : TITLE[stage];
      if (!its) lines.push(`${run} has no ${name}.`);
      else if (its.status !== "finished") {
        lines.push(`${run}: ${TITLE[stage]} is ${its.status || "without a run.json"}; shown is what it has so far.`);
      }
    }
    for (const [model, { rows }] of Object.entries((data.stages.eval[run] || { models: {} }).models)) {
      const found = ((data.scores[run] || {})[model] || []).filter(score => score !== null).length;
      if (found < rows) lines.push(`${run}: answers.jsonl has ${found} of ${rows} answers of ${model}.`);
    }
  }
  const total = Math.max(0, ...Object.values(data.scores).flatMap(its => Object.values(its).map(scores => scores.length)));
  const lacking = total - data.problems.length, unseen = data.sampled - data.samples.length;
  if (lacking) lines.push(`${lacking} of ${total} problems are counted, but their texts are left out; unchanged ones first.`);
  if (unseen) lines.push(`${unseen} of the ${data.sampled} problems that validations wrote down are left out.`);
  section("left-out", "What is not on this page", "Left out",
    lines.length ? el("ul", {}, lines.map(line => el("li", {}, line))) : el("p", {}, "Nothing of these runs is missing."),
    note("A text that is too long ends in [... cut]."));
}


const many = data.runs.length === 1 ? "One run" : `${data.runs.length} runs`;
document.querySelector("header").append(note(`${many} \u00b7 made ${when(data.made)}`));
addSeconds();
showRuns();
showAnswers();
showTime();
showCurves();
showSamples();
showSettings();
showEnvironment();
showLeftOut();
redraw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
// A phone says so, too, when its address bar comes and goes.
let resized = 0, width = innerWidth;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => {
    if (width !== innerWidth) redraw();
    width = innerWidth;
  }, 150);
});
