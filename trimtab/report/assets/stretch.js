// The shape of a stretch of ops: dagre finds the layers and the order in them, and the boxes are moved so that the main
// lines run straight.

const SPACE = { node: 16, edge: 12 };

// The shape of a stretch by itself: positions of its members, its lines, and where values arrive and leave.
const shapeOf = (() => {
  const known = new Map();
  return (stretch) => {
    const place = new Map(stretch.members.map((node, index) => [node, index]));
    const leaving = [...stretch.leaving.keys()];
    const plan = {
      boxes: stretch.members.map((node) => [node.width, node.height, node.kind === "input"]),
      edges: stretch.edges.map(([from, to]) => [place.get(from), place.get(to)]),
      arriving: [...stretch.arriving].map(([value, readers]) => [
        leaving.indexOf(value),
        readers.map((node) => place.get(node)),
      ]),
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
  const [left, right] = d3.extent([
    ...nodes.flatMap((n) => [n.x - n.width / 2, n.x + n.width / 2]),
    ...lines.flatMap((line) => line.segments.map(([x]) => x)),
  ]);
  const [top, bottom] = d3.extent(nodes.flatMap((n) => [n.y - n.height / 2, n.y + n.height / 2]));
  const middle = (left + right) / 2;
  const ports = (side, count) => Array.from({ length: count }, (_, index) => graph.node(`${side}${index}`));
  const ins = ports("in", arriving.length),
    outs = ports("out", leaving.length);
  // A port that is not at the edge of the stretch is led to it.
  ins.forEach((n) => {
    if (n.y > top + 1) lines.push({ segments: [[n.x, top, n.y]] });
  });
  outs.forEach((n) => {
    if (n.y < bottom - 1) lines.push({ segments: [[n.x, n.y, bottom]] });
  });
  for (const line of lines) line.segments = line.segments.map(([x, y1, y2]) => [x - middle, y1 - top, y2 - top]);
  return {
    x: boxes.map((_, index) => graph.node(index).x - middle),
    y: boxes.map((_, index) => graph.node(index).y - top),
    lines,
    arriving: ins.map((n) => n.x - middle),
    leaving: outs.map((n) => n.x - middle),
    height: bottom - top,
    left: left - middle,
    right: right - middle,
  };
}

// Moves the boxes within the layers that dagre found, in the order that it found, so that the main lines run straight.
//
// Each layer in turn goes where its neighbours above, or below, are: the weighted sum of distances is minimised under
// the order and the least distances, which is an isotonic regression (pool adjacent violators). Constants and what is
// computed from them weigh little: they stand beside the ops that read them and push nothing aside.
function straighten(graph) {
  const boxes = new Map(graph.nodes().map((name) => [name, Object.assign(graph.node(name), { links: [] })]));
  const isConstant = new Map();
  for (const [name, box] of boxes) {
    // in the order of execution
    isConstant.set(name, !box.isInput && !box.isPort && graph.predecessors(name).every((one) => isConstant.get(one)));
  }
  const items = [...boxes.values()];
  const chains = graph.edges().map(({ v, w }) => {
    const bends = graph
      .edge(v, w)
      .points.slice(1, -1)
      .map(({ x, y }) => ({ x, y, width: 0, height: 0, links: [] }));
    items.push(...bends);
    const chain = [boxes.get(v), ...bends, boxes.get(w)];
    for (let index = 1; index < chain.length; index++) {
      // A long edge, such as a residual, is straight itself but does not pull at its ends.
      const isInner = index > 1 && index < chain.length - 1,
        isLong = bends.length > 1;
      const weight = (isConstant.get(v) ? 0.02 : 1) * (isInner ? 0.3 : isLong ? 0.05 : 1);
      chain[index - 1].links.push({ to: chain[index], weight, isBelow: true });
      chain[index].links.push({ to: chain[index - 1], weight, isBelow: false });
    }
    return chain;
  });
  const layers = [...groups(items, (item) => Math.round(item.y))]
    .sort((a, b) => a[0] - b[0])
    .map(([, layer]) => layer.sort((a, b) => a.x - b.x));
  for (const layer of layers) {
    const [top, bottom] = d3.extent(layer.flatMap((item) => [item.y - item.height / 2, item.y + item.height / 2]));
    layer.forEach((item) => {
      item.layer = { top, bottom };
    });
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
    const loose = item.links.length ? item : (layer.find((other) => other.links.length) ?? item);
    const wishes = links.length ? links.map((link) => [link.to.x - offset, link.weight]) : [[loose.x - offset, 1e-4]];
    pools.push({ wishes, start: median(wishes), members: [[item, offset]] });
    while (pools.length > 1 && pools.at(-2).start > pools.at(-1).start) {
      const last = pools.pop(),
        pool = pools.at(-1);
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

// The edges as upright segments [x, top, bottom], one for each layer that they meet: a line bends between layers only,
// so that it does not touch what stands in them. The ends are spread over the sides of the boxes in the order in which
// they come.
function linesOf(chains) {
  const ends = new Map(chains.map((chain) => [chain, [0, 0]]));
  const spread = (side, end, neighbour) => {
    for (const [box, here] of groups(chains, (chain) => chain.at(end))) {
      const step = Math.min(14, Math.max(0, box.width - 28) / here.length);
      here.sort((a, b) => a.at(neighbour).x - b.at(neighbour).x);
      here.forEach((chain, index) => {
        ends.get(chain)[side] = box.x + (index - (here.length - 1) / 2) * step;
      });
    }
  };
  spread(0, 0, 1);
  spread(1, -1, -2);
  return chains.map((chain) => {
    const from = chain[0],
      to = chain.at(-1),
      [start, stop] = ends.get(chain);
    const bends = chain.slice(1, -1).filter(({ layer }) => layer.bottom > layer.top);
    return {
      segments: [
        [start, from.y + from.height / 2, from.layer.bottom],
        ...bends.map(({ x, layer }) => [x, layer.top, layer.bottom]),
        [stop, to.layer.top, to.y - to.height / 2],
      ],
      from: from.index,
      to: to.index,
      hasArrow: !to.isPort,
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
