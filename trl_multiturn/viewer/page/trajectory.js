// One trajectory: what it is, its turns, its messages or its tokens.

// Heading, facts, strip of turns; then messages or tokens as `view` says
async function trajectoryView(data, i, view, actions) {
  const [text, tokens, vocabulary] = await Promise.all([data.text(i), data.tokens(i), data.vocabulary]);
  const body = view.tokens && tokens.ids.length
    ? tokenView(tokens, vocabulary, { layer: view.layer })
    : h("div", { class: "messages" }, messageViews(text));
  return h("article", { class: "trajectory", "aria-label": `Trajectory ${place(data, i)}` },
    heading(data, i, actions),
    trajectoryFacts(data, i, text),
    turnStrip(data, i, text, tokens),
    viewSwitch(data, view, tokens.ids.length > 0, actions),
    body);
}

function heading(data, i, actions) {
  const others = data.byPrompt[data.columns.prompt[i]];
  const reward = data.get("reward", i);
  return h("header", { class: "heading" },
    h("h2", {}, `Prompt ${place(data, i)}`),
    verdictBadge(data.get("verdict", i)),
    reward === null ? null : h("span", {}, `reward ${short(reward)}`),
    h("span", { class: "quiet" }, `iteration ${iterationName(data, i)}, ${data.get("policy", i) || "–"}`),
    h("span", { class: "spring" }),
    others.length > 1 ? h("a", { href: actions.promptLink(data.columns.prompt[i]) }, `same prompt (${others.length})`) : null,
    (data.pairsOf.get(i) || []).map((pair) => h("a", { href: actions.pairLink(pair) }, `pair ${pair + 1}`)),
    actions.close ? h("button", { type: "button", onclick: actions.close, title: "Close (Esc)" }, "✕", h("span", { class: "hidden" }, " Close")) : null);
}

function trajectoryFacts(data, i, text) {
  const info = { ...data.provenance[data.columns.provenance[i]], ...text.info };
  const tokens = data.get("tokens", i);
  const timed = data.get("seconds", i) !== null;
  const known = new Set(["rewards", "tool_statuses", "tool_turns", "malformed_calls"]);
  return [
    facts([
      ["fate", fateText(data, data.get("fate", i))],
      ["stopped", data.get("stop_reason", i)],
      ["answer", data.get("answer", i)],
      ["tokens", tokens ? `${data.get("prompt_tokens", i)} prompt, ${data.get("sampled", i)} sampled, ${tokens - data.get("sampled", i)} read` : null],
      ["time", timed ? `${seconds(data.get("seconds", i))}, tools ${seconds(data.get("tool_seconds", i))}` : null],
      ["seed", data.get("seed", i)],
      ...Object.entries(text.info.rewards || {}).map(([name, value]) => [name, value === null ? "undecided" : short(value)]),
      ["tool failure", info.tool_failure],
      ["id", data.get("id", i)],
    ]),
    h("details", { class: "provenance" }, h("summary", {}, "Provenance"),
      h("pre", {}, visible(JSON.stringify(Object.fromEntries(Object.entries(info).filter(([name]) => !known.has(name))), null, 1)))),
  ];
}

// A fate, and what it means
function fateText(data, fate) {
  const reason = own(data.reasons, fate);
  return reason ? h("span", {}, visible(fate), h("span", { class: "quiet" }, ` (${plain(reason)})`)) : fate;
}

// A row per turn: tokens, sums of its numbers, its tools
function turnStrip(data, i, text, tokens) {
  const ratio = mainRatio(tokens);
  const [logps, ratios, values, rewards] = ["logps", ratio, "values", "rewards"].map((name) => name && layerNumbers(tokens, name));
  const calls = callsByTurn(data.statuses(i), text);
  const count = Math.max(tokens.turns.length / 2, Math.min(calls.length, 1) && calls.length, 0);
  if (!count) return null;
  const rows = [];
  for (let turn = 0; turn < count; turn++) {
    const [start, stop] = [tokens.turns[2 * turn], tokens.turns[2 * turn + 1]];
    const there = stop !== undefined;
    const sum = (numbers) => (numbers && there ? sumOver(numbers, start, stop) : null);
    rows.push({
      turn, tokens: there ? stop - start : null, logp: sum(logps), ratio: sum(ratios), reward: sum(rewards),
      value: values && there ? values[stop - 1] : null, calls: calls[turn] || [], sampling: samplingTime(text, turn, count),
    });
  }
  const label = ratio ? DIFFERENCES.find(([name]) => name === ratio)[1] : "";
  const columns = [
    ["turn", (row) => String(row.turn + 1)],
    ["tokens", (row) => short(row.tokens), (row) => row.tokens],
    ["Σ log π", (row) => signed(row.logp), (row) => row.logp],
    [`Σ ${label}`, (row) => signed(row.ratio), (row) => row.ratio],
    ["value", (row) => signed(row.value), (row) => row.value],
    ["reward", (row) => signed(row.reward), (row) => row.reward],
    ["sampling", (row) => seconds(row.sampling), (row) => row.sampling],
    ["tools", (row) => [statusMarks(row.calls.map((call) => call.status)), row.calls.some((call) => call.seconds !== null) ? ` ${seconds(toolTime(row))}` : ""], toolTime],
  ].filter(([name, , size]) => name === "turn" || name === "tools" || rows.some((row) => size(row) !== null));
  const largest = columns.map(([, , size]) => size && Math.max(...rows.map((row) => Math.abs(size(row) || 0)), 1e-9));
  return h("table", { class: "strip", "aria-label": "Turns" },
    h("thead", {}, h("tr", {}, columns.map(([name]) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, columns.map(([name, cell, size], c) => (name === "turn"
      ? h("th", { scope: "row" }, cell(row))
      : h("td", {}, h("span", {}, cell(row)), bar(size(row), largest[c]))))))));
}

