// Curves as SVG, with a read-out for pointer and keyboard.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 380, HEIGHT = 190, LEFT = 50, RIGHT = 10, TOP = 10, BOTTOM = 26;

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

function hoursAt(clock, step) {
  let [before, spent] = [0, 0];
  for (const [place, hours] of clock) {
    if (place >= step) return place === before ? hours : spent + (hours - spent) * (step - before) / (place - before);
    [before, spent] = [place, hours];
  }
  return spent;
}

function along(run, step, axis) {
  if (axis === "images") return step * run.batch;
  return axis === "hours" ? hoursAt(run.clock, step) : step;
}

// Round numbers that cut a range into three to six.
function ticks(low, high) {
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const size = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let place = Math.ceil(low / size); place * size <= high + size * 1e-9; place++) found.push(place * size);
  return found;
}

function say(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 9.995e-4) return value.toExponential(1).replace(".0e", "e").replace("e-", "e−");
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)} k`;
  return String(+value.toPrecision(4));
}

// All charts end at the same place.
function farthest(axis) {
  const ends = data.runs.flatMap((run) => Object.values(run.points).map((points) => along(run, points.at(-1)[0], axis)));
  return Math.max(...ends) || 1;
}

function draw(curve, axis, right) {
  const factor = curve.unit === "%" ? 100 : 1;
  const lines = data.runs.map((run) =>
    (run.points[curve.name] ?? []).map(([step, value]) => [along(run, step, axis), value * factor, step]));
  const all = lines.flat();
  let [low, high] = [Math.min(...all.map((point) => point[1])), Math.max(...all.map((point) => point[1]))];
  if (low === high) [low, high] = low === 0 ? [-1, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const pad = (high - low) * 0.05;
  low = low >= 0 ? Math.max(0, low - pad) : low - pad;
  high += pad;
  const x = (value) => LEFT + value / right * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);

  const figure = document.createElement("figure");
  figure.className = "chart";
  figure.dataset.curve = curve.name;
  const caption = document.createElement("figcaption");
  caption.textContent = curve.title + (curve.unit ? `, ${curve.unit}` : "");
  const help = document.createElement("span");
  help.textContent = curve.help;
  caption.append(help);
  const told = document.createElement("output");
  const label = `${curve.title}: from ${say(lines.find((line) => line.length)[0][1])} to ` +
    `${say(lines.find((line) => line.length).at(-1)[1])}${curve.unit ? " " + curve.unit : ""}`;
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img", "aria-label": label });
  for (const value of ticks(low, high)) {
    element("line", { class: "tick", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }, svg);
    element("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, svg).textContent = say(value);
  }
  for (const value of ticks(0, right)) {
    const anchor = x(value) > WIDTH - 30 ? "end" : "middle";
    element("text", { x: x(value), y: HEIGHT - 8, "text-anchor": anchor }, svg).textContent = say(value);
  }
  lines.forEach((line, run) => {
    const points = line.map(([across, value]) => `${x(across).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    element("polyline", { class: `curve run${run % 6}`, points }, svg);
    if (line.length < 12) for (const [across, value] of line) {
      element("circle", { class: `dot run${run % 6}`, cx: x(across), cy: y(value), r: 2.5 }, svg);
    }
  });
  const cross = element("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, svg);
  const marks = lines.map((_, run) => element("circle", { class: `dot run${run % 6}`, r: 4, visibility: "hidden" }, svg));
  const unit = axis === "hours" ? "hours" : axis === "images" ? "images" : "step";

  function read(across) {
    const texts = [];
    lines.forEach((line, run) => {
      if (!line.length) return;
      const near = line.reduce((best, point) => Math.abs(point[0] - across) < Math.abs(best[0] - across) ? point : best);
      if (!texts.length) {
        texts.push(`${unit} ${axis === "step" ? near[0].toLocaleString("en") : say(near[0])}`);
        cross.setAttribute("x1", x(near[0]));
        cross.setAttribute("x2", x(near[0]));
        cross.setAttribute("visibility", "visible");
      }
      marks[run].setAttribute("cx", x(near[0]));
      marks[run].setAttribute("cy", y(near[1]));
      marks[run].setAttribute("visibility", "visible");
      const name = data.runs.length > 1 ? `${data.runs[run].name} ` : "";
      texts.push(`${name}${say(near[1])}${curve.unit ? " " + curve.unit : ""}`);
    });
    told.textContent = texts.join(" · ");
  }
  function hide() {
    told.textContent = "";
    for (const mark of [cross, ...marks]) mark.setAttribute("visibility", "hidden");
  }
  const places = lines.find((line) => line.length).map((point) => point[0]);
  let place = places.length - 1;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    read(((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * right);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) read(places[place]); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: places.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    place = Math.min(Math.max(moves[event.key], 0), places.length - 1);
    read(places[place]);
  });
  figure.append(caption, svg, told);
  return figure;
}

const charts = document.getElementById("charts");
function drawAll() {
  const axis = document.querySelector("input[name=axis]:checked").value;
  charts.replaceChildren(...data.curves.map((curve) => draw(curve, axis, farthest(axis))));
  if (!data.curves.length) charts.textContent = "Nothing was logged twice yet.";
}
document.getElementById("axis").addEventListener("change", drawAll);
drawAll();
