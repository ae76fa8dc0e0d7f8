// Puts the parts together: which pass, which graph, which op; search, keys and the address of what is shown.

class App {
  constructor() {
    this.model = new Model(JSON.parse(document.getElementById("data").textContent));
    this.find = (id) => document.getElementById(id);
    this.unfolded = new Set(); // keys of sections
    this.folding = true;
    this.selected = null;
    this.choice = "both";
    this.graphPath = "main";
    this.layouts = new Map();
    this.search = { query: "", found: [], index: -1 };
    this.setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    this.writeHead();
    const on = {
      select: (number, picture) => this.select(number, picture, false),
      unfold: (section) => this.setFolded(section, false),
      fold: (section) => this.setFolded(section, true),
      moved: (picture) => this.follow(picture),
      ready: (picture) => this.place(picture),
    };
    this.pictures = ["before", "after"].map((side) => new Picture(this.find("panes"), side, on));
    this.details = new Details(this.find("details"), this.model, {
      select: (number) => this.select(number, null, true), search: (query) => this.startSearch(query),
      find: (line) => this.findLine(line), close: () => this.select(null),
    });
    this.list = new PipelineList(this.find("pipeline"), this.model, (entry) => this.show(entry));
    this.listen();
    this.drawLegend();
    this.show(this.entryOfAddress() ?? this.list.entries[0]);
  }

  writeHead() {
    const { model, find } = this;
    const { passes } = model.report;
    find("title").textContent = model.title || "Trimtab report";
    const first = model.snapshot(model.steps[0]).ops.size, last = model.snapshot(model.steps.at(-1)).ops.size;
    const parts = [`${text.count(first)} → ${text.count(last)} ops`];
    const [was, is] = [passes[0]?.macs_before, passes.at(-1)?.macs_after].map((macs) => macs && text.macs(macs));
    if (was && is) parts.push(was === is ? `${is} MACs` : `${was} → ${is} MACs`);
    if (passes.length) parts.push(`${text.bytes(passes.at(-1).weight_bytes_after || passes[0].weight_bytes_before)} of weights`);
    find("summary").textContent = [...parts, text.seconds(model.seconds)].join(" · ");
    if (model.failure) find("summary").prepend(element("b", { class: "error" }, "failed · "));
  }

  // -- what is shown ------------------------------------------------------------------------------------------------

  show(entry) {
    this.entry = entry;
    this.marks = this.model.compare(entry.before, entry.after);
    this.list.mark(entry);
    const paths = [...new Set([...entry.before.graphs, ...entry.after.graphs].map((graph) => graph.path))];
    if (!paths.includes(this.graphPath)) this.graphPath = paths[0];
    this.fillGraphMenu(paths);
    if (this.selected !== null && !this.graphs().some((graph) => graph?.values.has(this.selected))) this.selected = null;
    this.runSearch();
    this.layOut();
    this.arrangePanes();
    this.showDetails();
    this.hunk = -1;
    this.writeChanges();
    this.placeAll();
    this.writeAddress();
  }

  graphs() {
    return [this.entry.before, this.entry.after].map((snapshot) => snapshot.graphs.find((graph) => graph.path === this.graphPath));
  }

  layOut() {
    this.graphs().forEach((graph, index) => {
      const picture = this.pictures[index];
      if (!graph) return picture.show(null, new Map());
      picture.selected = this.selected;
      picture.show(this.layoutOf(graph), this.marks);
      const counts = { added: 0, removed: 0, changed: 0 };
      for (const op of graph.ops) if (this.marks.has(op.number)) counts[this.marks.get(op.number)]++;
      const shown = [["removed", "−"], ["added", "+"], ["changed", "~"]].filter(([mark]) => counts[mark]);
      picture.caption.replaceChildren(
        element("b", {}, this.marks.size ? picture.label : "graph"), ` ${text.count(graph.ops.length)} ops`,
        ...shown.map(([mark, sign]) => element("span", { class: `mark ${mark}` }, `${sign}${text.count(counts[mark])}`)));
      picture.canvas.setAttribute("aria-label", `Graph ${graph.path} ${picture.label}: ${graph.ops.length} ops`);
    });
  }

