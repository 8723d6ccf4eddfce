// The filter: `verdict:incorrect reward>0.5 fate:"dropped: duplicate" some words`. All of it must hold.

// What can be filtered by, and how a trajectory's value is found
const FIELDS = {
  set: (data, i) => data.get("split", i),
  iteration: (data, i) => data.get("iteration", i),
  policy: (data, i) => data.get("policy", i),
  verdict: (data, i) => data.get("verdict", i),
  stop: (data, i) => data.get("stop_reason", i),
  fate: (data, i) => data.get("fate", i),
  status: (data, i) => data.statuses(i),
  prompt: (data, i) => data.get("prompt_index", i),
  sample: (data, i) => data.get("sample", i),
  reward: (data, i) => data.get("reward", i),
  answer: (data, i) => data.get("answer", i),
  turns: (data, i) => data.get("turns", i),
  calls: (data, i) => data.statuses(i).length,
  errors: (data, i) => data.statuses(i).filter((status) => status !== "ok").length,
  malformed: (data, i) => data.get("malformed", i),
  tokens: (data, i) => data.get("tokens", i),
  sampled: (data, i) => data.get("sampled", i),
  seconds: (data, i) => data.get("seconds", i),
  tool_seconds: (data, i) => data.get("tool_seconds", i),
  seed: (data, i) => data.get("seed", i),
};
// Those with few values, which a list offers
const FACETS = ["set", "iteration", "policy", "verdict", "stop", "fate", "status"];

// [{field, operator, value}], where a field of null is a word to search for
function parseQuery(text) {
  const terms = [];
  const pattern = /(?:([a-z_]+)(>=|<=|>|<|:|=))?("([^"]*)"?|\S+)/gi;
  for (const [whole, name, operator, raw, quoted] of text.matchAll(pattern)) {
    const field = name && name.toLowerCase();
    const value = quoted ?? raw;
    if (field && Object.hasOwn(FIELDS, field)) terms.push({ field, operator: operator === "=" ? ":" : operator, value });
    else terms.push({ field: null, value: (name ? whole : value).toLowerCase() });
  }
  return terms;
}

function formatTerm({ field, operator, value }) {
  const quoted = /[\s"]/.test(value) ? `"${value}"` : value;
  return field ? `${field}${operator}${quoted}` : quoted;
}

// The query with a field set to a value, or without it
function withField(text, field, value) {
  const terms = parseQuery(text).filter((term) => !(term.field === field && term.operator === ":"));
  if (value !== null) terms.push({ field, operator: ":", value: String(value) });
  return terms.map(formatTerm).join(" ");
}

function fieldValue(text, field) {
  const term = parseQuery(text).find((term) => term.field === field && term.operator === ":");
  return term ? term.value : null;
}

function holds({ field, operator, value }, data, i) {
  const found = FIELDS[field](data, i);
  if (operator !== ":") {
    if (found === null || Array.isArray(found)) return false;
    const [a, b] = [Number(found), Number(value)];
    return { ">": a > b, "<": a < b, ">=": a >= b, "<=": a <= b }[operator];
  }
  if (Array.isArray(found)) return value === "none" ? !found.length : found.includes(value);
  if (found === null || found === "") return value === "none";
  if (typeof found === "number") return Number(value) === found;
  return found === value || (value.endsWith("*") && found.startsWith(value.slice(0, -1)));
}

// The numbers of the trajectories that a query keeps
async function matching(data, text) {
  const terms = parseQuery(text);
  const fields = terms.filter((term) => term.field);
  const words = terms.filter((term) => !term.field && term.value);
  const texts = words.length ? await data.searchTexts() : null;
  const kept = [];
  for (let i = 0; i < data.count; i++) {
    if (fields.every((term) => holds(term, data, i)) && words.every((term) => texts[i].includes(term.value))) kept.push(i);
  }
  return kept;
}

// The values of a facet, with how often each occurs
function facetValues(data, field) {
  const counts = new Map();
  for (let i = 0; i < data.count; i++) {
    const found = FIELDS[field](data, i);
    const values = Array.isArray(found) ? new Set(found.length ? found : ["none"]) : [found === null || found === "" ? "none" : found];
    for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  }
  return [...counts].sort(([a], [b]) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
}

// Sorting: a stable order by one column; what has no value comes last
function sortedBy(numbers, read, descending) {
  const keyed = numbers.map((i) => [read(i), i]);
  const missing = (value) => value === null || value === undefined || value === "";
  keyed.sort(([a, i], [b, j]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b) || i - j;
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return (descending ? -order : order) || i - j;
  });
  return keyed.map(([, i]) => i);
}
