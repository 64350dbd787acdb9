// Attention and similarity of single patches, and the steps of a masked autoencoder.
const { runs, panels, viridis, inferno } = JSON.parse(document.getElementById("data").textContent);

function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let place = 0; place < raw.length; place++) bytes[place] = raw.charCodeAt(place);
  return bytes;
}

const byId = (name) => document.getElementById(name);
// Those of a run are decoded when it is first looked at.
const opened = new Map();

function open(run) {
  if (opened.has(run)) return opened.get(run);
  const panel = panels[run];
  opened.set(run, {
    ...panel,
    pictures: panel.images.map((item) => {
      const made = new Image();
      made.src = item.picture;
      return made;
    }),
    maps: panel.images.map((item) => ({
      similarity: unpack(item.similarity),
      attention: item.attention ? unpack(item.attention) : null,
    })),
  });
  return opened.get(run);
}

function option(select, value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  select.append(made);
}

// New options; the value stays where there is still one like it.
function refill(select, options, otherwise = options[0]?.[0]) {
  const before = select.value;
  select.replaceChildren();
  for (const [value, text] of options) option(select, value, text);
  select.value = options.some(([value]) => String(value) === before) ? before : otherwise;
}

function lookInside() {
  const chosen = byId("panel-run"), image = byId("panel-image"), map = byId("panel-map");
  const layer = byId("panel-layer"), head = byId("panel-head");
  const source = byId("panel-source"), target = byId("panel-target"), told = byId("panel-told");
  let panel, rows, columns, count, side, patch;

  // Another run may have another grid, other blocks and other images; what both have stays chosen.
  function begin() {
    panel = open(Number(chosen.value));
    [rows, columns] = panel.grid;
    count = rows * columns;
    patch = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
    // Whole pixels for each patch, so that the grid falls between them.
    side = Math.max(1, Math.floor(512 / Math.max(rows, columns)));
    for (const canvas of [source, target]) [canvas.width, canvas.height] = [columns * side, rows * side];
    const attention = panel.layers.length > 0;
    refill(image, panel.images.map((item, place) => [place, item.name]), 0);
    refill(map, [
      ...attention ? [["attention", "attention of the patch"]] : [],
      ...attention && panel.has_cls ? [["cls", "attention of the class token"]] : [],
      ["similarity", "similarity to the patch"],
    ]);
    const last = layer.selectedIndex === layer.options.length - 1;
    refill(layer, panel.layers.map((number) => [number, number + 1]), panel.layers.at(-1));
    if (last) layer.selectedIndex = layer.options.length - 1;
    refill(head, [["mean", "mean"], ...Array.from({ length: panel.heads }, (_, number) => [number, number + 1])]);
    head.parentElement.hidden = panel.heads === 0;
    layer.parentElement.hidden = !attention;
    Promise.all(panel.pictures.map((picture) => picture.decode())).then(paint);
  }

  function values() {
    const own = panel.maps[Number(image.value)];
    if (map.value === "similarity") {
      return Float32Array.from(own.similarity.subarray(patch * count, (patch + 1) * count), (byte) => byte / 255);
    }
    const queries = count + (panel.has_cls ? 1 : 0), heads = Math.max(panel.heads, 1);
    const query = map.value === "cls" ? 0 : patch + (panel.has_cls ? 1 : 0);
    const block = panel.layers.indexOf(Number(layer.value));
    const numbers = head.value === "mean" ? [...Array(heads).keys()] : [Number(head.value)];
    const found = new Float32Array(count);
    for (const number of numbers) {
      const start = ((block * heads + number) * queries + query) * count;
      for (let place = 0; place < count; place++) found[place] += own.attention[start + place] / 255;
    }
    const most = found.reduce((best, value) => Math.max(best, value), 1e-9);
    return found.map((value) => value / most);
  }

  function paint() {
    const found = values(), colours = map.value === "similarity" ? viridis : inferno;
    const brush = source.getContext("2d"), page = target.getContext("2d");
    brush.imageSmoothingEnabled = false;
    brush.drawImage(panel.pictures[Number(image.value)], 0, 0, source.width, source.height);
    if (map.value !== "cls") {
      const left = patch % columns * side, top = Math.floor(patch / columns) * side;
      for (const [colour, inset, thick] of [["#fff", -1.5, 5], ["#d81b1b", -0.5, 2.5]]) {
        brush.strokeStyle = colour;
        brush.lineWidth = thick;
        brush.strokeRect(left + inset, top + inset, side - 2 * inset, side - 2 * inset);
      }
    }
    let best = 0;
    for (let place = 0; place < count; place++) {
      const looks = map.value !== "similarity" || place !== patch;
      if (looks && (found[place] > found[best] || (map.value === "similarity" && best === patch))) best = place;
      const colour = colours[Math.min(63, Math.floor(found[place] * 64))];
      page.fillStyle = `#${colour.toString(16).padStart(6, "0")}`;
      page.fillRect(place % columns * side, Math.floor(place / columns) * side, side, side);
    }
    const scale = byId("panel-scale").getContext("2d");
    colours.forEach((colour, place) => {
      scale.fillStyle = `#${colour.toString(16).padStart(6, "0")}`;
      scale.fillRect(place, 0, 1, 1);
    });
    const similar = map.value === "similarity";
    layer.disabled = head.disabled = similar;
    byId("panel-low").textContent = similar ? "0 or less" : "none";
    byId("panel-high").textContent = similar ? "1" : "most";
    byId("panel-from").textContent = similar ? "The patch that is compared"
      : map.value === "cls" ? "The image" : "The patch that looks";
    byId("panel-what").textContent = similar ? "Cosine similarity of the last block's tokens" : "Attention, brightest at its largest";
    const where = (place) => `row ${Math.floor(place / columns) + 1}, column ${place % columns + 1}`;
    const who = map.value === "cls" ? "The class token" : `The patch in ${where(patch)}`;
    const which = `block ${Number(layer.value) + 1}, ${head.value === "mean" ? "mean of the heads" : `head ${Number(head.value) + 1}`}`;
    told.textContent = similar
      ? `${who} is most like the one in ${where(best)}: ${found[best].toFixed(2)}.`
      : `${who} looks most at ${where(best)} (${which}).`;
  }

  function choose(event) {
    const box = source.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / box.width * columns);
    const row = Math.floor((event.clientY - box.top) / box.height * rows);
    if (row < 0 || row >= rows || column < 0 || column >= columns || patch === row * columns + column) return;
    patch = row * columns + column;
    paint();
  }
  source.addEventListener("pointermove", choose);
  source.addEventListener("pointerdown", choose);
  source.addEventListener("keydown", (event) => {
    const [row, column] = [Math.floor(patch / columns), patch % columns];
    const moves = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, columns - 1],
    };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    patch = Math.min(Math.max(move[0], 0), rows - 1) * columns + Math.min(Math.max(move[1], 0), columns - 1);
    paint();
  });
  for (const select of [image, map, layer, head]) select.addEventListener("change", paint);
  chosen.addEventListener("change", begin);
  begin();
}

