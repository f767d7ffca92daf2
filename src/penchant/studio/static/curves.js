// Curves of runs as they grow: what the server has added is appended, one plot for each metric, all runs in it.
"use strict";

(() => {
  for (const box of document.querySelectorAll("details.report")) {
    box.addEventListener("toggle", () => {
      const frame = box.querySelector("iframe");
      if (box.open && !frame.src) frame.src = frame.dataset.src;
    });
  }
  const root = document.getElementById("curves");
  if (!root || !window.uPlot) return;

  const paths = JSON.parse(root.dataset.runs);
  const titles = JSON.parse(root.dataset.titles);
  const smoothing = document.getElementById("smoothing");
  const logarithmic = document.getElementById("logarithmic");
  const connection = document.getElementById("connection");
  const hidden = new Set();
  const states = {}; // by run
  const charts = new Map(); // by metric
  let known = {}; // by run: {line: {metric: [xs, ys]}, points: {metric: [xs, ys, lows, highs]}}

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faint = (name, share) => {
    const hex = color(name).replace("#", "");
    const [r, g, b] = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r}, ${g}, ${b}, ${share})`;
  };
  const figure = (value) => (value == null ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4)));
  // two ticks never read the same, however close they are
  const labels = (ticks) => {
    const [first, second] = ticks.filter((tick) => tick != null);
    const step = Math.abs(second - first);
    const close = (tick) => tick && step && step < Math.abs(tick) / 1000;
    return ticks.map((tick) => (tick == null ? "" : close(tick) ? tick.toFixed(Math.min(8, Math.max(0, Math.ceil(-Math.log10(step))))) : figure(tick)));
  };

  // an exponential mean that starts at the first value and forgets it as fast as it forgets any other
  const smooth = (values, weight) => {
    let sum = 0, mass = 0;
    return values.map((value) => {
      if (value == null) return null;
      sum = weight * sum + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return sum / mass;
    });
  };

  const take = (news) => {
    if (news.start) known = {};
    for (const [path, made] of Object.entries(news.runs)) {
      if (made.anew || !known[path]) known[path] = { line: {}, points: {} };
      for (const kind of ["line", "points"]) {
        for (const [metric, columns] of Object.entries(made[kind] || {})) {
          const there = (known[path][kind][metric] ||= columns.map(() => []));
          columns.forEach((column, i) => there[i].push(...column));
        }
      }
      if (made.facts) tell(path, made.facts);
    }
  };

  const tell = (path, facts) => {
    states[path] = facts.state;
    const at = [...document.querySelectorAll("[data-of]")].find((one) => one.dataset.of === path);
    if (!at) return;
    for (const place of at.querySelectorAll("[data-fact]")) {
      const value = facts[place.dataset.fact];
      if (place.tagName === "PROGRESS") place.value = value;
      else place.textContent = value || (place.classList.contains("value") ? "–" : "");
    }
    const list = document.getElementById("flags");
    if (!list) return;
    list.replaceChildren(...facts.flags.map((flag) => {
      const item = document.createElement("li");
      const title = document.createElement("b");
      const advice = document.createElement("span");
      item.className = flag.level === "warning" ? "warning" : "note";
      title.textContent = flag.title;
      advice.className = "soft";
      advice.textContent = flag.advice;
      item.append(title, ` ${flag.sentence} `, advice);
      return item;
    }));
    if (!facts.flags.length) list.innerHTML = '<li class="soft">none so far</li>';
    if (tell.samples !== undefined && tell.samples !== facts.samples) document.body.dispatchEvent(new Event("samples"));
    tell.samples = facts.samples;
    const doing = `${facts.state} ${facts.lock}`;
    if (tell.doing !== undefined && tell.doing !== doing) document.body.dispatchEvent(new Event("doing"));
    tell.doing = doing;
  };

  // the columns of a metric's plot: for each run its training curve (as it is, faint, and smoothed) and its held-out points
  const columnsOf = (metric) => {
    const tables = [], series = [{}], bands = [];
    const weight = +smoothing.value;
    const many = paths.filter((path) => !hidden.has(path)).length > 3;
    paths.forEach((path, number) => {
      const run = known[path];
      if (!run || hidden.has(path)) return;
      const name = `--c${number % 8}`;
      const line = run.line[metric], points = run.points[metric];
      const points_of = (size) => ({ show: true, size, stroke: color(name), fill: color(name) });
      if (line) {
        tables.push([line[0], line[1]], [line[0], smooth(line[1], weight)]);
        series.push({ stroke: faint(name, weight ? 0.25 : 0), width: 1, points: { show: false }, spanGaps: true });
        series.push({ label: "training", raw: weight > 0, run: path, stroke: color(name), width: 2, points: { show: line[0].length < 3 }, spanGaps: true });
      }
      if (points) {
        tables.push([points[0], points[1]]);
        series.push({ label: "held out", run: path, stroke: color(name), width: 1.5, dash: [5, 4], points: points_of(7), spanGaps: true });
        if (!many && points[2].some((low) => low != null)) {
          tables.push([points[0], points[3]], [points[0], points[2]]);
          const none = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };
          series.push({ ...none }, { ...none });
          bands.push({ series: [series.length - 2, series.length - 1], fill: faint(name, 0.13) });
        }
      }
    });
    return { data: tables.length ? uPlot.join(tables) : [[]], series, bands };
  };

  const under = (chart, u) => {
    const at = u.cursor.idx == null ? null : u.cursor.idx;
    const parts = [];
    u.series.forEach((one, i) => {
      if (!one.label || !one.run) return;
      const values = u.data[i];
      let place = at == null ? values.length - 1 : at;
      while (place >= 0 && values[place] == null) place -= 1;
      if (place < 0) return;
      const name = paths.length > 1 ? `${one.run.split("/").pop()} ${one.label}` : one.label;
      const smoothed = one.raw && paths.length === 1 ? ` (smoothed ${figure(values[place])})` : "";
      parts.push(`${name} ${figure((one.raw ? u.data[i - 1] : values)[place])}${smoothed}`);
    });
    const steps = u.data[0];
    const step = steps.length ? steps[at == null ? steps.length - 1 : at] : 0;
    const shown = parts.slice(0, 6).join(", ") + (parts.length > 6 ? `, and ${parts.length - 6} more` : "");
    chart.words.textContent = `step ${step}: ${shown}`;
    if (at == null) chart.plot.setAttribute("aria-label", `${chart.title} over steps; step ${step}: ${shown}`);
  };

  const draw = (metric) => {
    const made = columnsOf(metric);
    let chart = charts.get(metric);
    if (!chart) {
      const box = document.createElement("figure"), caption = document.createElement("figcaption");
      const plot = document.createElement("div"), words = document.createElement("p");
      caption.textContent = titles[metric] || metric;
      plot.setAttribute("role", "img");
      words.className = "under";
      box.append(caption, plot, words);
      const order = Object.keys(titles);
      const after = [...charts.keys()].find((other) => order.indexOf(other) > order.indexOf(metric));
      root.insertBefore(box, after ? charts.get(after).box : null);
      chart = { box, plot, words, title: caption.textContent, u: null, shape: "" };
      charts.set(metric, chart);
      new ResizeObserver(() => chart.u && chart.u.setSize({ width: plot.clientWidth, height: 210 })).observe(plot);
    }
    const values = made.series.flatMap((one, i) => (one.label ? made.data[i] || [] : []));
    const scaled = logarithmic.checked && values.length > 0 && values.every((v) => v == null || v > 0);
    const shape = JSON.stringify([made.series.map((s) => [s.label, s.run, s.stroke]), made.bands.length, scaled]);
    if (chart.u && chart.shape === shape) {
      chart.u.setData(made.data);
    } else {
      if (chart.u) chart.u.destroy();
      const axis = { stroke: color("--soft"), grid: { stroke: color("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
      const options = {
        width: Math.max(120, chart.plot.clientWidth), height: 210, legend: { show: false }, series: made.series, bands: made.bands,
        scales: { x: { time: false }, y: scaled ? { distr: 3 } : {} },
        axes: [{ ...axis, space: 60, size: 30 }, { ...axis, size: 58, values: (_, ticks) => labels(ticks) }],
        cursor: { y: false, points: { size: 6 }, sync: { key: "steps", setSeries: false } },
        hooks: { setCursor: [(u) => under(chart, u)], setData: [(u) => under(chart, u)] },
      };
      chart.u = new uPlot(options, made.data, chart.plot);
      chart.shape = shape;
    }
    under(chart, chart.u);
  };

  const redraw = () => {
    const metrics = new Set(Object.values(known).flatMap((run) => [...Object.keys(run.line), ...Object.keys(run.points)]));
    if (metrics.size) for (const note of root.querySelectorAll(":scope > p")) note.remove();
    for (const metric of Object.keys(titles)) if (metrics.has(metric)) draw(metric);
  };

  let source = null;
  const open = () => {
    if (source || document.hidden) return;
    source = new EventSource(root.dataset.feed);
    source.onmessage = (event) => {
      take(JSON.parse(event.data));
      redraw();
      connection.textContent = Object.values(states).some((state) => state === "running" || state === "preparing") ? "live" : "";
    };
    source.onerror = () => {
      const ended = source.readyState === EventSource.CLOSED; // it was refused: a studio with another token
      connection.textContent = ended ? "the studio was started anew: open the address that it printed" : "the studio cannot be reached; trying again";
    };
  };
  const close = () => { if (source) source.close(); source = null; };
  root.querySelector("p").textContent = "No step yet.";
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  window.addEventListener("pagehide", close);
  window.addEventListener("pageshow", open);
  smoothing.addEventListener("input", redraw);
  logarithmic.addEventListener("change", redraw);
  for (const box of document.querySelectorAll(".legend input")) {
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(box.dataset.run);
      else hidden.add(box.dataset.run);
      redraw();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  open();
})();
