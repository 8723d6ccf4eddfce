// The page: where one is (in the address, so that it can be shared), what is shown there, and the keyboard.

const KEYS = [
  ["j / k, ↓ / ↑", "next or previous row"], ["Enter", "open the row, or go into it"], ["Esc", "close"], ["/", "search"],
  ["t", "tokens or messages"], ["l", "next layer of the tokens"], ["← / →", "move from token to token"], ["1 2 3 4", "overview, trajectories, pairs, prompts"], ["d", "light or dark"], ["?", "this list"],
];

class App {
  constructor(data) {
    this.data = data;
    this.view = { tokens: false, layer: "trained" };
    this.list = null;
    this.turn = 0; // of drawing: what was overtaken is dropped
  }

  start() {
    addEventListener("hashchange", () => this.go());
    addEventListener("keydown", (event) => this.key(event));
    addEventListener("click", followLink);
    addEventListener("scroll", hideHint, true);
    byId("help").addEventListener("click", () => this.help());
    byId("theme").addEventListener("click", () => switchTheme());
    this.go();
  }

  // Where one is

  get route() {
    const [name, query] = location.hash.slice(1).split("?");
    const home = this.data.kind === "run" ? "overview" : "trajectories";
    const known = ["overview", ...Object.keys(LISTS)].includes(name);
    return { page: known ? name : home, parameters: new URLSearchParams(known ? query || "" : "") };
  }

  link(page, parameters) {
    const query = new URLSearchParams(Object.entries(parameters || {}).filter(([, value]) => value !== null && value !== undefined && value !== ""));
    return `#${page}${[...query].length ? `?${query}` : ""}`;
  }

  // Goes on from here with some parameters changed
  change(parameters, replace) {
    const { page, parameters: present } = this.route;
    const hash = this.link(page, { ...Object.fromEntries(present), ...parameters });
    if (hash === location.hash) return;
    if (!replace) {
      location.hash = hash;
      return;
    }
    try {
      history.replaceState(null, "", hash);
      this.go();
    } catch { // in a notebook's cell the page has no address of its own
      location.hash = hash;
    }
  }

  get actions() {
    const { data } = this;
    const at = (page, list, number) => this.link(page, { open: list.idOf(data, number), ...this.viewParameters() });
    return {
      trajectoryLink: (i) => at("trajectories", trajectoryList, i),
      pairLink: (pair) => at("pairs", pairList, pair),
      promptLink: (prompt) => at("prompts", promptList, prompt),
      filterLink: (field, value) => this.link("trajectories", { q: formatTerm({ field, operator: ":", value: String(value) }) }),
      compare: (left, right) => (location.hash = this.link("pairs", { left: data.get("id", left), right: data.get("id", right), ...this.viewParameters() })),
      close: () => this.change({ open: "", left: "", right: "" }),
      show: (changed) => this.change(this.viewParameters({ ...this.view, ...changed }), true),
    };
  }

  viewParameters(view = this.view) {
    return { view: view.tokens ? "tokens" : "", layer: view.layer === "trained" ? "" : view.layer };
  }

  // What is shown there

  async go() {
    const turn = ++this.turn;
    const { page, parameters } = this.route;
    this.view = { tokens: parameters.get("view") === "tokens", layer: parameters.get("layer") || "trained" };
    hideHint();
    this.tabs(page);
    if (page === "overview") {
      this.list = null;
      byId("main").replaceChildren(overviewPage(this.data, this.actions));
      return;
    }
    await this.showList(page, parameters, turn);
  }

  tabs(page) {
    const { data } = this;
    const tabs = [["overview", "Overview", null], ["trajectories", "Trajectories", data.count], ["pairs", "Pairs", data.pairs.chosen.length], ["prompts", "Prompts", data.prompts.length]];
    byId("tabs").replaceChildren(...tabs.map(([name, title, count]) => h("a", { href: `#${name}`, "aria-current": name === page ? "page" : null },
      title, count === null ? null : h("span", { class: "quiet" }, ` ${short(count)}`))));
  }

  async showList(page, parameters, turn) {
    const kind = LISTS[page];
    const [query, sort] = [parameters.get("q") || "", parameters.get("sort") || ""];
    const compared = ["left", "right"].map((side) => this.data.numbers.get(parameters.get(side)) ?? null);
    const open = kind.numberOf(this.data, parameters.get("open"));
    if (!this.list || this.list.page !== page || this.list.sort !== sort) this.buildList(page, kind, query, sort);
    if (this.list.query !== query) {
      this.list.query = query;
      const numbers = await kind.numbers(this.data, query);
      if (turn !== this.turn) return;
      const column = this.list.table.columns.find(({ key }) => key === sort.replace(/^-/, ""));
      const sorted = column ? sortedBy(numbers, column.sort, sort.startsWith("-")) : numbers;
      this.list.table.show(sorted, open);
      this.list.table.element.scrollTop = 0;
      this.list.filter?.reflect(query);
      this.count(numbers.length, kind);
    }
    this.list.table.mark(open);
    const view = open !== null ? kind.view(this.data, open, this.view, this.actions)
      : page === "pairs" && !compared.includes(null) ? pairView(this.data, ...compared, { ...this.view, pair: null, title: "Side by side" }, this.actions) : null;
    await this.showDetail(view, turn, `${page} ${open} ${compared}`);
  }

