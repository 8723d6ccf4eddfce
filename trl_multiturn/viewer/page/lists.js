// The three lists: trajectories, pairs, prompts. Each says its columns and what opening a row shows.

const WIDE = ["policy", "answer", "turns", "stop", "fate", "tokens", "time", "seed", "reference", "side", "trained"];

function trajectoryColumns(data, actions) {
  const text = (name, title, read, sort = read) => ({ name, title, wide: WIDE.includes(name), cell: (i) => read(i) ?? "–", sort });
  const number = (name, title, read, show = short) => ({ name, title, wide: WIDE.includes(name), numeric: true, cell: (i) => show(read(i)), sort: read });
  return [
    { name: "place", title: "place", cell: (i) => h("a", { href: actions.trajectoryLink(i), tabindex: "-1" }, place(data, i)),
      sort: (i) => (data.get("prompt_index", i) ?? i) * 1e6 + (data.get("sample", i) ?? 0) },
    text("iteration", "iter.", (i) => iterationName(data, i), (i) => data.get("iteration", i)),
    text("policy", "policy", (i) => data.get("policy", i)),
    { name: "prompt", title: "prompt", cell: (i) => plain(data.promptText(i)), sort: (i) => data.promptText(i) },
    { name: "verdict", title: "verdict", cell: (i) => verdictBadge(data.get("verdict", i)), sort: (i) => data.get("verdict", i) },
    number("reward", "reward", (i) => data.get("reward", i)),
    text("answer", "answer", (i) => { const answer = data.get("answer", i); return answer === null ? "–" : plain(answer); }, (i) => data.get("answer", i)),
    number("turns", "turns", (i) => data.get("turns", i)),
    { name: "calls", title: "calls", cell: (i) => statusMarks(data.statuses(i)), sort: (i) => FIELDS.errors(data, i) * 1000 + data.statuses(i).length },
    text("stop", "stopped", (i) => data.get("stop_reason", i) || "–", (i) => data.get("stop_reason", i)),
    { name: "fate", title: "fate", wide: true, sort: (i) => data.get("fate", i),
      cell: (i) => h("span", { title: plain(own(data.reasons, data.get("fate", i)) ?? "") }, plain(data.get("fate", i)) || "–") },
    number("tokens", "tokens", (i) => data.get("sampled", i)),
    number("time", "time", (i) => data.get("seconds", i), seconds),
    text("seed", "seed", (i) => data.get("seed", i)),
  ];
}

const trajectoryList = {
  label: "Trajectories",
  filter: true,
  columns: trajectoryColumns,
  numbers: (data, query) => matching(data, query),
  idOf: (data, i) => data.get("id", i),
  numberOf: (data, id) => data.numbers.get(id) ?? null,
  view: (data, i, view, actions) => trajectoryView(data, i, view, actions),
};

const pairList = {
  label: "Pairs",
  columns: (data, actions) => {
    const { chosen, rejected } = data.pairs;
    const reward = (side) => (pair) => data.get("reward", side[pair]);
    const turns = (side) => (pair) => data.get("turns", side[pair]);
    const number = (name, key, title, read, show = short) => ({ name, key, title, wide: true, numeric: true, cell: (pair) => show(read(pair)), sort: read });
    return [
      { name: "place", title: "pair", cell: (pair) => h("a", { href: actions.pairLink(pair), tabindex: "-1" }, String(pair + 1)), sort: (pair) => pair },
      { name: "iteration", title: "iter.", cell: (pair) => String(data.pairs.iteration[pair] ?? "–"), sort: (pair) => data.pairs.iteration[pair] },
      { name: "prompt", title: "prompt", cell: (pair) => plain(data.promptText(chosen[pair])), sort: (pair) => data.promptText(chosen[pair]) },
      { name: "side", key: "chosen", title: "chosen", wide: true, cell: (pair) => place(data, chosen[pair]) },
      { name: "side", key: "rejected", title: "rejected", wide: true, cell: (pair) => place(data, rejected[pair]) },
      number("reward", "chosen_reward", "reward +", reward(chosen)),
      number("reward", "rejected_reward", "reward −", reward(rejected)),
      number("turns", "chosen_turns", "turns +", turns(chosen)),
      number("turns", "rejected_turns", "turns −", turns(rejected)),
      number("reference", "chosen_reference", "Σ ref +", (pair) => data.pairs.ref_chosen_logps[pair], signed),
      number("reference", "rejected_reference", "Σ ref −", (pair) => data.pairs.ref_rejected_logps[pair], signed),
      { name: "trained", title: "trained", wide: true, cell: (pair) => (data.pairs.trained[pair] ? "yes" : "no"), sort: (pair) => (data.pairs.trained[pair] ? 0 : 1) },
    ];
  },
  numbers: async (data) => data.pairs.chosen.map((_, pair) => pair),
  idOf: (data, pair) => `${data.get("id", data.pairs.chosen[pair])} ${data.get("id", data.pairs.rejected[pair])}`,
  numberOf: (data, id) => {
    const found = data.pairs.chosen.findIndex((_, pair) => pairList.idOf(data, pair) === id);
    return found < 0 ? null : found;
  },
  view: (data, number, view, actions) => {
    const pair = pairAt(data, number);
    return pairView(data, pair.chosen, pair.rejected, { ...view, pair, title: `Pair ${number + 1}` }, actions);
  },
};