function bar(value, largest) {
  const filled = h("i", { class: `bar${value < 0 ? " below" : ""}`, "aria-hidden": "true" });
  filled.style.width = `${value === null ? 0 : Math.round((Math.abs(value) / largest) * 100)}%`;
  return filled;
}

function toolTime(row) {
  const known = row.calls.map((call) => call.seconds).filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) : null;
}

function samplingTime(text, turn, count) {
  const times = text.timing?.sampling_seconds || [];
  return times[turn - (count - times.length)] ?? null; // of the last turns: earlier ones may have been replayed
}

// [[{status, seconds}]] by turn
function callsByTurn(statuses, text) {
  const turns = text.info.tool_turns || [];
  const times = text.timing?.call_seconds || [];
  const byTurn = [];
  statuses.forEach((status, call) => {
    const turn = turns[call] ?? call;
    while (byTurn.length <= turn) byTurn.push([]);
    byTurn[turn].push({ status, seconds: times[call] ?? null });
  });
  return byTurn;
}

function viewSwitch(data, view, hasTokens, actions) {
  const button = (pressed, title, onclick, disabled) => h("button", { type: "button", "aria-pressed": String(pressed), onclick, disabled }, title);
  return h("div", { class: "switch", role: "group", "aria-label": "How to show it" },
    button(!view.tokens || !hasTokens, "Messages", () => actions.show({ tokens: false })),
    button(view.tokens && hasTokens, "Tokens", () => actions.show({ tokens: true }), !hasTokens),
    hasTokens && view.tokens ? layerSelect(data, view, actions) : null);
}

function layerSelect(data, view, actions) {
  const options = layersOf(data).map(({ name, label, missing }) => h("option", { value: name, selected: name === view.layer, disabled: !!missing }, missing ? `${label} (${missing.replaceAll("`", "")})` : label));
  return h("label", {}, "coloured by ", h("select", { onchange: (event) => actions.show({ layer: event.target.value }) }, options));
}

// Messages: the prompt and the completion; in a pair what comes before the first difference is folded
function messageViews(text, different) {
  const statuses = text.info.tool_statuses || [];
  let turn = 0, call = 0;
  const prompt = text.prompt.map((message) => messageView(message, message.role, {}));
  const completion = text.completion.map((message, k) => {
    if (message.role === "assistant") return messageView(message, `assistant ${++turn}`, k === different?.message ? different : {});
    const outputs = messageParts(message).filter((part) => part.kind === "output").length;
    const answered = statuses.slice(call, (call += outputs));
    return messageView(message, message.role, { ...(k === different?.message ? different : {}), statuses: answered });
  });
  if (!different) return [...prompt, ...completion];
  const shared = [...prompt, ...completion.slice(0, different.message)];
  return [fold(`shared, ${shared.length} message${shared.length === 1 ? "" : "s"}`, shared.length, () => shared, false), ...completion.slice(different.message)];
}

function messageView(message, who, { statuses = [], part: differing, at, tail }) {
  const role = ["system", "user", "assistant", "tool"].includes(message.role) ? message.role : "other";
  let output = 0;
  const parts = messageParts(message).map((part, k) =>
    partView(part, part.kind === "output" ? statuses[output++] : undefined, k === differing ? [at, part.text.length - tail] : k > differing ? [0, part.text.length] : undefined));
  return h("section", { class: `message ${role}`, "aria-label": plain(who) },
    h("div", { class: "who" }, visible(who)),
    h("div", { class: "said" }, parts.length ? parts : h("p", { class: "quiet" }, "nothing")));
}

// A part; where two trajectories differ from one character to another, what is between is marked
function partView({ kind, label, text, source }, status, differing) {
  if (kind === "image") return source.startsWith("data:") ? h("img", { class: "seen", src: source, alt: "image" }) : h("p", { class: "quiet" }, "[image]");
  const failed = status !== undefined && status !== "ok";
  const [start, stop] = differing || [];
  const content = differing ? [visible(text.slice(0, start)), h("mark", {}, visible(text.slice(start, stop))), visible(text.slice(stop))] : visible(text);
  if (kind === "text" || kind === "thought") return h("p", { class: kind }, content);
  const title = kind === "output" ? [label && label !== "output" ? label : "output", status && status !== "ok" ? `, ${status}` : ""].join("") : label || "code";
  return h("figure", { class: `${kind}${failed ? " failed" : ""}` }, h("figcaption", {}, visible(title)), h("pre", {}, content));
}
