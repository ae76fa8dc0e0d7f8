// The search field and its list of results.

const SHOWN_RESULTS = 40;

class Search {
  // `on` are callbacks: found(numbers) when there are other results, go(number) to show one.
  constructor(on) {
    this.on = on;
    this.field = document.getElementById("search");
    this.list = document.getElementById("search-results");
    this.count = document.getElementById("search-count");
    this.graphs = [];
    this.marks = new Map();
    this.found = [];
    this.index = -1;
    this.field.addEventListener("input", () => this.run());
    this.field.addEventListener("focus", () => this.write());
    this.field.addEventListener("blur", () => this.write());
    this.field.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, Enter: event.shiftKey ? -1 : 1, ArrowUp: -1 }[event.key];
      if (step) {
        event.preventDefault();
        this.go(this.index + step);
      } else if (event.key === "Escape") {
        this.start("");
        this.field.blur();
      }
    });
  }

  // Search in other graphs from now on; ops that several have are found in the first of them.
  setGraphs(graphs, marks) {
    this.graphs = graphs;
    this.marks = marks;
    this.run();
  }

  start(query) {
    this.field.value = query;
    this.field.focus();
    this.run();
  }

  run() {
    const words = this.field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const isMatch = (haystack) => words.every((word) => haystack.toLowerCase().includes(word));
    const found = new Map();
    for (const graph of words.length ? this.graphs : []) {
      for (const input of graph.inputs) {
        if (isMatch(`input %${input.name} ${input.type}`)) found.set(input.number, { graph, input });
      }
      for (const op of graph.ops) {
        if (!found.has(op.number) && isMatch(this.wordsOf(graph, op))) found.set(op.number, { graph, op });
      }
    }
    this.found = [...found].map(([number, where]) => ({ number, ...where }));
    this.index = -1;
    this.on.found(new Set(found.keys()));
    this.write();
  }

  wordsOf(graph, op) {
    const { location, family, madeBy } = op;
    const mark = this.marks.get(op.number) ?? "";
    return [graph.textOf(op), family, madeBy, text.location(location), location.function, mark].join(" ");
  }

  go(index) {
    if (!this.found.length) return;
    this.index = (index + this.found.length) % this.found.length;
    this.on.go(this.found[this.index].number);
    this.write();
  }

  write() {
    const { found, index } = this;
    const isEmpty = !this.field.value.trim();
    const place = index >= 0 ? `${index + 1}/` : "";
    this.count.textContent = isEmpty ? "" : `${place}${found.length}`;
    this.list.hidden = isEmpty || document.activeElement !== this.field;
    if (this.list.hidden) return;
    const start = Math.max(0, Math.min(index - 4, found.length - SHOWN_RESULTS));
    const rows = found.slice(start, start + SHOWN_RESULTS).map((result, offset) => this.row(result, start + offset));
    this.list.replaceChildren(...(rows.length ? rows : [element("li", { class: "none" }, "nothing in this graph")]));
    this.list.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  row({ graph, op, input }, index) {
    const name = op ? op.results.map((result) => graph.nameOf(result.number)).join(", ") : `%${input.name}`;
    const properties = {
      type: "button",
      "aria-current": index === this.index,
      onclick: () => this.go(index),
      onmousedown: (event) => event.preventDefault(), // the field keeps the focus
    };
    const parts = [dot(op ? op.family : "input"), element("b", {}, op ? op.mnemonic : "input")];
    parts.push(element("span", {}, name), element("small", {}, op ? text.location(op.location) : input.type));
    return element("li", {}, element("button", properties, parts));
  }
}
