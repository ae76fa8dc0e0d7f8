// Which heights of two layouts belong together, so that two pictures can move side by side.

class Alignment {
  constructor(from, to) {
    this.pairs = []; // the ops that both have, from top to bottom
    for (const node of from.nodes) {
      const other = to.byNumber.get(node.number);
      if (other) this.pairs.push({ y1: node.y, y2: other.y, dx: other.x - node.x });
    }
    this.pairs.sort((a, b) => a.y1 - b.y1);
    this.rising = [{ y1: 0, y2: 0 }]; // those that come in the same order in both
    for (const pair of this.pairs) {
      if (pair.y1 > this.rising.at(-1).y1 && pair.y2 > this.rising.at(-1).y2) this.rising.push(pair);
    }
    const last = this.rising.at(-1);
    this.rising.push({ y1: Math.max(from.height, last.y1 + 1), y2: Math.max(to.height, last.y2 + 1) });
  }

  // The height in `to` that corresponds to height `y` in `from`, in proportion between ops that both have.
  opposite(y) {
    const { rising } = this;
    if (y < 0) return y;
    const next = bisect(rising, y, 1, rising.length - 1);
    const [before, after] = [rising[next - 1], rising[next]];
    if (y > after.y1) return after.y2 + y - after.y1;
    return before.y2 + ((y - before.y1) / (after.y1 - before.y1)) * (after.y2 - before.y2);
  }

  // How much further to the right the ops at about height `y` stand in `to`.
  shift(y) {
    const here = bisect(this.pairs, y);
    const close = this.pairs.slice(Math.max(0, here - 20), here + 20);
    const weight = (pair) => 1 / (1 + ((pair.y1 - y) / 150) ** 4);
    return close.length ? d3.sum(close, (pair) => weight(pair) * pair.dx) / d3.sum(close, weight) : 0;
  }
}

const bisect = d3.bisector((pair) => pair.y1).left;
