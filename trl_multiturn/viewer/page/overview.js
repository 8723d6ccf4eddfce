// The run as a whole: its iterations, its curves, what became of its trajectories.

const percent = (value) => `${(100 * value).toFixed(1)} %`;

function overviewPage(data, actions) {
  return h("div", { class: "overview scroll", tabindex: "0", role: "region", "aria-label": "Overview" },
    data.notes.length ? h("ul", { class: "notes" }, data.notes.map((note) => h("li", {}, visible(note)))) : null,
    iterationTable(data),
    policyTable(data),
    metricTable(data),
    section("Curves of the iterations", iterationCharts(data)),
    section("What became of the trajectories", outcomeTables(data, actions)),
    section("What the trainer logged", logCharts(data)),
    section("Recorded for tokens", recordedList(data)),
    h("p", { class: "quiet" }, `${plain(data.title)}, read ${data.created} by ${data.made_by}.`, selectionText(data)));
}

function section(title, content) {
  const some = content && (!Array.isArray(content) || content.length);
  return some ? h("section", {}, h("h2", {}, title), h("div", { class: "tiles" }, content)) : null;
}

function selectionText(data) {
  const parts = Object.entries(data.selection).map(([name, value]) => `--${name} ${value}`);
  return parts.length ? ` Shown are ${short(data.count)} trajectories, chosen by ${parts.join(" ")}.` : "";
}

function passText(evaluation) {
  if (!evaluation || evaluation["pass@1"] === null) return "–";
  const error = evaluation["pass@1_se"];
  return `${(100 * evaluation["pass@1"]).toFixed(1)}${error === null || error === undefined ? "" : ` ± ${(100 * error).toFixed(1)}`}`;
}

function correctShare(report) {
  const decided = report.correct + report.incorrect;
  return decided ? report.correct / decided : null;
}

function iterationTable(data) {
  if (!data.iterations.length) return null;
  const names = ["iteration", "rollouts", "correct %", "undecided", "rows", "trained rows", "tool calls", "failed", "pass@1 % ± s.e.", "rollout", "train", "eval"];
  const line = (cells) => h("tr", {}, cells.map((cell, k) => (k ? h("td", { class: "number" }, cell) : h("th", { scope: "row" }, cell))));
  const rows = data.iterations.map((r) => line([
    r.ready ? String(r.iteration + 1) : `${r.iteration + 1}, under way`, short(r.trajectories), correctShare(r) === null ? "–" : (100 * correctShare(r)).toFixed(1),
    short(r.undecided), short(r.rows), short(r.trained_rows), short(r.tool_calls), short(r.tool_failures), passText(r.evaluation),
    seconds(r.rollout_seconds), seconds(r.train_seconds), seconds(r.eval_seconds)]));
  const start = data.start ? line(["start", ...new Array(7).fill(""), passText(data.start), "", "", ""]) : null;
  return h("table", { class: "plain" }, h("caption", {}, "Iterations"),
    h("thead", {}, h("tr", {}, names.map((name, k) => h("th", { scope: "col", class: k ? "number" : "" }, name)))), h("tbody", {}, start, rows));
}

// What each policy did, set by set
function policyTable(data) {
  const groups = new Map();
  for (let i = 0; i < data.count; i++) {
    const name = `${iterationName(data, i)} ${data.get("policy", i)}`.trim();
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(i);
  }
  if (groups.size > 60) return null;
  const mean = (numbers, read) => short(numbers.reduce((sum, i) => sum + (read(i) || 0), 0) / numbers.length);
  const names = ["iteration and policy", "trajectories", "correct %", "turns", "sampled tokens", "calls", "errors"];
  const rows = [...groups].map(([name, numbers]) => {
    const { correct, decided } = tally(data, numbers);
    return [name, short(numbers.length), decided ? (100 * correct / decided).toFixed(1) : "–", mean(numbers, (i) => data.get("turns", i)),
      mean(numbers, (i) => data.get("sampled", i)), mean(numbers, (i) => FIELDS.calls(data, i)), mean(numbers, (i) => FIELDS.errors(data, i))];
  });
  return h("table", { class: "plain" }, h("caption", {}, "By policy, means"),
    h("thead", {}, h("tr", {}, names.map((name, k) => h("th", { scope: "col", class: k ? "number" : "" }, name)))),
    h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, k) => (k ? h("td", { class: "number" }, cell) : h("th", { scope: "row" }, visible(cell))))))));
}