  // Layouts of the graphs seen last; each holds the boxes of all ops.
  layoutOf(graph) {
    let layout = this.layouts.get(graph);
    this.layouts.delete(graph);
    if (!layout) layout = new Layout(graph, (section) => this.isFolded(graph, section));
    else if (layout.folds !== this.foldsKey()) layout.stack((section) => this.isFolded(graph, section));
    layout.folds = this.foldsKey();
    this.layouts.set(graph, layout);
    if (this.layouts.size > 6) this.layouts.delete(this.layouts.keys().next().value);
    return layout;
  }

  // A section is known by its first op, which both sides of a pass usually share.
  keyOf(graph, section) {
    return graph.ops[section.start].number;
  }

  isFolded(graph, section) {
    return this.folding && !this.unfolded.has(this.keyOf(graph, section));
  }

  foldsKey() {
    return `${this.folding} ${[...this.unfolded].join()}`;
  }

  setFolded(section, folded) {
    const graphs = this.graphs().filter(Boolean);
    const graph = graphs.find((one) => one.sections.includes(section));
    const ops = new Set(graph.ops.slice(section.start, section.start + section.length * section.times).map((op) => op.number));
    for (const other of graphs) {
      for (const one of other.sections) { // the same blocks on the other side
        const inside = other.ops.slice(one.start, one.start + one.length * one.times);
        if (one.times < 2 || !inside.some((op) => ops.has(op.number))) continue;
        if (folded) this.unfolded.delete(this.keyOf(other, one));
        else this.unfolded.add(this.keyOf(other, one));
      }
    }
    this.folding = true;
    this.restack();
  }

  setFolding(folding) {
    this.folding = folding;
    this.unfolded.clear();
    this.restack();
  }

  // New folds: lay out again and keep what is in the middle of the window in place.
  restack() {
    const anchors = this.pictures.map((picture) => {
      if (!picture.layout) return null;
      const y = (picture.size.height * 0.42 - picture.view.y) / picture.view.k;
      const node = nearest(picture.layout.nodes.filter((one) => !one.fold), (one) => Math.abs(one.y - y));
      return node && { node, screen: node.y * picture.view.k + picture.view.y };
    });
    this.layOut();
    this.pictures.forEach((picture, index) => {
      const anchor = anchors[index];
      if (anchor) picture.moveTo({ ...picture.view, y: anchor.screen - anchor.node.y * picture.view.k });
    });
    this.find("fold").setAttribute("aria-pressed", String(this.folding));
    this.writeChanges();
  }

  arrangePanes() {
    const same = !this.marks.size;
    const view = same ? "after" : this.choice;
    document.body.dataset.view = view;
    document.querySelectorAll("[data-view]").forEach((button) => {
      if (button.tagName !== "BUTTON") return;
      button.disabled = same;
      button.setAttribute("aria-pressed", String(!same && button.dataset.view === view));
    });
  }

  get visible() {
    return this.pictures.filter((picture) => picture.root.offsetParent !== null && picture.layout);
  }

  // Where to look when another pass is chosen: at the selected op, else at the first change, else at the top.
  placeAll() {
    this.visible.forEach((picture) => picture.resize()); // the observer comes later
    this.visible.forEach((picture) => this.place(picture, false));
    const leader = this.leader();
    if (leader) this.follow(leader);
  }

  place(picture) {
    if (!picture.layout || !picture.size.width) return;
    picture.fit();
    const wanted = picture.layout.byNumber.get(this.selected) ?? (this.entry.row ? this.firstChange(picture) : null);
    if (wanted && !picture.isVisible(wanted)) picture.centre(wanted, false, picture.view.k);
  }

  firstChange(picture) {
    return picture.layout.nodes.find((node) => this.marks.has(node.number));
  }

  leader() {
    const shown = this.visible;
    return shown.find((picture) => picture.layout.byNumber.has(this.selected) && this.selected !== null)
      ?? shown.find((picture) => this.firstChange(picture)) ?? shown[0];
  }

  // The other picture moves along: the ops that both have stay side by side.
  follow(picture) {
    const other = this.visible.find((one) => one !== picture);
    if (!other || this.following) return;
    const middle = (picture.size.height * 0.42 - picture.view.y) / picture.view.k;
    const { y, dx } = this.opposite(picture.layout, other.layout, middle);
    const { k } = picture.view;
    this.following = true;
    const across = (picture.size.width / 2 - picture.view.x) / k + dx;
    other.moveTo({ k, x: other.size.width / 2 - across * k, y: picture.size.height * 0.42 - y * k });
    this.following = false;
  }

