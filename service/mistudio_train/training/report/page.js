"use strict";
(() => {
  const PER_PAGE = 12;
  const BANDS = ["strongest", "60 to 80% of the maximum", "40 to 60%", "20 to 40%", "below 20%"];
  const byId = (id) => document.getElementById(id);
  const index = JSON.parse(byId("index").textContent);
  const place = new Map(index.feature.map((feature, at) => [feature, at]));
  const packs = new Map();
  let order = [];
  let first = 0;

  const make = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  async function pack(number) {
    if (!packs.has(number)) {
      const bytes = Uint8Array.from(atob(byId(`pack-${number}`).textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      packs.set(number, new Response(stream).json());
    }
    return packs.get(number);
  }

  async function card(at) {
    const number = index.begins.findLastIndex((begin) => begin <= at);
    return (await pack(number))[at - index.begins[number]];
  }

  const mulberry = (seed) => () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };

  let seed = 1;
  function ordered(how) {
    const all = [...index.feature.keys()];
    if (how === "number") all.sort((a, b) => index.feature[a] - index.feature[b]);
    if (how === "frequent") all.sort((a, b) => index.rate[b] - index.rate[a]);
    if (how === "rare") all.sort((a, b) => index.rate[a] - index.rate[b]);
    if (how === "random") {
      const next = mulberry(seed++);
      for (let i = all.length - 1; i > 0; i--) {
        const j = Math.floor(next() * (i + 1));
        [all[i], all[j]] = [all[j], all[i]];
      }
    }
    return all;
  }

  function histogram(counts) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", `0 0 ${counts.length * 6} 34`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "how often it is how strong, from 0 to its maximum; heights are logarithms");
    const highest = Math.log1p(Math.max(1, ...counts));
    counts.forEach((count, i) => {
      const height = count ? Math.max(1.5, (32 * Math.log1p(count)) / highest) : 0;
      const bar = document.createElementNS(space, "rect");
      const attributes = { class: "bar", x: i * 6, y: 34 - height, width: 5, height };
      for (const [name, value] of Object.entries(attributes)) bar.setAttribute(name, value);
      svg.append(bar);
    });
    return svg;
  }

  function tokens(what, pairs) {
    const line = make("p", "tokens");
    line.append(make("span", "what", what));
    for (const [text, logit] of pairs) {
      const token = make("bdi", "token", text || " ");
      token.title = logit > 0 ? `+${logit}` : `${logit}`;
      line.append(token);
    }
    return line;
  }

  function context(one) {
    const line = make("p", "context");
    const value = make("span", "value", one.a.toPrecision(3));
    value.title = `text ${one.t}`;
    const words = make("span", "words");
    words.dir = "auto";
    const peak = one.s.indexOf(Math.max(...one.s));
    if (one.o & 1) words.append("… ");
    one.p.forEach((piece, i) => {
      if (!piece) return;
      if (!one.s[i] || one.p.length === 1) {
        words.append(piece);
        return;
      }
      const mark = make("mark", i === peak ? "peak" : "", piece);
      mark.style.setProperty("--strength", (0.08 + (0.6 * one.s[i]) / 99).toFixed(3));
      mark.title = `${one.s[i]}% of the maximum`;
      words.append(mark);
    });
    if (one.o & 2) words.append(" …");
    line.append(value, words);
    return line;
  }

  function drawn(one) {
    const box = make("article", "card");
    box.id = `feature-${one.n}`;
    const title = make("h3", "", `Feature ${one.n}`);
    title.append(make("bdi", "words", one.w.join(", ")));
    const facts = make("div", "facts");
    facts.append(histogram(one.h));
    facts.append(make("span", "", `active on ${(100 * one.r).toPrecision(2)}% of the ${index.rows_are}`));
    facts.append(make("span", "", `strongest ${one.m.toPrecision(3)}`));
    box.append(title, facts);
    if (one.u) box.append(tokens("promotes", one.u), tokens("suppresses", one.d));
    let band = -1;
    for (const found of one.c) {
      if (found.b !== band) box.append(make("p", "band", BANDS[(band = found.b)]));
      box.append(context(found));
    }
    if (one.x.length) {
      const near = make("p", "tokens near");
      near.append(make("span", "what", "nearest directions"));
      for (const [feature, cosine] of one.x) {
        const go = make("button", "", `${feature} (${cosine.toFixed(2)})`);
        go.type = "button";
        go.addEventListener("click", () => jump(feature));
        near.append(go);
      }
      box.append(near);
    }
    return box;
  }

  let turn = 0;
  async function show() {
    const mine = ++turn;
    const some = order.slice(first, first + PER_PAGE);
    const cards = await Promise.all(some.map(card));
    if (mine !== turn) return;
    byId("cards").replaceChildren(...cards.map(drawn));
    const last = Math.min(order.length, first + PER_PAGE);
    byId("where").textContent = order.length ? `${first + 1} to ${last} of ${order.length}` : "none to show";
    byId("back").disabled = first === 0;
    byId("next").disabled = last === order.length;
  }

  function turnTo(page) {
    first = Math.max(0, Math.min(page, order.length - 1));
    return show();
  }

  function use(how) {
    byId("order").value = how;
    order = ordered(how);
    return turnTo(0);
  }

  function jump(feature) {
    const at = place.get(feature);
    byId("number").value = feature;
    if (at === undefined) {
      const there = Number.isInteger(feature) && feature >= 0 && feature < index.total;
      byId("where").textContent = there
        ? `Feature ${feature} is never active, or too weak to be on this page`
        : `There are features 0 to ${index.total - 1}`;
      return;
    }
    byId("order").value = "number";
    order = ordered("number");
    turnTo(order.indexOf(at)).then(() => byId("features").scrollIntoView());
  }

  byId("order").addEventListener("change", (event) => use(event.target.value));
  byId("next").addEventListener("click", () => turnTo(first + PER_PAGE));
  byId("back").addEventListener("click", () => turnTo(first - PER_PAGE));
  byId("number").addEventListener("change", (event) => {
    if (event.target.value !== "") jump(Number(event.target.value));
  });
  for (const go of document.querySelectorAll("button[data-feature]")) {
    go.addEventListener("click", () => jump(Number(go.dataset.feature)));
  }
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const keys = {
      n: () => !byId("next").disabled && turnTo(first + PER_PAGE),
      p: () => !byId("back").disabled && turnTo(first - PER_PAGE),
      r: () => use("random"),
      "/": () => byId("number").focus(),
    };
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  });
  use("strongest").then(() => {
    document.documentElement.dataset.ready = "yes";
  });
})();
