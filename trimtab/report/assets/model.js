// The data of the page, decoded on demand: texts for positions, objects for rows.

class Model {
  constructor(data) {
    Object.assign(this, {
      title: data.title,
      report: data.report,
      failure: data.failure,
      failedRow: data.failed_row,
      steps: data.steps,
    });
    // A run that failed has no time of its own.
    this.seconds =
      data.report.seconds || data.report.passes.reduce((sum, row) => sum + row.seconds + row.check_seconds, 0);
    this.data = data;
    this.families = data.families;
    this.weights = new Map(data.weights.map(([number, id, type, bytes]) => [number, { number, id, type, bytes }]));
    this.states = new Array(data.states.length);
    this.graphs = new Array(data.graphs.length);
    this.snapshots = new Array(data.snapshots.length);
  }

  // One op in one state. `key` tells two states of an op apart.
  state(position) {
    return (this.states[position] ??= this.decodeState(position));
  }

  decodeState(position) {
    const text = (index) => this.data.strings[index];
    const [number, mnemonic, madeBy, file, line, func, macs, attributes, names, operands, results] =
      this.data.states[position];
    const name = text(mnemonic);
    return {
      key: position,
      number,
      mnemonic: name,
      family: this.families[name],
      madeBy: text(madeBy),
      macs,
      location: { file: text(file), line, function: text(func) },
      attributes: this.data.attributes[attributes].map(([name, value, isDefault]) => ({ name, value, isDefault })),
      operands: operands.map((value, index) => ({ field: text(names[index]), value })),
      results: Array.from({ length: results.length / 2 }, (_, index) => ({
        number: number + index,
        name: text(results[2 * index]),
        type: text(results[2 * index + 1]),
      })),
    };
  }

  graph(position) {
    return (this.graphs[position] ??= new Graph(this, position));
  }

  // The graphs of a module in one state, and where each op is.
  snapshot(position) {
    if (this.snapshots[position]) return this.snapshots[position];
    const graphs = this.data.snapshots[position].map((index) => this.graph(index));
    const ops = new Map(graphs.flatMap((graph) => graph.ops.map((op) => [op.number, op])));
    return (this.snapshots[position] = { position, graphs, ops });
  }

  // What became of the ops from one snapshot to another, by number: "removed", "added" or "changed".
  compare(before, after) {
    const marks = new Map();
    if (before === after) return marks;
    for (const [number, op] of before.ops) {
      const then = after.ops.get(number);
      if (!then) marks.set(number, "removed");
      else if (then.key !== op.key) marks.set(number, "changed");
    }
    for (const number of after.ops.keys()) if (!before.ops.has(number)) marks.set(number, "added");
    return marks;
  }
}

class Graph {
  constructor(model, position) {
    const data = model.data.graphs[position];
    const text = (index) => model.data.strings[index];
    this.model = model;
    this.path = data.path;
    this.inputs = data.inputs.map(([number, name, type]) => ({ number, name: text(name), type: text(type) }));
    this.outputs = data.outputs.map(([name, number]) => ({ name: text(name), number }));
    this.sections = data.sections.map(([start, length, times, cuts]) => ({ start, length, times, cuts }));
    this.ops = [];
    for (let index = 0; index < data.runs.length; index += 2) {
      for (let offset = 0; offset < data.runs[index + 1]; offset++) {
        this.ops.push(model.state(data.runs[index] + offset));
      }
    }
    this.values = new Map(); // number -> {name, type, op, index of the op, or input}
    this.inputs.forEach((input) => this.values.set(input.number, { ...input, input: true }));
    this.ops.forEach((op, index) => {
      op.results.forEach((result) => this.values.set(result.number, { ...result, op, index }));
    });
  }

  get readers() {
    // number of a value -> the ops that read it
    if (!this.readersOf) {
      this.readersOf = new Map();
      for (const op of this.ops) {
        for (const value of new Set(op.operands.map((operand) => operand.value))) {
          if (!this.readersOf.has(value)) this.readersOf.set(value, []);
          this.readersOf.get(value).push(op);
        }
      }
    }
    return this.readersOf;
  }

  // What a value is called: as in the text of the IR where it has a name, else by its number.
  nameOf(number) {
    const weight = this.model.weights.get(number);
    return weight ? `@${weight.id}` : `%${this.values.get(number)?.name || number}`;
  }

  typeOf(number) {
    return (this.model.weights.get(number) ?? this.values.get(number))?.type ?? "";
  }

  // The op as a line of text.
  textOf(op) {
    const results = op.results.map((result) => this.nameOf(result.number)).join(", ");
    const operands = op.operands.map((operand) => this.nameOf(operand.value)).join(", ");
    const shown = op.attributes.filter((attribute) => !attribute.isDefault);
    const attributes = shown.length ? ` {${shown.map((a) => `${a.name}=${a.value}`).join(", ")}}` : "";
    return `${results} = ${op.mnemonic}(${operands})${attributes} : ${op.results.map((r) => r.type).join(", ")}`;
  }
}

const text = {
  count: (number) => number.toLocaleString("en-US"),
  signed: (number) => (number > 0 ? "+" : number < 0 ? "−" : "") + text.count(Math.abs(number)),
  scaled: (number, units) => {
    let step = 0;
    while (Math.round(number) >= 1000 && step < units.length - 1) [number, step] = [number / 1000, step + 1];
    return `${step === 0 || number >= 100 ? number.toFixed(0) : number.toPrecision(3)} ${units[step]}`.trim();
  },
  bytes: (number) => text.scaled(number, ["B", "kB", "MB", "GB", "TB"]),
  macs: (number) => text.scaled(number, ["", "k", "M", "G", "T"]),
  seconds: (seconds) => {
    if (seconds >= 1) return `${seconds.toFixed(2)} s`;
    return seconds >= 1e-3 ? `${Number((seconds * 1e3).toPrecision(3))} ms` : `${(seconds * 1e6).toFixed(0)} µs`;
  },
  drift: (drift) => {
    if (!drift) return "not measured";
    return drift.differing ? `${short(drift.relative)} relative` : "none";
  },
  location: ({ file, line }) => (line ? `${file}:${line}` : file),
};

const short = (number) => (typeof number === "number" ? Number(number.toPrecision(2)).toString() : number);

// An element with properties and children; texts become text nodes, so that no name is ever read as HTML.
function element(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === false || value === null) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") Object.entries(value).forEach(([key, item]) => made.style.setProperty(key, item));
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}