  // The height in `to` that corresponds to height `y` in `from`, in proportion between the ops that both have; and how
  // far such ops near it stand to the right.
  opposite(from, to, y) {
    const { pairs, rising } = this.pairsOf(from, to);
    const next = d3.bisector((pair) => pair.y1).left(rising, y, 1, rising.length - 1);
    const before = rising[next - 1], after = rising[next];
    const share = (y - before.y1) / (after.y1 - before.y1);
    const opposite = y < 0 ? y : y > after.y1 ? after.y2 + y - after.y1 : before.y2 + share * (after.y2 - before.y2);
    const here = d3.bisector((pair) => pair.y1).left(pairs, y);
    const close = pairs.slice(Math.max(0, here - 20), here + 20);
    const weight = (pair) => 1 / (1 + ((pair.y1 - y) / 150) ** 4);
    const dx = close.length ? d3.sum(close, (pair) => weight(pair) * pair.dx) / d3.sum(close, weight) : 0;
    return { y: opposite, dx };
  }

  // The ops that two layouts share, from top to bottom, and those of them that come in the same order in both.
  pairsOf(from, to) {
    const known = this.pairs;
    if (known?.from === from && known.to === to && known.folds === this.foldsKey()) return known;
    const pairs = [];
    for (const node of from.nodes) {
      const other = to.byNumber.get(node.number);
      if (other) pairs.push({ y1: node.y, y2: other.y, dx: other.x - node.x });
    }
    pairs.sort((a, b) => a.y1 - b.y1);
    const rising = [{ y1: 0, y2: 0 }];
    for (const pair of pairs) if (pair.y1 > rising.at(-1).y1 && pair.y2 > rising.at(-1).y2) rising.push(pair);
    rising.push({ y1: Math.max(from.height, rising.at(-1).y1 + 1), y2: Math.max(to.height, rising.at(-1).y2 + 1) });
    return this.pairs = { from, to, folds: this.foldsKey(), pairs, rising };
  }

  // -- ops ----------------------------------------------------------------------------------------------------------

  // `move` brings the op into the window; a click on the picture leaves that picture where it is.
  select(number, clicked = null, move = true) {
    this.selected = number;
    if (number !== null && move) this.reveal(number);
    for (const picture of this.pictures) {
      picture.selected = number;
      picture.redraw();
    }
    if (number !== null && move) {
      const picture = this.visible.find((one) => one.layout.byNumber.has(number));
      if (picture) picture.centre(picture.layout.byNumber.get(number));
    }
    this.showDetails(clicked);
    this.writeAddress();
  }

  // Unfold the block that an op is in.
  reveal(number) {
    for (const picture of this.visible) {
      const node = picture.layout.byNumber.get(number);
      if (node?.fold) {
        this.setFolded(node.fold.fold, false);
        return;
      }
    }
  }

  showDetails(clicked = null) {
    const { selected, entry, details, marks } = this;
    if (selected !== null) {
      const [before, after] = this.graphs();
      const sides = clicked === this.pictures[0] ? [before, after] : [after, before];
      const graph = sides.find((one) => one?.values.has(selected));
      if (graph) return details.showOp(graph, selected, marks.get(selected), entry.row ? entry.row.name : "whole run");
    }
    if (entry.row) details.showPass(entry, marks);
    else details.showRun(entry, marks);
  }

  // -- changes ------------------------------------------------------------------------------------------------------

  // Changed ops that stand close together in the picture, as one place to look at; folded ones with their fold.
  hunks() {
    const picture = this.leader();
    if (!picture || !this.marks.size) return [];
    const both = this.visible.length > 1;
    const found = [];
    for (const one of both ? this.visible : [picture]) {
      let last = null;
      for (const item of one.layout.elements) {
        for (const node of item.fold ? item.members : [...item.stretch.members].sort((a, b) => a.y - b.y)) {
          if (!this.marks.has(node.number)) continue;
          if (last && last.item === item && (item.fold || node.y - last.bottom < 160)) last.bottom = node.y;
          else found.push(last = { picture: one, item, node, bottom: node.y, y: this.heightInFirst(one, node) });
        }
      }
    }
    found.sort((a, b) => a.y - b.y);
    // What was removed on one side and added on the other is one place.
    return found.filter((hunk, index) => index === 0 || hunk.y - found[index - 1].y > 90 || hunk.picture === found[index - 1].picture);
  }

