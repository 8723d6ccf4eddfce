// The token layer: each token of a trajectory, coloured by one of its numbers.

// Layers computed from two recorded ones: [name, label, minuend, subtrahend, instead of which other]
const DIFFERENCES = [
  ["ratio", "log π / π_ref", "policy_logps", "ref_logps"],
  ["sampler_ratio", "log π sampler / π_ref", "logps", "ref_logps"],
  ["moved", "log π --model / sampler", "policy_logps", "logps"],
  ["mismatch", "log π sampler / trainer", "logps", "trainer_logps"],
];

const NOT_RECORDED = {
  logps: "the engine gave no log-probabilities",
  policy_logps: "`--model` computes it",
  ref_logps: "not recorded per token; `--reference` computes it",
  values: "`--value_model` computes it",
  trainer_logps: "recorded where the reference is the policy that sampled, token by token",
  rewards: "nothing was judged",
};

// The layers that a run has: [{name, label, missing}]
function layersOf(data) {
  const recorded = (name) => data.layer(name) !== undefined;
  const labels = { logps: "log π, sampler", ref_logps: "log π_ref", policy_logps: "log π, --model", values: "value", rewards: "reward" };
  const layers = [{ name: "trained", label: "trained or context" }];
  for (const [name, label] of Object.entries(labels)) layers.push({ name, label, missing: recorded(name) ? null : NOT_RECORDED[name] });
  for (const [name, label, a, b] of DIFFERENCES) {
    const missing = [a, b].find((part) => !recorded(part));
    layers.push({ name, label, missing: missing ? NOT_RECORDED[missing] : null });
  }
  return layers;
}

// A layer's number for each completion token of an entry; null where it has none
function layerNumbers(entry, name) {
  if (entry.layers[name]) return entry.layers[name];
  const difference = DIFFERENCES.find(([known]) => known === name);
  const [a, b] = difference ? [entry.layers[difference[2]], entry.layers[difference[3]]] : [];
  if (!a || !b) return null;
  return a.map((value, k) => (value === null || b[k] === null || b[k] === undefined ? null : value - b[k]));
}

function sumOver(numbers, start, stop) {
  let sum = 0;
  for (let k = start; k < stop; k++) {
    if (numbers[k] === null) return null;
    sum += numbers[k];
  }
  return sum;
}

// The layer that says most about what training moves: a ratio where there is one
function mainRatio(entry) {
  return ["ratio", "sampler_ratio", "moved"].find((name) => layerNumbers(entry, name)) || null;
}

// Texts of tokens. A character that several tokens spell stands on the last of them.
function tokenTexts(ids, vocabulary) {
  let bytes = [];
  return ids.map((id) => {
    const text = own(vocabulary, id);
    if (text === undefined) return `⟨${id}⟩`;
    if (typeof text === "string") {
      bytes = [];
      return text;
    }
    bytes = [...bytes, ...text];
    try {
      const spelled = new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes));
      bytes = [];
      return spelled;
    } catch {
      return "‥";
    }
  });
}

// Colour classes: s0…s7 for how unlikely or how large, p1…p7 above and n1…n7 below zero
function shadeOf(name, value, largest) {
  if (value === null || value === undefined) return "";
  if (name === "logps" || name === "ref_logps" || name === "policy_logps") return `s${Math.min(7, Math.round(Math.sqrt(Math.max(0, -value) / 6) * 7))}`;
  const step = Math.min(7, Math.ceil((Math.abs(value) / largest) * 7 - 0.001));
  return step ? `${value > 0 ? "p" : "n"}${step}` : "s0";
}

function largestOf(numbers) {
  const sizes = numbers.filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
  return Math.max(sizes[Math.floor(sizes.length * 0.98)] || 0, 0.01);
}

// More are shown when they are asked for: each is an element
const MOST_TOKENS = 20000;

// options: {layer, from, different, foldPrompt}: tokens before `from` are folded, the one at `different` is marked
function tokenView(entry, vocabulary, options) {
  const numbers = options.layer === "trained" ? null : layerNumbers(entry, options.layer);
  const largest = numbers ? largestOf(numbers) : 1;
  const turnOf = turnNumbers(entry);
  // Where a token sequence begins that does not continue the one before: [token, tokens read again, tokens no longer read]
  const segments = new Map((entry.segments || []).map(([k, again, gone], i) => [k, `segment ${i + 2}: reads ${again} tokens again, ${gone} no longer`]));
  const span = (text, k, id) => {
    const shade = k < 0 || !turnOf[k] ? "" : numbers ? shadeOf(options.layer, numbers[k], largest) : "trained";
    const cut = entry.kept !== undefined && k >= entry.kept ? " cut" : "";
    const mark = k === options.different ? " different" : "";
    const line = /\n/.test(text);
    return h("span", { class: `t ${k >= 0 && turnOf[k] ? shade : "context"}${cut}${mark}`, "data-k": k, "data-id": id },
      segments.has(k) ? h("span", { class: "segment" }, segments.get(k)) : null, visible(text.replaceAll("\n", "↵\n")), line ? null : "");
  };
  const texts = tokenTexts(entry.ids, vocabulary);
  const spans = (start, stop) => () => texts.slice(start, stop).map((text, k) => span(text, start + k, entry.ids[start + k]));
  const prompt = () => tokenTexts(entry.prompt, vocabulary).map((text, k) => span(text, k - entry.prompt.length, entry.prompt[k]));
  const [from, end] = [options.from || 0, Math.max(MOST_TOKENS, (options.different || 0) + 100)];
  const element = h("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Tokens; arrow keys move from one to the next" },
    fold(`prompt, ${entry.prompt.length} tokens`, entry.prompt.length, prompt, !options.foldPrompt && entry.prompt.length <= 300),
    fold(`shared, ${from} tokens`, from, spans(0, from), false),
    spans(from, end)(),
    fold(`the other ${entry.ids.length - end} tokens`, entry.ids.length - end, spans(end), false));
  watchTokens(element, entry, vocabulary, turnOf);
  return h("div", {}, legend(options.layer, numbers, largest, entry), element);
}