  buildList(page, kind, query, sort) {
    const onsort = (next) => this.change({ sort: next }, true);
    const columns = kind.columns(this.data, this.actions).map((column) => ({ key: column.name, ...column }));
    const table = new RowTable({ label: kind.label, columns, sort, onsort, open: (i) => this.change({ open: kind.idOf(this.data, i), left: "", right: "" }) });
    const filter = kind.filter ? filterLine(this.data, query, (text) => this.change({ q: text }, true)) : null;
    const detail = h("div", { class: "detail scroll", tabindex: "0", role: "region", "aria-label": "What is open", hidden: true });
    const focused = document.activeElement?.id === "query";
    this.list = { page, kind, sort, query: null, table, filter, detail, shown: null };
    byId("main").replaceChildren(h("div", { class: `page ${page}` }, filter?.element, h("div", { class: "split" }, table.element, detail)));
    if (focused) byId("query")?.focus();
  }

  count(shown, kind) {
    const all = kind === trajectoryList ? this.data.count : shown;
    const text = shown === all ? short(all) : `${short(shown)} of ${short(all)}`;
    if (this.list.filter) this.list.filter.count.textContent = text;
    say(`${text} ${kind.label.toLowerCase()}`);
  }

  async showDetail(view, turn, name) {
    const { detail, table } = this.list;
    if (view === null) {
      detail.hidden = true;
      detail.replaceChildren();
      table.narrow(false);
      return;
    }
    const content = await view;
    if (turn !== this.turn) return;
    const inside = detail.contains(document.activeElement) ? document.activeElement.closest("[aria-label]")?.getAttribute("aria-label") : null;
    detail.hidden = false;
    table.narrow(true);
    detail.replaceChildren(content);
    if (this.list.shown !== name) detail.scrollTop = 0;
    this.list.shown = name;
    if (inside) (detail.querySelector(`[aria-label="${CSS.escape(inside)}"] select`) || detail).focus();
    table.reveal();
    highlight(detail, this.list.query || "");
  }

  // The keyboard

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const typing = event.target.closest("input, select, textarea");
    if (typing) {
      if (event.key === "Escape" && typing.id === "query") this.list.table.element.focus();
      return;
    }
    const pages = ["overview", "trajectories", "pairs", "prompts"];
    const keys = {
      j: () => this.move(1), ArrowDown: () => this.move(1, event), k: () => this.move(-1), ArrowUp: () => this.move(-1, event),
      Enter: () => this.enter(event), Escape: () => this.actions.close(),
      "/": () => byId("query") ? byId("query").focus() : (location.hash = "#trajectories"),
      t: () => this.actions.show({ tokens: !this.view.tokens }), l: () => this.nextLayer(),
      d: switchTheme, "?": () => this.help(), ...Object.fromEntries(pages.map((page, k) => [String(k + 1), () => (location.hash = `#${page}`)])),
    };
    if (!Object.hasOwn(keys, event.key) || (event.key === "Escape" && byId("keys").open)) return;
    if (keys[event.key]() !== false) event.preventDefault();
  }

  // Arrows scroll what is open, as everywhere, once one is in it
  move(step, event) {
    if (!this.list || (event && this.list.detail.contains(document.activeElement))) return false;
    const next = this.list.table.neighbor(step);
    if (next === null) return true;
    if (this.list.detail.hidden) this.list.table.mark(next);
    else this.change({ open: this.list.kind.idOf(this.data, next), left: "", right: "" }, true);
    return true;
  }

  enter(event) {
    if (!this.list || event.target.closest("a, button, summary")) return false;
    const { table, kind, detail } = this.list;
    if (table.current === null) return false;
    if (detail.hidden) this.change({ open: kind.idOf(this.data, table.current) });
    else detail.focus();
    return true;
  }

  nextLayer() {
    const names = layersOf(this.data).filter((layer) => !layer.missing).map((layer) => layer.name);
    const layer = this.view.tokens ? names[(names.indexOf(this.view.layer) + 1) % names.length] : this.view.layer;
    this.actions.show({ tokens: true, layer });
    say(`coloured by ${layersOf(this.data).find(({ name }) => name === layer)?.label}`);
  }

  help() {
    const close = () => byId("keys").close();
    byId("keys").replaceChildren(h("h2", { id: "keys-title" }, "Keyboard"), h("table", {}, KEYS.map(([key, what]) => h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, what)))),
      h("button", { type: "button", onclick: close }, "Close"));
    byId("keys").showModal();
  }
}

// Marks the words of a query where they stand, without touching the text
function highlight(element, query) {
  if (!globalThis.CSS?.highlights) return;
  const words = parseQuery(query).filter((term) => !term.field && term.value).map((term) => term.value);
  const ranges = [];
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  while (words.length && walker.nextNode() && ranges.length < 2000) {
    const text = walker.currentNode.data.toLowerCase();
    for (const word of words) {
      for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
        const range = new Range();
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, at + word.length);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// Links inside the page, also where it has no address of its own: in a notebook's cell "#x" would mean the notebook's
function followLink(event) {
  const target = event.target.closest('a[href^="#"]')?.getAttribute("href");
  if (!target || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  if (target === "#main") byId("main").focus();
  else location.hash = target;
}

function switchTheme() {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
}

Data.read().then((data) => new App(data).start()).catch((error) => {
  byId("main").replaceChildren(h("p", { class: "wait" }, `The page cannot be read: ${error.message}`));
});