  heightInFirst(picture, node) {
    const first = this.visible[0];
    return picture === first ? node.y : this.opposite(picture.layout, first.layout, node.y).y;
  }

  step(direction) {
    const hunks = this.hunks();
    if (!hunks.length) return;
    this.hunk = (Math.max(this.hunk, direction > 0 ? -1 : 0) + direction + hunks.length) % hunks.length;
    const { picture, node } = hunks[this.hunk];
    picture.centre(node);
    this.writeChanges(hunks.length);
  }

  writeChanges(count = this.hunks().length) {
    const where = this.hunk >= 0 ? `${this.hunk + 1} of ` : "";
    this.find("changes").textContent = count ? `${where}${count} change${count > 1 ? "s" : ""}` : "no changes";
    this.find("previous-change").disabled = this.find("next-change").disabled = !count;
  }

  // -- search -------------------------------------------------------------------------------------------------------

  startSearch(query) {
    this.find("search").value = query;
    this.find("search").focus();
    this.setQuery(query);
  }

  setQuery(query) {
    this.search.query = query.trim().toLowerCase();
    this.search.index = -1;
    this.runSearch();
    for (const picture of this.pictures) picture.refresh();
  }

  runSearch() {
    const words = this.search.query.split(/\s+/).filter(Boolean);
    const numbers = new Map();
    if (words.length) {
      for (const graph of [...this.graphs()].reverse()) {
        if (!graph) continue;
        for (const input of graph.inputs) {
          if (matches(words, `input %${input.name} ${input.type}`)) numbers.set(input.number, { graph, input });
        }
        for (const op of graph.ops) if (!numbers.has(op.number) && matches(words, this.haystack(graph, op))) numbers.set(op.number, { graph, op });
      }
    }
    this.search.found = [...numbers].map(([number, where]) => ({ number, ...where }));
    for (const picture of this.pictures) picture.found = new Set(numbers.keys());
    this.writeSearch();
  }

  haystack(graph, op) {
    return `${graph.textOf(op)} ${op.family} ${op.madeBy} ${text.location(op.location)} ${op.location.function} ${this.marks.get(op.number) ?? ""}`;
  }

  writeSearch() {
    const { found, query, index } = this.search;
    const results = this.find("search-results");
    const focused = document.activeElement === this.find("search");
    this.find("search-count").textContent = query ? (index >= 0 ? `${index + 1}/${found.length}` : `${found.length}`) : "";
    results.hidden = !query || !focused;
    if (results.hidden) return;
    const start = Math.max(0, Math.min(index - 4, found.length - 40));
    results.replaceChildren(...(found.length ? found.slice(start, start + 40).map(({ number, graph, op, input }, offset) =>
      element("li", {}, element("button", {
        type: "button", "aria-current": start + offset === index, onclick: () => this.goTo(start + offset),
        onmousedown: (event) => event.preventDefault(), // keep the focus in the search field
      }, dot(op ? op.family : "input"), element("b", {}, op ? op.mnemonic : "input"),
      element("span", {}, op ? op.results.map((result) => graph.nameOf(result.number)).join(", ") : `%${input.name}`),
      element("small", {}, op ? text.location(op.location) : input.type))))
      : [element("li", { class: "none" }, "nothing in this graph")]));
    results.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  goTo(index) {
    const { found } = this.search;
    if (!found.length) return;
    this.search.index = (index + found.length) % found.length;
    this.select(found[this.search.index].number);
    this.writeSearch();
  }

  // The op that a line of text such as "%y = mul(%a, @w) : f32[2]" is about: by its name, else by what else it says.
  findLine(line) {
    const name = /^\s*%([^\s,=]+)/.exec(line)?.[1];
    for (const graph of this.graphs()) {
      const op = graph?.ops.find((one) => one.results.some((result) => result.name && result.name === name));
      if (op) return this.select(op.number);
    }
    const mnemonic = /=\s*(\w+)\(/.exec(line)?.[1] ?? "";
    this.startSearch([mnemonic, ...line.match(/@[^\s,)]+/g) ?? []].join(" "));
    if (this.search.found.length === 1) this.goTo(0);
  }

  // -- the rest -----------------------------------------------------------------------------------------------------

  fillGraphMenu(paths) {
    const menu = this.find("graph");
    menu.hidden = paths.length < 2;
    menu.replaceChildren(...paths.map((path) => element("option", { value: path, selected: path === this.graphPath }, path)));
  }

  drawLegend() {
    const families = new Set([...this.list.entries[0].before.ops.values(), ...this.list.entries[0].after.ops.values()].map((op) => op.family));
    const names = [...families].sort();
    this.find("legend").replaceChildren(
      element("div", {}, names.map((name) => element("span", {}, dot(name), name))),
      element("div", {}, ["added", "removed", "changed"].map((mark) => element("span", {}, element("i", { class: `ring ${mark}` }), mark === "changed" ? "rewired" : mark))),
      element("p", {}, "drag or scroll to move · ", element("kbd", {}, "Ctrl"), " + scroll to zoom"));
  }

  setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    this.find("theme").textContent = theme === "dark" ? "☀" : "☾";
    for (const picture of this.pictures ?? []) picture.refresh();
  }