function stepThrough() {
  const chosen = byId("panel-run"), image = byId("panel-image"), part = byId("mae");
  const picture = byId("mae-picture"), grid = byId("mae-grid"), text = byId("mae-text"), number = byId("mae-number");
  const back = byId("mae-back"), next = byId("mae-next"), line = "rgba(127,127,127,.8)";
  let panel, steps = [], place = 0;

  function begin() {
    panel = open(Number(chosen.value));
    part.hidden = !panel.steps;
    if (!panel.steps) return;
    const about = panel.steps, [rows, columns] = panel.grid;
    const units = about.norm_pix_loss
      ? " Each is predicted normalised by itself; its mean and contrast are taken from the original here." : "";
    steps = [
      ["picture", "Patchify", `The image is cut into ${rows} x ${columns} = ${about.num_patches} patches of ${about.pixels} numbers.`],
      ["masked", "Mask", `${about.num_patches - about.num_kept} of them, drawn at random, are removed. Nothing of them enters the encoder.`],
      ["tokens", "Encode", `${about.depth} blocks turn the ${about.num_kept} that stay into tokens of ${about.embed_dim} numbers, shown here by their three main components as colours.`],
      ["filled", "Decode", `A mask token is put in each gap, and ${about.decoder_depth} blocks of width ${about.decoder_embed_dim} predict the pixels of the removed patches; the visible ones are shown as they are. The loss is the squared error on the removed ones alone.${units}`],
    ];
    grid.style.backgroundImage =
      `linear-gradient(to right, ${line} 1px, transparent 1px), linear-gradient(to bottom, ${line} 1px, transparent 1px)`;
    grid.style.backgroundSize = `${100 / columns}% ${100 / rows}%`;
    show();
  }

  function show() {
    if (!panel.steps) return;
    const [key, title, words] = steps[place], item = panel.images[Number(image.value)];
    picture.src = item[key];
    picture.alt = `${title}: ${item.name}`;
    text.textContent = `${title}. ${words}`;
    number.textContent = `${place + 1} of ${steps.length}: ${title}`;
    grid.style.display = place === 0 ? "block" : "none";
    back.disabled = place === 0;
    next.disabled = place === steps.length - 1;
  }
  back.addEventListener("click", () => { place--; show(); });
  next.addEventListener("click", () => { place++; show(); });
  image.addEventListener("change", show);
  chosen.addEventListener("change", begin);
  begin();
}

if (panels.some((panel) => panel)) {
  panels.forEach((panel, run) => { if (panel) option(byId("panel-run"), run, runs[run].name); });
  lookInside();
  if (byId("mae")) stepThrough();
}
