// Two trajectories of a prompt side by side: what they share is folded, the first difference is marked.

async function pairView(data, left, right, view, actions) {
  const [texts, tokens, vocabulary] = await Promise.all([
    Promise.all([left, right].map((i) => data.text(i))), Promise.all([left, right].map((i) => data.tokens(i))), data.vocabulary]);
  const hasTokens = tokens.every((entry) => entry.ids.length > 0);
  const byTokens = view.tokens && hasTokens;
  const shared = byTokens ? sharedTokens(...tokens) : sharedMessages(...texts);
  const side = (which, i, k) => h("section", { class: "side", "aria-label": which },
    h("header", { class: "heading" }, h("h3", {}, which), verdictBadge(data.get("verdict", i)),
      h("span", { class: "quiet" }, `reward ${short(data.get("reward", i))}, ${data.get("sampled", i)} sampled tokens`),
      h("span", { class: "spring" }), h("a", { href: actions.trajectoryLink(i) }, `open ${place(data, i)}`)),
    sideNumbers(tokens[k], shared, byTokens, which, view.pair),
    turnStrip(data, i, texts[k], tokens[k]),
    byTokens
      ? tokenView(tokens[k], vocabulary, { layer: view.layer, from: shared.from, different: shared.at, foldPrompt: true })
      : h("div", { class: "messages" }, messageViews(texts[k], shared)));
  const sides = view.pair ? ["chosen", "rejected"] : ["left", "right"];
  return h("article", { class: "pair", "aria-label": "Two trajectories side by side" },
    h("header", { class: "heading" },
      h("h2", {}, view.title), h("span", { class: "quiet" }, plain(data.promptText(left))), h("span", { class: "spring" }),
      actions.close ? h("button", { type: "button", onclick: actions.close, title: "Close (Esc)" }, "✕", h("span", { class: "hidden" }, " Close")) : null),
    viewSwitch(data, view, hasTokens, actions),
    h("div", { class: "sides" }, side(sides[0], left, 0), side(sides[1], right, 1)));
}

// Sums over a side: of the policy that sampled, of the reference, and of their ratio where both are known
function sideNumbers(entry, shared, byTokens, which, pair) {
  const reference = pair ? pair[`ref_${which}_logps`] : null;
  const logps = entry.layers.logps ? entry.layers.logps.reduce((sum, value) => sum + (value ?? 0), 0) : null;
  const ratio = mainRatio(entry);
  const ratios = ratio ? layerNumbers(entry, ratio).reduce((sum, value) => sum + (value ?? 0), 0) : null;
  return facts([
    ["Σ log π, sampler", logps === null ? null : signed(logps)],
    ["Σ log π_ref, trainer", reference === null || reference === undefined ? null : signed(reference)],
    [ratio ? `Σ ${DIFFERENCES.find(([name]) => name === ratio)[1]}` : "ratio", ratios === null ? null : signed(ratios)],
    ["margin", pair && pair.margin !== null ? short(pair.margin) : null],
  ]);
}

// How many completion tokens two entries share; whole turns of them are folded
function sharedTokens(a, b) {
  let at = 0;
  while (at < a.ids.length && at < b.ids.length && a.ids[at] === b.ids[at]) at++;
  let from = 0;
  for (let t = 0; t < a.turns.length; t += 2) if (a.turns[t] <= at) from = a.turns[t];
  return { at, from };
}

// The first message and part of it in which two completions differ: from character `at` to `tail` before the end
function sharedMessages(a, b) {
  const said = (message) => JSON.stringify([message.role, messageParts(message)]);
  const same = (k) => said(a.completion[k]) === said(b.completion[k]);
  let message = 0;
  while (message < a.completion.length && message < b.completion.length && same(message)) message++;
  const [left, right] = [a, b].map((text) => (text.completion[message] ? messageParts(text.completion[message]) : []));
  let part = 0;
  while (part < left.length && part < right.length && left[part].text === right[part].text && left[part].kind === right[part].kind) part++;
  const [one, other] = [left[part]?.text ?? "", right[part]?.text ?? ""];
  let at = 0;
  while (at < one.length && at < other.length && one[at] === other[at]) at++;
  let tail = 0;
  while (tail < one.length - at && tail < other.length - at && one.at(-1 - tail) === other.at(-1 - tail)) tail++;
  return { message, part, at, tail };
}

function pairAt(data, number) {
  return Object.fromEntries(Object.entries(data.pairs).map(([name, values]) => [name, values[number]]));
}
