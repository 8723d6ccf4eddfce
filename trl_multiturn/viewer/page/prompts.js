// The same prompt across iterations and policies

// [{key, title, split, iteration}] in the order of training
function stages(data) {
  const found = new Map();
  for (let i = 0; i < data.count; i++) {
    const [split, iteration] = [data.get("split", i), data.get("iteration", i)];
    const key = `${split} ${iteration}`;
    if (!found.has(key)) found.set(key, { key, title: iterationName(data, i), split, iteration: iteration ?? 0 });
  }
  return [...found.values()].sort((a, b) => a.split.localeCompare(b.split) || a.iteration - b.iteration);
}

function stageOf(data, i) {
  return `${data.get("split", i)} ${data.get("iteration", i)}`;
}

// Correct and decided trajectories of some
function tally(data, numbers) {
  const verdicts = numbers.map((i) => data.get("verdict", i));
  const correct = verdicts.filter((verdict) => verdict === "correct").length;
  return { correct, decided: correct + verdicts.filter((verdict) => verdict === "incorrect").length, all: numbers.length };
}

function tallyCell({ correct, decided, all }) {
  if (!all) return "";
  const share = decided ? correct / decided : null;
  return h("span", { class: `tally ${share === null ? "" : `q${Math.round(share * 4)}`}` }, decided ? `${correct}/${decided}` : "?");
}

// A prompt: its trajectories as squares, a line per stage and policy
async function promptView(data, prompt, actions) {
  const numbers = data.byPrompt[prompt];
  const text = await data.text(numbers[0]);
  const lines = stages(data).flatMap((stage) => {
    const here = numbers.filter((i) => stageOf(data, i) === stage.key);
    return [...new Set(here.map((i) => data.get("policy", i)))].map((policy) => ({
      title: stage.title, policy, numbers: here.filter((i) => data.get("policy", i) === policy) }));
  });
  return h("article", { class: "prompt", "aria-label": "Prompt" },
    h("header", { class: "heading" }, h("h2", {}, `Prompt ${data.get("prompt_index", numbers[0]) ?? prompt}`),
      h("span", { class: "quiet" }, `${numbers.length} trajectories`), h("span", { class: "spring" }),
      h("button", { type: "button", onclick: actions.close, title: "Close (Esc)" }, "✕", h("span", { class: "hidden" }, " Close"))),
    h("div", { class: "messages" }, text.prompt.map((message) => messageView(message, message.role, {}))),
    h("table", { class: "squares", "aria-label": "Its trajectories" },
      h("thead", {}, h("tr", {}, ["iteration", "policy", "correct", "answers"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, lines.map((line) => h("tr", {}, h("th", { scope: "row" }, line.title), h("td", {}, line.policy), h("td", {}, tallyCell(tally(data, line.numbers))),
        h("td", {}, line.numbers.map((i) => square(data, i, actions))))))),
    numbers.length > 1 ? compareForm(data, numbers, actions) : null);
}

function square(data, i, actions) {
  const [verdict, answer] = [data.get("verdict", i), data.get("answer", i)];
  return h("a", { class: `square ${verdict}`, href: actions.trajectoryLink(i), title: `${place(data, i)}, ${verdict}, ${data.get("stop_reason", i)}` },
    answer === null || answer === "" ? h("span", { class: "quiet" }, data.get("stop_reason", i) || verdict) : visible(answer.slice(0, 24)));
}

// Any two side by side
function compareForm(data, numbers, actions) {
  const options = (chosen) => numbers.map((i) => h("option", { value: i, selected: i === chosen }, `${iterationName(data, i)} ${data.get("policy", i)} ${place(data, i)}: ${data.get("verdict", i)}`));
  const of = (verdict) => numbers.find((i) => data.get("verdict", i) === verdict);
  const left = h("select", { "aria-label": "left" }, options(of("correct") ?? numbers[0]));
  const right = h("select", { "aria-label": "right" }, options(of("incorrect") ?? numbers[1]));
  const go = () => actions.compare(Number(left.value), Number(right.value));
  return h("p", { class: "compare" }, left, " beside ", right, " ", h("button", { type: "button", onclick: go }, "Compare"));
}
