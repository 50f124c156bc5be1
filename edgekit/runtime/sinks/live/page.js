// The live page: reads /stream (its format is in hub.py) and shows it. Text from outside goes through
// textContent or a canvas only.

import { drawAge, drawHistory, drawView } from "./plots.js";

const SILENT_MS = 5000; // the server writes twice a second: after this the connection is dead
const HIDDEN_MS = 3000; // a page that nobody sees costs the device nothing
const STALE_S = 2;
const STOPPED = { lost: "Lost", stalled: "No frames", frozen: "Frozen", hung: "Hung" };
const GOOD = new Set(["restarted", "swapped", "recalibrated", "ended"]);
const MINOR = new Set(["slow", "dropped", "sink-blocked", "corrupt", "clock-jump", "format-changed"]);

const $ = (id) => document.getElementById(id);
const views = new Map(); // "camera\nengine" -> view
const past = []; // {seconds, engines, cameras} of the last 5 s
let state = null, stateAt = 0, chosen = null, link = "wait", pointer = null;

// --- small things ---

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== "") element.textContent = text;
  return element;
}

/** Rows of cells; a cell is text, an element, or [text, class]. Rows stay where they are when nothing changed. */
function fill(body, rows) {
  const next = rows.map((row) => {
    const tr = make("tr", row.className || "");
    for (const cell of row.cells) {
      const td = make("td", Array.isArray(cell) ? cell[1] : "");
      td.append(Array.isArray(cell) ? cell[0] : cell);
      tr.append(td);
    }
    return tr;
  });
  body.replaceChildren(...next);
}

