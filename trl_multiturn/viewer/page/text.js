// Text that a model or a tool wrote, made visible: control characters and direction marks act on nothing.

// What `messages.terminal.visible` shows in Python: control and format characters, line ends that few know, half
// characters; but line feed, tab, and the joiners of Indic scripts, Persian and emoji
const INVISIBLE = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/u;

function visibleCharacter(character) {
  const code = character.codePointAt(0).toString(16);
  if (code.length <= 2) return `\\x${code.padStart(2, "0")}`;
  return code.length <= 4 ? `\\u${code.padStart(4, "0")}` : `\\U${code.padStart(8, "0")}`;
}

// As one string, for places that hold no elements
function plain(text) {
  return INVISIBLE.test(text) ? [...text].map((c) => (INVISIBLE.test(c) ? visibleCharacter(c) : c)).join("") : text;
}

// As nodes in which every such character is marked
function visible(text) {
  if (!INVISIBLE.test(text)) return [document.createTextNode(text)];
  const nodes = [];
  let run = "";
  for (const character of text) {
    if (!INVISIBLE.test(character)) {
      run += character;
      continue;
    }
    if (run) nodes.push(document.createTextNode(run));
    run = "";
    nodes.push(h("span", { class: "mark", title: "a character that is not shown" }, visibleCharacter(character)));
  }
  if (run) nodes.push(document.createTextNode(run));
  return nodes;
}

// The fenced parts of a text: [{kind: "text" | "code" | "output", label, text}]
function fencedParts(text) {
  const parts = [];
  const fence = /^(```+|~~~+)[ \t]*([^\n`]*)\n([\s\S]*?)(?:^\1[ \t]*$|$(?![\s\S]))/gm;
  let end = 0;
  for (const match of text.matchAll(fence)) {
    if (match.index > end) parts.push({ kind: "text", label: "", text: text.slice(end, match.index) });
    const label = match[2].trim();
    parts.push({ kind: label === "output" ? "output" : "code", label, text: match[3].replace(/\n$/, "") });
    end = match.index + match[0].length;
  }
  if (end < text.length) parts.push({ kind: "text", label: "", text: text.slice(end) });
  return parts.filter((part) => part.kind !== "text" || part.text.trim());
}

function contentText(content) {
  if (typeof content === "string") return content;
  if (content === null || content === undefined) return "";
  if (!Array.isArray(content)) return JSON.stringify(content, null, 2);
  const words = content.filter((part) => part.type !== "image");
  return words.map((part) => (typeof part === "string" ? part : part.text ?? JSON.stringify(part))).join("");
}

// The images of a message, small
function imageParts(content) {
  const images = Array.isArray(content) ? content.filter((part) => part.type === "image") : [];
  return images.map((part) => ({ kind: "image", label: "image", text: "", source: String(part.image ?? "") }));
}

// The parts of a message: what it says, what it calls, what it was answered
function messageParts(message) {
  const text = contentText(message.content);
  const thought = message.reasoning_content || message.thinking || message.reasoning;
  const parts = thought ? [{ kind: "thought", label: "reasoning", text: contentText(thought) }] : [];
  parts.push(...imageParts(message.content));
  if (message.role === "tool") parts.push({ kind: "output", label: message.name || "", text });
  else parts.push(...fencedParts(text));
  for (const call of message.tool_calls || []) {
    const called = call.function || call;
    parts.push({ kind: "code", label: String(called.name ?? "call"), text: callText(called.arguments) });
  }
  return parts;
}

// The one argument of a call that is a program or a text, else all arguments as JSON
function callText(given) {
  let values = given;
  if (typeof given === "string") {
    try {
      values = JSON.parse(given);
    } catch {
      return given;
    }
  }
  const entries = values && typeof values === "object" ? Object.entries(values) : [];
  if (entries.length === 1 && typeof entries[0][1] === "string") return entries[0][1];
  return JSON.stringify(values, null, entries.length > 1 ? 2 : 0) ?? "";
}

// All that a reader could search for in a trajectory
function searchable(messages) {
  return messages.map((m) => [m.role, ...messageParts(m).map((part) => part.text)].join("\n")).join("\n").toLowerCase();
}

// Numbers

function signed(value, digits = 2) {
  return value === null || value === undefined ? "–" : `${value > 0 ? "+" : ""}${value.toFixed(digits)}`;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size < 0.001) return value.toExponential(1);
  return size >= 1000 ? value.toFixed(0) : size >= 1 ? value.toFixed(2) : value.toPrecision(3);
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.001) return value ? "< 1 ms" : "0 s";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 0)} s`;
}