function metricTable(data) {
  const names = Object.keys(data.metrics).filter((name) => !name.endsWith("_se"));
  if (!names.length) return null;
  return h("table", { class: "plain" }, h("caption", {}, "Evaluation"), h("tbody", {}, names.map((name) => h("tr", {}, h("th", { scope: "row" }, name),
    h("td", { class: "number" }, `${short(data.metrics[name])}${`${name}_se` in data.metrics ? ` ± ${short(data.metrics[`${name}_se`])}` : ""}`)))));
}

// Means over the trajectories of an iteration, which its report does not have
function meanByIteration(data, read) {
  const sums = new Map();
  for (let i = 0; i < data.count; i++) {
    const value = read(i);
    if (data.get("split", i) !== "rollout" || value === null) continue;
    const [sum, count] = sums.get(data.get("iteration", i)) || [0, 0];
    sums.set(data.get("iteration", i), [sum + value, count + 1]);
  }
  return [...sums].map(([x, [sum, count]]) => ({ x, y: sum / count })).sort((a, b) => a.x - b.x);
}

function iterationCharts(data) {
  const reports = data.iterations.filter((report) => report.trajectories);
  if (!reports.length) return [];
  const over = (read) => reports.map((report) => ({ x: report.iteration + 1, y: read(report) }));
  const evaluations = [{ x: 0, of: data.start }, ...reports.map((report) => ({ x: report.iteration + 1, of: report.evaluation }))];
  const passes = evaluations.filter(({ of }) => of).map(({ x, of }) => ({ x, y: of["pass@1"], error: of["pass@1_se"] }));
  return [
    lineChart({ title: "pass@1, held out", points: passes, format: percent }),
    lineChart({ title: "correct rollouts", points: over(correctShare), format: percent }),
    lineChart({ title: "rows found", points: over((r) => r.rows), from: 0 }),
    lineChart({ title: "sampled tokens, mean", points: meanByIteration(data, (i) => data.get("sampled", i)) }),
    lineChart({ title: "turns, mean", points: meanByIteration(data, (i) => data.get("turns", i)) }),
    lineChart({ title: "tool calls that failed", points: over((r) => (r.tool_calls ? r.tool_failures / r.tool_calls : null)), format: percent }),
    lineChart({ title: "dropped by filters", points: over((r) => Object.values(r.dropped).reduce((a, b) => a + b, 0) / r.trajectories), format: percent }),
  ].filter(Boolean);
}

// Counts that lead to the trajectories behind them
function outcomeTables(data, actions) {
  const titles = { verdict: "verdict", stop: "stopped", fate: "fate", status: "tool status" };
  return Object.entries(titles).map(([field, title]) => {
    const values = facetValues(data, field).sort(([, a], [, b]) => b - a);
    if (values.length < 2 && values[0]?.[0] === "none") return null;
    const most = Math.max(...values.map(([, count]) => count));
    return h("table", { class: "plain counts" }, h("caption", {}, title), h("tbody", {}, values.map(([value, count]) => h("tr", {},
      h("th", { scope: "row" }, h("a", { href: actions.filterLink(field, value), title: plain(own(data.reasons, value) ?? "") }, visible(String(value)))), h("td", { class: "number" }, short(count)), h("td", {}, bar(count, most))))));
  }).filter(Boolean);
}

function logCharts(data) {
  const steps = data.log.step || [];
  const own = /^(epoch|step|rollout\/|eval_|tools\/|data\/|total_flos|train_)/;
  return Object.keys(data.log).filter((name) => !own.test(name)).sort().map((name) => {
    const points = data.log[name].map((y, k) => ({ x: steps[k], y })).filter(({ y }) => y !== null);
    return points.length > 1 ? lineChart({ title: name, points }) : null;
  }).filter(Boolean);
}

function recordedList(data) {
  if (!data.columns.tokens.some((count) => count)) return null;
  return h("ul", { class: "recorded" }, layersOf(data).filter(({ name }) => name !== "trained").map(({ name, label, missing }) => {
    const count = data.layer(name)?.count;
    return h("li", { class: missing ? "quiet" : "" }, `${label}: `, missing || (count === undefined ? "yes" : `${short(count)} trajectories`));
  }));
}
