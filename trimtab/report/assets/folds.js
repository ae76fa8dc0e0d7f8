// Which repeated blocks are drawn once and which all.

class Folds {
  constructor() {
    this.all = true;
    this.open = new Set(); // first ops of sections; both sides of a pass usually share them
  }

  isFolded(graph, section) {
    return this.all && !this.open.has(graph.ops[section.start].number);
  }

  // Changes when any fold does.
  get version() {
    return `${this.all} ${[...this.open].join()}`;
  }

  setAll(folded) {
    this.all = folded;
    this.open.clear();
  }

  // Fold or unfold a section of one of the graphs, and in the others those that share ops with it.
  set(graphs, section, folded) {
    const opsOf = (graph, { start, length, times }) => graph.ops.slice(start, start + length * times);
    const home = graphs.find((graph) => graph.sections.includes(section));
    const numbers = new Set(opsOf(home, section).map((op) => op.number));
    for (const graph of graphs) {
      for (const one of graph.sections) {
        if (one.times < 2 || !opsOf(graph, one).some((op) => numbers.has(op.number))) continue;
        const key = graph.ops[one.start].number;
        if (folded) this.open.delete(key);
        else this.open.add(key);
      }
    }
    this.all = true;
  }
}
