// Where everything in the picture of a graph stands.
//
// The picture is a stack of stretches of consecutive ops (trimtab/report/blocks.py chose them). dagre places the ops of
// each stretch in layers; stretches that look the same are placed once. Values that are read soon after the stretch
// that makes them run in lanes through the stretches between; those read far away would only clutter the picture and
// are drawn when an op at one of their ends is selected.

const NODE = { height: 40, line: 14, small: 26, padding: 11, narrowest: 84, widest: 250 };
const GAP = { stretch: 30, block: 34, band: 16, fold: 84 };
const SPACE = { node: 16, edge: 12 };
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

// The boxes of a graph: its ops, inputs and outputs, in that order of index.
function makeNodes(graph) {
  const model = graph.model;
  const nodes = graph.ops.map((op) => {
    const shown = op.attributes.filter((a) => !a.isDefault && a.name !== "shape" && a.name !== "dtype");
    const remark = shown.length === 1 ? shown[0].value : shown.map((a) => `${a.name}=${a.value}`).join(" ");
    const type = op.results.length > 1 ? `${op.results.length} × ${op.results[0].type}` : op.results[0]?.type ?? "";
    const weight = op.operands.map((operand) => model.weights.get(operand.value)).find(Boolean);
    return makeNode("op", op.number, op.family, op.mnemonic, cut(remark, 24), type, weight ? weight.id : "", op);
  });
  const inputs = graph.inputs.map((value) => makeNode("input", value.number, "input", value.name, "", value.type, ""));
  const outputs = graph.outputs.map((output) =>
    makeNode("output", -1, "output", output.name, "", graph.typeOf(output.number), ""));
  return [...nodes, ...inputs, ...outputs];
}

function makeNode(kind, number, family, title, remark, type, weight, op = null) {
  // Scalars have one line, ops that read a weight three; the weight's name does not decide the width, so that the
  // blocks of a model look the same.
  const lines = kind === "op" && /\[\]$/.test(type) ? 1 : weight ? 3 : 2;
  const first = widthOf(FONT.title, title) + (remark ? 6 + widthOf(FONT.note, remark) : 0);
  const second = lines > 1 ? widthOf(FONT.note, type) : 0;
  const width = Math.ceil(Math.min(NODE.widest, Math.max(NODE.narrowest, Math.max(first, second) + 2 * NODE.padding + 4)));
  const height = lines === 1 ? NODE.small : NODE.height + (lines === 3 ? NODE.line : 0);
  return { kind, number, family, title, remark, type, weight, op, lines, width, height, x: 0, y: 0, fold: null };
}

class Layout {
  // `isFolded(section)` says whether only the first block of a section of several is drawn.
  constructor(graph, isFolded) {
    this.graph = graph;
    this.nodes = makeNodes(graph);
    this.byNumber = new Map();
    this.nodes.forEach((node) => { if (node.number >= 0) this.byNumber.set(node.number, node); });
    this.stretches = this.makeStretches();
    this.stack(isFolded);
  }

  // The node of the op or input that a value comes from.
  nodeOf(value) {
    const known = this.graph.values.get(value);
    return known && this.byNumber.get(known.op ? known.op.number : value);
  }

  makeStretches() {
    const { graph, nodes } = this;
    const stretches = [];
    for (const section of graph.sections) {
      for (let block = 0; block < section.times; block++) {
        section.cuts.forEach((start, index) => {
          const stop = section.cuts[index + 1] ?? section.length;
          const base = section.start + block * section.length;
          const members = nodes.slice(base + start, base + stop);
          stretches.push({ section, block, members, edges: [], arriving: new Map(), leaving: new Map() });
        });
      }
    }
    if (!stretches.length) {
      stretches.push({ section: null, block: 0, members: [], edges: [], arriving: new Map(), leaving: new Map() });
    }
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
    this.home = home;
    this.far = []; // [from, to, value]
    this.connect(stretches);
    return stretches;
  }