const promptList = {
  label: "Prompts",
  columns: (data, actions) => {
    const at = stages(data).map((stage) => ({ ...stage, numbers: new Map() }));
    const byKey = new Map(at.map((stage) => [stage.key, stage]));
    for (let i = 0; i < data.count; i++) {
      const { numbers } = byKey.get(stageOf(data, i));
      const prompt = data.columns.prompt[i];
      numbers.set(prompt, [...(numbers.get(prompt) || []), i]);
    }
    const share = ({ correct, decided }) => (decided ? correct / decided : null);
    return [
      { name: "place", title: "prompt", cell: (prompt) => h("a", { href: actions.promptLink(prompt), tabindex: "-1" }, String(data.get("prompt_index", data.byPrompt[prompt][0]) ?? prompt)), sort: (prompt) => prompt },
      { name: "prompt", title: "text", cell: (prompt) => plain(data.prompts[prompt]), sort: (prompt) => data.prompts[prompt] },
      { name: "turns", title: "all", numeric: true, cell: (prompt) => short(data.byPrompt[prompt].length), sort: (prompt) => data.byPrompt[prompt].length },
      ...at.map((stage) => ({ name: "stage", wide: true, key: stage.key, title: stage.title, numeric: true, cell: (prompt) => tallyCell(tally(data, stage.numbers.get(prompt) || [])), sort: (prompt) => share(tally(data, stage.numbers.get(prompt) || [])) })),
    ];
  },
  // Those that are in most iterations come first: they can be compared
  numbers: async (data) => {
    const seen = data.byPrompt.map((numbers) => new Set(numbers.map((i) => stageOf(data, i))).size);
    return seen.map((_, prompt) => prompt).sort((a, b) => seen[b] - seen[a] || a - b);
  },
  idOf: (data, prompt) => data.get("id", data.byPrompt[prompt][0]),
  numberOf: (data, id) => (data.numbers.has(id) ? data.columns.prompt[data.numbers.get(id)] : null),
  view: (data, prompt, view, actions) => promptView(data, prompt, actions),
};

const LISTS = { trajectories: trajectoryList, pairs: pairList, prompts: promptList };

// The filter line of the trajectories
function filterLine(data, query, onquery) {
  const input = h("input", { type: "search", id: "query", value: query, spellcheck: "false", autocomplete: "off",
    placeholder: "Words, or reward>0.5 verdict:incorrect turns>=3 …", "aria-label": "Search and filter", title: `Fields: ${Object.keys(FIELDS).join(", ")}` });
  let waiting = null;
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => onquery(input.value.trim()), 200);
  });
  const selects = FACETS.map((field) => {
    const values = facetValues(data, field);
    if (values.length < 2) return null;
    const select = h("select", { "aria-label": field, "data-field": field, onchange: () => {
      input.value = withField(input.value, field, select.value || null);
      onquery(input.value);
    } }, h("option", { value: "" }, field), values.map(([value, count]) => h("option", { value }, `${plain(String(value))} (${short(count)})`)));
    return select;
  }).filter(Boolean);
  const count = h("output", { for: "query", id: "count" });
  const reflect = (text) => selects.forEach((select) => {
    select.value = fieldValue(text, select.dataset.field) ?? "";
    select.classList.toggle("set", select.value !== "");
  });
  reflect(query);
  return { element: h("form", { class: "filter", role: "search", onsubmit: (event) => event.preventDefault() }, input, selects, count), input, count, reflect };
}