const ms = (value) => (value === undefined ? "–" : value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 2 : 1)} ms`);
const whole = (value) => Math.round(value).toLocaleString("en-US").replaceAll(",", "\u202f");
const share = (part, all) => (all ? `${((100 * part) / all).toFixed(part && part / all < 0.1 ? 1 : 0)} %` : "–");
const sum = (values) => values.reduce((a, b) => a + b, 0);

function bytes(count) {
  if (count < 1024) return `${count} B`;
  return count < 1 << 20 ? `${(count / 1024).toFixed(1)} KiB` : `${(count / (1 << 20)).toFixed(2)} MiB`;
}

function duration(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

function number(id, value, unit = "") {
  const parts = [value];
  if (unit) parts.push(make("small", "", unit));
  $(id).replaceChildren(...parts);
}

function tile(id, value) {
  const [text, unit] = ms(value).split(" ");
  number(id, text, unit);
}

function bar(part, all, kind = "") {
  const outer = make("div", `bar ${kind}`);
  outer.append(make("i"));
  outer.firstChild.style.width = `${all ? Math.min(100, (100 * part) / all) : 0}%`;
  return outer;
}

/** Seconds of the stream by now: the last it told, and what went by since. */
const streamSeconds = () => (state ? state.seconds + (link === "good" ? (performance.now() - stateAt) / 1000 : 0) : 0);

// --- cameras ---

function addView(camera, engine) {
  const root = make("article", "view");
  const picture = make("div", "picture");
  const canvas = make("canvas");
  canvas.setAttribute("role", "img");
  const over = make("div", "over");
  over.append(make("b"), make("span"));
  picture.append(canvas, over);
  const under = make("div", "under");
  const parts = { name: make("b"), badge: make("span", "badge"), missing: make("span", "badge warn missing"), rate: make("span"), layout: make("span", "layout"), age: make("span", "age") };
  under.append(...Object.values(parts));
  const classes = make("ol", "classes");
  classes.hidden = true;
  const track = make("canvas", "track");
  track.setAttribute("role", "img");
  track.setAttribute("aria-label", "The last seconds");
  track.hidden = true;
  root.append(picture, under, classes, track);
  const view = { camera, engine, root, picture, canvas, over, classes, track, ...parts, data: null, bitmap: null, next: null, busy: false, stale: false };
  views.set(`${camera}\n${engine}`, view);
  $("empty").hidden = true;
  $("views").append(root);
  $("views").classList.toggle("many", views.size > 1);
  new ResizeObserver(() => draw(view)).observe(canvas);
  new ResizeObserver(() => showTrack(view)).observe(track);
  return view;
}

/** A picture that is not what the camera sees now shows no results, as if they held. */
function draw(view) {
  drawView(view.canvas, view.bitmap, view.data, $("results").checked && !view.stale);
}

function viewOf(camera, engine) {
  const found = views.get(`${camera}\n${engine}`);
  if (found) return found;
  const blank = [...views].find(([, view]) => view.camera === camera && !view.data);
  if (blank) { blank[1].root.remove(); views.delete(blank[0]); }
  return addView(camera, engine);
}

/** The newest picture is decoded; those that came meanwhile are left out. */
async function showPicture(data, jpeg) {
  const view = viewOf(data.camera, data.engine);
  view.next = { data, jpeg };
  if (view.busy) return;
  view.busy = true;
  try {
    while (view.next) {
      const { data: info, jpeg: image } = view.next;
      view.next = null;
      const bitmap = await createImageBitmap(new Blob([image], { type: "image/jpeg" }));
      view.bitmap?.close();
      Object.assign(view, { bitmap, data: info });
      view.picture.style.aspectRatio = `${info.width} / ${info.height}`;
      draw(view);
      view.canvas.setAttribute("aria-label", `${info.camera || "camera"}: ${info.caption}`);
      showClasses(view);
      showTrack(view);
      showBadge(view);
    }
  } finally {
    view.busy = false;
  }
}

function showClasses(view) {
  const past = view.data?.history;
  const listed = past || view.data?.task === "classify";
  const shown = listed && $("results").checked && !view.stale ? view.data.found.slice(0, 5) : [];
  view.classes.hidden = !shown.length;
  view.classes.replaceChildren(...shown.map((thing) => {
    const line = make("li", past?.answer === thing.label ? "answer" : "");
    line.append(make("span", "", thing.label), bar(thing.score, 1), make("span", "", share(thing.score, 1)));
    if (past) line.children[1].firstChild.style.background = thing.color;
    return line;
  }));
}

/** The last seconds of a network that watches the stream: its answers, and the events that came of them. */
function showTrack(view) {
  const past = view.data?.history;
  view.track.hidden = !past || !$("results").checked;
  if (view.track.hidden) return;
  drawHistory(view.track, past);
  const events = past.events.map(([, end, label]) => `${label}${end === null ? ", going on" : ""}`);
  view.track.setAttribute("aria-label", `Last ${past.seconds} s: answer ${past.answer}; events: ${events.join("; ") || "none"}`);
}

function cameraOf(view) {
  const cameras = Object.entries(state?.cameras || {});
  const found = cameras.find(([name]) => name === view.camera) || (cameras.length === 1 ? cameras[0] : null);
  return found ? { name: found[0], ...found[1] } : null;
}

const lastEvent = (where, names) => state?.events.findLast((e) => e.where === where && names(e.name));

/** [badge, its kind, words over a picture that is not what the camera sees now, details]. */
function condition(view) {
  const camera = cameraOf(view), now = streamSeconds();
  const behind = view.data ? now - view.data.at : null;
  if (link === "ended" || camera?.state === "ended") return ["ended", "", "", ""];
  if (link !== "good") return ["disconnected", "bad", "Disconnected", ""];
  if (camera?.state === "lost") {
    const back = state.events.findLastIndex((e) => e.where === camera.name && e.name === "restarted");
    const stops = state.events.slice(back + 1).filter((e) => e.where === camera.name && e.name in STOPPED);
    // attempts to open it again fail with events of their own: since when is in the first
    const first = stops[0], word = first ? STOPPED[first.name] : "Lost";
    const when = first ? ` ${duration(now - first.seconds)} ago` : "";
    return [word.toLowerCase(), "bad", `${word}${when}, reopening`, stops[stops.length - 1]?.text || ""];
  }
  if (!view.data) return [camera?.state || "waiting", "", camera?.state === "opening" ? "Opening" : "Waiting for the first result", ""];
  if (behind > STALE_S) return ["no results", "bad", `No result for ${duration(behind)}`, ""];
  const recent = camera && lastEvent(camera.name, (name) => MINOR.has(name));
  if (recent && now - recent.seconds < 10) return [recent.name, "warn", "", ""];
  return ["live", "good", "", ""];
}

function showBadge(view) {
  const camera = cameraOf(view);
  const [word, kind, over, details] = condition(view);
  view.name.textContent = [view.camera || (views.size > 1 ? "camera" : camera?.name || "camera"), Object.keys(state?.engines || {}).length > 1 ? view.engine : ""].filter(Boolean).join(" · ");
  view.badge.textContent = word;
  view.badge.className = `badge ${kind}`;
  const stale = Boolean(over) && view.bitmap !== null;
  if (stale !== view.stale) {
    view.stale = stale;
    view.root.classList.toggle("stale", stale);
    draw(view);
    showClasses(view);
  }
  view.over.hidden = !over;
  view.over.classList.toggle("calm", kind !== "bad");
  view.over.firstChild.textContent = over;
  view.over.lastChild.textContent = details;
  view.layout.textContent = camera?.layout || "";
  const missing = view.data?.missing || [], notes = view.data?.notes || [];
  view.missing.hidden = Boolean(over) || !(missing.length || notes.length);
  view.missing.textContent = missing.length ? `without ${missing.join(", ")}` : notes.length ? "noted" : "";
  view.missing.title = notes.join("; ");
  view.age.textContent = view.data && !over ? `${ms(view.data.age_ms)} old` : "";
}

// --- numbers ---

/** Per second, over the last 5 s; null before the second state. */
function rate(pick) {
  const first = past[0], last = past[past.length - 1];
  if (!last || last.seconds - first.seconds < 0.3) return null;
  return (pick(last) - pick(first)) / (last.seconds - first.seconds);
}

function engineName() {
  const names = Object.keys(state.engines);
  if (!names.includes(chosen)) chosen = names[0];
  const shown = names.length > 1;
  $("engines").hidden = !shown;
  if (shown && $("engines").childElementCount !== names.length) {
    $("engines").replaceChildren(...names.map((name) => {
      const button = make("button", "", name || "engine");
      button.type = "button";
      button.addEventListener("click", () => { chosen = name; showState(); });
      return button;
    }));
  }
  [...$("engines").children].forEach((button, i) => button.setAttribute("aria-pressed", String(names[i] === chosen)));
  return chosen;
}

function showEngine() {
  const name = engineName(), engine = state.engines[name], minute = state.minute[name];
  const bins = minute?.bins || [], newest = bins[bins.length - 1];
  const age = engine?.age || {};
  tile("age-now", newest && newest[0] <= 3 ? newest[2] : undefined);
  for (const q of ["p50", "p95", "p99"]) tile(`age-${q}`, age[`${q}_ms`]);
  const results = rate((s) => s.engines[name]?.results || 0);
  number("rate", results === null ? "–" : results.toFixed(1), results === null ? "" : "/s");
  showAgePlot();

  const stages = (minute?.stages || []).filter(([stage, time]) => stage !== "unaccounted" || time >= 0);
  const total = sum(stages.map(([, time]) => time));
  const kind = (stage, i) => (stage === "unaccounted" ? "rest" : `s${i % 6}`);
  const segments = stages.map(([stage, time], i) => {
    const part = $("stage-bar").children[i] || $("stage-bar").appendChild(make("i"));
    part.className = kind(stage, i);
    part.style.flexGrow = String(total ? time / total : 0);
    part.title = `${stage} ${ms(time)}`;
    return part;
  });
  while ($("stage-bar").childElementCount > segments.length) $("stage-bar").lastChild.remove();
  $("stage-bar").setAttribute("aria-label", `Latency by stage: ${stages.map(([stage, time]) => `${stage} ${ms(time)}`).join(", ") || "no results"}`);
  const rows = stages.map(([stage, time], i) => {
    const label = make("span");
    label.append(make("span", `key ${kind(stage, i)}`), stage);
    return { cells: [label, [ms(time), "n"], [share(time, total), "n soft"]] };
  });
  if (rows.length) rows.push({ className: "total", cells: ["age", [ms(total), "n"], ["", ""]] });
  else rows.push({ cells: [["No results in the last 5 s", "soft"]] });
  fill($("stages").tBodies[0], rows);

  const hops = state.ledger[name] || [];
  const copied = sum(hops.map((hop) => hop.copied)), written = sum(hops.map((hop) => hop.written));
  fill($("ledger").tBodies[0], hops.length ? [
    ...hops.map((hop) => ({ cells: [hop.name, [hop.by, "soft"], [bytes(hop.copied), "n"], [bytes(hop.written), "n"]] })),
    { className: "total", cells: ["all", "", [bytes(copied), "n"], [bytes(written), "n"]] },
  ] : [{ cells: [["No frame yet", "soft"]] }]);
  $("copied").textContent = hops.length ? `${bytes(copied)} copied` : "";
  $("copied").className = `tag ${hops.length ? (copied ? "warn" : "good") : ""}`;

  const facts = Object.entries(engine?.facts || {});
  document.querySelector(".facts").hidden = !facts.length;
  $("facts").replaceChildren(...facts.flatMap(([key, value]) => [make("dt", "", key), make("dd", "", value)]));
}

function showAgePlot() {
  const bins = state.minute[chosen]?.bins || [];
  const marks = state.events.filter((e) => !GOOD.has(e.name)).map((e) => [state.seconds - e.seconds, MINOR.has(e.name)]).filter(([ago]) => ago <= 60);
  const found = drawAge($("age-plot"), bins, marks, pointer);
  const spot = found || bins[bins.length - 1];
  $("age-readout").textContent = found ? `${(found[0] / 2).toFixed(1)} s ago: ${ms(found[1])} to ${ms(found[3])}, mean ${ms(found[2])}` : "ms";
  $("age-plot").setAttribute("aria-label", spot ? `Age of results, last 60 s; newest mean ${ms(spot[2])}` : "Age of results: none in the last 60 s");
}

function showCameras() {
  const cameras = Object.entries(state.cameras);
  const sensors = new Set(Object.values(state.engines).flatMap((engine) => Object.keys(engine.rig?.sync || {})));
  for (const [name] of cameras) {
    if (sensors.has(name)) continue; // a moment shows all of them
    if (![...views.values()].some((view) => view.camera === name || cameras.length === 1)) addView(name, "");
  }
  const frames = sum(cameras.map(([, camera]) => camera.frames));
  const arrived = (camera) => camera.frames + (camera.drops.driver || 0);
  const drops = cameras.flatMap(([name, camera]) => Object.entries(camera.drops).map(([reason, count]) => ({ name, camera, reason, count })));
  const restarts = sum(cameras.map(([, camera]) => camera.restarts));
  const all = sum(drops.map((drop) => drop.count)), possible = sum(cameras.map(([, camera]) => arrived(camera)));
  number("dropped", frames ? ((100 * all) / possible).toFixed(all && all / possible < 0.1 ? 1 : 0) : "–", frames ? "%" : "");
  $("frame-total").textContent = `${whole(frames)} arrived${restarts ? `, ${restarts} ${restarts === 1 ? "restart" : "restarts"}` : ""}`;
  drops.sort((a, b) => b.count - a.count);
  fill($("drops").tBodies[0], drops.length ? drops.map((drop) => ({
    cells: [
      cameras.length > 1 ? `${drop.name || "camera"}: ${drop.reason}` : drop.reason,
      [bar(drop.count, arrived(drop.camera), drop.reason === "superseded" ? "warn" : "bad"), "grow"],
      [whole(drop.count), "n"],
      [share(drop.count, arrived(drop.camera)), "n soft"],
    ],
  })) : [{ cells: [["No frame was dropped", "soft"]] }]);
  const order = (view) => cameras.findIndex(([name]) => name === view.camera);
  const sorted = [...views.values()].sort((a, b) => order(a) - order(b) || a.engine.localeCompare(b.engine));
  if (sorted.some((view, i) => $("views").children[i + 1] !== view.root)) $("views").append(...sorted.map((view) => view.root));
  for (const view of sorted) {
    const name = cameraOf(view)?.name;
    const fps = rate((s) => s.cameras[name]?.frames || 0);
    showBadge(view);
    view.rate.textContent = fps === null || !view.over.hidden ? "" : `${fps.toFixed(1)} fps`;
  }
}

/** A rig's sensors: how old, how often missing and why last, and what their clocks and phases say. */
function showSensors() {
  const rig = state.engines[chosen]?.rig, results = state.engines[chosen]?.results || 0;
  document.querySelector(".sensors").hidden = !rig;
  if (!rig) return;
  $("sensor-note").textContent = rig.partial ? `${share(rig.partial, results)} of results without some` : "";
  const signed = (value) => (value === null || value === undefined ? "–" : `${value < 0 ? "−" : "+"}${ms(Math.abs(value))}`);
  fill($("sensors").tBodies[0], Object.entries(rig.sync).map(([name, facts]) => {
    const why = Object.entries(rig.missing[name] || {}).sort((a, b) => b[1] - a[1]);
    const label = make("span");
    label.append(facts.state === "running" ? "" : make("span", "badge bad", facts.state), facts.state === "running" ? "" : " ", name);
    const missing = make("span", why.length ? "" : "soft", why.length ? share(sum(why.map(([, n]) => n)), results) : "0 %");
    missing.title = why.map(([reason, n]) => `${reason} ${whole(n)}`).join(", ");
    return { cells: [label, [ms(rig.ages[name]?.p50_ms), "n"], [missing, "n"], [signed(facts.phase_ms), "n soft"], [signed(facts.arrival_ms), "n soft"]] };
  }));
}

function showEvents() {
  const clock = Date.now() / 1000 - state.seconds;
  const time = (seconds) => new Date((clock + seconds) * 1000).toLocaleTimeString([], { hour12: false });
  const rows = state.events.slice(-100).reverse().map((event) => ({
    cells: [time(event.seconds), event.where || "camera", make("span", `badge ${GOOD.has(event.name) ? "good" : MINOR.has(event.name) ? "warn" : "bad"}`, event.name), event.text],
  }));
  $("event-count").textContent = state.event_count > rows.length ? `newest ${rows.length} of ${whole(state.event_count)}` : "";
  fill($("events").tBodies[0], rows.length ? rows : [{ cells: [["No faults so far", "soft"]] }]);
}

function showSinks() {
  const sinks = Object.entries(state.sinks);
  document.querySelector(".sinks").hidden = !sinks.length;
  const kind = { running: "good", failed: "bad" };
  fill($("sinks").tBodies[0], sinks.map(([name, sink]) => ({
    cells: [name, make("span", `badge ${kind[sink.state] || ""}`, sink.state), [whole(sink.written), "n"], [whole(sink.dropped), "n"]],
  })));
}

function showState() {
  $("uptime").textContent = duration(state.seconds);
  showCameras();
  showEngine();
  showSensors();
  showEvents();
  showSinks();
}

function takeState(message) {
  if (state && message.run !== state.run) restart();
  state = message;
  stateAt = performance.now();
  past.push({ seconds: message.seconds, engines: message.engines, cameras: message.cameras });
  while (past.length > 2 && message.seconds - past[0].seconds > 5) past.shift();
  showState();
}

/** Another run of the stream: nothing of the last one is shown as if it were of this. */
function restart() {
  past.length = 0;
  for (const view of views.values()) view.root.remove();
  views.clear();
  $("empty").hidden = false;
}

// --- the connection ---

function setLink(kind, text, banner = "") {
  link = kind;
  $("status").className = `status ${kind === "ended" ? "wait" : kind}`;
  if ($("status").textContent !== text) $("status").textContent = text;
  $("banner").hidden = !banner;
  if ($("banner").textContent !== banner) $("banner").textContent = banner;
  for (const view of views.values()) showBadge(view);
}

/** Cuts a stream of bytes into messages: two lengths, JSON, JPEG. */
function parser(take) {
  let held = new Uint8Array(0);
  return (chunk) => {
    const all = new Uint8Array(held.length + chunk.length);
    all.set(held);
    all.set(chunk, held.length);
    let from = 0;
    while (all.length - from >= 8) {
      const lengths = new DataView(all.buffer, from, 8);
      const text = lengths.getUint32(0), jpeg = lengths.getUint32(4), end = from + 8 + text + jpeg;
      if (all.length < end) break;
      take(JSON.parse(new TextDecoder().decode(all.subarray(from + 8, from + 8 + text))), all.slice(from + 8 + text, end));
      from = end;
    }
    held = all.slice(from);
  };
}

let abort = null, hidden = 0;

async function readStream() {
  abort = new AbortController();
  let silent = setTimeout(() => abort.abort(), SILENT_MS), ended = false;
  const alive = () => { clearTimeout(silent); silent = setTimeout(() => abort.abort(), SILENT_MS); };
  try {
    const reply = await fetch("stream", { signal: abort.signal, cache: "no-store" });
    if (reply.status === 401) return ["bad", "No access", "The address has no valid token any more. Open the one that edgekit printed at its start."];
    if (reply.status === 503) return ["bad", "Busy", (await reply.text()).trim()];
    if (!reply.ok) return ["bad", `Error ${reply.status}`, (await reply.text()).trim()];
    const feed = parser((message, jpeg) => {
      if (message.kind === "picture") showPicture(message, jpeg);
      else if (message.kind === "state") { setLink("good", "Live"); takeState(message); }
      else if (message.kind === "end") ended = true;
    });
    const reader = reply.body.getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      alive();
      feed(value);
    }
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof TypeError)) throw error; // TypeError: the network's
  } finally {
    clearTimeout(silent);
  }
  return ended ? ["ended", "Ended", ""] : ["bad", "Disconnected", state ? "Disconnected. What you see is not live. Trying again." : ""];
}

async function run() {
  for (let wait = 500; ; wait = Math.min(4000, wait * 1.5)) {
    if (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
    const before = performance.now();
    const outcome = await readStream();
    if (!document.hidden) setLink(...outcome);
    if (performance.now() - before > 3000) wait = 500;
    if (!document.hidden) await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(hidden);
  if (document.hidden) hidden = setTimeout(() => abort?.abort(), HIDDEN_MS);
});
$("results").addEventListener("change", () => {
  for (const view of views.values()) {
    draw(view);
    showClasses(view);
    showTrack(view);
  }
});
for (const [kind, at] of [["pointermove", (e) => e.offsetX], ["pointerleave", () => null]]) {
  $("age-plot").addEventListener(kind, (event) => { pointer = at(event); if (state) showAgePlot(); });
}
new ResizeObserver(() => { if (state) showAgePlot(); }).observe($("age-plot"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (state) showAgePlot();
  for (const view of views.values()) showTrack(view);
});
setInterval(() => { for (const view of views.values()) showBadge(view); }, 500);
run();
