// Puts the parts together: which pass, which graph, which op; search, keys and the address of what is shown.

class App {
  constructor() {
    this.model = new Model(JSON.parse(document.getElementById("data").textContent));
    this.find = (id) => document.getElementById(id);
    this.folds = new Folds();
    this.selected = null;
    this.choice = "both";
    this.graphPath = "main";
    this.layouts = new Map();
    this.visited = -1; // the change that was shown last
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
      select: (number) => this.select(number, null, true),
      search: (query) => this.search.start(query),
      find: (line) => this.findLine(line),
      close: () => this.select(null),
    });
    this.search = new Search({
      found: (numbers) => this.pictures.forEach((picture) => picture.highlight(numbers)),
      go: (number) => this.select(number),
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
    const first = model.snapshot(model.steps[0]).ops.size,
      last = model.snapshot(model.steps.at(-1)).ops.size;
    const parts = [`${text.count(first)} → ${text.count(last)} ops`];
    const [was, is] = [passes[0]?.macs_before, passes.at(-1)?.macs_after].map((macs) => macs && text.macs(macs));
    if (was && is) parts.push(was === is ? `${is} MACs` : `${was} → ${is} MACs`);
    if (passes.length)
      parts.push(`${text.bytes(passes.at(-1).weight_bytes_after || passes[0].weight_bytes_before)} of weights`);
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
    if (this.selected !== null && !this.graphs().some((graph) => graph?.values.has(this.selected)))
      this.selected = null;
    this.search.setGraphs(this.graphs().filter(Boolean).reverse(), this.marks);
    this.layOut();
    this.arrangePanes();
    this.showDetails();
    this.visited = -1;
    this.writeChanges();
    this.placeAll();
    this.writeAddress();
  }

  graphs() {
    return [this.entry.before, this.entry.after].map((snapshot) =>
      snapshot.graphs.find((graph) => graph.path === this.graphPath),
    );
  }

  layOut() {
    this.graphs().forEach((graph, index) => {
      const picture = this.pictures[index];
      picture.caption.hidden = !graph;
      if (!graph) return picture.show(null, new Map());
      picture.selected = this.selected;
      picture.show(this.layoutOf(graph), this.marks);
      picture.caption.replaceChildren(
        element("b", {}, this.marks.size ? picture.label : "graph"),
        ` ${text.count(graph.ops.length)} ops`,
        ...countMarks(graph.ops, this.marks).map(([mark, count]) =>
          element("span", { class: `mark ${mark}` }, `${SIGNS[mark]}${text.count(count)}`),
        ),
      );
      picture.canvas.setAttribute("aria-label", `Graph ${graph.path} ${picture.label}: ${graph.ops.length} ops`);
    });
  }

  // Layouts of the graphs seen last; each holds the boxes of all ops.
  layoutOf(graph) {
    let layout = this.layouts.get(graph);
    this.layouts.delete(graph);
    const isFolded = (section) => this.folds.isFolded(graph, section);
    if (!layout) layout = new Layout(graph, isFolded);
    else if (layout.folds !== this.folds.version) layout.stack(isFolded);
    layout.folds = this.folds.version;
    this.layouts.set(graph, layout);
    if (this.layouts.size > 6) this.layouts.delete(this.layouts.keys().next().value);
    return layout;
  }

  setFolded(section, folded) {
    this.folds.set(this.graphs().filter(Boolean), section, folded);
    this.restack();
  }

  // New folds: lay out again and keep what is in the middle of the window in place.
  restack() {
    const anchors = this.pictures.map((picture) => {
      if (!picture.layout) return null;
      const drawn = picture.layout.nodes.filter((one) => !one.fold);
      const node = nearest(drawn, (one) => Math.abs(one.y - picture.focus));
      return node && { node, screen: node.y * picture.view.k + picture.view.y };
    });
    this.layOut();
    this.pictures.forEach((picture, index) => {
      const anchor = anchors[index];
      if (anchor) picture.moveTo({ ...picture.view, y: anchor.screen - anchor.node.y * picture.view.k });
    });
    this.find("fold").setAttribute("aria-pressed", String(this.folds.all));
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
    return (
      shown.find((picture) => picture.layout.byNumber.has(this.selected) && this.selected !== null) ??
      shown.find((picture) => this.firstChange(picture)) ??
      shown[0]
    );
  }

  // The other picture moves along: the ops that both have stay side by side.
  follow(picture) {
    const other = this.visible.find((one) => one !== picture);
    if (!other) return;
    const alignment = this.alignment(picture, other);
    const { k } = picture.view;
    const across = (picture.size.width / 2 - picture.view.x) / k + alignment.shift(picture.focus);
    const y = picture.size.height * FOCUS - alignment.opposite(picture.focus) * k;
    other.moveTo({ k, x: other.size.width / 2 - across * k, y });
  }

  alignment(picture, other) {
    const key = [picture.layout, other.layout, this.folds.version];
    if (!this.aligned || key.some((part, index) => part !== this.aligned.key[index])) {
      this.aligned = { key, alignment: new Alignment(picture.layout, other.layout) };
    }
    return this.aligned.alignment;
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

  places() {
    const shown = this.visible.length > 1 ? this.visible : [this.leader()].filter(Boolean);
    return changedPlaces(shown, this.marks, (picture, y) =>
      picture === shown[0] ? y : this.alignment(picture, shown[0]).opposite(y),
    );
  }

  step(direction) {
    const places = this.places();
    if (!places.length) return;
    this.visited = (Math.max(this.visited, direction > 0 ? -1 : 0) + direction + places.length) % places.length;
    const { picture, node } = places[this.visited];
    picture.centre(node);
    this.writeChanges(places.length);
  }

  writeChanges(count = this.places().length) {
    const where = this.visited >= 0 ? `${this.visited + 1} of ` : "";
    this.find("changes").textContent = count ? `${where}${count} change${count > 1 ? "s" : ""}` : "no changes";
    this.find("previous-change").disabled = this.find("next-change").disabled = !count;
  }

  // The op that a line of text such as "%y = mul(%a, @w) : f32[2]" is about: by its name, else by what else it says.
  findLine(line) {
    const name = /^\s*%([^\s,=]+)/.exec(line)?.[1];
    for (const graph of this.graphs()) {
      const op = graph?.ops.find((one) => one.results.some((result) => result.name && result.name === name));
      if (op) return this.select(op.number);
    }
    const mnemonic = /=\s*(\w+)\(/.exec(line)?.[1] ?? "";
    this.search.start([mnemonic, ...(line.match(/@[^\s,)]+/g) ?? [])].join(" "));
    if (this.search.found.length === 1) this.search.go(0);
  }

  // -- the rest -----------------------------------------------------------------------------------------------------

  fillGraphMenu(paths) {
    const menu = this.find("graph");
    menu.hidden = paths.length < 2;
    menu.replaceChildren(
      ...paths.map((path) => element("option", { value: path, selected: path === this.graphPath }, path)),
    );
  }

  drawLegend() {
    const families = new Set(
      [...this.list.entries[0].before.ops.values(), ...this.list.entries[0].after.ops.values()].map((op) => op.family),
    );
    const names = [...families].sort();
    this.find("legend").replaceChildren(
      element(
        "div",
        {},
        names.map((name) => element("span", {}, dot(name), name)),
      ),
      element(
        "div",
        {},
        ["added", "removed", "changed"].map((mark) =>
          element("span", {}, element("i", { class: `ring ${mark}` }), mark === "changed" ? "rewired" : mark),
        ),
      ),
      element("p", {}, "drag or scroll to move · ", element("kbd", {}, "Ctrl"), " + scroll to zoom"),
    );
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
    click("fold", () => {
      this.folds.setAll(!this.folds.all || this.folds.open.size > 0);
      this.restack();
    });
    click("zoom-in", () => all((picture) => picture.scaleBy(1.4)));
    click("zoom-out", () => all((picture) => picture.scaleBy(1 / 1.4)));
    click("fit", () => all((picture) => picture.fit(true)));
    click("next-change", () => this.step(1));
    click("previous-change", () => this.step(-1));
    click("theme", () => this.setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
    document
      .querySelectorAll("button[data-view]")
      .forEach((button) => button.addEventListener("click", () => this.setView(button.dataset.view)));
    find("graph").addEventListener("change", (event) => {
      this.graphPath = event.target.value;
      this.select(null);
      this.show(this.entry);
    });
    window.addEventListener("hashchange", () => this.show(this.entryOfAddress() ?? this.entry));
    window.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT/.test(document.activeElement?.tagName))
        return;
      const neighbour = (step) => {
        const next = this.list.entries[this.list.entries.indexOf(this.entry) + step];
        if (next) this.show(next);
      };
      const actions = {
        "/": () => this.search.field.focus(),
        n: () => this.step(1),
        p: () => this.step(-1),
        f: () => find("fit").click(),
        b: () => find("fold").click(),
        "+": () => find("zoom-in").click(),
        "=": () => find("zoom-in").click(),
        "-": () => find("zoom-out").click(),
        j: () => neighbour(1),
        k: () => neighbour(-1),
        Escape: () => this.select(null),
      };
      if (!actions[event.key]) return;
      event.preventDefault();
      actions[event.key]();
    });
  }
}

const nearest = (items, distance) =>
  items.reduce((best, item) => (best === null || distance(item) < distance(best) ? item : best), null);

window.report = new App();