  // Edges inside stretches, and lanes from stretch to stretch.
  connect(stretches) {
    const { graph, home } = this;
    const ends = new Map(); // value -> nodes that read it
    const add = (value, node) => {
      if (!ends.has(value)) ends.set(value, new Set());
      ends.get(value).add(node);
    };
    graph.ops.forEach((op, index) => op.operands.forEach((operand) => add(operand.value, this.nodes[index])));
    const firstOutput = graph.ops.length + graph.inputs.length;
    graph.outputs.forEach((output, index) => add(output.number, this.nodes[firstOutput + index]));
    for (const [value, readers] of ends) {
      const source = this.nodeOf(value);
      if (!source) continue;
      const from = home.get(source);
      let reach = from;
      const distant = new Set([...readers].map((node) => home.get(node)).filter((index) => index !== from));
      for (const node of readers) {
        const to = home.get(node);
        if (to === from) stretches[from].edges.push([source, node]);
        else if (to > from && to - from <= NEAR && distant.size <= NEAR) {
          reach = Math.max(reach, to);
          if (!stretches[to].arriving.has(value)) stretches[to].arriving.set(value, []);
          stretches[to].arriving.get(value).push(node);
        } else this.far.push([source, node, value]);
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
        this.bands.push({ section, block, fold: true, element: fold, top: fold.top, bottom: fold.bottom, left: -150, right: 150 });
        band = this.bands.at(-1);
        y = fold.bottom + GAP.stretch;
        continue;
      }
      if (!several && band !== null) y += GAP.band;
      const item = this.placed(stretch, y);
      if (begins) {
        band = { section, block, fold: false, top: item.top - GAP.band, bottom: 0, left: Infinity, right: -Infinity };
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
    const ends = (item, side) => new Map([...(item.stretch?.[side].keys() ?? [])].map((value, index) => [value, item.shape[side][index]]));
    const from = ends(above, "leaving"), to = ends(below, "arriving");
    for (const value of below.fold ? from.keys() : to.keys()) {
      this.links.push([from.get(value) ?? 0, above.bottom, to.get(value) ?? 0, below.top]);
    }
  }
}

// The shape of a stretch by itself: positions of its members, its lines, and where values arrive and leave.
const shapeOf = (() => {
  const known = new Map();
  return (stretch) => {
    const place = new Map(stretch.members.map((node, index) => [node, index]));
    const leaving = [...stretch.leaving.keys()];
    const plan = {
      boxes: stretch.members.map((node) => [node.width, node.height, node.kind === "input"]),
      edges: stretch.edges.map(([from, to]) => [place.get(from), place.get(to)]),
      arriving: [...stretch.arriving].map(([value, readers]) => [leaving.indexOf(value), readers.map((node) => place.get(node))]),
      leaving: leaving.map((value) => place.get(stretch.leaving.get(value)) ?? -1), // -1: passes through
    };
    const key = JSON.stringify(plan);
    if (!known.has(key)) known.set(key, arrange(plan));
    return known.get(key);
  };
})();

function arrange({ boxes, edges, arriving, leaving }) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: SPACE.node, edgesep: SPACE.edge, ranksep: 28 });
  graph.setDefaultEdgeLabel(() => ({}));
  boxes.forEach(([width, height, isInput], index) => graph.setNode(index, { width, height, isInput, index }));
  edges.forEach(([from, to]) => graph.setEdge(from, to));
  const port = { width: 2, height: 2, isPort: true };
  // Heavy edges to a common end keep the ports at the top and at the bottom.
  arriving.forEach(([passes, readers], index) => {
    graph.setNode(`in${index}`, { ...port });
    graph.setEdge("top", `in${index}`, { weight: 50 });
    readers.forEach((reader) => graph.setEdge(`in${index}`, reader));
    if (passes >= 0) graph.setEdge(`in${index}`, `out${passes}`);
  });
  leaving.forEach((source, index) => {
    graph.setNode(`out${index}`, { ...port });
    graph.setEdge(`out${index}`, "bottom", { weight: 50 });
    if (source >= 0) graph.setEdge(source, `out${index}`);
  });
  if (arriving.length) graph.setNode("top", { ...port });
  if (leaving.length) graph.setNode("bottom", { ...port });
  if (!graph.nodeCount()) return { x: [], y: [], lines: [], arriving: [], leaving: [], height: 0, left: 0, right: 0 };
  dagre.layout(graph);
  ["top", "bottom"].forEach((end) => graph.removeNode(end));
  const lines = straighten(graph);
  const nodes = graph.nodes().map((name) => graph.node(name));
  const [left, right] = d3.extent([...nodes.flatMap((n) => [n.x - n.width / 2, n.x + n.width / 2]), ...lines.flatMap((line) => line.segments.map(([x]) => x))]);
  const [top, bottom] = d3.extent(nodes.flatMap((n) => [n.y - n.height / 2, n.y + n.height / 2]));
  const middle = (left + right) / 2;
  const ports = (side, count) => Array.from({ length: count }, (_, index) => graph.node(`${side}${index}`));
  const ins = ports("in", arriving.length), outs = ports("out", leaving.length);
  // A port that is not at the edge of the stretch is led to it.
  ins.forEach((n) => { if (n.y > top + 1) lines.push({ segments: [[n.x, top, n.y]] }); });
  outs.forEach((n) => { if (n.y < bottom - 1) lines.push({ segments: [[n.x, n.y, bottom]] }); });
  for (const line of lines) line.segments = line.segments.map(([x, y1, y2]) => [x - middle, y1 - top, y2 - top]);
  return {
    x: boxes.map((_, index) => graph.node(index).x - middle), y: boxes.map((_, index) => graph.node(index).y - top),
    lines, arriving: ins.map((n) => n.x - middle), leaving: outs.map((n) => n.x - middle),
    height: bottom - top, left: left - middle, right: right - middle,
  };
}

