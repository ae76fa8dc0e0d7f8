// Where everything in the picture of a graph stands.
//
// The picture is a stack of stretches of consecutive ops (trimtab/report/blocks.py chose them). dagre places the ops of
// each stretch in layers; stretches that look the same are placed once. Values that are read soon after the stretch
// that makes them run in lanes through the stretches between; those read far away would only clutter the picture and
// are drawn when an op at one of their ends is selected.

const NODE = { height: 40, line: 14, small: 26, padding: 11, narrowest: 84, widest: 250 };
const GAP = { stretch: 30, block: 34, band: 16, fold: 84 };
const NEAR = 2; // stretches that a value may cross in a lane
const FONT = {
  title: '600 13px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif',
  note: '11px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace',
};

const widthOf = (() => {
  const context = document.createElement("canvas").getContext("2d");
  const known = new Map();
  return (font, label) => {
    const key = font + label;
    if (!known.has(key)) {
      context.font = font;
      known.set(key, context.measureText(label).width);
    }
    return known.get(key);
  };
})();

const cut = (label, length) => (label.length > length ? `${label.slice(0, length - 1)}…` : label);

// The boxes of a graph: its ops, inputs and outputs, in that order. `places` are the stretches of the ops.
function makeNodes(graph, places) {
  const model = graph.model;
  const nodes = graph.ops.map((op, index) => {
    const shown = op.attributes.filter((a) => !a.isDefault && a.name !== "shape" && a.name !== "dtype");
    // A number that stands in another stretch is written into the box: there is no line from it.
    const numbers = op.operands
      .map((operand) => graph.values.get(operand.value))
      .filter((value) => value?.op?.mnemonic === "full" && places[value.index] !== places[index])
      .map((value) => value.op.attributes.find((a) => a.name === "value").value);
    const attributes = shown.length === 1 ? [shown[0].value] : shown.map((a) => `${a.name}=${a.value}`);
    const remark = [...attributes, ...numbers].join(" ");
    const type = op.results.length > 1 ? `${op.results.length} × ${op.results[0].type}` : (op.results[0]?.type ?? "");
    const weight = op.operands.map((operand) => model.weights.get(operand.value)).find(Boolean);
    return makeNode("op", op.number, op.family, op.mnemonic, cut(remark, 24), type, weight ? weight.id : "", op);
  });
  const inputs = graph.inputs.map((value) => makeNode("input", value.number, "input", value.name, "", value.type, ""));
  const outputs = graph.outputs.map((output) =>
    makeNode("output", -1, "output", output.name, "", graph.typeOf(output.number), ""),
  );
  return [...nodes, ...inputs, ...outputs];
}

function makeNode(kind, number, family, title, remark, type, weight, op = null) {
  // Scalars have one line, ops that read a weight three; the weight's name does not decide the width, so that the
  // blocks of a model look the same.
  const lines = kind === "op" && /\[\]$/.test(type) ? 1 : weight ? 3 : 2;
  const first = widthOf(FONT.title, title) + (remark ? 6 + widthOf(FONT.note, remark) : 0);
  const second = lines > 1 ? widthOf(FONT.note, type) : 0;
  const width = Math.ceil(
    Math.min(NODE.widest, Math.max(NODE.narrowest, Math.max(first, second) + 2 * NODE.padding + 4)),
  );
  const height = lines === 1 ? NODE.small : NODE.height + (lines === 3 ? NODE.line : 0);
  return { kind, number, family, title, remark, type, weight, op, lines, width, height, x: 0, y: 0, fold: null };
}

// The stretches of a section.
function cutUp(section) {
  const parts = [];
  for (let block = 0; block < section.times; block++) {
    const base = section.start + block * section.length;
    section.cuts.forEach((cut, index) =>
      parts.push({ section, block, start: base + cut, stop: base + (section.cuts[index + 1] ?? section.length) }),
    );
  }
  return parts;
}

class Layout {
  // `isFolded(section)` says whether only the first block of a section of several is drawn.
  constructor(graph, isFolded) {
    this.graph = graph;
    const plan = graph.sections.flatMap((section) => cutUp(section));
    this.nodes = makeNodes(
      graph,
      plan.flatMap(({ start, stop }, index) => new Array(stop - start).fill(index)),
    );
    this.byNumber = new Map();
    this.nodes.forEach((node) => {
      if (node.number >= 0) this.byNumber.set(node.number, node);
    });
    this.stretches = this.makeStretches(plan);
    this.stack(isFolded);
  }

  // The node of the op or input that a value comes from.
  nodeOf(value) {
    const known = this.graph.values.get(value);
    return known && this.byNumber.get(known.op ? known.op.number : value);
  }

  makeStretches(plan) {
    const { graph, nodes } = this;
    const parts = plan.length ? plan : [{ section: null, block: 0, start: 0, stop: 0 }];
    const stretches = parts.map(({ section, block, start, stop }) => ({
      section,
      block,
      members: nodes.slice(start, stop),
      edges: [],
      arriving: new Map(),
      leaving: new Map(),
    }));
    const home = new Map(); // node -> index of its stretch
    stretches.forEach((stretch, index) => stretch.members.forEach((node) => home.set(node, index)));
    const put = (node, index) => {
      home.set(node, index);
      stretches[index].members.push(node);
    };
    const firstReader = (number) => graph.readers.get(number)?.[0];
    graph.inputs.forEach((input, index) => {
      const reader = firstReader(input.number);
      put(nodes[graph.ops.length + index], reader ? home.get(this.byNumber.get(reader.number)) : 0);
    });
    graph.outputs.forEach((output, index) => {
      const source = this.nodeOf(output.number);
      put(nodes[graph.ops.length + graph.inputs.length + index], source ? home.get(source) : stretches.length - 1);
    });
    this.connect(stretches, home);
    return stretches;
  }

