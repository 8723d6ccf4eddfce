// Small things that stand in tables and headings

function verdictBadge(verdict) {
  return h("span", { class: `verdict ${verdict}` }, verdict);
}

const STATUS_MARKS = { ok: "●", error: "✖", timeout: "◷", memory: "▣", crashed: "↯" };

function statusMarks(statuses) {
  if (!statuses.length) return h("span", { class: "quiet" }, "–");
  const counts = statuses.map((status) => h("span", { class: `status ${status}`, "aria-hidden": "true" }, own(STATUS_MARKS, status) ?? "?"));
  return h("span", { title: statuses.join(", ") }, counts, h("span", { class: "hidden" }, statuses.join(", ")));
}

function place(data, i) {
  const [prompt, sample] = [data.get("prompt_index", i), data.get("sample", i)];
  if (prompt === null) return data.get("id", i);
  return sample === null ? String(prompt) : `${prompt}·${sample}`;
}

function iterationName(data, i) {
  const iteration = data.get("iteration", i);
  if (iteration === null) return "–";
  if (data.get("split", i) !== "evaluation") return String(iteration);
  return iteration ? `eval ${iteration}` : "eval start";
}

function facts(entries) {
  const known = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h("dl", { class: "facts" }, known.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "string" ? visible(value) : value))));
}