// Moves the boxes within the layers that dagre found, in the order that it found, so that the main lines run straight.
//
// Each layer in turn goes where its neighbours above, or below, are: the weighted sum of distances is minimised under the
// order and the least distances, which is an isotonic regression (pool adjacent violators). Constants and what is
// computed from them weigh little: they stand beside the ops that read them and push nothing aside.
function straighten(graph) {
  const boxes = new Map(graph.nodes().map((name) => [name, Object.assign(graph.node(name), { links: [] })]));
  const isConstant = new Map();
  for (const [name, box] of boxes) { // in the order of execution
    isConstant.set(name, !box.isInput && !box.isPort && graph.predecessors(name).every((one) => isConstant.get(one)));
  }
  const items = [...boxes.values()];
  const chains = graph.edges().map(({ v, w }) => {
    const bends = graph.edge(v, w).points.slice(1, -1).map(({ x, y }) => ({ x, y, width: 0, height: 0, links: [] }));
    items.push(...bends);
    const chain = [boxes.get(v), ...bends, boxes.get(w)];
    for (let index = 1; index < chain.length; index++) {
      // A long edge, such as a residual, is straight itself but does not pull at its ends.
      const isInner = index > 1 && index < chain.length - 1, isLong = bends.length > 1;
      const weight = (isConstant.get(v) ? 0.02 : 1) * (isInner ? 0.3 : isLong ? 0.05 : 1);
      chain[index - 1].links.push({ to: chain[index], weight, isBelow: true });
      chain[index].links.push({ to: chain[index - 1], weight, isBelow: false });
    }
    return chain;
  });
  const layers = [...groups(items, (item) => Math.round(item.y))].sort((a, b) => a[0] - b[0])
    .map(([, layer]) => layer.sort((a, b) => a.x - b.x));
  for (const layer of layers) {
    const [top, bottom] = d3.extent(layer.flatMap((item) => [item.y - item.height / 2, item.y + item.height / 2]));
    layer.forEach((item) => { item.layer = { top, bottom }; });
  }
  for (let round = 0; round < 9; round++) {
    const downwards = round % 2 === 0;
    for (const layer of downwards ? layers : [...layers].reverse()) settle(layer, (link) => link.isBelow !== downwards);
  }
  return linesOf(chains);
}

// Moves the items of one layer to the median of the neighbours that `follows` picks, as near as the order allows.
function settle(layer, follows) {
  const pools = []; // items that stand as close together as they may, and where each would have the first one stand
  let offset = 0;
  layer.forEach((item, index) => {
    const before = layer[index - 1];
    if (before) offset += (before.width + item.width) / 2 + (before.width && item.width ? SPACE.node : SPACE.edge);
    const links = item.links.filter(follows);
    // What has no neighbours at all, such as a constant that is read far away, stands beside the others.
    const loose = item.links.length ? item : layer.find((other) => other.links.length) ?? item;
    const wishes = links.length ? links.map((link) => [link.to.x - offset, link.weight]) : [[loose.x - offset, 1e-4]];
    pools.push({ wishes, start: median(wishes), members: [[item, offset]] });
    while (pools.length > 1 && pools.at(-2).start > pools.at(-1).start) {
      const last = pools.pop(), pool = pools.at(-1);
      pool.wishes.push(...last.wishes);
      pool.members.push(...last.members);
      pool.start = median(pool.wishes);
    }
  });
  for (const { start, members } of pools) for (const [item, place] of members) item.x = start + place;
}

// Where half of the weight is on either side; in the middle between two values when both fit.
function median(wishes) {
  wishes.sort((a, b) => a[0] - b[0]);
  const half = d3.sum(wishes, (wish) => wish[1]) / 2;
  let sum = 0;
  for (let index = 0; index < wishes.length; index++) {
    sum += wishes[index][1];
    if (sum > half * (1 + 1e-9)) return wishes[index][0];
    if (sum > half * (1 - 1e-9)) return (wishes[index][0] + wishes[index + 1][0]) / 2;
  }
  return wishes.at(-1)[0];
}

// The edges as upright segments [x, top, bottom], one for each layer that they meet: a line bends between layers only, so
// that it does not touch what stands in them. The ends are spread over the sides of the boxes in the order in which
// they come.
function linesOf(chains) {
  const ends = new Map(chains.map((chain) => [chain, [0, 0]]));
  const spread = (side, end, neighbour) => {
    for (const [box, here] of groups(chains, (chain) => chain.at(end))) {
      const step = Math.min(14, Math.max(0, box.width - 28) / here.length);
      here.sort((a, b) => a.at(neighbour).x - b.at(neighbour).x);
      here.forEach((chain, index) => { ends.get(chain)[side] = box.x + (index - (here.length - 1) / 2) * step; });
    }
  };
  spread(0, 0, 1);
  spread(1, -1, -2);
  return chains.map((chain) => {
    const from = chain[0], to = chain.at(-1), [start, stop] = ends.get(chain);
    const bends = chain.slice(1, -1).filter(({ layer }) => layer.bottom > layer.top);
    return {
      segments: [
        [start, from.y + from.height / 2, from.layer.bottom], ...bends.map(({ x, layer }) => [x, layer.top, layer.bottom]),
        [stop, to.layer.top, to.y - to.height / 2],
      ],
      from: from.index, to: to.index, hasArrow: !to.isPort,
    };
  });
}

function groups(items, keyOf) {
  const found = new Map();
  for (const item of items) {
    const key = keyOf(item);
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(item);
  }
  return found;
}
