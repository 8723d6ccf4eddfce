// The payload (docs/viewer.md): an index that is read at once, chunks that are read when they are needed.

async function readBlock(name) {
  let element = byId(`block-${name}`);
  if (!element && document.readyState === "loading") {
    await new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve, { once: true }));
    element = byId(`block-${name}`);
  }
  if (!element) throw new Error(`The page has no block ${name}: the file is not whole.`);
  const bytes = fromBase64(element.textContent.trim());
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).json();
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

class Data {
  constructor(index) {
    Object.assign(this, index);
    this.numbers = new Map(index.columns.id.map((id, i) => [id, i]));
    this.pairsOf = new Map();
    index.pairs.chosen.forEach((chosen, pair) => {
      for (const side of [chosen, index.pairs.rejected[pair]]) {
        this.pairsOf.set(side, [...(this.pairsOf.get(side) || []), pair]);
      }
    });
    this.byPrompt = [];
    index.columns.prompt.forEach((prompt, i) => (this.byPrompt[prompt] ??= []).push(i));
    this.decoded = new Map();
    this.searched = null;
  }

  static async read() {
    const data = new Data(await readBlock("index"));
    data.vocabulary = readBlock("vocabulary");
    return data;
  }

  // A column's value for a trajectory
  get(name, i) {
    const value = this.columns[name][i];
    return name in this.enums ? this.enums[name][value] : value;
  }

  promptText(i) {
    return this.prompts[this.columns.prompt[i]];
  }

  statuses(i) {
    const calls = this.columns.calls[i];
    return calls ? calls.split(" ") : [];
  }

  layer(name) {
    return this.layers.find((layer) => layer.name === name);
  }

  // Messages: {prompt, completion, info, timing}
  async text(i) {
    return this.entry("text", i);
  }

  // Tokens: {prompt, ids, turns, layers, kept}; a layer has one number per completion token, null on context
  async tokens(i) {
    const entry = await this.entry("tokens", i);
    if (entry.spread) return entry;
    const sampled = [];
    for (let t = 0; t < entry.turns.length; t += 2) {
      for (let k = entry.turns[t]; k < entry.turns[t + 1]; k++) sampled.push(k);
    }
    for (const [name, units] of Object.entries(entry.layers)) {
      const numbers = new Array(entry.ids.length).fill(null);
      sampled.forEach((position, k) => (numbers[position] = units[k] === null ? null : units[k] * this.logp_unit));
      entry.layers[name] = numbers;
    }
    entry.spread = true;
    return entry;
  }

  async entry(kind, i) {
    const starts = this.chunks[kind];
    let number = starts.length - 1;
    while (number > 0 && starts[number] > i) number--;
    const chunk = await this.chunk(kind, number);
    const entry = chunk.entries[i - chunk.first];
    if (typeof entry.prompt === "number") entry.prompt = chunk.prompts[entry.prompt];
    return entry;
  }

  // The last chunks stay decoded
  async chunk(kind, number) {
    const name = `${kind}-${number}`;
    const known = this.decoded.get(name) || readBlock(name);
    this.decoded.delete(name);
    this.decoded.set(name, known);
    if (this.decoded.size > 24) this.decoded.delete(this.decoded.keys().next().value);
    return known;
  }

  // The text of every trajectory, in lower case; read once, when something is searched for
  searchTexts() {
    this.searched ??= (async () => {
      const texts = [];
      for (let number = 0; number < this.chunks.text.length; number++) {
        const chunk = await readBlock(`text-${number}`);
        const prompts = chunk.prompts.map(searchable);
        for (const entry of chunk.entries) texts.push(`${prompts[entry.prompt]}\n${searchable(entry.completion)}`);
      }
      return texts;
    })();
    return this.searched;
  }
}
