"use strict";
(() => {
  const $ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const SVG = "http://www.w3.org/2000/svg";
  const state = JSON.parse(document.getElementById("state").textContent);
  const KEY = "penchant:" + location.pathname;
  document.documentElement.classList.add("js");
  let kept = {};
  try { kept = JSON.parse(sessionStorage.getItem(KEY) || "{}"); } catch { kept = {}; }

  // ---- read-outs: the figures come from the table behind each plot
  const plain = (text) => parseFloat(text.replace(/,/g, "").replace("\u2212", "-"));
  for (const figure of $("figure[data-axis]")) {
    const [low, high, left, right, top, bottom] = figure.dataset.axis.split(" ").map(Number);
    const svg = figure.querySelector("svg"), tip = figure.querySelector(".tip"), cross = figure.querySelector(".cross");
    let rows = null, heads = null, at = -1;
    const load = () => {
      if (rows) return;
      heads = $("thead th", figure).slice(1);
      rows = $("tbody tr", figure).map((tr) => ({ x: plain(tr.cells[0].textContent), cells: [...tr.cells] }));
    };
    const hide = () => { tip.hidden = true; cross.replaceChildren(); at = -1; };
    const show = (i) => {
      load();
      if (!rows.length) return;
      at = Math.max(0, Math.min(rows.length - 1, i));
      const row = rows[at], x = left + (high > low ? (row.x - low) / (high - low) : 0) * (right - left);
      const line = document.createElementNS(SVG, "line");
      for (const [k, v] of Object.entries({ x1: x, x2: x, y1: top, y2: bottom })) line.setAttribute(k, v);
      cross.replaceChildren(line);
      const made = [document.createElement("b")];
      made[0].textContent = figure.querySelector("thead th").textContent + " " + row.cells[0].textContent;
      heads.slice(0, 14).forEach((head, k) => {
        const value = row.cells[k + 1] ? row.cells[k + 1].textContent : "";
        if (!value) return;
        const item = document.createElement("div"), label = document.createElement("span"), number = document.createElement("span");
        label.className = "l"; label.textContent = head.textContent; number.textContent = value;
        item.append(label, number); made.push(item);
      });
      tip.replaceChildren(...made);
      tip.hidden = false;
      const scale = svg.clientWidth ? svg.clientWidth / svg.viewBox.baseVal.width : svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      const room = figure.clientWidth, want = x * scale + 12;
      tip.style.left = (want + tip.offsetWidth > room - 24 ? Math.max(0, x * scale - tip.offsetWidth - 12) : want) + "px";
      tip.style.top = "8px";
    };
    const nearest = (x) => rows.reduce((best, row, i) => Math.abs(row.x - x) < Math.abs(rows[best].x - x) ? i : best, 0);
    svg.addEventListener("pointermove", (event) => {
      load();
      const box = svg.getBoundingClientRect();
      const u = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      if (rows.length) show(nearest(low + (u - left) / (right - left) * (high - low)));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { load(); show(at < 0 ? (step > 0 ? 0 : rows.length - 1) : at + step); event.preventDefault(); }
      if (event.key === "Escape") hide();
    });
  }

  // ---- settings: point at one to see it alone, untick one to leave it out
  const off = new Set(kept.off || []);
  const drawOff = () => { for (const e of $("[data-g]")) e.classList.toggle("off", off.has(e.dataset.g)); };
  for (const box of $("[data-show]")) {
    const name = box.dataset.show, item = box.closest("label");
    box.checked = !off.has(name);
    box.addEventListener("change", () => { off[box.checked ? "delete" : "add"](name); drawOff(); keep(); });
    const focus = (on) => {
      document.documentElement.classList.toggle("focus", on);
      for (const e of $("[data-g]")) e.classList.toggle("hot", on && e.dataset.g === name);
    };
    item.addEventListener("pointerenter", () => focus(true));
    item.addEventListener("pointerleave", () => focus(false));
    box.addEventListener("focus", () => { if (box.matches(":focus-visible")) focus(true); });
    box.addEventListener("blur", () => focus(false));
  }
  drawOff();

  // ---- completions
  const shelf = document.querySelector(".shelf");
  let filters = {};
  if (shelf) {
    const holder = shelf.querySelector(".cards-of-text"), counter = shelf.querySelector(".count");
    const cards = $(".sample", holder).map((element, i) => ({
      element, i, prompt: element.querySelector(".prompt"), diff: element.querySelector(".diff"),
      answers: $("[data-m]", element).map((e) => ({ e, m: e.dataset.m, r: e.dataset.r === undefined ? null : +e.dataset.r, n: +e.dataset.n, text: e.querySelector("p") })),
    }));
    filters = Object.fromEntries($("[data-f]", shelf).map((e) => [e.dataset.f, e]));
    const value = (name) => (filters[name] ? filters[name].value : "");
    shelf.querySelector(".controls").hidden = false;
    const tone = (x) => (x > 0 ? "+" : x < 0 ? "\u2212" : "") + Number(Math.abs(x).toPrecision(3));
    const fits = (card, left, right, thirds) => {
      const want = value("won"), size = value("length");
      if (want) {
        if (!left || !right || left.r === null || right.r === null) return false;
        const winner = right.r > left.r ? "right" : right.r < left.r ? "left" : "tie";
        if (winner !== want) return false;
      }
      if (size === "right" || size === "left") {
        if (!left || !right || left === right) return false;
        if (size === "right" ? right.n <= left.n : left.n <= right.n) return false;
      }
      if (size === "short" && !(right && right.n <= thirds[0])) return false;
      if (size === "long" && !(right && right.n >= thirds[1])) return false;
      return true;
    };
    const mark = (ranges) => { if (window.CSS && CSS.highlights) CSS.highlights.set("found", new Highlight(...ranges)); };
    const find = (card, shown, word, ranges) => {
      let hit = false;
      for (const node of [card.prompt, ...shown.map((a) => a.text)]) {
        const text = node.textContent.toLowerCase();
        if (!text.includes(word)) continue;
        hit = true;
        const walk = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
        while (walk.nextNode() && ranges.length < 2000) {
          const part = walk.currentNode.data.toLowerCase();
          for (let at = part.indexOf(word); at >= 0 && part.length === walk.currentNode.data.length; at = part.indexOf(word, at + word.length)) {
            const range = new Range();
            range.setStart(walk.currentNode, at); range.setEnd(walk.currentNode, at + word.length);
            ranges.push(range);
          }
        }
      }
      return hit;
    };
    const apply = () => {
      const word = value("text").trim().toLowerCase(), all = value("right") === "all", ranges = [];
      const lengths = cards.map((c) => c.answers.find((a) => a.m === value("right")) || c.answers[c.answers.length - 1]).filter(Boolean).map((a) => a.n).sort((a, b) => a - b);
      const thirds = [lengths[Math.floor(lengths.length / 3)], lengths[Math.floor(2 * lengths.length / 3)]];
      const seen = [];
      for (const card of cards) {
        const left = card.answers.find((a) => a.m === value("left"));
        const right = all ? card.answers[card.answers.length - 1] : card.answers.find((a) => a.m === value("right"));
        const shown = all ? card.answers : [...new Set([left, right])].filter(Boolean);
        for (const a of card.answers) { a.e.hidden = !shown.includes(a); a.e.classList.remove("won"); }
        if (!all && left) card.element.querySelector(".answers").prepend(left.e);
        const judged = shown.filter((a) => a.r !== null), top = Math.max(...judged.map((a) => a.r));
        if (judged.length > 1 && judged.filter((a) => a.r === top).length === 1) judged.find((a) => a.r === top).e.classList.add("won");
        card.gain = !all && left && right && left.r !== null && right.r !== null ? right.r - left.r : null;
        card.diff.textContent = card.gain === null || left === right ? "" : tone(card.gain);
        card.size = right ? right.n : 0;
        let ok = shown.length > 0 && fits(card, left, right, thirds);
        if (ok && word) ok = find(card, shown, word, ranges);
        card.element.hidden = !ok;
        if (ok) seen.push(card);
      }
      const by = value("sort"), last = (x) => (x === null ? -Infinity : x);
      const order = { gain: (a, b) => last(b.gain) - last(a.gain), loss: (a, b) => last(b.gain === null ? null : -b.gain) - last(a.gain === null ? null : -a.gain), long: (a, b) => b.size - a.size }[by];
      holder.append(...[...cards].sort((a, b) => (order ? order(a, b) : 0) || a.i - b.i).map((c) => c.element));
      counter.textContent = seen.length === cards.length ? cards.length.toLocaleString("en") + " prompts." : seen.length.toLocaleString("en") + " of " + cards.length.toLocaleString("en") + " prompts.";
      mark(ranges);
    };
    for (const [name, element] of Object.entries(filters)) {
      if (name === "open") continue;
      if (kept.filters && name in kept.filters && (element.tagName === "INPUT" || [...element.options].some((o) => o.value === kept.filters[name]))) element.value = kept.filters[name];
      let timer = 0;
      element.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => { apply(); keep(); }, name === "text" ? 120 : 0); });
    }
    filters.open.addEventListener("click", () => {
      const open = filters.open.textContent === "Open all";
      for (const card of cards) card.element.open = open;
      filters.open.textContent = open ? "Close all" : "Open all";
      keep();
    });
    cards.forEach((c) => { c.element.dataset.key = "card-" + c.i; });
    apply();
  }

  // ---- what is open and where the reader is outlives a reload
  const folds = $("details[data-key]");
  if (kept.open) for (const fold of folds) if (fold.dataset.key in kept.open) fold.open = kept.open[fold.dataset.key];
  function keep() {
    const open = Object.fromEntries($("details[data-key]").map((d) => [d.dataset.key, d.open]));
    const chosen = Object.fromEntries(Object.entries(filters).filter(([n]) => n !== "open").map(([n, e]) => [n, e.value]));
    try { sessionStorage.setItem(KEY, JSON.stringify({ open, filters: chosen, off: [...off], y: scrollY })); } catch { /* then it starts anew */ }
  }
  for (const fold of folds) fold.addEventListener("toggle", keep);
  if (typeof kept.y === "number" && state.running) { history.scrollRestoration = "manual"; scrollTo(0, kept.y); }

  // ---- a run that goes on
  if (state.running) {
    const written = document.getElementById("written");
    const age = () => Math.max(0, Math.round(Date.now() / 1000 - state.written));
    const words = (s) => (s < 90 ? s + " s" : s < 5400 ? Math.round(s / 60) + " min" : Math.round(s / 3600) + " h");
    const loaded = Date.now();
    const tick = () => {
      written.textContent = words(age()) + " ago";
      const typing = document.activeElement && document.activeElement.matches("input[type=search]") && document.activeElement.value;
      const due = Date.now() - loaded > 1000 * (age() > 3600 ? 10 * state.every : state.every);
      if (due && !document.hidden && !typing) { keep(); location.reload(); }
    };
    tick();
    setInterval(tick, 1000);
  }
})();
