// What is drawn on canvases: the picture with its boxes, what was seen in the last seconds, and the age over the last minute.

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif';
const SPAN_S = 60;

/** A canvas sized to its place on the screen, in CSS pixels; null where it is not shown. */
function surface(canvas) {
  const ratio = Math.min(window.devicePixelRatio || 1, 3);
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width || !height) return null;
  const w = Math.round(width * ratio), h = Math.round(height * ratio);
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return { context, width, height };
}

/** Dark or light letters, whichever read better on a colour #rrggbb (WCAG 2.1 relative luminance). */
function ink(color) {
  const [r, g, b] = [1, 3, 5].map((i) => (parseInt(color.slice(i, i + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.25 ? "#141414" : "#ffffff";
}

const overlaps = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;

/** The picture, and boxes with labels that never cover one another: the best scored have theirs. */
export function drawView(canvas, bitmap, data, results) {
  const place = surface(canvas);
  if (!place || !bitmap) return;
  const { context: c, width, height } = place;
  c.drawImage(bitmap, 0, 0, width, height);
  if (!results) return;
  const sx = width / data.width, sy = height / data.height;
  const thin = width < 480;
  const boxes = data.found.filter((thing) => thing.box).map((thing) => {
    const [x1, y1, x2, y2] = thing.box;
    return { x: x1 * sx, y: y1 * sy, w: (x2 - x1) * sx, h: (y2 - y1) * sy, ...thing };
  });
  for (const box of [...boxes].reverse()) {
    c.lineJoin = "round";
    c.strokeStyle = "rgba(16, 16, 16, 0.55)";
    c.lineWidth = thin ? 3 : 4;
    c.strokeRect(box.x, box.y, box.w, box.h);
    c.strokeStyle = box.color;
    c.lineWidth = thin ? 1.5 : 2;
    c.strokeRect(box.x, box.y, box.w, box.h);
  }
  const scenes = data.found.filter((thing) => thing.lines);
  for (const thing of [...scenes].reverse()) {
    const path = new Path2D();
    for (let i = 0; i < thing.lines.length; i += 4) {
      const [x1, y1, x2, y2] = thing.lines.slice(i, i + 4);
      path.moveTo(x1 * sx, y1 * sy);
      path.lineTo(x2 * sx, y2 * sy);
    }
    c.lineCap = c.lineJoin = "round";
    for (const [color, line] of [["rgba(16, 16, 16, 0.5)", thin ? 2 : 2.5], [thing.color, thin ? 0.8 : 1.2]]) {
      c.strokeStyle = color;
      c.lineWidth = line;
      c.stroke(path);
    }
    if (!thing.at) continue;
    const [x1, y1, x2, y2] = thing.at;
    boxes.push({ x: x1 * sx, y: y1 * sy, w: (x2 - x1) * sx, h: (y2 - y1) * sy, ...thing });
  }
  if (scenes.length) boxes.sort((a, b) => b.h - a.h); // the nearest have their names
  const size = thin || scenes.length ? 10.5 : 12;
  c.font = `600 ${size}px ${FONT}`;
  c.textBaseline = "middle";
  const tags = [];
  for (const box of boxes) {
    if (thin && box.w < 8) continue;
    const text = `${box.label} ${Math.round(box.score * 100)}%`;
    const w = c.measureText(text).width + 9, h = size + 6;
    const left = Math.max(0, Math.min(box.x - 1, width - w));
    const right = Math.max(0, Math.min(box.x + box.w - w + 1, width - w));
    const spots = [[left, box.y - h], [right, box.y - h], [left, box.y + box.h], [right, box.y + box.h], [left, box.y]];
    const tag = spots.map(([x, y]) => ({ x, y, w, h })).find((spot) =>
      spot.y >= 0 && spot.y + h <= height && !tags.some((other) => overlaps(spot, other)));
    if (!tag) continue;
    tags.push(tag);
    c.fillStyle = box.color;
    c.beginPath();
    c.rect(tag.x, tag.y, w, h);
    c.fill();
    c.fillStyle = ink(box.color);
    c.fillText(text, tag.x + 4.5, tag.y + h / 2 + 0.5);
  }
}

/**
 * The last seconds: a strip of answers in their classes' colours, and above it events from start to end. Now is at the right.
 * past: {seconds, answers: [ago, label, colour], events: [ago, ago or null, label, colour]} (picture.py).
 */
export function drawHistory(canvas, past) {
  const place = surface(canvas);
  if (!place) return;
  const { context: c, width, height } = place;
  const css = getComputedStyle(document.documentElement);
  const color = (name) => css.getPropertyValue(name);
  const events = 22, gap = 3, axis = 16, bottom = height - axis, top = events + gap;
  const x = (ago) => width * (1 - Math.min(past.seconds, Math.max(0, ago)) / past.seconds);
  c.clearRect(0, 0, width, height);
  c.fillStyle = color("--track");
  c.fillRect(0, 0, width, bottom);
  past.answers.forEach(([ago, , fill], i) => {
    if (!fill) return;
    const end = i + 1 < past.answers.length ? past.answers[i + 1][0] : 0;
    c.fillStyle = fill;
    c.fillRect(x(ago), top, Math.max(1, x(end) - x(ago)), bottom - top);
  });
  c.font = `600 11px ${FONT}`;
  c.textBaseline = "middle";
  c.textAlign = "left";
  past.events.forEach(([start, end, label, fill], i) => {
    const left = x(start), w = Math.max(3, x(end ?? 0) - left);
    c.fillStyle = fill;
    c.beginPath();
    c.rect(left, 0, w, events);
    c.fill();
    c.fillStyle = color("--ink"); // its edges, through both rows
    if (start < past.seconds) c.fillRect(left, 0, 1.5, bottom);
    if (end !== null) c.fillRect(left + w - 1.5, 0, 1.5, bottom);
    // within the event, or beside it where there is more room before the next one
    const next = i + 1 < past.events.length ? x(past.events[i + 1][0]) : width;
    const inside = w - 10, beside = next - left - w - 8, wide = (text) => c.measureText(text).width;
    const within = wide(label) <= inside || inside >= beside;
    let text = label, room = Math.max(inside, beside);
    if (wide(label) > room) {
      while (text && wide(`${text}…`) > room) text = text.slice(0, -1);
      text = text.length > 1 ? `${text}…` : "";
    }
    c.fillStyle = within ? ink(fill) : color("--ink");
    c.fillText(text, within ? left + 6 : left + w + 4, events / 2 + 0.5);
  });
  c.font = `11px ${FONT}`;
  c.textBaseline = "alphabetic";
  c.fillStyle = color("--soft");
  const every = past.seconds > 8 ? 2 : 1;
  for (let ago = 0; ago <= past.seconds; ago += every) {
    c.fillRect(Math.min(width - 1, Math.round(x(ago))), bottom, 1, 3);
    c.textAlign = ago === 0 ? "right" : ago === past.seconds ? "left" : "center";
    c.fillText(ago ? `−${ago} s` : "now", x(ago), height - 2);
  }
}

/** The smallest of 1, 2, 5 times a power of ten that splits `largest` into at most `parts`. */
function step(largest, parts) {
  const rough = largest / parts, power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
}

/**
 * Mean age as a line in a band from least to largest, by half seconds.
 * bins: [half seconds ago, least, mean, largest (ms), results], oldest first. marks: [seconds ago, whether it is a small one] of faults.
 * pointer: x in CSS pixels or null. Returns the bin under the pointer, or null.
 */
export function drawAge(canvas, bins, marks, pointer) {
  const place = surface(canvas);
  if (!place) return null;
  const { context: c, width, height } = place;
  const css = getComputedStyle(document.documentElement);
  const color = (name) => css.getPropertyValue(name);
  const top = 8, bottom = height - 20, left = 38, right = width - 6;
  c.clearRect(0, 0, width, height);
  c.font = `11px ${FONT}`;
  const largest = Math.max(1, ...bins.map((bin) => bin[3])) * 1.06;
  const every = step(largest, 4);
  const most = Math.ceil(largest / every) * every;
  const x = (seconds) => right - (seconds / SPAN_S) * (right - left);
  const y = (ms) => bottom - (ms / most) * (bottom - top);
  c.textBaseline = "middle";
  c.textAlign = "right";
  for (let ms = 0; ms <= most * 1.001; ms += every) {
    c.fillStyle = color(ms ? "--line" : "--rest");
    c.fillRect(left, Math.round(y(ms)), right - left, 1);
    c.fillStyle = color("--soft");
    c.fillText(String(+ms.toPrecision(6)), left - 7, y(ms));
  }
  c.textBaseline = "alphabetic";
  for (const seconds of [60, 45, 30, 15, 0]) {
    c.textAlign = seconds === 60 ? "left" : seconds ? "center" : "right";
    c.fillText(seconds ? `−${seconds} s` : "now", x(seconds), height - 4);
  }
  c.save();
  c.beginPath();
  c.rect(left, 0, right - left, height);
  c.clip();
  c.lineWidth = 1;
  c.setLineDash([3, 3]);
  for (const [ago, minor] of marks) {
    c.strokeStyle = color(minor ? "--s1" : "--bad");
    c.beginPath();
    c.moveTo(x(ago), top);
    c.lineTo(x(ago), bottom);
    c.stroke();
  }
  c.setLineDash([]);
  const gaps = bins.slice(1).map((bin, i) => bins[i][0] - bin[0]).sort((a, b) => a - b);
  const allowed = Math.max(2, 3 * (gaps[gaps.length >> 1] || 1));
  const runs = [];
  bins.forEach((bin, i) => {
    if (!i || bins[i - 1][0] - bin[0] > allowed) runs.push([]);
    runs[runs.length - 1].push(bin);
  });
  const at = (bin) => x(bin[0] / 2);
  for (const run of runs) {
    c.beginPath();
    run.forEach((bin) => c.lineTo(at(bin), y(bin[3])));
    [...run].reverse().forEach((bin) => c.lineTo(at(bin), y(bin[1])));
    c.closePath();
    c.fillStyle = color("--band");
    c.fill();
    c.beginPath();
    run.forEach((bin) => c.lineTo(at(bin), y(bin[2])));
    if (run.length === 1) c.lineTo(at(run[0]) + 2, y(run[0][2]));
    c.strokeStyle = color("--accent");
    c.lineWidth = 2;
    c.lineJoin = "round";
    c.stroke();
  }
  let found = null;
  if (pointer !== null && bins.length) {
    found = bins.reduce((a, b) => (Math.abs(at(b) - pointer) < Math.abs(at(a) - pointer) ? b : a));
    c.fillStyle = color("--rest");
    c.fillRect(Math.round(at(found)), top, 1, bottom - top);
    c.fillStyle = color("--accent");
    c.beginPath();
    c.arc(at(found), y(found[2]), 3.5, 0, 7);
    c.fill();
  }
  c.restore();
  return found;
}