  setView(choice) {
    this.choice = choice;
    this.arrangePanes();
    this.placeAll();
    this.writeChanges();
  }

  entryOfAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    if (given.has("op")) this.selected = Number(given.get("op"));
    const step = Number(given.get("pass") ?? 0);
    return this.list.entries[step];
  }

  writeAddress() {
    const parts = [`pass=${this.list.entries.indexOf(this.entry)}`];
    if (this.selected !== null) parts.push(`op=${this.selected}`);
    history.replaceState(null, "", `#${parts.join("&")}`);
  }

  listen() {
    const { find } = this;
    const click = (id, action) => find(id).addEventListener("click", action);
    const all = (action) => {
      const leader = this.leader();
      if (leader) action(leader);
    };
    click("fold", () => this.setFolding(!this.folding || this.unfolded.size > 0));
    click("zoom-in", () => all((picture) => picture.scaleBy(1.4)));
    click("zoom-out", () => all((picture) => picture.scaleBy(1 / 1.4)));
    click("fit", () => all((picture) => picture.fit(true)));
    click("next-change", () => this.step(1));
    click("previous-change", () => this.step(-1));
    click("theme", () => this.setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
    document.querySelectorAll("button[data-view]").forEach((button) => button.addEventListener("click", () => this.setView(button.dataset.view)));
    find("graph").addEventListener("change", (event) => {
      this.graphPath = event.target.value;
      this.select(null);
      this.show(this.entry);
    });
    const search = find("search");
    search.addEventListener("input", () => this.setQuery(search.value));
    search.addEventListener("focus", () => this.writeSearch());
    search.addEventListener("blur", () => this.writeSearch());
    search.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, Enter: event.shiftKey ? -1 : 1, ArrowUp: -1 }[event.key];
      if (step) {
        event.preventDefault();
        this.goTo(this.search.index + step);
      } else if (event.key === "Escape") {
        search.value = "";
        this.setQuery("");
        search.blur();
      }
    });
    window.addEventListener("hashchange", () => this.show(this.entryOfAddress() ?? this.entry));
    window.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT/.test(document.activeElement?.tagName)) return;
      const neighbour = (step) => {
        const next = this.list.entries[this.list.entries.indexOf(this.entry) + step];
        if (next) this.show(next);
      };
      const actions = {
        "/": () => search.focus(), n: () => this.step(1), p: () => this.step(-1), f: () => find("fit").click(),
        b: () => find("fold").click(), "+": () => find("zoom-in").click(), "=": () => find("zoom-in").click(),
        "-": () => find("zoom-out").click(), j: () => neighbour(1), k: () => neighbour(-1), Escape: () => this.select(null),
      };
      if (!actions[event.key]) return;
      event.preventDefault();
      actions[event.key]();
    });
  }
}

const matches = (words, haystack) => {
  const lower = haystack.toLowerCase();
  return words.every((word) => lower.includes(word));
};

const nearest = (items, distance) => items.reduce((best, item) => (best === null || distance(item) < distance(best) ? item : best), null);

window.report = new App();
