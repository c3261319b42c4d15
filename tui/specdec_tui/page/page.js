"use strict";
// Shows what Python has told: no figure is made here, and all text is set as text.
(() => {
  const run = JSON.parse(document.getElementById("run").textContent);
  const find = (name) => document.querySelector(`[data-is="${name}"]`);
  const made = (tag, kind, text) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const fill = (name, parts) => find(name).replaceChildren(...parts);

  find("title").textContent = run.title;
  fill("facts", [run.facts.join(" · ")]);
  fill("headline", [made("b", "", run.headline[0]), run.headline[1]]);
  find("folded").textContent = `prompt, ${run.prompt.tokens} tokens`;
  find("prompt").textContent = run.prompt.text;
  fill("legend", run.legend.map(([mark, kind, words]) => {
    const item = made("li");
    item.append(made("span", kind, mark), ` ${words}`);
    return item;
  }));

  const words = run.cycles.map((cycle) => cycle.text.map(([text, kind]) => made("span", `${kind} later`, text)));
  fill("words", words.flat());
  const word = (token) => {
    const shown = made("span", token.kind);
    shown.append(token.mark, made("u", "", token.text));
    return shown;
  };
  const rows = run.cycles.map((cycle, at) => {
    const button = made("button", "ahead");
    const shown = made("span", "words");
    shown.append(...cycle.drafted.map(word), ...(cycle.own ? [word(cycle.own)] : []));
    button.append(made("span", "number", cycle.number), made("span", "muted", cycle.kept), shown, made("span", "took", cycle.took));
    button.addEventListener("click", () => go(at));
    return button;
  });
  fill("rows", rows.map((row) => { const item = made("li"); item.append(row); return item; }));
  const slider = find("slider");
  slider.max = run.cycles.length;

  let now = -1, token = 0, playing = 0; // the cycle shown, -1 before the first; the drafted token looked at

  function go(cycle, at) {
    const before = now;
    now = Math.max(-1, Math.min(run.cycles.length - 1, cycle));
    token = at === undefined ? (run.cycles[now] || { begin: 0 }).begin : at;
    for (let i = Math.max(0, Math.min(before, now)); i <= Math.max(before, now); i++) {
      for (const part of words[i]) {
        part.classList.toggle("later", i > now);
        part.classList.toggle("now", i === now);
      }
      rows[i].classList.toggle("ahead", i > now);
      if (i === now) rows[i].setAttribute("aria-current", "true");
      else rows[i].removeAttribute("aria-current");
    }
    if (now >= 0) {
      keep(rows[now], find("rows"));
      const last = words[now][words[now].length - 1];
      if (last) keep(last, find("words"));
    }
    slider.value = now + 1;
    draw();
  }

  // Scrolls the list alone: scrollIntoView would move the page that a reader is in.
  function keep(element, list) {
    const box = element.getBoundingClientRect(), view = list.getBoundingClientRect();
    if (box.top < view.top) list.scrollTop -= view.top - box.top;
    else if (box.bottom > view.bottom) list.scrollTop += box.bottom - view.bottom;
  }

  function scale(label, value, text, style, dart) {
    const row = made("div", "scale"), track = made("div", "track");
    if (dart) {
      const mark = made("div", "dart");
      mark.style.left = `${100 * value}%`;
      track.append(mark);
    } else if (value !== null) {
      const bar = made("div", `fill ${style}`);
      bar.style.width = `${100 * Math.max(0, Math.min(1, value))}%`;
      track.append(bar);
    }
    row.append(made("span", dart ? "muted" : style, label), track, made("span", "value", text));
    return row;
  }

  function draw() {
    const cycle = run.cycles[now];
    slider.setAttribute("aria-valuetext", cycle ? `cycle ${cycle.number} of ${run.cycles.length}` : "before the first cycle");
    if (!cycle) {
      fill("said", [run.cycles.length ? "Press → to run the first cycle: the draft proposes, the target judges." : run.ending]);
      fill("figures", []);
      fill("tokens", []);
      fill("decision", []);
      return;
    }
    const over = now === run.cycles.length - 1 ? [run.ending] : [];
    fill("said", [[...cycle.changed, cycle.said, ...over].join(" ")]);
    fill("figures", cycle.figures.map(([name, value]) => {
      const pair = made("div");
      pair.append(made("dt", "", name), made("dd", "", value));
      return pair;
    }));
    const all = [...cycle.drafted, ...(cycle.own ? [cycle.own] : [])];
    token = Math.max(0, Math.min(all.length - 1, token));
    fill("tokens", all.map((one, at) => {
      const button = made("button");
      button.append(word(one));
      button.setAttribute("aria-pressed", String(at === token));
      button.addEventListener("click", () => { token = at; draw(); find("tokens").children[at].focus(); });
      return button;
    }));
    const one = all[token];
    if (!one) { fill("decision", []); return; }
    const place = token < cycle.drafted.length ? `drafted token ${token + 1} of ${cycle.drafted.length}` : "the target's own";
    const parts = [made("p", "muted", `cycle ${cycle.number} · ${place}${cycle.by ? ` · by ${cycle.by}` : ""}`)];
    if (!one.scales) parts.push(made("p", "", one.why));
    else {
      parts.push(...one.scales.map(([label, value, text, style]) => scale(label, value, text, style)));
      if (one.draw) parts.push(scale("u, the draw", one.draw[0], one.draw[1], "", true));
      parts.push(made("p", `verdict ${one.kind}`, one.verdict), made("p", "muted", one.why));
      parts.push(...one.notes.map((note) => made("p", "muted", note)));
      if (one.left.length) parts.push(made("p", "muted", one.left_title));
      parts.push(...one.left.map(([name, mass, text, drawn]) => scale(drawn ? `↳ ${name}` : name, mass, text, "target")));
    }
    fill("decision", parts);
  }

  function play() {
    stop();
    if (now >= run.cycles.length - 1) go(-1);
    playing = setInterval(() => { go(now + 1); if (now >= run.cycles.length - 1) stop(); }, 1200);
    find("play").textContent = "pause";
  }
  function stop() {
    clearInterval(playing);
    playing = 0;
    find("play").textContent = "play";
  }
  const moved = (cycle) => { stop(); go(cycle); };
  const rejection = () => {
    const next = run.cycles.findIndex((cycle, at) => at > now && cycle.drafted.some((one) => one.kind === "rejected"));
    if (next >= 0) moved(next);
  };
  const acts = {
    first: () => moved(-1), back: () => moved(now - 1), forward: () => moved(now + 1), last: () => moved(run.cycles.length - 1),
    rejection, play: () => (playing ? stop() : play()),
  };
  for (const [name, act] of Object.entries(acts)) find(name).addEventListener("click", act);
  slider.addEventListener("input", () => moved(Number(slider.value) - 1));
  const keys = { ArrowLeft: acts.back, ArrowRight: acts.forward, Home: acts.first, End: acts.last, "!": rejection,
    ArrowUp: () => { token -= 1; draw(); }, ArrowDown: () => { token += 1; draw(); }, " ": acts.play };
  document.addEventListener("keydown", (event) => {
    const own = event.target instanceof HTMLElement && /^(BUTTON|INPUT|SUMMARY)$/.test(event.target.tagName);
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys) || (own && event.key === " ")) return;
    event.preventDefault();
    keys[event.key]();
  });
  let touched = null;
  document.addEventListener("touchstart", (event) => {
    const at = event.changedTouches[0];
    touched = event.target.closest("input") ? null : [at.clientX, at.clientY];
  }, { passive: true });
  document.addEventListener("touchend", (event) => {
    if (!touched) return;
    const at = event.changedTouches[0], x = at.clientX - touched[0], y = at.clientY - touched[1];
    if (Math.abs(x) > 50 && Math.abs(x) > 2 * Math.abs(y)) moved(now + (x < 0 ? 1 : -1));
  }, { passive: true });
  document.body.classList.add("ready");
  go(Math.min(run.begin, run.cycles.length) - 1);
})();