// Content that is made when it is opened; nothing where there is none
function fold(title, count, make, open) {
  if (count <= 0) return null;
  const details = h("details", { open }, h("summary", {}, title), open ? make() : null);
  if (!open) details.addEventListener("toggle", () => details.append(...make()), { once: true });
  return details;
}

function turnNumbers(entry) {
  const turnOf = new Array(entry.ids.length).fill(0);
  for (let t = 0; t < entry.turns.length; t += 2) turnOf.fill(t / 2 + 1, entry.turns[t], entry.turns[t + 1]);
  return turnOf;
}

function legend(layer, numbers, largest, entry) {
  const chip = (shade, text) => h("span", { class: `t chip ${shade}` }, text);
  const cut = entry.kept === undefined ? null : chip("cut", "cut by max_length");
  if (layer === "trained") return h("p", { class: "legend" }, chip("trained", "trained"), chip("context", "context"), cut);
  if (!numbers) return h("p", { class: "legend" }, "This trajectory has no such numbers.", cut);
  if (/logps/.test(layer)) return h("p", { class: "legend" }, [0, -0.1, -0.5, -1, -2, -4, -6].map((value) => chip(shadeOf(layer, value, 1), value ? String(value).replace("-", "−") : "0")), " nats", cut);
  const scale = [-1, -0.5, 0.5, 1].map((share) => chip(shadeOf(layer, share * largest, largest), signed(share * largest)));
  return h("p", { class: "legend" }, scale, cut);
}

// Hints by pointer, and by arrow keys
function watchTokens(element, entry, vocabulary, turnOf) {
  let current = null;
  const hintOf = (token) => tokenHint(entry, vocabulary, turnOf, Number(token.dataset.k), Number(token.dataset.id));
  const focusOn = (token) => {
    current?.classList.remove("here");
    current = token;
    current.classList.add("here");
    current.scrollIntoView({ block: "nearest" });
    const hint = hintOf(token);
    showHint(token, hint);
    say(hint.textContent);
  };
  element.addEventListener("mouseover", (event) => {
    const token = event.target.closest(".t");
    if (token) showHint(token, hintOf(token));
    else hideHint();
  });
  element.addEventListener("mouseleave", hideHint);
  element.addEventListener("blur", hideHint);
  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const all = [...element.querySelectorAll(".t")].filter((token) => token.offsetParent);
    const next = all[current ? all.indexOf(current) + step : 0];
    if (next) focusOn(next);
    event.preventDefault();
    event.stopPropagation();
  });
}

function tokenHint(entry, vocabulary, turnOf, k, id) {
  const text = own(vocabulary, id);
  const shown = text === undefined ? "" : typeof text === "string" ? JSON.stringify(plain(text)) : `bytes ${text.map((b) => b.toString(16)).join(" ")}`;
  const kind = k < 0 ? "prompt" : turnOf[k] ? `turn ${turnOf[k]}` : "context";
  const where = k < 0 ? `prompt position ${k + entry.prompt.length}` : `position ${k}`;
  const lines = [[`id ${id}`, shown], [kind, where]];
  if (k >= 0 && turnOf[k]) {
    const known = { logps: "log π sampler", trainer_logps: "log π trainer", policy_logps: "log π model", ref_logps: "log π_ref", values: "value", rewards: "reward" };
    for (const [name, label] of Object.entries(known)) {
      const value = entry.layers[name]?.[k];
      if (value !== null && value !== undefined) lines.push([label, value.toFixed(4)]);
    }
    for (const [name, label] of DIFFERENCES) {
      const value = layerNumbers(entry, name)?.[k];
      if (value !== null && value !== undefined) lines.push([label, signed(value, 4)]);
    }
    const logp = entry.layers.logps?.[k];
    if (logp !== null && logp !== undefined) lines.push(["probability", Math.exp(logp).toPrecision(3)]);
  }
  return h("table", {}, lines.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value))));
}
