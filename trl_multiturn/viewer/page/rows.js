// A table of any length: only the rows in sight are elements.

const ROW_HEIGHT = 25;

// columns: [{name, key, title, numeric, wide, cell(i) -> node or text, sort(i) -> value}]. Columns of one name are as
// wide; those with `wide` are shown where the whole page is the table's.
class RowTable {
  constructor({ label, columns, open, sort, onsort }) {
    this.all = this.columns = columns;
    this.open = open;
    this.numbers = [];
    this.current = null;
    this.body = h("tbody");
    this.head = h("thead");
    this.widths = h("colgroup");
    this.table = h("table", { class: "rows whole", "aria-label": label }, this.widths, this.head, this.body);
    this.drawHead = () => {
      this.widths.replaceChildren(...this.columns.map((column) => h("col", { class: `w-${column.name}` })));
      this.head.replaceChildren(h("tr", {}, this.columns.map((column) => this.header(column, sort, onsort))));
    };
    this.drawHead();
    this.element = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, this.table);
    this.element.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw(true)).observe(this.element);
  }

  header(column, sort, onsort) {
    const ascending = sort === column.key, descending = sort === `-${column.key}`;
    const next = ascending ? `-${column.key}` : descending ? "" : column.key;
    const arrow = ascending ? " ▴" : descending ? " ▾" : "";
    return h("th", {
      scope: "col",
      class: `c-${column.name}${column.numeric ? " number" : ""}`,
      "aria-sort": ascending ? "ascending" : descending ? "descending" : null,
    }, column.sort ? h("button", { type: "button", onclick: () => onsort(next) }, column.title, arrow) : column.title);
  }

  show(numbers, current) {
    this.numbers = numbers;
    this.current = current;
    this.table.setAttribute("aria-rowcount", numbers.length + 1);
    this.draw(true);
  }

  narrow(yes) {
    this.table.classList.toggle("whole", !yes);
    const columns = yes ? this.all.filter((column) => !column.wide) : this.all;
    if (columns.length === this.columns.length) return;
    this.columns = columns;
    this.drawHead();
    this.draw(true);
  }

  draw(force) {
    const height = this.element.clientHeight || 600;
    const first = Math.max(0, Math.floor(this.element.scrollTop / ROW_HEIGHT) - 10);
    const last = Math.min(this.numbers.length, first + Math.ceil(height / ROW_HEIGHT) + 20);
    if (!force && first === this.first && last === this.last) return;
    [this.first, this.last] = [first, last];
    const spacer = (rows) => h("tr", { class: "spacer", "aria-hidden": "true" }, h("td", { colspan: this.columns.length }));
    const [above, below] = [spacer(), spacer()];
    above.firstChild.style.height = `${first * ROW_HEIGHT}px`;
    below.firstChild.style.height = `${(this.numbers.length - last) * ROW_HEIGHT}px`;
    const rows = this.numbers.slice(first, last).map((i, k) => this.row(i, first + k));
    this.body.replaceChildren(above, ...rows, below);
  }

  row(i, place) {
    return h("tr", {
      "aria-rowindex": place + 2,
      "aria-current": i === this.current ? "true" : null,
      "data-number": i,
      onclick: (event) => event.target.closest("a") || this.open(i),
    }, this.columns.map((column) => h("td", { class: `c-${column.name}${column.numeric ? " number" : ""}` }, column.cell(i))));
  }

  // The row after (1) or before (-1) the current one
  neighbor(step) {
    const place = this.numbers.indexOf(this.current);
    if (place < 0) return this.numbers.length ? this.numbers[step > 0 ? 0 : this.numbers.length - 1] : null;
    return this.numbers[place + step] ?? null;
  }

  mark(i) {
    this.current = i;
    this.reveal();
    this.draw(true);
  }

  reveal() {
    const place = this.numbers.indexOf(this.current);
    if (place < 0) return;
    const top = place * ROW_HEIGHT, height = this.element.clientHeight - ROW_HEIGHT - 8, above = this.element.scrollTop;
    if (top >= above && top + ROW_HEIGHT <= above + height) return;
    const near = top > above - 3 * ROW_HEIGHT && top < above + height + 3 * ROW_HEIGHT;
    this.element.scrollTop = !near ? top - height / 3 : top < above ? top : top + ROW_HEIGHT - height;
  }
}
