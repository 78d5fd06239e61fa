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
const RENDER = 50;
// A smaller difference in speed than this is not worth a sentence, and a smaller phase not a line.
const LEAST_SHARE = 0.05, LEAST_PHASE = 0.005;

// The charts that are always shown: title, metric.
const CHARTS = {
  sft: [["Loss", /^train\/loss$/], ["Validation loss", /^val\/loss$/], ["Tokens/s per GPU", /^perf\/throughput$/],
    ["Seconds per step", /^timing_s\/step$/]],
  ppo: [["Reward", /^critic\/score\/mean$/], ["Accuracy in validation", /^val-core\//], ["Answer length, tokens", /^response_length\/mean$/],
    ["KL", /^actor\/(ppo_kl|kl_loss|reward_kl_penalty)$/], ["Entropy", /^actor\/entropy$/], ["Actor's loss", /^actor\/pg_loss$/],
    ["Critic's loss", /^critic\/vf_loss$/], ["Tokens/s per GPU", /^perf\/throughput$/], ["Seconds per step", /^timing_s\/step$/]],
};
// Phases that are a part of another one, and what else tells why a step takes its time.
const INSIDE = { generate_sequences: "gen", reshard: "gen" };
const WORK = [["Answer length, tokens", "response_length/mean"], ["Prompt length, tokens", "prompt_length/mean"],
  ["Tokens of a step", "perf/total_num_tokens"], ["Tokens/s per GPU", "perf/throughput"],
  ["GPU memory reserved, GiB", "perf/max_memory_reserved_gb"]];
const KINDS = [["up", "newly right", "higher score"], ["down", "newly wrong", "lower score"], ["right", "right in both", "same, above 0"],
  ["wrong", "wrong in both", "same, 0 or below"]];
const PAIRS = [["base", "sft"], ["sft", "ppo"], ["base", "ppo"]];


// ---- small helpers

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick" || name === "onchange" || name === "ontoggle") made[name] = value;
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) made.append(child instanceof Node ? child : document.createTextNode(String(child)));
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
    return el(tag, { class: number ? "n" : tag === "td" && place ? "text" : null, "data-name": tag === "td" ? nameOf(head[place]) : null }, number ? content.n : content);
  };
  return el("div", { class: "wide" }, el("table", { class: stack ? "stack" : null },
    el("thead", {}, el("tr", {}, head.map((content, place) => cell("th", content, place)))),
    el("tbody", {}, rows.map((row, number) =>
      el("tr", { class: classes[number] || null }, row.map((content, place) => cell("td", content, place)))))));
}

const nameOf = content => content instanceof Node ? content.textContent : content && content.n !== undefined ? nameOf(content.n) : content;
const mean = values => values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
const signed = (value, digits) => (value > 0 ? "+" : value < 0 ? "\u2212" : "\u00b1") + Math.abs(value).toFixed(digits);
const digitsFor = value => Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : Math.abs(value) >= 1 ? 2 : 3;
const fixed = value => value.toFixed(digitsFor(value));
const short = value => value === null || value === undefined ? "" : value === 0 ? "0" :
  Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6 ? value.toExponential(2) : value.toLocaleString("en", { maximumFractionDigits: digitsFor(value) });
const percent = value => `${(100 * value).toFixed(1)} %`;
const span = seconds => seconds === null ? "" : seconds < 90 ? `${seconds.toFixed(0)} s` : seconds < 5400 ? `${(seconds / 60).toFixed(0)} min` :
  `${(seconds / 3600).toFixed(1)} h`;
const when = stamp => String(stamp).replace("T", " ").replace(/(:\d\d)\+00:00$/, "$1 UTC");
const text = value => typeof value === "string" ? value : JSON.stringify(value);
const colour = number => getComputedStyle(document.documentElement).getPropertyValue(`--c${number % COLOURS}`).trim();


// ---- what the runs are