  // Edges inside stretches, and lanes from stretch to stretch. `home` is the index of each node's stretch.
  connect(stretches, home) {
    const { graph } = this;
    const ends = new Map(); // value -> nodes that read it
    const add = (value, node) => {
      if (!ends.has(value)) ends.set(value, new Set());
      ends.get(value).add(node);
    };
    const constants = new Set(); // what depends on no input
    graph.ops.forEach((op, index) => {
      op.operands.forEach((operand) => add(operand.value, this.nodes[index]));
      const isConstant = op.operands.every(({ value }) => graph.model.weights.has(value) || constants.has(value));
      if (isConstant) op.results.forEach((result) => constants.add(result.number));
    });
    const firstOutput = graph.ops.length + graph.inputs.length;
    graph.outputs.forEach((output, index) => add(output.number, this.nodes[firstOutput + index]));
    for (const [value, readers] of ends) {
      const source = this.nodeOf(value);
      if (!source) continue;
      const from = home.get(source);
      let reach = from;
      const distant = new Set([...readers].map((node) => home.get(node)).filter((index) => index !== from)).size;
      // To how many other stretches lanes may lead: numbers are written into the boxes that read them.
      const limit = source.op?.mnemonic === "full" ? 0 : constants.has(value) ? 1 : NEAR;
      for (const node of readers) {
        const to = home.get(node);
        if (to === from) stretches[from].edges.push([source, node]);
        else if (to > from && to - from <= NEAR && distant <= limit) {
          reach = Math.max(reach, to);
          if (!stretches[to].arriving.has(value)) stretches[to].arriving.set(value, []);
          stretches[to].arriving.get(value).push(node);
        }
      }
      for (let index = from; index < reach; index++) {
        stretches[index].leaving.set(value, index === from ? source : null);
        const next = stretches[index + 1];
        if (!next.arriving.has(value)) next.arriving.set(value, []);
      }
    }
  }

  // Put the stretches under one another. Call again when folds change.
  stack(isFolded) {
    this.elements = [];
    this.links = []; // [x1, y1, x2, y2] between elements
    this.bands = []; // the blocks of sections with several, drawn or folded
    let y = 0;
    let previous = null;
    let band = null;
    const place = (item) => {
      this.link(previous, item);
      this.elements.push(item);
      previous = item;
    };
    for (let index = 0; index < this.stretches.length; index++) {
      const stretch = this.stretches[index];
      const { section, block } = stretch;
      const several = section !== null && section.times > 1;
      const folded = several && block > 0 && isFolded(section);
      if (folded && previous?.fold === section) {
        this.hide(stretch, previous);
        continue;
      }
      const begins = several && (band === null || band.section !== section || band.block !== block);
      if (begins) y += GAP.block;
      if (folded) {
        const fold = { fold: section, top: y, bottom: y + GAP.fold, left: -150, right: 150, members: [], x: 0 };
        place(fold);
        this.hide(stretch, fold);
        band = { section, block, fold: true };
        y = fold.bottom + GAP.stretch;
        continue;
      }
      if (!several && band !== null) y += GAP.band;
      const item = this.placed(stretch, y);
      if (begins) {
        band = { section, block, top: item.top - GAP.band, bottom: 0, left: Infinity, right: -Infinity };
        this.bands.push(band);
      }
      if (several) {
        band.bottom = item.bottom + GAP.band;
        band.left = Math.min(band.left, item.left - GAP.band);
        band.right = Math.max(band.right, item.right + GAP.band);
      } else band = null;
      place(item);
      y = item.bottom + GAP.stretch;
    }
    this.height = Math.max(y - GAP.stretch, 1);
    this.left = d3.min([...this.elements, ...this.bands], (item) => item.left);
    this.right = d3.max([...this.elements, ...this.bands], (item) => item.right);
  }

  hide(stretch, fold) {
    for (const node of stretch.members) {
      node.fold = fold;
      node.x = 0;
      node.y = (fold.top + fold.bottom) / 2;
      fold.members.push(node);
    }
  }

  placed(stretch, top) {
    const shape = shapeOf(stretch);
    stretch.members.forEach((node, index) => {
      node.fold = null;
      node.x = shape.x[index];
      node.y = top + shape.y[index];
    });
    return { stretch, shape, top, bottom: top + shape.height, left: shape.left, right: shape.right };
  }

  // Lines between two elements of the stack, one for each value that passes; those of a fold meet in its middle.
  link(above, below) {
    if (!above) return;
    const ends = (item, side) =>
      new Map([...(item.stretch?.[side].keys() ?? [])].map((value, index) => [value, item.shape[side][index]]));
    const from = ends(above, "leaving"),
      to = ends(below, "arriving");
    for (const value of below.fold ? from.keys() : to.keys()) {
      this.links.push([from.get(value) ?? 0, above.bottom, to.get(value) ?? 0, below.top]);
    }
  }
}