// Nested settings as {"a.b.c": value}.
function flat(settings, above = "") {
  if (settings === null || typeof settings !== "object" || Array.isArray(settings)) return { [above]: settings };
  return Object.assign({}, ...Object.entries(settings).map(([key, value]) => flat(value, above ? `${above}.${key}` : key)));
}

// What a run's stage was told, as it reads with any WORK_DIR and any name; without names and housekeeping.
function settingsOf(stage, run) {
  const { config, inputs, work_dir: workDir } = data.stages[stage][run], plain = {};
  for (const [key, value] of Object.entries({ ...(config ? flat(config) : {}), ...(inputs ? flat(inputs, "inputs") : {}) })) {
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
  return [...groups.values()].map((runs, number) => ({ runs, number, label: runs.length > 1 ? `${runs.join(", ")} (${runs.length} seeds)` : runs[0] }));
}

const runsOf = stage => data.runs.filter(run => data.stages[stage][run]);
const stepsOf = stage => (data.curves[stage][0] || ["step", []])[1];
const seriesOf = (stage, key) => ((data.curves[stage] || []).find(([name]) => name === key) || [key, {}])[1];
const metricsOf = stage => data.curves[stage].slice(1).map(([key]) => key).filter(key => key !== "time");

// An attempt that has no end lasts to the last step before the next one.
function secondsOf(stage, run) {
  const attempts = data.stages[stage][run].attempts, times = (seriesOf(stage, "time")[run] || []).filter(time => time !== null);
  return attempts.map((attempt, number) => {
    const start = Date.parse(attempt[0]) / 1000, next = attempts[number + 1];
    const before = next ? Date.parse(next[0]) / 1000 : Infinity;
    const end = attempt[1] ? Date.parse(attempt[1]) / 1000 : Math.max(start, ...times.filter(time => time < before));
    return end - start;
  });
}

function gpusOf(stage, run) {
  const settings = stage === "eval" ? {} : settingsOf(stage, run), seen = (data.stages[stage][run].facts.gpus || []).length;
  return seen && (stage === "eval" ? 1 : Number(settings["trainer.n_gpus_per_node"] || seen) * Number(settings["trainer.nnodes"] || 1));
}

// SFT says nothing of time: its seconds are those between its steps, but where an attempt began.
function addSeconds() {
  for (const stage of STAGES) {
    if (seriesOf(stage, "timing_s/step")[runsOf(stage)[0]] || !data.curves[stage].length) continue;
    const steps = stepsOf(stage), found = {};
    for (const [run, times] of Object.entries(seriesOf(stage, "time"))) {
      const starts = data.stages[stage][run].attempts.map(attempt => Date.parse(attempt[0]) / 1000);
      found[run] = times.map((time, place) => {
        const before = times[place - 1];
        return place === 0 || time === null || before === null || starts.some(start => before < start && start <= time) ? null :
          (time - before) / (steps[place] - steps[place - 1]);
      });
    }
    data.curves[stage].push(["timing_s/step", found]);
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
  const judged = data.runs.filter(run => data.stages.eval[run] && Object.keys(data.stages.eval[run].models).length);
  const models = [...new Set(judged.flatMap(run => Object.keys(data.stages.eval[run].models)))];
  const asked = new Set(judged.flatMap(run => Object.values(data.stages.eval[run].models).map(figures => figures.rows)));
  if (judged.length) {
    first.append(el("h3", {}, "Accuracy on the test problems"), table(
      ["Run", ...models.map(model => ({ n: TITLE[model] || model }))],
      judged.map(run => {
        const its = data.stages.eval[run].models;
        return [run, ...models.map(model => ({ n: its[model] ? accuracy(its[model]) : "\u2013" }))];
      }), true), el("p", { class: "soft" }, `${[...asked].join(" or ")} problems; in brackets the 95 % confidence interval.`));
  }
  const rows = [];
  for (const run of data.runs) {
    for (const stage of ["sft", "ppo", "eval"]) {
      const its = data.stages[stage][run];
      if (!its) continue;
      const seconds = secondsOf(stage, run), all = seconds.reduce((sum, one) => sum + one, 0), gpus = gpusOf(stage, run);
      const step = stage === "eval" ? null : meanOf(stage, run, "timing_s/step");
      rows.push([run, TITLE[stage], [its.status === "finished" ? "" : its.status || "no run.json", its.course.replace("->", "\u2192")].filter(Boolean).join(", "), { n: step === null ? "" : fixed(step) },
        { n: seconds.length ? span(all) : "" }, { n: !seconds.length ? "" : gpus ? (all * gpus / 3600).toFixed(2) : "0 (CPU)" },
        { n: seconds.length > 1 ? seconds.length : "" }]);
    }
  }
  second.append(el("h3", {}, "Stages"), table(["Run", "Stage", "What came out", { n: "s per step" }, { n: "time" },
    { n: "GPU-hours" }, ...(rows.some(row => row[6].n) ? [{ n: "attempts" }] : [])], rows.map(row => rows.some(other => other[6].n) ? row : row.slice(0, 6)), true));
  if (data.runs.length > 1) first.append(el("h3", {}, "Speed"), ...verdicts());
}

function accuracy(figures) {
  const value = figures.accuracy, interval = figures.accuracy_interval;
  if (value === undefined) return "\u2013";
  const own = value < 0 || value > 1;
  const shown = own ? short(value) : percent(value);
  return interval && interval[0] !== null ? `${shown} [${interval.map(end => own ? short(end) : (100 * end).toFixed(1)).join(", ")}]` : shown;
}

// Which runs are slower or faster than the first, and by what most, a sentence each.
function verdicts() {
  const found = [], link = el("a", { href: "#time" }, "Phase by phase");
  for (const stage of STAGES) {
    const [first, ...others] = runsOf(stage), base = meanOf(stage, first, "timing_s/step");
    for (const run of others) {
      const own = meanOf(stage, run, "timing_s/step"), share = own / base - 1;
      if (!base || !own || Math.abs(share) < LEAST_SHARE) continue;
      const [largest] = phasesOf(stage).filter(({ phase }) => !INSIDE[phase]).map(({ phase, means }) => [phase, means[run] - means[first]])
        .sort((a, b) => Math.sign(share) * (b[1] - a[1]));
      found.push(el("p", {}, `A step of ${run}\u2019s ${TITLE[stage]} takes ${fixed(own)} s, `, el("b", { class: share > 0 ? "worse" : "better" }, share < 1 ? `${signed(100 * share, 0)} %` : `${(1 + share).toFixed(1)} times`),
        ` ${share < 1 ? "against" : "that of"} ${first}`, largest ? `; the largest difference is ${largest[0]}, ${signed(largest[1], digitsFor(base))} s.` : "."));
    }
  }
  return [...(found.length ? found : [el("p", {}, `No run\u2019s step takes ${100 * LEAST_SHARE} % more or less than the first one\u2019s.`)]), el("p", {}, link)];
}


// ---- curves

let window_ = 1;
const drawn = [];

function smoothed(values) {
  if (window_ === 1) return values;
  const half = Math.floor(window_ / 2);
  return values.map((value, place) => value === null ? null :
    mean(values.slice(Math.max(0, place - half), place + half + 1).filter(one => one !== null)));
}

function chart(stage, groups, title, key) {
  const now = el("div", { class: "key" }, key), place = el("div"), box = el("div", { class: "chart" }, title ? el("h3", {}, title) : null, now, place);
  let plot = null;
  const draw = () => {
    if (plot) plot.destroy();
    const steps = stepsOf(stage), columns = [steps], series = [{}], bands = [], shown = [];
    for (const group of groups) {
      const runs = group.runs.map(run => seriesOf(stage, key)[run]).filter(Boolean).map(smoothed);
      if (!runs.length) continue;
      const at = steps.map((_, step) => runs.map(values => values[step]).filter(value => value !== null && value !== undefined));
      const stroke = colour(group.number), few = at.filter(values => values.length).length < 25;
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
    const style = getComputedStyle(document.documentElement), soft = style.getPropertyValue("--soft").trim(), line = style.getPropertyValue("--line").trim();
    const axis = { stroke: soft, font: "11px system-ui, sans-serif", grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 } };
    plot = new uPlot({
      width: Math.max(200, box.clientWidth), height: 190, legend: { show: false }, series, bands, scales: { x: { time: false }, y: { range: (_, low, high) => low === high ? [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : uPlot.rangeNum(low, high, 0.1, true) } },
      cursor: { sync: { key: stage }, points: { size: 7 }, drag: { x: true, y: false } },
      axes: [{ ...axis, size: 26, gap: 3, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000, 100000] },
        { ...axis, gap: 3, values: (_, ticks) => ticks.map(short), size: (_, labels) => 14 + 6.3 * Math.max(2, ...(labels || []).map(one => one.length)) }],
      hooks: { setCursor: [plotted => {
        const step = plotted.cursor.idx;
        now.textContent = step === null || step === undefined ? key : `step ${steps[step]}: ` +
          shown.map(([group, column]) => (shown.length > 1 ? `${group.runs[0]}${group.runs.length > 1 ? "\u2026" : ""} ` : "") + (short(columns[column][step]) || "\u2013")
            + (group.runs.length > 1 && columns[column + 1][step] !== null ? ` (${short(columns[column + 2][step])} to ${short(columns[column + 1][step])})` : "")).join(" \u00b7 ");
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
    const banded = groups.some(group => group.runs.length > 1), gap = stepsOf(stage).length > 2 ? stepsOf(stage)[2] - stepsOf(stage)[1] : 1;
    made.append(el("div", { class: "legend" }, groups.map(group =>
      el("span", {}, el("span", { class: "dot", style: `background: var(--c${group.number % COLOURS})` }), group.label))));
    made.append(el("p", { class: "soft" }, [banded ? "Runs that differ by their seed alone are one line: their mean, in a band from the lowest to the highest." : "",
      gap > 1 ? `Each point is the mean of ${gap} steps.` : "", "Drag to look closer, double-click to go back."].filter(Boolean).join(" ")));
    made.append(el("div", { class: "controls" }, el("label", {}, "Mean over ", el("select", { onchange: event => {
      window_ = Number(event.target.value);
      document.querySelectorAll(".window").forEach(other => { other.value = event.target.value; });
      redraw();
    }, class: "window" }, [1, 5, 15, 45].map(count => el("option", { value: count }, count))), gap > 1 ? " points" : " steps")));
    const charts = el("div", { class: "charts" }), always = [];
    for (const [title, pattern] of CHARTS[stage]) {
      const matched = keys.filter(key => pattern.test(key));
      always.push(...matched);
      charts.append(...matched.map(key => chart(stage, groups, title, key)));
    }
    const others = keys.filter(key => !always.includes(key));
    if (others.length) {
      const place = el("div", { class: "chart" }), pick = key => place.replaceChildren(chart(stage, groups, "", key));
      const choose = el("select", { onchange: event => { pick(event.target.value); redraw(); }, "aria-label": "another metric" }, others.map(key => el("option", { value: key }, key)));
      pick(others[0]);
      charts.append(el("div", { class: "chart" }, el("label", { class: "soft" }, "Any other metric: ", choose), place));
    }
    made.append(charts);
  }
}


// ---- time

// The phases of a step with each run's mean seconds; what is in none of them is "the rest".
function phasesOf(stage) {
  const runs = runsOf(stage);
  const found = metricsOf(stage).filter(key => key.startsWith("timing_s/") && key !== "timing_s/step").map(key => ({
    phase: key.slice(9), means: Object.fromEntries(runs.map(run => [run, meanOf(stage, run, key) || 0])) }))
    .filter(({ means }) => runs.some(run => means[run] >= LEAST_PHASE * meanOf(stage, run, "timing_s/step")));
  const whole = found.filter(({ phase }) => !INSIDE[phase]);
  if (whole.length) {
    found.push({ phase: "the rest", means: Object.fromEntries(runs.map(run => [run, Math.max(0, (meanOf(stage, run, "timing_s/step") || 0)
      - whole.reduce((sum, { means }) => sum + means[run], 0))])) });
  }
  return found;
}

function showTime() {
  const made = section("time", "Where the time goes", "Time");
  for (const stage of STAGES) {
    const runs = runsOf(stage).filter(run => meanOf(stage, run, "timing_s/step") !== null);
    if (!runs.length) continue;
    const [first, ...others] = runs, apart = ({ means }) => Math.max(0, ...others.map(run => Math.abs(means[run] - means[first])));
    const size = phase => others.length ? apart(phase) : phase.means[first], all = phasesOf(stage).sort((a, b) => size(b) - size(a));
    const phases = all.filter(({ phase }) => !INSIDE[phase]).flatMap(one => [one, ...all.filter(({ phase }) => INSIDE[phase] === one.phase)]);
    const total = { phase: "a whole step", means: Object.fromEntries(runs.map(run => [run, meanOf(stage, run, "timing_s/step")])) };
    const most = Math.max(...runs.map(run => total.means[run])), rows = [], classes = [];
    const digits = digitsFor(Math.min(...runs.map(run => total.means[run])));
    for (const { phase, means } of [total, ...phases]) {
      classes.push(phase === total.phase ? "sum" : INSIDE[phase] ? "part" : null);
      rows.push([phase, ...runs.flatMap(run => [
        { n: [means[run].toFixed(digits), el("div", { class: "bar", style: `width: ${(100 * means[run] / most).toFixed(1)}%` })] },
        ...(run === first ? [] : [{ n: difference(means[run] - means[first], digits, total.means[first]) }])])]);
    }
    made.append(el("h3", {}, `${TITLE[stage]}, seconds per step`), table(
      ["", ...runs.flatMap(run => [{ n: run }, ...(run === first ? [] : [{ n: "difference" }])])], rows, false, classes));
    const work = WORK.filter(([, key]) => runs.some(run => meanOf(stage, run, key) !== null));
    if (work.length) {
      made.append(table(["", ...runs.map(run => ({ n: run }))], work.map(([name, key]) => [name, ...runs.map(run => ({ n: short(meanOf(stage, run, key)) || "\u2013" }))])));
    }
  }
  made.append(el("p", { class: "soft" }, "Means over the steps but the first. ", data.runs.length > 1 ?
    "Differences are to the first run, the largest first. " : "", "What not every step does, such as saving, is spread over all of them."));
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
  const made = section("answers", "Which answers changed", "Answers");
  const runs = Object.keys(data.scores);
  if (!runs.length) {
    made.append(el("p", {}, "No run has an evaluation yet: make eval."));
    return;
  }
  const binary = runs.every(run => Object.values(data.scores[run]).every(scores => scores.every(score => score === null || score === 0 || score === 1)));
  const list = el("div", { id: "list" }, el("p", { class: "soft" }, "A number shows its problems.")), rows = [], classes = [];
  let on = null;
  for (const run of runs) {
    if (runs.length > 1) {
      rows.push([el("b", {}, run)]);
      classes.push("head");
    }
    for (const [a, b] of pairsOf(data.scores[run])) {
      const before = data.scores[run][a], after = data.scores[run][b], places = Object.fromEntries(KINDS.map(([kind]) => [kind, []]));
      before.forEach((score, place) => {
        if (score !== null && after[place] !== null) places[kindOf(score, after[place])].push(place);
      });
      classes.push(null);
      rows.push([a === b ? TITLE[a] || a : `${TITLE[a]} \u2192 ${TITLE[b]}`, ...KINDS.map(([kind, ...words]) => {
        const button = el("button", { disabled: places[kind].length ? null : "", "data-pair": `${run} ${a} ${b} ${kind}`, onclick: () => {
          if (on) on.classList.remove("on");
          on = button;
          button.classList.add("on");
          showList(list, run, a, b, words[binary ? 0 : 1], places[kind]);
        } }, places[kind].length);
        return { n: button };
      })]);
    }
  }
  made.append(el("p", { class: "soft" }, binary ? "\u201cRight\u201d is what the scorer says." : "The scores are not only 0 and 1 here, so it is said which rose and which fell."),
    el("div", { class: "beside" }, table(["", ...KINDS.map(([, ...words]) => ({ n: words[binary ? 0 : 1] }))], rows, false, classes), list));
}

function showList(list, run, a, b, words, places) {
  const listed = places.filter(place => place < data.problems.length), items = el("div");
  const more = () => {
    const from = items.childElementCount;
    items.append(...listed.slice(from, from + RENDER).map(place => problem(run, a, b, place)));
    if (items.childElementCount < listed.length) button.textContent = `Show more (${listed.length - items.childElementCount})`;
    else button.remove();
  };
  const button = el("button", { onclick: more });
  list.replaceChildren(...[el("h3", {}, `${run}, ${TITLE[a] || a}${a === b ? "" : ` \u2192 ${TITLE[b]}`}: ${words}, ${places.length} of ${data.scores[run][a].filter(score => score !== null).length}`),
    listed.length < places.length ? el("p", { class: "soft" }, `${places.length - listed.length} of them are counted only: this page has no room for their texts.`) : null, items, button].filter(Boolean));
  more();
  // Where it is not beside the numbers.
  if (list.getBoundingClientRect().top > innerHeight / 2) list.scrollIntoView();
}

function problem(run, a, b, place) {
  const [, index, prompt, truth, answers] = data.problems[place], models = a === b ? [a] : [a, b];
  const said = model => answers[run][model].extracted ?? "nothing";
  const made = el("details", { ontoggle: () => {
    if (made.childElementCount > 1) return;
    made.append(el("pre", {}, prompt), el("p", {}, "Truth: ", el("b", {}, truth)), el("div", { class: "pair" }, models.map(model => {
      const answer = answers[run][model], score = data.scores[run][model][place];
      return el("div", {}, el("h3", {}, `${TITLE[model] || model} `, el("span", { class: score > 0 ? "better" : "worse" }, score > 0 ? `\u2713 right (score ${short(score)})` : `\u2717 wrong (score ${short(score)})`)),
        el("div", { class: "soft" }, `scorer took: ${said(model)} \u00b7 last number: ${answer.last_number ?? "none"} \u00b7 ${answer.response_tokens} tokens${answer.cut_off ? ", cut off at the limit" : ""}`),
        el("pre", {}, answer.response));
    })));
  } }, el("summary", {}, el("span", { class: "tag" }, `#${index}`), `${models.map(said).join(" \u2192 ")}, truth ${truth} `, el("span", { class: "soft" }, firstWords(prompt))));
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
  made.append(el("p", { class: "soft" }, "What PPO's validations wrote down: \u25cf right, \u25cb wrong, from the first validation to the last."));
  for (const run of data.runs) {
    const its = data.samples.filter(([name]) => name === run);
    if (its.length) made.append(el("h3", {}, run));
    for (const [, input, count, kept] of its) {
      const item = el("details", { ontoggle: () => {
        if (item.childElementCount > 1) return;
        item.append(el("pre", {}, input));
        let last = null;
        for (const [step, output, score] of kept) {
          item.append(el("h3", {}, `step ${step} `, el("span", { class: score > 0 ? "better" : "worse" }, `score ${short(score)}`)),
            output === last ? el("p", { class: "soft" }, "as before") : el("pre", {}, output));
          last = output;
        }
        if (kept.length < count) item.append(el("p", { class: "soft" }, `${count - kept.length} of ${count} answers are left out.`));
      } }, el("summary", {}, el("span", { class: "marks" }, kept.map(([, , score]) => el("span", { class: score > 0 ? "better" : "worse" }, score > 0 ? "\u25cf" : "\u25cb"))), " ", firstWords(input)));
      made.append(item);
    }
  }
}


// ---- settings and environment

function showSettings() {
  const made = section("settings", "Settings", "Settings");
  for (const stage of STAGES) {
    const runs = runsOf(stage), all = runs.map(run => settingsOf(stage, run)), keys = [...new Set(all.flatMap(Object.keys))].sort();
    const differ = keys.filter(key => new Set(all.map(its => its[key])).size > 1), same = keys.filter(key => !differ.includes(key));
    made.append(el("h3", {}, TITLE[stage]));
    if (differ.length) made.append(table(["Setting", ...runs], differ.map(key => [el("code", {}, key), ...all.map(its => its[key] ?? "\u2013")])));
    else if (runs.length > 1) made.append(el("p", {}, "The runs have the same settings."));
    if (same.length) {
      made.append(el("details", {}, el("summary", {}, runs.length > 1 ? `The ${same.length} settings that are the same in all` : `All ${same.length} settings`),
        table(["Setting", "Value"], same.map(key => [el("code", {}, key), all[0][key]]))));
    }
  }
}

function showEnvironment() {
  const made = section("environment", "Environment", "Environment");
  const names = { git_commit: "commit", memory_gib: "memory, GiB", lock_sha256: "requirements.lock" };
  for (const stage of ["sft", "ppo", "eval"]) {
    const runs = runsOf(stage).filter(run => Object.keys(data.stages[stage][run].facts).length);
    if (!runs.length) continue;
    const facts = runs.map(run => data.stages[stage][run].facts), last = ["command", "environment"];
    const keys = [...new Set(facts.flatMap(Object.keys))].sort((a, b) => last.indexOf(a) - last.indexOf(b));
    const shown = value => Array.isArray(value) ? counted(value) : value && typeof value === "object" ? JSON.stringify(value) : value ?? "\u2013";
    made.append(el("details", { open: stage === "ppo" ? "" : null }, el("summary", {}, `${TITLE[stage]}, last attempt`),
      table(["", ...runs], keys.map(key => [names[key] || key.replace(/_/g, " "), ...facts.map(its => key === "command" ? el("code", {}, (its[key] || []).join(" ")) : key === "environment" ? el("code", {}, Object.entries(its[key] || {}).map(([name, value]) => `${name}=${value}\n`)) : shown(its[key]))]))));
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
      const its = data.stages[stage][run];
      if (!its) lines.push(`${run} has no ${stage === "eval" ? "evaluation" : TITLE[stage]}.`);
      else if (its.status !== "finished") lines.push(`${run}: ${TITLE[stage]} is ${its.status || "without a run.json"}; what is shown is what it has so far.`);
    }
  }
  const total = Math.max(0, ...Object.values(data.scores).flatMap(its => Object.values(its).map(scores => scores.length)));
  if (data.problems.length < total) lines.push(`${total - data.problems.length} of ${total} problems are counted, but their texts are left out; unchanged ones first.`);
  section("left-out", "What is not on this page", "Left out", lines.length ? el("ul", {}, lines.map(line => el("li", {}, line))) : el("p", {}, "Nothing of these runs is missing."),
    el("p", { class: "soft" }, `A text that is too long ends in [... cut].`));
}


document.querySelector("header").append(el("p", { class: "soft" }, `${data.runs.length === 1 ? "One run" : `${data.runs.length} runs`} \u00b7 made ${when(data.made)}`));
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
